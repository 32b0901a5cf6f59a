"""search --workers: the winner of one process, whatever becomes of the workers. Needs Dask distributed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsevit_cli.errors import CheckpointError, ConfigError, ResourceError
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.search.ledger import Ledger
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.workflows import workers as workers_module
from sparsevit_cli.workflows.search import opened_search, search
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.training import adapt, pretrain
from sparsevit_cli.workflows.workers import Scoring, Workers, _scorer
from tiny import tiny_config, train_in

MANY = {"population": 6, "parents": 3, "generations": 2, "samples": None}
TRAINED = {"model": {"weight_init": "timm", "global_pool": "avg"}, "train": {"lr": 1e-2, "epochs": 1.0}}
"""So that ratios make a difference to the score."""
Work = tuple[Workers, Ledger, list[SparsityConfig]]
MARK = "SPARSEVIT_TEST_MARK"


def session_in(runs: Path, **sections: Any) -> Session:
    return Session(tiny_config(output=str(runs), **{**TRAINED, "search": MANY, **sections}), SilentReporter())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("adapted"), session_in, pretrain, adapt)


@pytest.fixture
def runs(adapted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(adapted, tmp_path / "runs")


def searched(runs: Path, workers: str | None) -> tuple[SparsityConfig, float, str]:
    """Winner, its score and the history of a search in a copy of the folder."""
    own = shutil.copytree(runs, runs.with_name(f"runs-{workers}"))
    session = session_in(own)
    summary = search(session, workers=workers)
    session.locks.close()
    return summary.winner.config, summary.winner.score, (summary.folder.path / "history.csv").read_text()


def test_workers_find_what_one_process_finds(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of Dask in this process: they start at once."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(distributed, "LocalCluster", partial(distributed.LocalCluster, processes=False, protocol="tcp"))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    found = searched(runs, "local:2")
    assert len({line.split(",")[-6] for line in found[2].splitlines()[1:]}) > 1, "candidates score differently"
    assert found == searched(runs, None)


@pytest.mark.slow
def test_one_two_and_four_processes_find_it_too(runs: Path) -> None:
    pytest.importorskip("distributed")
    expected = searched(runs, None)
    for workers in ("local:1", "local:2", "local:4"):
        assert searched(runs, workers) == expected


# -- what becomes of workers ------------------------------------------------------------------------------------


def misbehaving(scoring: Scoring, config: SparsityConfig) -> tuple[float, float]:
    """In the place of `score_candidate`: the first one to come goes wrong as its mark says, all others score."""
    folder = Path(os.environ[MARK])
    with open(folder / "calls", "a") as calls:
        calls.write(f"{config}\n")
    for wrong in ("kill", "stop", "hang", "raise", "always"):
        try:
            (folder / wrong).rename(folder / f"{wrong}.done") if wrong != "always" else (folder / wrong).stat()
        except FileNotFoundError:
            continue
        if wrong == "raise":
            raise ValueError("poisoned")
        if wrong == "hang":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGSTOP if wrong == "stop" else signal.SIGKILL)
    return sum(map(sum, config.tenths)) / 7, 0.01


@pytest.fixture
def work(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Two workers that misbehave, a ledger, and eight candidates."""
    pytest.importorskip("distributed")
    monkeypatch.setenv(MARK, str(tmp_path))
    monkeypatch.setattr(workers_module, "score_candidate", misbehaving)
    session = session_in(runs, data={"max_wait_seconds": 30.0})
    with opened_search(session) as found, Workers("local:2", session, found.ledger, "", None) as workers:
        yield workers, found.ledger, [found.space.uniform(tenths / 10) for tenths in range(8)]
    session.locks.close()


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["kill", "stop", "hang", "raise"])
def test_a_worker_that_goes_wrong_costs_one_repetition(wrong: str, work: Work, tmp_path: Path) -> None:
    workers, ledger, configs = work
    (tmp_path / wrong).touch()
    assert list(workers.of_all(configs)) == [sum(map(sum, config.tenths)) / 7 for config in configs]
    assert len(ledger.known()) == len(configs)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) <= len(configs) + 2  # a worker that is started again may lose what it had begun


@pytest.mark.slow
def test_a_candidate_that_no_worker_survives_is_told(work: Work, tmp_path: Path) -> None:
    workers, _, configs = work
    (tmp_path / "always").touch()
    with pytest.raises(ResourceError, match=r"candidate \[\[.*no worker survives it"):
        list(workers.of_all(configs[:1]))


# -- without workers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["local", "local:0", "local:-1", "local:x", "http://a:1", "4", "", "tcp", "local:9999"]
)
def test_what_names_no_workers_is_refused_before_anything_is_scored(where: str, runs: Path) -> None:
    session = session_in(runs)
    with opened_search(session) as found, pytest.raises(ConfigError, match="--workers"):
        Workers(where, session, found.ledger, "", None)
    session.locks.close()


def test_a_missing_extra_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"sparsevit-cli\[cluster\]"):
        search(session_in(runs), workers="local:2")


@pytest.mark.parametrize("field", ["version", "checkpoint_sha256", "data_fingerprint"])
def test_a_worker_that_sees_something_else_refuses(field: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    session = session_in(runs)
    with opened_search(session) as found:
        scoring = Workers("local:2", session, found.ledger, found.data.fingerprint, found.scores.first.numbers).scoring
        config = found.space.uniform(0.5)
        values = {**vars(scoring), "local": 0}
        assert _scorer(Scoring(**values))(config) == next(found.scores.of_all([config]))
        with pytest.raises(CheckpointError, match="--workers"):
            _scorer(Scoring(**{**values, field: "other"}))
    session.locks.close()
