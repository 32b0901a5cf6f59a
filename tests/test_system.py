"""The surroundings: signals and full memory, odd names, odd streams, odd file systems, and what nobody foresaw."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from sparsevit_cli import atomic, cli, torch_files
from sparsevit_cli.checkpoints import load_checkpoint, save_checkpoint
from sparsevit_cli.config import loading
from sparsevit_cli.config.classification import AugmentSection, FolderData
from sparsevit_cli.console import ConsoleReporter, print_json, print_lines, print_table
from sparsevit_cli.data.images import decode_image
from sparsevit_cli.data.loader import train_batches
from sparsevit_cli.data.source import BadImages, Categories, Source
from sparsevit_cli.errors import CheckpointError, ConfigError, ResourceError, StoppedError
from sparsevit_cli.exporting.programs import trace
from sparsevit_cli.models import build_model
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runs import RunFolder, RunLocks, open_run
from sparsevit_cli.search import Ledger, LedgerScope
from sparsevit_cli.sparsity import SearchSpace
from sparsevit_cli.stopping import stop_on_signals
from sparsevit_cli.tasks.classification import Classification
from sparsevit_cli.tasks.classification.timm_source import TimmRecords
from sparsevit_cli.tasks.classification.transforms import TransformSpec
from sparsevit_cli.weights import read_weights
from sparsevit_cli.winner import parse_ratios, write_winner
from sparsevit_cli.workflows.latencies import MeasuredLatencies
from sparsevit_cli.workflows.latency_sources import TorchSource
from sparsevit_cli.workflows.plots import plot_training
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.weights import chosen_weights
from tiny import tiny_config, write_tiny

Act = Callable[[], object]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="sparsevit")


# -- signals and full memory inside other libraries -------------------------------------------------------------


class Reading(io.BytesIO):
    """A picture whose third reading does something: in the middle of Pillow's work."""

    def __init__(self, act: Act) -> None:
        picture = io.BytesIO()
        Image.effect_noise((64, 64), 50).save(picture, "PNG")
        super().__init__(picture.getvalue())
        self.act, self.count = act, 0

    def read(self, size: int | None = -1) -> bytes:
        self.count += 1
        if self.count == 3:
            self.act()
        return super().read(size)


def does(act: Act) -> Callable[..., Any]:
    return lambda *args, **kwargs: act()


def _exif(patch: pytest.MonkeyPatch, folder: Path, act: Act) -> object:
    patch.setattr(Image.Image, "getexif", does(act))
    return decode_image(Reading(lambda: None), "cat.png", 64)


def _policy(patch: pytest.MonkeyPatch, folder: Path, act: Act) -> object:
    patch.setattr(TransformSpec, "build", does(act))
    data = FolderData(root="x", augment=AugmentSection(auto_augment="rand-m9"))
    return TransformSpec.from_config(data, 32, 3)


def _model(patch: pytest.MonkeyPatch, folder: Path, act: Act) -> object:
    patch.setattr(timm, "create_model", does(act))
    return build_model(tiny_config().model, 10)


def _safetensors(patch: pytest.MonkeyPatch, folder: Path, act: Act) -> object:
    (folder / "w.safetensors").touch()
    patch.setattr(safetensors.torch, "load_file", does(act))
    return read_weights(folder / "w.safetensors")


def _pickle(patch: pytest.MonkeyPatch, folder: Path, act: Act) -> object:
    torch.save({"a": torch.zeros(1)}, folder / "w.pth")
    patch.setattr(torch_files, "_read_zip", does(act))
    return read_weights(folder / "w.pth")


def _checkpoint(patch: pytest.MonkeyPatch, folder: Path, act: Act) -> object:
    saved = save_checkpoint(folder / "c", 1, {"model": {"a": torch.zeros(1)}}, {})
    patch.setattr(safetensors.torch, "load", does(act))
    return load_checkpoint(saved)


