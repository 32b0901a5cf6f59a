"""The native engine: blocks, patch merging, patch embedding and scores in C++, on a CPU.

The `.hpp` files beside this one hold the C++. This module fills their structures and calls them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsevit_cli.kernels.fallback import LimitedEngine
from sparsevit_cli.kernels.weights import Affine, BlockWeights, EmbeddingWeights, MergingWeights, Norm, Weights
from sparsevit_cli.windows import Importance, Kept

from .compiled import load, version

MAX_HEAD = 32
MIN_PATCH = 32
"""Numbers per patch: as many words in bfloat16 as the longest register has."""
LINE = 64
"""Bytes of a cache line."""

_NONE, _ROWS, _RESULTS = range(3)
"""`NormOf` of projection.hpp."""


class _Norm(ctypes.Structure):
    """`Norm` of layers.hpp."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Affine(ctypes.Structure):
    """`Affine` of layers.hpp."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Block(ctypes.Structure):
    """`Block` of block.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "rows", "bias", "classes", "cosine", "workspace")),
        *((name, ctypes.c_int64) for name in (
            "num_tokens", "num_windows", "area", "channels", "heads", "hidden", "norm_first", "threads")),
        ("scale", ctypes.c_float),
        *((name, _Norm) for name in ("norm1", "norm2")),
        *((name, _Affine) for name in ("qkv", "proj", "fc1", "fc2")),
    )  # fmt: skip


class _Projection(ctypes.Structure):
    """`Projection` of projection.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("results", "workspace")),
        *((name, ctypes.c_int64) for name in ("rows", "depth", "columns", "norm_of", "threads")),
        ("norm", _Norm),
        ("layer", _Affine),
    )  # fmt: skip


class _Merging(ctypes.Structure):
    """`Merging` of projection.hpp."""

    _fields_ = (
        ("tokens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("height", "width", "channels")),
        ("projection", _Projection),
    )


class _Embedding(ctypes.Structure):
    """`Embedding` of projection.hpp."""

    _fields_ = (
        ("images", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("height", "width", "channels", "side")),
        ("projection", _Projection),
    )


class _Scoring(ctypes.Structure):
    """`Scoring` of scoring.hpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "tokens", "unshifted", "shifted", "magnitude", "scores", "ranking", "rows")),
        *((name, ctypes.c_int64) for name in (
            "batch", "num_tokens", "channels", "num_windows", "area", "count", "is_l2", "threads")),
    )  # fmt: skip


def check_structures() -> None:
    """Raise RuntimeError when the structures of the library have other sizes, or there is no library."""
    ours = [ctypes.sizeof(kind) for kind in (_Block, _Projection, _Merging, _Embedding, _Scoring)]
    if (theirs := [*(ctypes.c_int64 * len(ours)).in_dll(load(), "sizes")]) != ours:
        raise RuntimeError(f"the C++ kernels were compiled for other structures ({theirs} bytes, not {ours})")


