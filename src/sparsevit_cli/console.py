"""The terminal: results on stdout, talk and progress on stderr, JSON where asked. Text from outside is escaped."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

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

from .atomic import FULL
from .config import yaml_loader
from .errors import ResourceError, ThreePartError
from .reporting import Progress

PLAIN_EVERY_SECONDS = 30.0
"""On anything but a terminal a bar is a line every so often, so that logs stay short."""

PIPED_WIDTH = 200


class _Stream:
    """stdout or stderr as it is at the moment (or `stream`), of which no character and no lost reader costs a result.

    Characters that its encoding lacks are written as escapes. What nobody reads any more is dropped. A full disk under
    stdout is an error, because a result was asked for there; under stderr it is not.
    """

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name, self._given = name, stream

    @property
    def _stream(self) -> Any:
        stream = self._given or getattr(sys, self._name) or io.StringIO()  # None: it was closed at the start
        return getattr(stream, "rich_proxied_file", stream)  # a running bar of Rich stands before the stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream's."""
        stream = self._stream
        with self._lost_readers():
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """As a stream's."""
        with self._lost_readers():
            self._stream.flush()

    @contextmanager
    def _lost_readers(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # it was closed meanwhile
            pass
        except OSError as error:
            if self._name == "stdout" and error.errno in FULL:
                do = "Make room, or look into the run folder: every result is there too."
                raise ResourceError("stdout", f"it could not be written ({error.strerror})", do) from error


def keep_streams() -> None:
    """Make sure of stdin, stdout and stderr: a closed one is /dev/null, so that no file of ours gets its number.

    Streams that other libraries write to get escapes for characters that they lack, too.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def let_streams_go() -> None:
    """Write what is left in stdout and stderr, or drop it: Python would end with exit 120 where it cannot."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text: object) -> str:
    """Text from outside in one line, control characters made visible; Rich markup in it is shown as typed."""
    return yaml_loader.printable(str(text))


def _console(stream: _Stream, **options: Any) -> Console:
    file: Any = stream
    return Console(file=file, highlight=False, **options)


def _literal(text: object) -> str:
    """For the places where Rich takes markup strings alone."""
    return escape(printable(text))


class ConsoleReporter:
    """Talk on stderr, and into `log.txt` of the run folder once `log_to` is called."""

    def __init__(self, *, verbose: bool = False, stream: TextIO | None = None) -> None:
        self.console = _console(_Stream("stderr", stream), soft_wrap=True)
        self.verbose = verbose
        self.quiet = False
        """True where another process of the same training talks: errors are told all the same."""
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

    @property
    def folder(self) -> Path | None:
        """The run folder that is worked in."""
        return self._logs[-1].parent if self._logs else None

    def say(self, message: str) -> None:
        """One line."""
        if self.quiet:
            return
        self._write(Text(printable(message)), message)

    def warn(self, message: str, *, always: bool = False) -> None:
        """One line, marked; `always` for what this process alone has met."""
        if self.quiet and not always:
            return
        self._write(Text.assemble(("warning: ", "yellow"), printable(message)), f"warning: {message}")

    def error(self, error: ThreePartError) -> None:
        """The three parts of an error; the last one may have several lines."""
        what, got, do = printable(error.what), printable(error.got), printable(error.do)
        others = "".join(f"\n       Also wrong: {printable(other)}" for other in error.others)
        text = Text.assemble(("error: ", "bold red"), (what, "bold"), f": {got}.\n       {do}{others}")
        self._write(text, f"error: {what}: {got}. {' '.join(do.split())}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table among the talk."""
        if self.quiet:
            return
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
        if self._in_progress or self.quiet:
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
    write_stdout(json.dumps(document, indent=2, default=str, allow_nan=False) + "\n")


def write_stdout(text: str) -> None:
    """Text as it is, on stdout."""
    stdout = _Stream("stdout")
    stdout.write(text)
    stdout.flush()


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, losing: Sequence[int] = ()
) -> None:
    """A table on stdout; rows numbered in `losing` are marked red. Cells are shown literally."""
    _print_table(_console(_Stream("stdout")), _table(title, columns, rows, losing))


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
    console = _console(_Stream("stdout"), soft_wrap=True)
    for line in lines:
        console.print(Text(printable(line)))
