"""timm's Swin stages with window sparsity: windows are scored once, and each block gets its share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsevit_cli import kernels, windows
from sparsevit_cli.kernels import held
from sparsevit_cli.windows import Kept

from .inference import is_inference, stock_blocks, stock_merging
from .timm_swin import v1, v2, v2cr


class SparseStage(nn.Module):
    """timm's stage. Differs: it scores its windows once, at the first pruned block, and hands each block its share.

    At inference it chooses one engine in each forward, which computes its patch merging, its ranking and its blocks.
    """

    sparsity_tenths: tuple[int, ...]
    counts_set: tuple[int | None, ...] | None = None
    """Windows that each block pair keeps, whatever its ratio is; None in it for all of them. See `keep_counts`."""
    importance: windows.Importance
    kernels: kernels.Kernels = "auto"
    blocks: Any
    downsample: Any
    grad_checkpointing: bool
    stage_number: int
    as_timm = True
    """True when the whole model is dense: then the stage must give timm's numbers to the bit, and runs timm's code."""

    @property
    def partition(self) -> windows.Partition:
        """What comes first in its blocks, roll or padding."""
        return self.blocks[0].partition  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H', W', C'); block pairs with `sparsity_tenths` above 0 are sparse."""
        if self.as_timm and not any(self.sparsity_tenths):
            return super().forward(x)  # type: ignore[no-any-return]
        return self._sparse(x)

    def _sparse(self, x: Tensor) -> Tensor:
        infers = is_inference(self, x.device)
        engine = kernels.chosen(self.kernels, x.device) if infers else kernels.beside_modules()
        merging = stock_merging(self, engine) if infers else None
        x = self.downsample(x) if merging is None else self.downsample(x, merging)
        stock = stock_blocks(self, engine) if infers else None
        if stock is None:
            engine = kernels.beside_modules()
        elif merging is None:  # the caller's map, or a view of it, is not ours to change
            x = x.clone(memory_format=torch.contiguous_format)
        ranking = _Ranking(self, x.shape[1], x.shape[2], engine)
        for number, block in enumerate(self.blocks):
            kept = ranking.keep(x, number)
            if stock is not None:
                x = block(x, kept=kept or ranking.all_windows(x, number), stock=stock[number])
            elif kept is None:
                x = _checkpointed(self, block, x)
            else:
                x = _checkpointed(self, partial(block, kept=kept, moves=engine.moves), x)
        return x


def _checkpointed(stage: SparseStage, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`block(x)`; with gradient checkpointing it is computed once more in the backward pass, to save memory."""
    if stage.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False)
    return block(x)


class SparseSwinTransformerStage(SparseStage, v1.SwinTransformerStage):
    """timm's stage of V1. Differs as `SparseStage` says, and in nothing else."""


class SparseSwinTransformerV2Stage(SparseStage, v2.SwinTransformerV2Stage):
    """timm's stage of V2. Differs as `SparseStage` says, and in nothing else."""


class SparseSwinTransformerV2CrStage(SparseStage, v2cr.SwinTransformerV2CrStage):
    """timm's stage of V2-CR. Differs as `SparseStage` says; timm's takes and gives maps (B, C, H, W), so this does."""

    def _sparse(self, x: Tensor) -> Tensor:
        return super()._sparse(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


SPARSE_STAGES: dict[type[nn.Module], type[SparseStage]] = {
    v1.SwinTransformerStage: SparseSwinTransformerStage,
    v2.SwinTransformerV2Stage: SparseSwinTransformerV2Stage,
    v2cr.SwinTransformerV2CrStage: SparseSwinTransformerV2CrStage,
}


class _Ranking:
    """The windows that each block of a stage computes in one forward pass, ranked once per partition.

    The partitions are unshifted and shifted windows. Both are ranked on the map that enters the first pruned block.
    Ratios never decrease with depth, so each later block takes a prefix of the ranking.
    """

    def __init__(self, stage: SparseStage, height: int, width: int, engine: kernels.Engine) -> None:
        self.stage, self.height, self.width, self.engine = stage, height, width, engine
        self.counts = [self._count(number) for number in range(len(stage.blocks))]
        self.ranked: dict[_Partition, Kept] = {}
        self.all: dict[_Partition, Kept] = {}

    def keep(self, x: Tensor, number: int) -> Kept | None:
        """The windows that block `number` keeps of its map `x` (B, H, W, C); None when it keeps all."""
        count = self.counts[number]
        if count is None:
            return None
        if not self.ranked:
            self._rank(x, number)
        return self.ranked[self._partition(number)].best(count)

    def all_windows(self, x: Tensor, number: int) -> Kept:
        """All windows of block `number`."""
        partition = self._partition(number)
        if partition not in self.all:
            moves = self.engine.moves
            self.all[partition] = moves.all_windows(self.height, self.width, *partition, x.shape[0], x.device)
        return self.all[partition]

    def _partition(self, number: int) -> _Partition:
        block = self.stage.blocks[number]
        return block.window_size, block.shift_size, block.partition

    def _token_index(self, partition: _Partition, device: torch.device) -> Tensor:
        return held.token_index_of(self.height, self.width, *partition, device)  # n, N

    def _num_windows(self, number: int) -> int:
        """Windows that block `number` has."""
        rows, cols = windows.window_grid(self.height, self.width, self.stage.blocks[number].window_size)
        return rows * cols

    def _count(self, number: int) -> int | None:
        """Windows that block `number` keeps; None for all of them."""
        if self.stage.counts_set is not None:
            return self.stage.counts_set[number // 2]
        num_windows = self._num_windows(number)
        count = windows.num_keep(num_windows, self.stage.sparsity_tenths[number // 2])
        return None if count == num_windows else count

    def _rank(self, x: Tensor, first: int) -> None:
        """Rank once for each partition that blocks from `first` on have: the first of them keeps most."""
        partitions: dict[_Partition, int] = {}
        for number in range(first, len(self.stage.blocks)):
            partitions.setdefault(self._partition(number), number)
        for window in dict.fromkeys(window for window, *_ in partitions):  # timm has one size in all blocks of a stage
            same = {partition: number for partition, number in partitions.items() if partition[0] == window}
            most = min(same.values())
            count = self.counts[most]
            assert count is not None, "counts never rise within a stage"
            indices = [self._token_index(partition, x.device) for partition in same]
            ranked = self._ranked(x, indices, count, self._num_windows(most))
            self.ranked.update(zip(same, ranked, strict=True))

    def _ranked(self, x: Tensor, indices: list[Tensor], count: int, num_windows: int) -> list[Kept]:
        if self.stage.importance != "random":
            return self.engine.score_and_rank(x, indices, count, self.stage.importance)
        scores = windows.random_scores(x.shape[0], num_windows, self.stage.stage_number, x.device)
        rows_of = self.engine.moves.rows_of
        return windows.rank([scores] * len(indices), indices, count, self.height * self.width, rows_of)


_Partition = tuple[tuple[int, int], tuple[int, int], windows.Partition]
"""Sizes of windows and of their shift, and what comes first, roll or padding."""
