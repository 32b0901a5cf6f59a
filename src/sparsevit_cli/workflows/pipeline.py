"""run: every command in order, then one table of dense against sparse on this machine.

A step that is done is not done again, so a killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import nn

from sparsevit_cli.commands import COMMANDS
from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.data.shrunk import Scale, Shrunk
from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.errors import CheckpointError, ConfigError, UnsteadyError
from sparsevit_cli.exporting import check_packages
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.profiling.neighbours import Patience
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.swin.geometry import set_image_size
from sparsevit_cli.tasks.task import Metric, Score
from sparsevit_cli.weights import load_state

from .evaluate import evaluate_checkpoint
from .export import check_exportable, export_settings, export_winner
from .in_runtimes import chosen_runtimes
from .latencies import latencies_of_search
from .latency_budget import BudgetCheck, RunAs, budget_of, exported_call, not_measured
from .latency_sources import ProgramSource, tell_of_export
from .profile import profile_model, profile_settings
from .profile_report import PartCosts
from .profile_target import configured_sizes
from .ratios import ratios_to_finetune
from .rows import TORCH
from .scopes import image_told, per_image
from .search import budget_requests, is_searched, named_scope, search
from .session import Session
from .smaller import equal_size, open_rival, size_step
from .training import (
    adapt,
    checked_plan,
    dense_weights,
    finetune,
    has_own_weights,
    pretrain,
    score,
    train_dense_baseline,
    train_smaller_rival,
)
from .weights import trained_weights

DENSE = "dense (timm)"
TRAINED_AS_LONG = "dense, trained as long"
"""As long as the sparse model: adaptation and finetuning included."""


@dataclass(frozen=True, kw_only=True)
class ScopeCost:
    """What a model, or its backbone, costs; speed-up against dense at the same scope, in the same measurement.

    Latency is None where it is not steady, speed-up where it or dense's is not.
    """

    gmacs: float
    latency_ms: float | None
    latency_ms_low: float | None
    latency_ms_high: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None


@dataclass(frozen=True, kw_only=True)
class PipelineRow(ScopeCost):
    """One model of the closing table and what the whole of it costs; its `backbone` if there are modules around it.

    `exported` is what its program costs in `search.runtime`, if that is not torch and the row is measured there.
    """

    label: str
    ratios: tuple[tuple[float, ...], ...] | None
    image_size: Size
    score: float
    scores: Mapping[str, float]
    backbone: ScopeCost | None = None
    exported: ScopeCost | None = None
    per_image: float | None = 1.0
    """How many of what costs are per an image takes (`Task.per_image`)."""

    def document(self) -> dict[str, Any]:
        """The row in JSON documents."""
        sometimes = ("backbone", "exported")
        return {name: value for name, value in asdict(self).items() if name not in sometimes or value is not None}


@dataclass(frozen=True)
class PipelineSummary:
    """The closing table and what was written."""

    folder: RunFolder
    metric: Metric
    about: Mapping[str, str]
    batch: int
    count: int
    rows: tuple[PipelineRow, ...]
    seconds: Mapping[str, float]
    written: tuple[str, ...]
    environment: Mapping[str, object]
    clock: str | None
    """Why latencies are missing; None where all are steady."""
    without_clock: bool
    """True where the search left a latency budget out, for the clock was not steady."""
    runtime: str | None
    """Where `exported` of the rows was measured, in words; None where nothing was."""
    parts: PartCosts | None
    """Where the time and the multiply-adds of the winner go, as `profile` found; None without modules around a Swin."""
    budget: BudgetCheck | None
    """Of a budget that is not kept in PyTorch on this machine: whether the exported file of the winner keeps it."""

    def image_lines(self) -> list[str]:
        """What a whole image costs; nothing if the model takes images whole."""
        dense, winner = self.rows[0], self.rows[-1]
        costs = {
            name: (row.gmacs, None if row.latency_ms is None else row.latency_ms / self.batch)
            for name, row in (("dense", dense), ("winner", winner))
        }
        return image_told(self.about.get("per", "image"), dense.per_image, dense.image_size, costs)

    def document(self) -> dict[str, Any]:
        """The JSON document of `sparsevit run --json`."""
        return {
            "schema_version": 2, **self.about, **self.environment, "batch": self.batch, "validation_images": self.count,
            "rows": [row.document() for row in self.rows], "clock": self.clock,
            "searched_without_clock": self.without_clock, "runtime": self.runtime,
            "parts": None if self.parts is None else self.parts.document(),
            "budget": None if self.budget is None else self.budget.document(), "seconds": self.seconds,
            "written": self.written,
        }  # fmt: skip


@dataclass(frozen=True)
class _Contender:
    """One row of the table: a model at a setting, and what it scored with weights of its own.

    Latency does not depend on weights: all rows of one image size are measured with one `model`. A row that is
    `timed_as` another one is the same model but for its weights, and is not measured again.
    """

    label: str
    model: nn.Module
    config: SparsityConfig
    exact: bool
    size: Size
    score: Score
    timed_as: str


def run_pipeline(session: Session) -> PipelineSummary:
    """pretrain, adapt, search, finetune, evaluate, profile, export, and the closing table.

    Raises what the steps raise; typing the command again goes on.
    """
    _check_settings(session)
    folder = session.folder("run")
    seconds: dict[str, float] = {}
    if not has_own_weights(session):
        seconds["pretrain"] = pretrain(session).seconds
    seconds["adapt"] = adapt(session).seconds
    if session.config.finetune.ratios is None:
        _search(session)
    seconds["finetune"] = finetune(session).seconds
    contenders = _contenders(session, seconds)
    _last_steps(session, contenders[-1].config, trained_weights(session, "finetune", "sparsevit run").sha256)
    return _summary(session, folder, contenders, seconds, _parts(session))


def _last_steps(session: Session, config: SparsityConfig, weights_sha256: str) -> None:
    """What is made of the finetuned weights, unless it is there and of these settings and flags."""
    ratios = [list(stage) for stage in config.ratios]
    sizes = [list(size) for size in configured_sizes(session)]
    tuned = {"ratios": ratios, "weights_sha256": weights_sha256}
    profiled = {"ratios": ratios, "image_sizes": sizes, "settings": profile_settings(session), "steady": True}
    steps: tuple[tuple[str, Callable[[Session], object], Mapping[str, object]], ...] = (
        ("evaluate", evaluate_checkpoint, {**tuned, "runtime": None}),
        ("profile", profile_model, profiled),
        ("export", export_winner, {**tuned, "settings": export_settings(session)}),
    )
    for command, step, wanted in steps:
        found = session.earlier(command).done(*COMMANDS[command].needed)
        if session.fresh or any(found.get(name) != value for name, value in wanted.items()):
            step(session)


def _search(session: Session) -> None:
    """Search; by multiply-adds alone where the clock cannot be trusted and there is a budget of them."""
    if is_searched(session):
        if (session.earlier("search").read_result() or {}).get("without_clock"):
            typed = session.earlier("search").typed
            session.reporter.warn(f"the winner was found without a clock; on a quiet machine, type: {typed}")
        return
    try:
        search(session)
    except UnsteadyError as error:
        if session.config.search.budget_macs is None:
            do = "Set search.budget_macs too, to go on without a clock, or type the command again on a quiet machine."
            raise UnsteadyError(error.what, error.got, do) from error
        session.reporter.warn(f"the clock cannot be trusted now ({error.got})")
        session.reporter.warn(f"run: the budget of multiply-adds decides alone: {session.config.search.budget_macs}")
        search(session.replaced(fresh=False), without_clock=True)


def _check_settings(session: Session) -> None:
    """What the later steps would refuse, before hours of training and not after. Raises ConfigError."""
    config = session.config
    check_packages(config.export.formats)
    data = session.data()
    model = session.model(data.categories)
    check_exportable(session, model)
    sections = {"pretrain": config.train, "adapt": config.adapt, "finetune": config.finetune}
    if has_own_weights(session):
        del sections["pretrain"]
    for command, section in sections.items():
        checked_plan(session, command, section, model, data)
    if config.finetune.ratios is None:
        budget_requests(session)
        named_scope(session, model)
        tell_of_export(session, model)
        with ExitStack() as resources:
            space = session.space(model, config.search.max_ratio)
            latencies_of_search(session, model, space, resources)
    else:
        SparsityConfig.from_ratios(config.finetune.ratios, model_depths(model))
    chosen_runtimes(session, "profile")


def _contenders(session: Session, seconds: dict[str, float]) -> list[_Contender]:
    """The rows of the table, each scored on the validation data; two models at most are in memory."""
    adapted, tuned = (trained_weights(session, name, "sparsevit run") for name in ("adapt", "finetune"))
    dense, data = dense_weights(session, "run"), session.data(tuned)
    longest = dense
    model = session.model(data.categories, dense).eval()
    winner = ratios_to_finetune(session, model_depths(model), "sparsevit run", adapted.sha256)
    space = session.space(model, session.config.search.max_ratio)
    found: list[_Contender] = []

    def add(
        label: str, of: nn.Module, config: SparsityConfig, size: Size = session.img_size, exact: bool = True,
        timed_as: str | None = None,
    ) -> None:  # fmt: skip
        set_sparsity(of, config, exact=exact)
        images = data.val if size == session.img_size else Shrunk(data.val, Scale(session.img_size, size))
        with session.reporter.progress("score", -(-len(data.val) // session.config.data.eval_batch_size)) as progress:
            reached = score(session, of, images, progress=progress, before_batch=_check(session))
        found.append(_Contender(label, of, config, exact, size, reached, timed_as or label))

    timm = DENSE if session.config.model.partition == "roll_first" else "dense (timm's code, padded first)"
    add(timm, model, space.dense)
    add("dense, our kernels", model, space.dense, exact=False)
    if session.config.run.dense_baseline:
        longest, seconds["dense baseline"] = train_dense_baseline(session)
        load_state(model, longest.state_dict, "weights of the dense baseline")
        add(TRAINED_AS_LONG, model, space.dense, timed_as=timm)
    folder = open_rival(session, winner)
    size = equal_size(session, folder, model, winner, partial(_measure, session, rounds=10))
    if size is not None:
        rival = session.model(data.categories, longest)
        set_image_size(rival, size)
        scale = Scale(session.img_size, size, size_step(session, rival))
        seconds["rival"] = train_smaller_rival(session, folder, rival, longest, scale).seconds
        add(f"dense at {size_text(size)}, our kernels", rival.eval(), space.dense, size, exact=False)
    load_state(model, adapted.state_dict, "weights of adapt")
    for config in _uniform_rivals(session, space, model, winner):
        add(f"uniform {config.ratios[0][0]:g}", model, config)
    add("winner, before finetuning", model, winner)
    load_state(model, tuned.state_dict, "weights of finetune")
    add("winner, finetuned", model, winner)
    return found


def _check(session: Session) -> Callable[[], None]:
    return partial(session.stop.check, "run", "every finished step is saved")


def _uniform_rivals(
    session: Session, space: SearchSpace, model: nn.Module, winner: SparsityConfig
) -> list[SparsityConfig]:
    """The two uniform ratios whose multiply-adds stand next to the winner's, above and below."""
    macs = macs_cost(session.workload(model, scope=session.task.scopes(model)[0]))
    uniform = [space.uniform(tenths / 10) for tenths in range(1, space.max_tenths + 1)]
    above = [config for config in uniform if macs(config) >= macs(winner)]
    below = [config for config in uniform if macs(config) < macs(winner)]
    return above[-1:] + below[:1]


