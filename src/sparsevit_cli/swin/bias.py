"""The bias of a block's attention at inference, remembered while the tensors it is made of stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

MAX_BYTES = 2 << 20
"""A larger bias is made anew every time: that of windows of 24 would hold hundreds of megabytes for good."""


class _Made(NamedTuple):
    key: Hashable
    sources: tuple[Tensor, ...]
    bias: Tensor


_remembered: WeakKeyDictionary[nn.Module, _Made] = WeakKeyDictionary()


def remembered_bias(block: nn.Module, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what it gave for this block at the same `key` and of equal `sources`.

    Sources are compared by value: weights may be changed past their version counter, and they are small. On other
    devices than a CPU that would wait for the device, so the bias is made anew.
    """
    if any(source.device.type != "cpu" for source in sources):
        return make()
    made = _remembered.get(block)
    if made is not None and made.key == key and all(map(_equal, made.sources, sources)):
        return made.bias
    _remembered.pop(block, None)
    bias = make()
    if bias.numel() * bias.element_size() <= MAX_BYTES:
        _remembered[block] = _Made(key, tuple(source.detach().clone() for source in sources), bias)
    return bias


def remembered_tensors(model: nn.Module) -> Iterator[Tensor]:
    """All that is remembered for the blocks of `model`: memory that it holds besides its parameters and buffers."""
    for module in model.modules():
        made = _remembered.get(module)
        if made is not None:
            yield from (*made.sources, made.bias)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
