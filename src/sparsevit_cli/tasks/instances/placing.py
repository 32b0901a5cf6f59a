"""Images and their objects on the canvas that the model gets: resized, cropped, mirrored, padded, normalised."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sparsevit_cli.config.instances import CocoData, InstancesAugment
from sparsevit_cli.data.chosen import Spec, refuse_other_channels
from sparsevit_cli.data.preprocessing import Preprocessing
from sparsevit_cli.sizes import ImageSize, Size, as_pair

from .masks import Pixels
from .truth import Truth

Target = dict[str, object]
LEAST_SIDE = 1.0
"""Pixels of a side below which a box is not trained on: torchvision's detectors fail at one without area."""


@dataclass(frozen=True)
class Placement:
    """Where an image lies on the canvas, sizes in pixels.

    The image is resized to `scaled`, of which the part of size `part` at `corner` (top, left) is kept, mirrored if
    `mirrored`, and laid on the top left of the canvas.
    """

    image: Size
    scaled: Size
    corner: Size
    part: Size
    canvas: Size
    mirrored: bool = False

    @property
    def source(self) -> tuple[float, float, float, float]:
        """The kept part, x0 y0 x1 y1 in pixels of the image."""
        (top, left), (height, width) = self.corner, self.part
        sy, sx = self.image[0] / self.scaled[0], self.image[1] / self.scaled[1]
        return left * sx, top * sy, (left + width) * sx, (top + height) * sy


def stretched(image: Size, canvas: Size) -> Placement:
    """The whole image on the whole canvas, whatever its aspect."""
    return Placement(image, canvas, (0, 0), canvas, canvas)


def letterboxed(image: Size, canvas: Size) -> Placement:
    """The whole image, as large as it fits with its aspect."""
    return jittered(image, canvas, 1.0, keep_aspect=True, at=(0.0, 0.0))


def jittered(image: Size, canvas: Size, scale: float, *, keep_aspect: bool, at: tuple[float, float]) -> Placement:
    """The image at `scale` times its place on the canvas.

    What does not fit is cut: `at` (y, x), from 0 to below 1, says where the kept part begins. A smaller one is padded.
    """
    fit = (canvas[0] / image[0], canvas[1] / image[1])
    if keep_aspect:
        fit = (min(fit), min(fit))
    scaled = tuple(max(1, round(side * share * scale)) for side, share in zip(image, fit, strict=True))
    part = tuple(map(min, scaled, canvas))
    corner = tuple(int(share * (whole - kept + 1)) for share, whole, kept in zip(at, scaled, part, strict=True))
    return Placement(image, scaled, corner, part, canvas)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PlacingSpec(Spec[InstancesAugment]):
    """What becomes of an image and its objects."""

    letterbox: bool
    augment_version = 2  # raise when a change of this file changes what is trained on

    @classmethod
    def from_config(cls, data: CocoData, img_size: ImageSize, in_chans: int) -> PlacingSpec:
        """The augmenting one of a configuration. Raises ConfigError."""
        refuse_other_channels(in_chans, data.mean)
        return cls(as_pair(img_size), data.mean, data.std, data.letterbox, augment=data.augment)

    @property
    def pads(self) -> bool:
        """True if images may be smaller than the canvas."""
        low, _ = (self.augment and self.augment.jitter) or (1.0, 1.0)
        return self.letterbox or low < 1

    def preprocessing(self) -> Preprocessing:
        """`evaluation` in words."""
        if self.letterbox:
            return Preprocessing(self.size, self.mean, self.std, resize="fit", padding="bottom_right")
        return Preprocessing(self.size, self.mean, self.std)

    def place(self, image: Size, seed: int) -> Placement:
        """Where an image of a size goes; what is drawn is a function of `seed`."""
        if self.augment is None:
            return letterboxed(image, self.size) if self.letterbox else stretched(image, self.size)
        rng = np.random.default_rng(seed)
        chance, log_scale, *at = rng.random(4)
        low, high = self.augment.jitter or (1.0, 1.0)
        placed = jittered(
            image, self.size, float(low * (high / low) ** log_scale), keep_aspect=self.letterbox, at=(at[0], at[1])
        )
        return replace(placed, mirrored=bool(chance < self.augment.hflip))


