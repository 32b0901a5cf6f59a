"""search: feasibility, latency table, candidates on the search split, finalists measured for real, one winner."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from torch import nn

from sparsevit_cli.atomic import write_atomic, write_json
from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.data.source import Data
from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.errors import BudgetError, CheckpointError, ConfigError, MeasurementError
from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.reporting import optional_output
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.search.budget import (
    COST_NAME,
    Budget,
    BudgetRequest,
    Cost,
    Feasibility,
    check_reachable,
    format_cost,
    of_scope,
    parse_budgets,
)
from sparsevit_cli.search.correlation import spearman
from sparsevit_cli.search.engine import most_evaluations, search_sparsity
from sparsevit_cli.search.latency_table import LatencyTable, TableError
from sparsevit_cli.search.ledger import Ledger, LedgerScope
from sparsevit_cli.search.optuna_search import loaded_optuna
from sparsevit_cli.search.pareto import pareto_front
from sparsevit_cli.search.results import Evaluation, Progress, SearchResult
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.tasks.task import Metric
from sparsevit_cli.winner import read_winner, write_winner

from .latencies import Latencies, latencies_of_search
from .latency_sources import tell_of_export
from .plots import plot_pareto
from .scores import Scores, first_images, ledger_settings
from .session import Session, Weights
from .weights import trained_weights
from .workers import Workers

WINNER = "winner.yaml"
RESULTS = (WINNER, "pareto.csv", "pareto.png", "history.csv", "metrics.json")
"""Files of one search; an earlier search's are set aside, the ledger and the latency table are shared."""


INFORMED = "informed.json"
"""What an unfinished search was informed by when it began."""
_NONE: Mapping[str, BudgetRequest] = MappingProxyType({})


@dataclass(frozen=True)
class Finalist:
    """A candidate scored on the whole search split and measured on the device; `proxy_score` is that on the subset."""

    config: SparsityConfig
    score: float
    proxy_score: float
    cost: float
    gmacs: float
    predicted_ms: float | None
    latency_ms: float | None
    """None, as are the next three, where the clock was not steady and the budget does not need it."""
    latency_ms_low: float | None
    latency_ms_high: float | None
    speedup: float | None
    within_budget: bool


@dataclass(frozen=True)
class FurtherWinner:
    """What was found for another budget in the same search, and the file that it is in."""

    budget: Budget
    finalist: Finalist
    evaluated: int
    path: Path


@dataclass(frozen=True)
class SearchSummary:
    """The winner and how it was found."""

    folder: RunFolder
    metric: Metric
    winner: Finalist
    finalists: tuple[Finalist, ...]
    dense_ms: float | None
    feasibility: tuple[Feasibility, ...]
    table_error: TableError | None
    asked: int
    evaluated: int
    infeasible: int
    proxy_correlation: float | None
    images: int
    """Images behind all scores, each counted once for every candidate that was scored on it."""
    forwarded: int
    """Those of `images` that went through the model now; the scores on the others were in the ledger."""
    note: str
    not_measured_here: str = ""
    """The machine that predicted latencies are of, if nothing was measured here."""
    others: tuple[FurtherWinner, ...] = ()
    measured_in: str = ""
    """Runtime, precision and batch of measured latencies."""

    @property
    def scope(self) -> Scope | None:
        """What costs are of, if the model has more than one scope."""
        return self.feasibility[0].scope


@dataclass(frozen=True)
class _Costs:
    """What candidates are judged by: one cost function and budget per request, the first leading."""

    constraints: tuple[tuple[Cost, Budget], ...]
    feasibility: tuple[Feasibility, ...]
    table: LatencyTable | None


