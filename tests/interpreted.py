"""bfloat16 in Triton's interpreter, as a GPU computes with it.

The interpreter keeps bfloat16 as the 16 bits it is made of. The installed one multiplies these as integers
(`create_dot`), and makes them of a float32 by cutting, where a GPU rounds to the nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def compute_bfloat16_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        types = source.dtype.scalar, target.scalar
        if types == (tl.bfloat16, tl.float32):
            return _widened(source)
        return _rounded(source) if types == (tl.float32, tl.bfloat16) else cast(self, source, target)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def _widened(handle: Any) -> Any:
    """bfloat16 as float32, without a change of value; what has another type as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle: Any) -> Any:
    """float32 as the nearest bfloat16; of two, the one whose last bit is 0."""
    bits = np.asarray(handle.data, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(handle.data), 0x7FC0, nearest).astype(np.uint16), tl.bfloat16)
