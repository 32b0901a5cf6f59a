"""What else runs on this machine while something is timed, and waiting until it stops.

A neighbour that is always there has no spread: beside one, every parallel region waits for a time slice, and a
latency can be a hundred times too long with all its samples alike. So the machine is asked, not the samples.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import torch

from sparsevit_cli.errors import UnsteadyError, pass_on

WAIT_SECONDS = 60.0
MIN_CORES, SHARE_OF_CORES, MAX_CORES = 0.05, 0.02, 0.25
"""CPU cores that other processes may take: a share of all cores, from the first of these numbers to the last."""
MAX_WAITING = 0.05
MAX_SWITCHES = 100.0
"""Involuntary context switches in a second of CPU time; 25 to 35 are usual, 130 and more beside one busy process."""
SLICE_SECONDS = 1.0
GLANCE_SECONDS = 0.25
TICK_SECONDS = 0.01
"""Resolution of the system's count of busy time, per core."""
TELL_EVERY_SECONDS = 15.0
PRESSURE, QUOTA = Path("/proc/pressure/cpu"), Path("/sys/fs/cgroup/cpu.stat")
GPU_SLOWED = {
    0x08: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
    0x80: "power brake",
}  # fmt: skip
"""Bits of NVML's clocks throttle reasons (nvml.h); not the power cap, which our own load may reach every time."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Moment:
    """Counters of the machine at one moment, all in seconds but `switches`.

    `busy` is the CPU time of all processes on the cores that this one may use, and of a hypervisor's other guests.
    `own` is this process's CPU time. `waiting` is the time in which some thread had no core (PSI), None where the
    system does not count it. `switches` are this process's involuntary context switches. `gpu` says what else the GPU
    does, or nothing. `throttled` is the time in which a container's CPU quota stopped its processes.
    """

    at: float
    busy: float
    own: float
    waiting: float | None
    switches: int
    cores: int
    gpu: str = ""
    throttled: float = 0.0


class Watch(Protocol):
    """Reads the counters; handed in, so that tests can make a machine up."""

    def __call__(self) -> Moment:
        """The counters now."""


def machine_watch(device: torch.device) -> Watch:
    """The counters of this machine, and of the GPU where `device` is one."""
    gpu = _gpu_watch(device) if device.type == "cuda" else lambda: ""

    def moment() -> Moment:
        cpus = psutil.cpu_times(percpu=True)
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cpus))
        known = max(allowed) < len(cpus)  # else they are counted otherwise there, as in some containers
        mine = [cpus[number] for number in allowed] if known else cpus
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests are part of `user` already
        busy = sum(value for cpu in mine for name, value in cpu._asdict().items() if name not in idle)
        own, waiting, switches = time.process_time(), _pressure(), _switches()
        return Moment(time.monotonic(), busy, own, waiting, switches, len(mine), gpu(), _throttled())

    return moment


def _pressure() -> float | None:
    """Seconds in which some thread waited for a core, since boot; None where the kernel does not count them."""
    try:
        first = PRESSURE.read_text(encoding="ascii").partition("\n")[0]
        return int(first.rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        return None


def _throttled() -> float:
    """Seconds that the CPU quota of this container took; 0 where there is none (cgroup v2 alone)."""
    try:
        found = re.search(r"^throttled_usec (\d+)$", QUOTA.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return 0.0
    return int(found[1]) / 1e6 if found else 0.0


def _switches() -> int:
    """Involuntary context switches of all our threads; 0 on systems that do not count them."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@lru_cache  # what is not known is told once
