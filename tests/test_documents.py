"""Documents of ours that somebody, or a disk, has changed: every reader tells so, none ends in another error."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevit_cli.checkpoints import best_checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from sparsevit_cli.documents import read_json
from sparsevit_cli.errors import CheckpointError, StoppedError
from sparsevit_cli.exporting import load_exported, load_sparsity
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.search.latency_table import LatencyTable, _checksum
from sparsevit_cli.search.ledger import LatencyRecord, Ledger, LedgerScope
from sparsevit_cli.search.ledger import _checksum as row_checksum
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.training import _Run
from sparsevit_cli.weights import read_weights
from sparsevit_cli.winner import read_winner
from sparsevit_cli.workflows.smaller import _kept_size
from sparsevit_cli.workflows.weights import file_weights
from test_training import StopAt, job, run

RATIOS = [[0.3], [0.5]]
TABLE = {"base_ms": 1.0, "pair_ms": [[[2.0, 1.0]], [[2.0, 1.0]]], "overhead_ms": [0.1, 0.1], "identity": {"b": 1}}
SPARSITY = {
    "format": 1, "ratios": RATIOS, "depths": [2, 2], "importance": "l2", "img_size": [32, 32],
    "windows": [[2, 2], [2, 2]],
    "model": {"name": "swin_tiny_patch4_window7_224", "args": {"depths": [2, 2]}, "class_names": ["a"], "mean": [0.5],
              "std": [0.5]}, "versions": {"torch": "2"},
}  # fmt: skip
RESULT = {
    "top1": 50.0, "seed": 0, "checkpoint": "checkpoints", "class_names": ["a"], "data_fingerprint": "f",
    "check": {"dense": {"top1": 1.0, "gmacs": 2.0}}, "files": {"sparsity.json": "0" * 64},
}  # fmt: skip


def result_of(path: Path) -> object:
    folder = RunFolder(path.parent, "adapt")
    assert folder.done("sparsity.json") == {}  # never done, and no error
    return folder.read_result()


def table_of(path: Path) -> object:
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(path.read_bytes())
        if isinstance(document, dict) and "table" in document:  # whoever changes it by hand makes the sum right as well
            path.write_text(json.dumps({**document, "sha256": _checksum(document["table"])}))
    return LatencyTable.from_json(path.read_bytes(), str(path)).max_tenths


def exported_of(path: Path) -> object:
    (path.parent / "model.safetensors").write_bytes(b"")
    if not path.is_file():
        return load_sparsity(path.parent)
    empty = hashlib.sha256(b"").hexdigest()
    files = {"model.safetensors": empty, "sparsity.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest = {"files": {name: {"sha256": digest} for name, digest in files.items()}}
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    return load_exported(path.parent)


def manifest_of(path: Path) -> object:
    for name in ("model.safetensors", "sparsity.json"):
        (path.parent / name).write_bytes(b"")
    return load_exported(path.parent)


def size_of(path: Path) -> object:
    return _kept_size(RunFolder(path.parent, "rival"), SparsityConfig.from_ratios(RATIOS))


READERS: dict[str, tuple[object, Callable[[Path], object]]] = {
    "metrics.json": (RESULT, result_of),
    "sparsity.json": (SPARSITY, load_sparsity),
    "winner.yaml": ({"ratios": RATIOS, "checkpoint_sha256": "x"}, read_winner),
    "latency_table.json": ({"format": 1, "sha256": "", "table": TABLE}, table_of),
    "exported/sparsity.json": (SPARSITY, exported_of),
    "exported/manifest.json": ({"files": {"model.safetensors": {"sha256": "0"}, "sparsity.json": {}}}, manifest_of),
    "size.json": ({"img_size": [16, 16], "winner": "[[0.3], [0.5]]"}, size_of),
    "checkpoint/MANIFEST.json": ({"format": 1, "step": 1, "files": {"state.json": {"bytes": 1, "sha256": "x"}}},
                                 lambda path: load_checkpoint(path.parent)),
}  # fmt: skip
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, "9" * 5000])
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("0"), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed(draw: Any, document: Any) -> Any:
    """The document with a part of it replaced or left out; sometimes all of it."""
    document = copy.deepcopy(document)
    holder, key, here = None, None, document
    while isinstance(here, (dict, list)) and here and draw(st.integers(0, 3)):
        holder = here
        key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        here = here[key]
    if holder is None:
        return draw(anything)
    if draw(st.booleans()):
        holder[key] = draw(anything)
    else:
        del holder[key]
    return document


RAW = (b"", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 100_000, b'{"ratios": NaN}', b"{}", b"[]", b"null", b"\0" * 100,
       b'{"a": 1' + b"0" * 5000 + b"}", "é".encode("latin-1"), b'{"\\ud800": "\\udfff"}', b"1e999")  # fmt: skip


def told(reader: Callable[[Path], object], path: Path) -> None:
    """Read it, or be told by an error that names the file."""
    error = failure(lambda: reader(path))
    assert error is None or (error.exit_code, str(path.parent) in str(error)) == (4, True)


def failure(read: Callable[[], object]) -> CheckpointError | None:
    """The error that says what is wrong; any other one ends the test."""
    try:
        read()
    except CheckpointError as error:
        return error
    return None


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=60)
def test_changed_documents_are_told(name: str, data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    document, reader = READERS[name]
    path = tmp_path_factory.getbasetemp() / "changed" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data.draw(changed(document))))
    told(reader, path)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_document_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = READERS[name][1]
    for number, raw in enumerate(RAW):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(raw)
        told(reader, path)
    if name == "latency_table.json":
        return  # its file is read elsewhere
    path.unlink()
    path.mkdir()
    told(reader, path)
    path.rmdir()
    told(reader, path)
    path.write_text("{}")

    def forbidden(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for where, function in ((Path, "open"), (Path, "read_bytes"), (Path, "read_text")):
        monkeypatch.setattr(where, function, forbidden)
    told(lambda path: reader(path) if "exported" not in name else load_exported(path.parent), path)


# -- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A training that was stopped after a few steps, and its checkpoint."""
    folder = tmp_path_factory.mktemp("handmade")
    stop = StopAt(job(folder, mixup=0.0), 2)
    with pytest.raises(StoppedError):
        run(stop.job, stop)
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    return job(folder, mixup=0.0), newest


