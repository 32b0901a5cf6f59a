"""search --workers: the winner of one process, whatever becomes of the workers. Needs Dask distributed."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsevit_cli.errors import CheckpointError, ConfigError, ResourceError
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.workflows import workers as workers_module
from sparsevit_cli.workflows.scores import Scores
from sparsevit_cli.workflows.search import Search, opened_search, search
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.training import adapt, pretrain
from sparsevit_cli.workflows.workers import DISTRIBUTION, Scoring, Workers, _refuse_other_versions, _scorer
from tiny import tiny_config, train_in
from worker_child import MARK, metric_of, misbehaving

MANY = {
    "strategy": "evolution", "population": 6, "parents": 3, "generations": 1, "max_evaluations": 12, "samples": 40,
    "racers": 6,
}  # fmt: skip
"""With a race of two laps more; finalists take the rest of the search split."""
TRAINED = {"model": {"weight_init": "timm", "global_pool": "avg"}, "train": {"lr": 1e-2, "epochs": 1.0}}
"""So that ratios make a difference to the score."""
Work = tuple[Search, list[SparsityConfig]]
Found = tuple[SparsityConfig, float, int, int, str]


def session_in(runs: Path, **sections: Any) -> Session:
    return Session(tiny_config(output=str(runs), **{**TRAINED, "search": MANY, **sections}), SilentReporter())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("adapted"), session_in, pretrain, adapt)


@pytest.fixture
def runs(adapted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(adapted, tmp_path / "runs")


def searched(runs: Path, workers: str | None) -> Found:
    """Winner, its score, images and those forwarded, and the history of a search in a copy of the folder."""
    own = shutil.copytree(runs, runs.with_name(re.sub(r"\W", "-", f"runs-{workers}")))
    session = session_in(own)
    found = search(session, workers=workers)
    session.locks.close()
    history = (found.folder.path / "history.csv").read_text()
    return found.winner.config, found.winner.score, found.images, found.forwarded, history


def test_workers_find_what_one_process_finds(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of Dask in this process, so that they start at once; then a scheduler that is named by its address.

    They score all: candidates, the race, and finalists on the whole split.
    """
    distributed = pytest.importorskip("distributed")
    expected = searched(runs, None)
    assert expected[2] > 12 * 40 + 6 * 40 + 2 * 130, "there was a race, and finalists took more images"
    cluster = partial(distributed.LocalCluster, n_workers=2, threads_per_worker=1, processes=False, protocol="tcp")
    monkeypatch.setattr(distributed, "LocalCluster", lambda **options: cluster(**{**options, "n_workers": 2}))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(Scores, "score", pytest.fail)
    found = searched(runs, "local:2")
    assert len({line.split(",")[-6] for line in found[-1].splitlines()[1:]}) > 1, "candidates score differently"
    assert found == expected
    with cluster(host="127.0.0.1", dashboard_address="127.0.0.1:0") as elsewhere:
        assert searched(runs, elsewhere.scheduler_address) == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_two_and_four_processes_find_it_too(runs: Path) -> None:
    pytest.importorskip("distributed")
    expected = searched(runs, None)
    for workers in ("local:1", "local:2", "local:4"):
        assert searched(runs, workers) == expected


# -- what becomes of workers ------------------------------------------------------------------------------------


@pytest.fixture
def work(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """A search with two workers that misbehave, and eight candidates."""
    pytest.importorskip("distributed")
    monkeypatch.setenv(MARK, str(tmp_path))
    monkeypatch.setattr(workers_module, "score_candidate", misbehaving)
    session = session_in(runs, data={"max_wait_seconds": 30.0})
    with opened_search(session, workers="local:2") as found:
        assert found.scores.workers is not None
        found.scores.workers.scoring = None  # type: ignore[assignment]
        yield found, [found.space.uniform(tenths / 10) for tenths in range(8)]
    session.locks.close()


@pytest.mark.parametrize(
    "wrong", ["kill", *(pytest.param(wrong, marks=pytest.mark.slow) for wrong in ("stop", "hang", "raise"))]
)
def test_a_worker_that_goes_wrong_costs_one_repetition(wrong: str, work: Work, tmp_path: Path) -> None:
    found, configs = work
    (tmp_path / wrong).touch()
    assert list(found.scores.of_all(configs)) == [metric_of(config) for config in configs]
    assert len(found.ledger.known()) == len(configs)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) <= len(configs) + 2  # a worker that is started again may lose what it had begun


@pytest.mark.slow
def test_a_candidate_that_no_worker_survives_is_told(work: Work, tmp_path: Path) -> None:
    found, configs = work
    (tmp_path / "always").touch()
    with pytest.raises(ResourceError, match=r"candidate \[\[.*no worker survives it"):
        list(found.scores.of_all(configs[:1]))


# -- without workers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeFuture:
    key: str


class FakeCluster:
    """In the place of client and package: nobody answers for as many looks, each of ten seconds."""

    def __init__(self, looks: int, error: Exception | None = None) -> None:
        self.looks, self.error, self.now = looks, error, 0.0
        self.restarted: list[Sequence[str]] = []

    def wait(self, pending: set[Any], seconds: float, when: str) -> tuple[set[Any], set[Any]]:
        if self.error is not None:
            raise self.error
        self.now += 10
        if self.now > 10 * self.looks:
            return pending, set()
        raise TimeoutError

    def processing(self) -> dict[str, tuple[str, ...]]:
        return {"tcp://a:1": ("ours", "another's"), "tcp://b:1": ("another's",), "tcp://c:1": ()}

    def restart_workers(self, workers: Sequence[str], raise_for_error: bool) -> None:
        self.restarted.append(workers)


