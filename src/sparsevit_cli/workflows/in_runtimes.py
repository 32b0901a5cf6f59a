"""Which runtimes a profile measures in, and a model as a program of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.exporting import UntraceableError
from sparsevit_cli.exporting.light import check_timed, timed_programs
from sparsevit_cli.profiling.inputs import TORCH_DTYPE, placed
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.runtimes import RUNTIMES, Precision, precision_label, slow_in_int8

from .rows import TORCH, Place
from .session import Session

PAUSE_SECONDS = 0.02
"""Between blocks of several runtimes: torch's threads spin for some milliseconds once they have worked."""


@dataclass(frozen=True)
class Runtimes:
    """Those that take part, and why others do not."""

    names: tuple[str, ...]
    left_out: Mapping[str, str]

    @property
    def has_torch(self) -> bool:
        """True if models run in PyTorch, too."""
        return TORCH in self.names

    @property
    def others(self) -> tuple[str, ...]:
        """Those that need an exported program."""
        return tuple(name for name in self.names if name != TORCH)

    @property
    def settings(self) -> dict[str, object]:
        """What a report tells of them."""
        left_out = {"runtimes_left_out": dict(self.left_out)} if self.left_out else {}
        return {"runtimes": list(self.names), **left_out}

    @property
    def pause_seconds(self) -> float:
        """The pause before a block of `measure_interleaved`: threads of two runtimes must not meet."""
        return PAUSE_SECONDS if self.others else 0.0


def chosen_runtimes(session: Session, command: str, *, all_installed: bool = False) -> Runtimes:
    """Those of `profile.runtimes` that compute in `profile.precision`; the others are told.

    Without that setting it is torch, and with `all_installed` on a CPU every runtime that is installed. Raises
    ConfigError for one that is not installed, one that does not run on the session's device, and when none is left.
    """
    section = session.config.profile
    left_out: dict[str, str] = {}
    names: tuple[str, ...] = section.runtimes or (TORCH,)
    if section.runtimes is None and all_installed and session.device.type == "cpu":
        left_out = {name: "not installed" for name, found in RUNTIMES.items() if not found.is_installed()}
        names = tuple(name for name in RUNTIMES if name not in left_out)
    refused: list[ConfigError] = []
    for name in names:
        if name != TORCH:
            RUNTIMES[name].check_installed()
            if session.device.type != "cpu":
                got = f"{name} runs on the CPU, the device is {session.device}"
                raise ConfigError("profile.runtimes", got, "Give --device cpu, or leave it out.")
        try:
            _check_precision(name, section.precision)
        except ConfigError as error:
            refused.append(error)
            left_out[name] = error.got
    found = Runtimes(tuple(name for name in names if name not in left_out), left_out)
    if not found.names:
        raise refused[0] if len(refused) == 1 else ConfigError(
            "profile.precision", f"{section.precision}: {'; '.join(error.got for error in refused)}", "Choose fp32."
        )  # fmt: skip
    for name, why in left_out.items():
        session.reporter.say(f"{command}: without {name}: {why}")
    if section.precision == "int8" and (slow := slow_in_int8()):
        session.reporter.warn(f"{command}: {slow}")
    return found


def _check_precision(name: str, precision: str) -> None:
    """Raises ConfigError for a precision that a runtime does not do."""
    if name != TORCH:
        check_timed(name, precision)
    elif precision not in TORCH_DTYPE:
        got = f"{precision}: torch computes in {', '.join(TORCH_DTYPE)}"
        raise ConfigError(f"runtime {TORCH}", got, "Choose one of them, or --runtime openvino.")


def in_torch(session: Session) -> Place:
    """The place of a row of torch."""
    return Place(TORCH, torch.__version__, session.config.profile.precision, torch.get_num_threads())


@dataclass(frozen=True)
class InRuntime:
    """One call of a model in a runtime."""

    place: Place
    run: Callable[[], object]


def in_other_runtimes(session: Session, runtimes: Runtimes, workload: Workload) -> list[InRuntime]:
    """The workload's model as a program of every other runtime, on as many threads as torch has.

    Raises ConfigError for a model that cannot be exported, MeasurementError for a program that gives other outputs.
    """
    if not runtimes.others:
        return []
    if not isinstance(workload.inputs, Tensor):
        got = f"{type(workload.model).__name__} takes more than one tensor of images"
        raise UntraceableError("timed export", got, "Measure its backbone.")
    images = workload.inputs.to("cpu", torch.float32)
    model = placed(workload.model, images.device, images.dtype)
    precision = _exported_in(session)
    with workload.loaded(model):
        made = timed_programs(model, images, runtimes.others, precision, threads=torch.get_num_threads())
    return [
        InRuntime(
            Place(each.runtime, each.version, precision_label(precision, each.activations), each.threads),
            partial(each.run, images),
        )
        for each in made.values()
    ]


def _exported_in(session: Session) -> Precision:
    precision = session.config.profile.precision
    assert precision != "fp16", "no other runtime takes part"
    return precision
