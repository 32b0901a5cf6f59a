"""Latency on a fake clock: candidates move the time themselves, so every number here is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsevit_cli.errors import ConfigError, MeasurementError, ResourceError, UnsteadyError
from sparsevit_cli.profiling.latency import (
    Latency,
    count_outliers,
    has_drift,
    measure_interleaved,
    measure_latency,
    median_interval,
    median_rank,
)

CPU = torch.device("cpu")


class FakeMachine:
    """A clock that only candidates move, and the order in which they ran."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.ran: list[str] = []

    def clock(self) -> int:
        return self.now_ns

    def candidate(self, name: str, ms: Callable[[int], float] | float) -> Callable[[], None]:
        """`ms` may depend on how many calls of any candidate came before."""

        def run() -> None:
            self.now_ns += round((ms(len(self.ran)) if callable(ms) else ms) * 1e6)
            self.ran.append(name)

        return run


def test_ranks_of_the_interval_are_those_of_the_tables() -> None:
    assert [median_rank(n) for n in (6, 30, 100)] == [1, 10, 40]


@given(st.integers(6, 300))
def test_interval_covers_the_median_at_95_percent_and_no_narrower_one_does(n: int) -> None:
    def coverage(rank: int) -> float:
        return 1 - 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n

    assert coverage(median_rank(n)) >= 0.95 > coverage(median_rank(n) + 1)


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=60))
def test_statistics_are_ordered(samples: list[float]) -> None:
    latency = Latency.from_samples(samples)
    low, high = median_interval(samples)
    assert min(samples) <= latency.low_ms == low <= latency.median_ms <= latency.high_ms == high <= max(samples)
    assert latency.iqr_ms >= 0
    assert latency.samples_ms == tuple(samples)
    assert latency.speedup == latency.speedup_low == latency.speedup_high == 1


def test_median_iqr_and_p90_of_known_samples() -> None:
    latency = Latency.from_samples([float(n) for n in range(1, 102)])
    assert (latency.median_ms, latency.iqr_ms, latency.p90_ms, latency.rounds) == (51, 50, 91, 101)
    assert float(latency) == 51
    assert latency.spread == pytest.approx(50 / 51)


def test_candidates_get_their_times_and_the_ratio_to_the_first() -> None:
    machine = FakeMachine()
    candidates = {"dense": machine.candidate("dense", 8.0), "sparse": machine.candidate("sparse", 2.0)}
    result = measure_interleaved(candidates, device=CPU, seconds=0.5, rounds=30, clock=machine.clock)
    assert result["dense"].median_ms == result["dense"].low_ms == 8
    assert result["sparse"].median_ms == result["sparse"].p90_ms == 2
    assert (result["dense"].speedup, result["sparse"].speedup, result["sparse"].speedup_low) == (1, 4, 4)
    for latency in result.values():
        assert latency.stable
        assert latency.rounds >= 30
        assert latency.calls_per_sample * latency.median_ms >= 10
        assert latency.rounds * latency.calls_per_sample * latency.median_ms >= 500


