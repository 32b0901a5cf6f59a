"""Workflows without the command line: weights by path, locks, set-aside results, signals in the middle, plans."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors.torch
import torch

from sparsevit_cli.checkpoints import best_checkpoint
from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.data.images import UnreadableImageError
from sparsevit_cli.data.shrunk import Scale, Shrunk
from sparsevit_cli.data.source import Categories, Source, WrappedSource
from sparsevit_cli.errors import CheckpointError, ConfigError, DataError, SparseViTError, StoppedError
from sparsevit_cli.exporting import folder as exporting_folder
from sparsevit_cli.exporting import load_exported
from sparsevit_cli.profiling import device
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.ranks import Ranks
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runs import RunFolder, RunLocks, next_command
from sparsevit_cli.runtimes.openvino import OpenVino
from sparsevit_cli.sizes import ImageSize
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.stopping import StopRequest
from sparsevit_cli.tasks.task import Score
from sparsevit_cli.winner import write_winner
from sparsevit_cli.workflows import pipeline
from sparsevit_cli.workflows import search as search_workflow
from sparsevit_cli.workflows import training as training_workflow
from sparsevit_cli.workflows.evaluate import evaluate_checkpoint
from sparsevit_cli.workflows.export import export_winner
from sparsevit_cli.workflows.latency_sources import TorchSource
from sparsevit_cli.workflows.pages import profile_page
from sparsevit_cli.workflows.pipeline import run_pipeline
from sparsevit_cli.workflows.plan import plan_of
from sparsevit_cli.workflows.profile import profile_model, profile_settings
from sparsevit_cli.workflows.profile_target import profile_target, threads_set
from sparsevit_cli.workflows.ratios import ratios_to_profile
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.smaller import MOST_SIZES, equal_size, rival_sizes
from sparsevit_cli.workflows.training import adapt, check_headers, pretrain
from sparsevit_cli.workflows.weights import file_weights, trained_weights
from tiny import tiny_config, train_in

RATIOS = "[[.3],[.5]]"
T = TypeVar("T")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs in which pretrain is done."""
    return train_in(tmp_path_factory.mktemp("runs"), session_in, pretrain)


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained folder, to change."""
    return shutil.copytree(trained, tmp_path / "runs")


def session_in(runs: Path, **sections: object) -> Session:
    return Session(tiny_config(output=str(runs), **sections), SilentReporter())


def warnings_of(session: Session) -> list[str]:
    assert isinstance(session.reporter, SilentReporter)
    return session.reporter.warnings


# -- weights ----------------------------------------------------------------------------------------------------


def test_weights_are_taken_by_command_folder_and_file(runs: Path, tmp_path: Path) -> None:
    by_command = evaluate_checkpoint(session_in(runs), weights="pretrain", ratios=RATIOS)
    folder = runs / "tiny" / "pretrain" / "checkpoints"
    by_folder = evaluate_checkpoint(session_in(runs), weights=str(folder), ratios=RATIOS)
    plain = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(file_weights(folder).state_dict, plain)
    by_file = evaluate_checkpoint(session_in(runs), weights=str(plain), ratios=RATIOS)
    assert by_command.score == by_folder.score == by_file.score
    best = evaluate_checkpoint(session_in(runs), weights="best", ratios=RATIOS)
    marked = best_checkpoint(runs / "tiny" / best.weights.removesuffix(", best step") / "checkpoints")
    assert marked is not None
    assert best.score == evaluate_checkpoint(session_in(runs), weights=str(marked), ratios=RATIOS).score
    assert by_command.config.ratios == ((0.3,), (0.5,))
    assert evaluate_checkpoint(session_in(runs), weights=str(plain)).config.is_dense  # no ratios, nothing pruned
    assert file_weights(folder).categories.names == tuple("0123456789")
    assert file_weights(plain).categories.names == ()


def test_a_file_is_exported_without_data_and_without_a_training(trained: Path, tmp_path: Path) -> None:
    folder = trained / "tiny" / "pretrain" / "checkpoints"
    plain = tmp_path / "weights.pth"
    torch.save({"state_dict": file_weights(folder).state_dict}, plain)
    summary = export_winner(session_in(tmp_path / "elsewhere"), weights=str(plain), ratios=RATIOS)
    assert summary.report.output_shapes == {"output": ("batch", 10)}
    assert json.loads(summary.report.sparsity_file.read_text())["model"]["categories"] is None


@pytest.mark.parametrize("typed", ["nonsense", "no/such/file.safetensors"])
def test_weights_that_are_nowhere_are_refused(trained: Path, typed: str) -> None:
    with pytest.raises(ConfigError, match="no file"):
        evaluate_checkpoint(session_in(trained), weights=typed)


def test_weights_without_a_classifier_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    safetensors.torch.save_file({"patch_embed.proj.bias": torch.zeros(8)}, path)
    with pytest.raises(CheckpointError, match="no classifier"):
        export_winner(session_in(tmp_path), weights=str(path), ratios=RATIOS)


def test_graphs_on_a_cpu_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile\.mode.*no CUDA graphs"):
        profile_model(session_in(tmp_path, profile={"mode": "graph"}), ratios=RATIOS)


def test_another_model_than_was_trained_is_told(runs: Path) -> None:
    session = session_in(runs, model={"importance": "l2"})
    evaluate_checkpoint(session, weights="pretrain")
    assert any("model.importance" in warning for warning in warnings_of(session))


def test_weights_of_another_seed_are_not_validated_on_what_they_learned(runs: Path) -> None:
    folder = runs / "tiny" / "pretrain" / "checkpoints"
    with pytest.raises(CheckpointError, match="seed 0"):
        evaluate_checkpoint(session_in(runs, seed=1), weights=str(folder))


class Headers(WrappedSource):
    """The same samples as if each had a file; `read` lists those whose header was read, the first two at once."""

    def __init__(self, inner: Source, read: list[int], bad: int = -1) -> None:
        super().__init__(inner)
        self.read, self.bad, self.both = read, bad, threading.Barrier(2, timeout=100)

    def resized(self, size: ImageSize) -> Source:
        return self.inner.resized(size)

    def sample_file(self, index: int) -> Path:
        return Path(f"{index}.png")

    def check_header(self, index: int) -> None:
        if index < 2:
            self.both.wait()
        self.read.append(index)
        if index == self.bad:
            raise UnreadableImageError("7.png", "its header is nonsense", "Repair it.")


def test_headers_are_read_in_threads_before_a_training_and_not_when_it_goes_on(runs: Path, tmp_path: Path) -> None:
    session, read = session_in(runs), list[int]()
    data = session.data()
    data = replace(data, val=Headers(data.val, read), search=Headers(data.search, read))
    check_headers(session, "pretrain", data)
    assert read == []
    check_headers(session.replaced(fresh=True), "pretrain", data)
    check_headers(session_in(tmp_path / "elsewhere"), "pretrain", data)
    numbers = [*range(len(data.val)), *range(len(data.search))]
    assert sorted(read) == sorted(2 * numbers)
    other = replace(data, val=Headers(Shrunk(data.val, Scale((32, 32), (16, 16))), read, bad=7))
    with pytest.raises(DataError, match=r"1 unreadable: val-0007.* \(its header is nonsense\)"):
        check_headers(session, "pretrain", other)


# -- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_is_worked_in_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "adapt"
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from sparsevit_cli.runs import RunLocks\n"
         "locks = RunLocks(); locks.take(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()", str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    ours = RunLocks()
    with pytest.raises(CheckpointError, match="another process"):
        ours.take(path)
    child.kill()  # the operating system gives its lock back
    child.wait()
    ours.take(path)
    ours.take(path)
    ours.close()


def test_sessions_of_one_experiment_exclude_each_other(runs: Path) -> None:
    first, second = session_in(runs), session_in(runs)
    first.folder("pretrain")
    with pytest.raises(CheckpointError, match="another process"):
        second.folder("pretrain")
    first.locks.close()
    second.folder("pretrain")


def test_an_earlier_result_keeps_the_settings_it_was_made_with(runs: Path) -> None:
    first = session_in(runs)
    evaluate_checkpoint(first, weights="pretrain")
    first.locks.close()
    folder = runs / "tiny" / "evaluate"
    before = {name: (folder / name).read_text() for name in ("config.yaml", "metrics.json")}
    evaluate_checkpoint(session_in(runs, data={"eval_batch_size": 50}), weights="pretrain", ratios=RATIOS)
    assert {name: (folder / "earlier-001" / name).read_text() for name in before} == before
    assert "eval_batch_size: 50" in (folder / "config.yaml").read_text()


def test_a_run_whose_settings_cannot_be_read_can_be_set_aside(tmp_path: Path) -> None:
    session = session_in(tmp_path)
    folder = session.folder("pretrain").path
    (folder / "metrics.json").touch()
    saved = folder / "config.yaml"
    saved.write_text(saved.read_text().replace("seed: 0", "seed: 0\nof_tomorrow: 1"))
    with pytest.raises(ConfigError, match=r"of_tomorrow.*--fresh") as refused:
        session.folder("pretrain")
    assert refused.value.what == str(saved)
    session.replaced(fresh=True).folder("pretrain")
    assert (tmp_path / "tiny" / "pretrain.old-001" / "config.yaml").exists()


def test_a_model_by_name_is_profiled_whatever_the_trainings_say(tmp_path: Path) -> None:
    """Their curricula end at the size of another model; what is saved must be read again all the same."""
    for command in ("first", "second"):
        session = session_in(tmp_path, train={"curriculum": [{"img_size": 32, "epochs": 1}]})
        target = profile_target(session, model="swinv2_tiny_window8_256", ratios="0.5")
        assert target.session.folder("profile").path.name == "profile", command
        (tmp_path / "swinv2_tiny_window8_256" / "profile" / "metrics.json").touch()
        target.session.locks.close()
    with pytest.raises(ConfigError, match="--model"):
        profile_target(session, model="swin_" + "x" * 80, ratios="0.5")


def test_a_profile_is_of_what_finetune_trained_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As are evaluate and export; a winner found since, and ratios configured for finetune, stand back and are told."""
    said: list[str] = []
    monkeypatch.setattr(SilentReporter, "say", lambda self, text: said.append(text))

    def profiled(model: str | None = None, **sections: object) -> tuple[tuple[tuple[float, ...], ...], list[str]]:
        session = session_in(tmp_path, **sections)
        found = ratios_to_profile(session, (2, 2), None, named=model is not None)
        return found.ratios, warnings_of(session)

    winner = session_in(tmp_path).earlier("search").path / "winner.yaml"
    with pytest.raises(CheckpointError, match=r"or give --ratios 0\.6"):
        profiled()
    assert profiled(finetune={"ratios": [[0.1], [0.2]]}) == (((0.1,), (0.2,)), [])
    winner.parent.mkdir(parents=True)
    write_winner(winner, SparsityConfig.from_ratios([[0.3], [0.5]]), {})
    assert profiled() == (((0.3,), (0.5,)), [])
    folder = session_in(tmp_path).earlier("finetune")
    folder.path.mkdir()
    (folder.path / "sparsity.json").write_text('{"ratios": [[0.6], [0.6]]}')
    assert profiled()[0] == ((0.3,), (0.5,)), "finetune is not done"
    folder.write_result({}, files=["sparsity.json"])
    for sections in ({}, {"finetune": {"ratios": [[0.1], [0.2]]}}):
        ratios, (warning,) = profiled(**sections)
        assert ratios == ((0.6,), (0.6,))
        assert f"--ratios {winner} profiles that" in warning
    assert profiled(finetune={"ratios": [[0.6], [0.6]]}) == (((0.6,), (0.6,)), []), "as configured"
    assert profiled(profile={"ratios": 0.4})[0] == ((0.4,), (0.4,))
    assert profiled(model="another")[0] == ((0.3,), (0.5,))
    assert not said
    winner.unlink()
    assert profiled() == (((0.6,), (0.6,)), [])
    assert said == ["profile: at [[0.6], [0.6]], which finetune trained at"]


