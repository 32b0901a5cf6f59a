"""A Swin that detectors and segmenters stand on: a norm per level, maps (B, C, H, W), any multiple of 32 pixels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .config.experiment import ModelSection
from .config.paths import as_path
from .errors import ConfigError
from .models import build_model, tell_partition
from .sizes import Size, size_text
from .swin import sparsify_
from .swin.features import drop_head, stage_maps
from .swin.geometry import patch_size, stage_channels
from .weights import Say, WeightsFile, load_weights, tell_log

LEVELS = (0, 1, 2, 3)
Sizes = Sequence[Size]
"""(height, width) in pixels of every image of a batch, without its padding."""
Maps = OrderedDict[str, Tensor]
"""A map (B, channels, H/stride, W/stride) per level, by the level's name."""


class SwinBackbone(nn.Module):
    """A timm Swin and a LayerNorm for each level that it gives (mmdet, detectron2 and transformers have it).

    `channels` and `strides` (pixels per token) are those of `levels`, the stages whose maps it gives. The last stage is
    among them: else some of the Swin would run for nobody. The Swin's parameters keep timm's names below `swin.`; its
    final norm and its head are gone.
    """

    def __init__(self, swin: nn.Module, levels: Sequence[int] = LEVELS) -> None:
        super().__init__()
        self.swin = drop_head(swin)
        channels = stage_channels(swin)
        stages = range(len(channels))
        if sorted(set(levels) & set(stages)) != list(levels) or not set(stages[-1:]) <= set(levels):
            got = f"{list(levels)}; the model has stages 0 to {stages[-1]}"
            raise ConfigError("levels", got, "Name stages in order, each once, and the last one among them.")
        self.levels = tuple(levels)
        self.channels = tuple(channels[level] for level in levels)
        self.strides = tuple(patch_size(swin)[0] * 2**level for level in levels)
        self.norms = nn.ModuleDict({str(level): nn.LayerNorm(channels[level]) for level in levels})

    @cached_property
    def divisor(self) -> int:
        """Pixels that the sides of an image must be a multiple of."""
        merged: int = 2 ** (len(stage_channels(self.swin)) - 1)
        return patch_size(self.swin)[0] * merged

    def forward(self, images: Tensor, sizes: Sizes | None = None) -> Maps:
        """Images (B, C, H, W) to a map (B, channels, H/stride, W/stride) per level, by the level's number as text.

        Args:
            images: the sides are multiples of `divisor`.
            sizes: (height, width) of each image, if the batch is padded at the bottom and right. An image is then
                computed at its own size, rounded up to `divisor`: no window of the batch's padding is ranked or
                counted, and what lies beside an image does not change its map. Maps are zero outside.

        Raises ConfigError for other sides, or sizes that are not those of these images.
        """
        return self.by_size(images, sizes, self._maps, self.strides)

    def by_size(
        self, images: Tensor, sizes: Sizes | None, maps_of: Callable[[Tensor], Maps], strides: Sequence[int]
    ) -> Maps:
        """`maps_of` the images of each size apart, joined; `strides` are those of its levels. See `forward`."""
        whole = (int(images.shape[2]), int(images.shape[3]))
        if any(side % self.divisor for side in whole):
            got = f"images of {size_text(whole)} pixels"
            raise ConfigError("backbone", got, f"Pad both sides to a multiple of {self.divisor}.")
        if sizes is None:
            return maps_of(images)  # asked first: a trace must not learn how many images there are
        own = [self._rounded(size) for size in sizes]
        if len(own) != len(images) or any(not (0 < y <= whole[0] and 0 < x <= whole[1]) for y, x in own):
            got = f"sizes {list(sizes)} of {len(images)} images of {size_text(whole)} pixels"
            raise ConfigError("backbone", got, "Give the height and width of every image, none above the batch's.")
        groups = {size: [number for number, other in enumerate(own) if other == size] for size in own}
        if set(groups) <= {whole}:
            return maps_of(images)
        parts = [maps_of(images[group, :, : size[0], : size[1]]) for size, group in groups.items()]
        places = torch.tensor([number for group in groups.values() for number in group], device=images.device).argsort()
        maps: Maps = OrderedDict()
        for level, stride in zip(parts[0], strides, strict=True):
            padded = [_padded(part[level], -(-whole[0] // stride), -(-whole[1] // stride)) for part in parts]
            maps[level] = torch.cat(padded).index_select(0, places)
        return maps

    def _maps(self, images: Tensor) -> Maps:
        maps: Maps = OrderedDict()
        for level, x in enumerate(stage_maps(self.swin, images)):
            if level in self.levels:
                maps[str(level)] = self.norms[str(level)](x).permute(0, 3, 1, 2)
        return maps

    def _rounded(self, size: Size) -> Size:
        height, width = (-(-side // self.divisor) * self.divisor for side in size)
        return height, width


def divisor(backbone: nn.Module) -> int:
    """Pixels that the sides of the backbone's images must be a multiple of; 1 if it does not say."""
    return int(getattr(backbone, "divisor", 1))


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """Maps (B, C, h, w) with zeros at the bottom and right: (B, C, height, width)."""
    return nn.functional.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


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
        self.out_channels, self.pool = out_channels, pool
        self.strides = (*body.strides, 2 * body.strides[-1]) if pool else body.strides

    def forward(self, images: Tensor, sizes: Sizes | None = None) -> Maps:
        """Images (B, C, H, W) to maps (B, out_channels, H/stride, W/stride) by name; see `SwinBackbone.forward`."""
        return self.body.by_size(images, sizes, lambda some: self.fpn(self.body(some)), self.strides)


def swin_backbone(
    name: str = "swin_tiny_patch4_window7_224",
    *,
    img_size: int | Size = 224,
    levels: Sequence[int] = LEVELS,
    seed: int = 0,
    **settings: Any,
) -> SwinBackbone:
    """A dense backbone of a timm Swin, V2 or V2-CR by `name`; `sparsify_` makes it sparse.

    With `partition="pad_first"` it is sparsified already, at ratio 0, and a later `sparsify_` keeps that.

    Args:
        name: a name of `supported_models`.
        img_size: pixels, one number or (height, width), of the images it is mostly for; it takes all multiples of 32.
        levels: the stages whose maps it gives.
        seed: of the initial weights.
        settings: of the section `model` of a configuration: `pretrained`, `checkpoint`, `embed_dim`, `window_size` ...

    Windows keep their size and are shifted on every map (see `build_model`). Raises ConfigError, CheckpointError.
    """
    section = ModelSection(name=name, img_size=img_size, **settings)
    backbone = build_backbone(section, levels, seed=seed)
    if section.partition != "roll_first":  # timm has no such setting: it stands in our classes
        sparsify_(backbone, importance=section.importance, partition=section.partition)
    return backbone


def build_backbone(
    section: ModelSection,
    levels: Sequence[int] = LEVELS,
    *,
    img_size: int | Size | None = None,
    seed: int = 0,
    say: Say = tell_log,
    file: WeightsFile | None = None,
) -> SwinBackbone:
    """`build_model` of `section` as a backbone; `section.checkpoint` gives it norms of levels too, if it has any.

    The checkpoint is of any family in `weights.FAMILIES`: a classifier, whose head and final norm are left out, a
    backbone, or the backbone inside a detector. `file` is what the checkpoint holds, if it was read already. `say` is
    told. Raises ConfigError, CheckpointError.
    """
    bare = section.model_copy(update={"checkpoint": None})
    backbone = SwinBackbone(build_model(bare, 0, img_size=img_size, seed=seed, any_size=True, say=say), levels)
    if section.checkpoint is not None:
        path = as_path(section.checkpoint, "model.checkpoint")
        load_weights(backbone, file or path, say=say, partition=section.partition)
        tell_partition(path, section.partition, say)
    return backbone


def swin_fpn(
    name: str = "swin_tiny_patch4_window7_224", *, out_channels: int = 256, pool: bool = True, **settings: Any
) -> SwinFPN:
    """`swin_backbone` under a feature pyramid; the other arguments are those of `swin_backbone`."""
    return SwinFPN(swin_backbone(name, **settings), out_channels, pool=pool)
