"""The embedded scenes of digits as images and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from sparsevit_cli.config.images import DigitsSection
from sparsevit_cli.data.digit_scenes import DigitScenes
from sparsevit_cli.data.digits import DigitsSpec
from sparsevit_cli.data.drawn import DrawnSource


class SceneSource(DrawnSource[DigitScenes]):
    """One split of the scenes: (image (3, H, W) float32, mask (H, W) uint8).

    Masks of the training split are tv_tensors, which `Shrunk` shrinks with their image. Those of the others are plain
    tensors: a smaller model is scored at the full size of the truth.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.drawn[index]
        mask = scene.class_map.to(torch.uint8)
        return tv_tensors.Image(scene.image), tv_tensors.Mask(mask) if self.drawn.split == "train" else mask

    def collate(self, samples: Sequence[Any], seed: int | None) -> tuple[Any, Any]:
        images, masks = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(masks)


def example_scenes(section: DigitsSection, canvas: int, count: int, seed: int) -> Tensor:
    """Images (count, 3, canvas, canvas) of the validation split, from the first one on."""
    scenes = DigitScenes(DigitsSpec.of(section, canvas), "val", seed)
    return torch.stack([scenes[number % len(scenes)].image for number in range(count)])
