"""The same samples at a lower resolution: what a smaller, dense model is trained and judged on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from sparsevit_cli.sizes import ImageSize, Size

from .source import Source, WrappedSource

# Raise when a change of this file changes what a smaller model is trained or judged on.
_VERSION = 3


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
        leaves, structure = tree_flatten(sample)
        image = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
        own = int(image.shape[-2]), int(image.shape[-1])
        small = self.scale(own)
        if small == own:
            return sample
        is_mask = [isinstance(leaf, tv_tensors.Mask) for leaf in leaves]
        others = [None if by_hand else leaf for leaf, by_hand in zip(leaves, is_mask, strict=True)]
        resized = v2.Resize(list(small), antialias=True)(others)
        parts = zip(leaves, is_mask, resized, strict=True)
        return tree_unflatten([shrunk_mask(leaf, small) if hand else other for leaf, hand, other in parts], structure)

    def resized(self, size: ImageSize) -> Shrunk:
        return Shrunk(self.inner.resized(size), self.scale)

    def fingerprint(self) -> str:
        return f"{self.inner.fingerprint()} at {self.image_size}, version {_VERSION}"


def shrunk_mask(mask: Tensor, size: Size) -> tv_tensors.Mask:
    """A mask (..., H, W) at `size`: each pixel gets the value that has most of its area.

    Areas are weighed as `Shrunk` weighs the pixels of an image. torchvision takes the pixel above and left instead, and
    its masks so lie half a pixel beside their images. In a stack (n, H, W) of single objects, none vanishes: one that
    is too thin for a half of any pixel has those of which it has at least half as much as of its fullest one.
    """
    plain = mask.as_subclass(Tensor)
    flat = plain.reshape(math.prod(plain.shape[:-2]), *plain.shape[-2:])
    found = flat.new_zeros(len(flat), *size)
    for number, one in enumerate(flat):  # one at a time: the shares of a stack of objects would fill the memory
        found[number] = _shrunk_one(one, size, keep=plain.ndim == 3)
    return tv_tensors.Mask(found.reshape(*plain.shape[:-2], *size))


def _shrunk_one(mask: Tensor, size: Size, *, keep: bool) -> Tensor:
    """A mask (H, W) at `size`; of two values, `keep` leaves some of the higher one."""
    first: Tensor
    others: list[Tensor]
    first, *others = mask.unique()
    if not others:
        return first.expand(size)
    if len(others) == 1:
        share = _share(mask, others[0], size)
        largest = float(share.max())
        return torch.where(share >= (largest / 2 if keep and largest < 0.5 else 0.5), others[0], first)
    found, most = first, _share(mask, first, size)
    for value in others:
        share = _share(mask, value, size)
        found, most = torch.where(share >= most, value, found), most.maximum(share)
    return found


def _share(mask: Tensor, value: Tensor, size: Size) -> Tensor:
    """How much of each pixel of `size` has `value` in a mask (H, W), from 0 to 1: `size` float32."""
    share: Tensor = V.resize((mask == value).float()[None], list(size), antialias=True)[0]
    return share
