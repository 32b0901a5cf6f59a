"""The ledger: nothing paid twice, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

from sparsevit_cli.errors import CheckpointError, NonFiniteError, ResourceError
from sparsevit_cli.search import Budget, LatencyRecord, Ledger, LedgerScope, search_sparsity
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

SPACE = SearchSpace((2, 2, 6, 2))
SCOPE = LedgerScope("checkpoint-hash", "data-fingerprint", "settings-hash")
CONFIGS = [SPACE.sample(Random(seed)) for seed in range(30)]

# A search of 60 candidates, each logged (unbuffered) as it is run; the history is printed at the end.
CHILD = """
import os, sys, time
from sparsevit_cli.search import Budget, Ledger, LedgerScope, search_sparsity
from sparsevit_cli.sparsity import SearchSpace

path, log_path, pause_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def evaluate(config):
    os.write(log, f"{config}\\n".encode())
    time.sleep(pause_s)
    metric = 90 - sum((t / 10) ** 2 / (s + 1) for s, stage in enumerate(config.tenths) for t in stage)
    return ledger.put(config, metric, pause_s)

with Ledger.open(path, LedgerScope("checkpoint-hash", "data-fingerprint", "settings-hash")) as ledger:
    result = search_sparsity(
        SearchSpace((2, 2, 6, 2)), evaluate, lambda c: 60 - sum(map(sum, c.tenths)),
        Budget(40, "latency_ms"), strategy="evolution", seed=1, population=12, generations=4, known=ledger,
    )
for e in result.history:
    print(e.config, e.metric.hex(), e.cost, e.generation)
print("winner", result.best)
"""

# Opens a ledger, says so, and keeps it until stdin closes.
HOLDER = """
import sys
from sparsevit_cli.errors import SparseViTError
from sparsevit_cli.search import Ledger, LedgerScope

sys.stdin.readline()
try:
    with Ledger.open(sys.argv[1], LedgerScope("checkpoint-hash", "data-fingerprint", "settings-hash")):
        print("leads", flush=True)
        sys.stdin.readline()
