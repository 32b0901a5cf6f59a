"""timm's Swin stages with window sparsity: windows are scored once, and each block gets its share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsevit_cli import windows
from sparsevit_cli.kernels import Kernels

from .blocks import SparseBlock
from .inference import is_inference, merging_weights, plain_blocks
from .timm_swin import v1, v2, v2cr


class SparseStage(nn.Module):
    """timm's stage; scores its windows once, at the first pruned block, and hands each block its share."""

    sparsity_tenths: tuple[int, ...]
    importance: windows.Importance
    kernels: Kernels = "auto"
    stage_number: int
    as_timm = True
    """True where a stage without sparsity must give timm's numbers to the bit: the whole model is dense."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H', W', C'), sparse where `sparsity_tenths` says so."""
        if self.as_timm and not any(self.sparsity_tenths):
            return super().forward(x)  # type: ignore[no-any-return, misc]
        return self._sparse(x)

    def _sparse(self, x: Tensor) -> Tensor:
        stage: Any = self
        infers = is_inference(self, x.device)
        merging = merging_weights(stage.downsample) if infers else None
        x = stage.downsample(x) if merging is None else stage.downsample(x, weights=merging)
        plain = plain_blocks(stage, x) if infers else None
        if plain is not None and merging is None:  # the caller's map, or a view of it, is not ours to change
            x = x.clone(memory_format=torch.contiguous_format)
        ranking = _Ranking(self, x.shape[1], x.shape[2])
        for number, block in enumerate(stage.blocks):
            run = partial(block, **ranking.keep(x, block, self.sparsity_tenths[number // 2]))
            if plain is not None:
                x = run(x, token_index=ranking.token_index(block, x.device), plain=plain[number])
            elif stage.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, x, use_reentrant=False)
            else:
                x = run(x)
        return x


class SparseSwinTransformerStage(SparseStage, v1.SwinTransformerStage):
    """Of V1."""


class SparseSwinTransformerV2Stage(SparseStage, v2.SwinTransformerV2Stage):
    """Of V2."""


class SparseSwinTransformerV2CrStage(SparseStage, v2cr.SwinTransformerV2CrStage):
    """Of V2-CR, whose stages take and give maps (B, C, H, W)."""

    def _sparse(self, x: Tensor) -> Tensor:
        return super()._sparse(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


SPARSE_STAGES: dict[type[nn.Module], type[SparseStage]] = {
    v1.SwinTransformerStage: SparseSwinTransformerStage,
    v2.SwinTransformerV2Stage: SparseSwinTransformerV2Stage,
    v2cr.SwinTransformerV2CrStage: SparseSwinTransformerV2CrStage,
}


class _Ranking:
    """The rankings of one forward pass of one stage: at most one per partition (plain, shifted).

    Lives for one forward only: the magnitude is taken at the first pruned block, later blocks take prefixes.
    """

    def __init__(self, stage: SparseStage, height: int, width: int) -> None:
        self.stage, self.height, self.width = stage, height, width
        self.magnitude: Tensor | None = None
        self.ranked: dict[tuple[tuple[int, int], tuple[int, int]], tuple[Tensor, Tensor]] = {}

    def keep(self, x: Tensor, block: SparseBlock, tenths: int) -> dict[str, Tensor]:
        """Arguments that make `block` compute the windows kept at `tenths`; none where all are kept."""
        rows, cols = windows.window_grid(self.height, self.width, block.window_size)
        count = windows.num_keep(rows * cols, tenths)
        if count == rows * cols:
            return {}
        if self.magnitude is None and self.stage.importance != "random":
            self.magnitude = windows.token_magnitude(x, self.stage.importance)
        partition = (block.window_size, block.shift_size)
        if partition not in self.ranked:  # ratios never decrease with depth: the first block keeps most
            index = self.token_index(block, x.device)
            self.ranked[partition] = (windows.rank_windows(self._scores(x, index), count), index)
        keep_indices, index = self.ranked[partition]
        return {"keep_indices": keep_indices[:, :count], "token_index": index}

    def token_index(self, block: SparseBlock, device: torch.device) -> Tensor:
        """(n, N) of the block's own partition."""
        return windows.token_index_of(self.height, self.width, block.window_size, block.shift_size, device)

    def _scores(self, x: Tensor, index: Tensor) -> Tensor:
        if self.magnitude is None:
            return windows.random_scores(x.shape[0], index.shape[0], self.stage.stage_number, x.device)
        return windows.window_scores(self.magnitude, index)
