"""Tensors that depend on sizes and device alone, made once and kept: token indices, shift masks, all windows.

Tensors that a CUDA graph reads must live as long as the graph, and tensors that are made while a graph is traced or
captured belong to that graph. `windows` makes these tensors; this module keeps them.

Sizes everywhere: `height` x `width` tokens of a map; `window_size` and `shift_size` in tokens, (rows, columns).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsevit_cli import windows
from sparsevit_cli.windows import Kept, Partition


def token_index_of(
    height: int,
    width: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    partition: Partition,
    device: torch.device,
) -> Tensor:
    """`windows.window_token_index`, (n, N) int64."""
    sizes = (height, width, window_size, shift_size, partition, device)
    return _made_once(windows.window_token_index, *sizes)  # type: ignore[no-any-return]


def shift_mask_of(
    height: int, width: int, window_size: tuple[int, int], shift_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """`windows.shift_mask`: masks (4, N, N) and the class of every window (n,)."""
    return _made_once(windows.shift_mask, height, width, window_size, shift_size, device)  # type: ignore[no-any-return]


def all_windows(
    height: int,
    width: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    partition: Partition,
    batch: int,
    device: torch.device,
) -> Kept:
    """All windows of `batch` maps, in order: indices (B, n) and rows (B, n, N).

    They are kept, and have `places`, on a device where every launch costs time. On a CPU they are made at every call:
    there they are not worth the memory, and nobody asks for the places.
    """
    sizes = (height, width, window_size, shift_size, partition, batch, device)
    if not is_asynchronous(device):
        return _all_windows(*sizes)
    return _made_once(_all_windows_and_places, *sizes, remembered=_remembered_batch)  # type: ignore[no-any-return]


def _all_windows(height: int, width: int, *sizes: Any) -> Kept:
    window_size, shift_size, partition, batch, device = sizes
    index = token_index_of(height, width, window_size, shift_size, partition, device)  # n, N
    every = windows.every_window(index, batch)
    return Kept(every, windows.rows_of(every, index, height * width))


def _all_windows_and_places(height: int, width: int, *sizes: Any) -> Kept:
    found = _all_windows(height, width, *sizes)
    return found._replace(places=windows.token_places(found.rows, len(found.rows) * height * width))


def is_asynchronous(device: torch.device) -> bool:
    """True when the host queues work for `device` and would have to wait to see a value.

    No shape and no branch may then depend on a value.
    """
    return device.type != "cpu"


def is_capturing(device: torch.device) -> bool:
    """True while work for `device` is recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def held_indices() -> Iterator[dict[Any, Any]]:
    """Inside the block, what is made once goes into a new dict, which the block gets.

    Whoever captures a CUDA graph keeps the dict with the graph, which reads these tensors at every replay.
    """
    held: dict[Any, Any] = {}
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


_held: ContextVar[dict[Any, Any] | None] = ContextVar("held_indices", default=None)


def _made(make: Callable[..., Any], *sizes: Any) -> Any:
    with torch.inference_mode(False):  # a tensor made in inference mode could not serve a training step later
        return make(*sizes)


_remembered = lru_cache(maxsize=128)(_made)
_remembered_batch = lru_cache(maxsize=16)(_made)
"""For tensors that grow with the batch: the partitions of one model at two shapes."""


def _made_once(make: Callable[..., Any], *sizes: Any, remembered: Callable[..., Any] = _remembered) -> Any:
    """`make(*sizes)`, or what it gave before; the last of `sizes` is the device.

    While a graph is traced or captured the tensor is made anew and becomes part of the graph, unless `held_indices`
    has it.
    """
    if torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None:
        return make(*sizes)
    held = _held.get()
    if held is not None:
        if (make, sizes) not in held:
            held[make, sizes] = make(*sizes)
        return held[make, sizes]
    if is_capturing(sizes[-1]):
        return make(*sizes)
    return remembered(make, *sizes)
