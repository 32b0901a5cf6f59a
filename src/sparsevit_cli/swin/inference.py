"""When a sparse Swin may take the way through `kernels`, and the tensors it takes along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from timm.layers import DropPath, Mlp
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage, WindowAttention
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

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
    """True where nothing is differentiated, recorded, cast or watched: training, tracing, autocast, torch.func,
    operator counters and hooks on every module need timm's own modules.
    """
    if not _with_kernels.get() or stage.training or torch.is_grad_enabled() or device.type == "meta":
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    hooked = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    if hooked or torch.is_autocast_enabled(device.type):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return all(getattr(mode, "sees_kernels", False) for mode in _get_current_dispatch_mode_stack())


def merging_weights(downsample: nn.Module) -> tuple[kernels.Norm, kernels.Affine] | None:
    """Tensors of a patch merging; None where a part is not timm's own, or somebody hooked into it."""
    parts = ((downsample, type(downsample)), (downsample.norm, nn.LayerNorm), (downsample.reduction, nn.Linear))
    return (_norm(downsample.norm), _affine(downsample.reduction)) if _is_plain(*parts) else None  # type: ignore[arg-type]


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
    parts = ((block, type(block)), (attn, WindowAttention), (attn.qkv, nn.Linear), (attn.proj, nn.Linear),
             (attn.softmax, nn.Softmax), (attn.attn_drop, nn.Dropout), (attn.proj_drop, nn.Dropout), (mlp, Mlp),
             (mlp.fc1, nn.Linear), (mlp.fc2, nn.Linear), (mlp.act, nn.GELU), (mlp.norm, nn.Identity),
             (mlp.drop1, nn.Dropout), (mlp.drop2, nn.Dropout), (block.norm1, nn.LayerNorm),
             (block.norm2, nn.LayerNorm))  # fmt: skip
    paths = (
        (path, DropPath if isinstance(path, DropPath) else nn.Identity) for path in (block.drop_path1, block.drop_path2)
    )
    if not _is_plain(*parts, *paths) or mlp.act.approximate != "none":
        return None
    weights = kernels.BlockWeights(
        norm1=_norm(block.norm1), qkv=_affine(attn.qkv), proj=_affine(attn.proj),
        norm2=_norm(block.norm2), fc1=_affine(mlp.fc1), fc2=_affine(mlp.fc2),
        num_heads=attn.num_heads, scale=float(attn.scale),
    )  # fmt: skip
    layers = (weights.norm1, weights.qkv, weights.proj, weights.norm2, weights.fc1, weights.fc2)
    dtypes = {layer.weight.dtype for layer in layers if layer.weight is not None}
    return weights if len(dtypes) == 1 else None


def _is_plain(*parts: tuple[nn.Module, type[nn.Module]]) -> bool:
    """True where every part is of its very class, at rest, with plain tensors, and nobody changed or hooked into it.

    Asked in every forward of every block, so it looks into the modules' own dicts.
    """
    for part, kind in parts:
        if type(part) is not kind or part.training or part._compiled_call_impl is not None:
            return False
        if "forward" in part.__dict__ or any(type(p) not in _PLAIN for p in part._parameters.values()):
            return False
        if (part._forward_hooks or part._forward_pre_hooks) and not _keep_nothing(part):
            return False
    return True


_PLAIN = (Tensor, nn.Parameter, type(None))


def _keep_nothing(module: nn.Module) -> bool:
    """True where all hooks are ours: they look at no map, since maps are changed afterwards."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(getattr(hook, "keeps_nothing", False) for hook in hooks)


def _norm(layer: nn.LayerNorm) -> kernels.Norm:
    return kernels.Norm(layer.weight, layer.bias, layer.eps)


def _affine(layer: nn.Linear) -> kernels.Affine:
    return kernels.Affine(layer.weight, layer.bias)
