"""What a sparse model is measured against: the best dense timm a user can get, the authors' data flow, an oracle.

Letters are those of the benchmark's table: B0 the authors' flow at equal ratios, B2 the dense variants, O the oracle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from sparsevit_cli import windows
from sparsevit_cli.swin import SparseSwinTransformerBlock, SparseSwinTransformerStage, sparse_stages

Compile = Callable[[nn.Module], Any]


def dense_variants(model: nn.Module, *, max_autotune: bool = False) -> dict[str, Any]:
    """B2: timm's `model` with fused attention off and on, eager and compiled; copies, in evaluation mode.

    `max_autotune` adds torch.compile's slowest mode, which may take minutes to compile.
    """
    modes: dict[str, Compile] = {"eager": lambda m: m, "compile": lambda m: torch.compile(m, dynamic=False)}
    if max_autotune:
        modes["max-autotune"] = lambda m: torch.compile(m, dynamic=False, mode="max-autotune")
    variants: dict[str, Any] = {}
    for mode, compiled in modes.items():
        for fused in (False, True):
            variants[f"timm {mode}{', fused' if fused else ''}"] = compiled(with_fused_attention(model, fused))
    return variants


def with_fused_attention(model: nn.Module, fused: bool) -> nn.Module:
    """A copy of a timm Swin as TIMM_FUSED_ATTN=2 (or 0) would have built it."""
    clone = copy.deepcopy(model).eval()
    for module in clone.modules():
        if isinstance(module, WindowAttention):
            module.fused_attn = fused
    return clone


class AuthorsFlowStage(SparseSwinTransformerStage):
    """B0: a sparse stage with the data flow of the released SparseViT, written anew.

    Each block rolls and pads the map, partitions all windows, gathers the kept ones, runs, scatters them among the
    others, reverses, crops and rolls back; attention masks are built in every forward. Same numbers as ours.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H', W', C')."""
        x = self.downsample(x)
        height, width = x.shape[1:3]
        magnitude: Tensor | None = None
        for number, block in enumerate(self.blocks):
            rows, cols = windows.window_grid(height, width, block.window_size)
            count = windows.num_keep(rows * cols, self.sparsity_tenths[number // 2])
            if count < rows * cols and magnitude is None:
                magnitude = windows.token_magnitude(x, "mean_abs_l2")
            x = _authors_block(block, x, magnitude, count)
        return x


def _authors_block(block: SparseSwinTransformerBlock, x: Tensor, magnitude: Tensor | None, count: int) -> Tensor:
    batch, height, width, channels = x.shape
    (wh, ww), (sh, sw) = block.window_size, block.shift_size
    rows, cols = windows.window_grid(height, width, block.window_size)

    def partitioned(map_: Tensor) -> Tensor:
        map_ = torch.roll(map_, shifts=(-sh, -sw), dims=(1, 2)) if sh or sw else map_
        map_ = nn.functional.pad(map_, (0, 0, 0, cols * ww - width, 0, rows * wh - height))
        parted: Tensor = window_partition(map_, (wh, ww))
        return parted.view(batch, rows * cols, wh * ww, -1)

    parts = partitioned(x)  # B, n, N, C
    mask = block.get_attn_mask(x.new_empty(1, rows * wh, cols * ww, 1))
    real = partitioned(torch.ones_like(x[..., :1]))
    if count == rows * cols or magnitude is None:
        keep = torch.arange(rows * cols, device=x.device).expand(batch, -1)
    else:
        scores = partitioned(magnitude.view(batch, height, width, 1)).float().square().sum((2, 3)).sqrt()
        keep = scores.topk(count, dim=1).indices
    place = keep[:, :, None, None]
    kept = parts.gather(1, place.expand(-1, -1, wh * ww, channels))
    normed = block.norm1(kept) * real.gather(1, place.expand(-1, -1, wh * ww, 1))
    kept_mask = None if mask is None else mask[keep.flatten()]
    attended = block.attn(normed.flatten(0, 1), mask=kept_mask).view_as(kept)
    kept = kept + attended
    kept = kept + block.mlp(block.norm2(kept))
    parts = parts.scatter(1, place.expand(-1, -1, wh * ww, channels), kept)
    merged: Tensor = window_reverse(parts.reshape(-1, wh, ww, channels), (wh, ww), rows * wh, cols * ww)
    merged = merged[:, :height, :width].contiguous()
    return merged.roll(shifts=(sh, sw), dims=(1, 2)) if sh or sw else merged


def authors_flow(model: nn.Module) -> nn.Module:
    """A copy of a sparse model at its ratios, with the authors' data flow (B0)."""
    clone = copy.deepcopy(model)
    for stage in sparse_stages(clone):
        stage.__class__ = AuthorsFlowStage
    return clone


@contextmanager
def oracle() -> Iterator[None]:
    """O: our kernels on equally many windows that lie together, without scores, ranking, gather and scatter.

    The outputs mean nothing. What a sparse model takes longer than this is the sparsity tax.
    """
    functions: dict[str, Callable[..., Any]] = {
        "token_magnitude": lambda x, importance: x.new_zeros(x.shape[0], x.shape[1] * x.shape[2]),
        "window_scores": lambda magnitude, index: magnitude[:, : len(index)],
        "rank_windows": lambda scores, count: torch.arange(count, device=scores.device).expand(len(scores), -1),
        "gather_rows": lambda tokens, rows: tokens.narrow(0, 0, len(rows)),
        "scatter_rows_": lambda tokens, rows, values: tokens,
    }
    before = {name: getattr(windows, name) for name in functions}
    for name, function in functions.items():
        setattr(windows, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(windows, name, function)