def write_state(folder: Path, state: object, tensors: dict[str, dict[str, torch.Tensor]] | None = None) -> None:
    """Change a checkpoint by hand, with all hashes right."""
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    contents = {"state.json": json.dumps(state).encode()}
    contents |= {f"{name}.safetensors": safetensors.torch.save(named) for name, named in (tensors or {}).items()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def resumed(training: Any) -> None:
    """Take the checkpoint over and make a step with it, as a training would."""
    attempt = _Run(training, SilentReporter())
    attempt.resume()
    attempt.is_best() if attempt.history else None
    for parameter in attempt.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    attempt.optimizer.step()
    attempt.scaler.update() if attempt.scaler.is_enabled() else None


@given(data=st.data())
@settings(max_examples=120)
def test_handmade_states_are_told(data: Any, saved_run: tuple[Any, Path]) -> None:
    training, folder = saved_run
    original = (folder / "state.json").read_bytes()
    state = json.loads(original)
    state.pop("settings", None)
    try:
        part = data.draw(st.sampled_from(sorted(state)))
        write_state(folder, {**state, part: data.draw(changed(state[part]))})
        for reader in (lambda: resumed(training), lambda: file_weights(folder)):
            failure(reader)
    finally:
        write_state(folder, json.loads(original))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["optimizer"].update(
            {name: x[..., :1].contiguous() for name, x in t["optimizer"].items() if x.ndim}
        ),
        lambda t: t["optimizer"].update({name: torch.ones(3) for name in t["optimizer"] if name.endswith("step")}),
        lambda t: t["optimizer"].clear(),
        lambda t: t["model"].clear(),
        lambda t: t["ema"].update(extra=torch.ones(1)),
        lambda t: t["model"].update({name: x[:1] for name, x in t["model"].items()}),
    ],
)
def test_handmade_tensors_are_told(change: Callable[[Any], Any], tmp_path: Path) -> None:
    stop = StopAt(job(tmp_path, mixup=0.0), 1)
    with pytest.raises(StoppedError):
        run(stop.job, stop)
    folder = latest_checkpoint(tmp_path / "checkpoints")
    assert folder is not None
    found = load_checkpoint(folder)
    change(found.tensors)
    write_state(folder, found.state, found.tensors)
    with pytest.raises(CheckpointError) as error:
        resumed(job(tmp_path, mixup=0.0))
    assert folder.name in str(error.value)


