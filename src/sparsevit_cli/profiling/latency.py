"""Latency: interleaved blocks of calls, medians with an interval, speed-ups from the same rounds.

One round times one block of every candidate, in random order, so that a drift of the machine meets all of them. A
block is as many calls as fill `block_ms`; a sample is the time per call of one block. Rounds beside a busy neighbour
are taken again (`neighbours`).
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from statistics import median

import torch
from torch import nn

from sparsevit_cli.errors import ConfigError

from .device import synchronize
from .inputs import InputSize, Measured, evaluating, model_dtype
from .memory import memory_errors
from .neighbours import UNWATCHED, Disturbed, Patience, Vigil, unsteady
from .workload import image_workload

Candidate = Callable[[], object]
Clock = Callable[[], int]
"""Nanoseconds of a steady clock, such as `time.perf_counter_ns`."""
Stopwatch = Callable[[Candidate, int], float]
"""Milliseconds that so many calls of a candidate take together."""

OUTLIER_Z = 14.8
WARMUP_ROUNDS = 10
WARMUP_DRIFT = 0.02
WARMUP_CAP = 3.0
DRIFT_SHARE = 0.3
ROUNDS_OF_A_LOOK = 1
"""Rounds beside a neighbour that does not leave: numbers to show as unsteady, and nothing more."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Latency(Measured):
    """Milliseconds per call (one batch) of one candidate. `low` and `high` bound the median at 95 %.

    `speedup` is the reference's time over this one's, the median of the rounds' own ratios. Outliers are counted,
    never removed. `unsteady` says why the numbers are not to be relied on: a neighbour, the spread, a drift; else "".
    """

    median_ms: float
    low_ms: float
    high_ms: float
    iqr_ms: float
    p90_ms: float
    rounds: int
    outliers: int
    samples_ms: tuple[float, ...]
    speedup: float = 1.0
    speedup_low: float = 1.0
    speedup_high: float = 1.0
    calls_per_sample: int = 1
    unsteady: str = ""

    def __float__(self) -> float:
        return self.median_ms

    @property
    def stable(self) -> bool:
        """True where the numbers may decide something."""
        return not self.unsteady

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return self.iqr_ms / self.median_ms

    def as_row(self) -> dict[str, float]:
        """Latency and speed-up, each with its 95 % interval, under the names that rows of reports have."""
        return {
            "latency_ms": self.median_ms, "latency_ms_low": self.low_ms, "latency_ms_high": self.high_ms,
            "speedup": self.speedup, "speedup_low": self.speedup_low, "speedup_high": self.speedup_high,
        }  # fmt: skip

    @classmethod
    def from_samples(cls, samples_ms: Sequence[float], reference_ms: Sequence[float] | None = None) -> Latency:
        """Statistics of samples; `reference_ms` are the reference's samples of the same rounds."""
        ordered = sorted(samples_ms)
        low, high = median_interval(samples_ms)
        speedups = [r / s for r, s in zip(reference_ms or samples_ms, samples_ms, strict=True)]
        speedup_low, speedup_high = median_interval(speedups)
        return cls(
            median_ms=median(ordered),
            low_ms=low,
            high_ms=high,
            iqr_ms=quantile(ordered, 0.75) - quantile(ordered, 0.25),
            p90_ms=quantile(ordered, 0.9),
            rounds=len(ordered),
            outliers=count_outliers(ordered),
            samples_ms=tuple(samples_ms),
            speedup=median(speedups),
            speedup_low=speedup_low,
            speedup_high=speedup_high,
        )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Quantile of sorted values, linear between neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@lru_cache
