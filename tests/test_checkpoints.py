"""Checkpoints survive kills, damage and full disks (reliability.md, T01, T02, T05, T06)."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import nn

from sparsevit_cli import atomic, checkpoints
from sparsevit_cli.checkpoints import (
    FAILPOINTS,
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from sparsevit_cli.errors import CheckpointError, ConfigError, ResourceError

FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "MANIFEST.json")


def save(root: Path, step: int, **options: object) -> Path:
    value = torch.full((7, 5), float(step))
    files = {"model": {"w": value}, "optimizer": {"m": value + 1}, "ema": {"w": value + 2}}
    return save_checkpoint(root, step, files, {"epoch": step / 10, "classes": ["a", "b"]}, **options)  # type: ignore[arg-type]


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def child(mode: str, root: Path, count: int) -> str:
    command = [sys.executable, str(Path(__file__).with_name("failpoint_child.py")), mode, str(root), str(count)]
    environment = {key: value for key, value in os.environ.items() if key != "SPARSEVIT_FAILPOINT"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- what comes back ----------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path, 120)
    assert folder == tmp_path / "step-00000120"
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert names(tmp_path) == {"step-00000120", "latest"}
    for path in (folder, tmp_path):
        saved = load_checkpoint(path)
        assert (saved.path, saved.step) == (folder, 120)
        assert saved.state == {"step": 120, "epoch": 12.0, "classes": ["a", "b"]}
        assert torch.equal(saved.tensors["ema"]["w"], torch.full((7, 5), 122.0))
    assert set(load_checkpoint(folder, only=["ema"]).tensors) == {"ema"}


def test_tensors_that_safetensors_refuses_are_stored_in_full(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "tied": base,
        "tied_again": base,
        "slice": base[1:3],
        "transposed": base.T,
        "expanded": base[0].expand(5, 6),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "empty_again": torch.empty(0, 3),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(2**60),
        "parameter": nn.Parameter(base),
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"model": tensors}, {})).tensors["model"]
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    loaded["tied"].zero_()
    assert torch.equal(loaded["tied_again"], base)


def test_a_loaded_tensor_does_not_write_into_its_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    load_checkpoint(folder).tensors["model"]["w"].zero_()
    assert torch.equal(load_checkpoint(folder).tensors["model"]["w"], torch.ones(7, 5))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text() | st.tuples(st.integers(), st.text()), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text() | st.integers(), plain))
def test_packing_is_lossless(state: dict[object, object]) -> None:
    tensors, packed = pack_optimizer(state)  # type: ignore[arg-type]
    again = unpack_optimizer(tensors, json.loads(json.dumps(packed, allow_nan=False)))
    assert again == state
    assert repr(again) == repr(state)  # tells True from 1, (1,) from [1], -0.0 from 0.0


def test_packing_refuses_what_needs_pickle() -> None:
    assert math.isnan(unpack_optimizer(*pack_optimizer({"x": math.nan}))["x"])
    with pytest.raises(TypeError, match=r"state\.groups\.0\.fn: a builtin"):
        pack_optimizer({"groups": [{"fn": print}]})


@pytest.mark.parametrize(
    "name", ["sgd", "adamw", "nadamw", "lamb", "lion", "adafactor", "rmsproptf", "lookahead_adamw"]
)
def test_an_optimizer_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        return model, create_optimizer_v2(model, name, lr=1e-2, weight_decay=0.05)

    model, optimizer = fresh()
    train(model, optimizer, range(3))
    tensors, packed = pack_optimizer(optimizer.state_dict())
    save_checkpoint(tmp_path, 3, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": packed})
    train(model, optimizer, range(3, 7))

    other, resumed = fresh()
    saved = load_checkpoint(tmp_path)
    other.load_state_dict(saved.tensors["model"])
    resumed.load_state_dict(unpack_optimizer(saved.tensors["optimizer"], saved.state["optimizer"]))
    train(other, resumed, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_gradient_scaler_comes_back() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(unpack_optimizer(*pack_optimizer(scaler.state_dict())))
    assert again.state_dict() == scaler.state_dict()
    assert unpack_optimizer(*pack_optimizer({})) == {}


# -- killed (T01) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_sigkill_at_every_point_leaves_a_whole_checkpoint(tmp_path: Path, repeats: int) -> None:
    child("kill", tmp_path, repeats)
    roots = sorted(tmp_path.iterdir())
    assert len(roots) == len(FAILPOINTS) * repeats
    for root in roots:
        name = root.name.rpartition("-")[0]
        warned: list[str] = []
        newest = latest_checkpoint(root, warned.append)
        assert newest is not None, name
        saved = load_checkpoint(newest)
        announced = name in ("ckpt.mid_prune", "ckpt.after_prune")
        assert saved.step == (40 if announced else 30), name
        assert all(torch.equal(t, torch.full((500,), float(saved.step))) for t in saved.tensors["optimizer"].values())
        assert saved.state["mark"] == saved.step
        unannounced = name in ("ckpt.after_rename", "ckpt.before_latest")
        assert len(warned) == unannounced, (name, warned)
        assert best_checkpoint(root) == root / "step-00000010"
        atomic.remove_leftovers(root)
        save(root, 40)
        assert names(root) == {"step-00000010", "step-00000030", "step-00000040", "latest", "best"}, name
        assert load_checkpoint(root).state["epoch"] == 4.0


def test_sigkill_at_any_time_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    child("storm", tmp_path, 12)
    saved = load_checkpoint(tmp_path)
    assert saved.step > 11 * 1000
    assert torch.equal(saved.tensors["model"]["w"], torch.full((500,), float(saved.step)))


# -- damaged (T02) ------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "bit flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        path.write_bytes(data[: int(len(data) * float(how))])


CASES = [(name, how) for name in FILES for how in ("0", "0.5", "0.999", "bit flipped", "missing")]


@pytest.mark.parametrize(("name", "how"), [*CASES, ("MANIFEST.json", "of another step"), ("state.json", "of another")])
def test_damage_is_found(name: str, how: str, tmp_path: Path) -> None:
    previous, newest = save(tmp_path, 1), save(tmp_path, 2)
    if how.startswith("of another"):
        shutil.copy(previous / name, newest / name)
    else:
        damage(newest / name, how)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(newest)
    assert caught.value.exit_code == 4
    warned: list[str] = []
    assert latest_checkpoint(tmp_path, warned.append) == previous
    assert len(warned) == 1
    assert newest.name in warned[0]
    assert name in warned[0]


def test_a_whole_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    shutil.copytree(first, tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="belongs to step 1"):
        load_checkpoint(tmp_path / "step-00000002")
    shutil.copytree(first, tmp_path / "my favourite")
    assert load_checkpoint(tmp_path / "my favourite").step == 1


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 8, {"model": {"w": torch.ones(2)}}, {})
    manifest = folder / "MANIFEST.json"
    data = manifest.read_bytes()
    for position in range(len(data)):
        for bit in (0, 5):
            manifest.write_bytes(data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :])
            with pytest.raises(CheckpointError):
                load_checkpoint(folder)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "step": 1, "files": {"state.json": [], "../../x": {}}}',
        '{"format": 1, "step": 1, "files": {"../state.json": {"bytes": 1, "sha256": ""}}}',
        '{"format": 1, "step": 1, "files": {}}',
        '{"format": 1, "step": true, "files": {}}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_strange_manifest_is_refused(manifest: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "MANIFEST.json").write_bytes(manifest.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "step-00000001", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    assert best_checkpoint(tmp_path) is None


@pytest.mark.parametrize("content", [None, "", "../../etc", "step-99999999\n", "\0"])
def test_a_useless_pointer_is_no_obstacle(content: str | None, tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_text(content)
    assert latest_checkpoint(tmp_path) == newest


def test_a_run_taken_back_goes_on_from_where_it_was_taken_back_to(tmp_path: Path) -> None:
    for step in (100, 110, 120):
        save(tmp_path, step)
    back = save(tmp_path, 60)
    warned: list[str] = []
    assert latest_checkpoint(tmp_path, warned.append) == back
    assert len(warned) == 1
    assert "step-00000120" in warned[0]
    assert (tmp_path / "step-00000120").is_dir()


# -- retention (T05) ----------------------------------------------------------------------------------------------


def test_there_is_a_whole_checkpoint_at_every_instant(tmp_path: Path) -> None:
    save(tmp_path, 1)
    missed: list[int] = []
    looks = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal looks
        while not done.wait(0.001):
            looks += 1
            if latest_checkpoint(tmp_path, lambda text: None) is None:
                missed.append(looks)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for step in range(2, 22):
        save(tmp_path, step, best=step == 5)
        save(tmp_path, step)  # the same step again
    done.set()
    watcher.join()
    assert looks > 5
    assert not missed
    assert names(tmp_path) == {"step-00000005", "step-00000020", "step-00000021", "latest", "best"}
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000005"


def test_keep_counts_and_one_is_refused(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step, keep=3)
    assert {name for name in names(tmp_path) if name != "latest"} == {f"step-{step:08d}" for step in (2, 3, 4)}
    with pytest.raises(ConfigError, match="at least 2") as caught:
        save(tmp_path, 9, keep=1)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "step-00000009").exists()


def test_a_pruning_failure_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    warned: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", refuse)
        newest = save(tmp_path, 3, warn=warned.append)
    assert latest_checkpoint(tmp_path) == newest
    assert len(warned) == 1
    assert "step-00000001" in warned[0]
    save(tmp_path, 4)
    assert names(tmp_path) == {"step-00000003", "step-00000004", "latest"}


def test_a_damaged_best_checkpoint_is_an_error(tmp_path: Path) -> None:
    best = save(tmp_path, 1, best=True)
    assert best_checkpoint(tmp_path) == best
    (best / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        best_checkpoint(tmp_path)


# -- full disk (T06) ----------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    found = [json.loads(line) for line in child("full", tmp_path, 8).splitlines()]
    assert len(found) == 8
    for number, case in enumerate(found):
        root = tmp_path / str(number)
        for what, path in (("checkpoint", "step-00000020"), ("file", "table.csv")):
            code, message = case[what]
            assert code == 7
            assert path in message
            assert "bytes needed" in message
            assert "free" in message
        assert load_checkpoint(root).step == 10
        assert names(root) == {"step-00000010", "latest", "best"}


def test_too_little_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previous = save(tmp_path, 1)
    tensors = {"model": {"w": torch.zeros(100_000)}}  # 400 kB
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=870_000))  # twice, and not 2.2 times
    with pytest.raises(ResourceError, match=r"8800\d\d bytes needed, 870000 free") as caught:
        save_checkpoint(tmp_path, 2, tensors, {})
    assert caught.value.exit_code == 7
    assert names(tmp_path) == {previous.name, "latest"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=890_000))
    assert save_checkpoint(tmp_path, 2, tensors, {}).name in names(tmp_path)


# -- atomic files -------------------------------------------------------------------------------------------------


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    atomic.write_json(path, {"name": "é", "values": [1, 2.5, None]})
    assert json.loads(path.read_text("utf-8")) == {"name": "é", "values": [1, 2.5, None]}
    atomic.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert atomic.sha256_file(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(path, math.nan)
    assert path.read_bytes() == b"new"
    assert names(path.parent) == {"b.json"}


def test_write_atomic_replaces_a_link_instead_of_following_it(tmp_path: Path) -> None:
    outside, link = tmp_path / "outside", tmp_path / "link"
    outside.write_text("mine")
    link.symlink_to(outside)
    atomic.write_atomic(link, "new")
    assert (outside.read_text(), link.read_text(), link.is_symlink()) == ("mine", "new", False)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(ConfigError, match="directory"):
        atomic.write_atomic(tmp_path / "folder", "x")
    assert names(tmp_path) == {"folder"}


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534",
        "Error while serializing: I/O error: File too large (os error 27)",
        "Error while serializing: I/O error: No space left on device (os error 28)",
    ],
)
def test_a_full_disk_is_known_in_every_wording(message: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="99 bytes needed"), atomic.disk_errors(tmp_path / "x", 99):
        raise RuntimeError(message)
    with pytest.raises(ResourceError, match="99 bytes needed"), atomic.disk_errors(tmp_path / "x", 99):
        raise OSError(errno.ENOSPC, "Auf dem Datenträger ist kein Platz mehr verfügbar")
    with pytest.raises(RuntimeError, match="else"), atomic.disk_errors(tmp_path / "x", 99):
        raise RuntimeError("something else")
    with pytest.raises(ConfigError, match="Choose another output"), atomic.disk_errors(tmp_path / "x", 99):
        raise PermissionError(13, "Permission denied")
