"""Seeded images to check and measure exported programs on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def structured_images(shape: tuple[int, int, int], batch: int, seed: int) -> Tensor:
    """Images (B, C, H, W) whose windows differ: smooth ground, three textured blobs each, a little noise.

    Plain noise gives all windows almost the same score, and then runtimes may rank them differently. A function
    of the arguments alone.
    """
    channels, height, width = shape
    rng = torch.Generator().manual_seed(1009 * seed + batch)
    x = 0.1 * torch.randn(batch, *shape, generator=rng)
    for cells, strength in ((3, 0.5), (11, 0.3)):
        coarse = strength * torch.randn(batch, channels, cells, cells, generator=rng)
        x += F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    rows, cols = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    for _ in range(3):
        row, col, size, pitch = (torch.rand(batch, 1, 1, 1, generator=rng) for _ in range(4))
        blob = torch.exp(-((rows - row) ** 2 + (cols - col) ** 2) / (0.05 + 0.15 * size) ** 2)
        x += 2 * blob * torch.sin((40 + 80 * pitch) * (rows + 0.6 * cols))
    return x
