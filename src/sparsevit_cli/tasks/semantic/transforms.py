"""What becomes of an image and its mask: crops drawn by seed in training, a whole image or windows in evaluation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from sparsevit_cli.config.semantic import CropSection, MaskFiles
from sparsevit_cli.data.chosen import Spec, refuse_other_channels
from sparsevit_cli.data.images import UnreadableImageError
from sparsevit_cli.data.preprocessing import Preprocessing
from sparsevit_cli.seeding import derive_seed
from sparsevit_cli.sizes import ImageSize, Size, as_pair

from .labels import IGNORED


@dataclass(frozen=True)
class TransformSpec(Spec[CropSection]):
    """What becomes of an image and its mask, by settings of `MaskFiles`."""

    short_side: int | None
    crop: Size | None
    is_sliding: bool
    max_megapixels: float
    augment_version = 2  # raise when a change of this file changes a training crop

    @classmethod
    def from_config(cls, data: MaskFiles, img_size: ImageSize, in_chans: int) -> TransformSpec:
        """The augmenting transform of a configuration. Raises ConfigError where settings do not fit each other."""
        refuse_other_channels(in_chans, data.mean)
        crop = None if data.crop is None else as_pair(data.crop)
        spec = cls(
            as_pair(img_size), data.mean, data.std, data.short_side, crop, data.evaluation == "sliding",
            data.max_megapixels, augment=data.augment,
        )  # fmt: skip
        return spec.resized(img_size)

    def resized(self, size: ImageSize) -> Self:
        """The same for images of another size; training crops are no larger than `crop`."""
        height, width = as_pair(size)
        if self.augment is not None and self.crop is not None:
            height, width = min(height, self.crop[0]), min(width, self.crop[1])
        return super().resized((height, width))

    def preprocessing(self, overlap: float) -> Preprocessing:
        """`evaluation` in words; sliding windows overlap by a share of `overlap`."""
        if not self.is_sliding:
            return Preprocessing(self.size, self.mean, self.std)
        if self.short_side is None:
            return Preprocessing(self.size, self.mean, self.std, resize="none", sliding_overlap=overlap)
        to = (self.short_side, self.short_side)
        return Preprocessing(self.size, self.mean, self.std, resize="short_side", to=to, sliding_overlap=overlap)

    def evaluated(self, image: Tensor, name: str) -> Tensor:
        """Image (3, h, w) uint8, normalised: whole at `size`, or for sliding windows at its own size or short side.

        Raises UnreadableImageError for a strip whose long side would become too large.
        """
        if not self.is_sliding:
            return self._normalised(V.resize(image, list(self.size), antialias=True))
        own = (int(image.shape[1]), int(image.shape[2]))
        size = self.slid_size(own, name)
        return self._normalised(image if size == own else V.resize(image, list(size), antialias=True))

    def slid_size(self, own: Size, name: str) -> Size:
        """Height and width at which sliding windows go over an image of `own` size. Raises UnreadableImageError."""
        factor = self._base_factor(own)
        if factor == 1:
            return own
        height, width = (max(1, round(side * factor)) for side in own)
        if height * width > self.max_megapixels * 1e6:
            got = f"{height} x {width} pixels at data.short_side {self.short_side}"
            raise UnreadableImageError(name, got, "Cut it, or raise data.max_megapixels.")
        return height, width

    def drawn(self, image: Tensor, mask: Tensor, seed: int, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """A crop of `size` of image (3, h, w) uint8 and mask (h, w), a function of (seed, epoch, index).

        The part of the image that the crop shows is cut out first and scaled then: the same crop, without scaling what
        lies outside. What the crop shows beside the image is of mean colour and IGNORED.
        """
        assert self.augment is not None
        rng = random.Random(derive_seed(seed, "augment", epoch, index))
        scale = rng.uniform(self.augment.scale_min, self.augment.scale_max) * self._base_factor(image.shape[1:])
        sides = zip(image.shape[1:], self.size, strict=True)
        tops, seen = zip(*[_cut(rng, whole, side / scale) for whole, side in sides], strict=True)
        flips = rng.random() < self.augment.hflip
        strength = self.augment.color_jitter
        colours = [rng.uniform(max(0, 1 - strength), 1 + strength) for _ in range(3)]
        size = [min(side, max(1, round(part * scale))) for side, part in zip(self.size, seen, strict=True)]
        image = V.resize(V.crop(image, *tops, *seen), size, antialias=True)
        # Not NEAREST, which takes pixels above and left: masks would lie half a pixel beside their images. Older
        # torchvisions resize a Mask by nothing else, but a tensor as they are told.
        plain = V.crop(mask, *tops, *seen).as_subclass(Tensor)[None]
        mask = tv_tensors.Mask(V.resize(plain, size, interpolation=InterpolationMode.NEAREST_EXACT)[0])
        if strength:
            brightness, contrast, saturation = colours
            image = V.adjust_saturation(V.adjust_contrast(V.adjust_brightness(image, brightness), contrast), saturation)
        image = self._normalised(image)
        beside = [0, 0, self.size[1] - size[1], self.size[0] - size[0]]
        if any(beside):
            image, mask = V.pad(image, beside), V.pad(mask, beside, fill=IGNORED)
        if flips:
            image, mask = V.horizontal_flip(image), V.horizontal_flip(mask)
        return image, mask

    def _base_factor(self, size: Sequence[int]) -> float:
        return 1.0 if self.short_side is None else self.short_side / min(size)

    def _normalised(self, image: Tensor) -> Tensor:
        scaled = V.to_dtype(image, torch.float32, scale=True)
        normalised: Tensor = V.normalize(scaled, list(self.mean), list(self.std))
        return normalised


def _cut(rng: random.Random, whole: int, wanted: float) -> tuple[int, int]:
    """First pixel and number of pixels of `wanted` out of `whole`, or all of them."""
    part = min(whole, max(1, round(wanted)))
    return rng.randint(0, whole - part), part
