"""When a sparse Swin may take the way through `kernels`, and the tensors it takes along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import Tensor, nn

from sparsevit_cli import kernels, windows

_with_kernels: ContextVar[bool] = ContextVar("with_kernels", default=True)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Every model runs timm's modules inside the block: for those who count or trace operators."""
    token = _with_kernels.set(False)
    try:
        yield
    finally:
        _with_kernels.reset(token)


def is_inference(stage: SwinTransformerStage, device: torch.device) -> bool:
    """True outside of training, tracing and autocast: nothing is differentiated, recorded or cast."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if stage.training or torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        return False
    return _with_kernels.get() and torch._guards.detect_fake_mode() is None


def merging_weights(downsample: nn.Module) -> tuple[kernels.Norm, kernels.Affine] | None:
    """Tensors of a patch merging; None where it is none, not timm's own, or somebody hooked into it."""
    if not isinstance(downsample, PatchMerging) or not _is_plain(
        (downsample.norm, nn.LayerNorm), (downsample.reduction, nn.Linear)
    ):
        return None
    return _norm(downsample.norm), _affine(downsample.reduction)


def block_weights(stage: SwinTransformerStage, x: Tensor) -> list[kernels.BlockWeights] | None:
    """Tensors of all blocks of a stage for its map `x` (B, H, W, C); None where one of them is not plain timm."""
    weights = []
    for block in stage.blocks:
        padded = windows.has_padding(x.shape[1], x.shape[2], block.window_size)
        of_block = _plain_weights(block)
        if of_block is None or (padded and x.device.type != "cpu"):  # leaving padding out waits for the device
            return None
        weights.append(of_block)
    return weights


def _plain_weights(block: SwinTransformerBlock) -> kernels.BlockWeights | None:
    """The tensors of a block; None where a part is not timm's own, or somebody hooked into it."""
    attn, mlp = block.attn, block.mlp
    parts = ((attn, WindowAttention), (attn.qkv, nn.Linear), (attn.proj, nn.Linear), (attn.softmax, nn.Softmax),
             (mlp, Mlp), (mlp.fc1, nn.Linear), (mlp.fc2, nn.Linear), (mlp.act, nn.GELU), (mlp.norm, nn.Identity),
             (block.norm1, nn.LayerNorm), (block.norm2, nn.LayerNorm))  # fmt: skip
    if not _is_plain(*parts) or mlp.act.approximate != "none":
        return None
    dtypes = {parameter.dtype for parameter in block.parameters()}
    if len(dtypes) > 1:
        return None
    return kernels.BlockWeights(
        norm1=_norm(block.norm1), qkv=_affine(attn.qkv), proj=_affine(attn.proj),
        norm2=_norm(block.norm2), fc1=_affine(mlp.fc1), fc2=_affine(mlp.fc2),
        num_heads=attn.num_heads, scale=float(attn.scale),
    )  # fmt: skip


def _is_plain(*parts: tuple[nn.Module, type[nn.Module]]) -> bool:
    """True where every part is of its very class and nobody hooked into it."""
    return not any(type(part) is not kind or part._forward_hooks or part._forward_pre_hooks for part, kind in parts)


def _norm(layer: nn.LayerNorm) -> kernels.Norm:
    return kernels.Norm(layer.weight, layer.bias, layer.eps)


def _affine(layer: nn.Linear) -> kernels.Affine:
    return kernels.Affine(layer.weight, layer.bias)
