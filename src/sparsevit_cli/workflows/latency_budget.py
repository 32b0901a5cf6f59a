"""The latency budget that a winner was found for, and whether its exported file keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparsevit_cli.documents import understood
from sparsevit_cli.errors import CheckpointError, ConfigError
from sparsevit_cli.exporting import open_export, structured_images
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.profiling.program_table import measure_programs
from sparsevit_cli.runtimes import runtime
from sparsevit_cli.search.budget import format_cost
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.winner import read_winner

from .latencies import machine_told
from .latency_sources import label_in
from .rows import TORCH
from .session import Session


@dataclass(frozen=True)
class RunAs:
    """How a model is run where its latency counts. `precision` is a label, such as `int8+bf16`."""

    runtime: str
    precision: str
    scope: str
    batch: int
    image_size: Size

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RunAs:
        """What the identity of programs, or a winner's `measured_with`, tells."""
        height, width = map(int, record["image_size"])
        place = str(record.get("runtime", TORCH))
        label = str(record["precision"]) if place == TORCH else label_in(record)
        batch = int(record["batch"] if "batch" in record else record["batch_size"])
        return cls(place, label, str(record.get("scope", "model")), batch, (height, width))

    def __str__(self) -> str:
        part = {"features": ", backbone and neck", "backbone": ", backbone"}.get(self.scope, "")
        return f"{self.runtime}, {self.precision}{part}, batch {self.batch}, {size_text(self.image_size)} pixels"


@dataclass(frozen=True)
class LatencyBudget:
    """Milliseconds per batch at most; `by_table` is what a given latency table was measured on, if it was one's."""

    limit_ms: float
    run_as: RunAs
    by_table: str = ""


@dataclass(frozen=True)
class BudgetCheck:
    """What the exported `file` takes beside its budget. Where nothing was measured, `why` says the reason."""

    budget: LatencyBudget
    file: str = ""
    latency: Latency | None = None
    why: str = ""

    @property
    def kept(self) -> bool | None:
        """None if it is not known."""
        if self.latency is None or not self.latency.stable:
            return None
        return self.latency.median_ms <= self.budget.limit_ms

    @property
    def told(self) -> str:
        """In one line."""
        budget = f"the budget of {format_cost(self.budget.limit_ms, 'latency_ms')} ({self.budget.run_as})"
        found = self.latency
        if found is None or not found.stable:
            why = self.why if found is None else f"{self.file} is not steady, {found.unsteady}"
            return f"it is not known if {budget} is kept: {why}"
        verb = "is kept" if self.kept else "is NOT KEPT"
        took = f"{self.file} takes {found.median_ms:.2f} ms [{found.low_ms:.2f}, {found.high_ms:.2f}]"
        return f"{budget} {verb}: {took}{'' if self.kept else self._do}"

    @property
    def _do(self) -> str:
        """What helps where it is not kept."""
        eight = self.budget.run_as.precision.startswith("int8")
        fewer = "; a larger export.max_loss keeps fewer layers in float" if eight else ""
        return f". Search with a smaller budget{fewer}"

    def document(self) -> dict[str, object]:
        """As JSON has it."""
        run_as, known = self.budget.run_as, self.latency if self.kept is not None else None
        unsteady = None if self.latency is None else self.latency.unsteady
        return {
            "limit_ms": self.budget.limit_ms,
            "runtime": run_as.runtime,
            "precision": run_as.precision,
            "scope": run_as.scope,
            "batch": run_as.batch,
            "image_size": list(run_as.image_size),
            "by_table": self.budget.by_table or None,
            "file": self.file or None,
            "latency_ms": None if known is None else known.median_ms,
            "latency_ms_low": None if known is None else known.low_ms,
            "latency_ms_high": None if known is None else known.high_ms,
            "kept": self.kept,
            "why": self.why or unsteady or None,
        }


def budget_of(session: Session, config: SparsityConfig) -> LatencyBudget | None:
    """The smallest latency budget of the search whose winner is `config`: who keeps it keeps the others. None if there
    is none. Raises CheckpointError.
    """
    folder = session.earlier("search").path
    found = []
    for path in (folder / "winner.yaml", *sorted(folder.glob("winner-*.yaml"))):
        if not path.is_file():
            continue
        winner, about = read_winner(path)
        with understood(path, "Search again: sparsevit search"):
            limit_ms = about["budget"].get("latency_ms")
            if limit_ms is None or winner != config:
                continue
            table = about.get("latency_table")
            by_table = "" if table is None else machine_told(table)
            found.append(LatencyBudget(float(limit_ms), RunAs.of(about["measured_with"]), by_table))
    return min(found, key=lambda budget: budget.limit_ms, default=None)


def not_measured(budget: LatencyBudget) -> BudgetCheck:
    """Of a budget by a given latency table: it may be of another machine, and nothing is measured beside it."""
    why = f"it is by the latency table of {budget.by_table}, and nothing is measured beside that"
    return BudgetCheck(budget, why=why)


def exported_call(session: Session, wanted: RunAs) -> tuple[str, Callable[[], object]]:
    """Name of the file of this experiment's export that runs as `wanted`, and a call of it on one batch.

    Raises ConfigError, CheckpointError where there is none.
    """
    content = open_export(session.earlier("export").path)
    chosen = runtime(wanted.runtime)
    path = content.file_for(chosen)
    content.verified(path)
    _, height, width = content.image_shape
    found = RunAs(chosen.name, content.label_of(path), content.scope, wanted.batch, (height, width))
    if found != wanted:
        got = f"{path.name} is of {found}; the budget is of {wanted}"
        raise ConfigError("export", got, "Set export.precision, export.formats and export.scope.")
    images = structured_images(content.image_shape, wanted.batch, seed=0)
    program = chosen.load(path, activations=content.activations_of(path), shape=images.shape)
    return path.name, partial(program.run, images)


def check_budget(session: Session, config: SparsityConfig) -> BudgetCheck | None:
    """Measure this experiment's exported file, at `config`, where and as the search measured its winner.

    None if no budget of a program belongs to `config`: what eager PyTorch takes is no file's latency.
    """
    try:
        budget = budget_of(session, config)
    except CheckpointError as error:
        session.reporter.warn(f"export: the budget of the search is not known: {error}")
        return None
    if budget is None or budget.run_as.runtime == TORCH:
        return None
    if budget.by_table:
        return not_measured(budget)
    try:
        file, call = exported_call(session, budget.run_as)
    except (ConfigError, CheckpointError) as error:
        return BudgetCheck(budget, why=error.got)
    if not session.config.export.latency:
        return BudgetCheck(budget, file, why="export.latency is false")
    latencies = measure_programs(
        lambda _: call, [config], seconds=session.config.search.seconds, patience=session.patience,
        before_round=partial(session.stop.check, "export", "the files are whole"), **session.measuring,
    )  # fmt: skip
    return BudgetCheck(budget, file, latencies[config])
