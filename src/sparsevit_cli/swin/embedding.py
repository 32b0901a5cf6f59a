"""timm's patch embedding of V1 and V2, which may take the faster way at inference."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn

from sparsevit_cli import kernels

from .inference import plain_embedding
from .timm_swin import STAGES


class SparsePatchEmbed(PatchEmbed):
    """timm's, to the bit where `as_timm`."""

    kernels: kernels.Kernels = "auto"
    as_timm = True

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to a map (B, H/side, W/side, out)."""
        plain = None if self.as_timm else plain_embedding(self, x)
        embedded = None if plain is None else plain.embed_patches(x, plain.weights)
        return super().forward(x) if embedded is None else embedded


def embeddings_of(model: nn.Module) -> list[Any]:
    """The patch embeddings, timm's own or sparse, of the Swins inside `model`."""
    owners = [module for module in model.modules() if type(module._modules.get("patch_embed")) in _CLASSES]
    swins = [module for module in owners if any(isinstance(part, STAGES) for part in module.modules())]
    return [swin.patch_embed for swin in swins]


_CLASSES = (PatchEmbed, SparsePatchEmbed)
