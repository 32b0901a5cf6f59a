"""timm's patch embedding of V1 and V2, which an engine may compute at inference."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn

from sparsevit_cli import kernels

from .inference import stock_embedding
from .timm_swin import STAGES


class SparsePatchEmbed(PatchEmbed):
    """timm's patch embedding. Differs: an engine computes it at inference, unless `as_timm`."""

    kernels: kernels.Kernels = "auto"
    as_timm = True

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to a map (B, H/side, W/side, out)."""
        weights = None if self.as_timm else stock_embedding(self, x)
        if weights is None:
            return super().forward(x)  # type: ignore[no-any-return]
        return kernels.chosen(self.kernels, x.device).embed_patches(x, weights)


def embeddings_of(model: nn.Module) -> list[Any]:
    """The patch embeddings, timm's own or sparse, of the Swins inside `model`."""
    owners = [module for module in model.modules() if type(module._modules.get("patch_embed")) in _CLASSES]
    swins = [module for module in owners if any(isinstance(part, STAGES) for part in module.modules())]
    return [swin.patch_embed for swin in swins]


_CLASSES = (PatchEmbed, SparsePatchEmbed)
