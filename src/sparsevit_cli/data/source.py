"""What training and evaluation read images from, and how many unreadable ones training forgives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from sparsevit_cli.errors import DataError

ImageSize = int | tuple[int, int]
"""Side in pixels, or (height, width)."""

_NAMES_SHOWN = 10
_log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """One split: labelled images as tensors, each a pure function of (index, epoch)."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""

    @property
    def bad_images(self) -> BadImages | None:
        """Where training counts unreadable images; None where there can be none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Image (C, H, W) float32, normalised, and its label. Raises UnreadableImageError."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn; held-out splits do not change."""

    def with_image_size(self, size: ImageSize) -> ImageSource:
        """The same images at another size."""

    def sample_name(self, index: int) -> str:
        """What to call a sample in a message; may hold any character."""

    def fingerprint(self) -> str:
        """SHA-256 of what decides the tensors. Of files it covers path and size, not the content."""


class BadImages:
    """Unreadable training images, each counted once; more than `max_fraction` of `total` is an error."""

    def __init__(self, total: int, max_fraction: float) -> None:
        self.total, self.max_fraction = total, max_fraction
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def too_many(self, count: int) -> bool:
        """True where `count` unreadable images are above the limit."""
        return count / self.total > self.max_fraction

    def note(self, faults: Iterable[tuple[str, str]]) -> None:
        """Count images, given as (name, reason); warn at the first of all. Raises DataError above the limit."""
        for name, reason in faults:
            if not self._reasons:
                _log.warning("%s: %s. Training goes on without unreadable images.", name, reason)
            self._reasons.setdefault(name, reason)
        if self.too_many(len(self)):
            listed = shorten([f"{name} ({reason})" for name, reason in self._reasons.items()])
            raise DataError(
                "data: unreadable training images",
                f"{len(self)} of {self.total}, above data.max_bad_fraction {self.max_fraction:g}: {listed}",
                "Repair or remove them, or raise data.max_bad_fraction.",
            )

    def __str__(self) -> str:
        return f"{len(self)} of {self.total}" + (f": {shorten(list(self._reasons))}" if self._reasons else "")


def shorten(names: Sequence[str], limit: int = _NAMES_SHOWN) -> str:
    """`a, b, c and 12 more`: at most `limit` names and how many are left out."""
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
