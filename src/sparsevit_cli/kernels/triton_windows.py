"""Triton kernels for a Swin block on some of its windows, and for scoring and ranking them.

A block that normalises first (V1) takes four launches, five where a fused MLP would not fit: gather, norm and qkv;
window attention; projection and residual; norm, MLP, residual and scatter. One that normalises after (V2, V2-CR) takes
seven: gather and qkv; window attention of cosines; projection; norm and residual; the MLP in two; norm, residual and
scatter. Matrix products accumulate in float32. Imported only where Triton is there; with TRITON_INTERPRET=1 set
beforehand, everything runs on a CPU, slowly.

Shapes: R = M*N rows of M kept windows of N tokens, C channels, h heads of D, T rows of all maps; a row T is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsevit_cli import windows

from .linear import Affine
from .windowed import BlockWeights, Norm

LIMITS = "Triton's kernels are for contiguous blocks in float32, float16 or bfloat16"
MAX_FUSED_BYTES = 512
"""Widest rows of a map that one program holds whole, with tiles of both weights, in 99 KB of shared memory: 256
channels of 16 bits, 128 of 32 bits.
"""


def run_windows_(
    tokens: Tensor, rows: Tensor, block: BlockWeights, bias: Tensor, bias_class: Tensor | None, *, padded: bool
) -> None:
    """As `windowed.run_windows_`, for blocks that `supports` says yes to."""
    flat, area = rows.reshape(-1), rows.shape[1]
    with _on_device_of(tokens):
        qkv = _project(tokens, block.qkv, rows=flat, norm=block.norm1 if block.norm_first else None)
        attended = _attend(qkv, block, bias, bias_class, area)
        if not block.norm_first:
            kept = _norm_add(_project(attended, block.proj), block.norm1, tokens, residual_rows=flat)
            hidden = _project(kept, block.fc1, gelu=True)
            _norm_add(_project(hidden, block.fc2), block.norm2, kept, out=tokens, out_rows=flat)
            return
        kept = _project(attended, block.proj, residual=tokens, residual_rows=flat)
        if _power(tokens.shape[1]) * tokens.element_size() <= MAX_FUSED_BYTES:
            _mlp_(tokens, flat, kept, block)
        else:
            hidden = _project(kept, block.fc1, norm=block.norm2, gelu=True)
            _project(hidden, block.fc2, residual=kept, out=tokens, out_rows=flat)


def supports(block: BlockWeights) -> bool:
    """True for contiguous weights of types that Triton multiplies, and norms with weight and bias."""
    tensors = block.tensors()
    if tensors is None:
        return False
    return all(tensor.is_contiguous() and tensor.dtype in _DTYPES for tensor in tensors)


def version() -> str:
    """Of Triton: what is compiled depends on it."""
    return str(triton.__version__)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def score_and_rank(
    x: Tensor, token_indices: Sequence[Tensor], count: int, importance: windows.Importance
) -> list[tuple[Tensor, Tensor]]:
    """As `windows.score_and_rank`, in two launches; of equal scores the first window comes first."""
    batch, height, width, channels = x.shape
    plain, shifted = token_indices[0], token_indices[-1]
    assert len(token_indices) <= 2, "a stage has windows and shifted windows"
    assert plain.shape == shifted.shape
    num_windows, area = plain.shape
    every = batch * len(token_indices)
    x, device = x.contiguous(), x.device
    scores = torch.empty(every, num_windows, device=device, dtype=torch.float32)
    block_n, block_c = _power(area, 64), _power(channels, 128)
    keep = torch.empty(len(token_indices), batch, count, device=device, dtype=torch.int64)
    rows = torch.empty(len(token_indices), batch, count, area, device=device, dtype=torch.int64)
    block_w = 16
    with _on_device_of(x):
        _score_kernel[(num_windows, every)](
            x, plain, shifted, scores, batch, height * width, num_windows, channels, area,
            L2=importance == "l2", BLOCK_N=block_n, BLOCK_C=block_c,
        )  # fmt: skip
        _rank_kernel[(triton.cdiv(num_windows, block_w), every)](
            scores, plain, shifted, keep, rows, batch, num_windows, count, height * width, batch * height * width,
            area, BLOCK_W=block_w, BLOCK_J=128, BLOCK_N=block_n,
        )  # fmt: skip
    return list(zip(keep, rows, strict=True))


# -- launches ---------------------------------------------------------------------------------------------------


def _project(
    x: Tensor,
    layer: Affine,
    *,
    rows: Tensor | None = None,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    residual_rows: Tensor | None = None,
    out: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> Tensor:
    """A linear layer on (gathered, normalised) rows of `x`, then GELU, (gathered) residual and (scattered) store."""
    count = len(x) if rows is None else len(rows)
    weight, bias = layer
    out_features, in_features = weight.shape
    result = x.new_empty(count, out_features) if out is None else out
    block_r, block_o, block_i = 64, _power(out_features, 64), _power(in_features, 32)
    _project_kernel[(triton.cdiv(count, block_r), triton.cdiv(out_features, block_o))](
        x, _or(rows, x), _or(norm and norm.weight, x), _or(norm and norm.bias, x), weight, _or(bias, x),
        _or(residual, x), _or(residual_rows, x), result, _or(out_rows, x),
        count, len(x), 0 if residual is None else len(residual), len(result), in_features, out_features,
        norm.eps if norm else 0.0,
        GATHER=rows is not None, NORM=norm is not None, BIAS=bias is not None, GELU=gelu,
        RESIDUAL=residual is not None, GATHER_RESIDUAL=residual_rows is not None, SCATTER=out_rows is not None,
        PRECISION=_precision(x), BLOCK_R=block_r, BLOCK_O=block_o, BLOCK_I=block_i,
    )  # fmt: skip
    return result


def _attend(qkv: Tensor, block: BlockWeights, bias: Tensor, bias_class: Tensor | None, area: int) -> Tensor:
    """(R, 3C) to (R, C); `bias` (classes, h, N, N), `bias_class` (M,) or None for the first of all."""
    count, channels = len(qkv) // area, qkv.shape[1] // 3
    head_dim = channels // block.num_heads
    out = qkv.new_empty(len(qkv), channels)
    block_q = _power(area, 64)
    _attention_kernel[(count, block.num_heads, triton.cdiv(area, block_q))](
        qkv, bias.contiguous(), _or(bias_class, qkv), _or(block.cosine_scale, qkv), out, block.scale, area,
        block.num_heads, head_dim, HAS_CLASS=bias_class is not None, COSINE=block.cosine_scale is not None,
        PRECISION=_precision(qkv), BLOCK_Q=block_q, BLOCK_K=block_q, BLOCK_D=_power(head_dim),
    )  # fmt: skip
    return out


def _norm_add(
    x: Tensor,
    norm: Norm,
    residual: Tensor,
    *,
    residual_rows: Tensor | None = None,
    out: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> Tensor:
    """Rows of `x` (R, C) normalised, plus (gathered) residual, with a (scattered) store."""
    count, channels = x.shape
    result = torch.empty_like(x) if out is None else out
    block_c = _power(channels)
    block_r = max(1, 4096 // block_c)
    _norm_add_kernel[(triton.cdiv(count, block_r),)](
        x, norm.weight, norm.bias, residual, _or(residual_rows, x), result, _or(out_rows, x),
        count, len(residual), len(result), channels, norm.eps,
        GATHER_RESIDUAL=residual_rows is not None, SCATTER=out_rows is not None, BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    return result


def _mlp_(tokens: Tensor, rows: Tensor, kept: Tensor, block: BlockWeights) -> None:
    """kept (R, C) through norm2, MLP and residual, into `tokens` at `rows`."""
    count, channels = kept.shape
    hidden = block.fc1.weight.shape[0]
    block_c = _power(channels)
    block_r = 64 if block_c * kept.element_size() <= MAX_FUSED_BYTES // 2 else 32
    _mlp_kernel[(triton.cdiv(count, block_r),)](
        kept, rows, block.norm2.weight, block.norm2.bias, block.fc1.weight, _or(block.fc1.bias, kept),
        block.fc2.weight, _or(block.fc2.bias, kept), tokens, count, len(tokens), channels, hidden, block.norm2.eps,
        BIAS1=block.fc1.bias is not None, BIAS2=block.fc2.bias is not None, PRECISION=_precision(kept),
        BLOCK_R=block_r, BLOCK_C=block_c, BLOCK_H=32, num_warps=8 if block_c > 128 else 4, num_stages=2,
    )  # fmt: skip


def _power(size: int, most: int | None = None) -> int:
    """The power of two that holds `size`, at least 16 (what a matrix product takes), at most `most`."""
    power: int = max(16, triton.next_power_of_2(size))
    return power if most is None else min(power, most)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is needed where nothing is read, too."""
    return other if tensor is None else tensor