def median_rank(count: int) -> int:
    """Rank r, from 1, such that order statistics r and count + 1 - r hold the median with at least 95 %.

    The binomial test's interval: 10 of 30, 40 of 100. Below six values no such interval exists: 1.
    """
    rank, cumulative = 0, 0
    while 40 * (cumulative := cumulative + math.comb(count, rank)) <= 2**count:
        rank += 1
    return max(rank, 1)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics; least and largest value where there are below six."""
    rank = median_rank(len(values))
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]


def count_outliers(values: Sequence[float]) -> int:
    """Values whose modified z-score (0.6745 * |x - median| / median absolute deviation) is above 14.8."""
    middle = median(values)
    deviations = [abs(value - middle) for value in values]
    return sum(0.6745 * deviation > OUTLIER_Z * median(deviations) for deviation in deviations)


def measure_latency(
    model: nn.Module,
    input_size: InputSize = 224,
    *,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seconds: float = 3.0,
    rounds: int = 30,
    max_spread: float = 0.10,
    retries: int = 3,
    strict: bool = False,
    seed: int = 0,
    clock: Clock | None = None,
    patience: Patience | None = None,
) -> Latency:
    """Milliseconds per batch of `model` in evaluation mode, on its own or another device and in another dtype.

    `input_size` is a side, (H, W), (C, H, W) or an example batch (then `batch_size` is not used). The model is
    not changed: another device or dtype works on a copy. An unsteady measurement is returned with `stable` False,
    or raises MeasurementError where `strict`. Other settings as in `measure_interleaved`. Raises ConfigError,
    ResourceError.
    """
    dtype = dtype or model_dtype(model)
    workload = image_workload(model, input_size, batch_size, device=device, dtype=dtype, seed=seed)
    with evaluating(workload.model):
        return measure_interleaved(
            {"model": workload.run},
            device=workload.device,
            seconds=seconds,
            rounds=rounds,
            seed=seed,
            max_spread=max_spread,
            retries=retries,
            strict=strict,
            clock=clock,
            patience=patience,
        )["model"]


def measure_interleaved(
    candidates: Mapping[str, Candidate],
    *,
    device: torch.device,
    seconds: float = 3.0,
    rounds: int = 30,
    seed: int = 0,
    max_spread: float = 0.10,
    retries: int = 3,
    strict: bool = True,
    warmup_seconds: float | None = None,
    block_ms: float = 10.0,
    clock: Clock | None = None,
    patience: Patience | None = None,
    together: bool = False,
    pause_seconds: float = 0.0,
    before_round: Callable[[], None] = lambda: None,
) -> dict[str, Latency]:
    """Latency of every candidate, measured in turns; the first candidate is the reference of `speedup`.

    Each gets at least `rounds` samples and `seconds` of measuring. Before that all warm up together, for
    `warmup_seconds` (default: `seconds`) and until their times settle, or three times as long. Rounds beside a busy
    neighbour are taken again once it has left, within `patience` (default: a minute; none beside a `clock` that is
    handed in). Candidates whose spread (interquartile range over median) is above `max_spread`, or all where the
    reference drifted, are measured again beside the reference, `retries` times at most; `together` repeats all of them,
    for those that compare the samples of two candidates. What is unsteady then raises UnsteadyError where `strict`;
    else it is returned with `unsteady` set: the last repetition, or a short look beside a neighbour that stays.

    Time is read from `clock`; None takes CUDA events on a GPU, and `time.perf_counter_ns` elsewhere. Each block begins
    `pause_seconds` after the one before: threads of another runtime, which may spin for some milliseconds once it has
    answered, sleep by then. `before_round` may raise, to stop early. Raises ConfigError, ResourceError.
    """
    if not candidates or seconds <= 0 or rounds < 1 or max_spread <= 0 or retries < 0 or block_ms <= 0:
        got = f"{len(candidates)} candidates, {seconds=}, {rounds=}, {max_spread=}, {retries=}, {block_ms=}"
        raise ConfigError("measurement", got, "Give a candidate and positive settings.")
    reference = next(iter(candidates))
    vigil = Vigil(patience or (Patience() if clock is None else UNWATCHED), device, before_round)
    turns = _Turns(candidates, _paused(stopwatch_of(device, clock), pause_seconds), Random(seed), before_round)
    latest: dict[str, Latency] = {}
    steady: set[str] = set()
    with torch.inference_mode(), _no_garbage_collection():
        try:
            vigil.until_quiet()
            turns.fill_blocks(block_ms)
            vigil.collect(turns.round_ms, _warm(rounds, (seconds if warmup_seconds is None else warmup_seconds) * 1000))
            for number in range(retries + 1):
                kept = set() if together or reference not in steady else steady
                turns.names = [name for name in candidates if name == reference or name not in kept]
                taken = vigil.collect(turns.round_ms, _enough(rounds, seconds * 1000))
                found = _judged(turns.samples_ms(taken), reference, turns.calls, max_spread)
                latest |= {name: latency for name, latency in found.items() if name not in kept}
                steady = {name for name, latency in latest.items() if latency.stable}
                if len(steady) == len(candidates):
                    break
                if number < retries:
                    log.warning("not steady: %s: %s; measuring again, %d of %d", *_shaky(latest), number + 1, retries)
        except Disturbed as neighbour:
            retries = 0
            if strict and not latest:
                raise unsteady(_names(candidates), str(neighbour)) from None
            if not latest:  # numbers to be shown as unsteady, and for nothing more
                _cold, *taken = [turns.round_ms() for _ in range(1 + ROUNDS_OF_A_LOOK)]
                latest = _judged(turns.samples_ms(taken), reference, turns.calls, max_spread)
            latest |= {name: replace(latest[name], unsteady=str(neighbour)) for name in latest if name not in steady}
    if strict and len(steady) < len(candidates):
        what, why = _shaky(latest)
        raise unsteady(what, f"{why}, after {retries} repetitions" if retries else why)
    return latest


def _shaky(latest: Mapping[str, Latency]) -> tuple[str, str]:
    """Which latencies are unsteady, and what is wrong with the worst."""
    names = [name for name, latency in latest.items() if not latency.stable]
    worst = max(names, key=lambda name: latest[name].spread)
    return _names(names), latest[worst].unsteady


def _names(candidates: Iterable[str]) -> str:
    first, *others = candidates
    return f"latency of {first}" + (f" and {len(others)} more" if others else "")


def stopwatch_of(device: torch.device, clock: Clock | None = None) -> Stopwatch:
    """CUDA events on a GPU unless a clock is given; else the clock around calls and a synchronisation."""
    if device.type == "cuda" and clock is None:
        return lambda candidate, calls: _cuda_ms(candidate, calls, device)
    read_ns = clock or time.perf_counter_ns

    def clock_ms(candidate: Candidate, calls: int) -> float:
        synchronize(device)
        start_ns = read_ns()
        for _ in range(calls):
            candidate()
        synchronize(device)
        return (read_ns() - start_ns) / 1e6

    return clock_ms


def _paused(stopwatch: Stopwatch, seconds: float) -> Stopwatch:
    """`stopwatch`, started `seconds` after it was called."""

    def paused_ms(candidate: Candidate, calls: int) -> float:
        time.sleep(seconds)
        return stopwatch(candidate, calls)

    return paused_ms if seconds else stopwatch


def _cuda_ms(candidate: Candidate, calls: int, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)  # an earlier block's queue would hide this one's launch time
        start.record()
        for _ in range(calls):
            candidate()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def _calls_per_block(name: str, candidate: Candidate, stopwatch: Stopwatch, block_ms: float) -> int:
    """Calls that fill a block, after one call that may compile and allocate."""
    with memory_errors(f"latency of {name}"):
        stopwatch(candidate, 1)
        calls = 1
        while (total_ms := stopwatch(candidate, calls)) < block_ms:
            calls = max(calls + 1, math.ceil(calls * min(1.2 * block_ms / max(total_ms, 1e-6), 100)))
    return calls


Round = Mapping[str, float]
"""Milliseconds of one block of every candidate."""


class _Turns:
    """Every candidate once per round, in an order drawn anew."""

    def __init__(
        self,
        candidates: Mapping[str, Candidate],
        stopwatch: Stopwatch,
        rng: Random,
        before_round: Callable[[], None],
    ) -> None:
        self.candidates, self.stopwatch, self.rng, self.before_round = candidates, stopwatch, rng, before_round
        self.names = list(candidates)
        """Those that take part."""
        self.calls = dict.fromkeys(candidates, 1)
        """Calls of a candidate in one block."""

    def fill_blocks(self, block_ms: float) -> None:
        """Find how many calls fill a block of each."""
        self.calls = {
            name: _calls_per_block(name, candidate, self.stopwatch, block_ms)
            for name, candidate in self.candidates.items()
        }

    def round_ms(self) -> Round:
        """One block of every candidate."""
        self.before_round()
        order = list(self.names)
        self.rng.shuffle(order)
        times = {}
        for name in order:
            with memory_errors(f"latency of {name}"):
                times[name] = self.stopwatch(self.candidates[name], self.calls[name])
        return times

    def samples_ms(self, rounds: Sequence[Round]) -> dict[str, list[float]]:
        """Milliseconds per call."""
        return {name: [times[name] / self.calls[name] for times in rounds] for name in self.names}


def _enough(rounds: int, budget_ms: float) -> Callable[[Sequence[Round]], bool]:
    """True of `rounds` rounds at least, in which every candidate ran for `budget_ms`."""

    def enough(taken: Sequence[Round]) -> bool:
        return len(taken) >= rounds and min(sum(times[name] for times in taken) for name in taken[0]) >= budget_ms

    return enough


def _warm(rounds: int, budget_ms: float) -> Callable[[Sequence[Round]], bool]:
    """True once a round's total has settled: the last five's median within 2 % of the five before."""
    half = max(1, min(WARMUP_ROUNDS, rounds) // 2)

    def warm(taken: Sequence[Round]) -> bool:
        totals = [sum(times.values()) for times in taken]
        if len(totals) < 2 * half or sum(totals) < budget_ms:
            return False
        before, last = median(totals[-2 * half : -half]), median(totals[-half:])
        return abs(last - before) <= WARMUP_DRIFT * before or sum(totals) >= WARMUP_CAP * budget_ms

    return warm


def _judged(
    samples: Mapping[str, Sequence[float]], reference: str, calls: Mapping[str, int], max_spread: float
) -> dict[str, Latency]:
    """Statistics of a session. A drift or a spread of the reference spoils all of it, another spread its own row."""
    result = {name: Latency.from_samples(sample, samples[reference]) for name, sample in samples.items()}
    if has_drift(samples[reference], DRIFT_SHARE * max_spread):
        shared = f"the time of {reference} drifted"
    else:
        shared = _spread_of(reference, result[reference], max_spread)
    return {
        name: replace(latency, calls_per_sample=calls[name], unsteady=shared or _spread_of(name, latency, max_spread))
        for name, latency in result.items()
    }


def _spread_of(name: str, latency: Latency, max_spread: float) -> str:
    """The fault of samples that spread too far; nothing where they do not."""
    if latency.spread <= max_spread:
        return ""
    return f"samples of {name} spread by {latency.spread:.0%} of the median ({max_spread:.0%} allowed)"


def has_drift(samples_ms: Sequence[float], limit: float) -> bool:
    """True where the halves' medians differ by more than the share `limit` and their intervals do not meet."""
    half = len(samples_ms) // 2
    if half < 6:
        return False
    first, second = samples_ms[:half], samples_ms[-half:]
    (low, high), (other_low, other_high) = median_interval(first), median_interval(second)
    apart = high < other_low or other_high < low
    return apart and abs(median(second) - median(first)) > limit * median(first)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection inside a block would be charged to whoever runs."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
