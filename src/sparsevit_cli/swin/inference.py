"""When an engine of `kernels` may compute a part of a sparse Swin, and the tensors that it gets.

A *stock* part is timm's own: of timm's very class, in evaluation mode, with nobody's hooks or replaced methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from timm.layers import DropPath, Format, Mlp
from timm.layers.activations import GELU
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sparsevit_cli import kernels

from .blocks import SPARSE_BLOCKS, SPARSE_MERGINGS, PostNormBlock, StockBlock, StockMerging
from .timm_swin import v1, v2, v2cr

_with_kernels: ContextVar[bool] = ContextVar("with_kernels", default=True)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside the block every model runs timm's modules: for those who count or trace operators."""
    token = _with_kernels.set(False)
    try:
        yield
    finally:
        _with_kernels.reset(token)


def is_inference(part: nn.Module, device: torch.device) -> bool:
    """True when `part` is in evaluation mode and nothing watches: then an engine of `kernels` may compute it."""
    return not part.training and is_unwatched(device)


def is_unwatched(device: torch.device) -> bool:
    """True when nothing is differentiated, recorded, cast or watched.

    Tracing, autocast, torch.func, operator counters and hooks on every module need timm's own modules.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False  # asked first: torch.compile of torch 2.11 cannot read a ContextVar
    if not _with_kernels.get() or torch.is_grad_enabled() or device.type == "meta":
        return False
    hooked = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    if hooked or torch.is_autocast_enabled(device.type):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return all(getattr(mode, "sees_kernels", False) for mode in _get_current_dispatch_mode_stack())


def stock_merging(stage: Any, engine: kernels.Engine) -> StockMerging | None:
    """The patch merging of a stage for `engine`; None when a part is not timm's own, or somebody hooked into it."""
    merging = stage.downsample
    if type(merging) not in SPARSE_MERGINGS.values():
        return None
    if not _is_stock((merging, type(merging)), (merging.norm, nn.LayerNorm), (merging.reduction, nn.Linear)):
        return None
    norm_first = not isinstance(merging, v2.PatchMerging)
    return StockMerging(kernels.MergingWeights(_norm(merging.norm), _affine(merging.reduction), norm_first), engine)


def stock_embedding(embed: Any, x: Tensor) -> kernels.EmbeddingWeights | None:
    """The tensors of timm's patch embedding for images `x` (B, C, H, W).

    None when timm must embed them itself: a part is not timm's own, somebody hooked into it, or the images do not fit.
    """
    conv, norm = embed.proj, embed.norm
    norm_class = nn.LayerNorm if isinstance(norm, nn.LayerNorm) else nn.Identity
    if not is_inference(embed, x.device) or not _is_stock((embed, type(embed)), (conv, nn.Conv2d), (norm, norm_class)):
        return None
    sizes = (tuple(embed.patch_size), conv.kernel_size, conv.stride)
    if len({*sizes, sizes[0][::-1]}) > 1 or (conv.padding, conv.dilation, conv.groups) != ((0, 0), (1, 1), 1):
        return None
    if x.ndim != len(conv.weight.shape) or embed.dynamic_img_pad or embed.flatten or embed.output_fmt != Format.NHWC:
        return None
    strict = embed.img_size is not None and embed.strict_img_size
    if any(side % sizes[0][0] for side in x.shape[2:]) or (strict and tuple(x.shape[2:]) != tuple(embed.img_size)):
        return None  # timm says why
    return kernels.EmbeddingWeights(_affine(conv), _norm(norm) if isinstance(norm, nn.LayerNorm) else None)


def stock_blocks(stage: Any, engine: kernels.Engine) -> list[StockBlock] | None:
    """All blocks of a stage for `engine`; None when one of them is not timm's own, or somebody hooked into it."""
    found = []
    for block in stage.blocks:
        weights = _stock_weights(block)
        if weights is None:
            return None
        found.append(StockBlock(weights, engine))
    return found


