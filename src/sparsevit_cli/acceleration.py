"""Inference as one replayed CUDA graph per input shape: small batches no longer wait for launches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.kernels.held import held_indices
from sparsevit_cli.swin import RememberedBias, SparseStage, are_current, held_biases, is_unwatched

MAX_GRAPHS = 8
"""Shapes replayed at a time; each keeps the memory of one forward. The one used longest ago goes first."""
WARM_UPS = 3


def accelerate_(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Let inference of `model` replay CUDA graphs, in place; returns `model`. On other devices nothing changes.

    The first forward of every input shape, type, ratio and window size captures a graph; `example` (B, C, H, W) is
    captured at once, for `torch.inference_mode`, if the model is in evaluation mode. Graphs read the weights where they
    stand: changes in place count, moved ones are noticed. The position bias is made of its weights beforehand: when
    torch counted a change of those, or the model's mode changed, graphs are captured anew (see `swin.bias`). Whatever
    else is exchanged afterwards (`sparsify_`, `load_state_dict(assign=True)`, modules, attributes, global precision
    settings) needs `accelerate_` again.

    Training, gradients, autocast, observers of operators and calls with anything but one CUDA tensor run as before.
    Hooks inside the model are called at capture only. Calls wait for each other, and are meant for one stream. The
    model must not wait for the device; a window-sparse Swin does not. Raises ConfigError when somebody else replaced
    `model.forward`.
    """
    replaced = model.__dict__.get("forward")
    if not (replaced is None or isinstance(replaced, GraphedForward)):
        got = f"the forward of this {type(model).__name__} was replaced"
        raise ConfigError("model", got, "Accelerate a model before, or without, replacing its forward.")
    model.forward = GraphedForward(model)
    if example is not None:
        with torch.inference_mode():
            model(example)
    return model


@dataclass(frozen=True)
class Recording:
    """One captured forward: fill `entered`, call `replay`, read `left` (a tensor, or tensors in lists and dicts)."""

    entered: Tensor
    left: Any
    replay: Callable[[], None]
    keeps: object
    """What the graph reads and nobody else may hold."""
    biases: Mapping[nn.Module, RememberedBias]
    """The position biases that the graph reads, by block."""


class GraphedForward:
    """Stands for the forward of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._lock = RLock()
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._weights: list[tuple[Tensor, int]] = []
        self._stages: list[SparseStage] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or self.model.training or not is_replayable(args[0]):
            return type(self.model).forward(self.model, *args, **kwargs)
        with self._lock:
            return self._replayed(args[0])

    def _replayed(self, x: Tensor) -> Any:
        if not self._recordings or any(tensor.data_ptr() != place for tensor, place in self._weights):
            self._look_at_model()
        key = (x.shape, x.dtype, x.device, torch.is_inference_mode_enabled(), *map(_settings, self._stages))
        recording = self._recordings.pop(key, None)
        if recording is None or not are_current(recording.biases):
            recording = None  # stale graphs go before another one takes memory; a replay asks of its own alone
            current = ((other, kept) for other, kept in self._recordings.items() if are_current(kept.biases))
            self._recordings = OrderedDict(current)
            recording = record(self.model, x)
        self._recordings[key] = recording  # the newest stands last
        if len(self._recordings) > MAX_GRAPHS:
            self._recordings.popitem(last=False)
        recording.entered.copy_(x)
        recording.replay()
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, recording.left)

    def _look_at_model(self) -> None:
        """Forget all graphs; not done when this is made, since a model that is being copied is still empty then."""
        self._recordings.clear()
        tensors = (*self.model.parameters(), *self.model.buffers())
        self._weights = [(tensor, tensor.data_ptr()) for tensor in tensors]
        self._stages = [module for module in self.model.modules() if isinstance(module, SparseStage)]

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedForward:
        return GraphedForward(memo[id(self.model)])  # the copy captures its own

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedForward, (self.model,)


def _settings(stage: SparseStage) -> Hashable:
    """What may be set on a stage at any time."""
    windows = stage.blocks[0].window_size, stage.partition
    return stage.sparsity_tenths, stage.as_timm, stage.importance, stage.kernels, windows


def is_replayable(x: object) -> bool:
    """True for a CUDA tensor of no subclass, when nobody differentiates, watches, or captures a graph."""
    if not (type(x) is Tensor and x.is_cuda and is_unwatched(x.device)):
        return False
    return not torch.cuda.is_current_stream_capturing()


def record(model: nn.Module, x: Tensor) -> Recording:
    """Capture the forward of `model` for inputs like `x`, after some passes that allocate and compile."""
    entered, forward = x.clone(), type(model).forward
    with torch.cuda.device(x.device), held_indices() as held, held_biases() as biases:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                forward(model, entered)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            left = forward(model, entered)
    return Recording(entered, left, graph.replay, (graph, held), biases)
