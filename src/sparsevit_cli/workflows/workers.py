"""search --workers: candidates scored in other processes, by Dask distributed. The one search keeps the ledger.

A worker holds nothing that matters: it makes the model from the run folder, which it has to see, and scores what it is
sent. One that is killed, hangs or fails in a candidate costs that candidate one repetition. Latency is never measured
there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sparsevit_cli import __version__
from sparsevit_cli.config.loading import dump_config, read_config
from sparsevit_cli.errors import CheckpointError, ConfigError, ResourceError, in_one_line, pass_on
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.search.ledger import Ledger
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import set_sparsity
from sparsevit_cli.tasks.task import load_task, typed_task

from .session import Session
from .training import score
from .weights import trained_weights

EXTRA = "Type: pip install 'sparsevit-cli[cluster]'."
LOOK_EVERY_SECONDS = 0.5
JOIN_SECONDS = 60.0
SLOWER = 10
"""A candidate may take so many times as long as the slowest one before, and `data.max_wait_seconds` more."""
LOCAL = {"distributed.worker.daemon": False}  # daemons may not have loader processes


@dataclass(frozen=True)
class Scoring:
    """What a worker scores candidates by; plain values."""

    version: str
    config: str
    """YAML."""
    task: str | None
    folder: str
    """What relative paths start from."""
    checkpoint_sha256: str
    data_fingerprint: str
    subset: tuple[int, ...] | None
    local: int = 0
    """How many workers share this machine; 0 if they are elsewhere, where each keeps its device and threads."""


def score_candidate(scoring: Scoring, config: SparsityConfig) -> tuple[float, float]:
    """On a worker: the metric of a candidate, and the seconds that it took."""
    with _BUSY:  # one model: a worker of several threads takes turns
        began = time.monotonic()
        return _scorer(scoring)(config), time.monotonic() - began


_BUSY = threading.Lock()


@lru_cache(maxsize=1)
def _scorer(scoring: Scoring) -> Callable[[SparsityConfig], float]:
    """The model and the data of a search, made once. Raises CheckpointError if they are not those of the search."""
    if scoring.version != __version__:
        got = f"this worker has sparsevit-cli {__version__}, the search {scoring.version}"
        raise CheckpointError("search --workers", got, "Install the same version.")
    os.chdir(scoring.folder)
    if scoring.task is not None:
        load_task(scoring.task)
    config = read_config(scoring.config)
    if scoring.local:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // scoring.local))
        config = config.model_copy(update={"device": _own_gpu(config.device)})
    session = Session(config, SilentReporter())
    weights = trained_weights(session, "adapt", "sparsevit search")
    data = session.data(weights)
    if (weights.sha256, data.fingerprint) != (scoring.checkpoint_sha256, scoring.data_fingerprint):
        got = f"{session.earlier('adapt').path} or the data are not those of the search, seen from this worker"
        raise CheckpointError("search --workers", got, "Let all machines see the same folders.")
    model = session.model(weights.categories, weights).eval()

    def metric_of(candidate: SparsityConfig) -> float:
        set_sparsity(model, candidate)
        return score(session, model, data.search, subset=scoring.subset).value

    return metric_of


def _own_gpu(device: str) -> str:
    """One GPU after the other for the workers of a machine."""
    from distributed import get_worker

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{int(get_worker().name) % torch.cuda.device_count()}"


class Workers:
    """Workers of a search, joined when the first candidate needs them; a context manager that lets them go.

    `where` is `local:N` for N processes on this machine, or the address of a Dask scheduler. Raises ConfigError.
    """

    def __init__(
        self, where: str, session: Session, ledger: Ledger, data_fingerprint: str, subset: Sequence[int] | None
    ) -> None:
        local, _, count = where.partition(":")
        if local == "local" and not (count.isdecimal() and 1 <= int(count) <= 1024):
            raise ConfigError("--workers", f"{where!r} names no number of workers", "Type local:4, for example.")
        if local != "local" and not where.startswith(("tcp://", "tls://")):
            raise ConfigError("--workers", f"{where!r} is no place for workers", "Type local:4 or tcp://HOST:PORT.")
        try:
            import dask
            import distributed
        except ImportError as error:
            got = f"Dask distributed cannot be loaded ({in_one_line(error)})"
            raise ConfigError("--workers", got, EXTRA) from error
        self.where, self.session, self.ledger = where, session, ledger
        self.dask, self.settings = distributed, dask.config
        self.local = int(count) if local == "local" else 0
        self.scoring = Scoring(
            __version__, dump_config(session.config), typed_task(type(session.task)), os.getcwd(),
            ledger.scope.checkpoint, data_fingerprint, None if subset is None else tuple(subset), self.local,
        )  # fmt: skip
        self.slowest = 0.0
        self._client: Any = None
        self._open = ExitStack()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *ended: object) -> None:
        self._open.close()

    @property
    def client(self) -> Any:
        """The connection to the scheduler. Raises ConfigError if there is none."""
        if self._client is None:
            address: Any = self.where
            try:
                if self.local:
                    self._open.enter_context(self.settings.set(LOCAL))
                    cluster = self.dask.LocalCluster(
                        n_workers=self.local, threads_per_worker=1, host="127.0.0.1", memory_limit=0, silence_logs=50,
                        dashboard_address="127.0.0.1:0",
                    )  # fmt: skip
                    address = self._open.enter_context(cluster)
                self._client = self._open.enter_context(self.dask.Client(address, timeout=JOIN_SECONDS))
                self._client.wait_for_workers(1, timeout=JOIN_SECONDS)
            except (OSError, ValueError, RuntimeError) as error:  # TimeoutError among them
                pass_on(error)
                got = f"no worker is there at {self.where} ({in_one_line(error)})"
                raise ConfigError("--workers", got, "Start `dask scheduler` and `dask worker`.") from error
        return self._client

    def of_all(self, configs: Sequence[SparsityConfig]) -> Iterator[float]:
        """The metrics in the order of `configs`, each in the ledger as soon as it arrives, in whatever order.

        Raises what a worker raised twice, ResourceError for a candidate that no worker survives or answers.
        """
        if not configs:
            return
        waiting = {
            self.client.submit(score_candidate, self.scoring, config, pure=False, retries=1): config
            for config in configs
        }
        found: dict[SparsityConfig, float] = {}
        given = 0
        try:
            for future in self._arriving(waiting):
                arrived = waiting[future]
                metric, seconds = self._result(future, arrived)
                self.slowest = max(self.slowest, seconds)
                found[arrived] = self.ledger.put(arrived, metric, seconds)
                while given < len(configs) and configs[given] in found:
                    yield found[configs[given]]
                    given += 1
        finally:
            self.client.cancel(list(waiting))

    def _result(self, future: Any, config: SparsityConfig) -> tuple[float, float]:
        try:
            metric, seconds = future.result()
        except self.dask.KilledWorker as error:
            got = f"no worker survives it ({in_one_line(error)})"
            do = "Look at the workers' memory. What was scored before is in the ledger."
            raise ResourceError(f"candidate {config}", got, do) from error
        return metric, seconds

    def _arriving(self, waiting: Mapping[Any, SparsityConfig]) -> Iterator[Any]:
        """Futures as they are done. Workers that do not answer for too long are started again, once."""
        pending, since, is_restarted = set(waiting), time.monotonic(), False
        while pending:
            self.session.stop.check("search", "every evaluation so far is in the ledger")
            try:
                done, pending = self.dask.wait(pending, LOOK_EVERY_SECONDS, "FIRST_COMPLETED")
            except TimeoutError:
                waited = time.monotonic() - since
                if waited < self.session.config.data.max_wait_seconds + SLOWER * self.slowest:
                    continue
                got = f"no worker answered for {waited:.0f} s"
                if is_restarted:
                    do = "Look at the workers, or raise data.max_wait_seconds. What was scored is in the ledger."
                    raise ResourceError("search --workers", got, do) from None
                self.session.reporter.warn(f"{got}: those that are at work are started again")
                busy = [worker for worker, keys in self.client.processing().items() if keys]
                self.client.restart_workers(busy, raise_for_error=False)
                since, is_restarted = time.monotonic(), True
            else:
                since, is_restarted = time.monotonic(), False
                yield from sorted(done, key=lambda future: waiting[future])
