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
        embedded = None if plain is None else plain[1](x, plain[0])
        return super().forward(x) if embedded is None else embedded


def embeddings_of(model: nn.Module) -> list[Any]:
    """The patch embeddings, timm's own or sparse, of the Swins inside `model`."""
    swins = (module for module in model.modules() if any(isinstance(part, STAGES) for part in module.modules()))
    embeddings = {id(embed): embed for swin in swins if (embed := getattr(swin, "patch_embed", None)) is not None}
    return [embed for embed in embeddings.values() if type(embed) in (PatchEmbed, SparsePatchEmbed)]
