"""The code of Triton's kernels: what one program does with a block of rows, or a head of a window.

Pointers first, then sizes, then what is compiled in. Rows are contiguous, in one of three types of floating point;
matrix products, norms and scores are summed up in float32. No kernel reads what it writes: a launch may be repeated.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def project_kernel(
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
def attention_kernel(
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
def mlp_kernel(
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
def norm_add_kernel(
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
def score_kernel(
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
def rank_kernel(
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
