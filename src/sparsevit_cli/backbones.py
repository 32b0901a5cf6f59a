"""A Swin that detectors and segmenters stand on: a norm per level, maps (B, C, H, W), any multiple of 32 pixels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .config.experiment import ModelSection
from .errors import ConfigError
from .models import build_model
from .sizes import Size
from .swin.features import drop_head, stage_maps
from .swin.geometry import patch_size, stage_channels

LEVELS = (0, 1, 2, 3)
Sizes = Sequence[Size]
"""(height, width) in pixels of every image of a batch, without its padding."""


class SwinBackbone(nn.Module):
    """A timm Swin and a LayerNorm for each level that it gives (mmdet, detectron2 and transformers have it).

    `channels` and `strides` (pixels per token) are those of `levels`, the stages whose maps it gives. The Swin's
    parameters keep timm's names below `swin.`.
    """

    def __init__(self, swin: nn.Module, levels: Sequence[int] = LEVELS) -> None:
        super().__init__()
        self.swin = drop_head(swin)
        channels = stage_channels(swin)
        if not levels or sorted(set(levels)) != list(levels) or not set(levels) <= set(range(len(channels))):
            got = f"{list(levels)}; the model has stages 0 to {len(channels) - 1}"
            raise ConfigError("levels", got, "Name stages in order, each once.")
        self.levels = tuple(levels)
        self.channels = tuple(channels[level] for level in levels)
        self.strides = tuple(patch_size(swin)[0] * 2**level for level in levels)
        self.norms = nn.ModuleDict({str(level): nn.LayerNorm(channels[level]) for level in levels})

    @cached_property
    def divisor(self) -> int:
        """Pixels that the sides of an image must be a multiple of."""
        merged: int = 2 ** (len(stage_channels(self.swin)) - 1)
        return patch_size(self.swin)[0] * merged

    def forward(self, images: Tensor, sizes: Sizes | None = None) -> OrderedDict[str, Tensor]:
        """Images (B, C, H, W) to a map (B, channels, H/stride, W/stride) per level, by the level's number as text.

        Args:
            images: the sides are multiples of `divisor`.
            sizes: (height, width) of each image, if the batch is padded at the bottom and right. An image is then
                computed at its own size, rounded up to `divisor`: no window of padding is ranked or counted, and what
                lies beside it does not change its map. Maps are zero outside.
        """
        if any(side % self.divisor for side in images.shape[2:]):
            got = f"images of {images.shape[2]} x {images.shape[3]} pixels"
            raise ConfigError("backbone", got, f"Pad both sides to a multiple of {self.divisor}.")
        own = [self._rounded(size) for size in sizes or ()]
        if not any(size != tuple(images.shape[2:]) for size in own):
            return self._maps(images)
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for size in dict.fromkeys(own):
            group = torch.tensor([number for number, other in enumerate(own) if other == size], device=images.device)
            for level, part in self._maps(images[group, :, : size[0], : size[1]]).items():
                whole = maps.get(level)
                if whole is None:
                    stride = size[0] // part.shape[2]
                    shape = (len(images), part.shape[1], images.shape[2] // stride, images.shape[3] // stride)
                    whole = part.new_zeros(shape)
                maps[level] = _placed(whole, group, part)
        return maps

    def _maps(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for level, x in enumerate(stage_maps(self.swin, images)):
            if level in self.levels:
                maps[str(level)] = self.norms[str(level)](x).permute(0, 3, 1, 2)
        return maps

    def _rounded(self, size: Size) -> Size:
        height, width = (-(-side // self.divisor) * self.divisor for side in size)
        return height, width


def _placed(whole: Tensor, group: Tensor, part: Tensor) -> Tensor:
    """`whole` (B, C, H, W) with the maps `part` (b, C, h, w) of the images `group` (b,) at the top left."""
    padded = nn.functional.pad(part, (0, whole.shape[3] - part.shape[3], 0, whole.shape[2] - part.shape[2]))
    return whole.index_copy(0, group, padded)


class SwinFPN(nn.Module):
    """A SwinBackbone under torchvision's feature pyramid: `model.backbone` of torchvision's detectors.

    `out_channels` are those of every level. `pool` adds a level of half the size of the last one, as Mask R-CNN has it.
    """

    def __init__(self, body: SwinBackbone, out_channels: int = 256, *, pool: bool = True) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            list(body.channels), out_channels, extra_blocks=LastLevelMaxPool() if pool else None
        )
        self.out_channels = out_channels

    def forward(self, images: Tensor, sizes: Sizes | None = None) -> OrderedDict[str, Tensor]:
        """Images (B, C, H, W) to maps (B, out_channels, H/stride, W/stride) by name; see `SwinBackbone.forward`."""
        maps: OrderedDict[str, Tensor] = self.fpn(self.body(images, sizes))
        return maps


def swin_backbone(
    name: str = "swin_tiny_patch4_window7_224",
    *,
    img_size: int | Size = 224,
    levels: Sequence[int] = LEVELS,
    seed: int = 0,
    **settings: Any,
) -> SwinBackbone:
    """A dense backbone of a timm Swin, V2 or V2-CR by `name`; `sparsify_` makes it sparse.

    Args:
        name: a name of `supported_models`.
        img_size: pixels, one number or (height, width), of the images it is mostly for; it takes all multiples of 32.
        levels: the stages whose maps it gives.
        seed: of the initial weights.
        settings: of the section `model` of a configuration: `pretrained`, `checkpoint`, `embed_dim`, `window_size` ...

    Windows keep their size and are shifted on every map (`always_partition`): timm would drop the shift of a stage
    whose map is no larger than a window, and never bring it back at larger images. Raises ConfigError, CheckpointError.
    """
    section = ModelSection(name=name, img_size=img_size, **{"always_partition": True, **settings})
    return SwinBackbone(build_model(section, 0, seed=seed, any_size=True), levels)


def swin_fpn(
    name: str = "swin_tiny_patch4_window7_224", *, out_channels: int = 256, pool: bool = True, **settings: Any
) -> SwinFPN:
    """`swin_backbone` under a feature pyramid; the other arguments are those of `swin_backbone`."""
    return SwinFPN(swin_backbone(name, **settings), out_channels, pool=pool)
