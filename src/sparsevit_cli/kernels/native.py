"""The windows of a block in C++, compiled for this CPU at first use: a few windows stay in the cache for all steps.

`native_windows.cpp` does the work. It is compiled once per source, compiler and CPU, into the user's cache folder.
"""

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

import torch
from torch import Tensor

from . import windowed
from .linear import Affine
from .windowed import BlockWeights, Norm

LIMITS = (
    "the C++ kernels are for contiguous blocks in float32 (channels a multiple of 16) or, where the CPU has it, "
    "bfloat16 (of 32), with an even number of at most 32 channels per head and norms with weight and bias"
)
SOURCE = Path(__file__).with_name("native_windows.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fopenmp",
         "-shared", "-fPIC")  # fmt: skip
MAX_HEAD = 32
LANES_OF_AVX2 = 8
SECONDS = 300
"""A compiler that takes longer hangs."""


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Affine(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Call(ctypes.Structure):
    """`Call` of native_windows.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "rows", "bias", "classes", "cosine", "workspace")),
        *((name, ctypes.c_int64) for name in (
            "num_tokens", "num_windows", "area", "channels", "heads", "hidden", "norm_first", "threads")),
        ("scale", ctypes.c_float),
        *((name, _Norm) for name in ("norm1", "norm2")),
        *((name, _Affine) for name in ("qkv", "proj", "fc1", "fc2")),
    )  # fmt: skip


def run_windows_(
    tokens: Tensor, rows: Tensor, block: BlockWeights, bias: Tensor, bias_class: Tensor | None, *, padded: bool
) -> None:
    """As `windowed.run_windows_`, for blocks that `supports` says yes to; other maps than theirs go there."""
    is_plain = type(tokens) is Tensor and tokens.device.type == "cpu" and tokens.is_contiguous()
    if not is_plain or not tokens.dtype == bias.dtype == block.qkv.weight.dtype:
        windowed.run_windows_(tokens, rows, block, bias, bias_class, padded=padded)
        return
    rows, bias = rows.contiguous(), bias.contiguous()
    classes = None if bias_class is None else bias_class.contiguous()
    cosine = None if block.cosine_scale is None else block.cosine_scale.flatten().float()
    call = _Call(
        tokens=tokens.data_ptr(), rows=rows.data_ptr(), bias=bias.data_ptr(), classes=_address(classes),
        cosine=_address(cosine), num_tokens=len(tokens), num_windows=len(rows), area=rows.shape[1],
        channels=tokens.shape[1], heads=block.num_heads, hidden=len(block.fc1.weight), norm_first=block.norm_first,
        threads=torch.get_num_threads(), scale=block.scale, norm1=_norm(block.norm1), norm2=_norm(block.norm2),
        qkv=_affine(block.qkv), proj=_affine(block.proj), fc1=_affine(block.fc1), fc2=_affine(block.fc2),
    )  # fmt: skip
    library, is_bfloat = load(), tokens.dtype == torch.bfloat16
    nbytes = library.workspace_bytes(ctypes.byref(call), is_bfloat) + 64
    workspace = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    call.workspace = -(-workspace.data_ptr() // 64) * 64
    library.run_windows(ctypes.byref(call), is_bfloat)


def supports(block: BlockWeights) -> bool:
    """True for what `LIMITS` says."""
    channels, hidden = block.qkv.weight.shape[1], len(block.fc1.weight)
    tensors = block.tensors()
    if tensors is None:
        return False
    dtype = block.qkv.weight.dtype
    if not (dtype == torch.float32 or (dtype == torch.bfloat16 and load().has_bfloat())):
        return False
    multiple = 16 if dtype == torch.float32 else 32
    head = channels // block.num_heads
    if channels % multiple or hidden % multiple or channels % block.num_heads or head > MAX_HEAD or head % 2:
        return False
    return all(tensor.is_contiguous() and tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors)


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
    library.workspace_bytes.restype = ctypes.c_int64
    library.workspace_bytes.argtypes = library.run_windows.argtypes = (ctypes.POINTER(_Call), ctypes.c_int)
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
        _said_by(compiler, *FLAGS, str(SOURCE), "-o", str(made))
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
        source = SOURCE.read_text(encoding="utf-8")
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"{compiler} does not run ({error})") from error
    return hashlib.sha256("\0".join((source, *FLAGS, known)).encode()).hexdigest()[:16]


def _said_by(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _norm(norm: Norm) -> _Norm:
    return _Norm(_address(norm.weight), _address(norm.bias), norm.eps)


def _affine(layer: Affine) -> _Affine:
    return _Affine(_address(layer.weight), _address(layer.bias))
