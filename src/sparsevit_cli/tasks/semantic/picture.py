"""A sample with its mask laid over it, for people."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sparsevit_cli.data.pictures import enlarged

from .labels import IGNORED

_SHARE = 0.5
"""Of the mask's colour in the picture."""
_GOLDEN = 0.618034


def blended(image: Tensor, mask: Tensor, mean: Sequence[float], std: Sequence[float], plain: int | None) -> Image.Image:
    """Normalised image (3, h, w) under mask (H, W), `enlarged`; the class `plain` and IGNORED have no colour."""
    scale = [torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (std, mean)]
    pixels = (image.as_subclass(Tensor) * scale[0] + scale[1]).clamp(0, 1)  # (3, h, w)
    shown = F.interpolate(mask.as_subclass(Tensor)[None, None].float(), image.shape[1:], mode="nearest")[0, 0].long()
    colours = palette()[shown].permute(2, 0, 1)  # (3, h, w)
    coloured = (shown != IGNORED) & (shown != (IGNORED if plain is None else plain))
    pixels = torch.where(coloured, (1 - _SHARE) * pixels + _SHARE * colours, pixels)
    return enlarged(Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy()))


def palette() -> Tensor:
    """A colour of 0 to 1 for every class, (256, 3): neighbours in number are far apart in hue."""
    numbers = range(IGNORED + 1)
    return torch.tensor([colorsys.hsv_to_rgb(n * _GOLDEN % 1, 1 - n % 3 * 0.25, 1 - n % 2 * 0.25) for n in numbers])
