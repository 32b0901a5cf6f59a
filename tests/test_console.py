"""Talk and tables: nothing from outside is taken for markup, logs stay short, the second signal ends at once."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest

from sparsevit_cli import console
from sparsevit_cli.console import ConsoleReporter, print_json, print_lines, print_table, printable
from sparsevit_cli.errors import CheckpointError, ConfigError, StoppedError
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.stopping import stop_on_signals
from sparsevit_cli.winner import parse_ratios, read_winner, write_winner

HOSTILE = ["[red]x[/red]", "[/x]", "[link=file:///etc]y[/link]", "a\x1b[31mb", "{{7*7}}", "\u202egnp.exe"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_is_literal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    reporter = ConsoleReporter(stream=stream)
    reporter.say(text)
    reporter.warn(text)
    reporter.error(ConfigError(text, text, text))
    reporter.table(text, [text], [[text]])
    with reporter.progress(text, 1) as bar:
        bar.advance(1, loss=text)
    print_table(text, [text], [[text]])
    print_lines(text)
    told = stream.getvalue() + capsys.readouterr().out
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert told.count(printable(text)) >= 8


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x0bb", "a\x85b", "a\u2028b", "a\tb", "a\x00b", "caf\udce9"])
def test_a_name_makes_no_line_of_its_own(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    reporter = ConsoleReporter(stream=stream)
    reporter.log_to(tmp_path / "log.txt")
    reporter.say(name)
    reporter.warn(name)
    reporter.error(ConfigError(name, name, name))  # two lines of its own
    print_lines(name)
    assert len(stream.getvalue().splitlines()) == 4
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert len(log.splitlines()) == 3
    assert capsys.readouterr().out == printable(name) + "\n"
    assert printable(name).isprintable()


def test_on_a_log_a_bar_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with ConsoleReporter(stream=stream).progress("work", 1000) as bar:
        for _ in range(1000):
            now[0] += 0.1
            bar.advance(1, loss=1)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4  # at 30, 60 and 90 s, and the end
    assert "300/1000" in lines[0]
    assert "70 s left" in lines[0]
    assert lines[-1] == "work: 1000/1000 in 100 s"


def test_a_terminal_bar_and_its_inner_one() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    reporter = ConsoleReporter(stream=stream)
    with reporter.progress("outer", 2) as outer, reporter.progress("inner", 5) as inner:
        inner.advance(5, loss="[red]")
        outer.advance(2, loss="[/x]")
    assert "2/2" in stream.getvalue()
    assert "inner" not in stream.getvalue()


def test_the_log_of_run_holds_what_its_steps_say(tmp_path: Path) -> None:
    reporter = ConsoleReporter(stream=io.StringIO())
    for name in ("run", "pretrain", "adapt"):
        reporter.log_to(tmp_path / f"{name}.txt")
        reporter.say(f"now {name}")
    assert (tmp_path / "run.txt").read_text().count("now") == 3
    assert (tmp_path / "pretrain.txt").read_text().count("now") == 1


def test_what_was_said_before_there_was_a_log_is_in_the_first_one(tmp_path: Path) -> None:
    reporter = ConsoleReporter(stream=io.StringIO())
    reporter.warn("two files ignored")
    for name in ("pretrain", "adapt"):
        reporter.log_to(tmp_path / f"{name}.txt")
    reporter.say("begins")
    assert "two files ignored" in (tmp_path / "pretrain.txt").read_text().splitlines()[0]
    assert (tmp_path / "pretrain.txt").read_text().count("\n") == 2
    assert "ignored" not in (tmp_path / "adapt.txt").read_text()


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"path": Path("a"), "ratios": ((0.5,), (0.0,))})
    assert json.loads(capsys.readouterr().out) == {"path": "a", "ratios": [[0.5], [0.0]]}
    with pytest.raises(ValueError, match="JSON"):
        print_json({"loss": float("nan")})


def test_signals_ask_first_and_then_end() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        stop.check("work", "saved")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(StoppedError, match="SIGTERM arrived; saved") as stopped:
            stop.check("work", "saved")
        assert stopped.value.exit_code == 75
        with pytest.raises(StoppedError, match="at once"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.error("work", "saved").exit_code == 130


def test_ratios_as_typed(tmp_path: Path) -> None:
    depths = (2, 2, 6, 2)
    published = SparsityConfig(((6,), (0,), (2, 4, 5), (0,)))
    path = tmp_path / "winner.yaml"
    write_winner(path, published, {"search_top1": 90.0, "budget": {"latency_ms": 5.0}})
    assert read_winner(path) == (published, {"ratios": [[0.6], [0.0], [0.2, 0.4, 0.5], [0.0]],
                                             "search_top1": 90.0, "budget": {"latency_ms": 5.0}})  # fmt: skip
    assert parse_ratios(str(path), depths) == published
    assert parse_ratios("[[.6],[0],[.2,.4,.5],[0]]", depths) == published
    assert parse_ratios("0.6", depths) == SparsityConfig.from_ratios(0.6, depths)
    assert parse_ratios("0", depths).is_dense
    for wrong in ("1", "1e308", "0.65", "no", "[[.6]]", "{a: 1}", "gone.yaml", "", "[[.6],[0],[.5,.4,.2],[0]]"):
        with pytest.raises(ConfigError) as error:
            parse_ratios(wrong, depths)
        assert error.value.exit_code == 2
    for damaged in ("", "ratios: [[.6]", "other: 1", "ratios: [[9]]"):
        path.write_text(damaged)
        with pytest.raises(CheckpointError):
            read_winner(path)
