"""Where one forward pass of a window-sparse Swin spends its time: hooks that charge every moment to one label.

For passes of their own: the marks cost some microseconds each, so no figure of a whole model is taken from here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.kernels import Engine, EngineAround, Moves
from sparsevit_cli.swin.geometry import named_stages, stem_name

from .device import synchronize
from .latency import Clock
from .parts import calls_told
from .workload import Workload

Label = tuple[Any, ...]


class Timeline:
    """A stack of labels; the time between two changes belongs to the label that was on top.

    On a GPU the changes are CUDA events in the stream, elsewhere readings of `clock` in nanoseconds.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self._on_gpu = device.type == "cuda" and clock is None
        self._read_ns = clock or time.perf_counter_ns
        self._device = device
        self._stack: list[Label] = []
        self._moments: list[tuple[Label | None, Any]] = []

    @property
    def top(self) -> Label:
        """The label that is being charged."""
        return self._stack[-1]

    def enter(self, label: Label) -> None:
        """Charge what follows to `label`."""
        self._stack.append(label)
        self._mark(label)

    def leave(self) -> None:
        """Charge what follows to the label before."""
        self._stack.pop()
        self._mark(self._stack[-1] if self._stack else None)

    def _mark(self, label: Label | None) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._moments.append((label, event))
        else:
            synchronize(self._device)
            self._moments.append((label, self._read_ns()))

    def take_ms(self) -> dict[Label, float]:
        """Milliseconds of every label since the last taking."""
        assert not self._stack, "taken inside a pass"
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        times: dict[Label, float] = {}
        for (label, start), (_, end) in pairwise(self._moments):
            if label is not None:
                ms = start.elapsed_time(end) if self._on_gpu else (end - start) / 1e6
                times[label] = times.get(label, 0.0) + ms
        self._moments.clear()
        return times


AFTER: Label = ("after",)
"""What is done to the outputs of a forward pass, which is no part of it."""


def timed_forward(
    workload: Workload, timeline: Timeline, after: Callable[[Any], object] | None = None
) -> dict[Label, float]:
    """Milliseconds of one forward pass of the workload per label, which add up to the whole pass; and AFTER.

    Labels of `hooked`: `("stem",)`; per stage s `("merging", s)` and `("scoring", s)`, the stage's own work, which is
    scoring and ranking; per block pair p `("pair", s, p)`, less the moves that a `TimedEngine` takes out of it; and
    `("rest",)` for what is in no other one: final norm, pooling, head.
    """
    timeline.enter(("rest",))
    outputs = workload.run()
    timeline.leave()
    if after is not None:
        timeline.enter(AFTER)
        after(outputs)
        timeline.leave()
    return timeline.take_ms()


def hooked(model: nn.Module, timeline: Timeline) -> AbstractContextManager[None]:
    """Marks on the stem, the stages, their merging and their blocks. Raises ConfigError for a compiled model."""
    return marked(model, _labelled_modules(model), timeline)


def marked(
    model: nn.Module, labelled: Iterable[tuple[nn.Module, Label]], timeline: Timeline
) -> AbstractContextManager[None]:
    """Charge every call of a module inside `model` to its label. Raises ConfigError for a compiled model."""
    if hasattr(model, "_orig_mod"):
        got = "a compiled model does not call its modules one by one"
        raise ConfigError("model", got, "Measure the parts of the model before torch.compile.")
    return calls_told(labelled, timeline.enter, lambda _: timeline.leave())


class TimedEngine(EngineAround):
    """`inner`, whose gather and scatter are charged to `("moves", s)`, s being the stage that is running.

    Kernels that move rows themselves do it inside their block, and it stays charged to the block.
    """

    def __init__(self, inner: Engine, timeline: Timeline) -> None:
        super().__init__(inner.with_moves(TimedMoves(inner.moves, timeline)))


def _charged(name: str) -> Any:
    """A method that calls `name` of the moves inside, and charges its time to the moves of the stage."""

    def method(self: TimedMoves, *args: Any, **kwargs: Any) -> Any:
        _, stage, *_ = self.timeline.top
        self.timeline.enter(("moves", stage))
        result = getattr(self.inner, name)(*args, **kwargs)
        self.timeline.leave()
        return result

    return method


class TimedMoves(Moves):
    """`inner`, every call of which is charged to the moves of the stage that is running."""

    def __init__(self, inner: Moves, timeline: Timeline) -> None:
        self.inner, self.timeline = inner, timeline

    rows_of = _charged("rows_of")
    all_windows = _charged("all_windows")
    flatten_map = _charged("flatten_map")
    unflatten_map = _charged("unflatten_map")
    gather_rows = _charged("gather_rows")
    scatter_rows = _charged("scatter_rows")
    scatter_rows_ = _charged("scatter_rows_")


def _labelled_modules(model: nn.Module) -> Iterator[tuple[nn.Module, Label]]:
    stem = stem_name(model)
    if stem is not None:
        yield model.get_submodule(stem), ("stem",)
    for number, (_, stage) in enumerate(named_stages(model)):
        yield stage, ("scoring", number)
        yield stage.downsample, ("merging", number)
        for index, block in enumerate(stage.blocks):
            yield block, ("pair", number, index // 2)