def _gpu_watch(device: torch.device) -> Callable[[], str]:
    """Says which other processes compute on the GPU and what slows its clocks; nothing where NVML is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        _gpu_state(pynvml, handle)
    except Exception as error:  # NVML is optional, and its errors are its own
        pass_on(error)
        told = "what else runs on %s is not known (%s): pip install nvidia-ml-py"
        log.warning(told, device, type(error).__name__)
        return lambda: ""

    def state() -> str:
        try:
            return _gpu_state(pynvml, handle)
        except Exception as error:  # a driver that does not answer now
            pass_on(error)
            return ""

    return state


def _gpu_state(nvml: Any, handle: Any) -> str:
    pids = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    others = len(pids - {os.getpid()}) - (os.getpid() not in pids)  # in a container our own has another number
    slowed = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    told = [f"{others} other processes compute on the GPU"] if others > 0 else []
    return "; ".join(told + [f"the GPU is slowed by its {name}" for bit, name in GPU_SLOWED.items() if slowed & bit])


@dataclass(frozen=True)
class Limits:
    """What is accepted beside a measurement: CPU cores that other processes take, share of time that threads wait."""

    cores: float
    waiting: float


def disturbance(before: Moment, after: Moment, limits: Limits) -> str:
    """What took this machine from us between two moments, in words; nothing where that was within the limits.

    Three counters, each enough: CPU time of others, share of time in which a thread waited for a core, and, where the
    kernel does not count waiting, our involuntary context switches.
    """
    seconds = max(after.at - before.at, 1e-9)
    own = after.own - before.own
    others = (after.busy - before.busy - own) / seconds
    if others - TICK_SECONDS * math.sqrt(after.cores) / seconds > limits.cores:
        return f"other processes take {others:.2f} of {after.cores} cores"
    throttled = (after.throttled - before.throttled) / seconds
    if throttled > limits.waiting:
        return f"the CPU quota of this container stops it {min(throttled, 1):.0%} of the time"
    if before.waiting is not None and after.waiting is not None:
        waiting = (after.waiting - before.waiting) / seconds
        if waiting > limits.waiting:
            return f"threads wait for a core {min(waiting, 1):.0%} of the time"
    else:
        switches = (after.switches - before.switches) / max(own, SLICE_SECONDS)
        if switches > MAX_SWITCHES * limits.waiting / MAX_WAITING:
            return f"this process has to give way {switches:.0f} times a second"
    return (after.gpu or before.gpu) if limits.waiting < 1 else ""


class Disturbed(Exception):  # noqa: N818 - no error: it says why a measurement did not take place
    """Neighbours did not leave within the time that there was to wait."""


class Patience:
    """Time to wait for neighbours, in all the measurements of one command: `seconds_left` falls while waiting.

    `max_cores` is what other processes may take of the CPU; None is 2 % of all cores, at least 0.05 and at most 0.25.
    """

    def __init__(
        self,
        wait_seconds: float = WAIT_SECONDS,
        max_cores: float | None = None,
        *,
        watch: Watch | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.seconds_left, self.max_cores = wait_seconds, max_cores
        self.watch, self.now, self.sleep = watch, now, sleep
        self._told_at = math.inf

    def without_waiting(self) -> Patience:
        """One that looks and never waits: for numbers that decide nothing."""
        return Patience(0.0, self.max_cores, watch=self.watch, now=self.now, sleep=self.sleep)

    def tell(self, found: str) -> None:
        """One line about a neighbour and the wait for it, every 15 seconds of waiting."""
        if self._told_at - self.seconds_left >= TELL_EVERY_SECONDS:
            self._told_at = self.seconds_left
            log.warning("not steady: %s; waiting for that to end, %.0f s at most", found, self.seconds_left)


class Vigil:
    """Watches one measurement on `device`: what was taken beside a neighbour is taken again, once that has left.

    `check` may raise, to stop early.
    """

    def __init__(self, patience: Patience, device: torch.device, check: Callable[[], None] = lambda: None) -> None:
        self.patience, self.check = patience, check
        self.watch = patience.watch or machine_watch(device)
        most = patience.max_cores
        usual = min(max(MIN_CORES, SHARE_OF_CORES * self.watch().cores), MAX_CORES)
        self.limits = Limits(usual, MAX_WAITING) if most is None else Limits(most, most)

    def until_quiet(self) -> None:
        """Return once nothing else runs. Raises Disturbed where that takes longer than there is to wait."""
        self._wait(self.glance())

    def glance(self) -> str:
        """What else runs in the next quarter of a second, in words; nothing where that is nothing."""
        before = self.watch()
        self.patience.sleep(GLANCE_SECONDS)
        return disturbance(before, self.watch(), self.limits)

    def _wait(self, found: str) -> None:
        """Until a neighbour that was `found` has left."""
        patience = self.patience
        while found:
            self.check()
            if patience.seconds_left <= 0:
                raise Disturbed(found)
            patience.tell(found)
            began = patience.now()
            found = self.glance()
            patience.seconds_left -= patience.now() - began

    def collect(self, take: Callable[[], T], enough: Callable[[Sequence[T]], bool]) -> list[T]:
        """What `take` returns, until that is `enough`; slices of about a second beside a neighbour are taken again.

        Raises Disturbed, and what `take` raises.
        """
        kept: list[T] = []
        while not enough(kept):
            fresh: list[T] = []
            began, before = self.patience.now(), self.watch()
            while self.patience.now() - began < SLICE_SECONDS:
                fresh.append(take())
                count = len(kept) + len(fresh)
                if count % max(1, count // 64) == 0 and enough([*kept, *fresh]):  # it looks at all of them
                    break
            found = disturbance(before, self.watch(), self.limits)
            if found:
                self.patience.seconds_left -= self.patience.now() - began
                self._wait(found)
            else:
                kept += fresh
        return kept


UNWATCHED = Patience(0.0, math.inf, watch=lambda: Moment(0.0, 0.0, 0.0, None, 0, 1), sleep=lambda seconds: None)
"""For clocks that are made up: nothing runs beside them."""


def unsteady(what: str, why: str) -> UnsteadyError:
    """The error that ends a measurement which cannot be trusted."""
    do = (
        "Stop other work on this machine. Or wait longer (clock.wait), measure longer (seconds), or accept more "
        "(clock.max_neighbour, max_spread)."
    )
    return UnsteadyError(what, why, do)
