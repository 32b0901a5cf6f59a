"""A feature pyramid with a light head, for small machines: semantic segmentation at a quarter of the image's size."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit_cli.backbones import SwinBackbone

from .segmenter import Segmenter

_GROUPS = 32


class TopDownSum(nn.Module):
    """Maps of all levels added up at the size of the first one, each brought to `channels` channels.

    The top-down path of a feature pyramid (Lin et al. 2017, section 3), whose outputs but the largest are left out.
    """

    def __init__(self, backbone: SwinBackbone, channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in backbone.channels)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Maps (B, C, H/stride, W/stride) of each level, finest first, to (B, channels, H/4, W/4)."""
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps.values(), strict=True)]
        total: Tensor = levels.pop()
        while levels:
            finer = levels.pop()
            total = finer + F.interpolate(total, size=finer.shape[2:], mode="bilinear", align_corners=False)
        return total


class Pyramid(nn.Module):
    """Backbone and neck: images (B, 3, H, W) to one map (B, channels, H/4, W/4)."""

    def __init__(self, backbone: SwinBackbone, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = TopDownSum(backbone, channels)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        pyramid: Tensor = self.neck(self.backbone(images))
        return pyramid


class FpnSegmenter(Segmenter):
    """A pyramid, two 3x3 convolutions and a classifier of every position."""

    def __init__(self, backbone: SwinBackbone, classes: int, channels: int, overlap: float) -> None:
        super().__init__(overlap)
        self.pyramid = Pyramid(backbone, channels)
        self.head = nn.Sequential(*_convolution(channels), *_convolution(channels), nn.Conv2d(channels, classes, 1))

    @property
    def swin(self) -> SwinBackbone:
        return self.pyramid.backbone

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to scores (B, classes, H/4, W/4)."""
        found: Tensor = self.head(self.pyramid(images))
        return found


def _convolution(channels: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.GroupNorm(math.gcd(_GROUPS, channels), channels),
        nn.ReLU(),
    )
