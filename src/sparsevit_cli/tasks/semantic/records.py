"""Pairs of an image and its mask in files, and the source that reads them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as V

from sparsevit_cli.data.chosen import ChosenSource
from sparsevit_cli.data.files import bytes_at, file_fault
from sparsevit_cli.data.images import UnreadableImageError, decode_image, upright_size
from sparsevit_cli.data.source import BadImages
from sparsevit_cli.data.splits import Indices
from sparsevit_cli.sizes import Size

from .labels import LabelMap, opened_mask, read_numbers
from .transforms import TransformSpec


@dataclass(frozen=True)
class Pair:
    """An image and its mask, as paths below the root; `key` names the sample."""

    key: str
    image: str
    mask: str


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split, listed but not opened, in the order of their keys; `ignored` other files lie there."""

    root: Path
    split: str
    pairs: tuple[Pair, ...]
    sizes: tuple[tuple[int, int], ...]
    """Bytes of image and mask, or NOT_A_FILE."""
    labels: LabelMap
    max_megapixels: float
    ignored: int = 0

    @classmethod
    def listed(
        cls, root: Path, split: str, pairs: Sequence[Pair], labels: LabelMap, max_megapixels: float, ignored: int = 0
    ) -> Pairs:
        """With the sizes of the files, looked up now."""
        sizes = tuple((bytes_at(root / pair.image), bytes_at(root / pair.mask)) for pair in pairs)
        return cls(root, split, tuple(pairs), sizes, labels, max_megapixels, ignored)

    def read(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Upright RGB image, and classes (H, W) uint8.

        Raises UnreadableImageError for a file that cannot be decoded, and for a mask of another size than its image or
        with numbers that are no class.
        """
        pair = self.pairs[index]
        if reason := self.fault(index):
            raise UnreadableImageError(pair.key, reason, "Replace or remove it.")
        image = decode_image(self.root / pair.image, pair.image, self.max_megapixels)
        classes = self.classes(index)
        _refuse_other_size(pair, (classes.shape[0], classes.shape[1]), (image.height, image.width))
        return image, classes

    def check_header(self, index: int) -> None:
        """Raises UnreadableImageError if the headers of image and mask tell that `read` would."""
        pair = self.pairs[index]
        image = upright_size(self.root / pair.image, pair.image, self.max_megapixels)
        with opened_mask(self.root / pair.mask, pair.mask, self.max_megapixels) as mask:
            _refuse_other_size(pair, (mask.height, mask.width), image)

    def classes(self, index: int) -> NDArray[np.uint8]:
        """Classes (H, W) uint8 of a mask; its image is not opened. Raises UnreadableImageError."""
        mask = self.pairs[index].mask
        return self.labels.classes(read_numbers(self.root / mask, mask, self.max_megapixels), mask)

    def faults(self) -> dict[int, str]:
        """Unreadable pairs as far as the listing tells: position to reason."""
        found = ((index, self.fault(index)) for index in range(len(self.pairs)))
        return {index: reason for index, reason in found if reason is not None}

    def fault(self, index: int) -> str | None:
        """Why a pair is unreadable, as far as the listing tells."""
        for name, size in zip(("its image", "its mask"), self.sizes[index], strict=True):
            if reason := file_fault(size):
                return f"{name} {reason}"
        return None


def _refuse_other_size(pair: Pair, mask: Size, image: Size) -> None:
    if mask != image:
        got = f"{mask[0]} x {mask[1]} pixels, its image {image[0]} x {image[1]}"
        raise UnreadableImageError(pair.mask, got, f"Make it as large as {pair.image}.")


class PairSource(ChosenSource):
    """Chosen pairs as (image (3, H, W), mask (H, W) uint8).

    In training both are crops of one size, tv_tensors, drawn by (seed, epoch, index). In evaluation the image has the
    size that the model gets it in, and the mask, a plain tensor, its own.
    """

    spec: TransformSpec

    def __init__(
        self, pairs: Pairs, indices: Indices, spec: TransformSpec, *, seed: int, bad_images: BadImages | None
    ) -> None:
        super().__init__(indices, seed=seed, bad_images=bad_images)
        self.pairs, self.spec = pairs, spec

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs.read(self.record(index))
        pixels = tv_tensors.Image(V.pil_to_tensor(image))
        truth = torch.from_numpy(mask)
        if self.spec.augment is None:
            return self.spec.evaluated(pixels, self.sample_name(index)), truth
        return self.spec.drawn(pixels, tv_tensors.Mask(truth), self.seed, self.epoch, index)

    def check_header(self, index: int) -> None:
        """Sizes of image and mask are compared."""
        self.pairs.check_header(self.record(index))

    def slid_sizes(self) -> list[Size]:
        """Height and width at which sliding windows go over each image, from the headers.

        Raises UnreadableImageError.
        """
        pairs = self.pairs
        names = [pairs.pairs[record].image for record in self.indices.tolist()]
        own = [upright_size(pairs.root / name, name, pairs.max_megapixels) for name in names]
        return [self.spec.slid_size(size, name) for size, name in zip(own, names, strict=True)]

    def collate(self, samples: Sequence[Any], seed: int | None) -> tuple[Any, Any]:
        """One tensor of images and of masks in training; masks, and images of sliding windows, as lists elsewhere."""
        images, masks = zip(*samples, strict=True)
        if self.spec.augment is not None:
            return torch.stack(images), torch.stack(masks)
        return list(images) if self.spec.is_sliding else torch.stack(images), list(masks)

    def sample_name(self, index: int) -> str:
        return self.pairs.pairs[self.record(index)].key

    def sample_file(self, index: int) -> Path | None:
        return self.pairs.root / self.pairs.pairs[self.record(index)].image

    @functools.cached_property
    def listing_digest(self) -> str:
        """SHA-256 over classes, names and sizes of the files; not their contents."""
        digest = hashlib.sha256(repr((self.pairs.labels.names, self.pairs.labels.pairs)).encode())
        for record in self.indices.tolist():
            pair, sizes = self.pairs.pairs[record], self.pairs.sizes[record]
            digest.update(repr((pair.image, pair.mask, sizes)).encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()
