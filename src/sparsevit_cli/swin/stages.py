"""timm's Swin stages with window sparsity: windows are scored once, and each block gets its share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsevit_cli import kernels, windows

from .inference import is_inference, plain_blocks, plain_merging
from .timm_swin import v1, v2, v2cr


class SparseStage(nn.Module):
    """timm's stage; scores its windows once, at the first pruned block, and hands each block its share."""

    sparsity_tenths: tuple[int, ...]
    importance: windows.Importance
    kernels: kernels.Kernels = "auto"
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
        merging = plain_merging(self, x) if infers else None
        x = self.downsample(x) if merging is None else self.downsample(x, plain=merging)
        plain = plain_blocks(self, x) if infers else None
        if plain is not None and merging is None:  # the caller's map, or a view of it, is not ours to change
            x = x.clone(memory_format=torch.contiguous_format)
        score_and_rank = windows.score_and_rank if plain is None else kernels.chosen_ranking(self.kernels, x.device)
        ranking = _Ranking(self, x.shape[1], x.shape[2], score_and_rank)
        for number, block in enumerate(self.blocks):
            kept = ranking.keep(x, number)
            if plain is not None:
                x = block(x, **(kept or ranking.all_windows(x, number)), plain=plain[number])
            elif self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(partial(block, **kept), x, use_reentrant=False)
            else:
                x = block(x, **kept)
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

    def __init__(self, stage: SparseStage, height: int, width: int, score_and_rank: kernels.ScoreAndRank) -> None:
        self.stage, self.height, self.width = stage, height, width
        self.score_and_rank = score_and_rank
        self.counts = [self._counts(number) for number in range(len(stage.blocks))]
        self.ranked: dict[_Partition, dict[str, Tensor]] = {}
        self.all: dict[_Partition, dict[str, Any]] = {}

    def keep(self, x: Tensor, number: int) -> dict[str, Tensor]:
        """Arguments that make block `number` compute the windows it keeps of its map `x`; none where it keeps all."""
        count, all_windows = self.counts[number]
        if count == all_windows:
            return {}
        if not self.ranked:
            self._rank(x, number)
        return {name: value[:, :count] for name, value in self.ranked[self._partition(number)].items()}

    def all_windows(self, x: Tensor, number: int) -> dict[str, Any]:
        """Arguments that make block `number` compute all windows."""
        partition = self._partition(number)
        if partition not in self.all:
            every = windows.all_windows(self.height, self.width, *partition, x.shape[0], x.device)
            self.all[partition] = every._asdict()
        return self.all[partition]

    def _partition(self, number: int) -> _Partition:
        block = self.stage.blocks[number]
        return block.window_size, block.shift_size

    def _token_index(self, partition: _Partition, device: torch.device) -> Tensor:
        return windows.token_index_of(self.height, self.width, *partition, device)  # n, N

    def _counts(self, number: int) -> tuple[int, int]:
        """Windows that block `number` keeps, and windows there are."""
        rows, cols = windows.window_grid(self.height, self.width, self.stage.blocks[number].window_size)
        return windows.num_keep(rows * cols, self.stage.sparsity_tenths[number // 2]), rows * cols

    def _rank(self, x: Tensor, first: int) -> None:
        """Rank once for each partition that blocks from `first` on have: the first of them keeps most."""
        partitions: dict[_Partition, int] = {}
        for number in range(first, len(self.stage.blocks)):
            partitions.setdefault(self._partition(number), number)
        for window in dict.fromkeys(window for window, _ in partitions):  # timm has one size in all blocks of a stage
            same = {partition: number for partition, number in partitions.items() if partition[0] == window}
            count, num_windows = self.counts[min(same.values())]
            ranked = self._ranked(x, [self._token_index(partition, x.device) for partition in same], count, num_windows)
            self.ranked |= {partition: _kept(*found) for partition, found in zip(same, ranked, strict=True)}

    def _ranked(self, x: Tensor, indices: list[Tensor], count: int, num_windows: int) -> list[tuple[Tensor, Tensor]]:
        if self.stage.importance != "random":
            return self.score_and_rank(x, indices, count, self.stage.importance)
        scores = windows.random_scores(x.shape[0], num_windows, self.stage.stage_number, x.device)
        return windows.rank([scores] * len(indices), indices, count, self.height * self.width)


def _kept(keep_indices: Tensor, rows: Tensor) -> dict[str, Tensor]:
    return {"keep_indices": keep_indices, "rows": rows}


_Partition = tuple[tuple[int, int], tuple[int, int]]