except SparseViTError as error:
    print(f"refused: {error}", flush=True)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.sqlite"


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that leads the ledger at `path`."""
    child = python(HOLDER, path)
    try:
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline() == "leads\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def fill(path: Path) -> dict[SparsityConfig, float]:
    with Ledger.open(path, SCOPE) as ledger:
        for number, config in enumerate(CONFIGS):
            ledger.put(config, number / 7, 0.5)
        ledger.put_latency({"device": "cpu"}, CONFIGS[0], LatencyRecord(5, 4, 6))
        return ledger.known()


def test_what_was_put_is_there_bit_for_bit(path):
    known = fill(path)
    assert known == {config: number / 7 for number, config in enumerate(CONFIGS)}
    with Ledger.open(path, SCOPE) as ledger:
        assert ledger.known() == known
        assert ledger.get(CONFIGS[3]) == 3 / 7
        assert ledger.get(SPACE.sparsest) is None


@pytest.mark.parametrize("field", ["checkpoint", "data", "settings"])
def test_another_scope_is_another_ledger(path, field):
    fill(path)
    other = LedgerScope(
        **({"checkpoint": SCOPE.checkpoint, "data": SCOPE.data, "settings": SCOPE.settings} | {field: "x"})
    )
    with Ledger.open(path, other) as ledger:
        assert ledger.known() == {}
        assert ledger.get(CONFIGS[0]) is None
        ledger.put(CONFIGS[0], 55.5, 1)
    with Ledger.open(path, SCOPE) as ledger:
        assert ledger.get(CONFIGS[0]) == 0.0


def test_the_first_commit_stands(path):
    with Ledger.open(path, SCOPE) as ledger:
        assert ledger.put(SPACE.dense, 1.5, 1) == 1.5
        assert ledger.put(SPACE.dense, 2.5, 1) == 1.5
        assert ledger.get(SPACE.dense) == 1.5


@pytest.mark.parametrize("metric", [-0.0, 1, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, -7.25])
def test_every_finite_metric_survives(path, metric):
    with Ledger.open(path, SCOPE) as ledger:
        ledger.put(SPACE.dense, metric, 0)
    with Ledger.open(path, SCOPE) as ledger:
        assert ledger.get(SPACE.dense) == metric


@pytest.mark.parametrize("metric", [float("nan"), float("inf")])
def test_metrics_that_are_not_finite_are_not_committed(path, metric):
    with Ledger.open(path, SCOPE) as ledger:
        with pytest.raises(NonFiniteError):
            ledger.put(SPACE.dense, metric, 0)
        with pytest.raises(NonFiniteError):
            ledger.put_latency({}, SPACE.dense, LatencyRecord(1.0, 1.0, metric))
        assert ledger.known() == {}


def test_latency_is_kept_per_device(path):
    here = {"device": "cpu", "batch": 1, "image_size": [224, 224]}
    with Ledger.open(path, SCOPE) as ledger:
        ledger.put_latency(here, SPACE.dense, LatencyRecord(10, 9, 11))
        ledger.put_latency(here, SPACE.dense, LatencyRecord(10.5, 9.5, 11.5))
    with Ledger.open(path, SCOPE) as ledger:
        assert ledger.get_latency(dict(reversed(here.items())), SPACE.dense) == LatencyRecord(10.5, 9.5, 11.5)
        assert ledger.get_latency(here | {"batch": 4}, SPACE.dense) is None
        assert ledger.get_latency(here, SPACE.sparsest) is None


def test_a_second_budget_is_answered_from_the_ledger(path):
    def search(ledger, limit):
        return search_sparsity(
            SPACE, lambda c: ledger.put(c, -sum(map(sum, c.tenths)), 1), lambda c: 60 - sum(map(sum, c.tenths)),
            Budget(limit, "latency_ms"), known=ledger, strategy="evolution", population=10, generations=3,
        )  # fmt: skip

    with Ledger.open(path, SCOPE) as ledger:
        first = search(ledger, 45)
    with Ledger.open(path, SCOPE) as ledger:
        assert search(ledger, 45).evaluations == 0
        assert len(ledger.known()) == first.evaluations == 40
        second = search(ledger, 44)
        assert second.evaluations < 40
        assert all(e.cost <= 44 for e in second.history)


def committed_now(path: Path) -> set[str]:
    """Candidates on disk, as a reader beside the leader sees them."""
    if not path.exists():
        return set()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        if not database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'evaluations'").fetchone():
            return set()
        rows = database.execute("SELECT candidate FROM evaluations").fetchall()
        return {str(SparsityConfig(json.loads(candidate))) for (candidate,) in rows}


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def killed_and_resumed(directory: Path, seed: int, kills: int, pause_s: float) -> str:
    """SIGKILL a search at random points, then let it end: what it printed; nothing committed was run again."""
    rng = Random(seed)
    path, log = directory / "ledger.sqlite", directory / "log"
    committed_after: dict[int, set[str]] = {}  # by number of evaluations run so far
    codes = []
    for kill_after in sorted(rng.randint(0, 58) for _ in range(kills)):
        child = python(CHILD, path, log, pause_s)
        while len(lines(log)) < kill_after and child.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 3 * pause_s if kill_after else 0.2))
        child.kill()
        child.communicate()
        codes.append(child.returncode)
        committed_after[len(lines(log))] = committed_now(path)
    child = python(CHILD, path, log, pause_s)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert -signal.SIGKILL in codes
    run = lines(log)
    for count, on_disk in committed_after.items():
        assert on_disk <= set(run[:count])
        assert not on_disk & set(run[count:])
    assert len(set(run)) == 60
    assert len(run) <= 60 + kills  # per kill, at most the one in flight
    return output


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> str:
    """What the search prints when nothing stops it."""
    directory = tmp_path_factory.mktemp("straight")
    child = python(CHILD, directory / "ledger.sqlite", directory / "log", 0)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert len(lines(directory / "log")) == 60
    return output


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_search_resumes_to_the_same_history(tmp_path, straight, seed):
    assert killed_and_resumed(tmp_path, seed, kills=2, pause_s=0.003) == straight


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_a_killed_search_resumes_to_the_same_history_twenty_times(tmp_path, straight, seed):
    assert killed_and_resumed(tmp_path, seed, kills=4, pause_s=0.01) == straight


def test_a_second_leader_is_refused_with_the_name_of_the_first(path, holder):
    with pytest.raises(CheckpointError) as caught:
        Ledger.open(path, SCOPE)
    assert f"process {holder.pid} on host {socket.gethostname()}" in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_second_leader_in_the_same_process_is_refused(path):
    with Ledger.open(path, SCOPE), pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        Ledger.open(path, SCOPE)
    Ledger.open(path, SCOPE).close()


def test_the_lock_of_a_killed_leader_is_taken_over(path, holder):
    holder.kill()
    holder.wait()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT pid FROM leader").fetchone() == (holder.pid,)
    with Ledger.open(path, SCOPE) as ledger:
        ledger.put(SPACE.dense, 1.0, 1)


ORPHAN = """
import os, sys, time
from sparsevit_cli.search import Ledger, LedgerScope

ledger = Ledger.open(sys.argv[1], LedgerScope("checkpoint-hash", "data-fingerprint", "settings-hash"))
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_worker_that_outlives_its_leader_does_not_hold_the_lock(path):
    """Data loading workers are forks: they inherit the open files."""
    leader = python(ORPHAN, path)
    worker = int(leader.stdout.readline())
    try:
        leader.kill()
        leader.wait()
        Ledger.open(path, SCOPE).close()
        os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)
        leader.communicate()


