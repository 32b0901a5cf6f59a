"""The commands as typed: a whole tiny experiment, what each wrong step is answered with, and what is left on disk."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from noise import NOISE, beside
from sparsevit_cli.checkpoints import latest_checkpoint
from sparsevit_cli.cli import app
from sparsevit_cli.console import ConsoleReporter
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.winner import read_winner
from tiny import write_tiny


def sparsevit(*arguments: object, cwd: Path, check: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in `cwd`; `check` is the exit code it must end with."""
    done = subprocess.run(
        [sys.executable, "-m", "sparsevit_cli.cli", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env},
    )  # fmt: skip
    assert check is None or done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def refused(*arguments: object, cwd: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Run a command that ends early with exit `code`, in this process: importing torch anew takes longer than it."""
    monkeypatch.chdir(cwd)
    done = CliRunner().invoke(app, list(map(str, arguments)), prog_name="sparsevit")
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where every command ran once, in order, and `run` after them."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_tiny(folder)
    sparsevit("run", "--config", config, cwd=folder)
    return folder


ANYWHERE = ("--set", "clock.max_neighbour=1000.0", "--set", "clock.wait=0")
"""Tests run beside anything."""
CAREFUL = ("--set", "clock.max_neighbour=null", "--set", "clock.wait=0.5")


def document(folder: Path, *path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder.joinpath("runs", "tiny", *path)).read_text())
    return loaded


def test_a_whole_experiment_leaves_what_it_promises(finished: Path) -> None:
    runs = finished / "runs" / "tiny"
    for command in ("pretrain", "adapt", "search", "finetune", "evaluate", "profile", "export", "run"):
        for name in ("config.yaml", "env.json", "command.txt", "log.txt", "metrics.json"):
            assert (runs / command / name).stat().st_size, (command, name)
        assert "sparsevit" in (runs / command / "command.txt").read_text()
    winner, about = read_winner(runs / "search" / "winner.yaml")
    assert winner.pairs == (1, 1)
    assert about["gmacs"] <= round(about["budget"]["macs"] / 1e9, 4)  # as it is written
    with (runs / "search" / "pareto.csv").open() as file:
        front = list(csv.DictReader(file))
    assert [float(row["cost"]) for row in front] == sorted(float(row["cost"]) for row in front)
    assert (runs / "search" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    table = document(finished, "run", "metrics.json")["rows"]
    labels = [row["label"] for row in table]
    assert labels[:2] == ["dense (timm)", "dense, our kernels"]
    assert labels[-2:] == ["winner, before finetuning", "winner, finetuned"]
    assert any("dense at" in label for label in labels)
    assert any("uniform" in label for label in labels)
    assert table[0]["speedup"] == 1
    assert table[-1]["gmacs"] < table[0]["gmacs"]
    manifest = document(finished, "export", "manifest.json")
    assert manifest
    assert (runs / "export" / "model.safetensors").exists()
    assert (runs / "export" / "sparsity.json").exists()


def test_a_second_run_does_nothing_again(finished: Path) -> None:
    checkpoints = finished / "runs" / "tiny" / "pretrain" / "checkpoints"
    before = latest_checkpoint(checkpoints)
    done = sparsevit("pretrain", "--config", finished / "tiny.yaml", cwd=finished)
    assert "already done" in done.stderr
    assert latest_checkpoint(checkpoints) == before


def test_run_again_repeats_no_step_and_gives_the_same_table(finished: Path) -> None:
    before = document(finished, "run", "metrics.json")["rows"]
    done = sparsevit("run", "--config", finished / "tiny.yaml", cwd=finished)
    for step in ("pretrain", "adapt", "finetune", "rival"):
        assert f"{step}: already done" in done.stderr
    assert "candidates" not in done.stderr
    after = document(finished, "run", "metrics.json")["rows"]
    compared = ("label", "score", "ratios", "image_size", "gmacs")
    assert [[row[key] for key in compared] for row in after] == [[row[key] for key in compared] for row in before]


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        (["adapt", "--fresh", "--set", "model.embed_dim=16"], 4, "and in_chans it was trained with"),
        (["evaluate", "--seed", "1"], 4, "--seed 0"),
        (["evaluate", "--weights", "magic"], 2, "pretrain"),
        (["evaluate", "--fresh", "--ratios", "0.65"], 2, "grid"),
        (["search", "--fresh", "--seed", "1"], 4, "--seed 0"),
        (["pretrain", "--fresh", "--set", "train.optimizer=adamx"], 2, "Did you mean"),
        (["run", "--fresh", "--set", "finetune.optimizer=adamx"], 2, "finetune.optimizer"),
        (["profile", "--model", "resnet50", "--ratios", "0.5"], 2, "sparsevit models"),
        (["profile", "--model", "swin_tiny_patch4_window7", "--ratios", "0.5"], 2, "swin_tiny_patch4_window7_224"),
    ],
)
def test_what_does_not_fit_is_told(
    finished: Path, tmp_path: Path, command: list[str], code: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    before = set(tmp_path.rglob("*.old-*"))
    config = ("--config", finished / "tiny.yaml")
    done = refused(*command, *config, cwd=tmp_path, code=code, monkeypatch=monkeypatch)
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert set(tmp_path.rglob("*.old-*")) == before, "nothing is set aside for what cannot run"


def test_a_full_disk_is_told_even_where_the_log_cannot_be_written(tmp_path: Path) -> None:
    reporter = ConsoleReporter(stream=(stream := io.StringIO()))
    reporter.log_to(Path("/dev/full"))
    reporter.say("still heard")
    assert "still heard" in stream.getvalue()


def test_set_aside_never_meets_a_taken_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "profile")
    (tmp_path / "earlier-002").mkdir()
    for number in (3, 4):
        (tmp_path / "profile.json").write_text("{}")
        folder.set_aside(["profile.json", "gone.json"], SilentReporter())
        assert (tmp_path / f"earlier-00{number}" / "profile.json").exists()


def test_other_settings_are_refused_and_fresh_sets_the_old_aside(finished: Path, tmp_path: Path) -> None:
    config = finished / "tiny.yaml"
    done = sparsevit("adapt", "--config", config, "--set", "adapt.lr=3e-4", cwd=finished, check=2)
    assert "adapt.lr" in done.stderr
    assert "0.0001" in done.stderr
    assert "--fresh" in done.stderr
    sparsevit("evaluate", "--config", config, cwd=finished)
    assert (finished / "runs" / "tiny" / "evaluate" / "earlier-001" / "metrics.json").exists()
    done = sparsevit("evaluate", "--config", config, "--fresh", "--weights", "adapt", "--ratios", "0.5", cwd=finished)
    assert "uniform" not in done.stdout
    assert "weights of adapt at [[0.5], [0.5]]" in done.stdout
    assert (finished / "runs" / "tiny" / "evaluate.old-001" / "metrics.json").exists()


def test_json_is_one_document_and_nothing_else(finished: Path) -> None:
    done = sparsevit("profile", "--config", finished / "tiny.yaml", "--json", "--ratios", "[[.5],[.2]]", cwd=finished)
    report = json.loads(done.stdout)
    assert {"device", "versions", "rows"} <= report.keys()
    row = report["rows"][-1]
    wanted = "label ratios batch image_size dtype mode gmacs latency_ms latency_ms_low latency_ms_high speedup"
    assert {*wanted.split(), "peak_memory_mb"} <= row.keys()
    assert row["ratios"] == [[0.5], [0.2]]
    assert [r["batch"] for r in report["rows"]] == [1, 1, 1, 2, 2, 2]
    assert all(r["latency_ms_low"] <= r["latency_ms"] <= r["latency_ms_high"] for r in report["rows"])


def test_a_second_export_keeps_the_first(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "tiny" / "export"
    first = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pt2", ".safetensors")}
    assert len(first) == 2
    sparsevit("export", "--config", finished / "tiny.yaml", "--weights", "adapt", "--ratios", "0.5", cwd=tmp_path)
    for name, content in first.items():
        assert (folder / "earlier-001" / name).read_bytes() == content
        assert (folder / name).read_bytes() != content


def test_a_winner_file_is_taken_as_ratios(finished: Path) -> None:
    winner = finished / "runs" / "tiny" / "search" / "winner.yaml"
    done = sparsevit("evaluate", "--config", finished / "tiny.yaml", "--ratios", winner, "--json", cwd=finished)
    assert json.loads(done.stdout)["config"] == [list(stage) for stage in read_winner(winner)[0].ratios]


def test_a_second_budget_reuses_the_ledger(finished: Path) -> None:
    done = sparsevit("search", "--config", finished / "tiny.yaml", "--budget-macs", "80%", "--json", cwd=finished)
    first = json.loads(done.stdout)
    done = sparsevit("search", "--config", finished / "tiny.yaml", "--budget-macs", "80%", "--json", cwd=finished)
    again = json.loads(done.stdout)
    assert again["evaluated"] == 0
    assert again["asked"] == first["asked"]
    assert again["winner"]["config"] == first["winner"]["config"]
    assert list((finished / "runs" / "tiny" / "search").glob("earlier-*/winner.yaml"))


def test_a_search_whose_tables_and_picture_cannot_be_written_still_finds_its_winner(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    folder = tmp_path / "runs" / "tiny" / "search"
    for name in (names := ("history.csv", "pareto.csv", "pareto.png")):
        (folder / name).unlink()
        (folder / name / "in the way").mkdir(parents=True)
    command = ("search", "--config", finished / "tiny.yaml", "--budget-macs", "75%")
    done = refused(*command, cwd=tmp_path, code=0, monkeypatch=monkeypatch)
    assert all(f"{name} is left out" in done.stderr for name in names)
    assert (folder / "winner.yaml").exists()
    assert (folder / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--budget-macs", "1%"], 5, "reachable is"),
        (["--budget-macs", "0%"], 2, "above zero"),
        (["--budget-macs", "50 apples"], 2, "a share of dense (60%)"),
        (["--budget-latency", "1e-9ms"], 5, "reachable is"),
        (["--set", "search.strategy=magic"], 2, "evolution"),
        (["--set", "serach.population=3"], 2, "search"),
    ],
)
def test_an_impossible_search_says_what_is_possible(
    finished: Path, arguments: list[str], code: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = (finished / "runs" / "tiny" / "search" / "winner.yaml").read_bytes()
    command = ("search", "--config", finished / "tiny.yaml", *arguments)
    done = refused(*command, cwd=finished, code=code, monkeypatch=monkeypatch)
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert (finished / "runs" / "tiny" / "search" / "winner.yaml").read_bytes() == winner


def test_the_table_of_budgets_comes_before_the_refusal(finished: Path) -> None:
    told = sparsevit(
        "search",
        "--config",
        finished / "tiny.yaml",
        "--budget-macs",
        "1%",
        "--budget-latency",
        "70%",
        cwd=finished,
        check=5,
    ).stderr
    assert "NO" in told
    assert "measuring" not in told, "nothing is measured for a budget that arithmetic refuses"


def test_a_budget_above_dense_returns_dense_and_says_so(finished: Path) -> None:
    done = sparsevit("search", "--config", finished / "tiny.yaml", "--budget-macs", "120%", "--json", cwd=finished)
    result = json.loads(done.stdout)
    assert result["winner"]["config"] == [[0.0], [0.0]]
    assert "dense is within budget" in result["note"]


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("adapt", "pretrain"),
        ("search", "adapt"),
        ("finetune", "adapt"),
        ("evaluate", "pretrain"),
        ("export", "pretrain"),
    ],
)
def test_a_missing_result_names_the_command_to_type(
    tmp_path: Path, command: str, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = refused(command, "--config", write_tiny(tmp_path), cwd=tmp_path, code=4, monkeypatch=monkeypatch)
    assert f"Type: sparsevit {needed}" in done.stderr
    assert done.stdout == ""


def test_profile_needs_neither_data_nor_training(tmp_path: Path) -> None:
    done = sparsevit(
        "profile", "--model", "swin_tiny_patch4_window7_224", "--img-size", "64x96", "--ratios", "0.6", "--json",
        "--set", "profile.batch_sizes=[1]", "--set", "profile.seconds=0.01", "--set", "profile.rounds=6",
        "--set", "profile.max_spread=100.0", *ANYWHERE, cwd=tmp_path,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["rows"][-1]["image_size"] == [64, 96]
    assert (tmp_path / "runs" / "swin_tiny_patch4_window7_224" / "profile" / "profile.json").exists()
    done = sparsevit("profile", "--model", "swin_tiny_patch4_window7_224", cwd=tmp_path, check=4)
    assert "--ratios 0.6" in done.stderr


def test_a_profile_that_does_not_settle_is_shown_and_refused(tmp_path: Path) -> None:
    done = sparsevit(
        "profile", "--model", "swin_tiny_patch4_window7_224", "--img-size", "64", "--ratios", "0.6", "--json",
        "--set", "profile.batch_sizes=[1]", "--set", "profile.seconds=0.01", "--set", "profile.rounds=6",
        "--set", "profile.max_spread=1e-9", *ANYWHERE, cwd=tmp_path, check=8,
    )  # fmt: skip
    assert "3 of 3 rows are not steady (dense (timm), batch 1: samples of dense (timm) spread by" in done.stderr
    kept = tmp_path / "runs" / "swin_tiny_patch4_window7_224" / "profile" / "profile.json"
    for report in (json.loads(done.stdout), json.loads(kept.read_text())):
        assert not any(row["stable"] for row in report["rows"])


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("noise", NOISE)
def test_a_latency_budget_beside_a_busy_process_ends_with_8_and_never_with_5(
    noise: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = (finished / "runs" / "tiny" / "search" / "winner.yaml").read_bytes()
    command = ("search", "--config", finished / "tiny.yaml", "--set", "search.batch_size=2", *CAREFUL)
    with beside(noise):
        for budget in ("1e-9ms", "70%"):
            done = refused(*command, "--budget-latency", budget, cwd=finished, code=8, monkeypatch=monkeypatch)
            assert "wait longer (clock.wait)" in done.stderr
            if noise != "comes and goes":  # a slice that began in a pause uses up the wait before a line tells of it
                assert "waiting for that to end" in done.stderr
            assert "reachable" not in done.stderr
    assert (finished / "runs" / "tiny" / "search" / "winner.yaml").read_bytes() == winner
    assert not (finished / "runs" / "tiny" / "search" / "latency_table.json").exists()


@pytest.mark.usefixtures("watched")
def test_a_profile_beside_a_busy_process_shows_no_number_and_ends_with_8(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("profile", "--config", finished / "tiny.yaml", "--ratios", "0.5", *CAREFUL)
    with beside("one core"):
        done = refused(*command, cwd=tmp_path, code=8, monkeypatch=monkeypatch)
    assert "6 of 6 rows are not steady" in done.stderr
    assert done.stdout.count("not steady") == 6
    assert "x [" not in done.stdout, "no speed-up"
    assert "Where the time goes" not in done.stdout
    page = (tmp_path / "runs" / "tiny" / "profile" / "profile.html").read_text()
    assert page.count("not steady") == 6


@pytest.mark.usefixtures("watched")
def test_run_goes_on_beside_a_busy_process_and_prints_no_speed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    both = ("--set", "search.budget_latency=70%", "--set", "search.budget_macs=70%")
    command = ("run", "--config", tmp_path / "tiny.yaml", *both, "--set", "search.batch_size=2", *CAREFUL)
    with beside("one core"):
        done = refused(*command, cwd=tmp_path, code=0, monkeypatch=monkeypatch)
    assert "the budget of multiply-adds decides alone: 70%" in done.stderr
    assert done.stdout.count("not steady") > 2
    assert "as fast as timm" not in done.stdout
    assert "of the multiply-adds gone" in done.stdout
    for row in document(tmp_path, "run", "metrics.json")["rows"]:
        assert {row[name] for name in row if name.startswith(("latency", "speedup"))} == {None}
    found = document(tmp_path, "search", "metrics.json")
    assert found["latency_ms"] is None
    assert found["without_clock"]
    monkeypatch.undo()  # the machine is quiet again
    done = refused(*command, cwd=tmp_path, code=0, monkeypatch=monkeypatch)
    assert "the winner was found without a clock; on a quiet machine, type: sparsevit search" in done.stderr
    assert "The search left its latency budget out" in done.stdout
    assert "as fast as timm" in done.stdout


def images_in(folder: Path, classes: Sequence[str], count: int = 12) -> Path:
    """A folder with train/<class>/<n>.png and val/...; each class has its colour."""
    from PIL import Image

    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                colour = (80 * label + 5 * number, 40, 200 - 80 * label)
                Image.new("RGB", (40, 40), colour).save(folder / split / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    "name", ["swinv2_cr_tiny_ns_224", pytest.param("swinv2_tiny_window8_256", marks=pytest.mark.slow)]
)
def test_later_generations_go_the_whole_way(tmp_path: Path, name: str) -> None:
    config = write_tiny(tmp_path, model={"name": name, "weight_init": "timm"}, export={"formats": ["onnx", "pt2"]})
    report = json.loads(sparsevit("run", "--config", config, "--json", cwd=tmp_path).stdout)
    winner = report["rows"][-1]
    assert winner["gmacs"] < report["rows"][0]["gmacs"]
    from sparsevit_cli import load_exported
    from sparsevit_cli.swin import get_sparsity, sparse_stages

    model = load_exported(tmp_path / "runs" / "tiny" / "export")
    assert [list(stage) for stage in get_sparsity(model).ratios] == winner["ratios"]
    assert all(stage.blocks[0].window_size == (2, 2) for stage in sparse_stages(model))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    config = write_tiny(tmp_path)
    for command in ("pretrain", "search"):
        done = sparsevit(command, "--config", config, "--dry-run", cwd=tmp_path)
        assert "min " in done.stdout
    assert not (tmp_path / "runs").exists()


def test_help_is_quick_and_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom sparsevit_cli.cli import app\n"
        "try:\n    app(sys.argv[1:], prog_name='sparsevit')\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules), 'heavy'"
    )
    for arguments in (["--help"], ["search", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert "sparsevit" in done.stdout.lower()


@pytest.mark.parametrize("arguments", [["nonsense"], ["search", "--nonsense"], ["search", "--seed", "x"]])
def test_wrong_usage_ends_with_2(tmp_path: Path, arguments: list[str]) -> None:
    assert sparsevit(*arguments, cwd=tmp_path, check=2).stdout == ""


def test_a_wrong_config_is_told_in_three_parts_before_anything_starts(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("serach:\n  population: 3\nmodel:\n  img_size: big\n")
    done = sparsevit("pretrain", "--config", config, cwd=tmp_path, check=2)
    assert "search" in done.stderr
    assert "img_size" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert "no such" in sparsevit("adapt", "-c", "gone.yaml", cwd=tmp_path, check=2).stderr.lower()


def test_text_from_outside_is_shown_as_it_is(tmp_path: Path) -> None:
    images_in(tmp_path / "data", ["[red]", "[|x]", "<b>\x1b[31m"])
    broken = tmp_path / "data" / "val" / "[red]" / "3.png"
    broken.write_bytes((tmp_path / "data" / "val" / "[red]" / "0.png").read_bytes()[:60])  # its header is whole
    config = write_tiny(
        tmp_path,
        data={"source": "folder", "root": str(tmp_path / "data")},
        train={"epochs": 1, "batch_size": 8, "eval_every": 1, "ema_decay": None},
    )
    done = sparsevit("pretrain", "--config", config, cwd=tmp_path, check=3)
    assert "[red]" in done.stderr
    assert "3.png" in done.stderr
    broken.unlink()
    done = sparsevit("pretrain", "--config", config, cwd=tmp_path)  # repaired, and nothing trained is lost
    assert "going on from step" in done.stderr or "validation data changed" in done.stderr
    (tmp_path / "data" / "train" / "[red]" / "5.png").unlink()
    done = sparsevit("pretrain", "--config", config, cwd=tmp_path, check=4)  # the training images are others now
    assert "another data" in done.stderr
    sparsevit("pretrain", "--config", config, "--fresh", cwd=tmp_path)


def _wait_for(pattern: str, folder: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < end, f"{pattern} never came"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: int, code: int) -> None:
    config = write_tiny(tmp_path, train={"epochs": 40, "batch_size": 32, "eval_every": 40, "save_every": 0.1})
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsevit_cli.cli", "pretrain", "--config", str(config)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    checkpoints = tmp_path / "runs" / "tiny" / "pretrain" / "checkpoints"
    _wait_for("step-*/MANIFEST.json", checkpoints, process)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert "is saved" in told
    newest = latest_checkpoint(checkpoints)
    assert newest is not None


@pytest.mark.slow
def test_run_killed_in_each_command_goes_on_and_ends_the_same(tmp_path: Path, finished: Path) -> None:
    """SIGKILL as soon as each command has begun to leave something, then the same command again."""
    config = write_tiny(tmp_path)
    trainings = [f"{name}/checkpoints/step-*" for name in ("pretrain", "adapt", "finetune", "rival")]
    trainings.insert(2, "search/ledger.sqlite")
    measurements = [f"{name}/env.json" for name in ("evaluate", "profile", "export")]
    for mark in trainings + measurements:
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsevit_cli.cli", "run", "--config", str(config)],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        _wait_for(mark, tmp_path / "runs" / "tiny", process)
        process.kill()
        process.communicate(timeout=60)
    sparsevit("run", "--config", config, cwd=tmp_path)
    ours, straight = (document(folder, "run", "metrics.json")["rows"] for folder in (tmp_path, finished))
    compared = {row["label"]: (row["top1"], row["ratios"]) for row in straight if "dense at" not in row["label"]}
    assert {row["label"]: (row["top1"], row["ratios"]) for row in ours if "dense at" not in row["label"]} == compared
