"""Run folders: `<output>/<experiment>/<command>/` with what was asked, where it ran, and what came out.

Nothing is overwritten in silence: a training with other settings is refused, an earlier measurement is moved to
`earlier-001/` and the reporter says so.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from .atomic import UNSUPPORTED, disk_errors, json_text, remove_leftovers, sha256_file, write_atomic, write_json
from .commands import COMMANDS
from .config.experiment import ExperimentConfig
from .config.loading import config_differences, dump_config, load_config
from .config.paths import as_path
from .documents import exists, read_json, understood
from .errors import CheckpointError, ConfigError, SparseViTError
from .reporting import Reporter

SCHEMA_VERSION = 2
"""Of results; those of version 1 know image classification alone."""

WORK = ("checkpoints", "ledger.sqlite", "metrics.json")
"""What a run has paid for; a folder with none of it (data that could not be read, say) holds nothing to protect."""

_log = logging.getLogger(__name__)

EXPERIMENT_FLAGS = ("--config", "-c", "--set", "-s", "--output", "-o", "--seed", "--device", "--task")
"""Flags that say which experiment is meant."""

HARMLESS = (
    "data.workers", "data.max_wait_seconds", "data.eval_batch_size",
    *(f"{section}.{name}" for section in ("train", "adapt", "finetune") for name in ("save_every", "keep")),
)  # fmt: skip
"""Settings inside those sections that change how, but not what, is computed."""


class _Check(BaseModel):
    """One line of adapt's closing table."""

    model_config = ConfigDict(strict=True)
    score: float
    gmacs: float
    backbone_gmacs: float | None = None


class _Result(BaseModel):
    """What other commands take from a `metrics.json`; each has some of it."""

    model_config = ConfigDict(strict=True)
    checkpoint: str = ""
    data_fingerprint: str = ""
    seed: int = 0
    check: dict[str, _Check] = Field({})
    files: dict[str, str] = Field({})


@dataclass(frozen=True)
class RunFolder:
    """One command's folder."""

    path: Path
    command: str
    argv: Sequence[str] = ()
    """The command line that this process was started with."""
    about: Mapping[str, str] = field(default_factory=dict)
    """config.yaml and env.json of this command, written once an earlier result with its own is set aside."""

    @property
    def typed(self) -> str:
        """What to type for this command on the same experiment."""
        return next_command(self.command, self.argv)

    @property
    def checkpoints(self) -> Path:
        """Where a training saves."""
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        """The final numbers, written last."""
        return self.path / "metrics.json"

    def read_result(self) -> dict[str, Any] | None:
        """The final numbers of an earlier, finished run. Raises CheckpointError where they are damaged."""
        if not exists(self.result):
            return None
        result = read_json(self.result)
        if result.get("schema_version") == 1:  # its closing table is made again; all else is read as it is
            result.pop("check", None)
        with understood(self.result):
            _Result.model_validate(result)
        return result

    def done(self, *needed: str) -> dict[str, Any]:
        """The final numbers where all that they tell of is there, file by file; else nothing.

        The numbers alone do not say that a run is done: a kill, or somebody, may have taken the files `needed` away.
        """
        try:
            result = self.read_result() or {}
            files = result.get("files", {})
            whole = all(sha256_file(self.path / name) == digest for name, digest in files.items())
        except (CheckpointError, OSError, ValueError):  # damaged, or not to be read: it is made again
            return {}
        return result if whole and set(needed) <= set(files) else {}

    def write_result(self, result: Mapping[str, object], files: Sequence[str] = ()) -> None:
        """Write the final numbers, with the hashes of the `files` that belong to them."""
        hashes = {name: sha256_file(self.path / name) for name in files}
        write_json(self.result, {"schema_version": SCHEMA_VERSION, "command": self.command, **result, "files": hashes})

    def set_aside(self, names: Sequence[str], reporter: Reporter, *, copy: bool = False) -> None:
        """Move (or copy) earlier results called `names` into `earlier-NNN/`, and say so.

        With `metrics.json` goes a copy of the config.yaml and env.json it was made with, and this command's follow.
        """
        present = [self.path / name for name in names if (self.path / name).is_file()]
        if not present:
            return
        about = self.about if self.result in present else {}
        present.sort(key=lambda path: path != self.result)  # a kill in between leaves no numbers without their files
        target = _next(self.path, "earlier-")
        with disk_errors(target, 0):
            target.mkdir()
            for name in about:
                shutil.copyfile(self.path / name, target / name)  # without metadata: not every file system takes them
            for path in present:
                shutil.copyfile(path, target / path.name) if copy else _move(path, target / path.name)
        for name, text in about.items():
            write_atomic(self.path / name, text)
        reporter.say(f"{self.command}: the earlier result is kept in {target}")