def _trace(patch: pytest.MonkeyPatch, folder: Path, act: Act) -> object:
    patch.setattr(torch.export, "export", does(act))
    return trace(torch.nn.Identity(), (3, 8, 8), (1,))


def _disk(patch: pytest.MonkeyPatch, folder: Path, act: Act) -> object:
    with atomic.disk_errors(folder, 1):
        return act()


TIMM: dict[str, Any] = {
    "split": "train", "origin": "o", "class_names": ("a",), "labels": np.zeros(1, int), "keys": ("x",), "sizes": None,
    "files": np.zeros((0, 3), np.uint64), "version": "", "max_megapixels": 64.0,
}  # fmt: skip
PLACES: dict[str, Callable[[pytest.MonkeyPatch, Path, Act], object]] = {
    "pillow": lambda patch, folder, act: decode_image(Reading(act), "cat.png", 64),
    "timm data": lambda patch, folder, act: TimmRecords(**TIMM, open_image=does(act)).load(0),  # type: ignore[arg-type]
    "exif": _exif, "policy": _policy, "model": _model, "safetensors": _safetensors, "pickle": _pickle,
    "checkpoint": _checkpoint, "trace": _trace, "disk": _disk,
}  # fmt: skip


def twice() -> None:
    """Ctrl-C, and again."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def told_otherwise() -> None:
    """A library that tells every failure as its own."""
    try:
        twice()
    except BaseException as error:
        raise OSError("broken data stream") from error


@pytest.mark.parametrize("act", [twice, told_otherwise])
@pytest.mark.parametrize("place", PLACES)
def test_a_second_signal_is_never_taken_for_a_failure(
    place: str, act: Act, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stop_on_signals(), pytest.raises(StoppedError, match="at once") as stopped:
        PLACES[place](monkeypatch, tmp_path, act)
    assert stopped.value.exit_code == 130


MEMORY = [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    OSError("out of memory error when reading image file"),
]  # fmt: skip


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: f"{type(error).__name__} {error}"[:30])
@pytest.mark.parametrize("place", PLACES)
def test_full_memory_is_never_taken_for_a_bad_file(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act() -> NoReturn:
        raise error

    with pytest.raises(type(error)) as raised:
        PLACES[place](monkeypatch, tmp_path, act)
    assert raised.value is error


class Pictures(Source):
    """A source of which one picture does something while it is decoded."""

    image_size = (4, 4)
    bad_images = None

    def __init__(self, act: Act, at: int) -> None:
        self.act, self.at = act, at
        self.bad_images = BadImages(20, 0.5)  # type: ignore[assignment]

    def resized(self, size: object) -> Pictures:
        return self

    def fingerprint(self) -> str:
        return "pictures"

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        decode_image(Reading(self.act if index == self.at else lambda: None), f"{index}.png", 64)
        return torch.zeros(3, 4, 4), 0

    def set_epoch(self, epoch: int) -> None:
        pass


def test_a_second_signal_while_an_image_is_decoded_puts_no_other_image_in_its_place() -> None:
    source: Any = Pictures(twice, at=7)
    with stop_on_signals(), pytest.raises(StoppedError):
        list(train_batches(source, batch_size=4, seed=0, epoch=0))


def test_a_second_signal_that_a_library_swallowed_is_raised_at_the_next_look() -> None:
    def swallowed() -> None:
        try:
            twice()
        except BaseException:
            return

    with stop_on_signals() as stop:
        source: Any = Pictures(swallowed, at=7)
        list(train_batches(source, batch_size=4, seed=0, epoch=0))
        with pytest.raises(StoppedError, match="at once"):
            _ = stop.requested
        with pytest.raises(StoppedError, match="at once"):
            stop.check("work", "saved")


def test_a_closed_terminal_saves_as_sigterm_does() -> None:
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # the shell and the kernel both tell
            assert stop.requested
            assert stop.error("work", "saved").exit_code == 75
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
@pytest.mark.parametrize("place", ["config.loading.load_config", "profiling.memory.reuse_freed_memory"])
def test_a_signal_while_torch_loads_ends_before_anything_begins(
    number: signal.Signals, code: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_tiny(tmp_path)
    before = signal.signal(number, lambda *_: None)

    def killed(*_: object, **__: object) -> Any:
        os.kill(os.getpid(), number)
        return tiny_config()

    monkeypatch.setattr(f"sparsevit_cli.{place}", killed)
    try:
        done = invoke("pretrain", "--config", config)
    finally:
        signal.signal(number, before)
    assert done.exit_code == code, done.output
    assert "nothing was begun" in done.stderr
    assert not (tmp_path / "runs").exists()


# -- the table of errors, and the last resort -------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fails(*_: object, **__: object) -> NoReturn:
        raise error

    return fails


FORESEEN: list[tuple[BaseException, int]] = [
    (PermissionError(errno.EACCES, "Permission denied", "/home/other/x"), 2),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), 2),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2),
    (OSError(errno.ELOOP, "Too many levels of symbolic links", "x"), 2),
    (OSError(errno.EROFS, "Read-only file system", b"\xe9"), 2),
    (OSError(errno.EMFILE, "Too many open files"), 7),
    (OSError(errno.EIO, "Input/output error", "x"), 7),
    (OSError(errno.ENOSPC, "No space left on device"), 7),
    *((error, 7) for error in MEMORY),
    (KeyboardInterrupt(), 130),
    (StoppedError("a", "SIGTERM arrived", "b", interrupted=False), 75),
]


@pytest.mark.parametrize(("error", "code"), FORESEEN, ids=lambda value: str(value)[:40])
def test_every_known_error_has_its_exit_code(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_config", raising(error))
    done = invoke("config")
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr


UNFORESEEN = [
    KeyError("head"), ValueError("a\nb\nc"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), AssertionError(),
    OSError("no number"), RuntimeError("x" * 5000), RecursionError(), TypeError("\udce9 \x1b[31m"), ZeroDivisionError(),
]  # fmt: skip


@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_the_last_resort_tells_one_line_and_keeps_the_traceback(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(loading, "load_config", raising(error))
    done = invoke("config")
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"error: unexpected {type(error).__name__}: ")
    assert len(lines) == 2
    assert len(lines[0]) < 400
    (kept,) = tmp_path.glob("traceback-*.txt")
    assert str(kept) in done.stderr
    assert "report" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in kept.read_text(encoding="utf-8")


def test_inside_a_run_the_traceback_lies_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fails(session: Session) -> None:
        session.folder("pretrain")
        raise KeyError("x")

    monkeypatch.setattr("sparsevit_cli.workflows.training.pretrain", fails)
    done = invoke("pretrain", "--config", write_tiny(tmp_path))
    assert done.exit_code == 1
    (kept,) = (tmp_path / "runs" / "tiny" / "pretrain").glob("traceback-*.txt")
    assert "KeyError" in kept.read_text()
    assert "unexpected KeyError" in (tmp_path / "runs" / "tiny" / "pretrain" / "log.txt").read_text()


def test_where_no_traceback_can_be_kept_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkstemp", raising(OSError(errno.ENOSPC, "No space left on device")))
    monkeypatch.setattr(loading, "load_config", raising(KeyError("x")))
    done = invoke("config")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr


def test_what_escapes_the_commands_themselves_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "app", raising(ImportError("libtorch_cpu.so: cannot open shared object file")))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "unexpected ImportError" in capsys.readouterr().err


DAMAGED: list[bytes] = [
    b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"", b"{", b"{}", b'{"class_names": ["a"]}', b"\0" * 99,
]  # fmt: skip


@pytest.mark.parametrize("content", [*DAMAGED, None], ids=lambda content: repr(content)[:20])
def test_a_damaged_result_of_ours_is_told(content: bytes | None, tmp_path: Path) -> None:
    session = Session(tiny_config(output=str(tmp_path)), SilentReporter())
    result = session.earlier("pretrain").result
    result.parent.mkdir(parents=True)
    if content is None:
        result.mkdir()
    else:
        result.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pretrain/(metrics\.json|checkpoints)"):
        chosen_weights(session, "pretrain", "test")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, None], ids=["bytes", "deep", "folder"])
def test_a_damaged_latency_table_is_told(content: bytes | None, tmp_path: Path) -> None:
    session = Session(tiny_config(output=str(tmp_path)), SilentReporter())
    model = session.model(["a", "b"])
    path = tmp_path / "latency_table.json"
    path.mkdir() if content is None else path.write_bytes(content)
    folder, space = RunFolder(tmp_path, "search"), session.space(model, 0.8)
    latencies = MeasuredLatencies(session, TorchSource(session, model), space, folder=folder)
    with pytest.raises(CheckpointError, match="latency_table"):
        latencies._measured_table()


@pytest.mark.parametrize("change", ["metric = 'abc'", "metric = x'00ff'", "candidate = '[['", "seconds = 9e999"])
def test_a_ledger_row_made_by_hand_is_damage(change: str, tmp_path: Path) -> None:
    from sparsevit_cli.search.ledger import _checksum

    scope, config = LedgerScope("a", "b", "c"), SearchSpace((2, 2)).sample(Random(0))
    with Ledger.open(tmp_path / "l.sqlite", scope) as ledger:
        ledger.put(config, 1.0, 1.0)
    database = sqlite3.connect(tmp_path / "l.sqlite")
    database.execute(f"UPDATE evaluations SET {change}")
    ((*row, _),) = database.execute("SELECT * FROM evaluations")
    database.execute("UPDATE evaluations SET sha256 = ?", (_checksum(tuple(row)),))
    database.commit()
    database.close()
    with (
        pytest.raises(CheckpointError, match=r"l\.sqlite.*is not what it should be"),
        Ledger.open(tmp_path / "l.sqlite", scope) as ledger,
    ):
        ledger.known()


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " * 1000, "{a: " * 5000, "- " * 5000, "\x00", "a: &b [*b]"])
def test_deep_and_odd_yaml_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    assert invoke("config", "--config", tmp_path / "odd.yaml").exit_code == 2


# -- text that is not UTF-8 -------------------------------------------------------------------------------------

LATIN1 = "caf\udce9"
"""`café` in Latin-1, as Python hands it over from a command line or a folder."""


@pytest.mark.parametrize(
    ("command", "flag", "code"),
    [
        ("config", "--config", 2), ("config", "--set", 2), ("evaluate", "--weights", 2), ("profile", "--ratios", 2),
        ("profile", "--output", 2), ("profile", "--model", 2), ("profile", "--img-size", 2), ("profile", "--device", 2),
        ("search", "--budget-macs", 2), ("search", "--budget-latency", 2), ("profile", "--seed", 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("text", [LATIN1, f"{LATIN1}/x.yaml", f"experiment={LATIN1}", f"~{LATIN1}/x"])
def test_a_byte_that_is_no_utf8_in_a_flag_is_told(
    command: str, flag: str, code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sparsevit", command, flag, text])
    arguments = ["--config", write_tiny(tmp_path)] if flag != "--config" else []
    done = invoke(command, *arguments, flag, text)
    assert done.exit_code == code, done.output
    assert "error:" in done.stderr.lower() or flag == "--seed", "typer tells of a seed that is no number"
    assert "unexpected" not in done.stderr


def test_a_config_whose_name_is_no_utf8_is_read_and_its_run_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_tiny(tmp_path).rename(tmp_path / f"{LATIN1}.yaml")
    monkeypatch.chdir(tmp_path)
    assert invoke("config", "--config", config).exit_code == 0
    argv = ["sparsevit", "pretrain", "--config", str(config)]
    folder = opened(tmp_path / "runs", argv=argv)
    assert "caf" in (folder.path / "command.txt").read_text(encoding="utf-8")
    folder.write_result({"weights": LATIN1})
    assert folder.read_result() == {"schema_version": 2, "command": "pretrain", "weights": LATIN1, "files": {}}


def opened(output: Path, *, argv: list[str] | None = None, fresh: bool = False) -> RunFolder:
    locks = RunLocks()
    try:
        return open_run(
            tiny_config(output=str(output)), "pretrain", argv=argv or [], environment={}, fresh=fresh,
            reporter=SilentReporter(), locks=locks,
        )  # fmt: skip
    finally:
        locks.close()


class Broken(io.RawIOBase):
    """A stream whose every write fails."""

    def __init__(self, number: int) -> None:
        self.number = number

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(self.number, os.strerror(self.number))


def broken(number: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(Broken(number)), encoding="utf-8")


def tell_everything(text: str) -> None:
    print_json({"text": text})
    print_lines(text)
    print_table(text, [text], [[text]])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize("text", ["plain", "é → 漢 \N{PILE OF POO}", LATIN1])
def test_no_character_costs_a_result(encoding: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    tell_everything(text)
    reporter = ConsoleReporter()
    reporter.say(text)
    with reporter.progress(text, 1) as bar:
        bar.advance(1, loss=text)
    reporter.table(text, [text], [[text]])
    reporter.error(ConfigError(text, text, text))
    for stream in (out, err):
        stream.flush()
        stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.EBADF])
def test_readers_that_went_away_cost_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", broken(number))
    monkeypatch.setattr(sys, "stderr", broken(number))
    tell_everything("x")
    reporter = ConsoleReporter()
    reporter.say("x" * 100_000)
    reporter.table("x", ["x"], [["x"]])
    monkeypatch.undo()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_closed_streams_cost_nothing(stream: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        closed = io.TextIOWrapper(io.BytesIO())
        closed.close()
        monkeypatch.setattr(sys, name, closed if stream else None)
    tell_everything("x")
    ConsoleReporter().say("x")
    monkeypatch.undo()


def test_a_full_disk_under_stdout_is_told_and_under_stderr_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", broken(errno.ENOSPC))
    with pytest.raises(ResourceError, match="stdout"):
        print_json({})
    monkeypatch.setattr(sys, "stderr", broken(errno.ENOSPC))
    ConsoleReporter().say("x")
    monkeypatch.undo()


SHELL = f"{sys.executable} -m sparsevit_cli.cli"


@pytest.mark.parametrize(
    ("typed", "code", "told"),
    [
        (f"{SHELL} config >&-", 0, ""),
        (f"{SHELL} config >&- 2>&-", 0, ""),
        (f"set -o pipefail; {SHELL} config | true", 0, ""),
        (f"{SHELL} config >/dev/full", 7, "stdout"),
        (f"PYTHONIOENCODING=ascii {SHELL} config --set seed=é", 2, "seed"),
    ],
)
def test_commands_with_streams_that_are_gone(typed: str, code: int, told: str, tmp_path: Path) -> None:
    done = subprocess.run(["bash", "-c", typed], cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert told.encode() in done.stderr
    assert bool(told) == bool(done.stderr)


def test_a_line_break_in_a_name_makes_no_line_of_its_own(tmp_path: Path) -> None:
    reporter = ConsoleReporter(stream=(stream := io.StringIO()))
    reporter.log_to(tmp_path / "log.txt")
    reporter.say("a\nerror: b")
    reporter.warn("a\nerror: b")
    reporter.error(ConfigError("a\nerror: b", "a\nerror: b", "do"))
    for told in (stream.getvalue(), (tmp_path / "log.txt").read_text()):
        assert not [line for line in told.splitlines() if line.startswith("error: b")]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


# -- paths ------------------------------------------------------------------------------------------------------

ODD_TEXT = st.one_of(
    st.text(max_size=400),
    st.text("a/.~\x00\n\udce9é", max_size=60),
    st.builds(lambda character, count: character * count, st.sampled_from("aé漢\n./"), st.integers(200, 6000)),
)


@given(st.sampled_from("x~"), ODD_TEXT, st.sampled_from(["", ".yaml", ".json"]))
def test_no_text_in_place_of_ratios_is_a_traceback(start: str, text: str, suffix: str) -> None:
    with pytest.raises((ConfigError, CheckpointError)):
        parse_ratios(f"{start}{text}{suffix}.", (2, 2))


@given(st.sampled_from(["/gone/", "~"]), ODD_TEXT, st.sampled_from(["", ".safetensors", ".pth"]))
def test_no_text_in_place_of_weights_is_a_traceback(start: str, text: str, suffix: str) -> None:
    session = Session(tiny_config(output="/gone"), SilentReporter())
    with pytest.raises((ConfigError, CheckpointError)):
        chosen_weights(session, f"{start}{text}{suffix}.", "test")


@given(ODD_TEXT)
def test_no_text_in_place_of_a_config_or_a_path_setting_is_a_traceback(text: str) -> None:
    for field in ("output", "data.root", "model.checkpoint"):
        try:
            config = loading.load_config(None, [f"{field}={json.dumps(text)}"])
            loading.load_config(None, [f"{field}={json.dumps(f'~{text}')}"])
        except ConfigError:
            continue
        name, _, inner = field.partition(".")
        value = getattr(getattr(config, name), inner) if inner else getattr(config, name)
        assert value == text, "the setting is kept as it was written: hashes are made of it"
        assert max(map(len, os.fsencode(value).split(b"/"))) <= 255


@pytest.mark.parametrize("text", ["a" * 256, "a" * 300 + "/b", "b/" * 3000, "a\nb", "a\0b", "", " ", "~nobody-here/x"])
@pytest.mark.parametrize(
    ("command", "flag"),
    [("config", "--config"), ("profile", "--output"), ("evaluate", "--weights"), ("profile", "--ratios")],
)
def test_a_text_that_can_name_no_file_is_a_config_error(
    command: str, flag: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", write_tiny(tmp_path)] if flag != "--config" else []
    done = invoke(command, *arguments, flag, text)
    assert done.exit_code == 2, done.output
    assert "error:" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.yaml"] or flag == "--config"


@pytest.mark.parametrize("user", ["~", "~{user}"])
def test_the_home_folder_is_expanded_wherever_a_path_stands(
    user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pwd

    own = pwd.getpwuid(os.getuid())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(pwd, "getpwnam", lambda name: type(own)([*own[:5], str(tmp_path), own[6]]))
    home = user.format(user=own.pw_name)
    monkeypatch.chdir(tmp_path)
    write_winner(tmp_path / "winner.yaml", SearchSpace((2, 2)).uniform(0.5), {})
    assert parse_ratios(f"{home}/winner.yaml", (2, 2)) == SearchSpace((2, 2)).uniform(0.5)
    session = Session(tiny_config(output=f"{home}/runs"), SilentReporter())
    assert session.earlier("pretrain").path == tmp_path / "runs" / "tiny" / "pretrain"
    assert session.folder("pretrain").path == tmp_path / "runs" / "tiny" / "pretrain"
    session.locks.close()
    weights = session.model(Categories(("a", "b"))).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    found = chosen_weights(session, f"{home}/w.safetensors", "test")
    assert session.model(found.categories, found).state_dict().keys() == weights.keys()
    section = tiny_config(model={"checkpoint": f"{home}/w.safetensors"}).model
    assert torch.equal(build_model(section, 2).head.fc.weight, weights["head.fc.weight"])  # type: ignore[union-attr]
    write_tiny(tmp_path)
    assert invoke("config", "--config", f"{home}/tiny.yaml").exit_code == 0
    assert not (tmp_path / home).exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ELOOP])
def test_a_file_that_may_not_be_looked_at_is_told(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stat = tmp_path / "theirs.pth", Path.stat

    def refused(self: Path, **options: Any) -> os.stat_result:
        if self == path:
            raise OSError(number, os.strerror(number), str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refused)
    session = Session(tiny_config(output=str(tmp_path)), SilentReporter())
    with pytest.raises(ConfigError, match=os.strerror(number)):
        chosen_weights(session, str(path), "test")


# -- optional output --------------------------------------------------------------------------------------------

ROWS = [{"epoch": 1.0, "top1": 50.0, "height": 32, "width": 32, "train_loss": 1.0, "val_loss": 1.0}]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://gone", "nonsense"])
def test_a_foreign_backend_spoils_no_picture(backend: str, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.tasks.task import Metric
from sparsevit_cli.workflows.plots import plot_training
plot_training(Path("results.png"), {ROWS!r}, Metric("top1", "top-1"), reporter := SilentReporter())
assert not reporter.warnings, reporter.warnings
"""
    env = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), MemoryError(), ImportError("libpng"), ValueError("no fonts"), AssertionError(),
     ConfigError("a", "b", "c"), RecursionError()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("place", ["figure.Figure.subplots", "backends.backend_agg.FigureCanvasAgg.print_png"])
