"""The race of a search's best candidates, with scores that are looked up in a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest

from sparsevit_cli.data.splits import fixed_subset
from sparsevit_cli.search.race import Race, is_worse, race
from sparsevit_cli.sparsity import SparsityConfig

CONFIGS = [SparsityConfig(((tenths,), (other,))) for tenths in range(8) for other in (0, 1)]


def run(truth: Sequence[float], noise: float, *, laps: int, keep: int, seed: int = 0) -> tuple[Race, Counter[int]]:
    """A race of candidates with these true scores, and how many ran each lap. A lap shifts all of them alike."""
    ran: Counter[int] = Counter()

    def score(place: int, lap: int) -> float:
        return truth[place] + 10 * Random(f"{seed}/{lap}").gauss() + noise * Random(f"{seed}/{lap}/{place}").gauss()

    def run_lap(configs: Sequence[SparsityConfig], lap: int) -> list[float]:
        ran[lap] += len(configs)
        return [score(CONFIGS.index(config), lap) for config in configs]

    entrants = {config: score(place, 0) for place, config in enumerate(CONFIGS[: len(truth)])}
    ordered = sorted(entrants, key=lambda config: -entrants[config])
    return race({config: entrants[config] for config in ordered}, run_lap, laps=laps, keep=keep), ran


def test_the_better_half_stays_each_time_the_images_have_doubled() -> None:
    found, ran = run([0.0] * 16, 1.0, laps=9, keep=2)
    assert ran[1] == 16
    assert ran[2] <= 8
    assert ran[4] <= 4
    assert sorted(found.order) == CONFIGS
    assert [len(found.scores[config]) for config in found.order][:2] == [max(ran) + 1] * 2


def test_differences_that_all_laps_share_drop_candidates_before_the_images_have_doubled() -> None:
    found, ran = run([5.0, 4.9, *[0.0] * 6], 0.3, laps=16, keep=2)
    assert [ran[1], ran[2], ran[3]] == [8, 4, 0]  # what is far behind after three laps runs no fourth one
    assert set(found.order[:2]) == set(CONFIGS[:2])


def test_more_images_name_the_best_more_often_than_the_first_ones_alone() -> None:
    truth = [1.0, *[0.0] * 15]
    first = raced = 0
    for seed in range(60):
        found, _ = run(truth, 1.0, laps=8, keep=2, seed=seed)
        entered = list(found.scores)
        first += CONFIGS[0] in entered[:2]
        raced += CONFIGS[0] in found.order[:2]
    assert raced > first + 10


def test_equal_scores_keep_the_order_in_which_they_entered() -> None:
    entrants = dict.fromkeys(CONFIGS[:6], 50.0)
    found = race(entrants, lambda configs, lap: [50.0] * len(configs), laps=8, keep=3)
    assert found.order == tuple(entrants)
    assert {len(scores) for scores in found.scores.values()} == {2}  # the half stays, so that nobody runs a third lap


@pytest.mark.parametrize(("laps", "keep"), [(0, 2), (1, 2), (8, 6), (8, 9)])
def test_nothing_is_run_without_laps_or_with_few_candidates(laps: int, keep: int) -> None:
    found = race(dict.fromkeys(CONFIGS[:6], 1.0), pytest.fail, laps=laps, keep=keep)
    assert found.order == tuple(CONFIGS[:6])


def test_a_difference_that_chance_explains_is_none() -> None:
    assert not is_worse([0, 0], [9, 9])  # of two laps nobody can tell
    assert is_worse([1, 2, 3], [3, 4.1, 5])
    assert not is_worse([1, 9, 2], [3, 4, 6])
    assert not is_worse([3, 4, 5], [3, 4, 5])
    assert not is_worse([5, 5, 5.1], [3, 4, 5])


def test_laps_hold_no_image_twice() -> None:
    seen = [fixed_subset(50, 16, 3, lap * 16) for lap in range(4)]
    assert sorted(number for lap in seen for number in lap) == list(range(50))
    assert seen[0] == fixed_subset(50, 16, 3)