def test_of_two_that_race_one_leads(path):
    children = [python(HOLDER, path) for _ in range(2)]
    try:
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        said = {child.pid: child.stdout.readline() for child in children}
        (leader,) = (pid for pid, line in said.items() if line == "leads\n")
        (refused,) = (line for line in said.values() if line.startswith("refused"))
        assert f"process {leader} on host {socket.gethostname()}" in refused
    finally:
        codes = {child.pid: (child.communicate(), child.returncode)[1] for child in children}
    assert sorted(codes.values()) == [0, 4]


def test_a_foreign_write_lock_is_waited_for(path):
    with Ledger.open(path, SCOPE) as ledger:
        foreign = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        foreign.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.5, lambda: foreign.execute("COMMIT"))
        release.start()
        assert ledger.put(SPACE.dense, 1.5, 1) == 1.5
        release.join()
        foreign.close()


def test_a_foreign_write_lock_that_stays_is_told(path):
    with Ledger.open(path, SCOPE, write_wait_s=0.05) as ledger:
        with closing(sqlite3.connect(path, isolation_level=None)) as foreign:
            foreign.execute("BEGIN IMMEDIATE")
            with pytest.raises(CheckpointError, match="locked by another program"):
                ledger.put(SPACE.dense, 1.5, 1)
        assert ledger.known() == {}
        ledger.put(SPACE.dense, 1.5, 1)


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_is_found_or_harmless_and_the_file_is_kept(path, seed):
    known = fill(path)
    clean = path.read_bytes()
    rng = Random(seed)
    found = 0
    for _ in range(25):
        damaged = bytearray(clean)
        damaged[rng.randrange(len(clean))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            with Ledger.open(path, SCOPE) as ledger:
                assert ledger.known() == known
        except CheckpointError:
            found += 1
            assert path.read_bytes() == damaged
        for extra in path.parent.glob("ledger.sqlite-*"):
            extra.unlink()
    assert found


@pytest.mark.parametrize("keep", [1, 99, 4096, 5000, -4096, -1])
def test_a_cut_file_is_found(path, keep):
    fill(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="left as it is"):
        Ledger.open(path, SCOPE)
    assert path.exists()


def test_a_changed_number_is_found(path):
    """integrity_check alone does not see it."""
    fill(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "UPDATE evaluations SET metric = metric + 1 WHERE candidate = '[[0],[0],[0,0,0],[0]]' OR metric > 4"
        )
    with pytest.raises(CheckpointError, match="a row of evaluations fails its checksum"):
        Ledger.open(path, SCOPE)


def test_files_that_are_no_ledger(path):
    path.parent.mkdir()
    path.write_text("candidate,metric\n" * 100)
    with pytest.raises(CheckpointError, match="not a ledger"):
        Ledger.open(path, SCOPE)
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE studies (id)")
    with pytest.raises(CheckpointError, match=r"something else.*studies"):
        Ledger.open(path, SCOPE)
    shutil.rmtree(path.parent)
    path.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        Ledger.open(path, SCOPE)


def test_a_ledger_of_a_newer_version_is_refused(path):
    fill(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(CheckpointError, match="newer version"):
        Ledger.open(path, SCOPE)


FULL_DISK = """
import resource, signal, sys
from random import Random
from sparsevit_cli.errors import ResourceError
from sparsevit_cli.search import Ledger, LedgerScope
from sparsevit_cli.sparsity import SearchSpace

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
space, rng, put = SearchSpace((2, 2, 6, 2)), Random(0), 0
with Ledger.open(sys.argv[1], LedgerScope("checkpoint-hash", "data-fingerprint", "settings-hash")) as ledger:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        while True:
            ledger.put(space.sample(rng), 1.0, 1.0)
            put = len(ledger.known())
    except ResourceError as error:
        print(put, error.exit_code, error)
"""


def test_a_full_disk_keeps_what_was_acknowledged(path):
    child = python(FULL_DISK, path)
    output, _ = child.communicate(timeout=60)
    put, code, message = output.split(" ", 2)
    assert int(put) > 3
    assert code == "7"
    assert str(path) in message
    assert "bytes are free" in message
    with Ledger.open(path, SCOPE) as ledger:
        assert len(ledger.known()) == int(put)


def test_a_database_that_may_not_grow_is_a_full_disk(path):
    with Ledger.open(path, SCOPE) as ledger:
        pages = ledger._database.execute("PRAGMA page_count").fetchone()[0]
        ledger._database.execute(f"PRAGMA max_page_count = {pages}")

        def put_all():
            for config in SPACE:
                ledger.put(config, 1.0, 1.0)

        with pytest.raises(ResourceError, match="full"):
            put_all()
        known = ledger.known()
    with Ledger.open(path, SCOPE) as ledger:
        assert ledger.known() == known
        ledger.put(SPACE.sparsest, 2.0, 1.0)
