"""benchmarks/collect.py, docs/make_results.py and make_pictures.py: tables and pictures are made of runs, all kept."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparsevit_cli.search import search_sparsity
from sparsevit_cli.swin import set_sparsity, sparsify_
from tiny import tiny_swin

ROOT = Path(__file__).parents[1]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("benchmarks/collect.py")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "PLOT", tmp_path / "benchmark.png")
    for name in ("README", "PAGE"):
        path = tmp_path / f"{name}.md"
        monkeypatch.setattr(module, name, path)
        path.write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n")
    return module


def run_of(
    folder: Path, speedup: float, kernels: str = "portable, 4", *, steady: bool = True, smaller: str | None = None
) -> Path:
    def row(label: str, **fields: Any) -> dict[str, Any]:
        kind = "ours" if label.startswith("ours") else "B1"
        base = {"kind": kind, "image_size": [672, 672], "batch": 1, "dtype": "fp32", "gmacs": 40.0, "latency_ms": 700.0,
                "speedup": 1.0, "speedup_low": 0.9, "speedup_high": 1.1, "stable": True,
                "realised": None, "tax": None, "roofline": None, "peak_memory_mb": 250.0}  # fmt: skip
        return {"label": label, **base, **fields}

    ours = row("ours, config 2", speedup=speedup, latency_ms=700 / speedup, realised=1.1, realised_low=1.0,
               realised_high=1.2, tax=0.05, tax_low=-0.01, tax_high=0.1, peak_memory_mb=190)  # fmt: skip
    report = {
        "device": {"name": "A CPU (R)", "cores": 2, "type": "cpu"}, "model": "swin",
        "versions": {"torch": "2.15.0", "timm": "1.0.31"}, "settings": {"kernels": kernels},
        "cells": [{"best_dense": "timm eager", "rows": [
            row("timm eager", stable=steady), ours, row("oracle, config 2"), *([row(smaller)] if smaller else [])]}],
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
    collect.write_pages()
    text = (tmp_path / "PAGE.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "3 runs; best dense: timm eager, 700 ms" in text
    assert "| 1.80x [1.70, 1.90] | 1.10 [1.10, 1.10] | +5.0% [+5.0%, +5.0%] | - | 0.76 |" in text
    assert "oracle" not in text


@pytest.mark.parametrize(("speedup", "told"), [(1.8, "(goal 1.7)"), (1.6, "(goal 1.7: missed)")])
def test_goals_are_told_with_what_became_of_them(
    speedup: float, told: str, collect: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "GOALS", {("cpu", "swin", "672x672", 1, "fp32"): {"ours, config 2": 1.7}})
    collect.keep(run_of(tmp_path / "run", speedup))
    collect.write_pages()
    text = (tmp_path / "PAGE.md").read_text()
    gain = f"{speedup:.2f}x [0.90, 1.10] {told}"
    assert f"| swin, 672x672, batch 1, fp32, portable | 1 | 700 | - | {gain} | - | - |" in text
    assert f"| {gain} | 1.10 [1.00, 1.20] | +5.0% [-1.0%, +10.0%] |" in text
    assert f"Goals over the best dense timm in torch alone: {int(speedup > 1.7)} of 1 reached." in text


def test_a_run_is_as_steady_as_its_best_dense_and_its_own_rows_are_shown(collect: ModuleType, tmp_path: Path) -> None:
    collect.keep(run_of(tmp_path / "first", 1.9, steady=False, smaller="timm at 416x416, fused"))
    collect.keep(run_of(tmp_path / "second", 1.7, smaller="timm at 448x448, fused"))
    collect.write_pages()
    text = (tmp_path / "PAGE.md").read_text()
    assert "| ours, config 2 | 40.0 | 390 | 1.80x [1.70, 1.90]* |" in text
    assert "| timm at 416x416, fused (1 of 2 runs) | 40.0 | 700 | 1.00x [0.90, 1.10]* |" in text
    assert "| timm at 448x448, fused (1 of 2 runs) | 40.0 | 700 | 1.00x [0.90, 1.10] |" in text


def test_engines_are_cells_of_their_own(collect: ModuleType, tmp_path: Path) -> None:
    for kernels, speedup in (("portable, 4", 1.5), ("triton 3.9.0, 4", 2.0)):
        collect.keep(run_of(tmp_path / kernels, speedup, kernels))
    collect.write_pages()
    text = (tmp_path / "PAGE.md").read_text()
    assert "**swin, 672x672, batch 1, fp32, portable**; 1 run" in text
    assert "**swin, 672x672, batch 1, fp32, triton**; 1 run" in text


def test_the_readme_shows_dense_its_best_rival_and_ours_side_by_side(
    collect: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "IN_README", (("cpu", "swin", "672x672", 1, "fp32"),))
    collect.keep(run_of(tmp_path / "first", 1.9, steady=False, smaller="timm at 416x416, fused"))
    collect.keep(run_of(tmp_path / "second", 1.7, smaller="timm at 448x448, fused"))
    collect.keep(run_of(tmp_path / "third", 1.6, smaller="timm at 448x448, fused"))
    collect.write_pages()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "A CPU (R), 2 cores, torch 2.15.0, timm 1.0.31" in text
    assert "| dense: timm as installed | 40.0 | 700 | 1.00x [1.00, 1.00]* |" in text
    assert "| dense, best rival: timm, the fastest of eager, fused and compiled | 40.0 | 700 | 1.00x |" in text
    assert "| dense, smaller images: timm at 448x448, fused | 40.0 | 700 | 1.00x [1.00, 1.00], 2 of 3 runs |" in text
    assert "| sparse, our kernels: config 2 | 40.0 | 412 | 1.70x [1.60, 1.90]* |" in text
    assert "60% everywhere" not in text


def run_in_runtimes(folder: Path, precision: str, times: dict[str, float]) -> Path:
    """A run in several runtimes; the first label is the best dense."""
    best = next(iter(times))

    def row(label: str, ms: float) -> dict[str, Any]:
        runtime = label.rpartition(", ")[2]
        runtime = runtime if runtime in ("onnxruntime", "openvino") else "torch"
        return {
            "label": label, "kind": "ours" if label.startswith("ours") else "B2", "image_size": [672, 672], "batch": 1,
            "dtype": precision, "runtime": runtime, "threads": 2, "gmacs": 40.0, "latency_ms": ms,
            "speedup": times[best] / ms, "stable": True, "realised": 0.97 if "ours" in label else None, "tax": None,
            "roofline": None, "peak_memory_mb": 250.0 if runtime == "torch" else None,
        }  # fmt: skip

    report = {
        "device": {"name": "A CPU (R)", "cores": 2, "type": "cpu"}, "model": "swin",
        "versions": {"torch": "2.15.0", "timm": "1.0.31", "openvino": "2026.4", "onnxruntime": "1.31", "git": "abc"},
        "settings": {"kernels": "native, 4"},
        "cells": [{"best_dense": best, "rows": [row(label, ms) for label, ms in times.items()]}],
    }  # fmt: skip
    folder.mkdir()
    (folder / "rivals.json").write_text(json.dumps(report))
    return folder


def test_a_cell_of_eight_bits_has_one_name_whatever_each_runtime_computes_the_rest_in(collect: ModuleType) -> None:
    rows = [{"image_size": [672, 672], "batch": 1, "dtype": dtype} for dtype in ("int8+fp32", "int8+bf16")]
    run = {"model": "swin", "device": {"type": "cpu"}, "settings": {"kernels": "native, 4"}}
    for order in (rows, rows[::-1]):
        assert collect._cell_of(run, {"rows": order}) == ("cpu", "swin", "672x672", 1, "int8+bf16", "native")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "precisions"), [("bench", ["fp32 bf16 int8"]), ("bench-gpu", ["fp32 bf16", "fp32 bf16"])]
)
def test_make_measures_eight_bits_where_a_runtime_has_them(target: str, precisions: list[str]) -> None:
    """A GPU's benchmark is of torch alone, which has none."""
    told = subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.findall(r"for precision in ([\w ]+);", told) == precisions