def test_a_picture_that_fails_is_one_warning(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"matplotlib.{place}", raising(error))
    plot_training(tmp_path / "results.png", ROWS, Classification.metric, reporter := SilentReporter())
    assert len(reporter.warnings) == 1
    assert "results.png is left out" in reporter.warnings[0]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_inside_a_picture_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.subplots", does(told_otherwise))
    with stop_on_signals(), pytest.raises(StoppedError):
        plot_training(tmp_path / "results.png", ROWS, Classification.metric, SilentReporter())


# -- file systems that are not ext4 -----------------------------------------------------------------------------

UNKNOWN = [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EBADF]


@pytest.fixture
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_warned", set(), raising=False)


def refusing(function: Callable[..., Any], number: int, *, folders_only: bool) -> Callable[..., Any]:
    def refused(subject: Any, *args: Any) -> Any:
        if not folders_only or os.path.isdir(subject):
            raise OSError(number, os.strerror(number))
        return function(subject, *args)

    return refused


@pytest.mark.usefixtures("fresh_warnings")
@pytest.mark.parametrize("number", UNKNOWN)
@pytest.mark.parametrize("call", ["fsync", "fsync of folders", "open of folders"])
def test_a_file_system_without_fsync_is_one_warning(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = call.split(maxsplit=1)[0]
    monkeypatch.setattr(os, name, refusing(getattr(os, name), number, folders_only="folders" in call))
    for step in (1, 2):
        atomic.write_atomic(tmp_path / "a", str(step))
        save_checkpoint(tmp_path / "c", step, {"model": {"a": torch.zeros(1)}}, {})
    monkeypatch.undo()
    assert (tmp_path / "a").read_text() == "2"
    assert load_checkpoint(tmp_path / "c").step == 2
    assert len([record for record in caplog.records if "power cut" in record.message]) == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_fsync_that_says_that_data_are_lost_is_an_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, number, folders_only=False))
    with pytest.raises((OSError, ResourceError)):
        atomic.write_atomic(tmp_path / "a", "x")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EACCES, errno.ENOSYS])
