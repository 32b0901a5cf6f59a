"""What a sparse model is measured against: the best dense timm a user can get, the authors' data flow, an oracle.

Letters are those of the benchmark's table: B0 the authors' flow at equal ratios, B2 the dense variants, O the oracle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from sparsevit_cli import kernels, windows
from sparsevit_cli.acceleration import accelerate_
from sparsevit_cli.swin import SparseSwinTransformerStage, sparse_stages
from sparsevit_cli.windows import Importance, Kept

from .inputs import evaluating

Compile = Callable[[nn.Module], Any]


def dense_variants(model: nn.Module, *, max_autotune: bool = False) -> dict[str, Any]:
    """B2: timm's `model` with fused attention off and on, eager and compiled; copies, in evaluation mode.

    V2 and V2-CR have no fused attention in timm. On a GPU also with CUDA graphs: eager ones captured as ours are,
    compiled ones by `reduce-overhead`. `max_autotune` adds torch.compile's slowest mode, which may take minutes to
    compile.
    """
    modes: dict[str, Compile] = {"eager": lambda m: m, "compile": lambda m: torch.compile(m, dynamic=False)}
    if next(model.parameters()).is_cuda:
        modes["eager, CUDA graph"] = accelerate_
        modes["compile, CUDA graphs"] = lambda m: torch.compile(m, dynamic=False, mode="reduce-overhead")
    if max_autotune:
        modes["max-autotune"] = lambda m: torch.compile(m, dynamic=False, mode="max-autotune")
    variants: dict[str, Any] = {}
    for mode, compiled in modes.items():
        for fused in (False, True) if has_fused_attention(model) else (False,):
            variants[f"timm {mode}{', fused' if fused else ''}"] = compiled(with_fused_attention(model, fused))
    return variants


def frozen_variant(model: nn.Module) -> Any:
    """B2f: fused attention, compiled with Inductor's freezing, which packs the weights for oneDNN on a CPU.

    An option few users know; it changes no rule of B2 and is told beside it.
    """
    return torch.compile(with_fused_attention(model, True), dynamic=False, options={"freezing": True})


def has_fused_attention(model: nn.Module) -> bool:
    """True where timm's attention has a fused form: in V1."""
    return any(isinstance(module, WindowAttention) for module in model.modules())


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
    others, reverses, crops and rolls back; attention masks are built in every forward. Attention and layers are timm's.
    Same numbers as ours.
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
    """(B, H, W, C) rolled, padded and cut into all windows: (B, n, N, C)."""
    batch, height, width, channels = x.shape
    (wh, ww), (sh, sw) = block.window_size, block.shift_size
    rows, cols = windows.window_grid(height, width, block.window_size)
    x = torch.roll(x, shifts=(-sh, -sw), dims=(1, 2)) if sh or sw else x
    x = nn.functional.pad(x, (0, 0, 0, cols * ww - width, 0, rows * wh - height))
    parts: Tensor = window_partition(x, (wh, ww))
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
    merged: Tensor = window_reverse(parts.reshape(-1, wh, ww, channels), (wh, ww), rows * wh, cols * ww)
    merged = merged[:, :height, :width].contiguous()
    return merged.roll(shifts=(sh, sw), dims=(1, 2)) if sh or sw else merged


def authors_flow(model: nn.Module) -> nn.Module | None:
    """A copy of a sparse model at its ratios, with the authors' data flow (B0); None where it is not a V1."""
    if any(type(stage) is not SparseSwinTransformerStage for stage in sparse_stages(model)):
        return None
    clone = copy.deepcopy(model)
    for stage in sparse_stages(clone):
        stage.__class__ = AuthorsFlowStage
    return clone


Memory = dict[Any, Any]
"""What an oracle knows of one model and one batch of images: the windows kept, and rows that follow each other."""


def foreseen(model: nn.Module, x: Tensor) -> Memory:
    """What `oracle` needs: the windows that `model` keeps of images `x`, found in one forward."""
    memory: Memory = {}
    with evaluating(model), kernels.using(partial(ForeseeingEngine, memory=memory)):
        model(x)
    return memory


@contextmanager
def oracle(memory: Memory) -> Iterator[None]:
    """O: our kernels on equally many windows and tokens, whose rows follow each other, without scores and ranking.

    Inside the block every engine is an `OracleEngine`. Outputs mean nothing. What a sparse model takes longer than this
    is the sparsity tax. `memory` is what was `foreseen` for this model and shape.
    """
    with kernels.using(partial(OracleEngine, memory=memory, moves=FollowingMoves(memory))):
        yield


class ForeseeingEngine(kernels.EngineAround):
    """`inner`; it notes in `memory` the windows that it ranks, with rows that follow each other."""

    def __init__(self, inner: kernels.Engine, memory: Memory) -> None:
        super().__init__(inner)
        self.memory = memory

    def score_and_rank(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance
    ) -> list[Kept]:
        found = super().score_and_rank(x, token_indices, count, importance)
        self.memory[_ranking_key(x, count)] = [_followed(kept, x.shape[0] * x.shape[1] * x.shape[2]) for kept in found]
        return found


class OracleEngine(kernels.EngineAround):
    """`inner` without scores and ranking, which `memory` knows, and with `moves` that follow each other."""

    def __init__(self, inner: kernels.Engine, memory: Memory, moves: FollowingMoves) -> None:
        super().__init__(inner.with_moves(moves))
        self.memory = memory

    def score_and_rank(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance
    ) -> list[Kept]:
        return self.memory[_ranking_key(x, count)]  # type: ignore[no-any-return]


class FollowingMoves(kernels.Moves):
    """Instead of gather and scatter a chunk is read at the place after the last one, and copied back there.

    Kernels that move rows themselves get rows that follow each other, which `memory` keeps.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._place = 0

    def rows_of(self, keep_indices: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
        key = (token_index.shape, keep_indices.shape, num_tokens)
        if key not in self.memory:
            rows = super().rows_of(keep_indices, token_index, num_tokens)
            self.memory[key] = _following(rows, len(keep_indices) * num_tokens)
        return self.memory[key]  # type: ignore[no-any-return]

    def all_windows(self, height: int, width: int, *partition: Any) -> Kept:
        key = (height, width, *partition)
        if key not in self.memory:
            found = super().all_windows(height, width, *partition)
            self.memory[key] = _followed(found, len(found.rows) * height * width)
        return self.memory[key]  # type: ignore[no-any-return]

    def gather_rows(self, tokens: Tensor, rows: Tensor) -> Tensor:
        if len(rows) > len(tokens):  # with padding that is computed
            return tokens.index_select(0, rows)
        self._place = self._place if self._place + len(rows) <= len(tokens) else 0
        return tokens.narrow(0, self._place, len(rows))

    def scatter_rows_(self, tokens: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        if len(rows) > len(tokens):
            return tokens.index_copy_(0, rows, values)
        tokens.narrow(0, self._place, len(rows)).copy_(values)
        self._place += len(rows)
        return tokens


def _ranking_key(x: Tensor, count: int) -> Any:
    return x.shape, count


def _followed(kept: Kept, num_tokens: int) -> Kept:
    """`kept` of maps of `num_tokens` tokens together (B*H*W), with rows that follow each other."""
    rows = _following(kept.rows, num_tokens)
    return kept._replace(rows=rows, places=None if kept.places is None else windows.token_places(rows, num_tokens))


def _following(rows: Tensor, padding: int) -> Tensor:
    """Rows (B, K, N) that follow each other, and row `padding` for the padding among them."""
    is_token = rows != padding
    return torch.where(is_token, is_token.flatten().cumsum(0).view_as(rows) - 1, padding)