class NativeEngine(LimitedEngine):
    """C++ on a CPU."""

    name = "native"
    limits = (
        "the C++ kernels are for contiguous blocks in float32 (channels a multiple of 16) or, where the CPU has it, "
        "bfloat16 (of 32), with an even number of at most 32 channels per head and norms with weight and bias"
    )

    def version(self) -> str:
        return version()

    def takes(self, x: Tensor, weights: Weights | None) -> bool:
        if weights is None:
            return _has_address(x) and _are_supported([x], x.shape[-1])
        if isinstance(weights, BlockWeights):
            return _fits(x, weights.qkv.weight, x.shape[1]) and supports(weights)
        if isinstance(weights, MergingWeights):
            return _fits(x, weights.reduction.weight, 4 * x.shape[-1]) and supports_merging(weights)
        side = weights.proj.weight.shape[-1]
        if not _fits(x, weights.proj.weight, x.shape[1]) or x.shape[2] % side or x.shape[3] % side:
            return False
        return supports_embedding(weights)

    def _run_windows_(
        self, tokens: Tensor, rows: Tensor, weights: BlockWeights, bias: Tensor, bias_class: Tensor | None, *,
        padded: bool,
    ) -> None:  # fmt: skip
        assert bias.dtype == tokens.dtype, "the bias is read as numbers of the type of the map"
        rows, bias = rows.contiguous(), bias.contiguous()
        classes = None if bias_class is None else bias_class.contiguous()
        cosine = None if weights.cosine_scale is None else weights.cosine_scale.flatten().float()
        call = _Block(
            tokens=tokens.data_ptr(), rows=rows.data_ptr(), bias=bias.data_ptr(), classes=_address(classes),
            cosine=_address(cosine), num_tokens=len(tokens), num_windows=len(rows), area=rows.shape[1],
            channels=tokens.shape[1], heads=weights.num_heads, hidden=len(weights.fc1.weight),
            norm_first=weights.norm_first, threads=torch.get_num_threads(), scale=weights.scale,
            norm1=_norm(weights.norm1), norm2=_norm(weights.norm2), qkv=_affine(weights.qkv),
            proj=_affine(weights.proj), fc1=_affine(weights.fc1), fc2=_affine(weights.fc2),
        )  # fmt: skip
        _run(load().run_block, call, load().block_workspace, call, tokens.dtype)

    def _merge_patches(self, x: Tensor, weights: MergingWeights) -> Tensor:
        batch, height, width, channels = x.shape
        merged = x.new_empty(batch, (height + 1) // 2, (width + 1) // 2, len(weights.reduction.weight))
        projection = _projection(merged, weights.reduction, weights.norm, _ROWS if weights.norm_first else _RESULTS)
        call = _Merging(tokens=x.data_ptr(), height=height, width=width, channels=channels, projection=projection)
        _run(load().run_merging, call, load().projection_workspace, call.projection, x.dtype)
        return merged

    def _embed_patches(self, x: Tensor, weights: EmbeddingWeights) -> Tensor:
        batch, channels, height, width = x.shape
        columns, _, side, _ = weights.proj.weight.shape
        embedded = x.new_empty(batch, height // side, width // side, columns)
        projection = _projection(embedded, weights.proj, weights.norm, _NONE if weights.norm is None else _RESULTS)
        call = _Embedding(
            images=x.data_ptr(), height=height, width=width, channels=channels, side=side, projection=projection
        )
        _run(load().run_embedding, call, load().projection_workspace, call.projection, x.dtype)
        return embedded

    def _score_and_rank(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance
    ) -> list[Kept]:
        """Of equal scores the first window comes first."""
        batch, height, width, channels = x.shape
        unshifted, shifted = token_indices[0], token_indices[1] if len(token_indices) > 1 else None
        num_windows, area = unshifted.shape
        assert len(token_indices) <= 2, "a stage has unshifted and shifted windows"
        assert shifted is None or shifted.shape == unshifted.shape
        magnitude = x.new_empty(batch, height * width, dtype=torch.float32)
        scores = x.new_empty(len(token_indices), batch, num_windows, dtype=torch.float32)
        ranking = unshifted.new_empty(scores.shape)
        rows = unshifted.new_empty(len(token_indices), batch, count, area)
        call = _Scoring(
            tokens=x.data_ptr(), unshifted=unshifted.data_ptr(), shifted=_address(shifted),
            magnitude=magnitude.data_ptr(), scores=scores.data_ptr(), ranking=ranking.data_ptr(),
            rows=rows.data_ptr(), batch=batch, num_tokens=height * width, channels=channels,
            num_windows=num_windows, area=area, count=count, is_l2=importance == "l2",
            threads=torch.get_num_threads(),
        )  # fmt: skip
        load().run_scoring(ctypes.byref(call), x.dtype == torch.bfloat16)
        return [Kept(*found) for found in zip(ranking[:, :, :count], rows, strict=True)]


def supports(block: BlockWeights) -> bool:
    """True for blocks within `NativeEngine.limits`."""
    channels, hidden = block.qkv.weight.shape[1], len(block.fc1.weight)
    layers = ((block.qkv, 3 * channels, channels), (block.proj, channels, channels), (block.fc1, hidden, channels),
              (block.fc2, channels, hidden))  # fmt: skip
    if channels % block.num_heads or not _have_shapes((block.norm1, block.norm2), channels, *layers):
        return False  # heads may be of another width than a share of the channels
    head = channels // block.num_heads
    return head <= MAX_HEAD and head % 2 == 0 and _are_supported(block.tensors(), channels, hidden)


def supports_merging(weights: MergingWeights) -> bool:
    """True for patch mergings whose channels and types are within `NativeEngine.limits`."""
    columns, inner = weights.reduction.weight.shape
    layer, norm_width = (weights.reduction, columns, inner), inner if weights.norm_first else columns
    return _have_shapes((weights.norm,), norm_width, layer) and _are_supported(weights.tensors(), columns, inner // 4)


def supports_embedding(weights: EmbeddingWeights) -> bool:
    """True for embeddings with channels and types within `NativeEngine.limits`, and `MIN_PATCH` numbers per patch."""
    weight = weights.proj.weight
    depth, columns = weight[0].numel(), len(weight)
    norms = () if weights.norm is None else (weights.norm,)
    if depth < MIN_PATCH or depth % 2 or not _have_shapes(norms, columns, (weights.proj, *weight.shape)):
        return False
    return _are_supported(weights.tensors(), columns)


def _have_shapes(norms: tuple[Norm, ...], width: int, *layers: Any) -> bool:
    """True when all norms have `width` channels, and each layer of `layers` (layer, out, in, ...) has that shape."""
    for norm in norms:
        if norm.weight is None or norm.bias is None or not norm.weight.shape == norm.bias.shape == (width,):
            return False
    for layer, *shape in layers:
        if layer.weight.shape != tuple(shape) or (layer.bias is not None and layer.bias.shape != tuple(shape[:1])):
            return False
    return True


def _are_supported(tensors: list[Tensor] | None, *widths: int) -> bool:
    """True for contiguous CPU tensors of one type that C++ computes, whose `widths` fill its registers."""
    if tensors is None:
        return False
    dtype = tensors[0].dtype
    if not (dtype == torch.float32 or (dtype == torch.bfloat16 and load().has_bfloat())):
        return False
    multiple = 16 if dtype == torch.float32 else 32
    if any(width % multiple for width in widths):
        return False
    return all(tensor.is_contiguous() and tensor.dtype == dtype and tensor.is_cpu for tensor in tensors)


def _has_address(x: Tensor) -> bool:
    """True when C++ can read `x` at its address: a CPU tensor, contiguous, of no subclass."""
    return type(x) is Tensor and x.device.type == "cpu" and x.is_contiguous()


def _fits(x: Tensor, weight: Tensor, inner: int) -> bool:
    """True when C++ can read `x`, and `weight` (out, inner, ...) has its type and width."""
    return _has_address(x) and x.dtype == weight.dtype and weight.shape[1] == inner


def _projection(results: Tensor, layer: Affine, norm: Norm | None, norm_of: int) -> _Projection:
    columns = results.shape[-1]
    return _Projection(
        results=results.data_ptr(), rows=results.numel() // columns, depth=layer.weight.numel() // columns,
        columns=columns, norm_of=norm_of, threads=torch.get_num_threads(), norm=_norm(norm or Norm(None, None, 0.0)),
        layer=_affine(layer),
    )  # fmt: skip


def _run(function: Any, call: Any, workspace_bytes: Any, part: Any, dtype: torch.dtype) -> None:
    """Call the C++ `function` with a workspace as large as `workspace_bytes` says; `part` of the call points to it."""
    is_bfloat = dtype == torch.bfloat16
    workspace = _workspace(workspace_bytes(ctypes.byref(part), is_bfloat))
    part.workspace = workspace.data_ptr()
    function(ctypes.byref(call), is_bfloat)


def _workspace(nbytes: int) -> Tensor:
    """Uninitialised bytes (nbytes,), the first of them at the start of a cache line."""
    space = torch.empty(nbytes + LINE, dtype=torch.uint8, device="cpu")
    return space.narrow(0, -space.data_ptr() % LINE, nbytes)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _norm(norm: Norm) -> _Norm:
    return _Norm(_address(norm.weight), _address(norm.bias), norm.eps)


def _affine(layer: Affine) -> _Affine:
    return _Affine(_address(layer.weight), _address(layer.bias))
