"""Scenes of several digits with boxes, masks and classes: the embedded data of the dense tasks.

A scene draws 1 to 5 of scikit-learn's digits on the cluttered canvas of `digits`, apart from each other. It is a pure
function of (seed, split, index, epoch); the digits of the splits are disjoint, as in `digits`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .digits import MEAN, SPLIT_CODES, STD, DigitsSpec, DigitsSplit, Split, background, random_pose, upscale

SCENES: dict[str, int] = {"train": 1200, "search": 200, "val": 200}
MAX_DIGITS = 5
_TRIES = 30
"""Places tried for a digit that must not touch another one."""
_INK = 0.35
"""A pixel belongs to a digit where its ink covers more than this."""
_SCENE_TAG = 0x5CE9E
# Raise when a change of this file changes a single pixel.
_SCENES_VERSION = 1


@dataclass(frozen=True)
class Scene:
    """One canvas and its truth: n digits.

    image: (3, H, W) float32 of about zero mean and unit variance; boxes: (n, 4) float32, x0 y0 x1 y1 in pixels, tight
    around the masks; labels: (n,) int64, 0 to 9; masks: (n, H, W) bool, disjoint.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor

    @property
    def class_map(self) -> Tensor:
        """(H, W) int64: 0 is background, 1 + label a digit."""
        return (self.masks * (1 + self.labels)[:, None, None]).sum(0)

    def grey(self) -> np.ndarray:
        """The canvas as (H, W) uint8."""
        grey: np.ndarray = ((self.image[0].numpy() * STD + MEAN) * 255).round().clip(0, 255).astype(np.uint8)
        return grey


class DigitScenes(DigitsSplit):
    """Scenes; `count` of them, or as many as SCENES says."""

    def __init__(self, spec: DigitsSpec, split: Split, seed: int = 0, *, count: int | None = None) -> None:
        super().__init__(spec, split, seed, count=SCENES.get(split) if count is None else count)

    def __getitem__(self, index: int) -> Scene:
        spec, index = self.spec, self._checked(index)
        rng = np.random.default_rng([self.seed, SPLIT_CODES[self.split], index, self.epoch, _SCENE_TAG])
        canvas = background(rng, spec.canvas, spec.digit_max, spec.clutter)
        masks, labels, taken = [], [], np.zeros((spec.canvas, spec.canvas), dtype=bool)
        for number in rng.integers(0, len(self._labels), size=int(rng.integers(1, MAX_DIGITS + 1))):
            ink = upscale(
                self._digits[number],
                int(rng.integers(spec.digit_min, spec.digit_max + 1)),
                random_pose(rng, self.split == "train"),
            )
            brightness, place = np.float32(rng.uniform(0.75, 1.0)), self._free_place(rng, taken, len(ink))
            if place is None:
                continue  # a small canvas is full; the first digit always has a place
            area = np.s_[place[0] : place[0] + len(ink), place[1] : place[1] + len(ink)]
            canvas[area] += ink * (brightness - canvas[area])
            mask = np.zeros_like(taken)
            mask[area] = ink > _INK
            taken[area] = True
            masks.append(mask)
            labels.append(int(self._labels[number]))
        canvas -= MEAN
        canvas /= STD
        image = torch.from_numpy(canvas).expand(3, -1, -1).contiguous()
        stacked = np.stack(masks)
        boxes = torch.tensor([_box(mask) for mask in stacked], dtype=torch.float32)
        return Scene(image, boxes, torch.tensor(labels), torch.from_numpy(stacked))

    def _free_place(self, rng: np.random.Generator, taken: np.ndarray, side: int) -> tuple[int, int] | None:
        """Top and left of a square of `side` pixels that touches no other digit's; None after some tries."""
        for _ in range(_TRIES):
            top, left = (int(x) for x in rng.integers(0, self.spec.canvas - side + 1, size=2))
            if not taken[top : top + side, left : left + side].any():
                return top, left
        return None

    def sample_name(self, index: int) -> str:
        """`val-scene-0003`"""
        return f"{self.split}-scene-{index % self.count:04d}"

    def fingerprint(self) -> str:
        return self._fingerprint(scenes=_SCENES_VERSION, count=self.count)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 around the True pixels of a mask (H, W)."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
