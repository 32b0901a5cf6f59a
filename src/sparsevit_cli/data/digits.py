"""A small detection-like classification task made of real handwritten digits.

scikit-learn carries 1797 scanned digits of 8x8 pixels. Each sample draws one of them, a few
tokens wide, at a random place of a large canvas of weak clutter, and asks which digit it is.
Most windows of the canvas are background, as in a street scene, so skipping windows can pay.

A sample is a pure function of (seed, split, index, epoch): no state, no files, no download.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Literal, Self

import numpy as np
import torch

from sparsevit_cli.config.images import DigitsSection
from sparsevit_cli.errors import ConfigError, DataError
from sparsevit_cli.sizes import ImageSize, as_pair

Split = Literal["train", "search", "val"]

# Source digits held out of training; the rest (1197) are for training. The three never overlap.
SPLIT_SIZES: dict[str, int] = {"val": 350, "search": 250}
SPLIT_CODES: dict[str, int] = {"train": 0, "search": 1, "val": 2}
_SPLIT_SEED_TAG = 0xD161
# Raise when a change of this file changes a single pixel.
_DRAWING_VERSION = 2

# Grey level of a canvas, measured over many: constants, so that a sample depends on itself alone.
MEAN = 0.31
STD = 0.12

_SOURCE_SIDE = 8
# One stroke of clutter per patch of this area, in pixels: the same density at every canvas size.
_PIXELS_PER_STROKE = 900.0
_PIXELS_PER_GRADIENT_CELL = 48.0


@dataclass(frozen=True)
class DigitsSpec:
    """What a canvas looks like.

    Attributes:
        canvas: side of the square image, in pixels.
        digit_min: smallest side of a drawn digit, in pixels, independent of the canvas.
        digit_max: largest side of a drawn digit, in pixels.
        clutter: strength of the background structure, 0 (flat) to 1.
    """

    canvas: int
    digit_min: int = 24
    digit_max: int = 32
    clutter: float = 0.5

    @classmethod
    def of(cls, section: DigitsSection | DigitsSpec, size: ImageSize, in_chans: int = 3) -> DigitsSpec:
        """The canvas of a configuration. Raises ConfigError for images that are not square, or not of 3 channels."""
        if in_chans != 3:
            raise ConfigError("model.in_chans", f"{in_chans}; the digits have 3", "Set 3, or another data.source.")
        height, width = as_pair(size)
        if height != width:
            got = f"{height} x {width}; the digits' canvas is square"
            raise ConfigError("model.img_size", got, "Give one number.")
        return cls(height, section.digit_min, section.digit_max, section.clutter)

    def resized(self, size: ImageSize) -> DigitsSpec:
        """The same on a canvas of another size. Raises ConfigError as `of`."""
        return DigitsSpec.of(self, size)

    def __post_init__(self) -> None:
        if not 4 <= self.digit_min <= self.digit_max:
            raise DataError(
                "data.digit_min, data.digit_max",
                f"{self.digit_min} and {self.digit_max}",
                "Give 4 <= digit_min <= digit_max, in pixels.",
            )
        if self.canvas < self.digit_max:
            raise DataError(
                "data.canvas",
                f"{self.canvas} px, smaller than the largest digit ({self.digit_max} px)",
                "Raise the canvas or lower digit_max.",
            )
        if not 0.0 <= self.clutter <= 1.0:
            raise DataError("data.clutter", f"{self.clutter}", "Give a number from 0 to 1.")


@functools.lru_cache(maxsize=1)
def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """All source digits: (1797, 8, 8) float32 of 0..1 and (1797,) int64 labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "data: the digits data set",
            "scikit-learn, which carries it, is not installed",
            "Install it (pip install scikit-learn), or choose another data set.",
        ) from error
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    images.flags.writeable = False
    labels.flags.writeable = False
    return images, labels


@functools.lru_cache(maxsize=16)
def split_indices(split: Split, seed: int) -> tuple[int, ...]:
    """Positions of the split's digits in scikit-learn's set: disjoint between splits, stratified."""
    _, labels = source_digits()
    rng = np.random.default_rng([seed, _SPLIT_SEED_TAG])
    # Rank within the class, as a share: any run of the sorted order then holds all classes evenly.
    share = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(share, kind="stable")
    num_val, num_search = SPLIT_SIZES["val"], SPLIT_SIZES["search"]
    bounds = {
        "val": (0, num_val),
        "search": (num_val, num_val + num_search),
        "train": (num_val + num_search, len(order)),
    }
    first, last = bounds[split]
    return tuple(int(index) for index in order[first:last])


