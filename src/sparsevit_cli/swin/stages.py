"""timm's Swin stages with window sparsity: windows are scored once, and each block gets its share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsevit_cli import windows
from sparsevit_cli.kernels import Kernels, ScoreAndRank, chosen_ranking

from .blocks import SparseBlock
from .inference import is_inference, merging_weights, plain_blocks
from .timm_swin import v1, v2, v2cr


class SparseStage(nn.Module):
    """timm's stage; scores its windows once, at the first pruned block, and hands each block its share."""

    sparsity_tenths: tuple[int, ...]
    importance: windows.Importance
    kernels: Kernels = "auto"
    blocks: Any
    downsample: Any
    grad_checkpointing: bool
    stage_number: int
    as_timm = True
    """True where a stage without sparsity must give timm's numbers to the bit: the whole model is dense."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H', W', C'), sparse where `sparsity_tenths` says so."""
        if self.as_timm and not any(self.sparsity_tenths):
            return super().forward(x)  # type: ignore[no-any-return]
        return self._sparse(x)

    def _sparse(self, x: Tensor) -> Tensor:
        infers = is_inference(self, x.device)
        merging = merging_weights(self.downsample) if infers else None
        x = self.downsample(x) if merging is None else self.downsample(x, weights=merging)
        plain = plain_blocks(self, x) if infers else None
        if plain is not None and merging is None:  # the caller's map, or a view of it, is not ours to change
            x = x.clone(memory_format=torch.contiguous_format)
        score_and_rank = chosen_ranking(self.kernels, x.device) if plain is not None else None
        ranking = _Ranking(self, x.shape[1], x.shape[2], score_and_rank)
        for number, block in enumerate(self.blocks):
            run = partial(block, **ranking.keep(x, number))
            if plain is not None:
                x = run(x, token_index=ranking.token_index(block, x.device), plain=plain[number])
            elif self.grad_checkpointing and torch.is_grad_enabled():
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
    """The rankings of one forward pass of one stage: one per partition (plain, shifted).

    Lives for one forward only: all are made of the map that enters the first pruned block, and since ratios never
    decrease with depth, later blocks take prefixes.
    """

    def __init__(self, stage: SparseStage, height: int, width: int, score_and_rank: ScoreAndRank | None) -> None:
        self.stage, self.height, self.width = stage, height, width
        self.score_and_rank = score_and_rank if stage.importance != "random" else None
        self.ranked: dict[_Partition, dict[str, Tensor]] = {}

    def keep(self, x: Tensor, number: int) -> dict[str, Tensor]:
        """Arguments that make block `number` compute the windows it keeps of its map `x`; none where it keeps all."""
        block = self.stage.blocks[number]
        count, all_windows = self._counts(number)
        if count == all_windows:
            return {}
        if not self.ranked:
            self._rank(x, number)
        ranked = self.ranked[block.window_size, block.shift_size]
        return {name: value if name == "token_index" else value[:, :count] for name, value in ranked.items()}

    def token_index(self, block: SparseBlock, device: torch.device) -> Tensor:
        """(n, N) of the block's own partition."""
        return windows.token_index_of(self.height, self.width, block.window_size, block.shift_size, device)

    def _counts(self, number: int) -> tuple[int, int]:
        """Windows that block `number` keeps, and windows there are."""
        rows, cols = windows.window_grid(self.height, self.width, self.stage.blocks[number].window_size)
        return windows.num_keep(rows * cols, self.stage.sparsity_tenths[number // 2]), rows * cols

    def _rank(self, x: Tensor, first: int) -> None:
        """Rank once for each partition that blocks from `first` on have: the first of them keeps most."""
        found: dict[_Partition, tuple[Tensor, int]] = {}
        for number in range(first, len(self.stage.blocks)):
            block = self.stage.blocks[number]
            partition = (block.window_size, block.shift_size)
            if partition not in found:
                found[partition] = self.token_index(block, x.device), self._counts(number)[0]
        if self.score_and_rank is not None:
            indices, most = [index for index, _ in found.values()], max(count for _, count in found.values())
            ranked = self.score_and_rank(x, indices, most, self.stage.importance)
            for (partition, (index, _)), (keep_indices, rows) in zip(found.items(), ranked, strict=True):
                self.ranked[partition] = {"keep_indices": keep_indices, "token_index": index, "rows": rows}
            return
        is_random = self.stage.importance == "random"
        magnitude = None if is_random else windows.token_magnitude(x, self.stage.importance)
        for partition, (index, count) in found.items():
            keep_indices = windows.rank_windows(self._scores(magnitude, x.shape[0], index), count)
            self.ranked[partition] = {"keep_indices": keep_indices, "token_index": index}

    def _scores(self, magnitude: Tensor | None, batch: int, index: Tensor) -> Tensor:
        if magnitude is None:
            return windows.random_scores(batch, index.shape[0], self.stage.stage_number, index.device)
        return windows.window_scores(magnitude, index)


_Partition = tuple[tuple[int, int], tuple[int, int]]
