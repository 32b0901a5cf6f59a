"""What a sparse model is measured against: the best dense timm a user can get, the authors' data flow, an oracle.

Letters are those of the benchmark's table: B0 the authors' flow at equal ratios, B2 the dense variants, O the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit_cli import kernels, windows
from sparsevit_cli.acceleration import accelerate_
from sparsevit_cli.swin.fused import has_fused_attention, with_fused_attention
from sparsevit_cli.windows import Importance, Kept

from .inputs import evaluating

Compile = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Variant:
    """A way to run dense timm: `run(images)`. `counted` is the module that it has its figures from."""

    label: str
    run: Any
    counted: nn.Module
    is_eager: bool


def dense_variants(model: nn.Module, *, max_autotune: bool = False) -> list[Variant]:
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
    variants = []
    for mode, compiled in modes.items():
        for fused in (False, True) if has_fused_attention(model) else (False,):
            counted = with_fused_attention(model, fused)
            label = f"timm {mode}{', fused' if fused else ''}"
            variants.append(Variant(label, compiled(counted), counted, mode == "eager"))
    return variants


def frozen_variant(model: nn.Module) -> Any:
    """B2f: fused attention, compiled with Inductor's freezing, which packs the weights for oneDNN on a CPU.

    An option few users know; it changes no rule of B2 and is told beside it.
    """
    return torch.compile(with_fused_attention(model, True), dynamic=False, options={"freezing": True})


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