def search(
    session: Session, *, without_clock: bool = False, further: Mapping[str, BudgetRequest] = _NONE,
    leave_out_unreachable: bool = False, workers: str | None = None,
) -> SearchSummary:  # fmt: skip
    """Find the configuration with the best score on the search split within the budgets.

    `without_clock` leaves a latency budget out, if there is one of multiply-adds too. Each of the `further` budgets, by
    the name of its winner's file, is searched alone afterwards, and informed by what was paid before. Those out of
    reach are refused, or left out with a warning. `workers` (`local:4`, `tcp://...`) score the candidates; the winner
    is the same without them.

    Raises BudgetError with the reachable range, before anything is evaluated. Raises UnsteadyError for a latency budget
    if the clock cannot be trusted, MeasurementError if no finalist meets the budget once measured, and CheckpointError
    if there is nothing to search with.
    """
    requests = budget_requests(session)
    with opened_search(session, without_clock=without_clock, workers=workers) as work:
        requests = tuple(
            replace(request, scope=work.scope) for request in requests if request.metric == "macs" or not without_clock
        )
        costs = work.costs(requests)
        costs_of: dict[str, _Costs] = {}
        for name, request in further.items():
            try:
                costs_of[name] = work.costs((replace(request, scope=work.scope),))
            except BudgetError as error:
                if not leave_out_unreachable:
                    raise
                session.reporter.warn(f"the budget {name} is left out: {error.got}")
        result = work.run(costs)
        summary = work.finish(costs, result, work.finalists(costs, result))
        others = {name: work.further(name, costs) for name, costs in costs_of.items()}
        work.write_evaluations(summary, costs, [result, *(found for found, _ in others.values())])
        work.forget_informed()
        return replace(
            summary, others=tuple(winner for _, winner in others.values()),
            images=sum(work.scores.used.values()), forwarded=work.scores.forwarded,
        )  # fmt: skip


@contextmanager
def opened_search(session: Session, *, without_clock: bool = False, workers: str | None = None) -> Iterator[Search]:
    """The adapted model, the search split and the ledger of a search. Raises CheckpointError, ConfigError."""
    weights = trained_weights(session, "adapt", "sparsevit search")
    data = session.data(weights)
    if data.fingerprint != weights.result.get("data_fingerprint"):
        got = "the data, or the seed that splits them, are not those that adapt trained on"
        raise CheckpointError("sparsevit search", got, "Use the same data and seed: images trained on prove nothing.")
    if session.config.search.max_ratio > session.config.adapt.max_ratio:
        session.reporter.warn(
            f"search.max_ratio {session.config.search.max_ratio:g} is above adapt.max_ratio "
            f"{session.config.adapt.max_ratio:g}: weights were not adapted to all that is searched"
        )
    if session.config.search.strategy == "optuna":
        loaded_optuna()  # refused before anything is measured
    tell_of_export(session)
    model = session.model(weights.categories, weights).eval()
    scope = named_scope(session, model)
    folder = session.folder("search")
    settings = ledger_settings(session, first_images(session, len(data.search)))
    valid_for = LedgerScope(weights.sha256, data.fingerprint, settings)
    space = session.space(model, session.config.search.max_ratio)
    with ExitStack() as resources:
        ledger = resources.enter_context(Ledger.open(folder.path / "ledger.sqlite", valid_for))
        latencies = latencies_of_search(session, model, space, ledger, folder, resources)
        yield Search(session, folder, data, model, weights, ledger, latencies, without_clock, scope, workers)


def winner_name(budget: str) -> str:
    """The file of a further winner, such as `winner-35ms.yaml` or `winner-70percent.yaml`."""
    return f"winner-{budget.strip().replace('%', 'percent')}.yaml"


def budget_requests(session: Session) -> tuple[BudgetRequest, ...]:
    """The budgets of the configuration. Raises ConfigError where there is none."""
    section = session.config.search
    requests = parse_budgets(section.budget_latency, section.budget_macs)
    if not requests:
        got = "neither search.budget_latency nor search.budget_macs is set"
        raise ConfigError("search", got, "Give --budget-latency 50ms or 70%, or --budget-macs 3G or 60%.")
    return requests


