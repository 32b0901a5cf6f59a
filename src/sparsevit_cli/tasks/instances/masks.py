"""Masks of single objects as they are kept, run lengths or polygons, and as pixels.

Run lengths are COCO's: pixels column by column, the first count is of background. Polygons are rasterised by
faster_coco_eval, so that a mask has the very pixels that COCO's own tools give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sparsevit_cli.errors import from_extra
from sparsevit_cli.sizes import Size

Pixels = NDArray[np.bool_]
Box = Sequence[float]
"""x0, y0, x1, y1 in pixels."""
_BITS, _MORE, _SIGN, _FIRST_LETTER = 0x1F, 0x20, 0x10, 48
"""Of COCO's letters: five bits of a number each, a sixth where more follow; the last one carries the sign."""


def mask_api() -> Any:
    """faster_coco_eval's module of masks. Raises ConfigError if it is not installed."""
    return from_extra("faster_coco_eval.core", "task instances", "detect").mask


@dataclass(frozen=True, eq=False)
class RunLengths:
    """A mask as counts of background and object pixels in turn, column by column."""

    counts: NDArray[np.int64]

    def pixels(self, size: Size) -> Pixels:
        """(H, W) bool."""
        values = np.arange(len(self.counts)) % 2 == 1
        flat: Pixels = np.repeat(values, self.counts)
        return flat.reshape(size[1], size[0]).T

    @property
    def area(self) -> int:
        """Pixels of the object."""
        return int(self.counts[1::2].sum())

    def coco(self, size: Size) -> dict[str, Any]:
        """The mask as an annotation file holds it."""
        return {"size": list(size), "counts": self.counts.tolist()}


@dataclass(frozen=True, eq=False)
class Polygons:
    """A mask as the union of polygons, each x0 y0 x1 y1 ... in pixels, of three points at least."""

    outlines: tuple[NDArray[np.float64], ...]

    def pixels(self, size: Size) -> Pixels:
        """(H, W) bool."""
        api = mask_api()
        parts = api.frPyObjects(self.coco(size), *size)
        decoded: Pixels = api.decode(api.merge(parts)).astype(bool)
        return decoded

    def coco(self, size: Size) -> list[list[float]]:
        """The mask as an annotation file holds it."""
        return [outline.tolist() for outline in self.outlines]


Shape = RunLengths | Polygons


def run_lengths(pixels: Pixels) -> RunLengths:
    """The run lengths of a mask (H, W)."""
    flat = pixels.T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [len(flat)]])
    counts = np.diff(edges)
    return RunLengths(np.concatenate([[0], counts]) if len(flat) and flat[0] else counts)


def unpacked(text: str | bytes) -> NDArray[np.int64]:
    """The counts of COCO's compressed run lengths (maskApi.c, rleFrString). Raises ValueError for other texts."""
    letters = np.frombuffer(text.encode("latin-1", "replace") if isinstance(text, str) else text, dtype=np.uint8)
    codes = letters.astype(np.int64) - _FIRST_LETTER
    if not len(codes) or codes.min() < 0 or codes.max() > (_BITS | _MORE) or codes[-1] & _MORE:
        raise ValueError("no run lengths")
    last = np.flatnonzero(~(codes & _MORE).astype(bool))
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() > 11:
        raise ValueError("a run length of more than 60 bits")
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    values = np.add.reduceat((codes & _BITS) << (5 * place), first)
    values -= np.where(codes[last] & _SIGN, np.int64(1) << (5 * (last - first + 1)), 0)
    # From the fourth count on, a difference to the last count but one: odd ones follow the second, even ones the third.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def pasted(mask: Tensor, box: Box, size: Size) -> Pixels:
    """A mask that was predicted inside a box, as pixels of the whole image.

    Args:
        mask: (M, M) float32 on a CPU, probabilities in M x M equal cells of the box.
        box: in pixels of the image.
        size: (H, W) of the image.

    Returns:
        (H, W) bool, True where the probability, bilinear between centres of cells, is a half at least.
    """
    height, width = size
    x0, y0, x1, y1 = box
    left, right = max(0, int(np.floor(x0))), min(width, int(np.ceil(x1)))
    top, bottom = max(0, int(np.floor(y0))), min(height, int(np.ceil(y1)))
    whole = np.zeros(size, dtype=bool)
    if left >= right or top >= bottom:
        return whole
    xs = (torch.arange(left, right) + 0.5 - x0) / (x1 - x0) * 2 - 1
    ys = (torch.arange(top, bottom) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij")[::-1], dim=-1).to(mask.dtype)
    drawn = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
    whole[top:bottom, left:right] = (drawn >= 0.5).numpy()
    return whole
