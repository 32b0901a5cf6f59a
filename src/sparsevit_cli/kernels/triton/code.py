"""Triton's kernels: what one program does with a block of rows, or with a head of a window. `engine` launches them.

Arguments are pointers first, then sizes, then constants that are compiled in (in capitals). Tensors are contiguous, of
float32, float16 or bfloat16, and indices are int64 unless a docstring says otherwise. Matrix products, norms and scores
are summed up in float32. No kernel reads what it writes, so a launch may be repeated.

Shapes: T rows of all maps; R = M*N slots of M kept windows of N slots; C channels, h heads of D channels.
Arguments of several kernels:
    rows: (R,), the row of the map that each computed row stands for.
    true_count: (1,) int32. With PADDED only the first `true_count` of the computed rows exist, the host knows just
        their greatest number `count`, and programs past `true_count` return at once.
    size_class: a power of two near the number of rows, by which tuned settings are chosen; no kernel reads it.
    PRECISION: of matrix products in float32, `ieee` or `tf32`.
    BLOCK_*: the rows, columns or inputs that one program takes at a time; powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu(x):
    """The exact GELU, elementwise."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def count_kernel(rows, counts, num_slots, num_tokens, BLOCK: tl.constexpr):
    """Counts the tokens among every BLOCK slots of windows, so that `compact_kernel` knows where its own begin.

    Args:
        rows: (num_slots,), the row of each slot in the map; `num_tokens` for padding.
        counts: (programs,) int32, written: tokens among the slots of each program.
    """
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + slot, mask=slot < num_slots, other=num_tokens)
    tl.store(counts + tl.program_id(0), tl.sum((row < num_tokens).to(tl.int32), 0))


@triton.jit
def compact_kernel(
    rows, counts, true_rows, true_count, places, num_slots, num_tokens, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Moves the rows of tokens to the front, in order, and notes where each slot went.

    Args:
        rows: (num_slots,), the row of each slot in the map; `num_tokens` for padding.
        counts: (programs,) int32 of `count_kernel`; read by all programs but the first.
        true_rows: (num_slots,), written: rows of tokens; the rest is left undefined.
        true_count: (1,) int32, written: how many there are.
        places: (num_slots,) int32, written: the place of each slot in `true_rows`, -1 for padding.
        BLOCK_P: counts of other programs that are summed up at a time.
    """
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
    """`rows[r]` when INDEXED, otherwise `r` itself."""
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
    """Mean and 1 / deviation of rows that are too wide for one program of `project_kernel`.

    Args:
        x: (T, C) when GATHER, whose rows `rows` are taken; otherwise (count, C).
        statistics: (count, 2) float32, written: mean and 1 / deviation of each row.
    """
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
    """A linear layer with what comes before and after it: out = residual + gelu(norm(x) @ weight.T + bias).

    One program computes BLOCK_R rows and BLOCK_O columns. Each part that a constant names may be left out.

    Args:
        x: (T, in_features) when GATHER, whose rows `rows` are taken; otherwise (count, in_features).
        norm_weight, norm_bias: (in_features,), when NORM.
        weight: (out_features, in_features).
        bias: (out_features,), when BIAS.
        residual: (T, out_features) when GATHER_RESIDUAL, otherwise (count, out_features); when RESIDUAL.
        out: (T, out_features) when SCATTER, whose rows `rows` are written; otherwise (count, out_features), written.
        statistics: (count, 2) of `statistics_kernel` when STATISTICS; otherwise a program norms whole rows itself.
        eps: of the norm.
        BLOCK_C: a power of two that holds `in_features`, when a program norms whole rows itself.
    """
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
    """The row of each slot in qkv, and whether it has one: padding has none."""
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
    """Attention of one head of one window, for BLOCK_Q queries; its softmax goes over the keys BLOCK_K at a time.

    Args:
        qkv: (R, 3, h, D), one row per slot, or one per token in the order of `places` when PADDED.
        places: (R,) int32, the row of each slot in `qkv`, -1 for padding, when PADDED.
        qkv_bias: (3, h, D), when PADDED and QKV_BIAS: keys and values of padding.
        bias: (classes, h, N, N), added to the scores.
        bias_class: (M,), the class of each window, when HAS_CLASS; otherwise all have the first.
        cosine_scale: (h,), which multiplies cosines of queries and keys, when COSINE.
        out: (R, h, D), written; rows as in `qkv`.
        scale: multiplies the scores.
        area: N.
        BLOCK_D: a power of two that holds D.
    """
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
    for first in range(0, area, BLOCK_K):  # one step for windows of at most 64 tokens
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
    """Norm, MLP and residual of BLOCK_R rows, scattered into the map; the hidden map is never stored.

    Args:
        kept: (count, C), the rows after attention.
        norm_weight, norm_bias: (C,).
        weight1, bias1: (hidden, C) and (hidden,), the latter when BIAS1.
        weight2, bias2: (C, hidden) and (C,), the latter when BIAS2.
        tokens: (T, C), whose rows `rows` are written.
        eps: of the norm.
        BLOCK_C: a power of two that holds C.
    """
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
    for first in range(0, hidden, BLOCK_H):
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
    """A norm and a residual, for blocks that normalise after (V2, V2-CR): out = residual + norm(x).

    Args:
        x: (count, C).
        norm_weight, norm_bias: (C,).
        residual: (T, C) when GATHER_RESIDUAL, whose rows `rows` are taken; otherwise (count, C).
        out: (T, C) when SCATTER, whose rows `rows` are written; otherwise (count, C), written.
        eps: of the norm.
        BLOCK_C: a power of two that holds C.
    """
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
    """Token indices at `place` in `unshifted` when `partition` is 0, otherwise in `shifted`."""
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
    """The score of one window of one map in one partition: the L2 norm of the magnitudes of its tokens.

    Args:
        x: (batch, num_tokens, channels).
        unshifted, shifted: (num_windows, area), the token index of each partition; `num_tokens` for padding.
        scores: (partitions, batch, num_windows) float32, written.
        L2: the magnitude of a token is the L2 norm of its channels; otherwise the mean of their absolute values.
    """
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
    """The rank of BLOCK_W windows among all of their map, and the rows of those among the best `num_keep`.

    A rank is counted, not sorted: the windows with a higher score, and those before it with an equal one. NaN is the
    highest score.

    Args:
        scores: (partitions, batch, num_windows) float32 of `score_kernel`.
        unshifted, shifted: (num_windows, area), the token index of each partition; `num_tokens` for padding.
        keep: (partitions, batch, num_keep), written: windows, best first.
        rows: (partitions, batch, num_keep, area), written: rows of their tokens; `all_tokens` for padding.
        all_tokens: batch * num_tokens.
        BLOCK_J: windows that they are compared with at a time.
    """
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
