"""The C++ of this folder, compiled with GCC at first use and kept in the folder of `kernels.cache`.

One library per source, flags, compiler, CPU and C library. It is loaded only when it is whole and nobody else can have
written it; a process of its own tries a new one first.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
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
from sparsevit_cli.kernels import cache

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fopenmp",
         "-shared", "-fPIC")  # fmt: skip
LANES_OF_AVX2 = 8
CPUINFO = Path("/proc/cpuinfo")
UNMEASURED = "the C++ kernels were measured on x86-64 CPUs with AVX2 alone"
SECONDS = 300
"""A compiler that takes longer hangs."""
SECONDS_TO_ANSWER = 30
"""A compiler that takes longer to list its macros hangs too, and so does a library that takes longer to load."""
FUNCTIONS = ("block_workspace", "projection_workspace", "run_block", "run_merging", "run_embedding", "run_scoring",
             "lanes", "has_bfloat", "sizes")  # fmt: skip
TRIAL = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).lanes()"

_log = logging.getLogger(__name__)


def is_measured() -> bool:
    """True on a CPU of a kind on which these kernels were found to be faster: x86-64 with AVX2 or AVX-512.

    Compiles them if need be. Raises RuntimeError when there is no library.
    """
    return may_be_measured() and load().lanes() >= LANES_OF_AVX2


def may_be_measured() -> bool:
    """False when `is_measured` would be, found out without compiling anything."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64") and _has_avx2()


def _has_avx2() -> bool:
    """False when Linux lists the abilities of this CPU without AVX2."""
    try:
        flags = re.search(rb"^flags\s*:(.*)$", CPUINFO.read_bytes(), re.MULTILINE)
    except OSError:
        return True  # unknown: the compiler will say
    return flags is None or b"avx2" in flags[1].split()


def version() -> str:
    """Of source, flags, compiler, CPU and C library: two equal ones are the same code."""
    return _key(_compiler())


@lru_cache
def load() -> Any:
    """The compiled library. Raises RuntimeError with the reason when there is none."""
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
    """The library, loaded, and its bytes, compiled in a private folder inside `folder`. Raises RuntimeError."""
    _log.info("compiling the C++ kernels for this CPU (%s, some seconds)", compiler)
    try:
        prefix, parent = (TEMPORARY, folder) if folder else ("sparsevit-cli-", cache.scratch_folder())
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as private:
            made = Path(private) / "library.so"
            _said_by(compiler, *FLAGS, str(SOURCES / "library.cpp"), "-o", str(made), seconds=SECONDS, scratch=private)
            content = cache.read_own_file(made)
    except subprocess.SubprocessError as error:
        raise RuntimeError(
            f"{compiler} did not compile the C++ kernels, written for GCC ({_complaint(error)})"
        ) from error
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
    """Raise OSError when a signal kills a process that loads the library: for a bad address, or an instruction."""
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
    raise RuntimeError("there is no C++ compiler (install GCC, or name one in $CXX)")


@lru_cache
def _key(compiler: str) -> str:
    """A hash of what the library depends on.

    That is the source, the flags, the C library, and all that the compiler knows of itself and of this CPU.
    """
    try:
        known = _said_by(compiler, *FLAGS, "-x", "c++", "-dM", "-E", os.devnull, seconds=SECONDS_TO_ANSWER)
        sources = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]pp"))]
    except subprocess.SubprocessError as error:
        raise RuntimeError(f"{compiler} does not run ({_complaint(error)})") from error
    except OSError as error:
        raise RuntimeError(f"{compiler} does not run ({first_line(error)})") from error
    told = map(os.fsencode, (*FLAGS, *platform.libc_ver()))
    return hashlib.sha256(b"\0".join((*sources, *told, known))).hexdigest()[:16]


def _said_by(*command: str, seconds: float, scratch: str | None = None) -> bytes:
    """What a command printed; its temporary files lie in `scratch`.

    Raises OSError, or SubprocessError when it fails or takes longer; then all that it started is ended.
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
