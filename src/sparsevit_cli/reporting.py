"""How work tells about itself, without knowing the terminal: the console implements this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from .errors import in_one_line, stopped_by


class Progress(Protocol):
    """One running bar."""

    def advance(self, steps: int = 1, **fields: object) -> None:
        """Move on by `steps`; `fields` are shown beside the bar (loss, best, ...)."""


class Reporter(Protocol):
    """Talk: never results, which are returned."""

    def say(self, message: str) -> None:
        """One line of plain text; markup in it is shown literally."""

    def warn(self, message: str, *, always: bool = False) -> None:
        """One line on what was left out or is doubtful; `always`, though another process of the same work talks."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A small table about what is going to happen; cells are shown literally."""

    def progress(self, title: str, total: int) -> AbstractContextManager[Progress]:
        """A bar of `total` steps, with the time left."""


@contextmanager
def optional_output(reporter: Reporter, name: str) -> Iterator[None]:
    """Make a picture, a page or a table beside the result: whatever fails in it costs that output and one warning."""
    try:
        yield
    except Exception as error:
        if (stopped := stopped_by(error)) is not None:
            raise stopped from error
        reporter.warn(f"{name} is left out: {in_one_line(error)}")


class SilentReporter:
    """Says nothing; keeps warnings in `warnings`. For the Python API and tests."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def say(self, message: str) -> None:
        """Nothing."""

    def warn(self, message: str, *, always: bool = False) -> None:
        """Keep the warning."""
        self.warnings.append(message)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Progress]:
        """A bar that nobody sees."""
        yield _NoProgress()


class _NoProgress:
    def advance(self, steps: int = 1, **fields: object) -> None:
        pass