def _measure(
    session: Session, calls: Mapping[str, Callable[[], object]], rounds: int = 30, patience: Patience | None = None
) -> dict[str, Latency]:
    latencies = measure_interleaved(
        calls, device=session.device, seconds=session.config.search.seconds, rounds=rounds, strict=False,
        patience=patience or session.patience, before_round=_check(session), **session.measuring,
    )  # fmt: skip
    for name, latency in latencies.items():
        if not latency.stable:
            session.reporter.warn(f"not steady: latency of {name}, {latency.unsteady}")
    return latencies


def _summary(
    session: Session,
    folder: RunFolder,
    contenders: list[_Contender],
    seconds: Mapping[str, float],
    parts: PartCosts | None,
) -> PipelineSummary:
    """Measure all contenders, dense first: it is the reference. Each scope is one interleaved run."""
    spent = session.config.search
    scopes = session.task.scopes(contenders[0].model)
    measured = {scope: _costs(session, contenders, scope) for scope in scopes}
    exported, runtime, budget = _in_runtime(session, contenders)
    rows = [
        PipelineRow(
            label=contender.label,
            ratios=contender.config.ratios,
            image_size=contender.size,
            score=contender.score.value,
            scores=contender.score.values,
            **asdict(measured["model"].costs[contender.label]),
            backbone=measured["backbone"].costs[contender.label] if "backbone" in measured else None,
            exported=exported.costs.get(contender.label),
            per_image=per_image(session, contender.size, Scale(session.img_size, contender.size)),
        )
        for contender in contenders
    ]
    written = [
        session.earlier("search").path / "winner.yaml",
        session.earlier("search").path / "pareto.png",
        session.earlier("finetune").path / "checkpoints",
        session.earlier("profile").path / "profile.json",
        session.earlier("export").path / "manifest.json",
        folder.result,
    ]
    summary = PipelineSummary(
        folder, session.task.metric, session.task.about(), spent.batch_size,
        contenders[0].score.count, tuple(rows), seconds,
        tuple(str(path) for path in written if path.exists() or path == folder.result), session.environment,
        next((found.unsteady for found in (*measured.values(), exported) if found.unsteady), None),
        bool((session.earlier("search").read_result() or {}).get("without_clock")),
        runtime, parts, budget,
    )  # fmt: skip
    folder.set_aside(["metrics.json"], session.reporter)
    folder.write_result(summary.document())
    return summary