FP32 = {"timm, openvino": 530.0, "timm eager": 650.0, "timm, onnxruntime": 628.0, "ours, ratio 0": 460.0,
        "ours, config 2": 330.0, "ours, config 2, openvino": 360.0, "ours, config 2, onnxruntime": 540.0,
        "timm at 448x448, openvino": 240.0}  # fmt: skip
INT8 = {"timm, openvino": 190.0, "ours, config 2, openvino": 136.0}


def test_runtimes_are_shown_with_ours_in_the_best_of_them(
    collect: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = ("cpu", "swin", "672x672", 1)
    monkeypatch.setattr(collect, "GOALS_IN_RUNTIMES", {(*cell, "fp32"): {"ours, config 2": 1.7}})
    monkeypatch.setattr(collect, "GOALS", {(*cell, "fp32"): {"ours, config 2": 9.0}})
    monkeypatch.setattr(collect, "IN_README", ((*cell, "fp32"), (*cell, "bf16"), (*cell, "int8+bf16")))
    collect.keep(run_of(tmp_path / "old", 1.9))
    for number in range(2):
        collect.keep(
            run_in_runtimes(tmp_path / f"fp32-{number}", "fp32", {**FP32, "timm, onnxruntime": 628.0 + number})
        )
        collect.keep(run_in_runtimes(tmp_path / f"int8-{number}", "int8+bf16", {**INT8, "oracle, x": 1.0 + number}))
    collect.write_pages()
    text = (tmp_path / "PAGE.md").read_text()
    assert (
        "torch 2.15.0, timm 1.0.31, onnxruntime 1.31, openvino 2026.4, 2 threads in every runtime, revision abc" in text
    )
    assert "Gain is the best dense timm of the same precision in torch, ONNX Runtime or OpenVINO's time over" in text
    gain = "torch: 1.61x [1.61, 1.61] (goal 1.7: missed)"
    assert f"| swin, 672x672, batch 1, fp32, native | 2 | 530 | torch: 1.15x [1.15, 1.15] | {gain} | - |" in text
    assert "best dense: timm, openvino, 530 ms" in text
    assert "| timm, onnxruntime | 40.0 | 628 | 0.84x [0.84, 0.84] | - |" in text
    assert "| ours, config 2, onnxruntime | 40.0 | 540 | 0.98x [0.98, 0.98] | 0.97 [0.97, 0.97] |" in text
    assert (
        "In any precision, swin, 672x672, batch 1, the fastest dense over the fastest of ours: config 2 1.40x "
        "[1.40, 1.40] (190 ms, OpenVINO int8+bf16, over 136 ms, OpenVINO int8+bf16)" in text
    )
    assert "portable" not in text, "the newer revision has this cell"
    front = (tmp_path / "README.md").read_text()
    for line in (
        "| swin, 672x672, batch 1 | GMACs | fp32, ms | fp32, gain | int8+bf16, ms | int8+bf16, gain |",
        "| dense: timm as installed | 40.0 | 650 | 0.82x [0.82, 0.82] | - | - |",
        "| dense: timm in ONNX Runtime | 40.0 | 628 | 0.84x [0.84, 0.84] | - | - |",
        "| dense: timm in OpenVINO | 40.0 | 530 | 1.00x [1.00, 1.00] | 190 | 1.00x [1.00, 1.00] |",
        "best rival: timm, the fastest of eager, fused and compiled, ONNX Runtime, OpenVINO | 40.0 | 530 | 1.00x ",
        "| sparse, our kernels: config 2 | 40.0 | 330 | 1.61x [1.61, 1.61] | - | - |",
        "| sparse, ONNX Runtime: config 2 | 40.0 | 540 | 0.98x [0.98, 0.98] | - | - |",
        "| sparse, OpenVINO: config 2 | 40.0 | 360 | 1.47x [1.47, 1.47] | 136 | 1.40x [1.40, 1.40] |",
    ):
        assert line in front
    assert "In any precision" in front


def test_a_cell_is_told_from_its_newest_revision(collect: ModuleType, tmp_path: Path) -> None:
    for name, precision, times in (
        ("a", "fp32", FP32),
        ("b", "bf16", FP32),
        ("c", "fp32", {**FP32, "timm, openvino": 500.0}),
    ):
        folder = run_in_runtimes(tmp_path / name, precision, times)
        report = json.loads((folder / "rivals.json").read_text())
        report["versions"]["git"] = "new" if name == "c" else "old"
        (folder / "rivals.json").write_text(json.dumps(report))
        collect.keep(folder)
    collect.write_pages()
    text = (tmp_path / "PAGE.md").read_text()
    new, old = text.split("revision old")
    assert "**swin, 672x672, batch 1, fp32, native**; 1 run; best dense: timm, openvino, 500 ms" in new
    assert "fp32" not in old
    assert "**swin, 672x672, batch 1, bf16, native**; 1 run; best dense: timm, openvino, 530 ms" in old


def between(page: str, begin: str, end: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()


def test_the_pages_hold_what_the_kept_runs_say() -> None:
    """Whoever edits a generated table by hand, or forgets to make it anew, fails here."""
    collect, results = script("benchmarks/collect.py"), script("docs/make_results.py")
    kept, demo = sorted(collect.RESULTS.glob("*.json")), results.documents("digits")
    assert between("docs/benchmarks.md", collect.BEGIN, collect.END) == "\n\n".join(map(collect.table, kept))
    front = "\n\n".join(filter(None, map(collect.front_table, kept)))
    assert between("README.md", collect.BEGIN, collect.END) == front
    assert "best rival" in front
    assert between("docs/benchmarks.md", *results.marks("demo")) == results.tables(demo)
    assert between("README.md", *results.marks("demo")) == results.sentences(demo)
    assert between("README.md", *results.marks("dense")) == results.dense_summary()
    for experiment, shown in results.DENSE_TASKS.items():
        told = results.dense_tables(results.documents(experiment), shown)
        assert between("docs/benchmarks.md", *results.marks(experiment)) == told


def test_the_plot_shows_the_last_run_of_one_cell(
    collect: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect.keep(run_of(tmp_path / "run", 1.5))
    collect.draw_plot()
    assert not collect.PLOT.exists()  # another cell
    monkeypatch.setattr(collect, "PLOTTED", ("cpu", "swin", "672x672", 1, "fp32"))
    collect.draw_plot()
    assert collect.PLOT.read_bytes()[:4] == b"\x89PNG"


def test_the_table_of_searches_is_made_of_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = script("benchmarks/search.py")
    written = module.PAGE.read_text("utf-8")
    monkeypatch.setattr(module, "PAGE", tmp_path / "search.md")
    module.PAGE.write_text(written, "utf-8")
    module.write_tables()
    assert module.PAGE.read_text("utf-8") == written
    curve = [3.0, 3.0, 1.0, 1.0, 0.05]
    assert module._curve_of(module._changes(curve)) == curve
    assert module.near(curve) == 5


def test_the_search_finds_what_is_best_in_the_tabulated_space_of_a_trained_model() -> None:
    table = script("benchmarks/search_table.py")
    for share in table.SHARES:
        world = table.Tabulated(0, share)
        feasible = [config for config in world.space if world.cost(config) <= world.budget.limit]
        assert world.optimum == max(map(world.true_metric, feasible))
        found = search_sparsity(world.space, world.evaluate, world.cost, world.budget, max_evaluations=40)
        assert world.optimum - world.true_metric(found.best) <= 0.05


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 1.0), (0.5, 0.5)])
def test_the_picture_shows_the_windows_that_are_kept(ratio: float, share: float) -> None:
    """Of 4 x 4 windows in the first stage and 2 x 2 in the second."""
    model = sparsify_(tiny_swin(img_size=64, window_size=4, depths=(2, 2)).eval())
    set_sparsity(model, ratio)
    maps = script("docs/make_pictures.py").kept_pixels(model, torch.randn(2, 3, 64, 64))
    assert [(tuple(stage.shape), float(stage.mean())) for stage in maps] == [((2, 16, 16), share), ((2, 8, 8), share)]
