"""The data flow of the released SparseViT, written anew to be measured against ours: B0 of the benchmark."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit_cli import windows

from . import sparse_stages
from .stages import SparseSwinTransformerStage
from .timm_swin import v1


class AuthorsFlowStage(SparseSwinTransformerStage):
    """B0: a sparse stage with the data flow of the released SparseViT, written anew.

    Each block rolls and pads the map, partitions all windows, gathers the kept ones, runs, scatters them among the
    others, reverses, crops and rolls back; attention masks are built in every forward. Attention and layers are timm's.
    Same numbers as ours, with the partition of the model; the release pads first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H', W', C')."""
        x = self.downsample(x)
        height, width = x.shape[1:3]
        magnitude: Tensor | None = None
        ranked: dict[tuple[int, int], Tensor] = {}
        for number, block in enumerate(self.blocks):
            rows, cols = windows.window_grid(height, width, block.window_size)
            count = windows.num_keep(rows * cols, self.sparsity_tenths[number // 2])
            if count == rows * cols:
                x = block(x)
                continue
            if magnitude is None:
                magnitude = windows.token_magnitude(x, "mean_abs_l2").view(*x.shape[:3], 1)
            if block.shift_size not in ranked:
                scores = _partitioned(block, magnitude).square().sum((2, 3)).sqrt()
                ranked[block.shift_size] = scores.topk(count, dim=1).indices
            x = _authors_block(block, x, ranked[block.shift_size][:, :count])
        return x


def _partitioned(block: Any, x: Tensor) -> Tensor:
    """(B, H, W, C) rolled and padded, in the order of the block, and cut into all windows: (B, n, N, C)."""
    batch, height, width, channels = x.shape
    (wh, ww), (sh, sw) = block.window_size, block.shift_size
    rows, cols = windows.window_grid(height, width, block.window_size)
    padding = (0, 0, 0, cols * ww - width, 0, rows * wh - height)
    x = nn.functional.pad(x, padding) if block.partition == "pad_first" else x
    x = torch.roll(x, shifts=(-sh, -sw), dims=(1, 2)) if sh or sw else x
    x = nn.functional.pad(x, padding) if block.partition == "roll_first" else x
    parts: Tensor = v1.window_partition(x, (wh, ww))
    return parts.view(batch, rows * cols, wh * ww, channels)


def _authors_block(block: Any, x: Tensor, keep: Tensor) -> Tensor:
    height, width, channels = x.shape[1:]
    (wh, ww), (sh, sw) = block.window_size, block.shift_size
    rows, cols = windows.window_grid(height, width, block.window_size)
    parts = _partitioned(block, x)
    place = keep[:, :, None, None].expand(-1, -1, wh * ww, channels)
    kept = parts.gather(1, place)
    normed = block.norm1(kept)
    if windows.has_padding(height, width, block.window_size):  # timm pads after the norm, with zeros
        normed = normed * _partitioned(block, torch.ones_like(x[..., :1])).gather(1, place[..., :1])
    mask = block.get_attn_mask(x.new_empty(1, rows * wh, cols * ww, 1))
    kept_mask = None if mask is None else mask[keep.flatten()]
    kept = kept + block.attn(normed.flatten(0, 1), mask=kept_mask).view_as(kept)
    kept = kept + block.mlp(block.norm2(kept))
    parts = parts.scatter(1, place, kept)
    merged: Tensor = v1.window_reverse(parts.reshape(-1, wh, ww, channels), (wh, ww), rows * wh, cols * ww)
    if block.partition == "roll_first":
        merged = merged[:, :height, :width].contiguous()
    merged = merged.roll(shifts=(sh, sw), dims=(1, 2)) if sh or sw else merged
    return merged[:, :height, :width].contiguous()


def authors_flow(model: nn.Module) -> nn.Module | None:
    """A copy of a sparse model at its ratios, with the authors' data flow (B0); None where it is not a V1."""
    if any(type(stage) is not SparseSwinTransformerStage for stage in sparse_stages(model)):
        return None
    clone = copy.deepcopy(model)
    for stage in sparse_stages(clone):
        stage.__class__ = AuthorsFlowStage
    return clone
