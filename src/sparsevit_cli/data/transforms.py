"""PIL image to normalised tensor, through timm.data.create_transform."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from PIL import Image
from timm.data import create_transform
from torch import Tensor

from sparsevit_cli.config.schema import AugmentSection, DataSection
from sparsevit_cli.errors import ConfigError, pass_on

from .source import ImageSize

# A random crop of a tiny image may round to no pixel at all, which timm makes black: tiny ones are enlarged first.
_SMALLEST_CROP = 0.01
_TINY_PIXELS = 64
# Only the centre of an image is evaluated: of a strip, this many times the crop is more than enough.
_STRIP_FACTOR = 8


@dataclass(frozen=True)
class TransformSpec:
    """What becomes of an image: cropped and resized to `size` (height, width), normalised, augmented or not."""

    size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    augment: AugmentSection | None

    @classmethod
    def from_config(cls, data: DataSection, img_size: ImageSize, in_chans: int) -> TransformSpec:
        """The augmenting transform of a config. Raises ConfigError where settings do not fit each other."""
        if in_chans not in (1, 3):
            raise ConfigError("model.in_chans", f"{in_chans}; image files give 1 or 3", "Set 3 for colour, 1 for grey.")
        for field, values in (("data.mean", data.mean), ("data.std", data.std)):
            if len(values) != in_chans:
                got = f"{len(values)} values for model.in_chans {in_chans}"
                raise ConfigError(field, got, "Give one value per channel.")
        if data.augment.scale_min < _SMALLEST_CROP:
            got = f"{data.augment.scale_min:g}; allowed are {_SMALLEST_CROP} to 1"
            raise ConfigError("data.augment.scale_min", got, "Raise it.")
        spec = cls(as_pair(img_size), in_chans, data.mean, data.std, data.interpolation, data.crop_pct, data.augment)
        try:
            spec.build()
        except Exception as error:  # timm parses the policy with asserts, look-ups and int()
            pass_on(error)
            got = f"{data.augment.auto_augment!r} is not a timm policy ({type(error).__name__}: {error})"
            raise ConfigError("data.augment.auto_augment", got, "Try `rand-m9-mstd0.5`, or null.") from error
        return spec

    def resized(self, size: ImageSize) -> TransformSpec:
        """The same at another size."""
        return replace(self, size=as_pair(size))

    def evaluation(self) -> TransformSpec:
        """The same without augmentation: centre crop."""
        return replace(self, augment=None)

    def describe(self) -> str:
        """Canonical text, for fingerprints."""
        augment = None if self.augment is None else self.augment.model_dump()
        return json.dumps({**asdict(self), "augment": augment}, sort_keys=True)

    def build(self) -> Callable[[Image.Image], Tensor]:
        """Function from an RGB image to (C, H, W) float32. Draws from the global generators where it augments."""
        shared = {
            "input_size": (self.in_chans, *self.size),
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
        }
        if self.augment is None:
            transform = create_transform(**shared, crop_pct=self.crop_pct)
        else:
            transform = create_transform(
                **shared,
                is_training=True,
                scale=(self.augment.scale_min, 1.0),
                hflip=self.augment.hflip,
                color_jitter=self.augment.color_jitter or None,
                auto_augment=self.augment.auto_augment,
                re_prob=self.augment.random_erasing,
                re_mode="pixel",
            )
        return _Transform(self, transform)


@dataclass(frozen=True)
class _Transform:
    """A class, not a closure: sources travel to loader processes by pickle where those are not forked."""

    spec: TransformSpec
    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        if self.spec.in_chans == 1:
            image = image.convert("L")
        if self.spec.augment is None:
            image = _trim_strip(image, self.spec.size)
        elif image.width * image.height < _TINY_PIXELS:
            image = image.resize((image.width * 8, image.height * 8), Image.Resampling.NEAREST)
        return self.transform(image)


def _trim_strip(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Centre part of a strip: resizing the short side of 1 x 100000 pixels would take gigabytes."""
    scale = min(image.height / size[0], image.width / size[1])  # source pixels per target pixel
    height = min(image.height, math.ceil(_STRIP_FACTOR * scale * size[0]))
    width = min(image.width, math.ceil(_STRIP_FACTOR * scale * size[1]))
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def as_pair(size: ImageSize) -> tuple[int, int]:
    """(height, width) in pixels."""
    return (size, size) if isinstance(size, int) else size
