"""Latencies of a search: measured once, kept in the ledger; the latency table and its error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random

from torch import nn

from sparsevit_cli.atomic import write_atomic
from sparsevit_cli.documents import read_bytes
from sparsevit_cli.errors import CheckpointError, MeasurementError, UnsteadyError
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.profiling.latency_table import measure_configs, measure_latency_table, table_identity
from sparsevit_cli.profiling.neighbours import Patience
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.search.latency_table import LatencyTable, TableError
from sparsevit_cli.search.ledger import LatencyRecord, Ledger
from sparsevit_cli.sparsity import MAX_TENTHS, SearchSpace, SparsityConfig

from .session import Session


class SearchLatencies:
    """What the clock of this device says of the model of a search. An unsteady measurement says nothing."""

    def __init__(
        self, session: Session, folder: RunFolder, model: nn.Module, space: SearchSpace, ledger: Ledger
    ) -> None:
        self.session, self.folder, self.space, self.ledger = session, folder, space, ledger
        self.section = session.config.search
        self.workload = session.workload(
            model, batch_size=self.section.batch_size, precision=self.section.precision, scope=self.section.scope
        )
        clock = session.config.clock
        self._identity = {**table_identity(self.workload), "clock": [clock.max_neighbour, clock.max_spread]}
        self._measured: dict[SparsityConfig, LatencyRecord] = {}

    @property
    def dense_ms(self) -> float | None:
        """Milliseconds per batch of the dense model, where the clock was steady."""
        dense = self._measured.get(self.space.dense)
        return None if dense is None else dense.latency_ms

    def measure(self, configs: Sequence[SparsityConfig]) -> dict[SparsityConfig, LatencyRecord]:
        """Milliseconds per batch of each and of dense, by the ratio to dense in the same interleaved rounds.

        So a machine that slows down between two measurements does not spoil the comparison. What was measured once is
        in the ledger and not measured again. Raises UnsteadyError where the clock cannot be trusted.
        """
        return self._measure(configs, self.session.patience)

    def look(self, configs: Sequence[SparsityConfig]) -> dict[SparsityConfig, LatencyRecord]:
        """As `measure`, for a search that the clock does not decide: nothing is waited for, and unsteady is none."""
        try:
            return self._measure(configs, self.session.patience.without_waiting())
        except UnsteadyError as error:
            self.session.reporter.warn(f"latencies are left out: {error.got}")
            return {}

    def _measure(self, configs: Sequence[SparsityConfig], patience: Patience) -> dict[SparsityConfig, LatencyRecord]:
        wanted = list(dict.fromkeys((self.space.dense, *configs)))
        for config in wanted:
            if config not in self._measured and (record := self.ledger.get_latency(self._identity, config)) is not None:
                self._measured[config] = record
        missing = [config for config in wanted if config not in self._measured]
        if missing:
            self.session.reporter.say(f"search: measuring {len(missing)} configurations on {self.session.device}")
            latencies = measure_configs(
                self.workload, list(dict.fromkeys((self.space.dense, *missing))),
                seconds=self.section.seconds, seed=self.session.config.seed, retries=self.session.config.clock.retries,
                max_spread=self.session.config.clock.max_spread, strict=True, patience=patience,
                before_round=partial(self.session.stop.check, "search", "every evaluation so far is in the ledger"),
            )  # fmt: skip
            self._remember(latencies)
        return {config: self._measured[config] for config in wanted}

    def _remember(self, latencies: Mapping[SparsityConfig, Latency]) -> None:
        dense = latencies[self.space.dense]
        own = LatencyRecord(dense.median_ms, dense.low_ms, dense.high_ms)
        dense_ms = self._measured.setdefault(self.space.dense, own).latency_ms
        for config, latency in latencies.items():
            if config != self.space.dense:
                self._measured[config] = LatencyRecord(
                    dense_ms / latency.speedup, dense_ms / latency.speedup_high, dense_ms / latency.speedup_low
                )
            self.ledger.put_latency(self._identity, config, self._measured[config])

    def table(self, known: Sequence[tuple[SparsityConfig, float]]) -> tuple[LatencyTable, TableError]:
        """The table of this very device and model, its scale set by `known`, and its error on held-out configs."""
        table = self._measured_table()
        try:
            table = table.calibrated(known)
        except MeasurementError as noisy:
            self.session.reporter.warn(f"the latency table is used as measured: {noisy.got}")
        rng = Random(f"holdout:{self.session.config.seed}")
        held_out = [self.space.sample(rng) for _ in range(self.section.holdout)]
        measured = self.measure(held_out)
        error = table.fit_error([(config, measured[config].latency_ms) for config in dict.fromkeys(held_out)])
        self.session.reporter.say(
            f"search: latency table against {error.n} held-out configurations: "
            f"mean error {error.mean:.1%}, largest {error.largest:.1%}"
        )
        return table, error

    def _measured_table(self) -> LatencyTable:
        """Read from the folder where it was measured under the same identity, else measured now."""
        path, reporter = self.folder.path / "latency_table.json", self.session.reporter
        if path.exists():
            table = LatencyTable.from_json(read_bytes(path), str(path))
            try:
                table.check_identity(self._identity)
                reporter.say(f"search: using the latency table {path}")
                return table
            except CheckpointError as error:
                reporter.warn(f"{path}: {error.got}; measuring a new one")
                self.folder.set_aside([path.name], reporter)
        with reporter.progress("latency table", 100) as bar:
            told = 0

            def on_round(share: float) -> None:
                nonlocal told
                bar.advance(max(0, round(100 * share) - told))
                told = max(told, round(100 * share))

            table = measure_latency_table(
                self.workload, max_tenths=MAX_TENTHS, seconds=self.section.seconds,
                seed=self.session.config.seed, patience=self.session.patience,
                retries=self.session.config.clock.retries, max_spread=self.session.config.clock.max_spread,
                check=partial(self.session.stop.check, "search", "the latency table is not saved yet"),
                on_round=on_round,
            )  # fmt: skip
            table = replace(table, identity=self._identity)
        write_atomic(path, table.to_json())
        return table