# -- done -------------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Stands for a SIGKILL: nothing of ours catches it."""


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an export, whose files are looked at and moved, not run."""
    runs = shutil.copytree(trained, tmp_path_factory.mktemp("exported") / "runs")
    return export_winner(session_in(runs), weights="pretrain", ratios=RATIOS).folder.path


@pytest.mark.parametrize("stop_at", range(7))
def test_an_export_killed_while_it_is_published_is_not_done(
    stop_at: int, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before and after each file is moved: the export there is the old one, whole, or is made again."""
    folder = RunFolder(shutil.copytree(exported, tmp_path / "export"), "export")
    assert folder.done("manifest.json")
    staging = shutil.copytree(exported, folder.path / "staging")
    for name in ("sparsity.json", "manifest.json"):  # another export of the same weights
        (staging / name).write_text((staging / name).read_text() + " ")
    calls = count()

    def killed(name: object) -> None:
        if next(calls) == stop_at:
            raise KilledError

    monkeypatch.setattr(exporting_folder, "failpoint", killed)
    monkeypatch.setattr(exporting_folder, "sync_folder", killed)
    with contextlib.suppress(KilledError):
        exporting_folder.publish(staging, folder.path, SilentReporter())
    assert next(calls) == min(stop_at + 1, 6)
    assert bool(folder.done("manifest.json")) == (stop_at == 0)
    if stop_at == 0:
        load_exported(folder.path)


