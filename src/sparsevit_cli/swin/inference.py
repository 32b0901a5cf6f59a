"""When a sparse Swin may take the way through `kernels`, and the tensors it takes along."""

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

from .blocks import SPARSE_BLOCKS, SPARSE_MERGINGS, PlainBlock, PlainEmbedding, PlainMerging, PostNormBlock
from .timm_swin import v1, v2, v2cr

_with_kernels: ContextVar[bool] = ContextVar("with_kernels", default=True)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Every model runs timm's modules inside the block: for those who count or trace operators."""
    token = _with_kernels.set(False)
    try:
        yield
    finally:
        _with_kernels.reset(token)


def is_inference(part: nn.Module, device: torch.device) -> bool:
    """True where a part of a model at rest may take the way through `kernels`."""
    return not part.training and is_unwatched(device)


def is_unwatched(device: torch.device) -> bool:
    """True where nothing is differentiated, recorded, cast or watched: tracing, autocast, torch.func, operator counters
    and hooks on every module need timm's own modules.
    """
    if not _with_kernels.get() or torch.is_grad_enabled() or device.type == "meta":
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    hooked = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    if hooked or torch.is_autocast_enabled(device.type):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return all(getattr(mode, "sees_kernels", False) for mode in _get_current_dispatch_mode_stack())


def plain_merging(stage: Any, x: Tensor) -> PlainMerging | None:
    """The patch merging of a stage for its map `x`; None where a part is not timm's own, or somebody hooked into it."""
    merging = stage.downsample
    if type(merging) not in SPARSE_MERGINGS.values():
        return None
    if not _is_plain((merging, type(merging)), (merging.norm, nn.LayerNorm), (merging.reduction, nn.Linear)):
        return None
    norm_first = not isinstance(merging, v2.PatchMerging)
    weights = kernels.MergingWeights(_norm(merging.norm), _affine(merging.reduction), norm_first)
    return PlainMerging(weights, kernels.chosen_merging(stage.kernels, weights, x.device))


def plain_embedding(embed: Any, x: Tensor) -> PlainEmbedding | None:
    """timm's patch embedding for images `x`; None where no engine has its own way, a part is not timm's own, or
    somebody hooked into it.
    """
    conv, norm = embed.proj, embed.norm
    norm_class = nn.LayerNorm if isinstance(norm, nn.LayerNorm) else nn.Identity
    if not is_inference(embed, x.device) or not _is_plain((embed, type(embed)), (conv, nn.Conv2d), (norm, norm_class)):
        return None
    sizes = (tuple(embed.patch_size), conv.kernel_size, conv.stride)
    if len({*sizes, sizes[0][::-1]}) > 1 or (conv.padding, conv.dilation, conv.groups) != ((0, 0), (1, 1), 1):
        return None
    if x.ndim != len(conv.weight.shape) or embed.dynamic_img_pad or embed.flatten or embed.output_fmt != Format.NHWC:
        return None
    if embed.img_size is not None and embed.strict_img_size and tuple(x.shape[2:]) != tuple(embed.img_size):
        return None  # timm says why
    weights = kernels.EmbeddingWeights(
        kernels.Affine(conv.weight, conv.bias), _norm(norm) if isinstance(norm, nn.LayerNorm) else None
    )
    embed_patches = kernels.chosen_embedding(embed.kernels, weights, x.device)
    return None if embed_patches is None else PlainEmbedding(weights, embed_patches)


def plain_blocks(stage: Any, x: Tensor) -> list[PlainBlock] | None:
    """All blocks of a stage for its map `x` (B, H, W, C); None where one of them is not plain timm."""
    found = []
    for block in stage.blocks:
        weights = _plain_weights(block)
        if weights is None:
            return None
        found.append(PlainBlock(weights, kernels.chosen(stage.kernels, weights, x.device)))
    return found


