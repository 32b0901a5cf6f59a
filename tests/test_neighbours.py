"""What else runs beside a measurement: on made-up machines, and beside real processes that take cores."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from noise import NOISE, beside
from sparsevit_cli.errors import UnsteadyError
from sparsevit_cli.profiling import neighbours
from sparsevit_cli.profiling.latency import measure_interleaved
from sparsevit_cli.profiling.neighbours import Disturbed, Limits, Moment, Patience, Vigil, disturbance

pytestmark = pytest.mark.usefixtures("watched")
CPU = torch.device("cpu")
QUIET = Moment(at=0.0, busy=0.0, own=0.0, waiting=0.0, switches=0, cores=2)
LIMITS = Limits(cores=0.05, waiting=0.05)


def after(seconds: float, **changes: Any) -> Moment:
    """QUIET so many seconds later, in which this process alone took two cores."""
    return replace(QUIET, **{"at": seconds, "busy": 2 * seconds, "own": 2 * seconds, **changes})


class MadeUp:
    """A machine on which another process takes `others` cores, as a function of the time."""

    def __init__(self, others: Callable[[float], float]) -> None:
        self.others = others
        self.now = self.taken = 0.0

    def pass_by(self, seconds: float) -> None:
        for _ in range(round(seconds * 100)):
            self.taken += self.others(self.now) * 0.01
            self.now += 0.01

    def moment(self) -> Moment:
        return Moment(self.now, self.taken, 0.0, None, 0, 2)

    def patience(self, wait_seconds: float) -> Patience:
        return Patience(wait_seconds, watch=self.moment, now=lambda: self.now, sleep=self.pass_by)


# -- what counts as a neighbour ---------------------------------------------------------------------------------


def test_a_process_alone_is_not_disturbed() -> None:
    assert disturbance(QUIET, after(1.0), LIMITS) == ""
    assert disturbance(QUIET, after(1.0, waiting=0.01, switches=60), LIMITS) == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"busy": 2.98, "waiting": None}, "other processes take 0.98 of 2 cores"),
        ({"busy": 2.0, "own": 1.3, "waiting": 0.5}, "other processes take 0.70"),
        ({"waiting": 0.5}, "threads wait for a core 50% of the time"),
        ({"waiting": None, "switches": 250}, "give way 125 times a second"),
        ({"gpu": "2 other processes compute on the GPU"}, "2 other processes"),
        ({"throttled": 0.4}, "the CPU quota of this container stops it 40% of the time"),
    ],
)
def test_each_counter_alone_tells_a_neighbour(changes: dict[str, Any], told: str) -> None:
    assert told in disturbance(QUIET, after(1.0, **changes), LIMITS)


@given(st.floats(0.01, 100), st.integers(1, 256), st.floats(0, 1))
def test_what_the_ticks_cannot_resolve_is_not_charged(seconds: float, cores: int, share: float) -> None:
    ticks = 0.01 * math.sqrt(cores) * share
    later = Moment(seconds, seconds + ticks, seconds, 0.0, 0, cores)
    assert disturbance(replace(QUIET, cores=cores), later, LIMITS) == ""


@pytest.mark.parametrize(("cores", "allowed"), [(2, 0.05), (8, 0.16), (64, 0.25)])
def test_the_limit_grows_with_the_machine(cores: int, allowed: float) -> None:
    vigil = Vigil(Patience(watch=lambda: replace(QUIET, cores=cores)), CPU)
    assert vigil.limits == Limits(pytest.approx(allowed), 0.05)
    assert Vigil(Patience(max_cores=3.0, watch=lambda: QUIET), CPU).limits == Limits(3.0, 3.0)


@pytest.mark.parametrize(
    ("pids", "slowed", "told"),
    [
        ([os.getpid()], 0x1, ""),
        ([999], 0x2, ""),  # in a container our own has another number
        ([os.getpid(), 999], 0x0, "1 other processes compute on the GPU"),
        ([998, 999], 0x0, "1 other processes"),
        ([], 0x40, "hardware thermal slowdown"),
        ([os.getpid(), 998, 999], 0x84, "2 other processes compute on the GPU; the GPU is slowed by its power brake"),
    ],
)  # fmt: skip
def test_a_gpu_tells_other_processes_and_what_slows_it(pids: list[int], slowed: int, told: str) -> None:
    nvml = SimpleNamespace(
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=pid) for pid in pids],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: slowed,
    )
    found = neighbours._gpu_state(nvml, None)
    assert found == told or (told and told in found)


def test_one_process_is_seen_on_any_machine() -> None:
    for cores in (1, 2, 8, 64, 256):
        limits = Vigil(Patience(watch=lambda cores=cores: replace(QUIET, cores=cores)), CPU).limits  # type: ignore[misc]
        busy = replace(QUIET, at=1.0, busy=cores / 2 + 0.95, own=cores / 2, cores=cores)
        assert disturbance(replace(QUIET, cores=cores), busy, limits)


def test_what_is_accepted_is_accepted_by_every_counter() -> None:
    crowded = after(1.0, busy=3.0, waiting=0.9, switches=900, gpu="1 other processes compute on the GPU", throttled=0.9)
    assert disturbance(QUIET, crowded, Limits(1.0, 1.0)) == ""
    assert disturbance(replace(QUIET, waiting=None), replace(crowded, waiting=None), Limits(1.0, 1.0)) == ""


def test_switches_of_all_threads_count() -> None:
    resource = pytest.importorskip("resource")
    assert neighbours.machine_watch(CPU)().switches <= resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


# -- waiting ----------------------------------------------------------------------------------------------------


def take_from(machine: MadeUp, ms: float) -> Callable[[], float]:
    def take() -> float:
        began = machine.now
        machine.pass_by(ms / 1000)
        return began

    return take


def test_what_was_taken_beside_a_neighbour_is_taken_again(caplog: pytest.LogCaptureFixture) -> None:
    machine = MadeUp(lambda now: 1.0 if 3 <= now < 8 else 0.0)
    vigil = Vigil(machine.patience(60), CPU)
    vigil.until_quiet()
    taken = vigil.collect(take_from(machine, 100), lambda found: len(found) >= 50)
    assert len(taken) == 50
    assert not [began for began in taken if 3 <= began < 8]
    assert 40 < vigil.patience.seconds_left < 60
    assert "not steady: other processes take" in caplog.text
    assert "waiting for that to end, 59 s at most" in caplog.text


def test_one_that_comes_and_goes_costs_time_and_no_sample() -> None:
    machine = MadeUp(lambda now: 1.0 if now % 4 < 1 else 0.0)
    taken = Vigil(machine.patience(60), CPU).collect(take_from(machine, 100), lambda found: len(found) >= 100)
    assert len(taken) == 100
    assert not [began for began in taken if 0.1 <= began % 4 < 0.9]


@given(st.floats(0.1, 2), st.floats(0, 100), st.floats(20, 3000))
def test_waiting_is_bounded_and_told(others: float, wait_seconds: float, ms: float) -> None:
    machine = MadeUp(lambda now: others)
    vigil = Vigil(machine.patience(wait_seconds), CPU)
    with pytest.raises(Disturbed, match="other processes take"):
        vigil.collect(take_from(machine, ms), lambda found: len(found) >= 1000)
    assert machine.now <= wait_seconds + ms / 1000 + 2.5


def test_the_wait_is_one_for_all_measurements(caplog: pytest.LogCaptureFixture) -> None:
    machine = MadeUp(lambda now: 1.0)
    patience = machine.patience(20)
    for _ in range(5):
        with pytest.raises(Disturbed):
            Vigil(patience, CPU).until_quiet()
    assert machine.now < 23
    assert [record.message for record in caplog.records if "20 s at most" in record.message]
    assert len(caplog.records) == 2  # a line every 15 seconds
    with pytest.raises(Disturbed):
        Vigil(Patience(60, watch=machine.moment, sleep=machine.pass_by).without_waiting(), CPU).until_quiet()


def test_a_stop_is_heard_while_waiting() -> None:
    def check() -> None:
        if machine.now > 5:
            raise KeyboardInterrupt

    machine = MadeUp(lambda now: 1.0)
    with pytest.raises(KeyboardInterrupt):
        Vigil(machine.patience(60), CPU, check).until_quiet()
    assert machine.now < 6


# -- real neighbours --------------------------------------------------------------------------------------------


def work() -> None:
    """About a millisecond on all cores."""
    torch.mm(MATRIX, MATRIX)


MATRIX = torch.randn(384, 384)


@pytest.mark.parametrize("noise", NOISE)
def test_a_real_neighbour_makes_a_measurement_unsteady_whatever_its_spread(noise: str) -> None:
    settings: dict[str, Any] = {"device": CPU, "seconds": 1.0, "rounds": 6, "max_spread": 1000.0, "retries": 0}
    with beside(noise):
        found = measure_interleaved({"a": work, "b": work}, strict=False, patience=Patience(0.0), **settings)
        with pytest.raises(UnsteadyError, match=r"latency of a and 1 more: .*(take|wait|way)") as caught:
            measure_interleaved({"a": work, "b": work}, patience=Patience(0.5), **settings)
    assert caught.value.exit_code == 8
    assert not any(latency.stable for latency in found.values())


def test_a_real_neighbour_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with beside("one core") as (child,):

        def watch() -> Moment:  # of this neighbour alone: the tests' own machine may be busy
            times = psutil.Process(child.pid).cpu_times() if child.poll() is None else None
            seen.append(times.user + times.system if times else seen[-1])
            return Moment(time.monotonic(), time.process_time() + seen[-1], time.process_time(), None, 0, 2)

        def sleep(seconds: float) -> None:
            time.sleep(seconds)
            slept.append(seconds)
            if len(slept) == 3:
                child.kill()
                child.wait()

        seen, slept = [0.0], [0.0]
        patience = Patience(60.0, watch=watch, sleep=sleep)
        found = measure_interleaved(
            {"model": work}, device=CPU, seconds=0.2, rounds=6, max_spread=1000.0, patience=patience
        )
    assert found["model"].stable
    assert "waiting for that to end, 60 s at most" in caplog.text
    assert patience.seconds_left < 60
