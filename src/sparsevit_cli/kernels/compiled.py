"""The C++ of `cpp/`, compiled once per source, compiler and CPU, into the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fopenmp",
         "-shared", "-fPIC")  # fmt: skip
LANES_OF_AVX2 = 8
SECONDS = 300
"""A compiler that takes longer hangs."""


def is_measured() -> bool:
    """True on CPUs of a kind on which these kernels were found to be faster: x86-64 with AVX2 or AVX-512."""
    return platform.machine() in ("x86_64", "AMD64") and load().lanes() >= LANES_OF_AVX2


def version() -> str:
    """Of source, compiler and CPU: two equal ones are the same code."""
    return _key(_compiler())


@lru_cache
def load() -> Any:
    """The compiled library. Raises RuntimeError with the reason where there is none."""
    if sys.platform != "linux":
        raise RuntimeError(f"the C++ kernels are for Linux, not {sys.platform}")
    compiler = _compiler()
    try:
        library = _library(compiler, _cache_folder() / f"windows-{_key(compiler)}.so")
    except subprocess.SubprocessError as error:
        said = str(getattr(error, "stderr", None) or "").strip() or str(error)
        raise RuntimeError(f"the C++ kernels did not compile ({said.splitlines()[0]})") from error
    except OSError as error:
        raise RuntimeError(f"the C++ kernels cannot be loaded ({error})") from error
    for workspace in (library.block_workspace, library.projection_workspace):
        workspace.restype = ctypes.c_int64
    return library


def _library(compiler: str, path: Path) -> ctypes.CDLL:
    """What this process or an earlier one compiled; a damaged file is compiled again."""
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # several processes may do this at once
        made = Path(folder) / path.name
        _said_by(compiler, *FLAGS, str(SOURCES / "library.cpp"), "-o", str(made))
        made.replace(path)
    return ctypes.CDLL(str(path))


def _cache_folder() -> Path:
    """The user's own, or one that ends with the process where that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsevit-cli"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # there may be no home
        pass
    return Path(_process_folder().name)


@lru_cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sparsevit-cli-")


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("there is no C++ compiler (g++, c++ or $CXX)")


@lru_cache
def _key(compiler: str) -> str:
    """What the library depends on: the source, the flags, and all that the compiler knows of itself and this CPU."""
    try:
        known = _said_by(compiler, *FLAGS, "-x", "c++", "-dM", "-E", os.devnull)
        sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.[ch]pp"))]
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{compiler} does not run ({error})") from error
    return hashlib.sha256("\0".join((*sources, *FLAGS, known)).encode()).hexdigest()[:16]


def _said_by(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout
