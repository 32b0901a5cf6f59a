"""Tiny data sets in the layouts of the real ones, written pixel by pixel and not by the project's own writers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (40, 64)
"""Height and width of every image."""


def squares(seed: int, numbers: tuple[int, ...], size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask (H, W) uint8 of blocks of 8 pixels, each of one of `numbers`."""
    height, width = size
    drawn = np.random.default_rng(seed).choice(numbers, (-(-height // 8), -(-width // 8)))
    return np.kron(drawn, np.ones((8, 8))).astype(np.uint8)[:height, :width]


def painted(mask: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) whose colours tell the numbers of a mask."""
    numbers = mask.astype(int)
    return np.stack([numbers * 5 % 256, numbers * 91 % 256, 255 - numbers * 5 % 256], -1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def cityscapes_tree(root: Path, counts: Mapping[str, int] = {"train": 6, "val": 3}) -> Path:
    """leftImg8bit and gtFine as the archives unpack, with their colour images and polygons beside the labelIds."""
    for split, count in counts.items():
        for number in range(count):
            city = ("aachen", "bochum")[number % 2]
            name = f"{city}_{number:06d}_000019"
            mask = squares(number + 100 * len(split), (0, 3, 7, 11, 21, 26))
            save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", painted(mask))
            labels = root / "gtFine" / split / city
            save(labels / f"{name}_gtFine_labelIds.png", mask)
            save(labels / f"{name}_gtFine_instanceIds.png", mask.astype(np.uint16) * 1000)
            save(labels / f"{name}_gtFine_color.png", painted(mask))
            (labels / f"{name}_gtFine_polygons.json").write_text("{}")
    return root


def ade_tree(root: Path, counts: Mapping[str, int] = {"training": 6, "validation": 3}) -> Path:
    """images and annotations as ADEChallengeData2016 unpacks: JPEG and grey PNG, 0 is no class, sizes differ."""
    for split, count in counts.items():
        for number in range(count):
            mask = squares(number + 100 * len(split), (0, 1, 2, 3), (40 + 8 * number, 64 - 4 * number))
            name = f"ADE_{split[:5]}_{number:08d}"
            save(root / "images" / split / f"{name}.jpg", painted(mask))
            save(root / "annotations" / split / f"{name}.png", mask)
    (root / "objectInfo150.txt").write_text("wall\nsky\ntree\n")
    return root
