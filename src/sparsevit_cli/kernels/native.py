"""The windows of a block in C++ that is compiled for this CPU at first use: one call per block, no step leaves the cache.

`native_windows.cpp` does the work. Compiled once per source and CPU into the user's cache folder.
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

from .linear import Affine
from .windowed import BlockWeights, Norm

SOURCE = Path(__file__).with_name("native_windows.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fopenmp",
         "-shared", "-fPIC")  # fmt: skip


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
    """As `windowed.run_windows_`, for blocks that `supports` says yes to."""
    rows, bias = rows.contiguous(), bias.contiguous()
    cosine = None if block.cosine_scale is None else block.cosine_scale.flatten().float()
    call = _Call(
        tokens=tokens.data_ptr(), rows=rows.data_ptr(), bias=bias.data_ptr(), classes=_address(bias_class),
        cosine=_address(cosine), num_tokens=len(tokens), num_windows=len(rows), area=rows.shape[1],
        channels=tokens.shape[1], heads=block.num_heads, hidden=len(block.fc1.weight), norm_first=block.norm_first,
        threads=torch.get_num_threads(), scale=block.scale, norm1=_norm(block.norm1), norm2=_norm(block.norm2),
        qkv=_affine(block.qkv), proj=_affine(block.proj), fc1=_affine(block.fc1), fc2=_affine(block.fc2),
    )  # fmt: skip
    library, is_bfloat = load(), tokens.dtype == torch.bfloat16
    workspace = torch.empty(library.workspace_bytes(ctypes.byref(call), is_bfloat) + 64, dtype=torch.uint8)
    call.workspace = -(-workspace.data_ptr() // 64) * 64
    library.run_windows(ctypes.byref(call), is_bfloat)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _norm(norm: Norm) -> _Norm:
    return _Norm(_address(norm.weight), _address(norm.bias), norm.eps)


def _affine(layer: Affine) -> _Affine:
    return _Affine(_address(layer.weight), _address(layer.bias))


@lru_cache
def load() -> Any:
    path='/tmp/native.so'
    library = ctypes.CDLL(str(path))
    library.workspace_bytes.restype = ctypes.c_int64
    library.workspace_bytes.argtypes = library.run_windows.argtypes = (ctypes.POINTER(_Call), ctypes.c_int)
    return library