class RunLocks:
    """Locks on run folders: one process at a time works in one. The operating system frees those of a killed one."""

    def __init__(self) -> None:
        self._held: dict[Path, FileLock | None] = {}

    def take(self, path: Path) -> bool:
        """Lock the folder `path`, which need not exist yet; False if its file system has no locks, with a warning.

        Raises CheckpointError where another process has it.
        """
        path = as_path(os.path.realpath(path), "output")  # unlike resolve() it takes links in a circle
        if path in self._held:
            return self._held[path] is not None
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            got = "another process is working in it"
            raise CheckpointError(str(path), got, "Wait for it, or choose a name (--set experiment=NAME).") from error
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
                raise
            if None not in self._held.values():
                _log.warning("the file system of %s has no locks: start no second process in this folder", path)
            self._held[path] = None
            return False
        self._held[path] = lock
        return True

    def close(self) -> None:
        """Give all of them back."""
        while self._held:
            lock = self._held.popitem()[1]
            if lock is not None:
                with suppress(OSError):  # the system frees it with the process
                    lock.release()


def open_run(
    config: ExperimentConfig,
    command: str,
    *,
    argv: Sequence[str],
    environment: Mapping[str, object],
    fresh: bool,
    reporter: Reporter,
    locks: RunLocks,
) -> RunFolder:
    """Make or re-open the folder of `command` and lock it; saves config.yaml, env.json and command.txt.

    `fresh` moves an existing folder aside. What a killed process left unfinished there is removed. Raises ConfigError
    where the folder holds a run with other settings or cannot be made, CheckpointError where another process works in
    it, ResourceError on a full disk.
    """
    path = folder_of(config, command)
    with disk_errors(path, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_locked = locks.take(path)
        if fresh and path.exists():
            _move(path, aside := _next(path.parent, f"{command}.old-"))
            reporter.say(f"{command}: the earlier run is kept in {aside}")
        saved = path / "config.yaml"
        if saved.exists() and any((path / name).exists() for name in WORK):
            try:
                earlier = load_config(saved)
            except ConfigError as fault:
                got = f"the run there was saved with what is no configuration ({fault.what}: {fault.got})"
                do = "It may be another version's. Choose a name (--set experiment=NAME), or --fresh to set it aside."
                raise ConfigError(str(saved), got, do) from fault
            _refuse_other_settings(earlier, config, command, path)
        path.mkdir(exist_ok=True)
    if is_locked:  # else a living process may be writing there
        remove_leftovers(path)
        remove_leftovers(path / "checkpoints")
    about = {"config.yaml": dump_config(config), "env.json": json_text(environment)}
    is_replaced_later = COMMANDS[command].training is None and (path / "metrics.json").exists()
    folder = RunFolder(path, command, argv, about if is_replaced_later else {})
    if not is_replaced_later:
        for name, text in about.items():
            write_atomic(path / name, text)
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {shlex.join(argv)}\n"
    typed = path / "command.txt"
    with disk_errors(typed, len(line)), typed.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(line)
    return folder


def folder_of(config: ExperimentConfig, command: str) -> Path:
    """The folder of `command`, without opening it."""
    return as_path(config.output, "output") / config.experiment / command


def _move(path: Path, target: Path) -> None:
    """A rename, or a copy without metadata where the file system cannot rename (layers of a container)."""
    shutil.move(path, target, copy_function=shutil.copyfile)


def _next(folder: Path, prefix: str) -> Path:
    """`<prefix>NNN` with the first number above those in `folder`."""
    endings = [path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*")]
    numbers = [int(ending) for ending in endings if ending.isdigit()]
    return folder / f"{prefix}{max(numbers, default=0) + 1:03d}"


def _refuse_other_settings(old: ExperimentConfig, new: ExperimentConfig, command: str, path: Path) -> None:
    sections = COMMANDS[command].sections
    differing = [
        line
        for line in config_differences(old, new, ignore=HARMLESS)
        if line.split(":", 1)[0].split(".", 1)[0] in sections
    ]
    if differing:
        got = f"it holds a run with other settings: {'; '.join(differing[:10])}"
        raise ConfigError(str(path), got, "Choose a name (--set experiment=NAME), or --fresh to set it aside.")


def missing_result(folder: RunFolder, needed_by: str) -> SparseViTError:
    """What to type first."""
    state = "has not finished" if folder.path.exists() else "was not run"
    got = f"`sparsevit {folder.command}` {state} ({folder.result} is missing)"
    return CheckpointError(needed_by, got, f"Type: {folder.typed}")


def next_command(command: str, argv: Sequence[str]) -> str:
    """`sparsevit <command>` on the experiment that `argv` named: with its --config, --set, --output and --seed."""
    kept: list[str] = []
    for position, word in enumerate(argv):
        name, equals, _ = word.partition("=")
        if name in EXPERIMENT_FLAGS:
            kept += [word] if equals else argv[position : position + 2]
    return " ".join(["sparsevit", command, *([shlex.join(kept)] if kept else [])])