class DigitsSplit(ABC):
    """One split of drawn images; a subclass draws the `count` of them. The epoch moves the training split only."""

    names: tuple[str, ...] = tuple(str(digit) for digit in range(10))

    def __init__(self, spec: DigitsSpec, split: Split, seed: int = 0, *, count: int | None = None) -> None:
        if split not in SPLIT_CODES:
            raise DataError("data: split", f"{split!r}", f"Use one of {', '.join(SPLIT_CODES)}.")
        if seed < 0:
            raise DataError("data.seed", f"{seed}", "Give a whole number of at least 0.")
        self.spec = spec
        self.split = split
        self.seed = seed
        self.epoch = 0
        images, labels = source_digits()
        self._sources = split_indices(split, seed)
        self._digits = images[list(self._sources)]  # (N, 8, 8)
        self._labels = labels[list(self._sources)]  # (N,)
        self.count = len(self._sources) if count is None else count

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to draw. Held-out splits stay at epoch 0, so that scores compare."""
        if self.split == "train":
            self.epoch = epoch

    def with_canvas(self, size: ImageSize) -> Self:
        """The same digits, at the same epoch, on canvases of another size. Raises ConfigError if it is not square."""
        other = copy.copy(self)
        other.spec = self.spec.resized(size)
        return other

    def __len__(self) -> int:
        return self.count

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """What to call an image."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the images; the epoch is no part of it."""

    def _checked(self, index: int) -> int:
        """The number of a sample, counted from the end if it is negative. Raises IndexError, which ends iteration."""
        if not -self.count <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        return index % self.count

    def _fingerprint(self, **drawing: int) -> str:
        """`fingerprint` with what is of the subclass."""
        definition = {**drawing, "seed": self.seed, "spec": asdict(self.spec), "split": self.split}
        digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode())
        digest.update(self._digits.tobytes())
        digest.update(self._labels.tobytes())
        return digest.hexdigest()


class DigitsDataset(DigitsSplit):
    """Canvases of one digit.

    Items are (image, label): float32 (3, canvas, canvas) of about zero mean and unit variance,
    and an int. Training digits are also slightly tilted, sheared and stretched.
    """

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        index = self._checked(index)
        canvas, _ = self._draw(index)
        canvas -= MEAN
        canvas /= STD
        image = torch.from_numpy(canvas).expand(3, -1, -1).contiguous()  # (3, H, W)
        return image, int(self._labels[index])

    def digit_box(self, index: int) -> tuple[int, int, int]:
        """Where the digit of a sample is drawn: (top, left, side) in pixels."""
        return self._draw(self._checked(index))[1]

    def sample_name(self, index: int) -> str:
        """A name that tells which source digit a sample shows, such as `val-0003-digit1127`."""
        index = self._checked(index)
        return f"{self.split}-{index:04d}-digit{self._sources[index]:04d}"

    def fingerprint(self) -> str:
        return self._fingerprint(drawing=_DRAWING_VERSION)

    def _draw(self, index: int) -> tuple[np.ndarray, tuple[int, int, int]]:
        """One canvas, (H, W) float32 of about 0..1, and the place of its digit."""
        spec = self.spec
        rng = np.random.default_rng([self.seed, SPLIT_CODES[self.split], index, self.epoch])
        side = int(rng.integers(spec.digit_min, spec.digit_max + 1))
        top, left = (int(x) for x in rng.integers(0, spec.canvas - side + 1, size=2))
        ink = upscale(self._digits[index], side, random_pose(rng, self.split == "train"))
        brightness = np.float32(rng.uniform(0.75, 1.0))

        canvas = background(rng, spec.canvas, spec.digit_max, spec.clutter)
        place = canvas[top : top + side, left : left + side]
        place += ink * (brightness - place)
        return canvas, (top, left, side)