def _stock_weights(block: Any) -> kernels.BlockWeights | None:
    """The tensors of a block; None when a part is not timm's own, or somebody hooked into it."""
    attn, mlp = block.attn, block.mlp
    paths = (
        (path, DropPath if isinstance(path, DropPath) else nn.Identity) for path in (block.drop_path1, block.drop_path2)
    )
    parts = ((block, type(block)), (attn.qkv, nn.Linear), (attn.proj, nn.Linear), (attn.attn_drop, nn.Dropout),
             (attn.proj_drop, nn.Dropout), (mlp, Mlp), (mlp.fc1, nn.Linear), (mlp.fc2, nn.Linear),
             (mlp.act, GELU if type(mlp.act) is GELU else nn.GELU), (mlp.norm, nn.Identity), (mlp.drop1, nn.Dropout),
             (mlp.drop2, nn.Dropout), (block.norm1, nn.LayerNorm), (block.norm2, nn.LayerNorm), *paths,
             *_third_norm(block))  # fmt: skip
    if type(block) not in SPARSE_BLOCKS.values() or not _is_stock(*parts):
        return None
    if getattr(mlp.act, "approximate", "none") != "none":
        return None
    attention = _stock_attention(attn)
    if attention is None:
        return None
    weights = kernels.BlockWeights(
        norm1=_norm(block.norm1), norm2=_norm(block.norm2), norm_first=not isinstance(block, PostNormBlock),
        **attention, proj=_affine(attn.proj), fc1=_affine(mlp.fc1), fc2=_affine(mlp.fc2), num_heads=attn.num_heads,
    )  # fmt: skip
    layers = (weights.norm1, weights.qkv, weights.proj, weights.norm2, weights.fc1, weights.fc2)
    dtypes = {layer.weight.dtype for layer in layers if layer.weight is not None}
    return weights if len(dtypes) == 1 else None


def _third_norm(block: Any) -> tuple[tuple[nn.Module, type[nn.Module]], ...]:
    """The norm of the whole map that a block of V2-CR may end with; the next block changes its output in place."""
    norm = getattr(block, "norm3", None)
    return () if norm is None else ((norm, nn.LayerNorm if isinstance(norm, nn.LayerNorm) else nn.Identity),)


def _stock_attention(attn: Any) -> dict[str, Any] | None:
    """The fields of `BlockWeights` that differ by generation: the qkv layer, and `scale` or `cosine_scale`.

    None when the attention is not timm's own.
    """
    if type(attn) is v1.WindowAttention and _is_stock((attn, v1.WindowAttention), (attn.softmax, nn.Softmax)):
        return {"qkv": _affine(attn.qkv), "scale": float(attn.scale)}
    if type(attn) is v2.WindowAttention and _is_stock((attn, v2.WindowAttention), (attn.softmax, nn.Softmax)):
        if not _is_stock_position_net(attn.cpb_mlp):
            return None
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        return {"qkv": kernels.Affine(attn.qkv.weight, bias), "cosine_scale": _cosine_scale(attn.logit_scale)}
    if type(attn) is v2cr.WindowMultiHeadAttention and _is_stock((attn, v2cr.WindowMultiHeadAttention)):
        if not _is_stock_position_net(attn.meta_mlp):
            return None
        return {"qkv": _affine(attn.qkv), "cosine_scale": _cosine_scale(attn.logit_scale)}
    return None


_POSITION_NETS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Sequential: (nn.Sequential, nn.Linear, nn.ReLU, nn.Linear),  # cpb_mlp of V2
    Mlp: (Mlp, nn.Linear, nn.ReLU, nn.Dropout, nn.Identity, nn.Linear, nn.Dropout),  # meta_mlp of V2-CR
}


def _is_stock_position_net(net: nn.Module) -> bool:
    """True for timm's own net of the position bias: its output depends on its parameters and its input alone."""
    parts = tuple(net.modules())
    return tuple(map(type, parts)) == _POSITION_NETS.get(type(net)) and _is_stock(*((p, type(p)) for p in parts))


def _cosine_scale(logit_scale: Tensor) -> Tensor:
    """(h, 1, 1), at most 100, as in timm's attention of V2 and V2-CR."""
    return torch.clamp(logit_scale, max=math.log(1.0 / 0.01)).exp().view(-1, 1, 1)


def _is_stock(*parts: tuple[nn.Module, type[nn.Module]]) -> bool:
    """True when each (part, class) is of that very class, in evaluation mode, with torch's own tensors, and unchanged.

    Changed is a part with hooks, a replaced `forward`, or a compiled call. This is asked in every forward of every
    block, so it looks into the modules' own dicts.
    """
    for part, kind in parts:
        if type(part) is not kind:
            return False
        own = part.__dict__
        if own["training"] or "forward" in own or own.get("_compiled_call_impl") is not None:
            return False
        if own["_parameters"] and not _TENSORS.issuperset(map(type, own["_parameters"].values())):
            return False
        if (own["_forward_hooks"] or own["_forward_pre_hooks"]) and not _keep_nothing(part):
            return False
    return True


_TENSORS = {Tensor, nn.Parameter, type(None)}


def _keep_nothing(module: nn.Module) -> bool:
    """True when all hooks are ours, which keep no map: an engine changes maps afterwards."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(getattr(hook, "keeps_nothing", False) for hook in hooks)


def _norm(layer: nn.LayerNorm) -> kernels.Norm:
    return kernels.Norm(layer.weight, layer.bias, layer.eps)


def _affine(layer: nn.Linear | nn.Conv2d) -> kernels.Affine:
    return kernels.Affine(layer.weight, layer.bias)
