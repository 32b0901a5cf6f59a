"""The same samples at a lower resolution: what a smaller, dense model is trained and judged on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

from sparsevit_cli.sizes import ImageSize, Size

from .source import Source, WrappedSource


@dataclass(frozen=True)
class Scale:
    """Images of size `full` become `small`; other ones about the same share of their size, in multiples of `unit`."""

    full: Size
    small: Size
    unit: int = 1

    def __call__(self, size: Size) -> Size:
        """Height and width in pixels that images of `size` are shrunk to."""
        return self.small if size == self.full else multiples(size, self.small[0] / self.full[0], self.unit)


def multiples(size: Size, share: float, unit: int) -> Size:
    """About `share` of `size`, in whole multiples of `unit` pixels."""
    height, width = (max(1, round(side * share / unit)) * unit for side in size)
    return height, width


class Shrunk(WrappedSource):
    """Samples of `inner`, image and truth shrunk as `scale` says, bilinear with antialiasing.

    Unlike `resized`, which may draw other images, this shows the very same ones smaller. The image is the first tensor
    of a sample; those of other sizes than `inner.image_size` become the same share smaller. Boxes and masks that are
    torchvision's `tv_tensors` are shrunk with their image. A truth in plain tensors stays as it is: a smaller model can
    so be judged at full size.
    """

    def __init__(self, inner: Source, scale: Scale) -> None:
        super().__init__(inner)
        self.scale = scale

    @property
    def image_size(self) -> Size:
        return self.scale(self.inner.image_size)

    def __getitem__(self, index: int, /) -> Any:
        sample = self.inner[index]
        image = next(leaf for leaf in tree_leaves(sample) if isinstance(leaf, Tensor))
        own = int(image.shape[-2]), int(image.shape[-1])
        small = self.scale(own)
        return sample if small == own else v2.Resize(list(small), antialias=True)(sample)

    def resized(self, size: ImageSize) -> Shrunk:
        return Shrunk(self.inner.resized(size), self.scale)

    def fingerprint(self) -> str:
        return f"{self.inner.fingerprint()} at {self.image_size}"