def test_a_file_system_that_takes_no_metadata_keeps_earlier_results(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("chmod", "utime", "setxattr", "chown"):
        monkeypatch.setattr(os, name, raising(OSError(number, os.strerror(number))))
    for copy in (True, False):
        (tmp_path / "metrics.json").write_text("{}")
        RunFolder(tmp_path, "profile", about={"metrics.json": "{}"}).set_aside(
            ["metrics.json"], SilentReporter(), copy=copy
        )
    assert (tmp_path / "earlier-002" / "metrics.json").exists()


def test_a_folder_that_cannot_be_renamed_is_copied_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = opened(tmp_path).path
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "x").write_text("x")
    monkeypatch.setattr(os, "rename", raising(OSError(errno.EXDEV, os.strerror(errno.EXDEV))))
    opened(tmp_path, fresh=True)
    assert (path.with_name("pretrain.old-001") / "checkpoints" / "x").read_text() == "x"
    assert not (path / "checkpoints").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_is_one_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", raising(OSError(number, os.strerror(number))))
    locks = RunLocks()
    for name in ("a", "b", "a"):
        locks.take(tmp_path / name)
    locks.close()
    assert len([record for record in caplog.records if "no locks" in record.message]) == 1
    leftover = tmp_path / "tiny" / "pretrain" / ".tmp-live"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    opened(tmp_path)
    assert leftover.exists(), "without a lock nobody knows that its writer is gone"


