"""Where latencies of a search come from: the model in torch, or its exported programs in another runtime."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from typing import Protocol

from torch import Tensor, nn

from sparsevit_cli.atomic import TEMPORARY
from sparsevit_cli.errors import CheckpointError, ConfigError, MeasurementError
from sparsevit_cli.exporting import UntraceableError
from sparsevit_cli.exporting.adjustable import AdjustablePrograms
from sparsevit_cli.exporting.precision import LOWERING, format_of, resolved_activations
from sparsevit_cli.profiling.inputs import TORCH_DTYPE
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.profiling.latency_table import (
    measure_configs,
    measure_latency_table,
    program_design,
    program_identity,
    table_identity,
)
from sparsevit_cli.profiling.neighbours import Patience
from sparsevit_cli.profiling.program_table import measure_program_table, measure_programs
from sparsevit_cli.runtimes import Activations, Runtime, precision_label, runtime, slow_in_int8
from sparsevit_cli.search.latency_table import LatencyTable
from sparsevit_cli.search.table_design import TableDesign
from sparsevit_cli.sizes import Size
from sparsevit_cli.sparsity import MAX_TENTHS, SparsityConfig
from sparsevit_cli.swin import sparse_stages

from .session import Session

SETTING = "search.precision"
"""Where `precision` stands in a configuration."""
OnShare = Callable[[float], None]
"""Is told the share of a table that is measured."""


class LatencySource(Protocol):
    """Measures the model of a search at configurations."""

    @property
    def identity(self) -> Mapping[str, object]:
        """What its latencies hold for."""

    @property
    def told(self) -> str:
        """Where it runs, in words."""

    def measure(self, configs: Sequence[SparsityConfig], patience: Patience) -> dict[SparsityConfig, Latency]:
        """Latency of each; the first is the reference of `speedup`. Raises UnsteadyError."""

    def table(self, on_share: OnShare) -> LatencyTable:
        """The latency table, not calibrated yet. Raises UnsteadyError."""


def latency_source(session: Session, model: nn.Module, resources: ExitStack, size: Size | None = None) -> LatencySource:
    """The source that `search.runtime` names, at the experiment's image size or another one.

    What it opens is closed with `resources`.
    Raises ConfigError for a runtime that is not installed or does not compute in `search.precision` here.
    """
    if session.config.search.runtime == "torch":
        return TorchSource(session, model, size)
    return ProgramSource(session, model, resources, size)


class TorchSource:
    """The model in torch, on the session's device."""

    def __init__(self, session: Session, model: nn.Module, size: Size | None = None) -> None:
        self.session, section = session, session.config.search
        self.workload = session.workload(model, size, section.batch_size, section.precision, section.scope)
        self.identity = _with_clock(session, table_identity(self.workload))
        self.told = f"torch on {session.device}, {section.precision}"

    def measure(self, configs: Sequence[SparsityConfig], patience: Patience) -> dict[SparsityConfig, Latency]:
        """In turns, all in the same rounds."""
        clock = self.session.config.clock
        return measure_configs(
            self.workload, configs, seconds=self.session.config.search.seconds, seed=self.session.config.seed,
            retries=clock.retries, max_spread=clock.max_spread, strict=True, patience=patience,
            before_round=check(self.session),
        )  # fmt: skip

    def table(self, on_share: OnShare) -> LatencyTable:
        """By marked passes."""
        clock = self.session.config.clock
        table = measure_latency_table(
            self.workload, max_tenths=MAX_TENTHS, seconds=self.session.config.search.seconds,
            seed=self.session.config.seed, patience=self.session.patience, retries=clock.retries,
            max_spread=clock.max_spread, on_round=on_share,
            check=partial(self.session.stop.check, "search", "the latency table is not saved yet"),
        )  # fmt: skip
        return replace(table, identity=self.identity)


