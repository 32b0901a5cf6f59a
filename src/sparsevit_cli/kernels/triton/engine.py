"""The Triton engine: kernels for a Swin block on some of its windows, and for scoring and ranking them.

A block that normalises first (V1) takes four launches: gather, norm and qkv; window attention; projection and residual;
norm, MLP, residual and scatter. With wide rows it takes seven: the statistics of each norm come first, and the MLP
takes two. A block that normalises after (V2, V2-CR) takes seven: gather and qkv; window attention of cosines;
projection; norm and residual; the MLP in two; norm, residual and scatter. On a padded map one or two launches come
first, which find the tokens among the slots of the windows: nothing is computed for padding.

Imported only when Triton can be. With TRITON_INTERPRET=1 set beforehand, all of it runs on a CPU, slowly.

Shapes: R = M*N slots of M kept windows of N tokens, C channels, h heads of D, T rows of all maps; a row T is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparsevit_cli.kernels.fallback import LimitedEngine
from sparsevit_cli.kernels.weights import Affine, BlockWeights, Norm, Weights
from sparsevit_cli.windows import Importance, Kept

from . import code, tuning

MAX_FUSED_BYTES = 512
"""Bytes of the widest rows that one program holds whole, with tiles of both weights, in 99 KB of shared memory.

That is 256 channels of 16 bits, or 128 of 32 bits.
"""

BLOCK_SLOTS = 4096
"""Tokens of windows that one program compacts."""


class TritonEngine(LimitedEngine):
    """Triton on a GPU: blocks and scores; patch merging and embedding are the portable engine's."""

    name = "triton"
    limits = "Triton's kernels are for contiguous blocks in float32, float16 or bfloat16"

    def version(self) -> str:
        """Of Triton, on which the compiled code depends, and whether launches are tuned."""
        return f"{triton.__version__}{', tuned' if tuning.is_on() else ''}"

    def takes(self, x: Tensor, weights: Weights | None) -> bool:
        return weights is None or (isinstance(weights, BlockWeights) and supports(weights))

    def _run_windows_(
        self, tokens: Tensor, rows: Tensor, weights: BlockWeights, bias: Tensor, bias_class: Tensor | None, *,
        padded: bool,
    ) -> None:  # fmt: skip
        area = rows.shape[1]
        with _on_device_of(tokens):
            kept = _true_slots(rows.reshape(-1), len(tokens)) if padded else _Rows(rows.reshape(-1))
            qkv = _project(tokens, weights.qkv, kept, gather=True, norm=weights.norm1 if weights.norm_first else None)
            attended = _attend(qkv, weights, bias, bias_class, kept, area)
            if not weights.norm_first:
                x = _norm_add(_project(attended, weights.proj, kept), weights.norm1, kept, tokens, gather_residual=True)
                hidden = _project(x, weights.fc1, kept, gelu=True)
                _norm_add(_project(hidden, weights.fc2, kept), weights.norm2, kept, x, into=tokens)
                return
            x = _project(attended, weights.proj, kept, residual=tokens, gather_residual=True)
            if _is_held_whole(tokens):
                _mlp_(tokens, x, weights, kept)
            else:
                hidden = _project(x, weights.fc1, kept, norm=weights.norm2, gelu=True)
                _project(hidden, weights.fc2, kept, residual=x, into=tokens)

    def _score_and_rank(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance
    ) -> list[Kept]:
        """Two launches; of equal scores the first window comes first."""
        batch, height, width, channels = x.shape
        unshifted, shifted = token_indices[0], token_indices[-1]
        assert len(token_indices) <= 2, "a stage has unshifted and shifted windows"
        assert unshifted.shape == shifted.shape
        num_windows, area = unshifted.shape
        every = batch * len(token_indices)
        x, device = x.contiguous(), x.device
        scores = torch.empty(every, num_windows, device=device, dtype=torch.float32)
        block_n, block_c = _power(area, 64), _power(channels, 128)
        keep = torch.empty(len(token_indices), batch, count, device=device, dtype=torch.int64)
        rows = torch.empty(len(token_indices), batch, count, area, device=device, dtype=torch.int64)
        block_w = 16
        with _on_device_of(x):
            code.score_kernel[(num_windows, every)](
                x, unshifted, shifted, scores, batch, height * width, num_windows, channels, area,
                L2=importance == "l2", BLOCK_N=block_n, BLOCK_C=block_c,
            )  # fmt: skip
            code.rank_kernel[(triton.cdiv(num_windows, block_w), every)](
                scores, unshifted, shifted, keep, rows, batch, num_windows, count, height * width,
                batch * height * width, area, BLOCK_W=block_w, BLOCK_J=128, BLOCK_N=block_n,
            )  # fmt: skip
        return [Kept(*found) for found in zip(keep, rows, strict=True)]


