"""The code of Triton's kernels: what one program does with a block of rows, or a head of a window.

Pointers first, then sizes, then what is compiled in; `size_class` is what tuned settings are chosen by. Rows are
contiguous, in one of three types of floating point; matrix products, norms and scores are summed up in float32. No
kernel reads what it writes: a launch may be repeated.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def count_kernel(rows, counts, num_slots, num_tokens, BLOCK: tl.constexpr):
    """Counts the tokens among every BLOCK slots: rows that are none of padding."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + slot, mask=slot < num_slots, other=num_tokens)
    tl.store(counts + tl.program_id(0), tl.sum((row < num_tokens).to(tl.int32), 0))


@triton.jit
def compact_kernel(
    rows, counts, true_rows, true_count, places, num_slots, num_tokens, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Moves the rows of tokens to the front, in order; `places` says where each slot went, -1 for padding."""
    program = tl.program_id(0)
    before = tl.zeros((BLOCK_P,), tl.int32)
    for first in range(0, program, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        before += tl.load(counts + p, mask=p < program, other=0)
    start = tl.sum(before, 0)
    slot = program * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + slot, mask=slot < num_slots, other=num_tokens)
    is_token = row < num_tokens
    place = start + tl.cumsum(is_token.to(tl.int32), 0) - 1
    tl.store(true_rows + place, row, mask=is_token)
    tl.store(places + slot, tl.where(is_token, place, -1), mask=slot < num_slots)
    if program == tl.num_programs(0) - 1:
        tl.store(true_count, start + tl.sum(is_token.to(tl.int32), 0))


@triton.jit
def _indexed(r, rows, is_row, INDEXED: tl.constexpr):
    """The row that each of `r` stands for."""
    place = r
    if INDEXED:
        place = tl.load(rows + r, mask=is_row, other=0)
    return place


@triton.jit
def _moments(value, inside, channels, eps):
    """Mean and 1 / deviation of whole rows `value` (rows, channels) in float32; zero outside."""
    mean = tl.sum(value, 1) / channels
    centred = tl.where(inside, value - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)


@triton.jit
def _normalised(value, inside, mean, rstd, norm_weight, norm_bias, c, channels):
    """LayerNorm of `value` (rows, some channels c) in float32; zero outside."""
    is_channel = c < channels
    gain = tl.load(norm_weight + c, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + c, mask=is_channel, other=0.0).to(tl.float32)
    normed = (value - mean[:, None]) * rstd[:, None] * gain[None, :] + shift[None, :]
    return tl.where(inside, normed, 0.0)


@triton.jit
def _unit(rows):
    """Rows divided by their L2 norms, as torch.nn.functional.normalize."""
    rows = rows.to(tl.float32)
    return rows / tl.maximum(tl.sqrt(tl.sum(rows * rows, 1)), 1e-12)[:, None]


@triton.jit
def statistics_kernel(
    x, rows, statistics, true_count, count, channels, eps,
    PADDED: tl.constexpr, GATHER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if PADDED:
        count = tl.load(true_count)
        if tl.program_id(0) * BLOCK_R >= count:
            return
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = (r < count)[:, None] & (c < channels)[None, :]
    source = _indexed(r, rows, r < count, GATHER)
    value = tl.load(x + source[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean, rstd = _moments(value, inside, channels, eps)
    tl.store(statistics + 2 * r, mean, mask=r < count)
    tl.store(statistics + 2 * r + 1, rstd, mask=r < count)


@triton.jit(do_not_specialize=["size_class"])
def project_kernel(
    x, rows, norm_weight, norm_bias, weight, bias, residual, out, statistics, true_count,
    count, size_class, in_features, out_features, eps,
    PADDED: tl.constexpr, GATHER: tl.constexpr, NORM: tl.constexpr, STATISTICS: tl.constexpr, BIAS: tl.constexpr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr, GATHER_RESIDUAL: tl.constexpr, SCATTER: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    if PADDED:  # how many tokens there are is known on the device alone: programs past them have nothing to do
        count = tl.load(true_count)
        if tl.program_id(0) * BLOCK_R >= count:
            return
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    is_row = r < count
    source = _indexed(r, rows, is_row, GATHER)
    place = x + source[:, None] * in_features + i[None, :]
    mean = tl.zeros((BLOCK_R,), tl.float32)
    rstd = tl.zeros((BLOCK_R,), tl.float32)
    if STATISTICS:
        mean = tl.load(statistics + 2 * r, mask=is_row, other=0.0)
        rstd = tl.load(statistics + 2 * r + 1, mask=is_row, other=0.0)
    elif NORM:  # rows so short that a program takes them at one stroke, and finds them in its cache after that
        c = tl.arange(0, BLOCK_C)
        within = is_row[:, None] & (c < in_features)[None, :]
        whole = tl.load(x + source[:, None] * in_features + c[None, :], mask=within, other=0.0).to(tl.float32)
        mean, rstd = _moments(whole, within, in_features, eps)
    total = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for first in range(0, in_features, BLOCK_I):
        is_in = first + i < in_features
        inside = is_row[:, None] & is_in[None, :]
        value = tl.load(place + first, mask=inside, other=0.0)
        if NORM:
            entered = value.to(tl.float32)
            normed = _normalised(entered, inside, mean, rstd, norm_weight, norm_bias, first + i, in_features)
            value = normed.to(value.dtype)
        columns = weight + o[None, :] * in_features + (first + i)[:, None]
        factor = tl.load(columns, mask=is_in[:, None] & (o < out_features)[None, :], other=0.0)
        total = tl.dot(value, factor, total, input_precision=PRECISION)
    is_out = o < out_features
    if BIAS:
        total += tl.load(bias + o, mask=is_out, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = _gelu(total)
    if RESIDUAL:
        beside = _indexed(r, rows, is_row, GATHER_RESIDUAL)
        place = residual + beside[:, None] * out_features + o[None, :]
        total += tl.load(place, mask=is_row[:, None] & is_out[None, :], other=0.0).to(tl.float32)
    target = _indexed(r, rows, is_row, SCATTER)
    place = out + target[:, None] * out_features + o[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_out[None, :])


@triton.jit
def _place_of(slot, places, is_slot, PADDED: tl.constexpr):
    """The row of a token of a window, and whether there is one: padding has none."""
    place = slot
    if PADDED:
        place = tl.load(places + slot, mask=is_slot, other=-1).to(tl.int64)
        is_slot = place >= 0
    return place, is_slot


@triton.jit(do_not_specialize=["size_class"])
def attention_kernel(
    qkv, places, qkv_bias, bias, bias_class, cosine_scale, out, scale, size_class, area, num_heads, head_dim,
    PADDED: tl.constexpr, QKV_BIAS: tl.constexpr, HAS_CLASS: tl.constexpr, COSINE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channels = num_heads * head_dim
    i = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    is_dim = d < head_dim
    query, is_query = _place_of(window * area + i, places, i < area, PADDED)
    if PADDED:  # noqa: SIM102 - what is compiled in stands alone, and is gone where it is not
        if tl.max(is_query.to(tl.int32), 0) == 0:
            return
    of_head = qkv + head * head_dim + d[None, :]
    q = tl.load(of_head + query[:, None] * 3 * channels, mask=is_query[:, None] & is_dim[None, :], other=0.0)
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
        key, is_token = _place_of(window * area + j, places, is_key, PADDED)
        place = of_head + key[:, None] * 3 * channels
        inside = is_token[:, None] & is_dim[None, :]
        k = tl.load(place + channels, mask=inside, other=0.0)
        v = tl.load(place + 2 * channels, mask=inside, other=0.0)
        if PADDED and QKV_BIAS:  # padding is zero before the qkv layer
            of_padding = qkv_bias + channels + head * head_dim + d
            padded_k = tl.load(of_padding, mask=is_dim, other=0.0).to(k.dtype)
            padded_v = tl.load(of_padding + channels, mask=is_dim, other=0.0).to(v.dtype)
            k = tl.where(is_token[:, None], k, padded_k[None, :])
            v = tl.where(is_token[:, None], v, padded_v[None, :])
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
    place = out + query[:, None] * channels + head * head_dim + d[None, :]
    value = total / weights[:, None]
    tl.store(place, value.to(out.dtype.element_ty), mask=is_query[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["size_class"])
def mlp_kernel(
    kept, rows, norm_weight, norm_bias, weight1, bias1, weight2, bias2, tokens, true_count,
    count, size_class, channels, hidden, eps,
    PADDED: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    if PADDED:  # how many tokens there are is known on the device alone: programs past them have nothing to do
        count = tl.load(true_count)
        if tl.program_id(0) * BLOCK_R >= count:
            return
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    is_channel = c < channels
    inside = (r < count)[:, None] & is_channel[None, :]
    entered = tl.load(kept + r[:, None] * channels + c[None, :], mask=inside, other=0.0)
    value = entered.to(tl.float32)
    mean, rstd = _moments(value, inside, channels, eps)
    normed = _normalised(value, inside, mean, rstd, norm_weight, norm_bias, c, channels).to(entered.dtype)
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
    target = tl.load(rows + r, mask=r < count, other=0)
    tl.store(tokens + target[:, None] * channels + c[None, :], total.to(tokens.dtype.element_ty), mask=inside)


@triton.jit
def norm_add_kernel(
    x, norm_weight, norm_bias, residual, rows, out, true_count,
    count, channels, eps,
    PADDED: tl.constexpr, GATHER_RESIDUAL: tl.constexpr, SCATTER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if PADDED:  # how many tokens there are is known on the device alone: programs past them have nothing to do
        count = tl.load(true_count)
        if tl.program_id(0) * BLOCK_R >= count:
            return
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = (r < count)[:, None] & (c < channels)[None, :]
    value = tl.load(x + r[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean, rstd = _moments(value, inside, channels, eps)
    total = _normalised(value, inside, mean, rstd, norm_weight, norm_bias, c, channels)
    beside = _indexed(r, rows, r < count, GATHER_RESIDUAL)
    place = residual + beside[:, None] * channels + c[None, :]
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    target = _indexed(r, rows, r < count, SCATTER)
    place = out + target[:, None] * channels + c[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rows_of(place, unshifted, shifted, partition, mask, other):
    """Token indices at `place` of one of the two partitions."""
    if partition == 0:
        row = tl.load(unshifted + place, mask=mask, other=other)
    else:
        row = tl.load(shifted + place, mask=mask, other=other)
    return row


@triton.jit
def score_kernel(
    x, unshifted, shifted, scores, batch, num_tokens, num_windows, channels, area,
    L2: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    window, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    partition, image = number // batch, number % batch
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, area, BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        row = _rows_of(window * area + t, unshifted, shifted, partition, t < area, num_tokens)
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
    scores, unshifted, shifted, keep, rows, batch, num_windows, num_keep, num_tokens, all_tokens, area,
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
        row = _rows_of(w[:, None] * area + t[None, :], unshifted, shifted, partition, inside, 0)
        row = tl.where(row == num_tokens, all_tokens, row + image * num_tokens)
        tl.store(rows + place[:, None] * area + t[None, :], row, mask=inside)
