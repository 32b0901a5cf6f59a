"""Our exceptions, each with what, got, do and its exit code; which of them pass every handler; others in one line."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any


class ThreePartError(BaseException):
    """What is told in three parts: `what` is wrong, what we `got`, what to `do` about it.

    `what` names the thing (a config field path, a file, a step), `got` the value met and what was
    allowed, `do` the next step. Exit codes are the table in docs/troubleshooting.md.
    """

    exit_code = 1
    others: tuple[str, ...] = ()
    """Further faults of the same kind, told with this one, a line each."""
    is_told = False
    """True if another process of the same training tells it."""

    def __init__(self, what: str, got: str, do: str) -> None:
        super().__init__(what, got, do)
        self.what, self.got, self.do = what, got, do

    def __str__(self) -> str:
        return f"{self.what}: {self.got}. {self.do}{''.join(f' Also wrong: {other}' for other in self.others)}"


class SparseViTError(ThreePartError, Exception):
    """A failure the user can act on."""


class ConfigError(SparseViTError, ValueError):
    """A setting, argument or sparsity ratio that cannot be used."""

    exit_code = 2


class DataError(SparseViTError):
    """Images, labels or splits that cannot be used."""

    exit_code = 3


class NothingToScoreError(DataError):
    """Images whose truth holds nothing that a task could score."""


class CheckpointError(SparseViTError):
    """A checkpoint, winner file or ledger that is missing, damaged or belongs to something else."""

    exit_code = 4


class BudgetError(SparseViTError, ValueError):
    """A budget that no configuration of the search space meets."""

    exit_code = 5


class NonFiniteError(SparseViTError, ArithmeticError):
    """A loss, gradient or metric that is NaN or infinite."""

    exit_code = 6


class ResourceError(SparseViTError):
    """Disk or memory ran out."""

    exit_code = 7


class MeasurementError(SparseViTError):
    """A latency that did not settle, or a check of an exported file that did not agree."""

    exit_code = 8


class UnsteadyError(MeasurementError):
    """A clock that cannot be trusted now: something else runs, or the samples spread. It decides nothing."""


class PeerError(SparseViTError):
    """Another process of the same training ended. It has the exit code that matters, so this one's is the lowest."""


class StoppedError(ThreePartError):
    """SIGTERM, SIGHUP (75) or Ctrl-C (130) arrived; what could be saved was saved.

    It is no Exception, as KeyboardInterrupt is none: a second signal may arrive inside any library, and no
    `except Exception` there or here may take it for a failure of its own work.
    """

    def __init__(self, what: str, got: str, do: str, *, interrupted: bool = False) -> None:
        super().__init__(what, got, do)
        self.exit_code = 130 if interrupted else 75


def pass_on(error: BaseException) -> None:
    """Raise what an `except Exception` must not explain; its first line (a test holds that).

    Errors of ours pass, and so do signals and full memory, even if a library raised another error from them.
    """
    if isinstance(error, SparseViTError):
        raise error
    if (stopped := stopped_by(error)) is not None:
        raise stopped
    if is_out_of_memory(error):
        raise error


def stopped_by(error: BaseException) -> StoppedError | KeyboardInterrupt | None:
    """The signal behind `error`, if there is one."""
    return next((cause for cause in _causes(error) if isinstance(cause, (StoppedError, KeyboardInterrupt))), None)


def is_out_of_memory(error: BaseException) -> bool:
    """True if memory ran out, as Python, torch, Pillow or the operating system say it, here or in a cause of `error`.

    torch is not imported for the question: its error is known by its name.
    """
    return any(map(_names_memory, _causes(error)))


def _names_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or "OutOfMemoryError" in (kind.__name__ for kind in type(error).__mro__):
        return True
    text = str(error)
    if isinstance(error, OSError):  # Pillow's decoders give a text and no number
        return error.errno == errno.ENOMEM or (error.errno is None and text.startswith("out of memory"))
    told = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(words in text for words in told)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, and all errors that it was raised from or while they were handled."""
    waiting, seen = [error], set[int]()
    while waiting:
        found = waiting.pop()
        if id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting += [cause for cause in (found.__context__, found.__cause__) if cause is not None]


def from_extra(module: str, what: str, extra: str) -> Any:
    """A module that an extra brings. Raises ConfigError on `what` if it cannot be imported."""
    try:
        return import_module(module)
    except ImportError as error:
        got = f"{module.partition('.')[0]} is needed and cannot be imported ({error})"
        raise ConfigError(what, got, f"Type: pip install 'sparsevit-cli[{extra}]'.") from error


def check_installed(what: str, names: Iterable[str], extra: str, or_else: str = "") -> None:
    """Raise ConfigError on `what` if a package is missing; `extra` brings it. None is imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        do = f'Type: pip install "sparsevit-cli[{extra}]"{or_else}.'
        raise ConfigError(what, f"{', '.join(missing)} not installed", do)


def first_line(text: object) -> str:
    """The first line of a text that another library wrote, at most 300 characters."""
    return str(text).strip().partition("\n")[0][:300]


def in_one_line(error: BaseException) -> str:
    """Class and first line of an error that another library raised."""
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
