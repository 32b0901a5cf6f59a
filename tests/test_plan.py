"""--dry-run where the data are missing: the plan as far as it is known, and what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import test_instances
import test_semantic
import tiny
from sparsevit_cli.cli import app

MISSING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "classification": (tiny.TINY, {"source": "folder", "root": "nowhere"}),
    "instances": (test_instances.TINY, {"source": "coco", "root": "nowhere"}),
    "semantic": (test_semantic.TINY, {"source": "folders", "root": "nowhere", "classes": ["a", "b"]}),
}


def planned(folder: Path, command: str, fields: dict[str, Any], data: dict[str, Any], *words: str) -> tuple[str, str]:
    """What a dry run without data prints, and its error."""
    config = folder / "config.yaml"
    config.write_text(json.dumps({**fields, "data": data}), encoding="utf-8")
    typed = [command, "--config", str(config), "--output", str(folder / "runs"), "--dry-run", *words]
    done = CliRunner().invoke(app, typed, prog_name="sparsevit")
    assert done.exit_code == 3, done.output
    assert not (folder / "runs").exists()
    return done.stdout, done.stderr


@pytest.mark.parametrize("task", MISSING)
def test_a_dry_run_without_data_tells_what_is_known(tmp_path: Path, task: str) -> None:
    fields, data = MISSING[task]
    plan, error = planned(tmp_path, "run", fields, data)
    lines = dict(line.split(": ", 1) for line in plan.splitlines())
    assert lines["command"] == "run"
    assert lines["data"].startswith("missing, ")
    assert "nowhere" in lines["data"]
    assert lines["data"].removeprefix("missing, ") in re.sub(r"\s+", " ", error)
    assert "M parameters" in lines["model"]
    assert re.match(r"\d+\.\d{3} G dense", lines["multiply-adds per image"])
    assert lines["pretrain"].startswith(
        f"{fields['train']['epochs']:g} epochs in batches of {fields['train']['batch_size']}"
    )
    assert "MB of checkpoints" in lines["adapt"]
    assert "candidates at most" in lines["search"]
    assert ("min at most" in lines["search"]) == ("samples" in fields["search"])
    assert lines["evaluate"].endswith("need the data")


def test_a_dry_run_whose_classes_are_named_by_missing_data(tmp_path: Path) -> None:
    data = {"source": "folders", "root": "nowhere", "classes_file": "nowhere/names.txt"}
    plan, error = planned(tmp_path, "adapt", test_semantic.TINY, data, "--json")
    lines = json.loads(plan)["plan"]
    assert any(line.startswith("data: missing") for line in lines)
    assert any("its outputs are named by the data" in line for line in lines)
    assert any(line.startswith("adapt: 0.05 epochs in batches of 32 images") for line in lines)
    assert "nowhere" in error


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_latency_table_in_a_file_has_a_plan_of_its_own(tmp_path: Path, runtime: str) -> None:
    config = tiny.write_tiny(tmp_path, output=str(tmp_path / "runs"))
    typed = ["profile", "--config", str(config), "--latency-table", str(tmp_path / "table.json"), "--dry-run"]
    done = CliRunner().invoke(app, [*typed, "--set", f"search.runtime={runtime}"], prog_name="sparsevit")
    assert done.exit_code == 0, done.output
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines["command"].startswith("profile --latency-table, into ")
    assert lines["runtime"] == f"{runtime}, fp32"
    wanted = r"every block pair" if runtime == "torch" else r"\d+ whole programs, \d+\.\d min at least"
    assert re.match(wanted, lines["table"])
    assert not {path.name for path in tmp_path.iterdir()} - {"tiny.yaml"}


def test_check_data_without_data_is_planned_too(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path, "check-data", *MISSING["classification"])
    assert "data: missing" in plan
    assert "model" not in plan
