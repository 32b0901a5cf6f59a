"""How an OpenVINO file ranks windows: which nodes do it, and which windows two files keep of the same images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsevit_cli.runtimes import Activations, runtime
from sparsevit_cli.runtimes.openvino import compiled


def ranking_nodes(model: Any) -> list[Any]:
    """The nodes of an `openvino.Model` that serve its `TopK` nodes and nothing else: scores and ranking of windows.

    From each TopK up: a node belongs to them if all of its users do. The map that is scored has other users, so that
    it is the first node that does not. Constants are left out.
    """
    found: dict[str, Any] = {}
    for node in reversed(model.get_ordered_ops()):
        users = [
            port.get_node().get_friendly_name() for output in node.outputs() for port in output.get_target_inputs()
        ]
        if node.get_type_name() == "TopK" or (users and all(user in found for user in users)):
            found[node.get_friendly_name()] = node
    return [node for node in reversed(found.values()) if node.get_type_name() not in ("Constant", "Parameter")]


@dataclass(frozen=True)
class ChangedWindows:
    """Of `kept` windows that the float file keeps, over all images and rankings, `changed` are others in another file.

    A ranking counts once for each number of windows that blocks take of it.
    """

    changed: int
    kept: int

    @property
    def share(self) -> float:
        """0 to 1; 0 where nothing is ranked."""
        return self.changed / self.kept if self.kept else 0.0

    def __add__(self, other: ChangedWindows) -> ChangedWindows:
        return ChangedWindows(self.changed + other.changed, self.kept + other.kept)


class Rankings:
    """Which windows a file keeps: an OpenVINO file, with the results of its TopK nodes as its outputs.

    `counts` are the numbers of windows that blocks take of each ranking, the largest first.
    """

    def __init__(self, path: Path, activations: Activations, threads: int | None = None) -> None:
        import openvino

        runtime("openvino").check_activations(activations)
        model = openvino.Core().read_model(path)
        ranks = [node for node in model.get_ordered_ops() if node.get_type_name() == "TopK"]
        self.counts = [_counts(node) for node in ranks]
        self._outputs = len(model.outputs)
        model.add_outputs([node.output(1) for node in ranks])
        self._run = compiled(model, activations, threads or torch.get_num_threads()) if ranks else None

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Windows (B, K) of each ranking, best first."""
        return [] if self._run is None else [found.long() for found in self._run(images)[self._outputs :]]


def _counts(rank: Any) -> list[int]:
    """How many windows of a ranking are taken: all, and the lengths of slices of them."""
    total = int(rank.output(1).get_partial_shape()[1].get_length())
    counts, waiting = {total}, [rank.output(1)]
    while waiting:
        for port in waiting.pop().get_target_inputs():
            node = port.get_node()
            if node.get_type_name() in ("Slice", "StridedSlice"):
                shape = node.output(0).get_partial_shape()
                counts.add(int(shape[1].get_length()))
            elif node.get_type_name() == "Convert":
                waiting.append(node.output(0))
    return sorted(counts, reverse=True)


def changed_windows(float_file: Rankings, other: Rankings, images: Tensor) -> ChangedWindows:
    """Windows that one file keeps of images (B, C, H, W) and the other one does not."""
    changed = kept = 0
    for ours, theirs, counts in zip(float_file(images), other(images), float_file.counts, strict=True):
        for count in counts:
            same = (ours[:, :count, None] == theirs[:, None, :count]).any(2)
            changed, kept = changed + int((~same).sum()), kept + same.numel()
    return ChangedWindows(changed, kept)
