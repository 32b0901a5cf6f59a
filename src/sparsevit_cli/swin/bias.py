"""The bias of a block's attention at inference, remembered while the tensors it is made of stay as they are.

On a CPU they are compared by value, so that every change counts. Elsewhere that would wait for the device: there they
count as changed when they were exchanged, moved, or written by an operator that torch counts (`Tensor._version`).
Torch does not count writes through `.data`, by fused optimizers, or by other processes and kernels; these count from
the next change of the model's mode on: `model.train().eval()` forgets every bias. Nothing is remembered for tensors
that were made in inference mode, which have no count. As everywhere in torch, several streams must wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparsevit_cli.kernels import held as held_tensors

MAX_BYTES = 2 << 20
"""A larger bias is made anew every time on a CPU: that of windows of 24 would hold hundreds of megabytes for good."""
MAX_DEVICE_BYTES = 8 << 20
"""The same elsewhere, where launches cost more: shifted windows of 12 with 24 heads in float32 are remembered."""


class RememberedBias(NamedTuple):
    """What was made, at which key, and of what: each source's value, or its address and count of writes."""

    key: Hashable
    sources: tuple[Tensor, ...]
    states: tuple[Tensor | tuple[int, int], ...]
    bias: Tensor

    def is_of(self, key: Hashable, sources: tuple[Tensor, ...]) -> bool:
        """True where making it anew, of these sources, would give the same."""
        if self.key != key or len(self.sources) != len(sources):
            return False
        return all(one is other for one, other in zip(self.sources, sources, strict=True)) and self.is_current()

    def is_current(self) -> bool:
        """True while no source changed."""
        return all(map(_is_still, self.sources, self.states))


_remembered: WeakKeyDictionary[nn.Module, RememberedBias] = WeakKeyDictionary()
_held: ContextVar[dict[nn.Module, RememberedBias] | None] = ContextVar("held_biases", default=None)


def remembered_bias(block: nn.Module, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what it gave for this block at the same `key` and of the same, unchanged `sources`."""
    held = _held.get()
    if held is None and held_tensors.is_capturing(sources[0].device):
        return make()  # part of somebody's graph, which nobody would capture anew
    made = _remembered.get(block)
    if made is None or not made.is_of(key, sources):
        states = tuple(state for state in map(_state, sources) if state is not None)
        bias = make()
        most = MAX_DEVICE_BYTES if held_tensors.is_asynchronous(bias.device) else MAX_BYTES
        if len(states) < len(sources) or bias.numel() * bias.element_size() > most:
            forget_bias(block)
            return bias
        made = _remembered[block] = RememberedBias(key, sources, states, bias)
    if held is not None:
        held[block] = made
    return made.bias


def forget_bias(block: nn.Module) -> None:
    """Let the bias of `block` be made anew."""
    _remembered.pop(block, None)


@contextmanager
def held_biases() -> Iterator[dict[nn.Module, RememberedBias]]:
    """What is remembered and used inside the block stays in the dict that this gives: a captured graph reads it."""
    held: dict[nn.Module, RememberedBias] = {}
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


def are_current(held: Mapping[nn.Module, RememberedBias]) -> bool:
    """True while none of what is held was forgotten or would be made anew."""
    return all(_remembered.get(block) is made and made.is_current() for block, made in held.items())


def remembered_tensors(model: nn.Module) -> Iterator[Tensor]:
    """All that is remembered for the blocks of `model`: memory that it holds besides its parameters and buffers."""
    for module in model.modules():
        made = _remembered.get(module)
        if made is not None:
            yield from (state for state in made.states if isinstance(state, Tensor))
            yield made.bias


def _state(source: Tensor) -> Tensor | tuple[int, int] | None:
    """What tells whether a source changed; None where nothing does."""
    if not held_tensors.is_asynchronous(source.device):
        return source.detach().clone()
    return None if source.is_inference() else (source.data_ptr(), source._version)


def _is_still(source: Tensor, state: Tensor | tuple[int, int]) -> bool:
    if isinstance(state, Tensor):
        return state.dtype == source.dtype and torch.equal(state, source)
    return state == (source.data_ptr(), source._version)