@pytest.mark.parametrize("name", ["manifest.json", "model.pt2", "model.safetensors", "sparsity.json", "metrics.json"])
def test_an_export_is_done_while_all_its_files_are(name: str, exported: Path, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(exported, tmp_path / "export"), "export")
    for change in (lambda path: path.write_bytes(b"{}"), Path.unlink, Path.mkdir):
        change(folder.path / name)
        assert not folder.done("manifest.json")


def test_a_result_set_aside_goes_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, "profile")
    names = ["a.json", "b.csv", "metrics.json"]
    for name in names[:2]:
        (tmp_path / name).write_text(name)
    folder.write_result({}, files=names[:2])
    assert folder.done("a.json")
    moved: list[str] = []
    monkeypatch.setattr(shutil, "move", lambda path, target, **_: moved.append(path.name))
    folder.set_aside(names, SilentReporter())
    assert moved == ["metrics.json", "a.json", "b.csv"]
    assert not folder.done("a.json", "c.json")
    (tmp_path / "b.csv").write_text("other")
    assert not folder.done("a.json")


def test_a_search_is_done_while_winner_and_numbers_agree(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_in(runs)
    weights = trained_weights(session, "pretrain", "a test")
    monkeypatch.setattr(search_workflow, "trained_weights", lambda *arguments: weights)
    folder = session.earlier("search")
    folder.path.mkdir()
    winner = SparsityConfig.from_ratios([[0.3], [0.5]])
    settings = section_hash(session.config, "search", "seed")
    numbers = {"ratios": winner.ratios, "settings": settings, "checkpoint_sha256": weights.sha256}

    def write() -> None:
        folder.write_result(numbers)
        write_winner(folder.path / "winner.yaml", winner, {})

    write()
    assert search_workflow.is_searched(session)
    for name in ("winner.yaml", "metrics.json"):
        for content in (b"", b"\xff", b"ratios: 3", b"{", b'{"ratios": [[0.1], [0.1]]}'):
            (folder.path / name).write_bytes(content)
            assert not search_workflow.is_searched(session)
            write()
    assert search_workflow.is_searched(session)


@pytest.mark.parametrize("damage", ["missing sparsity.json", "metrics.json", "text", "another checkpoint"])
def test_a_training_whose_result_is_damaged_writes_it_again(damage: str, runs: Path) -> None:
    folder = session_in(runs).earlier("pretrain")
    before = (folder.path / "sparsity.json").read_bytes()
    if damage == "missing sparsity.json":
        (folder.path / "sparsity.json").unlink()
    elif damage == "another checkpoint":
        folder.write_result({**(folder.read_result() or {}), "checkpoint": "checkpoints/gone"}, files=["sparsity.json"])
    else:
        folder.result.write_text({"metrics.json": "{", "text": '{"checkpoint": 3, "class_names": "abc"}'}[damage])
        with pytest.raises(CheckpointError, match=r"metrics\.json"):
            evaluate_checkpoint(session_in(runs), weights="pretrain", ratios=RATIOS)
    session = session_in(runs)
    assert not pretrain(session).already_done
    session.locks.close()
    assert (folder.path / "sparsity.json").read_bytes() == before
    assert pretrain(session_in(runs)).already_done
    evaluate_checkpoint(session_in(runs), weights="pretrain", ratios=RATIOS)


# -- signals ----------------------------------------------------------------------------------------------------


def stopped(runs: Path) -> Session:
    stop = StopRequest()
    stop.signal_number = signal.SIGTERM
    return session_in(runs).replaced(stop=stop)


def test_a_signal_ends_evaluation_measurement_and_export_between_two_steps(runs: Path) -> None:
    with pytest.raises(StoppedError, match="nothing of this evaluation"):
        evaluate_checkpoint(stopped(runs), weights="pretrain")
    with pytest.raises(StoppedError, match="nothing of this profile"):
        profile_model(stopped(runs), ratios=RATIOS)
    with pytest.raises(StoppedError, match="an earlier export"):
        export_winner(stopped(runs), weights="pretrain", ratios=RATIOS)
    for command in ("evaluate", "profile", "export"):
        left = {path.name for path in (runs / "tiny" / command).rglob("*")}
        assert left == {"config.yaml", "command.txt", "env.json"}  # no result, and no half of one


# -- optional output --------------------------------------------------------------------------------------------


def in_the_way(folder: Path, *names: str) -> None:
    """Folders with something in them where files are to be written."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name / "x").mkdir(parents=True)


def test_pictures_and_pages_that_cannot_be_written_cost_a_warning_each_and_no_result(runs: Path) -> None:
    trained = runs / "tiny" / "pretrain"
    in_the_way(trained, "results.png", "results.csv")
    shutil.rmtree(trained / "checkpoints")
    (trained / "metrics.json").unlink()
    session = session_in(runs, train={"eval_every": 0.3})
    pretrain(session)
    assert (trained / "metrics.json").exists()
    assert sorted(w.partition(" ")[0] for w in warnings_of(session) if "left out" in w) == [
        "results.csv",
        "results.png",
    ]
    measured = runs / "tiny" / "profile"
    in_the_way(measured, *(names := ["layers.csv", "profile.html", "samples.npz"]))
    session = session_in(runs, profile={"batch_sizes": [1]})
    profile_model(session, ratios=RATIOS)
    assert (measured / "metrics.json").exists()
    assert (measured / "profile.json").exists()
    assert sorted(w.partition(" ")[0] for w in warnings_of(session) if "left out" in w) == names


# -- plans, pages, early refusals -------------------------------------------------------------------------------


def test_plans_name_what_each_command_costs_and_write_nothing(tmp_path: Path) -> None:
    session = session_in(tmp_path / "runs")
    told = "\n".join(plan_of(session, "run").lines)
    for words in ("pretrain: ", "adapt: ", "finetune: ", "search: 8 candidates", "evaluate: 350 images"):
        assert words in told
    assert "budgets: 80%, 60%" in plan_of(session, "search", budgets=("80%", "60%")).lines[-1]
    sizes = "\n".join(plan_of(session, "profile", img_size="32,64x48", ratios="0.5").lines)
    assert "cells: 4" in sizes
    assert "64x48" in sizes
    assert not (tmp_path / "runs").exists()


def test_a_profile_leaves_a_page_that_escapes_what_it_shows(tmp_path: Path) -> None:
    report = profile_model(session_in(tmp_path), ratios="0.5")
    folder = tmp_path / "tiny" / "profile"
    assert (folder / "layers.csv").read_text().startswith("model,part,blocks")
    assert "<td>stage 1" in (folder / "profile.html").read_text()
    hostile = profile_page(type(report)(**{**vars(report), "model": "<script>alert(1)</script>"}))
    assert "<script>" not in hostile
    assert "&lt;script&gt;" in hostile


def test_a_run_profiles_again_what_was_profiled_at_another_image_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("evaluate_checkpoint", "profile_model", "export_winner"):
        monkeypatch.setattr(pipeline, name, lambda _, name=name: done.append(name))
    session = session_in(tmp_path, profile={"batch_sizes": [1]})
    config = SparsityConfig.from_ratios([[0.3], [0.5]])
    for typed, again in (("16", True), ("32", False)):
        profile_model(session, img_size=typed, ratios=RATIOS)
        done.clear()
        pipeline._last_steps(session, config, "")
        assert ("profile_model" in done) is again, typed


def test_the_pipeline_refuses_at_once_what_a_later_step_would(tmp_path: Path) -> None:
    session = session_in(tmp_path, finetune={"ratios": [[0.1], [0.2], [0.3]]})
    with pytest.raises(ConfigError, match="block pairs"):
        run_pipeline(session)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"search": {"latency_table": "/none.json"}}, "/none.json"),
        ({"search": {"runtime": "openvino", "precision": "int8"}}, "no_such_package not installed"),
        ({"profile": {"runtimes": ["openvino"]}}, "no_such_package not installed"),
    ],
)
def test_the_pipeline_refuses_a_clock_that_it_cannot_read(
    sections: dict[str, dict[str, object]], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVino, "packages", ("no_such_package",))
    with pytest.raises((ConfigError, CheckpointError), match=told):
        run_pipeline(session_in(tmp_path, **sections))
    assert not (tmp_path / "tiny").exists()


def test_a_winner_for_eight_bits_has_a_rival_of_equal_size(tmp_path: Path) -> None:
    """PyTorch has no int8 Swin: the closing table measures float32, and so does the choice of the rival's size."""
    session = session_in(tmp_path, search={"runtime": "openvino", "precision": "int8"}, model={"img_size": 64})
    model = session.model(Categories(tuple("0123456789")))
    folder = session.folder("rival")

    def measured(calls: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
        for call in calls.values():
            call()
        return {name: Latency(ms, ms, ms, 0, ms, 1, 0, (ms,)) for ms, name in enumerate(calls, 1)}

    size = equal_size(session, folder, model, session.space(model, 0.8).uniform(0.5), measured)
    assert size is not None
    assert size[0] < 64


def test_ratios_left_out_of_the_closing_table_are_told(runs: Path) -> None:
    session = session_in(runs, adapt={"max_ratio": 0.4, "check_ratios": [0.3, 0.5]})
    labels = [row.label for row in adapt(session).rows]
    assert "uniform 0.3" in labels
    assert "uniform 0.5" not in labels
    assert any("adapt.check_ratios 0.5" in warning for warning in warnings_of(session))
    assert (runs / "tiny" / "adapt" / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_a_closing_table_goes_on_where_it_was_stopped(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes the others wait for one validation at a time, however long the table takes."""
    result, score = runs / "tiny" / "adapt" / "metrics.json", training_workflow.score
    scored, at_once = [0], list[int]()

    def counted(*arguments: Any, **options: Any) -> Score:
        if result.exists():
            scored[0] += 1
            if scored[0] == 4:  # the second one of the last row
                raise KeyboardInterrupt
        return score(*arguments, **options)

    class Watched(Ranks):
        def on_first(self, work: Callable[[], T]) -> T:
            before = scored[0]
            try:
                return work()
            finally:
                at_once.append(scored[0] - before)

    def table() -> list[tuple[str, float]]:
        session = session_in(runs, adapt={"check_random": 2}).replaced(ranks=Watched())
        try:
            return [(row.label, row.score) for row in adapt(session).rows]
        finally:
            session.locks.close()

    monkeypatch.setattr(training_workflow, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        table()
    kept = json.loads(result.read_text())["check"]
    assert list(kept) == ["dense", "uniform 0.5"]
    rows = table()
    assert [label for label, _ in rows] == ["dense", "uniform 0.5", "random, mean of 2"]
    assert rows[:2] == [(label, row["score"]) for label, row in kept.items()]
    assert scored[0] == 4 + 2
    assert max(at_once) == 1
    assert table() == rows
    assert scored[0] == 4 + 2


def test_settings_that_a_source_ignores_are_refused() -> None:
    with pytest.raises(ValueError, match="crop_pct"):
        tiny_config(data={"crop_pct": 0.5})
    with pytest.raises(ValueError, match=r"data\.digits"):
        tiny_config(data={"source": "folder", "root": "x", "digits": {"clutter": 0.1}})


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_revision_is_told_inside_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    module = tmp_path / "device.py"
    module.touch()
    monkeypatch.setattr(device, "__file__", str(module))
    revision = device.source_revision.__wrapped__  # a process asks once
    assert revision() is None  # no checkout
    git("init")
    git("commit", "--allow-empty", "--message", "first")
    assert revision() is None  # a checkout of something else, such as one with a virtual environment inside
    git("add", ".")
    git("commit", "--message", "second")
    commit = git("rev-parse", "HEAD")
    assert revision() == commit[:12]
    module.write_text("changed")
    assert revision() == f"{commit[:12]}-dirty"


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        ((), "sparsevit adapt"),
        (
            ("sparsevit", "search", "-c", "my file.yaml", "--json", "--seed=3"),
            "sparsevit adapt -c 'my file.yaml' --seed=3",
        ),
    ],
)
def test_the_next_command_stays_with_the_experiment(argv: tuple[str, ...], typed: str) -> None:
    assert next_command("adapt", argv) == typed


def test_what_is_asked_to_be_typed_names_the_experiment(tmp_path: Path) -> None:
    session = session_in(tmp_path).replaced(argv=("sparsevit", "adapt", "--config", "tiny.yaml"))
    with pytest.raises(CheckpointError, match=r"Type: sparsevit pretrain --config tiny.yaml"):
        adapt(session)


def test_a_thread_count_that_is_not_asked_for_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)  # it slows fused attention for the rest of the process
    with threads_set(None):
        pass
    assert not asked
    with threads_set(1):
        assert asked == [1]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("img_size", "patch", "window"),
    [
        ((192, 192), 4, 4),
        ((224, 224), 4, 7),
        ((672, 672), 4, 7),
        ((256, 704), 4, 7),
        ((32, 32), 4, 7),
        ((64, 64), 4, 8),
    ],
)
def test_rivals_fill_whole_windows(img_size: tuple[int, int], patch: int, window: int) -> None:
    sizes = rival_sizes(img_size, patch, patch * window)
    assert 1 <= len(sizes) <= MOST_SIZES
    unit = patch * window if min(img_size) >= 2 * patch * window else patch
    for height, width in sizes:
        assert height % unit == width % unit == 0
        assert height * width < img_size[0] * img_size[1]
        assert abs(height / width - img_size[0] / img_size[1]) < 0.1


def test_rivals_of_the_demo() -> None:
    assert sorted(rival_sizes((192, 192), 4, 16)) == [(side, side) for side in range(64, 192, 16)]


def test_what_is_accepted_beside_a_latency_belongs_to_it(tmp_path: Path) -> None:
    def identity(**clock: float) -> dict[str, object]:
        session = session_in(tmp_path, clock=clock)
        return dict(TorchSource(session, session.model(["a", "b"])).identity)

    assert identity() == identity() != identity(max_neighbour=4.0) != identity(max_spread=2.0)
    assert profile_settings(session_in(tmp_path)) != profile_settings(
        session_in(tmp_path, clock={"max_neighbour": 4.0})
    )


def test_a_run_folder_that_is_a_link_to_itself_is_told(tmp_path: Path) -> None:
    session = session_in(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "evaluate").symlink_to(tmp_path / "tiny" / "evaluate")
    with pytest.raises(SparseViTError, match="evaluate"):
        session.folder("evaluate")
