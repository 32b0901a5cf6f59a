"""The search ledger: every paid evaluation in one SQLite file, committed at once, read back after any crash.

One row per (checkpoint, data, settings, candidate). One leader at a time owns a ledger: it holds an operating-system
lock on `<ledger>.lock`, which vanishes with the process however it ends; the `leader` row only names the owner.
Keep the file on a local disk: WAL does not work over a network file system.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from sparsevit_cli.atomic import free_bytes, has_no_room, told_of
from sparsevit_cli.documents import number, understood
from sparsevit_cli.errors import CheckpointError, NonFiniteError, ResourceError, SparseViTError
from sparsevit_cli.sparsity import SparsityConfig

APPLICATION_ID = 0x53565443  # "SVTC"
SCHEMA_VERSION = 1
LEADER_WAIT_S = 1.0
WRITE_WAIT_S = 30.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
  checkpoint TEXT NOT NULL, data TEXT NOT NULL, settings TEXT NOT NULL, candidate TEXT NOT NULL,
  metric REAL NOT NULL, seconds REAL NOT NULL, sha256 TEXT NOT NULL,
  PRIMARY KEY (checkpoint, data, settings, candidate)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS latencies (
  device TEXT NOT NULL, candidate TEXT NOT NULL,
  latency_ms REAL NOT NULL, low_ms REAL NOT NULL, high_ms REAL NOT NULL, sha256 TEXT NOT NULL,
  PRIMARY KEY (device, candidate)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leader (
  only_row INTEGER PRIMARY KEY CHECK (only_row = 1), host TEXT NOT NULL, pid INTEGER NOT NULL);
"""


@dataclass(frozen=True)
class LedgerScope:
    """What a metric holds for: hash of the checkpoint, fingerprint of the data, hash of the evaluation settings."""

    checkpoint: str
    data: str
    settings: str


@dataclass(frozen=True)
class LatencyRecord:
    """Median milliseconds per batch with its interval."""

    latency_ms: float
    low_ms: float
    high_ms: float


