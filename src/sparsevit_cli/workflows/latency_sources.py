"""Where latencies of a search come from: the model in torch, or its exported programs in another runtime."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from sparsevit_cli.atomic import TEMPORARY
from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.errors import CheckpointError, ConfigError, MeasurementError
from sparsevit_cli.exporting import ExportScope, UntraceableError
from sparsevit_cli.exporting.adjustable import AdjustablePrograms
from sparsevit_cli.exporting.precision import LOWERING, ActivationsAsked, format_of, resolved_activations
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
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.runtimes import Activations, Runtime, precision_label, runtime, slow_in_int8
from sparsevit_cli.search.budget import CostMetric, CostScope
from sparsevit_cli.search.latency_table import LatencyTable
from sparsevit_cli.search.table_design import TableDesign
from sparsevit_cli.sizes import Size
from sparsevit_cli.sparsity import MAX_TENTHS, SparsityConfig
from sparsevit_cli.swin import sparse_stages

from .exported_part import answers_each_image, exported_part
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
        return measure_configs(
            self.workload, configs, seconds=self.session.config.search.seconds, strict=True, patience=patience,
            before_round=check(self.session), **self.session.measuring,
        )  # fmt: skip

    def table(self, on_share: OnShare) -> LatencyTable:
        """By marked passes."""
        table = measure_latency_table(
            self.workload, max_tenths=MAX_TENTHS, seconds=self.session.config.search.seconds,
            patience=self.session.patience, on_round=on_share, **self.session.measuring,
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
        self.workload = program_workload(session, model, size)
        if self.runtime.name == "openvino" and session.config.model.importance == "random":
            got = "openvino, and no file is written for it where model.importance is random"
            raise ConfigError("search.runtime", got, "Choose onnxruntime or torch, or another importance.")
        version = self.runtime.version()
        if self.section.precision == "int8":
            version += f", nncf {importlib.metadata.version('nncf')}"
        here = {"runtime_version": version, "activations": self.activations}
        self.identity = _with_clock(session, _program_identity(session, self.workload, here))
        whole = "" if self.workload.scope == "model" else ", backbone and neck"
        self.told = f"{self.runtime.name} {self.runtime.version()}, {label_in(self.identity)}{whole}"

    @cached_property
    def _design(self) -> TableDesign:
        return program_design(self.workload)

    @cached_property
    def _programs(self) -> AdjustablePrograms:
        folder = tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}programs-", ignore_cleanup_errors=True)
        try:
            return AdjustablePrograms(
                self.workload.model, self.workload.inputs, [kept[0] for kept in self._design.kept], self.runtime,
                self.resources.enter_context(folder), activations=self.activations,
                opset=self.session.config.export.opset, eight_bits=self.section.precision == "int8",
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

    def measure(
        self,
        configs: Sequence[SparsityConfig],
        patience: Patience,
        *,
        strict: bool = True,
        files: Mapping[SparsityConfig, Callable[[], object]] = MappingProxyType({}),
    ) -> dict[SparsityConfig, Latency]:
        """Program by program, a few at a time, each beside the first. `files` run in the place of their programs."""
        return measure_programs(
            lambda config: files.get(config) or self._load(config), configs, seconds=self.section.seconds,
            strict=strict, patience=patience, before_round=check(self.session), **self.session.measuring,
        )  # fmt: skip

    def table(self, on_share: OnShare) -> LatencyTable:
        """From programs that differ in one stage."""
        return measure_program_table(
            self._load, self._design, self.identity, seconds=self.section.seconds, patience=self.session.patience,
            before_round=check(self.session), on_share=on_share, **self.session.measuring,
        )  # fmt: skip


def computed_in(session: Session, runtime: Runtime) -> Activations:
    """What `runtime` is asked to compute in: of an int8 program all that is not eight bits. Raises ConfigError."""
    precision = session.config.search.precision
    runtime.check_activations("fp32", SETTING)  # one that is broken is told before it is asked for more
    found = resolved_activations(precision, _asked(session), (format_of(runtime.name),), SETTING)
    if precision == "int8" and (slow := slow_in_int8()):
        session.reporter.warn(f"search: {slow}")
    return found


def program_workload(session: Session, model: nn.Module, size: Size | None = None) -> Workload:
    """What the programs of a search compute, on one batch: the whole model, or with scope backbone what `export` calls
    `features`, the neck included. No latency of a smaller part could be kept by a file.

    Raises ConfigError for a model that no program can be made of.
    """
    section, parts = session.config.search, session.task.scopes(model)
    if section.scope == "backbone" and len(parts) > 1:
        features = session.task.exported_features(model)
        return session.backbone_workload(features, size or session.img_size, section.batch_size)
    workload = session.workload(model, size, section.batch_size)
    if not isinstance(workload.inputs, Tensor):
        raise _untraceable(f"the model of task {session.task.name} takes more than one tensor of images")
    if len(parts) > 1 and answers_each_image(session, model, size):
        raise _untraceable(f"the model of task {session.task.name} answers each image")
    return workload


def tell_of_export(session: Session, model: nn.Module) -> None:
    """A warning if the export, as it is configured, writes no file that the latency budget is of."""
    search, export = session.config.search, session.config.export
    formats = {"openvino": ("openvino", "onnx"), "onnxruntime": ("onnx",)}.get(search.runtime)
    if formats is None or search.budget_latency is None:
        return
    formats = formats if search.precision == "fp32" else formats[:1]
    try:
        scope, written = exported_scope(search.scope), exported_part(session, model).scope
    except ConfigError as error:
        session.reporter.warn(f"search: the budget is of a file for {search.runtime}, and export will fail: {error}")
        return
    if search.precision != export.precision or not set(formats) & set(export.formats) or scope != written:
        session.reporter.warn(
            f"search: the budget is of a file in {search.precision} for {search.runtime}, of scope {scope}; "
            f"export.precision is {export.precision}, export.formats {', '.join(export.formats) or 'empty'}, "
            f"and the scope will be {written}. Set export.precision, .formats and .scope before you export"
        )


def exported_scope(scope: Scope) -> ExportScope:
    """Scope of the files of a search: of a backbone they hold the neck too."""
    return "features" if scope == "backbone" else "model"


def cost_scope(session: Session, scope: Scope | None, metric: CostMetric) -> CostScope | None:
    """What costs of `metric` are of where those of the search are of `scope`; None where the model has one scope."""
    if scope is None or metric == "macs" or session.config.search.runtime == "torch":
        return scope
    return exported_scope(scope)


def expected_identity(session: Session, model: nn.Module) -> dict[str, object]:
    """Of a table of any machine: what does not depend on this one. No runtime needs to be installed."""
    section = session.config.search
    if section.runtime == "torch":
        workload = session.workload(model, batch_size=section.batch_size, scope=section.scope)
        dtype = str(TORCH_DTYPE[section.precision]).removeprefix("torch.")
        return {**table_identity(workload), "dtype": dtype}
    return _program_identity(session, program_workload(session, model))


def swin_parameters(model: nn.Module) -> dict[str, object]:
    """Parameters of all stages: a table of elsewhere may be of a model with a head for other categories."""
    return {"swin_parameters": sum(p.numel() for stage in sparse_stages(model) for p in stage.parameters())}


def program_settings(session: Session) -> dict[str, object]:
    """What is set of programs besides the model; `activations` where they are asked for, `auto` hangs on the CPU."""
    section = session.config.search
    asked = _asked(session) if section.precision == "int8" else section.precision
    activations = {} if asked == "auto" else {"activations": asked}
    opset = session.config.export.opset
    return {"runtime": section.runtime, "precision": section.precision, "opset": opset, **activations}


def _asked(session: Session) -> ActivationsAsked:
    """What the programs are asked to compute in besides eight bits: `LOWERING` alone has a choice."""
    section = session.config.search
    has_choice = (section.precision, section.runtime) == ("int8", LOWERING)
    return session.config.export.activations if has_choice else "auto"


def _program_identity(
    session: Session, workload: Workload, here: Mapping[str, object] = MappingProxyType({})
) -> dict[str, object]:
    scope = {"scope": exported_scope(workload.scope)}
    return program_identity(workload, {**program_settings(session), **here, **scope})


def label_in(identity: Mapping[str, Any]) -> str:
    """Precision of an identity of programs as tables have it: `int8+bf16`. Of torch it is the dtype."""
    if "precision" not in identity:
        return str(identity.get("dtype", "unknown"))
    return precision_label(identity["precision"], identity["activations"])


def check(session: Session) -> Callable[[], None]:
    """Raises where a stop was asked for."""
    return partial(session.stop.check, "search", "every evaluation so far is in the ledger")


def _with_clock(session: Session, identity: Mapping[str, object]) -> dict[str, object]:
    clock = session.config.clock
    return {**identity, "clock": [clock.max_neighbour, clock.max_spread]}


def _untraceable(got: str) -> ConfigError:
    do = "Set search.scope: backbone, which can be exported, or search.runtime: torch."
    return ConfigError("search.runtime", f"no program can be made of the whole model: {got}", do)