def supports(block: BlockWeights) -> bool:
    """True for contiguous weights of types that Triton multiplies, and norms with weight and bias."""
    tensors = block.tensors()
    if tensors is None:
        return False
    return all(tensor.is_contiguous() and tensor.dtype in _DTYPES for tensor in tensors)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# -- launches ---------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The rows of the map that a block computes: `rows` (R,) int64.

    With padding only the first `true_count` (1,) int32 of them are rows of tokens, and the others are undefined.
    `places` (R,) int32 is then the place of each slot of each window among them, -1 for padding. Without padding both
    are None, and slot r is row r.
    """

    rows: Tensor
    true_count: Tensor | None = None
    places: Tensor | None = None


def _true_slots(rows: Tensor, num_tokens: int) -> _Rows:
    """`rows` (R,) int64 without those of padding, which are `num_tokens`. The host does not wait for their number.

    It takes two launches, or one when a single program takes all slots. No program waits for another, so the order is
    always the same.
    """
    programs = triton.cdiv(len(rows), BLOCK_SLOTS)
    counts, places = rows.new_empty(programs, dtype=torch.int32), torch.empty_like(rows, dtype=torch.int32)
    kept = _Rows(torch.empty_like(rows), rows.new_empty(1, dtype=torch.int32), places)
    if programs > 1:
        code.count_kernel[(programs,)](rows, counts, len(rows), num_tokens, BLOCK=BLOCK_SLOTS, num_warps=8)
    code.compact_kernel[(programs,)](
        rows, counts, kept.rows, kept.true_count, places, len(rows), num_tokens,
        BLOCK=BLOCK_SLOTS, BLOCK_P=128, num_warps=8,
    )  # fmt: skip
    return kept


def _project(
    x: Tensor,
    layer: Affine,
    kept: _Rows,
    *,
    gather: bool = False,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    gather_residual: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """`project_kernel`: residual + gelu(norm(x) @ weight.T + bias) of `kept` rows, (R, out).

    Args:
        x: (T, in) with `gather`, otherwise (R, in).
        layer: weight (out, in), and bias (out,) or None.
        kept: the rows.
        gather: take rows of a map.
        norm: of the rows, weight and bias (in,); None for none.
        gelu: after the layer.
        residual: (T, out) with `gather_residual`, otherwise (R, out); None for none.
        gather_residual: take rows of a map.
        into: a map (T, out), whose rows are written and which is returned; None for a new tensor (R, out).
    """
    weight, bias = layer
    out_features, in_features = weight.shape
    out = x.new_empty(len(kept.rows), out_features) if into is None else into
    statistics = None if norm is None or _is_held_whole(x) else _statistics(x, norm, kept, gather=gather)
    settings = {"BLOCK_R": 64, "BLOCK_O": _power(out_features, 64), "BLOCK_I": _power(in_features, 32)}

    def grid(chosen: Mapping[str, int]) -> tuple[int, ...]:
        return triton.cdiv(len(kept.rows), chosen["BLOCK_R"]), triton.cdiv(out_features, chosen["BLOCK_O"])

    _launch(
        "project_kernel", grid, settings | {"num_warps": 4, "num_stages": 3},
        x, kept.rows, _or(norm and norm.weight, x), _or(norm and norm.bias, x), weight, _or(bias, x),
        _or(residual, x), out, _or(statistics, x), _or(kept.true_count, x), len(kept.rows),
        tuning.size_class(len(kept.rows)), in_features, out_features, norm.eps if norm else 0.0,
        PADDED=kept.true_count is not None, GATHER=gather, NORM=norm is not None, STATISTICS=statistics is not None,
        BIAS=bias is not None, GELU=gelu, RESIDUAL=residual is not None, GATHER_RESIDUAL=gather_residual,
        SCATTER=into is not None, PRECISION=_precision(x),
        BLOCK_C=_power(in_features) if norm and statistics is None else 16,
    )  # fmt: skip
    return out


def _statistics(x: Tensor, norm: Norm, kept: _Rows, *, gather: bool) -> Tensor:
    """`statistics_kernel`: mean and 1 / deviation of rows of `x`, (R, 2) float32.

    `x` is (T, C) with `gather`, otherwise (R, C).
    """
    count, channels = len(kept.rows), x.shape[1]
    out = x.new_empty(count, 2, dtype=torch.float32)
    block_c = _power(channels)
    block_r = max(1, 4096 // block_c)
    code.statistics_kernel[(triton.cdiv(count, block_r),)](
        x, kept.rows, out, _or(kept.true_count, x), count, channels, norm.eps,
        PADDED=kept.true_count is not None, GATHER=gather, BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    return out


def _is_held_whole(x: Tensor) -> bool:
    """True when one program can hold rows as wide as those of `x`: then it norms them without another launch."""
    return _power(x.shape[1]) * x.element_size() <= MAX_FUSED_BYTES


def _attend(
    qkv: Tensor, block: BlockWeights, bias: Tensor, bias_class: Tensor | None, kept: _Rows, area: int
) -> Tensor:
    """`attention_kernel`: qkv (R, 3C) to (R, C), one row per token in the order of `kept`.

    `bias` (classes, h, N, N) is added to the scores; `bias_class` (M,) is the class of each window, None for the first.
    `area` is N.
    """
    count, channels = len(qkv) // area, qkv.shape[1] // 3
    head_dim = channels // block.num_heads
    out = qkv.new_empty(len(qkv), channels)
    block_q = _power(area, 64)
    stages = 1 if area <= block_q else 2  # with one step there is nothing to overlap, and memory to save
    settings = {"BLOCK_Q": block_q, "BLOCK_K": block_q, "num_warps": 4, "num_stages": stages}

    def grid(chosen: Mapping[str, int]) -> tuple[int, ...]:
        return count, block.num_heads, triton.cdiv(area, chosen["BLOCK_Q"])

    _launch(
        "attention_kernel", grid, settings,
        qkv, _or(kept.places, qkv), _or(block.qkv.bias, qkv), bias.contiguous(), _or(bias_class, qkv),
        _or(block.cosine_scale, qkv), out, block.scale, tuning.size_class(count), area, block.num_heads,
        head_dim, PADDED=kept.places is not None, QKV_BIAS=block.qkv.bias is not None,
        HAS_CLASS=bias_class is not None, COSINE=block.cosine_scale is not None, PRECISION=_precision(qkv),
        BLOCK_D=_power(head_dim),
    )  # fmt: skip
    return out


def _norm_add(
    x: Tensor,
    norm: Norm,
    kept: _Rows,
    residual: Tensor,
    *,
    gather_residual: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """`norm_add_kernel`: residual + norm(x), for x (R, C): (R, C), or `into` a map (T, C), which is returned.

    `residual` is (T, C) with `gather_residual`, otherwise (R, C).
    """
    count, channels = x.shape
    out = torch.empty_like(x) if into is None else into
    block_c = _power(channels)
    block_r = max(1, 4096 // block_c)
    code.norm_add_kernel[(triton.cdiv(count, block_r),)](
        x, norm.weight, norm.bias, residual, kept.rows, out, _or(kept.true_count, x), count, channels, norm.eps,
        PADDED=kept.true_count is not None, GATHER_RESIDUAL=gather_residual, SCATTER=into is not None,
        BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    return out


def _mlp_(tokens: Tensor, x: Tensor, block: BlockWeights, kept: _Rows) -> None:
    """`mlp_kernel`: x + mlp(norm2(x)) for x (R, C), into rows of `tokens` (T, C)."""
    count, channels = x.shape
    hidden = block.fc1.weight.shape[0]
    block_c = _power(channels)
    settings = {"BLOCK_R": 64 if block_c * x.element_size() <= MAX_FUSED_BYTES // 2 else 32, "BLOCK_H": 32}

    def grid(chosen: Mapping[str, int]) -> tuple[int, ...]:
        return (triton.cdiv(count, chosen["BLOCK_R"]),)

    _launch(
        "mlp_kernel", grid, settings | {"num_warps": 8 if block_c > 128 else 4, "num_stages": 2},
        x, kept.rows, block.norm2.weight, block.norm2.bias, block.fc1.weight, _or(block.fc1.bias, x),
        block.fc2.weight, _or(block.fc2.bias, x), tokens, _or(kept.true_count, x), count,
        tuning.size_class(count), channels, hidden, block.norm2.eps, PADDED=kept.true_count is not None,
        BIAS1=block.fc1.bias is not None, BIAS2=block.fc2.bias is not None, PRECISION=_precision(x), BLOCK_C=block_c,
    )  # fmt: skip


def _launch(
    name: str,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    settings: Mapping[str, int],
    x: Tensor,
    *arguments: object,
    **compiled_in: object,
) -> None:
    """Launch the kernel `name` with `settings`, or with those measured to be best when launches are tuned."""
    if tuning.is_on():
        _tuned(name, x.device)[grid](x, *arguments, **compiled_in)
    else:
        getattr(code, name)[grid](x, *arguments, **compiled_in, **settings)


@lru_cache
def _tuned(name: str, device: torch.device) -> Any:
    """The kernel `name` with its candidates; one for each GPU, since another one wants other settings."""
    return tuning.tuned(getattr(code, name), tuning.TUNABLE[name])


def _power(size: int, most: int | None = None) -> int:
    """The power of two that holds `size`, at least 16 (the least that a matrix product takes), at most `most`."""
    power: int = max(16, triton.next_power_of_2(size))
    return power if most is None else min(power, most)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """`tensor`, or `other` in its place: Triton needs a pointer even when the kernel reads nothing."""
    return other if tensor is None else tensor


def _precision(x: Tensor) -> str:
    """PRECISION of a kernel, as torch multiplies float32: exactly, unless TF32 was allowed."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
