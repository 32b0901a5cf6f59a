"""Our exceptions, each with what, got, do and its exit code; and those of others in one line."""

from __future__ import annotations

from typing import ClassVar


class SparseViTError(Exception):
    """A failure the user can act on: `what` is wrong, what we `got`, what to `do` about it.

    `what` names the thing (a config field path, a file, a step), `got` the value met and what was
    allowed, `do` the next step. Exit codes are the table of the README ("Exit codes").
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, got: str, do: str) -> None:
        super().__init__(what, got, do)
        self.what, self.got, self.do = what, got, do

    def __str__(self) -> str:
        return f"{self.what}: {self.got}. {self.do}"


class ConfigError(SparseViTError, ValueError):
    """A setting, argument or sparsity ratio that cannot be used."""

    exit_code = 2


class DataError(SparseViTError):
    """Images, labels or splits that cannot be used."""

    exit_code = 3


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


class StoppedError(SparseViTError):
    """SIGTERM (75) or Ctrl-C (130) arrived; what could be saved was saved."""

    def __init__(self, what: str, got: str, do: str, *, interrupted: bool) -> None:
        super().__init__(what, got, do)
        self.exit_code = 130 if interrupted else 75  # type: ignore[misc]


def first_line(text: object) -> str:
    """The first line of a text that another library wrote, at most 300 characters."""
    return str(text).strip().partition("\n")[0][:300]


def in_one_line(error: BaseException) -> str:
    """Class and first line of an error that another library raised."""
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