def test_every_round_runs_each_candidate_once_in_a_seeded_random_order() -> None:
    def order(seed: int) -> list[str]:
        machine = FakeMachine()
        names = ["a", "b", "c"]
        candidates = {name: machine.candidate(name, 20.0) for name in names}
        measure_interleaved(candidates, device=CPU, seconds=0.1, rounds=30, seed=seed, clock=machine.clock)
        return machine.ran[2 * len(names) :]  # one call to compile, one to size the block

    first = order(0)
    rounds = [tuple(first[i : i + 3]) for i in range(0, len(first), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) == 6
    assert order(0) == first != order(1)


def test_a_machine_that_slows_down_changes_times_but_not_the_ratio() -> None:
    machine = FakeMachine()
    candidates = {
        "dense": machine.candidate("dense", lambda calls: 20 * (1 + calls / 1000)),
        "sparse": machine.candidate("sparse", lambda calls: 10 * (1 + calls / 1000)),
    }
    result = measure_interleaved(
        candidates, device=CPU, seconds=0.1, rounds=100, max_spread=0.5, strict=False, clock=machine.clock
    )
    assert result["sparse"].speedup == pytest.approx(2, rel=0.01)
    assert result["sparse"].iqr_ms > 0.5


def test_a_cold_start_is_no_sample() -> None:
    machine = FakeMachine()
    candidate = machine.candidate("model", lambda calls: 500 if calls < 4 else 20)
    latency = measure_interleaved({"model": candidate}, device=CPU, seconds=0.1, rounds=30, clock=machine.clock)
    assert max(latency["model"].samples_ms) == 20


def test_warm_up_lasts_until_times_settle() -> None:
    machine = FakeMachine()
    candidate = machine.candidate("model", lambda calls: max(20.0, 40 - calls))
    latency = measure_interleaved(
        {"model": candidate}, device=CPU, seconds=0.1, rounds=30, warmup_seconds=0.5, clock=machine.clock
    )
    assert max(latency["model"].samples_ms) == 20


def noisy(machine: FakeMachine, name: str, ms: float, spread: float, seed: int) -> Callable[[], None]:
    rng = Random(f"{name}{seed}")
    return machine.candidate(name, lambda _: ms * math.exp(spread * rng.gauss(0, 1)))


def test_the_same_model_twice_is_equal_and_ten_percent_slower_is_found() -> None:
    """100 sessions, 3 % noise: A/A within 3 % and seldom "different", A/B found; 95 are expected."""
    equal = calm = found = 0
    for seed in range(100):
        machine = FakeMachine()
        candidates = {
            "a": noisy(machine, "a", 20, 0.03, seed),
            "a again": noisy(machine, "again", 20, 0.03, seed),
            "b": noisy(machine, "b", 22, 0.03, seed),
        }
        result = measure_interleaved(candidates, device=CPU, seconds=0.5, rounds=30, seed=seed, clock=machine.clock)
        again, slower = result["a again"], result["b"]
        equal += abs(again.speedup - 1) <= 0.03
        calm += again.speedup_low <= 1 <= again.speedup_high
        found += slower.speedup_high < 1 and 1 / 1.13 <= slower.speedup <= 1 / 1.07
    assert equal >= 95
    assert calm >= 90
    assert found >= 95


def test_unsteady_times_are_measured_again_and_then_refused() -> None:
    machine = FakeMachine()
    candidate = noisy(machine, "model", 20, 0.5, 0)
    settings = {"device": CPU, "seconds": 0.1, "rounds": 30, "warmup_seconds": 0.01, "clock": machine.clock}
    with pytest.raises(MeasurementError, match=r"latency of model: .*10% allowed\), after 3 repetitions") as caught:
        measure_interleaved({"model": candidate}, retries=3, **settings)
    assert caught.value.exit_code == 8
    assert len(machine.ran) == 2 + 10 + 4 * 30
    latency = measure_interleaved({"model": candidate}, retries=1, strict=False, **settings)["model"]
    assert not latency.stable
    assert latency.spread > 0.1
    assert measure_interleaved({"model": candidate}, max_spread=2.0, **settings)["model"].stable


@pytest.mark.parametrize("retries", [0, 1])
def test_a_reference_that_spreads_spoils_every_row(retries: int) -> None:
    """Two equal models, the reference disturbed: no speed-up of 3 may be called steady."""
    machine = FakeMachine()
    rng = Random(0)
    candidates = {"a": machine.candidate("a", lambda _: 10 * rng.choice([1, 3, 6])), "b": machine.candidate("b", 10.0)}
    settings = {"device": CPU, "seconds": 0.1, "rounds": 30, "warmup_seconds": 0.01, "clock": machine.clock}
    found = measure_interleaved(candidates, retries=retries, strict=False, **settings)
    assert not any(latency.stable for latency in found.values())
    with pytest.raises(UnsteadyError, match="samples of a spread"):
        measure_interleaved(candidates, retries=retries, **settings)


def test_a_steady_reference_is_kept_while_another_row_is_measured_again() -> None:
    machine = FakeMachine()
    rng = Random(0)
    first = {"a": machine.candidate("a", 10.0), "b": machine.candidate("b", 20.0)}
    late = machine.candidate("c", lambda calls: 10 * (rng.choice([1, 2]) if calls < 200 else 1))
    found = measure_interleaved(
        {**first, "c": late}, device=CPU, seconds=0.1, rounds=30, warmup_seconds=0.01, clock=machine.clock
    )
    assert all(latency.stable for latency in found.values())
    assert (found["b"].speedup, found["c"].speedup) == (0.5, 1)
    assert machine.ran.count("a") > machine.ran.count("b")


def test_a_busy_neighbour_that_leaves_costs_one_repetition() -> None:
    machine = FakeMachine()
    rng = Random(0)
    candidate = machine.candidate("model", lambda calls: 20 * (rng.uniform(1, 3) if calls < 42 else 1))
    latency = measure_interleaved(
        {"model": candidate}, device=CPU, seconds=0.1, rounds=30, warmup_seconds=0.01, clock=machine.clock
    )["model"]
    assert latency.stable
    assert set(latency.samples_ms) == {20.0}


def test_a_step_of_the_reference_is_a_drift_even_where_the_spread_is_small() -> None:
    assert has_drift([100.0 + n % 3 for n in range(15)] + [106.0 + n % 3 for n in range(15)], 0.03)
    assert not has_drift([100.0 + n % 3 for n in range(30)], 0.03)
    assert not has_drift([100.0 + n % 3 for n in range(15)] + [102.0 + n % 3 for n in range(15)], 0.03)


def test_outliers_are_counted_and_kept() -> None:
    samples = [20.0 + n % 5 for n in range(40)] + [2000.0]
    assert count_outliers(samples) == 1
    assert max(Latency.from_samples(samples).samples_ms) == 2000
    assert count_outliers(samples[:-1]) == 0


@pytest.mark.parametrize("setting", [{"seconds": 0}, {"rounds": 0}, {"max_spread": 0}, {"retries": -1}])
def test_settings_without_sense_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        measure_interleaved({"model": lambda: None}, device=CPU, **setting)
    with pytest.raises(ConfigError, match="0 candidates"):
        measure_interleaved({}, device=CPU)


class Recorder(nn.Module):
    """Records what it is given; one parameter, a dropout to see the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4)
        self.drop = nn.Dropout(0.5)
        self.seen: list[tuple[torch.Size, torch.dtype, bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.shape, x.dtype, self.training, torch.is_grad_enabled()))
        return self.drop(self.conv(x))


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (16, (2, 3, 16, 16)),
        ((16, 24), (2, 3, 16, 24)),
        ((3, 8, 12), (2, 3, 8, 12)),
        (torch.zeros(5, 3, 4, 4), (5, 3, 4, 4)),
    ],
)
def test_measure_latency_runs_the_model_in_eval_and_leaves_it_as_it_was(
    size: int | tuple[int, ...] | torch.Tensor, shape: tuple[int, ...]
) -> None:
    model = Recorder().train()
    model.conv.eval()
    latency = measure_latency(model, size, batch_size=2, seconds=0.01, rounds=6, retries=0)
    assert latency.median_ms > 0
    assert set(model.seen) == {(torch.Size(shape), torch.float32, False, False)}
    assert (model.training, model.conv.training, model.drop.training) == (True, False, True)


def test_another_dtype_is_measured_on_a_copy() -> None:
    model = Recorder()
    assert measure_latency(model, 8, dtype=torch.bfloat16, seconds=0.01, rounds=6, retries=0).median_ms > 0
    assert model.conv.weight.dtype is torch.float32
    assert not model.seen


def test_sizes_that_are_none_are_refused() -> None:
    for size in (0, (3, 3, 8, 8), (8,), (8, -8), torch.zeros(3, 8, 8)):
        with pytest.raises(ConfigError, match="input size"):
            measure_latency(Recorder(), size)
    with pytest.raises(ConfigError, match="batch size"):
        measure_latency(Recorder(), 8, batch_size=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes."),
    ],
)
def test_out_of_memory_names_the_candidate(error: Exception) -> None:
    def candidate() -> None:
        raise error

    with pytest.raises(ResourceError, match=r"latency of big: .*never changes the batch") as caught:
        measure_interleaved({"big": candidate}, device=CPU)
    assert caught.value.exit_code == 7


def test_other_errors_pass_through() -> None:
    def candidate() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        measure_interleaved({"model": candidate}, device=CPU)