def _plain_weights(block: Any) -> kernels.BlockWeights | None:
    """The tensors of a block; None where a part is not timm's own, or somebody hooked into it."""
    attn, mlp = block.attn, block.mlp
    paths = (
        (path, DropPath if isinstance(path, DropPath) else nn.Identity) for path in (block.drop_path1, block.drop_path2)
    )
    parts = ((block, type(block)), (attn.qkv, nn.Linear), (attn.proj, nn.Linear), (attn.attn_drop, nn.Dropout),
             (attn.proj_drop, nn.Dropout), (mlp, Mlp), (mlp.fc1, nn.Linear), (mlp.fc2, nn.Linear),
             (mlp.act, GELU if type(mlp.act) is GELU else nn.GELU), (mlp.norm, nn.Identity), (mlp.drop1, nn.Dropout),
             (mlp.drop2, nn.Dropout), (block.norm1, nn.LayerNorm), (block.norm2, nn.LayerNorm), *paths,
             *_third_norm(block))  # fmt: skip
    if type(block) not in SPARSE_BLOCKS.values() or not _is_plain(*parts):
        return None
    if getattr(mlp.act, "approximate", "none") != "none":
        return None
    attention = _plain_attention(attn)
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
    """The norm of the whole map that a block of V2-CR may end with: what it returns is changed by the next block."""
    norm = getattr(block, "norm3", None)
    return () if norm is None else ((norm, nn.LayerNorm if isinstance(norm, nn.LayerNorm) else nn.Identity),)


def _plain_attention(attn: Any) -> dict[str, Any] | None:
    """What the generations do not share: the qkv layer, and what multiplies the scores. None where not plain timm."""
    if type(attn) is v1.WindowAttention and _is_plain((attn, v1.WindowAttention), (attn.softmax, nn.Softmax)):
        return {"qkv": _affine(attn.qkv), "scale": float(attn.scale)}
    if type(attn) is v2.WindowAttention and _is_plain((attn, v2.WindowAttention), (attn.softmax, nn.Softmax)):
        if not _is_plain_position_net(attn.cpb_mlp):
            return None
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        return {"qkv": kernels.Affine(attn.qkv.weight, bias), "cosine_scale": _cosine_scale(attn.logit_scale)}
    if type(attn) is v2cr.WindowMultiHeadAttention and _is_plain((attn, v2cr.WindowMultiHeadAttention)):
        if not _is_plain_position_net(attn.meta_mlp):
            return None
        return {"qkv": _affine(attn.qkv), "cosine_scale": _cosine_scale(attn.logit_scale)}
    return None


_POSITION_NETS: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Sequential: (nn.Sequential, nn.Linear, nn.ReLU, nn.Linear),  # cpb_mlp of V2
    Mlp: (Mlp, nn.Linear, nn.ReLU, nn.Dropout, nn.Identity, nn.Linear, nn.Dropout),  # meta_mlp of V2-CR
}


def _is_plain_position_net(net: nn.Module) -> bool:
    """True for timm's own net of the position bias: what it gives depends on its parameters and input alone."""
    parts = tuple(net.modules())
    return tuple(map(type, parts)) == _POSITION_NETS.get(type(net)) and _is_plain(*((p, type(p)) for p in parts))


def _cosine_scale(logit_scale: Tensor) -> Tensor:
    """(h, 1, 1), at most 100, as in timm's attention of V2 and V2-CR."""
    return torch.clamp(logit_scale, max=math.log(1.0 / 0.01)).exp().view(-1, 1, 1)


def _is_plain(*parts: tuple[nn.Module, type[nn.Module]]) -> bool:
    """True where every part is of its very class, at rest, with plain tensors, and nobody changed or hooked into it.

    Asked in every forward of every block, so it looks into the modules' own dicts.
    """
    for part, kind in parts:
        if type(part) is not kind:
            return False
        own = part.__dict__
        if own["training"] or "forward" in own or own.get("_compiled_call_impl") is not None:
            return False
        if own["_parameters"] and not _PLAIN.issuperset(map(type, own["_parameters"].values())):
            return False
        if (own["_forward_hooks"] or own["_forward_pre_hooks"]) and not _keep_nothing(part):
            return False
    return True


_PLAIN = {Tensor, nn.Parameter, type(None)}


def _keep_nothing(module: nn.Module) -> bool:
    """True where all hooks are ours: they look at no map, since maps are changed afterwards."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(getattr(hook, "keeps_nothing", False) for hook in hooks)


def _norm(layer: nn.LayerNorm) -> kernels.Norm:
    return kernels.Norm(layer.weight, layer.bias, layer.eps)


def _affine(layer: nn.Linear) -> kernels.Affine:
    return kernels.Affine(layer.weight, layer.bias)