def _parts(session: Session) -> PartCosts | None:
    """What the profile of this run found. Raises CheckpointError where it is damaged."""
    path = session.earlier("profile").path / "profile.json"
    with understood(path):
        return PartCosts.of_profile(read_json(path))


@dataclass(frozen=True)
class _Measured:
    """Costs by label at one scope, and why some latencies are missing (None: all are steady)."""

    costs: Mapping[str, ScopeCost]
    unsteady: str | None

    @classmethod
    def of(cls, rows: Sequence[tuple[str, float, Latency]]) -> _Measured:
        """Label, multiply-adds and latency of each row; the first one is the reference of speed-ups."""
        reference = rows[0][2]
        return cls(
            {label: ScopeCost(gmacs=macs / 1e9, **_facts(latency, reference)) for label, macs, latency in rows},
            next((latency.unsteady for _, _, latency in rows if latency.unsteady), None),
        )


def _costs(session: Session, contenders: Sequence[_Contender], scope: Scope) -> _Measured:
    section = session.config.search
    workloads = {
        c.model: session.workload(c.model, c.size, section.batch_size, section.precision, scope) for c in contenders
    }
    macs = {model: macs_cost(workload) for model, workload in workloads.items()}

    def call(contender: _Contender) -> object:
        workload = workloads[contender.model]
        set_sparsity(workload.model, contender.config, exact=contender.exact)
        return workload.run()

    latencies = _measure(
        session, {c.label: partial(call, c) for c in contenders if c.timed_as == c.label},
        patience=Patience(session.config.clock.wait, session.config.clock.max_neighbour),
    )  # fmt: skip
    return _Measured.of([(c.label, macs[c.model](c.config), latencies[c.timed_as]) for c in contenders])


