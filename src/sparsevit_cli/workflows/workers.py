"""search --workers: candidates scored in other processes, by Dask distributed. The one search keeps the ledger.

A worker holds nothing that matters: it makes the model from the folder of `adapt`, which it has to see, and scores what
it is sent: all candidates on the first images, the best ones in their race, finalists on the whole split. One that is
killed, hangs or fails in a candidate costs that candidate one repetition. Latency is never measured there.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sparsevit_cli import __version__
from sparsevit_cli.config.loading import dump_config, read_config
from sparsevit_cli.errors import CheckpointError, ConfigError, ResourceError, from_extra, in_one_line, pass_on
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.tasks.task import load_task, typed_task

from .session import Session
from .training import score_each
from .weights import trained_weights

WHAT = "search --workers"
DISTRIBUTION = "sparsevit-cli"
LOOK_EVERY_SECONDS = 0.5
JOIN_SECONDS = 60.0
SLOWER = 10
"""A candidate may take so many times as long as the slowest one before, and `data.max_wait_seconds` more."""
KEPT = "What was scored is in the ledger."
SAME_VERSION = "Install the same version on all machines."
SAME_FOLDERS = "Let all machines see the same folders."
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
    threads: int = 0
    """Of each worker, if they share the machine of the search; 0 elsewhere, where each keeps its device and threads."""


Numbers = tuple[int, ...] | None
"""Images of the search split, None for all of them."""


def score_candidate(scoring: Scoring, config: SparsityConfig, numbers: Numbers) -> tuple[float, float]:
    """On a worker: the metric of a candidate on these images, and the seconds that it took."""
    with _BUSY:  # one model: a worker of several threads takes turns
        began = time.monotonic()
        return _scorer(scoring)(config, numbers), time.monotonic() - began


_BUSY = threading.Lock()


@lru_cache(maxsize=1)
def _scorer(scoring: Scoring) -> Callable[[SparsityConfig, Numbers], float]:
    """The model and the data of a search, made once. Raises CheckpointError if they are not those of the search."""
    if scoring.version != __version__:
        got = f"this worker has {DISTRIBUTION} {__version__}, the search {scoring.version}"
        raise CheckpointError(WHAT, got, SAME_VERSION)
    try:
        os.chdir(scoring.folder)
    except OSError as error:
        got = f"the worker on {socket.gethostname()} cannot enter {scoring.folder} ({error.strerror})"
        raise CheckpointError(WHAT, got, SAME_FOLDERS) from error
    if scoring.task is not None:
        load_task(scoring.task)
    config = read_config(scoring.config)
    if scoring.threads:
        torch.set_num_threads(scoring.threads)  # Dask starts a worker with one
        config = config.model_copy(update={"device": _own_gpu(config.device)})
    session = Session(config, SilentReporter())
    weights = trained_weights(session, "adapt", "sparsevit search")
    data = session.data(weights)
    if (weights.sha256, data.fingerprint) != (scoring.checkpoint_sha256, scoring.data_fingerprint):
        got = f"{session.earlier('adapt').path} or the data are not those of the search, seen from this worker"
        raise CheckpointError(WHAT, got, SAME_FOLDERS)
    model = session.model(weights.categories, weights).eval()

    def metric_of(candidate: SparsityConfig, numbers: Numbers) -> float:
        return score_each(session, model, data.search, [candidate], subset=numbers)[candidate].value

    return metric_of


def _own_gpu(device: str) -> str:
    """One GPU after the other for the workers of a machine."""
    from distributed import get_worker

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{int(get_worker().name) % torch.cuda.device_count()}"


class Workers:
    """Workers of a search, called when the first candidate needs them; a context manager that lets them go.

    `where` is `local:N` for N processes on this machine, or the address of a Dask scheduler. Raises ConfigError.
    """

    def __init__(self, where: str, session: Session, checkpoint_sha256: str, data_fingerprint: str) -> None:
        local, _, count = where.partition(":")
        if local == "local" and not (count.isdecimal() and 1 <= int(count) <= 1024):
            raise ConfigError("--workers", f"{where!r} names no number of workers", "Type local:4, for example.")
        if local != "local" and not where.startswith(("tcp://", "tls://")):
            raise ConfigError("--workers", f"{where!r} is no place for workers", "Type local:4 or tcp://HOST:PORT.")
        self.where, self.session = where, session
        self.dask, self.settings = (from_extra(name, "--workers", "cluster") for name in ("distributed", "dask.config"))
        self.local = int(count) if local == "local" else 0
        threads = max(1, torch.get_num_threads() // self.local) if self.local else 0
        self.scoring = Scoring(
            __version__, dump_config(session.config), typed_task(type(session.task)), os.getcwd(), checkpoint_sha256,
            data_fingerprint, threads,
        )  # fmt: skip
        self.slowest = 0.0
        """Seconds per image."""
        self._client: Any = None
        self._open = ExitStack()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *ended: object) -> None:
        self.let_go()

    def let_go(self) -> None:
        """End those of this machine, and the connection to the others; the next candidates call them again."""
        self._client = None
        self._open.close()

    @property
    def client(self) -> Any:
        """The connection to the scheduler. Raises ConfigError if there is none, CheckpointError for other versions."""
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
                client = self._open.enter_context(self.dask.Client(address, timeout=JOIN_SECONDS))
                client.wait_for_workers(1, timeout=JOIN_SECONDS)
                versions = client.get_versions(packages=[DISTRIBUTION])
            except (OSError, ValueError, RuntimeError) as error:  # TimeoutError among them
                pass_on(error)
                got = f"no worker is there at {self.where} ({in_one_line(error)})"
                raise ConfigError("--workers", got, "Start `dask scheduler` and `dask worker`.") from error
            _refuse_other_versions(versions)
            self._client = client
        return self._client

    def scored(
        self, configs: Sequence[SparsityConfig], count: int, numbers: Numbers
    ) -> Iterator[tuple[dict[SparsityConfig, float], float]]:
        """The metric of each of `configs` on `count` images, and its seconds, one after the other as they arrive.

        Raises what a worker raised twice, and ResourceError for a candidate that no worker survives or answers, and if
        the connection is lost.
        """
        if not configs:
            return
        client = self.client
        try:
            waiting = {
                client.submit(score_candidate, self.scoring, config, numbers, pure=False, retries=1): config
                for config in configs
            }
        except (OSError, RuntimeError, ValueError) as error:
            pass_on(error)
            raise _lost(error) from error
        try:
            for future in self._arriving(client, waiting, count):
                metric, seconds = self._result(future, waiting[future])
                self.slowest = max(self.slowest, seconds / count)
                yield {waiting[future]: metric}, seconds
        finally:
            with suppress(CancelledError, OSError, RuntimeError, ValueError):  # the connection may be lost
                client.cancel(list(waiting))

    def _result(self, future: Any, config: SparsityConfig) -> tuple[float, float]:
        try:
            metric, seconds = future.result()
        except self.dask.KilledWorker as error:
            do = f"Look at the workers' memory. {KEPT}"
            raise ResourceError(f"candidate {config}", f"no worker survives it ({in_one_line(error)})", do) from error
        except CancelledError as error:
            raise _lost(error) from error
        except ImportError as error:  # on a worker that came later
            raise CheckpointError(WHAT, f"a worker lacks what it needs ({in_one_line(error)})", SAME_VERSION) from error
        return metric, seconds

    def _patience_s(self, count: int) -> float:
        """How long no worker may answer, if a candidate has `count` images. The first one may wait for every batch."""
        data = self.session.config.data
        waits = 1 if self.slowest else math.ceil(count / data.eval_batch_size)
        return data.max_wait_seconds * waits + SLOWER * self.slowest * count

    def _arriving(self, client: Any, waiting: Mapping[Any, SparsityConfig], count: int) -> Iterator[Any]:
        """Futures as they are done. Workers that do not answer for too long are started again, once."""
        pending, since, is_restarted = set(waiting), time.monotonic(), False
        while pending:
            self.session.stop.check("search", "every evaluation so far is in the ledger")
            try:
                done, pending = self.dask.wait(pending, LOOK_EVERY_SECONDS, "FIRST_COMPLETED")
            except TimeoutError:
                waited = time.monotonic() - since
                if waited < self._patience_s(count):
                    continue
                got = f"no worker answered for {waited:.0f} s"
                if is_restarted:
                    do = f"Look at the workers, or raise data.max_wait_seconds. {KEPT}"
                    raise ResourceError(WHAT, got, do) from None
                self.session.reporter.warn(f"{got}: those that are at work are started again")
                self._restart(client, {future.key for future in pending}, got)
                since, is_restarted = time.monotonic(), True
            except (CancelledError, OSError, RuntimeError, ValueError) as error:
                pass_on(error)
                raise _lost(error) from error
            else:
                since, is_restarted = time.monotonic(), False
                yield from sorted(done, key=lambda future: waiting[future])

    def _restart(self, client: Any, keys: Collection[str], got: str) -> None:
        """Start those again that are at work on `keys`: a scheduler may have workers that are busy for others."""
        try:
            busy = [worker for worker, at_work in client.processing().items() if not set(keys).isdisjoint(at_work)]
            client.restart_workers(busy, raise_for_error=False)
        except (CancelledError, OSError, RuntimeError, ValueError) as error:
            pass_on(error)
            got = f"{got}, and those at work cannot be started again ({in_one_line(error)})"
            raise ResourceError(WHAT, got, f"Start them yourself, with a nanny if you can. {KEPT}") from error


def _lost(error: BaseException) -> ResourceError:
    got = f"the connection to the scheduler was lost ({in_one_line(error)})"
    return ResourceError(WHAT, got, f"Start scheduler and workers again, then search again. {KEPT}")


def _refuse_other_versions(versions: Mapping[str, Any]) -> None:
    """Before anything of ours is sent, which a machine without this package could not read. Raises CheckpointError."""
    own = versions["client"]["packages"][DISTRIBUTION]
    for name, there in {"the scheduler": versions["scheduler"], **versions["workers"]}.items():
        other = there["packages"].get(DISTRIBUTION)
        if other != own:
            has = f"{DISTRIBUTION} {other}" if other else "no sparsevit-cli"
            got = f"{name} has {has}, the search has {own}"
            raise CheckpointError(WHAT, got, SAME_VERSION)