def random_pose(rng: np.random.Generator, is_train: bool) -> np.ndarray:
    """2x2 map from drawn to source coordinates. The identity unless training."""
    if not is_train:
        return np.eye(2)
    angle, shear = rng.uniform(-0.1, 0.1, size=2)
    stretch_y, stretch_x = rng.uniform(0.95, 1.075, size=2)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos * stretch_y, -sin], [sin + shear, cos * stretch_x]])


def upscale(digit: np.ndarray, side: int, pose: np.ndarray) -> np.ndarray:
    """(8, 8) digit -> (side, side) of 0..1, by cubic (Catmull-Rom) interpolation."""
    axis = (np.arange(side) + 0.5) / side - 0.5
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)  # (2, side^2)
    y, x = (pose @ grid + 0.5) * _SOURCE_SIDE - 0.5
    centres = np.arange(_SOURCE_SIDE)
    weight_y = _catmull_rom(y[:, None] - centres)  # (side^2, 8)
    weight_x = _catmull_rom(x[:, None] - centres)  # (side^2, 8)
    ink = ((weight_y @ digit) * weight_x).sum(axis=1)
    clipped: np.ndarray = ink.clip(0.0, 1.0).reshape(side, side).astype(np.float32)
    return clipped


def _catmull_rom(distance: np.ndarray) -> np.ndarray:
    d = np.abs(distance)
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
    return np.where(d < 1.0, near, np.where(d < 2.0, far, 0.0))


def background(rng: np.random.Generator, canvas: int, digit_max: int, clutter: float) -> np.ndarray:
    """(canvas, canvas) float32: a slow gradient, faint strokes both dark and light, and noise."""
    num_cells = max(2, round(canvas / _PIXELS_PER_GRADIENT_CELL) + 1)
    knots = rng.uniform(-1.0, 1.0, size=(num_cells, num_cells)).astype(np.float32)
    blend = _linear_blend(canvas, num_cells)  # (canvas, num_cells)
    image: np.ndarray = np.float32(0.3) + np.float32(0.15 * clutter) * (blend @ knots @ blend.T)
    noise = rng.random((canvas, canvas), dtype=np.float32)
    noise -= np.float32(0.5)
    noise *= np.float32(0.2 * clutter)
    image += noise

    # Drawn on a wider canvas and cropped, so that strokes also leave over the border.
    num_strokes = round(canvas * canvas / _PIXELS_PER_STROKE)
    patches = _strokes(rng, num_strokes, digit_max) * np.float32(0.5 * clutter)  # (S, p, p)
    size = patches.shape[-1]
    wide = np.zeros((canvas + 2 * size, canvas + 2 * size), dtype=np.float32)
    corners = rng.integers(0, canvas + size, size=(num_strokes, 2))
    for patch, (y, x) in zip(patches, corners.tolist(), strict=True):
        wide[y : y + size, x : x + size] += patch
    image += wide[size : size + canvas, size : size + canvas]
    np.clip(image, 0.0, 1.0, out=image)
    return image


@functools.lru_cache(maxsize=16)
def _linear_blend(num_pixels: int, num_knots: int) -> np.ndarray:
    """(num_pixels, num_knots) weights of linear interpolation between evenly spread knots."""
    position = np.linspace(0.0, num_knots - 1.0, num_pixels)[:, None]
    return np.maximum(0.0, 1.0 - np.abs(position - np.arange(num_knots))).astype(np.float32)


def _strokes(rng: np.random.Generator, count: int, digit_max: int) -> np.ndarray:
    """(count, p, p) float32 patches of one straight soft stroke each, of height -1..1."""
    size = digit_max
    axis = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    angle, half_length, half_width, height = rng.random((4, count, 1, 1), dtype=np.float32)
    angle *= np.float32(np.pi)
    half_length = (0.15 + 0.35 * half_length) * np.float32(size - 4)
    half_width = 0.4 + 0.8 * half_width
    y, x = axis[:, None], axis[None, :]
    cos, sin = np.cos(angle), np.sin(angle)
    along = np.abs(x * cos + y * sin)
    across = np.abs(y * cos - x * sin)
    cover = np.clip(half_length - along + 0.5, 0.0, 1.0)
    cover *= np.clip(half_width - across + 0.5, 0.0, 1.0)
    strokes: np.ndarray = cover * (2.0 * height - 1.0)
    return strokes
