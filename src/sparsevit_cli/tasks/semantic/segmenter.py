"""What every segmenter is: a model that scores images of one size at once, and larger ones by sliding windows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit_cli.backbones import SwinBackbone
from sparsevit_cli.sizes import Size
from sparsevit_cli.swin.geometry import image_size

_WINDOWS_AT_ONCE = 4


class Segmenter(nn.Module, ABC):
    """A model of semantic segmentation; `overlap` is the share of a sliding window that the next one overlaps."""

    def __init__(self, overlap: float) -> None:
        super().__init__()
        self.overlap = overlap

    @property
    @abstractmethod
    def swin(self) -> SwinBackbone:
        """The backbone."""

    @abstractmethod
    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to scores (B, classes, h, w), whose largest one is the class; any h and w."""

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Scores of images (B, 3, H, W); or of a list of images (3, H, W) of any sizes, each (classes, H, W)."""
        if isinstance(inputs, Tensor):
            return self.scores(inputs)
        return [self._slid(image) for image in inputs]

    def _slid(self, image: Tensor) -> Tensor:
        """Scores (classes, H, W) of one image, the mean over windows as large as the images the Swin is set to."""
        size = image_size(self.swin)
        assert size is not None
        height, width = size
        image_height, image_width = image.shape[1:]
        padded = F.pad(image, (0, max(0, width - image_width), 0, max(0, height - image_height)))
        places = window_places((image_height, image_width), (height, width), self.overlap)
        total = count = None
        for first in range(0, len(places), _WINDOWS_AT_ONCE):
            some = places[first : first + _WINDOWS_AT_ONCE]
            windows = torch.stack([padded[:, top : top + height, left : left + width] for top, left in some])
            found = F.interpolate(self(windows).float(), (height, width), mode="bilinear", align_corners=False)
            if total is None or count is None:
                total = found.new_zeros(found.shape[1], *padded.shape[1:])
                count = found.new_zeros(padded.shape[1:])
            for (top, left), scores in zip(some, found, strict=True):
                total[:, top : top + height, left : left + width] += scores
                count[top : top + height, left : left + width] += 1
        assert total is not None
        assert count is not None
        return (total / count)[:, :image_height, :image_width]


def at_size(scores: Tensor, size: Size) -> Tensor:
    """Scores (classes, h, w) as float32 at another size: (classes, H, W), bilinear."""
    return F.interpolate(scores[None].float(), size, mode="bilinear", align_corners=False)[0]


def window_places(image: Size, window: Size, overlap: float) -> list[Size]:
    """Top and left of the windows that cover an image; one that is smaller than a window is padded.

    As few as give an overlap of at least `overlap`, evenly spread: the first at the top left, the last at the bottom
    right.
    """
    tops, lefts = (_starts(max(side, part), part, overlap) for side, part in zip(image, window, strict=True))
    return [(top, left) for top in tops for left in lefts]


def _starts(side: int, window: int, overlap: float) -> list[int]:
    steps = math.ceil((side - window) / max(1, int(window * (1 - overlap))))
    return [round(step * (side - window) / steps) for step in range(steps + 1)] if steps else [0]