class ProgramSource:
    """Exported programs of the model on the CPU, in `search.runtime` and `search.precision`."""

    def __init__(self, session: Session, model: nn.Module, resources: ExitStack, size: Size | None = None) -> None:
        self.session, self.resources, self.section = session, resources, session.config.search
        self.runtime = runtime(self.section.runtime)
        self.runtime.check_installed()
        self.activations = computed_in(session, self.runtime)
        self.workload = session.workload(model, size, self.section.batch_size, scope=self.section.scope)
        if not isinstance(self.workload.inputs, Tensor):
            raise _untraceable(f"the model of task {session.task.name} takes more than one tensor of images")
        if self.runtime.name == "openvino" and session.config.model.importance == "random":
            got = "openvino, and no file is written for it where model.importance is random"
            raise ConfigError("search.runtime", got, "Choose onnxruntime or torch, or another importance.")
        version = self.runtime.version()
        if self.section.precision == "int8":
            version += f", nncf {importlib.metadata.version('nncf')}"
        here = {"runtime_version": version, "activations": self.activations}
        self.identity = _with_clock(session, program_identity(self.workload, {**_program(session), **here}))
        label = precision_label("int8" if self.section.precision == "int8" else "fp32", self.activations)
        self.told = f"{self.runtime.name} {self.runtime.version()}, {label}"

    @cached_property
    def _design(self) -> TableDesign:
        return program_design(self.workload)

    @cached_property
    def _programs(self) -> AdjustablePrograms:
        folder = self.resources.enter_context(tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}programs-"))
        try:
            return AdjustablePrograms(
                self.workload.model, self.workload.inputs, [kept[0] for kept in self._design.kept], self.runtime,
                folder, activations=self.activations, opset=self.session.config.export.opset,
                eight_bits=self.section.precision == "int8",
                before_step=check(self.session), say=lambda line: self.session.reporter.say(f"search: {line}"),
            )  # fmt: skip
        except UntraceableError as error:
            raise _untraceable(error.got) from error

    def _load(self, config: SparsityConfig) -> Callable[[], object]:
        try:
            program = self._programs.load(config)
        except UntraceableError as error:
            raise _untraceable(error.got) from error
        except CheckpointError as error:  # of a temporary file, which nobody can export again
            do = "Choose another search.runtime, or report it with your versions."
            raise MeasurementError(f"the program at {config}", error.got, do) from error
        return partial(program.run, self._programs.images)

    def measure(self, configs: Sequence[SparsityConfig], patience: Patience) -> dict[SparsityConfig, Latency]:
        """Program by program, a few at a time, each beside the first."""
        clock = self.session.config.clock
        return measure_programs(
            self._load, configs, seconds=self.section.seconds, seed=self.session.config.seed, retries=clock.retries,
            max_spread=clock.max_spread, strict=True, patience=patience, before_round=check(self.session),
        )  # fmt: skip

    def table(self, on_share: OnShare) -> LatencyTable:
        """From programs that differ in one stage."""
        clock = self.session.config.clock
        return measure_program_table(
            self._load, self._design, self.identity, seconds=self.section.seconds, seed=self.session.config.seed,
            retries=clock.retries, max_spread=clock.max_spread, patience=self.session.patience,
            before_round=check(self.session), on_share=on_share,
        )  # fmt: skip


def computed_in(session: Session, runtime: Runtime) -> Activations:
    """What `runtime` is asked to compute in: of an int8 program all that is not eight bits. Raises ConfigError."""
    precision = session.config.search.precision
    runtime.check_activations("fp32", SETTING)  # one that is broken is told before it is asked for more
    asked = session.config.export.activations if (precision, runtime.name) == ("int8", LOWERING) else "auto"
    found = resolved_activations(precision, asked, (format_of(runtime.name),), SETTING)
    if precision == "int8" and (slow := slow_in_int8()):
        session.reporter.warn(f"search: {slow}")
    return found


def tell_of_export(session: Session) -> None:
    """A warning if the export, as it is configured, writes no file that the budget is of."""
    search, export = session.config.search, session.config.export
    formats = {"openvino": ("openvino", "onnx"), "onnxruntime": ("onnx",)}.get(search.runtime)
    if formats is None:
        return
    formats = formats if search.precision == "fp32" else formats[:1]
    if search.precision != export.precision or not set(formats) & set(export.formats):
        session.reporter.warn(
            f"search: the budget is of a file in {search.precision} for {search.runtime}; export.precision is "
            f"{export.precision}, export.formats {', '.join(export.formats) or 'empty'}. Set them before you export"
        )


def expected_identity(session: Session, model: nn.Module) -> dict[str, object]:
    """Of a table of any machine: what does not depend on this one. No runtime needs to be installed."""
    section = session.config.search
    workload = session.workload(model, batch_size=section.batch_size, scope=section.scope)
    if section.runtime == "torch":
        dtype = str(TORCH_DTYPE[section.precision]).removeprefix("torch.")
        return {**table_identity(workload), "dtype": dtype}
    return program_identity(workload, _program(session))


def swin_parameters(model: nn.Module) -> dict[str, object]:
    """Parameters of all stages: a table of elsewhere may be of a model with a head for other categories."""
    return {"swin_parameters": sum(p.numel() for stage in sparse_stages(model) for p in stage.parameters())}


def _program(session: Session) -> dict[str, object]:
    section = session.config.search
    return {"runtime": section.runtime, "precision": section.precision, "opset": session.config.export.opset}


def check(session: Session) -> Callable[[], None]:
    """Raises where a stop was asked for."""
    return partial(session.stop.check, "search", "every evaluation so far is in the ledger")


def _with_clock(session: Session, identity: Mapping[str, object]) -> dict[str, object]:
    clock = session.config.clock
    return {**identity, "clock": [clock.max_neighbour, clock.max_spread]}


def _untraceable(got: str) -> ConfigError:
    do = "Set search.scope: backbone, which can be exported, or search.runtime: torch."
    return ConfigError("search.runtime", f"no program can be made of the whole model: {got}", do)