def placed_image(image: Image.Image, placement: Placement, spec: PlacingSpec) -> Tensor:
    """(3, H, W) float32, normalised; padding is zero, which is the mean."""
    height, width = placement.part
    part = image.resize((width, height), Image.Resampling.BILINEAR, box=placement.source)
    pixels = F.normalize(F.to_dtype(F.pil_to_tensor(part), torch.float32, scale=True), spec.mean, spec.std)
    return _on_canvas(pixels, placement)


def frame_of(placement: Placement) -> tv_tensors.BoundingBoxes:
    """Where a whole image lies on the canvas, (1, 4) float32; it is shrunk together with its image."""
    (height, width), (top, left) = placement.scaled, placement.corner
    return _boxes(torch.tensor([[-left, -top, width - left, height - top]], dtype=torch.float32), placement.canvas)


def shown_size(frame: Tensor, canvas: Size) -> Size:
    """(height, width) in pixels of the part of the canvas that an image covers, which lies in `frame` (1, 4) of it."""
    right, bottom = frame[0, 2:].tolist()
    height, width = (
        max(1, min(side, math.ceil(round(end, 3)))) for side, end in zip(canvas, (bottom, right), strict=True)
    )
    return height, width


def placed_objects(truth: Truth, placement: Placement, *, masks: bool) -> Target:
    """What a detector is taught: `boxes` (n, 4), `labels` (n,) from 1 on, and `masks` (n, H, W), as tv_tensors.

    Crowds are left out, and so are objects of which nothing is left on the canvas. A box is clipped to the canvas;
    where the canvas cuts an object that has a mask, the box is the mask's. Masks are decoded one at a time.
    """
    sy, sx = (scaled / side for scaled, side in zip(placement.scaled, placement.image, strict=True))
    (top, left), (height, width) = placement.corner, placement.part
    boxes, labels, kept_masks = [], [], []
    for instance in truth.instances:
        if instance.crowd:
            continue
        x, y, w, h = instance.box
        wide = torch.tensor([x * sx - left, y * sy - top, (x + w) * sx - left, (y + h) * sy - top])
        box = wide.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        if (box[2:] - box[:2]).min() < LEAST_SIDE:
            continue
        if masks:
            assert instance.shape is not None, "what has no mask was left out"
            mask = _placed_mask(instance.shape.pixels(truth.size), placement)
            if not mask.any():
                continue
            if not torch.allclose(box, wide):
                box = _around(mask)
            kept_masks.append(mask)
        boxes.append(box)
        labels.append(instance.label + 1)
    stacked = _boxes(torch.stack(boxes) if boxes else torch.zeros(0, 4), placement.part)
    found: Target = {"boxes": _on_canvas(stacked, placement), "labels": torch.tensor(labels, dtype=torch.int64)}
    if masks:
        pixels = torch.stack(kept_masks) if kept_masks else torch.zeros(0, height, width, dtype=torch.uint8)
        found["masks"] = _on_canvas(tv_tensors.Mask(pixels), placement)
    return found


def _placed_mask(pixels: Pixels, placement: Placement) -> Tensor:
    """(h, w) uint8 of the kept part: the pixels of which the mask has at least half.

    Of a crack or wire that has half of no pixel, those of which it has at least half as much as of its fullest one.
    """
    height, width = placement.part
    image = Image.fromarray(pixels.astype(np.uint8) * 255)
    part = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=placement.source))
    most = int(part.max())
    least = 128 if most >= 128 else max(1, (most + 1) // 2)
    return torch.from_numpy((part >= least).astype(np.uint8))


def _around(mask: Tensor) -> Tensor:
    ys, xs = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.stack([xs[0, 0], ys[0, 0], xs[-1, 0] + 1, ys[-1, 0] + 1]).float()


def _boxes(boxes: Tensor, canvas: Size) -> tv_tensors.BoundingBoxes:
    found: tv_tensors.BoundingBoxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)
    return found


def _on_canvas(part: Tensor, placement: Placement) -> Tensor:
    """Image, boxes or masks of the kept part, mirrored and padded."""
    steps: list[Callable[[Tensor], Tensor]] = []
    if placement.mirrored:
        steps.append(F.horizontal_flip)
    (height, width), canvas = placement.part, placement.canvas
    if placement.part != canvas:
        steps.append(v2.Pad([0, 0, canvas[1] - width, canvas[0] - height]))
    for step in steps:
        part = step(part)
    return part
