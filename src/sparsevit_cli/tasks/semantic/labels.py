"""Which number in a mask file is which class. A mask of ours is (H, W) uint8: classes from 0, and IGNORED."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparsevit_cli.data.images import UnreadableImageError, opened
from sparsevit_cli.data.source import shorten

IGNORED = 255
"""A pixel without a class: neither learned nor scored."""
MAX_CLASSES = 255
_REFUSED = -1
_NUMBERS = 65536
_FORMATS = ("PNG", "TIFF", "BMP")  # lossless ones
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of Pillow whose pixels are one whole number."""
_STRETCHED = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies grey of 2 and 4 bits by, so that white is 255, by the start of its raw mode."""


@dataclass(frozen=True)
class LabelMap:
    """The names of the classes, and (number in a file, class or IGNORED) for every number that a file may hold.

    `known` tells what numbers there are, and `do` what to do about a file with another one.
    """

    names: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    known: str
    do: str

    @cached_property
    def _table(self) -> NDArray[np.int32]:
        table = np.full(_NUMBERS, _REFUSED, dtype=np.int32)
        for number, label in self.pairs:
            table[number] = label
        return table

    def classes(self, numbers: NDArray[np.integer], name: str) -> NDArray[np.uint8]:
        """Numbers (H, W) of a file as classes (H, W) uint8. Raises UnreadableImageError for others."""
        possible = numbers.clip(0, _NUMBERS - 1) if numbers.dtype.itemsize > 2 else numbers
        found = self._table[possible]
        refused = (found == _REFUSED) | (possible != numbers)
        if refused.any():
            values, counts = np.unique(numbers[refused], return_counts=True)
            told = shorten([f"{value} ({count} pixels)" for value, count in zip(values, counts, strict=True)])
            raise UnreadableImageError(name, f"numbers that are no class: {told}; {self.known}", self.do)
        classes: NDArray[np.uint8] = found.astype(np.uint8)
        return classes


def read_numbers(file: Path, name: str, max_megapixels: float) -> NDArray[np.integer]:
    """The numbers (H, W) in a mask file: palette, or grey of 1, 2, 4, 8 or 16 bits. Raises UnreadableImageError.

    A palette's colours say nothing: its indices are the numbers.
    """
    with opened_mask(file, name, max_megapixels) as image:
        factor = _factor(image)
        numbers = np.asarray(image) // factor if factor > 1 else np.asarray(image)
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


@contextmanager
def opened_mask(file: Path, name: str, max_megapixels: float) -> Iterator[Image.Image]:
    """A mask file by its header. Raises UnreadableImageError for formats with losses and pixels that are no numbers."""
    with opened(file, name, max_megapixels, _FORMATS) as image:
        if image.mode not in _MODES:
            got = f"pixels of mode {image.mode}, not one number each"
            raise UnreadableImageError(name, got, "Save it as a PNG of class numbers: palette, or grey.")
        yield image


def _factor(image: Image.Image) -> int:
    """See `_STRETCHED`; 1 for all other images. Pillow knows the raw mode only until the pixels are read."""
    tiles = getattr(image, "tile", None)
    layout = tiles[0][3] if tiles else ""
    raw = str(layout[0] if isinstance(layout, tuple) else layout)
    return next((factor for start, factor in _STRETCHED.items() if raw.startswith(start)), 1)
