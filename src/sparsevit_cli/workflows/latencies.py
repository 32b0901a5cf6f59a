"""Latencies of a search: measured once and kept in the ledger, with a table and its error; or predicted by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from torch import nn

from sparsevit_cli.atomic import write_atomic
from sparsevit_cli.config.paths import as_path
from sparsevit_cli.documents import read_bytes
from sparsevit_cli.errors import CheckpointError, MeasurementError, UnsteadyError
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.profiling.neighbours import Patience
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.search.latency_table import LatencyTable
from sparsevit_cli.search.ledger import LatencyRecord, Ledger
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

from .latency_sources import LatencySource, expected_identity, label_in, latency_source, swin_parameters
from .rows import threads_text
from .session import Session

TABLE_FIELD = "search.latency_table"


class MeasuredLatencies:
    """What the clock of this machine says of the model of a search. An unsteady measurement says nothing.

    What was measured is kept in a `ledger`, if there is one.
    """

    elsewhere = ""
    """What a given latency table was measured on: there is none."""

    def __init__(
        self, session: Session, source: LatencySource, space: SearchSpace, ledger: Ledger | None = None,
        folder: RunFolder | None = None,
    ) -> None:  # fmt: skip
        self.session, self.source, self.space, self.ledger, self.folder = session, source, space, ledger, folder
        self.section = session.config.search
        self._measured: dict[SparsityConfig, LatencyRecord] = {}

    @property
    def identity(self) -> Mapping[str, Any]:
        """What they hold for."""
        return self.source.identity

    @property
    def measured_in(self) -> str:
        """`openvino 2026.4, int8+bf16, batch 1`"""
        return f"{self.source.told}, batch {self.section.batch_size}"

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
        wanted, identity = list(dict.fromkeys((self.space.dense, *configs))), self.identity
        for config in wanted:
            if config in self._measured or self.ledger is None:
                continue
            if (record := self.ledger.get_latency(identity, config)) is not None:
                self._measured[config] = record
        missing = [config for config in wanted if config not in self._measured]
        if missing:
            self.session.reporter.say(f"search: measuring {len(missing)} configurations in {self.source.told}")
            self._remember(self.source.measure(list(dict.fromkeys((self.space.dense, *missing))), patience))
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
            if self.ledger is not None:
                self.ledger.put_latency(self.identity, config, self._measured[config])

    def table(self, known: Sequence[tuple[SparsityConfig, float]]) -> LatencyTable:
        """The table of this very device and model, its scale set by `known`, with its error on held-out configs."""
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
        return replace(table, error=error)

    def _measured_table(self) -> LatencyTable:
        """Read from the folder where it was measured under the same identity, else measured now and kept there."""
        reporter = self.session.reporter
        path = None if self.folder is None else self.folder.path / "latency_table.json"
        if self.folder is not None and path is not None and path.exists():
            table = LatencyTable.from_json(read_bytes(path), str(path))
            try:
                table.check_identity(self.identity)
                reporter.say(f"search: using the latency table {path}")
                return table
            except CheckpointError as error:
                reporter.warn(f"{path}: {error.got}; measuring a new one")
                self.folder.set_aside([path.name], reporter)
        with reporter.progress("latency table", 100) as bar:
            told = 0

            def on_share(share: float) -> None:
                nonlocal told
                bar.advance(max(0, round(100 * share) - told))
                told = max(told, round(100 * share))

            table = self.source.table(on_share)
        if path is not None:
            write_atomic(path, table.to_json())
        return table


def machine_told(machine: Mapping[str, Any]) -> str:
    """`an EPYC (2 threads, int8+bf16)`."""
    threads = f"{threads_text(machine['threads'])}, " if "threads" in machine else ""
    return f"{machine['device']} ({threads}{machine['precision']})"


class GivenLatencies:
    """What a latency table says that was measured on another machine. Nothing is measured here."""

    measured_in = ""

    def __init__(self, path: Path, table: LatencyTable, space: SearchSpace) -> None:
        self.path, self._table, self.space = path, table, space

    @classmethod
    def read(cls, session: Session, model: nn.Module, space: SearchSpace) -> GivenLatencies:
        """The table in `search.latency_table`.

        Raises CheckpointError for a file that is missing or damaged, and for one of another model, image size, batch,
        runtime or precision.
        """
        path = as_path(session.config.search.latency_table or "", TABLE_FIELD)
        table = LatencyTable.from_json(read_bytes(path, "Measure it: sparsevit profile --latency-table"), str(path))
        expected = expected_identity(session, model)
        if swin_parameters(model).keys() <= table.identity.keys():  # measured without weights, so without categories
            expected |= {**swin_parameters(model), "parameters": table.identity.get("parameters")}
        expected.setdefault("activations", table.identity.get("activations"))  # `auto` is as the CPU there has it
        try:
            table.check_identity(expected, any_machine=True)
        except CheckpointError as error:
            do = "Give the table of this model and these settings, or measure here: search.latency_table: null."
            raise CheckpointError(TABLE_FIELD, f"{path} was {error.got}", do) from error
        if table.max_tenths < space.max_tenths:
            got = f"{path} holds ratios to {table.max_tenths / 10}, search.max_ratio is {space.max_ratio:g}"
            raise CheckpointError(TABLE_FIELD, got, "Measure a table with more ratios, or lower search.max_ratio.")
        return cls(path, table, space)

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the table holds for."""
        return self._table.identity

    @property
    def machine(self) -> dict[str, object]:
        """The device that the table was measured on, its threads, and the precision that it computed in."""
        found = self.identity.get("device")
        device = found if isinstance(found, dict) else {}
        threads = {"threads": device["threads"]} if "threads" in device else {}
        return {"device": device.get("name", "unknown"), **threads, "precision": label_in(self.identity)}

    @property
    def elsewhere(self) -> str:
        """`machine` in words."""
        return machine_told(self.machine)

    @property
    def dense_ms(self) -> float | None:
        """None: that of the dense model was not measured here."""
        return None

    def measure(self, configs: Sequence[SparsityConfig]) -> dict[SparsityConfig, LatencyRecord]:
        """What the table predicts."""
        return {config: LatencyRecord(*[self._table.predict(config)] * 3) for config in configs}

    def look(self, configs: Sequence[SparsityConfig]) -> dict[SparsityConfig, LatencyRecord]:
        """Nothing: nobody looks at this machine's clock."""
        return {}

    def table(self, known: Sequence[tuple[SparsityConfig, float]]) -> LatencyTable:
        """The table as it is."""
        return self._table


Latencies = MeasuredLatencies | GivenLatencies


def latencies_of_search(
    session: Session, model: nn.Module, space: SearchSpace, resources: ExitStack, ledger: Ledger | None = None,
    folder: RunFolder | None = None,
) -> Latencies:  # fmt: skip
    """Measured on this machine, or those of `search.latency_table`. What is opened is closed with `resources`."""
    if session.config.search.latency_table is not None:
        return GivenLatencies.read(session, model, space)
    return MeasuredLatencies(session, latency_source(session, model, resources), space, ledger, folder)
