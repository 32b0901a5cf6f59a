"""The source of images that are drawn and not read: the embedded digits, alone or in scenes."""

from __future__ import annotations

import copy
from typing import Generic, Protocol, Self, TypeVar

from sparsevit_cli.sizes import ImageSize, Size, as_pair

from .digits import DigitsSpec
from .source import Source


class Drawn(Protocol):
    """One split of drawn images, each a function of (seed, split, number, epoch)."""

    spec: DigitsSpec

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to draw."""

    def with_canvas(self, size: ImageSize) -> Self:
        """The same digits on canvases of another size."""

    def sample_name(self, index: int) -> str:
        """What to call an image."""

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the images."""


D = TypeVar("D", bound=Drawn)


class DrawnSource(Source, Generic[D]):
    """Samples of a split of drawn images; a task says in `__getitem__` what it takes of one."""

    def __init__(self, drawn: D) -> None:
        self.drawn = drawn

    @property
    def image_size(self) -> Size:
        return as_pair(self.drawn.spec.canvas)

    def __len__(self) -> int:
        return len(self.drawn)

    def set_epoch(self, epoch: int) -> None:
        self.drawn.set_epoch(epoch)

    def resized(self, size: ImageSize) -> Self:
        other = copy.copy(self)
        other.drawn = self.drawn.with_canvas(size)
        return other

    def sample_name(self, index: int) -> str:
        return self.drawn.sample_name(index)

    def fingerprint(self) -> str:
        return self.drawn.fingerprint()
