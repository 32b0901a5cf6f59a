"""What a sparse model is measured against: the best dense timm a user can get, the authors' data flow, an oracle.

Letters are those of the benchmark's table: B0 the authors' flow at equal ratios, B2 the dense variants, O the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit_cli import kernels, windows
from sparsevit_cli.acceleration import accelerate_
from sparsevit_cli.swin.fused import has_fused_attention, with_fused_attention

from .inputs import evaluating
from .timeline import replaced

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


Memory = dict[Any, Any]
"""What an oracle knows of one model and one batch of images."""


def foreseen(model: nn.Module, x: Tensor) -> Memory:
    """What `oracle` needs: the windows that `model` keeps of images `x`, found in one forward."""
    memory: Memory = {}
    real = kernels.chosen_ranking

    def watched(name: str, device: torch.device) -> kernels.ScoreAndRank:
        def score_and_rank(x: Tensor, token_indices: Any, count: int, importance: Any) -> list[tuple[Tensor, Tensor]]:
            found = real(name, device)(x, token_indices, count, importance)
            num_rows = x.shape[0] * x.shape[1] * x.shape[2]
            memory[_ranking_key(x, count)] = [(keep, _following(rows, num_rows)) for keep, rows in found]
            return found

        return score_and_rank

    with evaluating(model), replaced(kernels, {"chosen_ranking": watched}):
        model(x)
    return memory


@contextmanager
def oracle(memory: Memory) -> Iterator[None]:
    """O: our kernels on equally many windows and tokens, whose rows follow each other, without scores and ranking.

    Instead of gather and scatter a chunk is read where it stands, and written back by one plain copy; kernels that move
    rows themselves get rows that follow each other. The outputs mean nothing. What a sparse model takes longer than
    this is the sparsity tax. `memory` is what was `foreseen` for this model and shape.
    """
    place, flat_rows = [0], windows.flat_rows

    def read(tokens: Tensor, rows: Tensor) -> Tensor:
        if len(rows) > len(tokens):  # with padding that is computed
            return tokens.index_select(0, rows)
        place[0] = place[0] if place[0] + len(rows) <= len(tokens) else 0
        return tokens.narrow(0, place[0], len(rows))

    def write(tokens: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        if len(rows) > len(tokens):
            return tokens.index_copy_(0, rows, values)
        tokens.narrow(0, place[0], len(rows)).copy_(values)
        place[0] += len(rows)
        return tokens

    def all_following(token_index: Tensor, keep_indices: Tensor, num_tokens: int, *, scratch_row: bool) -> Tensor:
        key = (token_index.shape, keep_indices.shape, num_tokens)
        if key not in memory:
            rows = flat_rows(token_index, keep_indices, num_tokens, scratch_row=scratch_row)
            memory[key] = _following(rows, len(keep_indices) * num_tokens)
        return memory[key]  # type: ignore[no-any-return]

    def known(x: Tensor, token_indices: Any, count: int, importance: Any) -> list[tuple[Tensor, Tensor]]:
        return memory[_ranking_key(x, count)]  # type: ignore[no-any-return]

    moves: dict[str, Callable[..., Any]] = {"flat_rows": all_following, "gather_rows": read, "scatter_rows_": write}
    ranking: dict[str, Callable[..., Any]] = {"chosen_ranking": lambda name, device: known}
    with windows.held_indices(memory), replaced(windows, moves), replaced(kernels, ranking):
        yield


def _ranking_key(x: Tensor, count: int) -> Any:
    return x.shape, count


def _following(rows: Tensor, padding: int) -> Tensor:
    """Rows (B, K, N) that follow each other, `padding` where it was."""
    is_token = rows != padding
    return torch.where(is_token, is_token.flatten().cumsum(0).view_as(rows) - 1, padding)
