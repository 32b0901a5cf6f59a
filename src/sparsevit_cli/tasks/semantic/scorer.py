"""mIoU, IoU of every class and pixel accuracy, from one confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sparsevit_cli.data.source import Batch
from sparsevit_cli.errors import NothingToScoreError

from .labels import IGNORED
from .segmenter import at_size


class ConfusionScorer:
    """Pixels of each class (row) by what they were taken for (column), (classes, classes) int64 on the device."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.pixels = torch.zeros(len(names), len(names), dtype=torch.int64, device=device)
        self.is_finite = torch.ones((), dtype=torch.bool, device=device)

    def update(self, outputs: Any, batch: Batch) -> None:
        """Scores (classes, h, w) and truth (H, W) of each image; the scores are brought to the size of the truth."""
        for scores, truth in zip(outputs, batch.targets, strict=True):
            self.is_finite &= scores.isfinite().all()
            found = at_size(scores, (truth.shape[0], truth.shape[1])).argmax(0)
            labelled = truth != IGNORED
            number = truth[labelled].long() * len(self.names) + found[labelled]
            self.pixels += torch.bincount(number, minlength=self.pixels.numel()).view_as(self.pixels)

    def add(self, other: ConfusionScorer) -> None:
        """Take in the pixels of another one."""
        self.pixels += other.pixels
        self.is_finite &= other.is_finite

    def compute(self) -> Mapping[str, float]:
        """Percent: `miou` and `accuracy`, and `iou_<name>` of each class that the truth has.

        The mean is one over the classes in truth or prediction. It is NaN if a score was not finite. Raises
        NothingToScoreError if no pixel has a class.
        """
        pixels = self.pixels.cpu().double()  # a Mac's GPU has no float64
        truth, total = pixels.sum(1), pixels.sum()
        if not total:
            got = "no pixel of these images has a class: all of their masks are ignored"
            raise NothingToScoreError(
                "data: nothing to score", got, "Check the masks, and the numbers that are ignored."
            )
        right = pixels.diagonal()
        union = truth + pixels.sum(0) - right
        occurs = union > 0
        iou = 100 * right / union.clamp(min=1)
        mean = float(iou[occurs].mean()) if self.is_finite else math.nan
        each = {f"iou_{name}": float(iou[n]) for n, name in enumerate(self.names) if truth[n]}
        return {"miou": mean, "accuracy": float(100 * right.sum() / total), **each}
