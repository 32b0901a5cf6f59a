"""The source of images that are drawn and not read: the embedded digits, alone or in scenes."""

from __future__ import annotations

import copy
from typing import Generic, Self, TypeVar

from sparsevit_cli.sizes import ImageSize, Size, as_pair

from .digits import DigitsSplit
from .source import Source

D = TypeVar("D", bound=DigitsSplit)


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
