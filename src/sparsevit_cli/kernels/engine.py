"""The contract between a sparse Swin and the code that computes its parts at inference.

Shapes: B maps of H x W tokens, T = B*H*W rows of all maps, C channels; n windows of N slots per map, K of them kept,
M = B*K windows in one call; h heads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from sparsevit_cli import windows
from sparsevit_cli.windows import Importance, Kept, Partition

from . import held
from .weights import BlockWeights, EmbeddingWeights, MergingWeights, Weights


class Moves:
    """Which rows windows have, and how rows are gathered and scattered, outside of kernels that do it themselves.

    An engine has one, so that a profile can time the moves and the oracle can leave them out (`Engine.with_moves`).
    """

    def rows_of(self, keep_indices: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
        """`windows.rows_of`: (B, K), (n, N) -> (B, K, N)."""
        return windows.rows_of(keep_indices, token_index, num_tokens)

    def all_windows(
        self,
        height: int,
        width: int,
        window_size: tuple[int, int],
        shift_size: tuple[int, int],
        partition: Partition,
        batch: int,
        device: torch.device,
    ) -> Kept:
        """`held.all_windows`: indices (B, n), rows (B, n, N)."""
        return held.all_windows(height, width, window_size, shift_size, partition, batch, device)

    def flatten_map(self, x: Tensor, *, scratch_row: bool) -> Tensor:
        """`windows.flatten_map`: (B, H, W, C) -> (T, C), or (T + 1, C)."""
        return windows.flatten_map(x, scratch_row=scratch_row)

    def unflatten_map(self, tokens: Tensor, shape: tuple[int, int, int], *, scratch_row: bool) -> Tensor:
        """`windows.unflatten_map`: back to (B, H, W, C)."""
        return windows.unflatten_map(tokens, shape, scratch_row=scratch_row)

    def gather_rows(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """`windows.gather_rows`: (T, C), (R,) -> (R, C)."""
        return windows.gather_rows(tokens, rows)

    def scatter_rows(self, tokens: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """`windows.scatter_rows`: a copy of `tokens` (T, C) with `values` (R, C) at `rows` (R,)."""
        return windows.scatter_rows(tokens, rows, values)

    def scatter_rows_(self, tokens: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """`windows.scatter_rows_`: the same in place."""
        return windows.scatter_rows_(tokens, rows, values)


MOVES = Moves()


class Engine(Protocol):
    """Computes the parts of a Swin at inference; nothing that it does can be differentiated.

    Results agree with timm's modules, and from engine to engine, to about 1e-5 in float32. An engine computes whatever
    it is given: what it does not take itself, its portable engine computes.
    """

    @property
    def name(self) -> str:
        """One word: `portable`, `native` or `triton`."""

    @property
    def moves(self) -> Moves:
        """How rows are moved outside of the engine's own kernels."""

    def version(self) -> str:
        """Two equal ones are the same code; empty for the portable engine, whose code is torch's."""

    def with_moves(self, moves: Moves) -> Engine:
        """The same engine with other `moves`."""

    def takes(self, x: Tensor, weights: Weights | None) -> bool:
        """True when the engine's own code computes `weights` on `x`, a map or images; None asks for scores.

        Args:
            x: rows (T, C) for a block, images (B, C, H, W) for an embedding, a map (B, H, W, C) otherwise.
            weights: of a block, a patch merging or a patch embedding.
        """

    def leaves_out_padding(self, x: Tensor, weights: BlockWeights) -> bool:
        """True when linear layers of a block skip the padding of kept windows. Args as in `takes`."""

    def run_windows_(
        self,
        tokens: Tensor,
        rows: Tensor,
        weights: BlockWeights,
        bias: Tensor,
        bias_class: Tensor | None,
        *,
        padded: bool,
        places: Tensor | None = None,
    ) -> None:
        """Replace the tokens of M windows by what the block makes of them; every other row keeps its bits.

        Padding enters attention as timm has it: zeros before the qkv layer, so that its keys and values are the bias.

        Args:
            tokens: (T, C), the rows of all maps; changed in place.
            rows: (M, N) int64, the row of each window's tokens, T for padding. No row of a token is there twice.
            weights: of the block.
            bias: (classes, h, N, N), added to the attention scores; of the type of `tokens`.
            bias_class: (M,) int64, the class of each window; None when there is one class.
            padded: False when `rows` holds no padding.
            places: `Kept.places`, when `rows` are all windows of all maps in order and some hold padding.
        """

    def merge_patches(self, x: Tensor, weights: MergingWeights) -> Tensor:
        """Four neighbours into one token: (B, H, W, C) to (B, H/2, W/2, out); odd sides are padded with zeros.

        As timm's PatchMerging (timm/models/swin_transformer.py and its V2).
        """

    def embed_patches(self, x: Tensor, weights: EmbeddingWeights) -> Tensor:
        """Images (B, C, H, W) to a map (B, H/side, W/side, out), as timm's PatchEmbed (timm/layers/patch_embed.py)."""

    def score_and_rank(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance
    ) -> list[Kept]:
        """The best windows of maps, for one partition or for two, unshifted and shifted.

        Args:
            x: (B, H, W, C).
            token_indices: one (n, N) int64 per partition, of `windows.window_token_index`; all of one shape.
            count: windows kept per map.
            importance: `mean_abs_l2` or `l2`.

        Returns:
            One `Kept` per partition: indices (B, count), best first, and rows (B, count, N).
        """


class EngineAround:
    """An engine that does what `inner` does; its subclasses change one thing."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def moves(self) -> Moves:
        return self.inner.moves

    def version(self) -> str:
        return self.inner.version()

    def with_moves(self, moves: Moves) -> Self:
        changed = copy.copy(self)
        changed.inner = self.inner.with_moves(moves)
        return changed

    def takes(self, x: Tensor, weights: Weights | None) -> bool:
        return self.inner.takes(x, weights)

    def leaves_out_padding(self, x: Tensor, weights: BlockWeights) -> bool:
        return self.inner.leaves_out_padding(x, weights)

    def run_windows_(
        self,
        tokens: Tensor,
        rows: Tensor,
        weights: BlockWeights,
        bias: Tensor,
        bias_class: Tensor | None,
        *,
        padded: bool,
        places: Tensor | None = None,
    ) -> None:
        self.inner.run_windows_(tokens, rows, weights, bias, bias_class, padded=padded, places=places)

    def merge_patches(self, x: Tensor, weights: MergingWeights) -> Tensor:
        return self.inner.merge_patches(x, weights)

    def embed_patches(self, x: Tensor, weights: EmbeddingWeights) -> Tensor:
        return self.inner.embed_patches(x, weights)

    def score_and_rank(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance
    ) -> list[Kept]:
        return self.inner.score_and_rank(x, token_indices, count, importance)