def named_scope(session: Session, model: nn.Module) -> Scope | None:
    """What the costs of a search are of; None where `model` has one scope, so that there is nothing to tell apart.

    Raises ConfigError for a scope that it does not have.
    """
    wanted, scopes = session.config.search.scope, session.task.scopes(model)
    if wanted not in scopes:
        got = f"{wanted}, but nothing stands around the Swin in a model of task {session.task.name}"
        raise ConfigError("search.scope", got, "Set it to model.")
    return wanted if len(scopes) > 1 else None


def is_searched(session: Session) -> bool:
    """True where the winner stands for the present settings and adapted weights."""
    folder = session.earlier("search")
    result = folder.done()
    try:
        winner = read_winner(folder.path / "winner.yaml")[0]
    except CheckpointError:
        return False
    if result.get("ratios") != [list(stage) for stage in winner.ratios]:
        return False
    weights = trained_weights(session, "adapt", "sparsevit search")
    settings = section_hash(session.config, "search", "seed")
    return (result.get("settings"), result.get("checkpoint_sha256")) == (settings, weights.sha256)


class Search:
    """One search: the model and data it looks at, and the steps from feasibility to the winner."""

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        data: Data,
        model: nn.Module,
        weights: Weights,
        ledger: Ledger,
        latencies: Latencies,
        without_clock: bool,
        scope: Scope | None,
        workers: str | None,
    ) -> None:
        self.without_clock, self.scope = without_clock, scope
        self.session, self.folder, self.data, self.model, self.weights = session, folder, data, model, weights
        self.ledger, self.scores = ledger, Scores(session, model, data.search, ledger)
        first = self.scores.first.numbers
        self.join = partial(Workers, workers, session, ledger, data.fingerprint, first) if workers else nullcontext
        self.section = session.config.search
        self.space, self.latencies = latencies.space, latencies
        self.macs = macs_cost(session.workload(model, scope=self.section.scope))

    # -- costs --------------------------------------------------------------------------------------------------

    def costs(self, requests: Sequence[BudgetRequest]) -> _Costs:
        """Feasibility of every budget, told before anything is spent; then the latency table if one is asked for."""
        corners = [self.space.dense, self.space.middle, self.space.sparsest]
        constraints: list[tuple[Cost, Budget]] = []
        feasibility: list[Feasibility] = []
        table: LatencyTable | None = None
        measured: dict[SparsityConfig, float] = {}

        def row_of(request: BudgetRequest, cost: Cost) -> Feasibility:
            dense, middle, sparsest = map(cost, corners)
            budget = request.resolve(dense)
            return Feasibility(dense, middle, sparsest, budget.limit, budget.metric, budget.scope)

        by_macs = [request for request in requests if request.metric == "macs"]  # known without a measurement
        self._refuse_unreachable([row_of(request, self.macs) for request in by_macs], by_macs)
        for request in requests:
            if request.metric == "latency_ms":
                measured = {config: record.latency_ms for config, record in self.latencies.measure(corners).items()}
            feasibility.append(row_of(request, measured.__getitem__ if request.metric == "latency_ms" else self.macs))
        self._refuse_unreachable(feasibility, requests)
        self._tell(feasibility, requests)
        for row in feasibility:
            budget = row.budget
            if row.metric == "macs":
                constraints.append((self.macs, budget))
                continue
            table = self.latencies.table(list(measured.items()))
            constraints.append((table.cost, self._with_margin(budget, table, row)))
        return _Costs(tuple(constraints), tuple(feasibility), table)

    def _refuse_unreachable(self, feasibility: Sequence[Feasibility], requests: Sequence[BudgetRequest]) -> None:
        """Tell the table and raise BudgetError where a budget is out of reach."""
        if not all(row.reachable for row in feasibility):
            self._tell(feasibility, requests)
        for row in feasibility:
            check_reachable(row.budget, row.dense, row.sparsest)

    def _with_margin(self, budget: Budget, table: LatencyTable, row: Feasibility) -> Budget:
        """The budget less the share kept free for errors of the table; dense is in or out as it was measured."""
        if row.dense_fits:
            return replace(budget, limit=max(budget.limit, table.predict(self.space.dense)))
        dense, cheapest = table.predict(self.space.dense), table.predict(self.space.sparsest)
        below_dense = min(budget.limit * (1 - self.section.margin), math.nextafter(dense, 0))
        return replace(budget, limit=max(below_dense, cheapest))

    def _tell(self, feasibility: Sequence[Feasibility], requests: Sequence[BudgetRequest]) -> None:
        rows = [
            (
                f"{COST_NAME[row.metric]}{of_scope(row.scope)}",
                *(format_cost(value, row.metric) for value in (row.dense, row.middle, row.sparsest, row.limit)),
                "yes" if row.reachable else "NO",
            )
            for row in feasibility
        ]
        budgets = " and ".join(str(request) for request in requests)
        columns = ("cost", "dense", "middle", "sparsest", "budget", "reachable")
        self.session.reporter.table(f"Budget of {budgets}, batch {self.section.batch_size}", columns, rows)

    # -- search -------------------------------------------------------------------------------------------------

    def run(self, costs: _Costs) -> SearchResult:
        """The search itself; every evaluation is in the ledger before the next one starts."""
        section = self.section
        (cost, budget), *further = costs.constraints
        total = most_evaluations(section.strategy, section.population, section.generations, section.max_evaluations)
        informed = self._informed(costs) if section.strategy == "surrogate" else None
        with self.session.reporter.progress("search", total) as bar, self.join() as workers:

            def on_progress(progress: Progress) -> None:
                bar.advance(
                    1,
                    gen=f"{progress.generation}/{progress.generations}",
                    cached=progress.cached,
                    infeasible=progress.infeasible,
                    best=f"{progress.best.metric:.2f}",
                )

            result = search_sparsity(
                self.space,
                lambda config: next(self.scores.of_all([config])),
                cost,
                budget,
                strategy=section.strategy,
                seed=self.session.config.seed,
                max_evaluations=section.max_evaluations,
                population=section.population,
                parents=section.parents,
                generations=section.generations,
                mutation=section.mutation,
                constraints=tuple(further),
                known=self.ledger,
                informed=informed,
                evaluate_all=(workers or self.scores).of_all,
                on_progress=on_progress,
            )
            if workers:
                self.scores.forwarded += self.scores.first.count * result.evaluations
        first = self.scores.first
        self.scores.used |= {(evaluation.config, first.name): first.count for evaluation in result.history}
        return result

    def _informed(self, costs: _Costs) -> dict[SparsityConfig, float]:
        """What the ledger held when this very search began; read back, so that a stopped search goes on as it was."""
        path, known = self.folder.path / INFORMED, self.ledger.known()
        settings = section_hash(self.session.config, "search", "seed")
        name = json.dumps([self.ledger.scope.settings, settings, *(str(row.budget) for row in costs.feasibility)])
        saved = read_json(path) if path.exists() else {}
        with understood(path, "Remove it."):
            if name not in saved:
                saved[name] = [config.tenths for config in sorted(known)]
                write_json(path, saved)
            configs = [SparsityConfig(tuple(map(tuple, tenths))) for tenths in saved[name]]
            return {config: known[config] for config in configs}

    def forget_informed(self) -> None:
        """The search is done: the next one is informed by all that was paid."""
        (self.folder.path / INFORMED).unlink(missing_ok=True)

    def finalists(self, costs: _Costs, result: SearchResult) -> tuple[Finalist, ...]:
        """The best candidates on the whole split and on the clock, until one of them meets the budget."""
        ranked, laps = self.scores.raced(result.judged)
        count = min(self.section.finalists, len(ranked))
        chosen: list[Finalist] = []
        for first in range(0, len(ranked), count):
            chosen += self._judge(costs, ranked[first : first + count], laps)
            if any(finalist.within_budget for finalist in chosen):
                return tuple(chosen)
            if first >= 2 * count:
                break
            self.session.reporter.warn("no finalist meets the budget on the clock; looking at the next ones")
        limit = next(row for row in costs.feasibility if row.metric == "latency_ms")
        fastest_ms, predicted_ms = min((f.latency_ms, f.predicted_ms) for f in chosen if f.latency_ms is not None)
        got = (
            f"the fastest of {len(chosen)} finalists takes {fastest_ms:.3g} ms, predicted {predicted_ms:.3g} ms, "
            f"the budget is {limit.budget}"
        )
        raise MeasurementError("search", got, "Search again on an idle machine, or raise search.margin.")

    def _judge(
        self, costs: _Costs, candidates: Sequence[Evaluation], laps: Mapping[SparsityConfig, Sequence[float]]
    ) -> list[Finalist]:
        limits = [row.limit for row in costs.feasibility if row.metric == "latency_ms"]
        elsewhere = self.latencies.elsewhere
        clock = self.latencies.measure if limits and not elsewhere else self.latencies.look
        records = clock([candidate.config for candidate in candidates])
        dense_ms = self.latencies.dense_ms or math.inf
        scores = self.scores.whole({candidate.config: laps[candidate.config] for candidate in candidates})
        finalists = []
        for candidate in candidates:
            config, record = candidate.config, records.get(candidate.config)
            predicted_ms = costs.table.predict(config) if costs.table else None
            judged_ms = record.latency_ms if record else (predicted_ms if elsewhere else None)
            finalists.append(
                Finalist(
                    config=config,
                    score=scores[config],
                    proxy_score=candidate.metric,
                    cost=candidate.cost,
                    gmacs=self.macs(config) / 1e9,
                    predicted_ms=predicted_ms,
                    latency_ms=record.latency_ms if record else None,
                    latency_ms_low=record.low_ms if record else None,
                    latency_ms_high=record.high_ms if record else None,
                    speedup=dense_ms / record.latency_ms if record else None,
                    within_budget=all(judged_ms and min(judged_ms, dense_ms) <= limit for limit in limits),
                )
            )
        return finalists

    # -- results ------------------------------------------------------------------------------------------------

    def finish(self, costs: _Costs, result: SearchResult, finalists: Sequence[Finalist]) -> SearchSummary:
        """Name the winner and write it."""
        self.folder.set_aside((*RESULTS, *(path.name for path in self.folder.path.glob(winner_name("*")))),
                              self.session.reporter)  # fmt: skip
        summary = self._summary(costs, result, finalists)
        self._write_winner(summary, costs)
        return summary

    def further(self, name: str, costs: _Costs) -> tuple[SearchResult, FurtherWinner]:
        """The winner of one budget more, in a file of its own."""
        result = self.run(costs)
        summary = self._summary(costs, result, self.finalists(costs, result))
        self._write_winner(summary, costs, winner_name(name))
        path = self.folder.path / winner_name(name)
        return result, FurtherWinner(costs.feasibility[0].budget, summary.winner, result.evaluations, path)

    def _summary(self, costs: _Costs, result: SearchResult, finalists: Sequence[Finalist]) -> SearchSummary:
        within = [finalist for finalist in finalists if finalist.within_budget]
        winner = min(within, key=lambda f: (-f.score, f.cost, f.config))  # not by the clock: noise must not decide
        correlation = None
        if self.scores.is_subset and len(finalists) > 2:
            found = spearman([f.proxy_score for f in finalists], [f.score for f in finalists])
            correlation = found if math.isfinite(found) else None  # all equal: there is no order to compare
        return SearchSummary(
            self.folder, self.session.task.metric, winner, tuple(finalists), self.latencies.dense_ms, costs.feasibility,
            costs.table.error if costs.table else None, len(result.history), result.evaluations, result.infeasible,
            correlation, sum(self.scores.used.values()), self.scores.forwarded, result.note, self.latencies.elsewhere,
            measured_in=self.latencies.measured_in,
        )  # fmt: skip

    def write_evaluations(self, summary: SearchSummary, costs: _Costs, results: Sequence[SearchResult]) -> None:
        """All that was scored for any of the budgets, and what of it nothing beats, as tables and as a plot."""
        scored = {evaluation.config: evaluation for result in reversed(results) for evaluation in result.history}
        history = list({e.config: scored[e.config] for result in results for e in result.history}.values())
        front = pareto_front(history)
        self._write_csv("history.csv", history)
        self._write_csv("pareto.csv", front)
        unit = "predicted ms per batch" if costs.table else "multiply-adds per image"
        unit += of_scope(summary.scope)
        plot_pareto(
            self.folder.path / "pareto.png",
            history,
            front,
            summary.winner.config,
            (self.session.task.metric, unit),
            self.session.reporter,
        )

    def _write_csv(self, name: str, evaluations: Sequence[Evaluation]) -> None:
        with optional_output(self.session.reporter, name):
            text = io.StringIO()
            writer = csv.writer(text)
            key, scope = self.session.task.metric.key, self.section.scope
            writer.writerow(["ratios", key, "cost", "gmacs", "generation", "cached", "scope"])
            for e in evaluations:
                gmacs = self.macs(e.config) / 1e9
                writer.writerow([e.config, e.metric, e.cost, gmacs, e.generation, e.cached, scope])
            write_atomic(self.folder.path / name, text.getvalue())

    def _write_winner(self, summary: SearchSummary, costs: _Costs, name: str = WINNER) -> None:
        winner = summary.winner
        budgets = {row.metric: row.limit for row in costs.feasibility}
        numbers = {
            "search_score": winner.score,
            "gmacs": winner.gmacs,
            "latency_ms": winner.latency_ms,
            "latency_ms_low": winner.latency_ms_low,
            "latency_ms_high": winner.latency_ms_high,
            "dense_latency_ms": summary.dense_ms,
            "speedup": winner.speedup,
        }
        about = {
            **self.session.task.about(self.section.scope),
            "depths": list(self.space.depths),
            **{name: None if value is None else round(value, 4) for name, value in numbers.items()},
            "budget": budgets,
            **({"without_clock": True} if self.without_clock else {}),
            "measured_with": {"batch_size": self.section.batch_size, "image_size": list(self.session.img_size),
                              "precision": self.section.precision, **self._place()},
            **self._not_of_here(winner),
            "checkpoint_sha256": self.weights.sha256,
        }  # fmt: skip
        if name == WINNER:
            self.folder.write_result(
                {
                    **self.session.task.about(self.section.scope),
                    **numbers,
                    "ratios": winner.config.ratios,
                    "budget": budgets,
                    "without_clock": self.without_clock,
                    "measured_in": self._place(),
                    **self._not_of_here(winner),
                    "strategy": self.section.strategy,
                    "settings": section_hash(self.session.config, "search", "seed"),
                    "checkpoint_sha256": self.weights.sha256,
                    "asked": summary.asked,
                    "evaluated": summary.evaluated,
                    "infeasible": summary.infeasible,
                    "latency_table_error": asdict(summary.table_error) if summary.table_error else None,
                    "proxy_correlation": summary.proxy_correlation,
                    "images": summary.images,
                    "images_forwarded_now": summary.forwarded,
                    "finalists": [asdict(f) | {"config": f.config.ratios} for f in summary.finalists],
                    "note": summary.note,
                    **self.session.environment,
                }
            )
        write_winner(self.folder.path / name, winner.config, about)  # last: it says that the search is done

    def _place(self) -> dict[str, object]:
        """Where latencies were measured."""
        if self.section.runtime == "torch":
            return {"device": str(self.session.device)}
        return {"device": "cpu", "runtime": self.section.runtime}

    def _not_of_here(self, winner: Finalist) -> dict[str, object]:
        """What stands in for a latency that was not measured on this machine."""
        if not self.latencies.elsewhere or winner.predicted_ms is None:
            return {}
        return {
            "latency_measured_here": False,
            "predicted_latency_ms": round(winner.predicted_ms, 4),
            "latency_table": {"path": self.section.latency_table, "device": self.latencies.elsewhere},
        }
