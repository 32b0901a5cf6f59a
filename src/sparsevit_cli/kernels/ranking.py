"""Which windows are kept, and where their tokens stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from sparsevit_cli import windows


def score_and_rank(
    x: Tensor, token_indices: Sequence[Tensor], count: int, importance: windows.Importance
) -> list[tuple[Tensor, Tensor]]:
    """Windows kept of maps x (B, H, W, C), and the rows of their tokens, for one or two partitions.

    Each of `token_indices` (n, N) is one of `windows`, all of one shape. Returns for each of them indices (B, count),
    best first, and rows (B, count, N) in 0 ... B*H*W. Scores are those of `windows`: `mean_abs_l2` or `l2`.
    """
    magnitude = windows.token_magnitude(x, importance)
    scores = (windows.window_scores(magnitude, index) for index in token_indices)
    return rank(scores, token_indices, count, x.shape[1] * x.shape[2])


def rank(
    scores: Iterable[Tensor], token_indices: Sequence[Tensor], count: int, num_tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """The same from scores (B, n) of each partition, for maps of `num_tokens` tokens."""
    kept = [windows.rank_windows(values, count) for values in scores]
    return [(keep, rows_of(keep, index, num_tokens)) for keep, index in zip(kept, token_indices, strict=True)]


def rows_of(keep_indices: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
    """Rows (B, K, N) of the tokens of windows `keep_indices` (B, K); padding, where there is any, stands at B*H*W."""
    padded = token_index.numel() != num_tokens
    return windows.flat_rows(token_index, keep_indices, num_tokens, scratch_row=padded)