def _in_runtime(session: Session, contenders: Sequence[_Contender]) -> tuple[_Measured, str | None, BudgetCheck | None]:
    """What the programs of those of the experiment's image size cost in `search.runtime`, where that is, and if the
    winner's keeps its budget. All in one interleaved run; the winner's program is the exported file, if there is one.

    Nothing is measured if the search had no runtime but torch, or a latency table of another machine.
    """
    section, clock, winner = session.config.search, session.config.clock, contenders[-1].config
    nothing = _Measured({}, None)
    if session.config.finetune.ratios is not None:
        return nothing, None, None
    budget = budget_of(session, winner)
    if section.latency_table is not None:
        return nothing, None, None if budget is None else not_measured(budget)
    if section.runtime == TORCH:
        return nothing, None, None
    rows = [contender for contender in contenders if contender.exact and contender.size == session.img_size]
    files: dict[SparsityConfig, Callable[[], object]] = {}
    file = why = ""
    with ExitStack() as resources:
        source = ProgramSource(session, contenders[0].model, resources)
        try:
            file, files[winner] = exported_call(session, RunAs.of(source.identity))
        except (ConfigError, CheckpointError) as error:
            why = error.got
            session.reporter.warn(f"run: no exported file is measured, but the program of the search: {why}")
        latencies = source.measure(
            list(dict.fromkeys(contender.config for contender in rows)), Patience(clock.wait, clock.max_neighbour),
            strict=False, files=files,
        )  # fmt: skip
        macs = macs_cost(source.workload)
    for config, latency in latencies.items():
        if not latency.stable:
            session.reporter.warn(f"not steady: latency of {config} in {source.told}, {latency.unsteady}")
    checked = None if budget is None else BudgetCheck(budget, file, latencies[winner] if file else None, why)
    return _Measured.of([(row.label, macs(row.config), latencies[row.config]) for row in rows]), source.told, checked


def _facts(latency: Latency, reference: Latency) -> dict[str, float | None]:
    """The latency's columns; those that are not steady are None."""
    known = {"latency_ms": latency.stable, "speedup": latency.stable and reference.stable}
    return {name: value if known[name.removesuffix("_low").removesuffix("_high")] else None
            for name, value in latency.as_row().items()}  # fmt: skip