def test_paths_that_cannot_be_reached_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), Path("x" * 5000), tmp_path / "a" / "b"):
        for reader in (load_checkpoint, read_weights, file_weights, load_exported):
            with pytest.raises(CheckpointError):
                reader(path)  # type: ignore[operator]
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(1)}}, {})
    for pointer in ("latest", "best"):
        (tmp_path / pointer).unlink(missing_ok=True)
        (tmp_path / pointer).mkdir()
        with pytest.raises(CheckpointError, match=pointer):
            latest_checkpoint(tmp_path) if pointer == "latest" else best_checkpoint(tmp_path)
        (tmp_path / pointer).rmdir()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "loop")


# -- identity ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_told_by_every_difference(tmp_path: Path) -> None:
    from dataclasses import replace

    training = job(tmp_path, mixup=0.0)
    identity = {"data": "a" * 64, "class_names": ["a"], "start": "scratch", "data_settings": "1" * 64}
    training = replace(training, identity=identity, settings={"train.lr": 0.1, "data.crop_pct": 0.9})
    stop = StopAt(training, 1)
    with pytest.raises(StoppedError):
        run(stop.job, stop)
    resumed(training)
    resumed(replace(training, identity={**identity, "data_settings": "1" * 64}))
    other = replace(
        training, seed=1, identity={**identity, "data": "b" * 64, "data_settings": "2" * 64},
        settings={"train.lr": 0.2, "data.crop_pct": 0.9},
    )  # fmt: skip
    with pytest.raises(CheckpointError) as error:
        resumed(other)
    for words in (
        "another seed (0, now 1)",
        "data ('aaa",
        "now 'bbb",
        "data settings ('111",
        "train.lr (0.1, now 0.2)",
    ):
        assert words in str(error.value)
    assert "crop_pct" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"another seed \(0, now 1\)\. "):
        resumed(replace(training, seed=1))
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    state = load_checkpoint(newest).state
    del state["identity"]["data_settings"], state["settings"]  # as an earlier version saved it
    write_state(newest, state)
    resumed(training)


# -- ledgers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["text", "", b"\xff", None, "[[3]]", -1, float("inf"), 10**15])
@pytest.mark.parametrize("column", ["metric", "seconds", "candidate", "latency_ms", "low_ms", "pid"])
def test_rows_with_something_else_are_told(column: str, value: Any, tmp_path: Path) -> None:
    config, path, scope = SparsityConfig.from_ratios(RATIOS), tmp_path / "l.sqlite", LedgerScope("c", "d", "s")
    with Ledger.open(path, scope) as ledger:
        ledger.put(config, 50.0, 1.0)
        ledger.put_latency({"a": 1}, config, LatencyRecord(1.0, 0.5, 2.0))
    table = {"metric": "evaluations", "seconds": "evaluations", "candidate": "evaluations", "pid": "leader"}
    name = table.get(column, "latencies")
    with sqlite3.connect(path) as database:
        if name == "leader":
            database.execute("INSERT INTO leader VALUES (1, 'host', 5)")
        try:
            database.execute(f"UPDATE {name} SET {column} = ?", (value,))
        except sqlite3.IntegrityError:
            return  # SQLite itself refuses it
        if name != "leader":
            for *row, _ in database.execute(f"SELECT * FROM {name}").fetchall():
                database.execute(f"UPDATE {name} SET sha256 = ?", (row_checksum(tuple(row)),))
    database.close()

    def read() -> None:
        with Ledger.open(path, scope) as ledger:
            ledger.get(config)
            ledger.known()
            ledger.get_latency({"a": 1}, config)

    error = failure(read)
    assert error is None or str(path) in str(error)
    if column != "pid" and not isinstance(value, (int, float)):
        assert error is not None or (column, value) == ("candidate", "[[3]]")


def test_a_pipe_in_place_of_a_document_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "metrics.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_json(pipe)
    os.mkfifo(winner := tmp_path / "winner.yaml")
    with pytest.raises(CheckpointError, match="no file"):
        read_winner(winner)