def test_a_file_system_that_does_not_say_how_full_it_is_takes_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))  # type: ignore[attr-defined]
    assert save_checkpoint(tmp_path, 1, {"model": {"a": torch.zeros(1)}}, {}).exists()
    monkeypatch.setattr(shutil, "disk_usage", raising(OSError(errno.ENOSYS, "no statvfs")))
    assert save_checkpoint(tmp_path, 2, {"model": {"a": torch.zeros(1)}}, {}).exists()


class NoInodes:
    f_files, f_favail, f_bavail, f_blocks, f_frsize = 100, 0, 10**9, 10**9, 4096
    f_bfree = 10**9


@pytest.mark.parametrize("place", ["mkdir", "open"])
def test_no_inodes_is_a_full_disk(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "statvfs", lambda path: NoInodes)
    monkeypatch.setattr(os, place, raising(full))
    with pytest.raises(ResourceError, match="inodes"):
        opened(tmp_path / "runs" if place == "mkdir" else tmp_path)
    monkeypatch.undo()


def test_bytes_that_are_free_are_not_what_ran_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(ResourceError, match="inodes, a quota"):
        atomic.write_atomic(tmp_path / "a", "x")


def test_no_inodes_for_a_ledger_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = sqlite3.OperationalError("unable to open database file")
    error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
    monkeypatch.setattr(os, "statvfs", lambda path: NoInodes)
    monkeypatch.setattr(sqlite3, "connect", raising(error))
    with pytest.raises(ResourceError):
        Ledger.open(tmp_path / "l.sqlite", LedgerScope("a", "b", "c"))


# -- leftovers --------------------------------------------------------------------------------------------------


def test_what_a_kill_left_is_cleared_by_the_next_command_there(tmp_path: Path) -> None:
    path = opened(tmp_path).path
    code = f"""
import os
from pathlib import Path
from sparsevit_cli.atomic import write_atomic
os.fsync = lambda descriptor: os.kill(os.getpid(), 9)
write_atomic(Path({str(path)!r}) / "a", "x")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    (path / "checkpoints" / ".tmp-step-abc").mkdir(parents=True)
    (path / "checkpoints" / ".tmp-step-abc" / "x").touch()
    (path / "checkpoints" / ".tmp-123").touch()
    (path / ".tmp-link").symlink_to(tmp_path)
    assert len(list(path.rglob(".tmp-*"))) == 4
    holder = RunLocks()
    holder.take(path)
    with pytest.raises(CheckpointError, match="another process"):
        opened(tmp_path)
    assert len(list(path.rglob(".tmp-*"))) == 4, "they belong to the one who works there"
    holder.close()
    opened(tmp_path)
    assert not list(path.rglob(".tmp-*"))
    assert (path / "config.yaml").exists()
