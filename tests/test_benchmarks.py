"""benchmarks/collect.py: runs are kept, never replaced, and the README's table is made of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "collect.py"


@pytest.fixture
def collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("collect", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n")
    return module


def run_of(folder: Path, speedup: float) -> Path:
    def row(label: str, **fields: Any) -> dict[str, Any]:
        base = {"image_size": [672, 672], "batch": 1, "dtype": "fp32", "gmacs": 40.0, "latency_ms": 700.0,
                "speedup": 1.0, "speedup_low": 0.9, "speedup_high": 1.1, "stable": True,
                "realised": None, "tax": None, "peak_memory_mb": 250.0}  # fmt: skip
        return {"label": label, **base, **fields}

    ours = row("ours, config 2", speedup=speedup, latency_ms=700 / speedup, realised=1.1, tax=0.05, peak_memory_mb=190)
    report = {
        "device": {"name": "A CPU (R)", "cores": 2}, "versions": {"torch": "2.15.0", "timm": "1.0.31"}, "model": "swin",
        "cells": [{"best_dense": "timm eager", "rows": [row("timm eager"), ours, row("oracle, config 2")]}],
    }  # fmt: skip
    folder.mkdir()
    (folder / "rivals.json").write_text(json.dumps(report))
    return folder


def test_every_run_is_kept_and_the_table_tells_their_median_and_range(collect: ModuleType, tmp_path: Path) -> None:
    for number, speedup in enumerate((1.9, 1.7, 1.8)):
        path = collect.keep(run_of(tmp_path / f"run-{number}", speedup))
    assert path.name == "a-cpu-r-2-cores.json"
    assert collect.keep(tmp_path / "run-0") == path  # the same run counts once
    assert len(json.loads(path.read_text())["runs"]) == 3
    collect.write_readme()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "3 runs; best dense: timm eager, 700 ms" in text
    assert "| 1.80x [1.70, 1.90] |" in text
    assert "| 0.76 |" in text  # memory against timm's
    assert "oracle" not in text


@pytest.mark.parametrize(("speedup", "told"), [(1.8, "(goal 1.7)"), (1.6, "(goal 1.7: missed)")])
def test_goals_are_told_with_what_became_of_them(
    speedup: float, told: str, collect: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "GOALS", {("swin", "672x672", 1, "fp32"): {"ours, config 2": 1.7}})
    collect.keep(run_of(tmp_path / "run", speedup))
    collect.write_readme()
    text = (tmp_path / "README.md").read_text()
    assert f"| swin, 672x672, batch 1, fp32 | 1 | 700 | - | {speedup:.2f}x [0.90, 1.10] {told} | - | - |" in text
