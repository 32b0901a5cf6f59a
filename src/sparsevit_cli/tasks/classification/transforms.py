"""PIL image to normalised tensor, through timm.data.create_transform."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor

from sparsevit_cli.config.classification import AugmentSection, LabelledData
from sparsevit_cli.data.chosen import Spec
from sparsevit_cli.data.preprocessing import Preprocessing
from sparsevit_cli.errors import ConfigError, in_one_line, pass_on
from sparsevit_cli.seeding import seeded
from sparsevit_cli.sizes import ImageSize, Size, as_pair

# A random crop of a tiny image may round to no pixel at all, which timm makes black: tiny ones are enlarged first.
_SMALLEST_CROP = 0.01
_TINY_PIXELS = 64
# Only the centre of an image is evaluated: of a strip, this many times the crop is more than enough.
_STRIP_FACTOR = 8
# Of the counts in a policy (n, w, d): a thousand million operations per image would never end.
_MOST_OPERATIONS = 100


@dataclass(frozen=True)
class TransformSpec(Spec[AugmentSection]):
    """What becomes of an image: cropped and resized, normalised, augmented or not; the centre crop is evaluated."""

    in_chans: int
    interpolation: Literal["bilinear", "bicubic"]
    crop_pct: float

    @classmethod
    def from_config(cls, data: LabelledData, img_size: ImageSize, in_chans: int) -> TransformSpec:
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
        spec = cls(
            as_pair(img_size), data.mean, data.std, in_chans, data.interpolation, data.crop_pct, augment=data.augment
        )
        if data.augment.auto_augment is not None:
            _try_policy(spec, data.augment.auto_augment)
        return spec

    def preprocessing(self) -> Preprocessing:
        """`evaluation` in words, but for strips: those are trimmed first, which leaves the crop as it is."""
        return Preprocessing(
            self.size,
            self.mean,
            self.std,
            resize="cover",
            to=_scale_size(self.size, self.crop_pct),
            interpolation=self.interpolation,
            crop="center",
            channel_order="L" if self.in_chans == 1 else "RGB",
        )

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
            for operation in _operations(transform):
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = _posterize
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


def _scale_size(size: Size, crop_pct: float) -> Size:
    """What timm resizes to before it crops `size` (timm/data/transforms_factory.py, transforms_imagenet_eval)."""
    height, width = (math.floor(side / crop_pct) for side in size)
    return height, width


def _operations(transform: Any) -> list[Any]:
    """All operations that the policy inside a timm transform can draw."""
    steps = transform.transforms
    chains = [getattr(step, "ops", ()) for step in steps]
    chains += [chain for step in steps for chain in getattr(step, "policy", ())]
    return [operation for chain in chains for operation in chain]


def _posterize(image: Image.Image, bits_to_keep: int, **settings: object) -> Image.Image:
    """timm's posterize. timm also draws 0 bits and less, which Pillow 13 refuses and older ones make black."""
    return auto_augment.posterize(image, max(1, bits_to_keep), **settings)  # type: ignore[no-any-return]


def _try_policy(spec: TransformSpec, policy: str) -> None:
    """Raises ConfigError for a policy that timm cannot parse, that never ends, or that fails for some draw."""
    field, do = "data.augment.auto_augment", "Try `rand-m9-mstd0.5`, or null."
    try:
        transform = spec.build()
    except Exception as error:  # timm parses the policy with asserts, look-ups and int()
        pass_on(error)
        raise ConfigError(field, f"{policy!r} is not a timm policy ({in_one_line(error)})", do) from error
    steps = transform.transform.transforms  # type: ignore[attr-defined]
    counts = [getattr(step, name, 0) for step in steps for name in ("num_layers", "width", "depth")]
    if max(counts) > _MOST_OPERATIONS:
        got = f"{policy!r} asks for {max(counts)} operations; allowed are at most {_MOST_OPERATIONS}"
        raise ConfigError(field, got, do)
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    try:
        with seeded(0):
            transform(image)
            for operation in _operations(transform.transform):  # type: ignore[attr-defined]
                _try_operation(operation, image if spec.in_chans == 3 else image.convert("L"))
    except Exception as error:
        pass_on(error)
        raise ConfigError(field, f"{policy!r} fails: {failed_step(error)}", do) from error


def _try_operation(operation: Any, image: Image.Image) -> None:
    """Apply `operation` at the ends of what it can draw: its arguments grow or shrink with the magnitude."""
    always = copy.copy(operation)
    always.prob, always.magnitude_std = 1.0, 0
    for magnitude in (0, operation.magnitude, math.inf):  # timm clamps it to what the policy allows
        always.magnitude = magnitude
        always(image)


def failed_step(error: Exception) -> str:
    """The operation inside timm's or torchvision's transforms that raised `error`, and the error in one line."""
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    steps = [repr(owner) for owner in owners if type(owner).__module__.startswith(("timm.data.", "torchvision."))]
    return f"{' '.join(steps[-1].split()) if steps else 'the transform'}: {in_one_line(error)}"


def _trim_strip(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Centre part of a strip: resizing the short side of 1 x 100000 pixels would take gigabytes."""
    scale = min(image.height / size[0], image.width / size[1])  # source pixels per target pixel
    height = min(image.height, math.ceil(_STRIP_FACTOR * scale * size[0]))
    width = min(image.width, math.ceil(_STRIP_FACTOR * scale * size[1]))
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
