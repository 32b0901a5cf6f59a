"""timm's fused attention, which V1 alone has: whether a model has it, and copies with and without it."""

from __future__ import annotations

import copy

from torch import nn

from .timm_swin import v1


def has_fused_attention(model: nn.Module) -> bool:
    """True where timm's attention has a fused form: in V1."""
    return any(isinstance(module, v1.WindowAttention) for module in model.modules())


def with_fused_attention(model: nn.Module, fused: bool) -> nn.Module:
    """A copy of a timm Swin as TIMM_FUSED_ATTN=2 (or 0) would have built it."""
    clone = copy.deepcopy(model).eval()
    for module in clone.modules():
        if isinstance(module, v1.WindowAttention):
            module.fused_attn = fused
    return clone
