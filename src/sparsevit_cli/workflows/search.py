"""search: feasibility, latency table, candidates on the search split, finalists measured for real, one winner."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from torch import nn

from sparsevit_cli.atomic import write_atomic, write_json
from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.config.paths import as_path
from sparsevit_cli.data.source import Data
from sparsevit_cli.documents import read_bytes, read_json, understood
from sparsevit_cli.errors import BudgetError, CheckpointError, ConfigError, MeasurementError, UnsteadyError
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
    feasibility,
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

from .latencies import TABLE_FIELD, GivenLatencies, Latencies, latencies_of_search
from .latency_sources import cost_scope, program_settings, tell_of_export
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
    of: str
    """What GMACs and times are of, in words; nothing if the model has one scope."""
    not_measured_here: str = ""
    """What the latency table was measured on that predicts latencies, if nothing was measured."""
    others: tuple[FurtherWinner, ...] = ()
    measured_in: str = ""
    """Runtime, precision and batch of measured latencies."""
    latency_table_plateaus: tuple[tuple[tuple[float, float], ...], ...] | None = None
    """`LatencyTable.plateaus`, if a table predicted."""


@dataclass(frozen=True)
class _Costs:
    """What candidates are judged by: one cost function and budget per request, the first leading."""

    constraints: tuple[tuple[Cost, Budget], ...]
    feasibility: tuple[Feasibility, ...]
    table: LatencyTable | None

    def __str__(self) -> str:
        return " and ".join(str(row.budget) for row in self.feasibility)


@dataclass(frozen=True)
class _Found:
    """What was found for one request: all that was scored, and those of it that were scored on all images."""

    costs: _Costs
    result: SearchResult
    finalists: tuple[Finalist, ...]


def search(
    session: Session, *, without_clock: bool = False, further: Mapping[str, BudgetRequest] = _NONE,
    leave_out_unreachable: bool = False, workers: str | None = None,
) -> SearchSummary:  # fmt: skip
    """Find the configuration with the best score on the search split within the budgets.

    `without_clock` leaves a latency budget out, if there is one of multiply-adds too. Each of the `further` budgets, by
    the name of its winner's file, is searched alone afterwards, and informed by what was paid before. Those out of
    reach are refused, or left out with a warning. A winner is the best of the finalists of all budgets that keep its
    own. `workers` (`local:4`, `tcp://...`) score the candidates; the winner is the same without them.

    Raises BudgetError with the reachable range, before anything is evaluated. Raises UnsteadyError for a latency budget
    if the clock cannot be trusted, MeasurementError if no finalist meets the budget once measured, and CheckpointError
    if there is nothing to search with. If that happens to a further budget, the winners before it are written first.
    """
    requests = budget_requests(session)
    with opened_search(session, without_clock=without_clock, workers=workers) as work:
        if not without_clock:
            tell_of_export(session, work.model)
        requests = tuple(
            replace(request, scope=cost_scope(session, work.scope, request.metric))
            for request in requests
            if request.metric == "macs" or not without_clock
        )
        rows = work.feasibility(requests)
        rows_of: dict[str, tuple[Feasibility, ...]] = {}
        for name, request in further.items():
            try:
                scope = cost_scope(session, work.scope, request.metric)
                rows_of[name] = work.feasibility((replace(request, scope=scope),))
            except BudgetError as error:
                if not leave_out_unreachable:
                    raise
                session.reporter.warn(f"the budget {name} is left out: {error.got}")
        first = work.found(rows)
        work.winner(first.costs, first.finalists)  # refused before the further ones are paid for
        others: dict[str, _Found] = {}
        missed: MeasurementError | None = None
        try:
            for name, rows in rows_of.items():
                others[name] = work.found(rows)
        except UnsteadyError as error:
            missed = error
        summary, unmet = work.finish(first, others)
        if missed is None:
            work.forget_informed()
            missed = None if leave_out_unreachable else unmet
        if missed is not None:
            raise missed
        return summary


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
    model = session.model(weights.categories, weights).eval()
    scope = named_scope(session, model)
    folder = session.folder("search")
    first = first_images(session, len(data.search))
    settings = ledger_settings(session, first)
    valid_for = LedgerScope(weights.sha256, data.fingerprint, settings)
    space = session.space(model, session.config.search.max_ratio)
    with ExitStack() as resources:
        ledger = resources.enter_context(Ledger.open(folder.path / "ledger.sqlite", valid_for))
        called = None
        if workers is not None:
            called = resources.enter_context(Workers(workers, session, weights.sha256, data.fingerprint))
        latencies = latencies_of_search(session, model, space, resources, ledger, folder)
        scores = Scores(session, model, data.search, ledger, first, called)
        yield Search(session, folder, data, model, weights, ledger, latencies, without_clock, scope, scores)


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
    settings = search_settings(session)
    return (result.get("settings"), result.get("checkpoint_sha256")) == (settings, weights.sha256)


def search_settings(session: Session) -> str:
    """What a search depends on besides weights and data: its settings, those of its programs, and a table's content."""
    section = session.config.search
    found = section_hash(session.config, "search", "seed")
    if section.runtime != "torch":
        found += f" {json.dumps(program_settings(session), sort_keys=True)}"
    if section.latency_table is not None:
        table = read_bytes(as_path(section.latency_table, TABLE_FIELD))
        found += f" table {hashlib.sha256(table).hexdigest()}"
    return found


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
        scores: Scores,
    ) -> None:
        self.without_clock, self.scope = without_clock, scope
        self.session, self.folder, self.data, self.model, self.weights = session, folder, data, model, weights
        self.ledger, self.scores = ledger, scores
        self.section = session.config.search
        self.space, self.latencies = latencies.space, latencies
        self.macs = macs_cost(session.workload(model, scope=self.section.scope))

    # -- costs --------------------------------------------------------------------------------------------------

    def feasibility(self, requests: Sequence[BudgetRequest]) -> tuple[Feasibility, ...]:
        """Of every budget, told before anything is spent. Raises BudgetError where one is out of reach."""
        by_macs = [request for request in requests if request.metric == "macs"]  # known without a measurement
        self._refuse_unreachable([feasibility(self.space, self.macs, request) for request in by_macs], by_macs)
        rows = tuple(
            feasibility(self.space, self.macs if request.metric == "macs" else self._corners_ms.__getitem__, request)
            for request in requests
        )
        self._refuse_unreachable(rows, requests)
        self._tell(rows, requests)
        return rows

    @cached_property
    def _corners_ms(self) -> dict[SparsityConfig, float]:
        corners = [self.space.dense, self.space.middle, self.space.sparsest]
        return {config: record.latency_ms for config, record in self.latencies.measure(corners).items()}

    @cached_property
    def _table(self) -> LatencyTable:
        table = self.latencies.table(list(self._corners_ms.items()))
        if table.plateaus_told:
            self.session.reporter.say(f"search: {table.plateaus_told}")
        return table

    def _costs(self, feasibility: tuple[Feasibility, ...]) -> _Costs:
        """By the latency table if one is asked for, which is then measured."""
        table = self._table if any(row.metric == "latency_ms" for row in feasibility) else None
        constraints: list[tuple[Cost, Budget]] = []
        for row in feasibility:
            if table is None or row.metric == "macs":
                constraints.append((self.macs, row.budget))
            else:
                constraints.append((table.cost, self._with_margin(row.budget, table, row)))
        return _Costs(tuple(constraints), feasibility, table)

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

    def found(self, feasibility: tuple[Feasibility, ...]) -> _Found:
        """The search for one request, to its finalists. Raises UnsteadyError."""
        costs = self._costs(feasibility)
        result = self._run(costs)
        return _Found(costs, result, self._finalists(costs, result))

    def _run(self, costs: _Costs) -> SearchResult:
        """The search itself; every evaluation is in the ledger before the next one starts."""
        section = self.section
        (cost, budget), *further = costs.constraints
        total = most_evaluations(section.strategy, section.population, section.generations, section.max_evaluations)
        informed = self._informed(costs) if section.strategy == "surrogate" else None
        with self.session.reporter.progress("search", total) as bar:

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
                evaluate_all=self.scores.of_all,
                on_progress=on_progress,
            )
        first = self.scores.first
        self.scores.used |= {(evaluation.config, first.name): first.count for evaluation in result.history}
        return result

    def _informed(self, costs: _Costs) -> dict[SparsityConfig, float]:
        """What the ledger held when this very search began; read back, so that a stopped search goes on as it was."""
        path, known = self.folder.path / INFORMED, self.ledger.known()
        settings = search_settings(self.session)
        name = json.dumps([*astuple(self.ledger.scope), settings, *(str(row.budget) for row in costs.feasibility)])
        saved = read_json(path) if path.exists() else {}
        with understood(path, "Remove it."):
            configs = [SparsityConfig(tuple(map(tuple, tenths))) for tenths in saved.get(name, ())]
            if name not in saved or not known.keys() >= set(configs):  # not there if the ledger was removed
                configs = sorted(known)
                write_json(path, {**saved, name: [config.tenths for config in configs]})
            return {config: known[config] for config in configs}

    def forget_informed(self) -> None:
        """The search is done: the next one is informed by all that was paid."""
        (self.folder.path / INFORMED).unlink(missing_ok=True)

    def _finalists(self, costs: _Costs, result: SearchResult) -> tuple[Finalist, ...]:
        """The best candidates on the whole split and on the clock, until one of them meets the budget."""
        ranked, laps = self.scores.raced(result.judged)
        count = min(self.section.finalists, len(ranked))
        chosen: list[Finalist] = []
        for first in range(0, len(ranked), count):
            chosen += self._judge(costs, ranked[first : first + count], laps)
            if any(finalist.within_budget for finalist in chosen) or first >= 2 * count:
                break
            self.session.reporter.warn("no finalist meets the budget on the clock; looking at the next ones")
        return tuple(chosen)

    def _judge(
        self, costs: _Costs, candidates: Sequence[Evaluation], laps: Mapping[SparsityConfig, Sequence[float]]
    ) -> list[Finalist]:
        limits = [row.limit for row in costs.feasibility if row.metric == "latency_ms"]
        elsewhere = self.latencies.elsewhere
        scores = self.scores.whole({candidate.config: laps[candidate.config] for candidate in candidates})
        self.scores.let_go()
        clock = self.latencies.measure if limits and not elsewhere else self.latencies.look
        records = clock([candidate.config for candidate in candidates])
        dense_ms = self.latencies.dense_ms
        finalists = []
        for candidate in candidates:
            config, record = candidate.config, records.get(candidate.config)
            finalist = Finalist(
                config=config,
                score=scores[config],
                proxy_score=candidate.metric,
                cost=candidate.cost,
                gmacs=self.macs(config) / 1e9,
                predicted_ms=costs.table.predict(config) if costs.table else None,
                latency_ms=record.latency_ms if record else None,
                latency_ms_low=record.low_ms if record else None,
                latency_ms_high=record.high_ms if record else None,
                speedup=dense_ms / record.latency_ms if record and dense_ms else None,
                within_budget=False,
            )
            finalists.append(replace(finalist, within_budget=self._keeps(finalist, costs)))
        return finalists

    def _keeps(self, finalist: Finalist, costs: _Costs) -> bool:
        """True where it is within every limit: by the clock, or by the table if that is another machine's."""
        ms = finalist.predicted_ms if self.latencies.elsewhere else finalist.latency_ms
        judged_ms = math.inf if ms is None else min(ms, self.latencies.dense_ms or math.inf)
        of = {"macs": self.macs(finalist.config), "latency_ms": judged_ms}
        return all(of[row.metric] <= row.limit for row in costs.feasibility)

    def winner(self, costs: _Costs, finalists: Sequence[Finalist]) -> Finalist:
        """The best of those that are within the budgets. Raises MeasurementError where none is."""
        within = [finalist for finalist in finalists if self._keeps(finalist, costs)]
        if within:  # not by the clock: noise must not decide
            return replace(min(within, key=lambda f: (-f.score, f.cost, f.config)), within_budget=True)
        fastest_ms, predicted_ms = min((f.latency_ms, f.predicted_ms) for f in finalists if f.latency_ms is not None)
        got = (
            f"the fastest of {len(finalists)} finalists takes {fastest_ms:.3g} ms, predicted {predicted_ms:.3g} ms, "
            f"the budget is {costs}"
        )
        raise MeasurementError("search", got, "Search again on an idle machine, or raise search.margin.")

    # -- results ------------------------------------------------------------------------------------------------

    def finish(self, first: _Found, others: Mapping[str, _Found]) -> tuple[SearchSummary, MeasurementError | None]:
        """Name the winner of every request and write all results, with the fault of the last one that has none."""
        everything = [first, *others.values()]
        finalists = {finalist.config: finalist for found in reversed(everything) for finalist in found.finalists}
        pool = tuple(finalists.values())
        winner = self.winner(first.costs, pool)
        named, further = [(first.costs, winner)], list[FurtherWinner]()
        unmet: MeasurementError | None = None
        for name, found in others.items():
            try:
                of_budget = self.winner(found.costs, pool)
            except MeasurementError as error:
                unmet = error
                self.session.reporter.warn(f"the budget {name} is left out: {error.got}")
                continue
            named.append((found.costs, of_budget))
            path = self.folder.path / winner_name(name)
            further.append(FurtherWinner(found.costs.feasibility[0].budget, of_budget, found.result.evaluations, path))
        summary = self._summary(first, winner, tuple(further))
        self.folder.set_aside((*RESULTS, *(path.name for path in self.folder.path.glob(winner_name("*")))),
                              self.session.reporter)  # fmt: skip
        self._write_evaluations(everything, pool, named)
        for other, (costs, of_budget) in zip(further, named[1:], strict=True):
            self._write_winner(other.path, costs, of_budget)
        self._write_winner(self.folder.path / WINNER, first.costs, winner, summary)
        return summary, unmet

    def _summary(self, first: _Found, winner: Finalist, others: tuple[FurtherWinner, ...]) -> SearchSummary:
        costs, result = first.costs, first.result
        finalists = first.finalists if winner in first.finalists else (*first.finalists, winner)
        winner = finalists[finalists.index(winner)]
        told = winner.config == result.best or not result.best.is_dense  # the note of dense is that it fits
        correlation = None
        if self.scores.is_subset and len(finalists) > 2:
            found = spearman([f.proxy_score for f in finalists], [f.score for f in finalists])
            correlation = found if math.isfinite(found) else None  # all equal: there is no order to compare
        return SearchSummary(
            self.folder, self.session.task.metric, winner, finalists, self.latencies.dense_ms, costs.feasibility,
            costs.table.error if costs.table else None, len(result.history), result.evaluations, result.infeasible,
            correlation, sum(self.scores.used.values()), self.scores.forwarded, result.note if told else "", self._of(),
            self.latencies.elsewhere, others, self.latencies.measured_in, costs.table.plateaus if costs.table else None,
        )  # fmt: skip

    def _of(self) -> str:
        """What GMACs and times of the summary are of."""
        gmacs, times = of_scope(self.scope), of_scope(cost_scope(self.session, self.scope, "latency_ms"))
        if not gmacs:
            return ""
        return f"GMACs and times{gmacs}" if gmacs == times else f"GMACs{gmacs}, times{times}"

    def _write_evaluations(
        self, everything: Sequence[_Found], pool: Sequence[Finalist], named: Sequence[tuple[_Costs, Finalist]]
    ) -> None:
        """All that was scored for any of the budgets, and the front of what was scored on all images and keeps one.

        A winner is on the front: what beats it there would have won. Only the clock, which names winners of a latency,
        may disagree with the table, by which costs are told; and so may a second budget of the first winner.
        """
        results = [found.result for found in everything]
        scored = {evaluation.config: evaluation for result in reversed(results) for evaluation in result.history}
        history = list({e.config: scored[e.config] for result in results for e in result.history}.values())
        kept = [finalist for finalist in pool if any(self._keeps(finalist, found.costs) for found in everything)]
        finalists = {finalist.config: _of_all_images(finalist) for finalist in kept}
        front = pareto_front(finalists.values())
        key, scope, first = self.session.task.metric.key, self.section.scope, self.scores.first.count
        self._write_csv(
            "history.csv",
            ("ratios", key, "cost", "gmacs", "generation", "cached", "images", "scope"),
            [(e.config, e.metric, e.cost, self.macs(e.config) / 1e9, e.generation, e.cached, first, scope)
             for e in history],
        )  # fmt: skip
        winner_of: dict[SparsityConfig, list[str]] = {}
        for costs, winner in named:
            winner_of.setdefault(winner.config, []).append(str(costs))
        rows = {finalist.config: finalist for finalist in kept}
        self._write_csv(
            "pareto.csv",
            ("ratios", key, "first_images", "cost", "gmacs", "latency_ms", "winner_of", "scope"),
            [(f.config, f.score, f.proxy_score, f.cost, f.gmacs, f.latency_ms,
              "; ".join(dict.fromkeys(winner_of.get(f.config, ()))), scope) for f in (rows[e.config] for e in front)],
        )  # fmt: skip
        unit = "predicted ms per batch" if everything[0].costs.table else "multiply-adds per image"
        unit += of_scope(everything[0].costs.feasibility[0].scope)
        plot_pareto(
            self.folder.path / "pareto.png",
            history,
            list(finalists.values()),
            front,
            {str(costs): _of_all_images(winner) for costs, winner in named},
            (self.session.task.metric, unit),
            (first, len(self.data.search)),
            self.session.reporter,
        )

    def _write_csv(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        with optional_output(self.session.reporter, name):
            text = io.StringIO()
            writer = csv.writer(text)
            writer.writerow(columns)
            writer.writerows(rows)
            write_atomic(self.folder.path / name, text.getvalue())

    def _write_winner(self, path: Path, costs: _Costs, winner: Finalist, summary: SearchSummary | None = None) -> None:
        """The file of a winner; of the first one, which has a `summary`, the numbers too."""
        budgets = {row.metric: row.limit for row in costs.feasibility}
        numbers = {
            "search_score": winner.score,
            "gmacs": winner.gmacs,
            "latency_ms": winner.latency_ms,
            "latency_ms_low": winner.latency_ms_low,
            "latency_ms_high": winner.latency_ms_high,
            "dense_latency_ms": self.latencies.dense_ms,
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
        if summary is not None:
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
                    "settings": search_settings(self.session),
                    "checkpoint_sha256": self.weights.sha256,
                    "asked": summary.asked,
                    "evaluated": summary.evaluated,
                    "infeasible": summary.infeasible,
                    "latency_table_error": asdict(summary.table_error) if summary.table_error else None,
                    "latency_table_plateaus": summary.latency_table_plateaus,
                    "proxy_correlation": summary.proxy_correlation,
                    "images": summary.images,
                    "images_forwarded_now": summary.forwarded,
                    "finalists": [asdict(f) | {"config": f.config.ratios} for f in summary.finalists],
                    "note": summary.note,
                    **self.session.environment,
                }
            )
        write_winner(path, winner.config, about)  # last: it says that the search is done

    def _place(self) -> dict[str, object]:
        """Where latencies were measured."""
        if self.section.runtime == "torch":
            return {"device": str(self.session.device), "scope": self.section.scope}
        program = {name: self.latencies.identity.get(name) for name in ("runtime", "activations", "scope")}
        return {"device": "cpu", **program}

    def _not_of_here(self, winner: Finalist) -> dict[str, object]:
        """What stands in for a latency that was not measured on this machine."""
        if not isinstance(self.latencies, GivenLatencies) or winner.predicted_ms is None:
            return {}
        return {
            "latency_measured_here": False,
            "predicted_latency_ms": round(winner.predicted_ms, 4),
            "latency_table": {"path": self.section.latency_table, **self.latencies.machine},
        }


def _of_all_images(finalist: Finalist) -> Evaluation:
    """A finalist as a front takes it: with the score on the whole search split, and the predicted cost."""
    return Evaluation(finalist.config, finalist.score, finalist.cost, 0, False)