def _precision(x: Tensor) -> str:
    """As torch multiplies float32: exactly, unless TF32 was allowed."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# -- kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _place_of(r, rows, count, num_rows, INDEXED: tl.constexpr):
    """Row that each of `r` stands for, and whether there is one: padding, and what is past `count`, has none."""
    place = r
    is_row = r < count
    if INDEXED:
        place = tl.load(rows + r, mask=is_row, other=num_rows)
        is_row = place < num_rows
    return place, is_row


@triton.jit
def _normalised(value, inside, norm_weight, norm_bias, c, channels, eps):
    """LayerNorm of whole rows `value` (rows, channels) in float32; zero outside."""
    is_channel = c < channels
    mean = tl.sum(value, 1) / channels
    centred = tl.where(inside, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    gain = tl.load(norm_weight + c, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + c, mask=is_channel, other=0.0).to(tl.float32)
    return centred * rstd[:, None] * gain[None, :] + shift[None, :]


@triton.jit
def _unit(rows):
    """Rows divided by their L2 norms, as torch.nn.functional.normalize."""
    rows = rows.to(tl.float32)
    return rows / tl.maximum(tl.sqrt(tl.sum(rows * rows, 1)), 1e-12)[:, None]


@triton.jit
def _project_kernel(
    x, rows, norm_weight, norm_bias, weight, bias, residual, residual_rows, out, out_rows,
    count, num_tokens, num_residual, num_out, in_features, out_features, eps,
    GATHER: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
    GATHER_RESIDUAL: tl.constexpr, SCATTER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    source, is_token = _place_of(r, rows, count, num_tokens, GATHER)  # padding enters as zeros, after the norm
    place = x + source[:, None] * in_features + i[None, :]
    mean = tl.zeros((BLOCK_R,), tl.float32)
    rstd = tl.zeros((BLOCK_R,), tl.float32)
    if NORM:
        for first in range(0, in_features, BLOCK_I):
            inside = is_token[:, None] & (first + i < in_features)[None, :]
            mean += tl.sum(tl.load(place + first, mask=inside, other=0.0).to(tl.float32), 1)
        mean = mean / in_features
        for first in range(0, in_features, BLOCK_I):
            inside = is_token[:, None] & (first + i < in_features)[None, :]
            value = tl.load(place + first, mask=inside, other=0.0).to(tl.float32)
            centred = tl.where(inside, value - mean[:, None], 0.0)
            rstd += tl.sum(centred * centred, 1)
        rstd = 1.0 / tl.sqrt(rstd / in_features + eps)
    total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for first in range(0, in_features, BLOCK_I):
        is_in = first + i < in_features
        inside = is_token[:, None] & is_in[None, :]
        value = tl.load(place + first, mask=inside, other=0.0)
        if NORM:
            gain = tl.load(norm_weight + first + i, mask=is_in, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias + first + i, mask=is_in, other=0.0).to(tl.float32)
            normed = (value.to(tl.float32) - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
            value = tl.where(inside, normed, 0.0).to(value.dtype)
        columns = weight + o[None, :] * in_features + (first + i)[:, None]
        factor = tl.load(columns, mask=is_in[:, None] & (o < out_features)[None, :], other=0.0)
        total = tl.dot(value, factor, total, input_precision=PRECISION)
    is_out = o < out_features
    if BIAS:
        total += tl.load(bias + o, mask=is_out, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = _gelu(total)
    if RESIDUAL:
        beside, is_beside = _place_of(r, residual_rows, count, num_residual, GATHER_RESIDUAL)
        place = residual + beside[:, None] * out_features + o[None, :]
        total += tl.load(place, mask=is_beside[:, None] & is_out[None, :], other=0.0).to(tl.float32)
    target, is_target = _place_of(r, out_rows, count, num_out, SCATTER)
    place = out + target[:, None] * out_features + o[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_target[:, None] & is_out[None, :])


@triton.jit
def _attention_kernel(
    qkv, bias, bias_class, cosine_scale, out, scale, area, num_heads, head_dim,
    HAS_CLASS: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channels = num_heads * head_dim
    i = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    is_query, is_dim = i < area, d < head_dim
    start = qkv + window * area * 3 * channels + head * head_dim
    q = tl.load(start + i[:, None] * 3 * channels + d[None, :], mask=is_query[:, None] & is_dim[None, :], other=0.0)
    if COSINE:
        scale = scale * tl.load(cosine_scale + head).to(tl.float32)
        q = _unit(q).to(qkv.dtype.element_ty)
    table = bias + head * area * area
    if HAS_CLASS:
        table += tl.load(bias_class + window) * num_heads * area * area
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    weights = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first in range(0, area, BLOCK_K):  # one step where a window has at most 64 tokens
        j = first + tl.arange(0, BLOCK_K)
        is_key = j < area
        place = start + j[:, None] * 3 * channels + d[None, :]
        inside = is_key[:, None] & is_dim[None, :]
        k = tl.load(place + channels, mask=inside, other=0.0)
        v = tl.load(place + 2 * channels, mask=inside, other=0.0)
        if COSINE:
            k = _unit(k).to(qkv.dtype.element_ty)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        both = is_query[:, None] & is_key[None, :]
        scores += tl.load(table + i[:, None] * area + j[None, :], mask=both, other=0.0).to(tl.float32)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        top = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - top)
        share = tl.exp(scores - top[:, None])
        weights = weights * shrink + tl.sum(share, 1)
        total = tl.dot(share.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        largest = top
    place = out + (window * area + i)[:, None] * channels + head * head_dim + d[None, :]
    value = total / weights[:, None]
    tl.store(place, value.to(out.dtype.element_ty), mask=is_query[:, None] & is_dim[None, :])


@triton.jit
def _mlp_kernel(
    kept, rows, norm_weight, norm_bias, weight1, bias1, weight2, bias2, tokens,
    count, num_tokens, channels, hidden, eps,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    is_channel = c < channels
    target, is_token = _place_of(r, rows, count, num_tokens, True)
    inside = is_token[:, None] & is_channel[None, :]
    entered = tl.load(kept + r[:, None] * channels + c[None, :], mask=inside, other=0.0)
    value = entered.to(tl.float32)
    normed = _normalised(value, inside, norm_weight, norm_bias, c, channels, eps).to(entered.dtype)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, hidden, BLOCK_H):  # the hidden map is never stored
        h = first + tl.arange(0, BLOCK_H)
        is_hidden = h < hidden
        both = is_channel[:, None] & is_hidden[None, :]
        factor = tl.load(weight1 + h[None, :] * channels + c[:, None], mask=both, other=0.0)
        middle = tl.dot(normed, factor, input_precision=PRECISION)
        if BIAS1:
            middle += tl.load(bias1 + h, mask=is_hidden, other=0.0).to(tl.float32)[None, :]
        middle = _gelu(middle).to(entered.dtype)
        both = is_hidden[:, None] & is_channel[None, :]
        factor = tl.load(weight2 + c[None, :] * hidden + h[:, None], mask=both, other=0.0)
        total = tl.dot(middle, factor, total, input_precision=PRECISION)
    if BIAS2:
        total += tl.load(bias2 + c, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    total += value
    tl.store(tokens + target[:, None] * channels + c[None, :], total.to(tokens.dtype.element_ty), mask=inside)


@triton.jit
def _norm_add_kernel(
    x, norm_weight, norm_bias, residual, residual_rows, out, out_rows,
    count, num_residual, num_out, channels, eps,
    GATHER_RESIDUAL: tl.constexpr, SCATTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = (r < count)[:, None] & (c < channels)[None, :]
    value = tl.load(x + r[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    total = _normalised(value, inside, norm_weight, norm_bias, c, channels, eps)
    beside, is_beside = _place_of(r, residual_rows, count, num_residual, GATHER_RESIDUAL)
    place = residual + beside[:, None] * channels + c[None, :]
    total += tl.load(place, mask=inside & is_beside[:, None], other=0.0).to(tl.float32)
    target, is_target = _place_of(r, out_rows, count, num_out, SCATTER)
    place = out + target[:, None] * channels + c[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside & is_target[:, None])


@triton.jit
def _rows_of(place, plain, shifted, partition, mask, other):
    """Token indices at `place` of one of the two partitions."""
    if partition == 0:
        row = tl.load(plain + place, mask=mask, other=other)
    else:
        row = tl.load(shifted + place, mask=mask, other=other)
    return row


@triton.jit
def _score_kernel(
    x, plain, shifted, scores, batch, num_tokens, num_windows, channels, area,
    L2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    window, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    partition, image = number // batch, number % batch
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, area, BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        row = _rows_of(window * area + t, plain, shifted, partition, t < area, num_tokens)
        is_token = row < num_tokens
        place = x + (image * num_tokens + row)[:, None] * channels
        magnitude = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            inside = is_token[:, None] & (c < channels)[None, :]
            value = tl.load(place + c[None, :], mask=inside, other=0.0).to(tl.float32)
            magnitude += tl.sum(value * value if L2 else tl.abs(value), 1)
        if L2:
            squares += magnitude
        else:
            magnitude = magnitude / channels
            squares += magnitude * magnitude
    tl.store(scores + number * num_windows + window, tl.sqrt(tl.sum(squares, 0)))


@triton.jit
def _rank_kernel(
    scores, plain, shifted, keep, rows, batch, num_windows, num_keep, num_tokens, all_tokens, area,
    BLOCK_W: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(1).to(tl.int64)
    partition, image = number // batch, number % batch
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    mine = tl.load(scores + number * num_windows + w, mask=w < num_windows, other=float("-inf"))
    mine = tl.where(mine == mine, mine, float("inf"))  # as torch.topk, which takes NaN for the largest
    rank = tl.zeros((BLOCK_W,), tl.int32)
    for first in range(0, num_windows, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(scores + number * num_windows + j, mask=j < num_windows, other=float("-inf"))
        other = tl.where(other == other, other, float("inf"))
        ahead = (other[None, :] > mine[:, None]) | ((other[None, :] == mine[:, None]) & (j[None, :] < w[:, None]))
        rank += tl.sum((ahead & (j < num_windows)[None, :]).to(tl.int32), 1)
    is_kept = (w < num_windows) & (rank < num_keep)
    place = number * num_keep + rank
    tl.store(keep + place, w.to(tl.int64), mask=is_kept)
    for first in range(0, area, BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        inside = is_kept[:, None] & (t < area)[None, :]
        row = _rows_of(w[:, None] * area + t[None, :], plain, shifted, partition, inside, 0)
        row = tl.where(row == num_tokens, all_tokens, row + image * num_tokens)
        tl.store(rows + place[:, None] * area + t[None, :], row, mask=inside)
