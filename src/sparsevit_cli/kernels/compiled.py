"""The C++ of `cpp/`, compiled once per source, compiler and CPU, and kept in the folder of `cache`."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsevit_cli.atomic import TEMPORARY
from sparsevit_cli.errors import first_line

from . import cache

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fopenmp",
         "-shared", "-fPIC")  # fmt: skip
LANES_OF_AVX2 = 8
SECONDS = 300
"""A compiler that takes longer hangs."""
SECONDS_TO_ANSWER = 30
"""One that takes longer to tell what it knows of itself, too; and a library that takes longer to load."""
FUNCTIONS = ("block_workspace", "projection_workspace", "run_block", "run_merging", "run_embedding", "run_scoring",
             "lanes", "has_bfloat", "sizes")  # fmt: skip
TRIAL = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).lanes()"

_log = logging.getLogger(__name__)


def is_measured() -> bool:
    """True on CPUs of a kind on which these kernels were found to be faster: x86-64 with AVX2 or AVX-512."""
    return may_be_measured() and load().lanes() >= LANES_OF_AVX2


def may_be_measured() -> bool:
    """False where `is_measured` is, and nothing has to be compiled to say so."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def version() -> str:
    """Of source, compiler and CPU: two equal ones are the same code."""
    return _key(_compiler())


@lru_cache
def load() -> Any:
    """The compiled library. Raises RuntimeError with the reason where there is none."""
    if sys.platform != "linux":
        raise RuntimeError(f"the C++ kernels are for Linux, not {sys.platform}")
    compiler = _compiler()
    name = f"windows-{_key(compiler)}.so"
    try:
        folder = cache.cache_folder()
    except OSError as error:
        do = "set XDG_CACHE_HOME to a folder that only you can write"
        _log.warning("each process compiles the C++ kernels anew: %s; %s", cache.in_words(error), do)
        return _made(compiler, None)[0]
    if (content := cache.read_library(folder / name)) is not None:
        return _loaded(content)
    with cache.one_at_a_time(folder):
        if (content := cache.read_library(folder / name)) is not None:  # another process compiled it meanwhile
            return _loaded(content)
        library, content = _made(compiler, folder)
        cache.keep_library(folder / name, content)
    return library


def _made(compiler: str, folder: Path | None) -> tuple[ctypes.CDLL, bytes]:
    """The library, loaded, and its bytes, compiled in a private folder inside `folder`."""
    _log.info("compiling the C++ kernels for this CPU (%s, some seconds)", compiler)
    try:
        prefix, parent = (TEMPORARY, folder) if folder else ("sparsevit-cli-", cache.scratch_folder())
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as private:
            made = Path(private) / "library.so"
            _said_by(compiler, *FLAGS, str(SOURCES / "library.cpp"), "-o", str(made), seconds=SECONDS, scratch=private)
            content = cache.read_own_file(made)
    except subprocess.SubprocessError as error:
        raise RuntimeError(f"{compiler} did not compile the C++ kernels ({_complaint(error)})") from error
    except OSError as error:
        raise RuntimeError(f"the C++ kernels cannot be compiled ({cache.in_words(error)})") from error
    if not content:
        raise RuntimeError(f"{compiler} did not compile the C++ kernels (it wrote no library)")
    try:
        return _loaded(content, is_tried=True), content
    except RuntimeError as error:
        raise RuntimeError(f"what {compiler} made of the C++ kernels cannot be used ({error})") from error


def _loaded(content: bytes, *, is_tried: bool = False) -> ctypes.CDLL:
    """The library in `content`, from memory: nobody can change, cut or exchange it between look and use.

    With `is_tried` another process loads it first, which it may end. Raises RuntimeError.
    """
    try:
        descriptor = _in_memory(content)  # stays open: for the loader the same path is the same library
        path = f"/proc/self/fd/{descriptor}"
        if is_tried:
            _refuse_deadly(path, descriptor)
        library = ctypes.CDLL(path)
        for name in FUNCTIONS:
            getattr(library, name)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"the C++ kernels cannot be loaded ({first_line(error)})") from error
    for workspace in (library.block_workspace, library.projection_workspace):
        workspace.restype = ctypes.c_int64
    return library


def _in_memory(content: bytes) -> int:
    """Descriptor of a file without a name."""
    try:
        descriptor = os.memfd_create("sparsevit-cli")
    except OSError:  # a system may forbid it
        with tempfile.TemporaryFile(dir=cache.scratch_folder()) as file:
            descriptor = os.dup(file.fileno())
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return descriptor


def _refuse_deadly(path: str, descriptor: int) -> None:
    """Raise OSError where a process that loads the library is killed by a signal: for a bad address, or instruction."""
    command = (sys.executable, "-I", "-S", "-c", TRIAL, path)
    tried = subprocess.run(
        command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS_TO_ANSWER,
        check=False,
    )  # fmt: skip
    if tried.returncode < 0:
        raise OSError(f"it ends a process: {signal.strsignal(-tried.returncode)}")


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("there is no C++ compiler (g++, c++ or $CXX)")


@lru_cache
def _key(compiler: str) -> str:
    """What the library depends on: the source, the flags, and all that the compiler knows of itself and this CPU."""
    try:
        known = _said_by(compiler, *FLAGS, "-x", "c++", "-dM", "-E", os.devnull, seconds=SECONDS_TO_ANSWER)
        sources = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]pp"))]
    except subprocess.SubprocessError as error:
        raise RuntimeError(f"{compiler} does not run ({_complaint(error)})") from error
    except OSError as error:
        raise RuntimeError(f"{compiler} does not run ({first_line(error)})") from error
    return hashlib.sha256(b"\0".join((*sources, *map(os.fsencode, FLAGS), known))).hexdigest()[:16]


def _said_by(*command: str, seconds: float, scratch: str | None = None) -> bytes:
    """What a command printed; its temporary files lie in `scratch`.

    Raises OSError, or SubprocessError where it fails or takes longer; then nothing that it started goes on.
    """
    environment = {**os.environ, "TMPDIR": scratch} if scratch else None
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, complaint = process.communicate(timeout=seconds)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[0], said, complaint)
    return said


def _complaint(error: subprocess.SubprocessError) -> str:
    """The first line of what a command said, whatever bytes it said, or why it was ended."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it was ended after {error.timeout:g} seconds"
    said = getattr(error, "stderr", None) or b""
    line = first_line(said.decode("utf-8", "replace"))
    return "".join(letter for letter in line if letter.isprintable()) or f"{error}"