Awaited = Callable[..., list[str]]


@pytest.fixture
def awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Awaited:
    """Wait for a candidate of 250 images, two batches of 128 that may take 100 s each; gives the warnings."""
    pytest.importorskip("distributed")

    def wait(cluster: FakeCluster, seconds_per_image: float = 0.0) -> list[str]:
        session = session_in(tmp_path, data={"eval_batch_size": 128, "max_wait_seconds": 100.0})
        workers = Workers("tcp://127.0.0.1:1", session, "", "")
        workers.dask, workers.slowest = cluster, seconds_per_image
        monkeypatch.setattr(workers_module, "time", SimpleNamespace(monotonic=lambda: cluster.now))
        waiting = {FakeFuture("ours"): SparsityConfig(((0,), (0,)))}
        assert list(workers._arriving(cluster, waiting, 250)) == list(waiting)
        return session.reporter.warnings  # type: ignore[attr-defined,no-any-return]

    return wait


def test_the_first_candidate_may_wait_for_each_of_its_batches(awaited: Awaited) -> None:
    """No answer tells yet how long a candidate takes: a slow one is not restarted again and again."""
    cluster = FakeCluster(looks=19)
    assert awaited(cluster) == []
    assert cluster.restarted == []


def test_workers_at_work_for_others_are_not_restarted(awaited: Awaited) -> None:
    cluster = FakeCluster(looks=21)
    assert awaited(cluster) == ["no worker answered for 200 s: those that are at work are started again"]
    assert cluster.restarted == [["tcp://a:1"]]


def test_later_candidates_may_take_ten_times_the_slowest(awaited: Awaited) -> None:
    """0.02 s an image: 5 s, ten times that, and 100 s more."""
    assert awaited(FakeCluster(looks=14), seconds_per_image=0.02) == []
    assert len(awaited(FakeCluster(looks=15), seconds_per_image=0.02)) == 1


def test_workers_that_never_answer_end_the_search(awaited: Awaited) -> None:
    with pytest.raises(ResourceError, match=r"no worker answered for 200 s\. Look at the workers"):
        awaited(FakeCluster(looks=1000))


@pytest.mark.parametrize("error", [CancelledError("scheduler-connection-lost"), OSError("closed"), RuntimeError("x")])
def test_a_lost_scheduler_is_told(error: Exception, awaited: Awaited) -> None:
    with pytest.raises(ResourceError, match=r"the connection to the scheduler was lost .*in the ledger"):
        awaited(FakeCluster(looks=0, error=error))


def test_a_worker_that_cannot_be_restarted_is_told(awaited: Awaited, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Restarting workers requires a nanny")

    monkeypatch.setattr(FakeCluster, "restart_workers", refuse)
    with pytest.raises(
        ResourceError, match=r"cannot be started again \(ValueError: Restarting workers requires a nanny"
    ):
        awaited(FakeCluster(looks=1000))


def test_another_version_is_refused_before_anything_is_sent() -> None:
    def having(version: str | None) -> dict[str, Any]:
        return {"packages": {} if version is None else {DISTRIBUTION: version}}

    alike: dict[str, Any] = {"client": having("2"), "scheduler": having("2"), "workers": {"tcp://a:1": having("2")}}
    _refuse_other_versions(alike)
    for other, told in (("1", "sparsevit-cli 1"), (None, "no sparsevit-cli")):
        with pytest.raises(CheckpointError, match=f"the scheduler has {told}, the search has 2"):
            _refuse_other_versions({**alike, "scheduler": having(other)})
        with pytest.raises(CheckpointError, match=f"tcp://a:1 has {told}, the search has 2"):
            _refuse_other_versions({**alike, "workers": {"tcp://a:1": having(other)}})


@pytest.mark.parametrize(("where", "threads"), [("local:1", 6), ("local:4", 1), ("local:8", 1), ("tcp://a:1", 0)])
def test_workers_of_this_machine_share_the_threads_of_the_search(
    where: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that torch has here: OMP_NUM_THREADS and a CPU set limit them, and a machine may have many more."""
    pytest.importorskip("distributed")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert Workers(where, session_in(tmp_path), "", "").scoring.threads == threads


@pytest.mark.parametrize(
    "where", ["local", "local:0", "local:-1", "local:x", "http://a:1", "4", "", "tcp", "local:9999"]
)
def test_what_names_no_workers_is_refused_before_anything_is_scored(
    where: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scores, "score", pytest.fail)
    session = session_in(runs)
    with pytest.raises(ConfigError, match="--workers"):
        search(session, workers=where)
    session.locks.close()


def test_a_missing_extra_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"sparsevit-cli\[cluster\]"):
        search(session_in(runs), workers="local:2")


@pytest.mark.parametrize("field", ["version", "checkpoint_sha256", "data_fingerprint", "folder"])
def test_a_worker_that_sees_something_else_refuses(field: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.chdir(Path.cwd())  # and back again
    session = session_in(runs)
    with opened_search(session, workers="tcp://127.0.0.1:1") as found:
        assert found.scores.workers is not None
        scoring, config = found.scores.workers.scoring, found.space.uniform(0.5)
        found.scores.workers = None
        assert _scorer(scoring)(config, found.scores.first.numbers) == next(found.scores.of_all([config]))
        with pytest.raises(CheckpointError, match="search --workers"):
            _scorer(Scoring(**{**vars(scoring), field: "other"}))
    session.locks.close()