class Ledger:
    """Metrics of one scope, and measured latencies per device; a context manager. Made by `Ledger.open`."""

    def __init__(self, path: Path, scope: LedgerScope, database: sqlite3.Connection, lock: sqlite3.Connection) -> None:
        self.path, self.scope = path, scope
        self._database, self._lock = database, lock

    @classmethod
    def open(cls, path: str | Path, scope: LedgerScope, *, write_wait_s: float = WRITE_WAIT_S) -> Ledger:
        """Open or create the ledger at `path` as its only leader, and check every row of it.

        A lock that another process holds on the database is waited for, `write_wait_s` at most. Raises
        CheckpointError: damaged (the file stays as it is), not a ledger, or led by another living process;
        ResourceError: disk full.
        """
        path = Path(path)
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lead(path)
            try:
                _check_head(path)
                database = sqlite3.connect(path, timeout=write_wait_s, isolation_level=None)
                try:
                    _prepare(database, path)
                    with _transaction(database):
                        row = (socket.gethostname(), os.getpid())
                        database.execute("INSERT OR REPLACE INTO leader VALUES (1, ?, ?)", row)
                except BaseException:
                    database.close()
                    raise
            except BaseException:
                lock.close()
                raise
        return cls(path, scope, database, lock)

    def close(self) -> None:
        """Give up leadership; what was put is already on disk."""
        with suppress(sqlite3.Error), _transaction(self._database):
            self._database.execute("DELETE FROM leader")
        self._database.close()
        self._lock.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, config: SparsityConfig) -> float | None:
        """Committed metric of a configuration, or None."""
        row = self._one(
            "SELECT metric FROM evaluations WHERE checkpoint = ? AND data = ? AND settings = ? AND candidate = ?",
            (*self._key, _candidate(config)),
        )
        return None if row is None else float(row[0])

    def put(self, config: SparsityConfig, metric: float, seconds: float) -> float:
        """Commit what an evaluation said and took, on disk when this returns; returns the metric that stands.

        A configuration is committed once: a second metric for it is not taken. Raises NonFiniteError, ResourceError.
        """
        row = (*self._key, _candidate(config), _stored(metric), _stored(seconds))
        if not math.isfinite(metric):
            raise NonFiniteError(f"candidate {config}", f"the metric is {metric}", "Nothing was committed.")
        self._insert("INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        standing = self.get(config)
        assert standing is not None
        return standing

    def known(self) -> dict[SparsityConfig, float]:
        """All committed metrics of this scope."""
        query = "SELECT candidate, metric FROM evaluations WHERE checkpoint = ? AND data = ? AND settings = ?"
        with _translated(self.path):
            return {_config(candidate): metric for candidate, metric in self._database.execute(query, self._key)}

    def get_latency(self, device: Mapping[str, Any], config: SparsityConfig) -> LatencyRecord | None:
        """Latency measured under this very identity (device, model, batch, image size, dtype, versions ...)."""
        query = "SELECT latency_ms, low_ms, high_ms FROM latencies WHERE device = ? AND candidate = ?"
        row = self._one(query, (_identity(device), _candidate(config)))
        return None if row is None else LatencyRecord(*row)

    def put_latency(self, device: Mapping[str, Any], config: SparsityConfig, record: LatencyRecord) -> None:
        """Commit a measurement; a newer one replaces the older."""
        numbers = [_stored(value) for value in (record.latency_ms, record.low_ms, record.high_ms)]
        if not all(map(math.isfinite, numbers)):
            raise NonFiniteError(f"latency of candidate {config}", str(record), "Nothing was committed.")
        row = (_identity(device), _candidate(config), *numbers)
        self._insert("INSERT OR REPLACE INTO latencies VALUES (?, ?, ?, ?, ?, ?)", row)

    def scoped(self, settings: str) -> Ledger:
        """This ledger for metrics under other evaluation settings; it lives as long as this one."""
        return Ledger(self.path, replace(self.scope, settings=settings), self._database, self._lock)

    @property
    def _key(self) -> tuple[str, str, str]:
        return self.scope.checkpoint, self.scope.data, self.scope.settings

    def _one(self, query: str, arguments: tuple[object, ...]) -> tuple[Any, ...] | None:
        with _translated(self.path):
            row: tuple[Any, ...] | None = self._database.execute(query, arguments).fetchone()
            return row

    def _insert(self, statement: str, row: tuple[object, ...]) -> None:
        with _translated(self.path), _transaction(self._database):
            self._database.execute(statement, (*row, _checksum(row)))


_KEEP = "It was left as it is: restore it from a backup, or move it away to start a new one."


def _check_head(path: Path) -> None:
    """SQLite takes a file of a few bytes for a new one."""
    if path.is_file() and not Path(f"{path}-journal").exists():
        with path.open("rb") as file:
            head = file.read(16)
        if head not in (b"", b"SQLite format 3\0"):
            raise CheckpointError(f"ledger {path}", "damaged or not a ledger (no SQLite header)", _KEEP)


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    """Check what is there, set the durability, make the tables."""
    application = database.execute("PRAGMA application_id").fetchone()[0]
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if tables and application != APPLICATION_ID:
        raise CheckpointError(f"ledger {path}", f"a database of something else (tables {sorted(tables)})", _KEEP)
    if version > SCHEMA_VERSION:
        got = f"written by a newer version (schema {version}, this one reads {SCHEMA_VERSION})"
        raise CheckpointError(f"ledger {path}", got, "Update sparsevit-cli.")
    problems = [" ".join(text.split()) for (text,) in database.execute("PRAGMA integrity_check(3)") if text != "ok"]
    if problems:
        raise CheckpointError(f"ledger {path}", f"damaged ({'; '.join(problems)})", _KEEP)
    if database.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise CheckpointError(f"ledger {path}", "its file system cannot do write-ahead logging", "Use a local disk.")
    database.execute("PRAGMA synchronous = FULL")
    if not tables:
        with _transaction(database):
            for statement in filter(str.strip, _SCHEMA.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    # integrity_check sees broken pages, not a flipped bit inside a number
    for table in ("evaluations", "latencies"):
        for *row, checksum in database.execute(f"SELECT * FROM {table}"):
            if checksum != _checksum(tuple(row)):
                raise CheckpointError(f"ledger {path}", f"damaged (a row of {table} fails its checksum)", _KEEP)
            with understood(f"ledger {path}", _KEEP):
                names, numbers = (row[:4], row[4:]) if table == "evaluations" else (row[:2], row[2:])
                _config(names[-1])
                if not all(math.isfinite(number(value)) for value in numbers):
                    raise ValueError(f"a number in {table} that is not finite")


def _lead(path: Path) -> sqlite3.Connection:
    """The lock of the only leader; raises CheckpointError naming the one who holds it."""
    lock = sqlite3.connect(f"{path}.lock", timeout=0, isolation_level=None)
    deadline = time.monotonic() + LEADER_WAIT_S
    try:
        while True:
            try:
                lock.execute("BEGIN IMMEDIATE")
                return lock
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
            host, pid = _leader(path)
            # A dead pid is the leader before: wait for the one that holds the lock to write its name.
            if time.monotonic() > deadline or (host == socket.gethostname() and _is_alive(pid)):
                got = f"in use by process {pid or 'unknown'} on host {host or 'unknown'}"
                raise CheckpointError(f"ledger {path}", got, "Wait for it or stop it; a search continues what it left.")
            time.sleep(0.02)
    except BaseException:
        lock.close()
        raise


def _leader(path: Path) -> tuple[str, int]:
    """Host and pid in the leader row; empty where there is none yet."""
    existing = f"{path.absolute().as_uri()}?mode=rw"
    with (
        suppress(sqlite3.Error, ValueError, TypeError),
        closing(sqlite3.connect(existing, timeout=0.1, uri=True)) as database,
    ):
        row = database.execute("SELECT host, pid FROM leader").fetchone()
        if row is not None:
            return str(row[0]), int(row[1])
    return "", 0


def _is_alive(pid: int) -> bool:
    if os.name == "nt" or pid <= 0:
        return False  # on Windows signal 0 is Ctrl-C
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, also for Ctrl-C."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's and the file system's errors as ours."""
    what = f"ledger {path}"
    try:
        yield
    except (SparseViTError, sqlite3.ProgrammingError):
        raise
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        full = code == sqlite3.SQLITE_CANTOPEN and has_no_room(path)
        if full or code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM):
            got = f"{error}; {free_bytes(path)} bytes are free, a commit needs about 64 kB and a free inode"
            raise ResourceError(what, got, "Make room and start again: all that was committed is kept.") from error
        if _is_busy(error):
            raise CheckpointError(what, "locked by another program", "Close that program and start again.") from error
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
            raise CheckpointError(what, f"cannot be written ({error})", "Check its folder and permissions.") from error
        raise CheckpointError(what, f"damaged or not a ledger ({error})", _KEEP) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(what, "damaged (text that is none)", _KEEP) from error
    except OSError as error:
        if isinstance(told := told_of(error), ResourceError):
            raise told from error
        raise CheckpointError(what, f"cannot be made ({error})", "Check its folder and permissions.") from error


def _is_busy(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _stored(value: float) -> float:
    """A number as SQLite gives it back: it drops the sign of zero."""
    return float(value) + 0.0


def _candidate(config: SparsityConfig) -> str:
    return json.dumps(config.tenths, separators=(",", ":"))


def _config(candidate: str) -> SparsityConfig:
    return SparsityConfig(tuple(map(tuple, json.loads(candidate))))


def _identity(device: Mapping[str, Any]) -> str:
    return json.dumps(dict(device), sort_keys=True, separators=(",", ":"))


def _checksum(row: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(row).encode()).hexdigest()
