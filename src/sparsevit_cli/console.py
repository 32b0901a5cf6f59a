"""The terminal: results on stdout, talk and progress on stderr, JSON where asked. Text from outside is escaped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from .config import yaml_loader
from .errors import SparseViTError
from .reporting import Progress

PLAIN_EVERY_SECONDS = 30.0
"""On anything but a terminal a bar is a line every so often, so that logs stay short."""

PIPED_WIDTH = 200


def printable(text: object) -> str:
    """Text from outside in one line, control characters made visible; Rich markup in it is shown as typed."""
    return yaml_loader.printable(str(text))


def _literal(text: object) -> str:
    """For the places where Rich takes markup strings alone."""
    return escape(printable(text))


class ConsoleReporter:
    """Talk on stderr, and into `log.txt` of the run folder once `log_to` is called."""

    def __init__(self, *, verbose: bool = False, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream, stderr=stream is None, highlight=False, soft_wrap=True)
        self.verbose = verbose
        self._logs: tuple[Path, ...] = ()
        self._unlogged: list[str] = []
        self._in_progress = False

    def log_to(self, path: Path) -> None:
        """Append everything said from now on to `path`, and still to the first such path: that of `run`.

        What was said before there was a path goes into the first one.
        """
        self._logs = (*self._logs[:1], path)
        self._log("".join(self._unlogged))
        self._unlogged.clear()

    def say(self, message: str) -> None:
        """One line."""
        self._write(Text(printable(message)), message)

    def warn(self, message: str) -> None:
        """One line, marked."""
        self._write(Text.assemble(("warning: ", "yellow"), printable(message)), f"warning: {message}")

    def error(self, error: SparseViTError) -> None:
        """The three parts of an error."""
        text = Text.assemble(
            ("error: ", "bold red"), (printable(error.what), "bold"), f": {printable(error.got)}.\n",
            f"       {printable(error.do)}",
        )  # fmt: skip
        self._write(text, f"error: {error}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table among the talk."""
        _print_table(self.console, _table(title, columns, rows))

    def _write(self, text: Text, plain: str) -> None:
        self.console.print(text)
        line = f"{time.strftime('%H:%M:%S')} {printable(plain)}\n"
        if self._logs:
            self._log(line)
        else:
            self._unlogged.append(line)

    def _log(self, lines: str) -> None:
        for log in dict.fromkeys(self._logs):
            with suppress(OSError), log.open("a", encoding="utf-8") as file:  # a full disk must not hide its message
                file.write(lines)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Progress]:
        """A bar with the time left on a terminal, a line every 30 s elsewhere; inner bars are left out."""
        if self._in_progress:
            yield _PlainProgress(self, title, total, quiet=True)
            return
        self._in_progress = True
        try:
            if self.console.is_terminal:
                with _rich_progress(self.console) as bars:
                    yield _RichBar(bars, bars.add_task(_literal(title), total=total, fields=""))
            else:
                bar = _PlainProgress(self, title, total)
                yield bar
                bar.close()
        finally:
            self._in_progress = False


def _rich_progress(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description:>10}"), BarColumn(30), MofNCompleteColumn(), TextColumn("{task.fields[fields]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
    )  # fmt: skip


def _fields(fields: Mapping[str, object]) -> str:
    return "  ".join(f"{name} {value}" for name, value in fields.items())


class _RichBar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self.bars, self.task = bars, task

    def advance(self, steps: int = 1, **fields: object) -> None:
        self.bars.advance(self.task, steps)
        if fields:
            self.bars.update(self.task, fields=_literal(_fields(fields)))


class _PlainProgress:
    def __init__(self, reporter: ConsoleReporter, title: str, total: int, *, quiet: bool = False) -> None:
        self.reporter, self.title, self.total, self.quiet = reporter, title, total, quiet
        self.done, self.began, self.first = 0, time.monotonic(), 0
        self.last = self.began
        self.fields: Mapping[str, object] = {}

    def advance(self, steps: int = 1, **fields: object) -> None:
        self.first = steps if self.done == 0 and not fields else self.first
        self.done += steps
        self.fields = fields or self.fields
        now = time.monotonic()
        if not self.quiet and now - self.last >= PLAIN_EVERY_SECONDS:
            self.last = now
            left = (now - self.began) / max(1, self.done - self.first) * (self.total - self.done)
            self.reporter.say(f"{self.title}: {self.done}/{self.total}  {_fields(self.fields)}  {left:.0f} s left")

    def close(self) -> None:
        self.reporter.say(f"{self.title}: {self.done}/{self.total} in {time.monotonic() - self.began:.0f} s")


def print_json(document: Mapping[str, object]) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, default=str, allow_nan=False) + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, losing: Sequence[int] = ()
) -> None:
    """A table on stdout; rows numbered in `losing` are marked red. Cells are shown literally."""
    _print_table(Console(highlight=False), _table(title, columns, rows, losing))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], losing: Sequence[int] = ()) -> Table:
    table = Table(title=_literal(title), title_justify="left", title_style="bold", header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(_literal(column), justify="left" if number == 0 else "right", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*(Text(printable(cell)) for cell in row), style="red" if number in losing else "")
    return table


def _print_table(console: Console, table: Table) -> None:
    """Without a terminal the width follows the content, so that piped tables are not cut."""
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=PIPED_WIDTH)
    console.print(table)


def print_lines(*lines: str) -> None:
    """Plain result lines on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(Text(printable(line)))
