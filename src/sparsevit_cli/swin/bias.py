"""The bias of a block's attention at inference, remembered until one of its source tensors changes.

On a CPU the sources are compared by value, so that every change counts. On other devices that would wait for the
device. There a source counts as changed when it was exchanged, moved, or written by an operator that torch counts
(`Tensor._version`). Torch does not count writes through `.data`, by fused optimizers, or by other processes and
kernels. For these, call `model.train().eval()`: a change of mode forgets every bias. Tensors that were made in
inference mode have no count, so a bias of them is not remembered. As everywhere in torch, several streams must wait
for each other.
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
"""A larger bias is made anew in every forward on a CPU: remembering windows of 24 would take hundreds of megabytes."""
MAX_DEVICE_BYTES = 8 << 20
"""The same on other devices, on which launches cost more: shifted windows of 12 with 24 heads in float32 fit."""


class RememberedBias(NamedTuple):
    """A bias, and what it was made of.

    `key` is what else it depends on: sizes, device, type. `states` are the values of the `sources`, or their addresses
    and counts of writes, at the time when it was made.
    """

    key: Hashable
    sources: tuple[Tensor, ...]
    states: tuple[Tensor | tuple[int, int], ...]
    bias: Tensor

    def is_of(self, key: Hashable, sources: tuple[Tensor, ...]) -> bool:
        """True when a bias made now, at `key` and of `sources`, would be equal."""
        if self.key != key or len(self.sources) != len(sources):
            return False
        return all(one is other for one, other in zip(self.sources, sources, strict=True)) and self.is_current()

    def is_current(self) -> bool:
        """True as long as no source has changed."""
        return all(map(_is_still, self.sources, self.states))


_remembered: WeakKeyDictionary[nn.Module, RememberedBias] = WeakKeyDictionary()
_held: ContextVar[dict[nn.Module, RememberedBias] | None] = ContextVar("held_biases", default=None)


def remembered_bias(block: nn.Module, key: Hashable, sources: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or its earlier result for this block, if `key` and `sources` are the same and no source has changed."""
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
    """Forget the bias of `block`: the next forward makes it anew."""
    _remembered.pop(block, None)


@contextmanager
def held_biases() -> Iterator[dict[nn.Module, RememberedBias]]:
    """Inside the `with` block, every bias that is remembered or used goes into a new dict, which the block gets.

    Whoever captures a CUDA graph keeps the dict with the graph, which reads these biases at every replay.
    """
    held: dict[nn.Module, RememberedBias] = {}
    token = _held.set(held)
    try:
        yield held
    finally:
        _held.reset(token)


def are_current(held: Mapping[nn.Module, RememberedBias]) -> bool:
    """True when every bias in `held` is still the remembered one of its block, and its sources have not changed."""
    return all(_remembered.get(block) is made and made.is_current() for block, made in held.items())


def remembered_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The remembered biases of the blocks of `model`, and copies of their sources.

    This is memory that the model holds besides its parameters and buffers.
    """
    for module in model.modules():
        made = _remembered.get(module)
        if made is not None:
            yield from (state for state in made.states if isinstance(state, Tensor))
            yield made.bias


def _state(source: Tensor) -> Tensor | tuple[int, int] | None:
    """A copy of the source, or its address and count of writes; None when no change would show."""
    if not held_tensors.is_asynchronous(source.device):
        return source.detach().clone()
    return None if source.is_inference() else (source.data_ptr(), source._version)


def _is_still(source: Tensor, state: Tensor | tuple[int, int]) -> bool:
    """True when `_state(source)` would still be `state`."""
    if isinstance(state, Tensor):
        return state.dtype == source.dtype and torch.equal(state, source)
    return state == (source.data_ptr(), source._version)
