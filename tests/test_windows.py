"""Window arithmetic against timm's roll, pad and partition, and against exact fractions."""

from __future__ import annotations

import inspect
from fractions import Fraction
from math import floor
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.swin_transformer import window_partition

from sparsevit_cli import windows
from sparsevit_cli.kernels import held


def test_num_keep_is_exact_for_every_count() -> None:
    for count in range(1, 1001):
        for tenths in range(9):
            exact = floor(Fraction(count) * (1 - Fraction(tenths, 10)))
            assert windows.num_keep(count, tenths) == max(1, exact)
    assert [windows.num_keep(*case) for case in ((576, 6), (9, 6), (100, 8))] == [230, 3, 20]


@given(
    height=st.integers(1, 23), width=st.integers(1, 23), window=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    shifted=st.booleans(), partition=st.sampled_from(windows.PARTITIONS),
)  # fmt: skip
def test_token_index_is_roll_pad_partition(
    height: int, width: int, window: tuple[int, int], shifted: bool, partition: windows.Partition
) -> None:
    shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
    rows = torch.arange(1, height * width + 1).view(1, height, width, 1)  # 0 is left for padding
    grid = windows.window_grid(height, width, window)

    def rolled(x: torch.Tensor) -> torch.Tensor:
        return torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))

    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, grid[1] * window[1] - width, 0, grid[0] * window[0] - height))

    shifted_map = rolled(padded(rows)) if partition == "pad_first" else padded(rolled(rows))
    expected = window_partition(shifted_map, window).view(-1, window[0] * window[1])

    index = windows.window_token_index(height, width, window, shift, partition, torch.device("cpu"))
    assert torch.equal((index + 1) % (height * width + 1), expected)
    assert windows.has_padding(height, width, window) == bool((index == height * width).any())
    assert (index != height * width).any(1).all()  # every window holds a token

    assert held.all_windows(height, width, window, shift, partition, 2, torch.device("cpu")).places is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "is_asynchronous", lambda device: True)
        every = held.all_windows(height, width, window, shift, partition, 2, torch.device("cpu"))
    assert torch.equal(every.indices, torch.arange(len(index)).expand(2, -1))
    assert torch.equal(every.rows, windows.rows_of(every.indices, index, height * width))
    assert (every.places is not None) == windows.has_padding(height, width, window)
    if every.places is not None:
        assert torch.equal(every.rows.flatten()[every.places], torch.arange(2 * height * width))


def test_an_index_is_kept_and_made_by_the_same_arguments() -> None:
    made, kept = (inspect.signature(function) for function in (windows.window_token_index, held.token_index_of))
    assert list(made.parameters) == list(kept.parameters)
    sizes: tuple[int, int, tuple[int, int], tuple[int, int]] = (9, 20, (7, 7), (3, 3))
    for partition in get_args(windows.Partition):
        device = torch.device("cpu")
        found = held.token_index_of(*sizes, partition, device)
        assert torch.equal(found, windows.window_token_index(*sizes, partition, device))


@given(batch=st.integers(1, 3), side=st.integers(2, 12), seed=st.integers(0, 99))
def test_scores_are_norms_of_the_window(batch: int, side: int, seed: int) -> None:
    x = torch.randn(batch, side, side, 5, generator=torch.Generator().manual_seed(seed))
    index = windows.window_token_index(side, side, (4, 4), (2, 2), "roll_first", x.device)
    padded = torch.nn.functional.pad(x.flatten(1, 2), (0, 0, 0, 1))[:, index]  # B, n, N, C
    l2 = windows.window_scores(windows.token_magnitude(x, "l2"), index)
    torch.testing.assert_close(l2, padded.flatten(2).norm(dim=-1))
    mean_abs = windows.window_scores(windows.token_magnitude(x, "mean_abs_l2"), index)
    torch.testing.assert_close(mean_abs, padded.abs().mean(-1).norm(dim=-1))


@pytest.mark.parametrize("importance", ["mean_abs_l2", "l2"])
def test_a_map_of_16_bits_is_scored_in_float32(importance: windows.Importance) -> None:
    x = torch.randn(2, 6, 5, 96).to(torch.bfloat16)
    magnitude = windows.token_magnitude(x, importance)
    assert magnitude.dtype == torch.float32
    assert torch.allclose(magnitude, windows.token_magnitude(x.float(), importance), rtol=1e-6)


@given(count=st.integers(1, 60), tied=st.booleans())
def test_ranking_has_the_prefix_property(count: int, tied: bool) -> None:
    scores = torch.randint(0, 3, (2, count)).float() if tied else torch.randn(2, count)
    full = windows.rank_windows(scores, count)
    best = windows.num_keep(count, 3)
    ranked = windows.rank_windows(scores, best)
    for tenths in range(3, 9):
        kept = ranked[:, : windows.num_keep(count, tenths)]
        values = scores.gather(1, kept)
        assert torch.equal(values, scores.gather(1, full)[:, : kept.shape[1]])
        assert all(len(set(row.tolist())) == kept.shape[1] for row in kept)


def test_random_scores_are_a_function_of_seed_image_and_window() -> None:
    scores = windows.random_scores(2, 100, seed=3, device=torch.device("cpu"))
    assert torch.equal(scores, windows.random_scores(2, 100, seed=3, device=torch.device("cpu")))
    assert torch.equal(scores[:, :50], windows.random_scores(2, 50, seed=3, device=torch.device("cpu")))
    assert not torch.equal(scores[0], scores[1])
    assert not torch.equal(scores, windows.random_scores(2, 100, seed=4, device=torch.device("cpu")))
    assert scores.min() >= 0
    assert scores.max() < 1
    assert abs(windows.random_scores(1, 10000, 0, torch.device("cpu")).mean() - 0.5) < 0.02
