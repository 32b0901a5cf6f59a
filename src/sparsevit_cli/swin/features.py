"""The maps that a Swin's stages leave, for necks and heads that read more than the last one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .geometry import trunk
from .timm_swin import STAGES, v2cr


def stage_maps(swin: Any, images: Tensor) -> Iterator[Tensor]:
    """The map (B, H, W, C) of each stage of a timm Swin (`trunk`), for images (B, C, H, W).

    As timm's `forward_intermediates`, with channels last, where their norms want them. No later stage writes into an
    earlier one's map: each begins with a patch merging, which makes a new one.
    """
    x = swin.patch_embed(images)
    # Stages are the Swin's grandchildren; a search through all modules would take longer than some of them.
    for stage in (each for child in swin.children() for each in child.children() if isinstance(each, STAGES)):
        x = stage(x)
        yield x.permute(0, 2, 3, 1) if isinstance(stage, v2cr.SwinTransformerV2CrStage) else x


def drop_head(model: nn.Module) -> nn.Module:
    """Take final norm and head of the Swin inside `model` off, in place, and return the Swin."""
    swin: Any = trunk(model)
    for name in ("norm", "head"):
        if hasattr(swin, name):
            setattr(swin, name, nn.Identity())
    return swin  # type: ignore[no-any-return]
