"""A search that spends its latency budget in another runtime, on exported programs, or by a table of elsewhere."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import test_instances
from sparsevit_cli import views
from sparsevit_cli.data.source import Categories
from sparsevit_cli.errors import BudgetError, CheckpointError, ConfigError, MeasurementError
from sparsevit_cli.exporting import export as exporting
from sparsevit_cli.exporting import quantization
from sparsevit_cli.exporting.adjustable import AdjustablePrograms
from sparsevit_cli.profiling import program_table
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runtimes import RUNTIMES
from sparsevit_cli.runtimes.openvino import OpenVino
from sparsevit_cli.search.latency_table import LatencyTable
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.tasks.task import Score
from sparsevit_cli.winner import read_winner, write_winner
from sparsevit_cli.workflows import latency_sources, pipeline
from sparsevit_cli.workflows.export import ExportSummary, export_winner
from sparsevit_cli.workflows.latencies import GivenLatencies
from sparsevit_cli.workflows.latency_budget import BudgetCheck, check_budget
from sparsevit_cli.workflows.latency_sources import (
    ProgramSource,
    computed_in,
    cost_scope,
    latency_source,
    tell_of_export,
)
from sparsevit_cli.workflows.pipeline import _check_settings, _Contender, _summary, run_pipeline
from sparsevit_cli.workflows.search import SearchSummary, is_searched, opened_search, search, search_settings
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.table import measure_table
from sparsevit_cli.workflows.training import adapt, pretrain
from tiny import tiny_config

pytest.importorskip("openvino")

LATENCY = {"budget_macs": None, "budget_latency": "75%", "runtime": "openvino", "max_evaluations": 16, "samples": None}
SIDE = 64
"""Maps of 16 and 8 tokens a side, in windows of 2: 64 and 16 of them."""


def session_in(runs: Path, search: Mapping[str, Any] = LATENCY, **sections: Any) -> Session:
    model = {"img_size": SIDE}
    return Session(tiny_config(output=str(runs), search=dict(search), model=model, **sections), SilentReporter())


class Meter:
    """A clock that OpenVINO's programs move: a multiply-add of a loaded graph takes a nanosecond."""

    def __init__(self) -> None:
        self.now_ns = 0

    def clock(self) -> int:
        return self.now_ns

    def spend(self, ms: float) -> None:
        self.now_ns += round(1e6 * ms)

    def loaded(
        self, path: Path, activations: str, threads: int, shape: tuple[int, ...] | None, lengths: Mapping[str, int]
    ) -> Callable[[Tensor], list[Tensor]]:
        from sparsevit_cli.runtimes.openvino import load_openvino

        openvino = load_openvino()

        model = openvino.Core().read_model(path)
        shapes: dict[Any, Any] = {name: openvino.PartialShape([length]) for name, length in lengths.items()}
        model.reshape({**shapes, model.inputs[0]: openvino.PartialShape(list(shape or ()))})
        macs = sum(_macs(node) for node in model.get_ops() if node.get_type_name() == "MatMul")

        def run(images: Tensor) -> list[Tensor]:
            self.now_ns += macs
            return []

        return run


def _macs(node: Any) -> int:
    inner = node.input(0).get_shape()[-2 if node.get_attributes()["transpose_a"] else -1]
    return int(math.prod(node.output(0).get_shape()) * inner)


@pytest.fixture(scope="module")
def meter() -> Iterator[Meter]:
    found = Meter()

    def measured(candidates: Any, **settings: Any) -> dict[str, Latency]:
        return measure_interleaved(candidates, **{**settings, "clock": found.clock})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVino, "_run", lambda self, *given: found.loaded(*given))
        patch.setattr(program_table, "measure_interleaved", measured)
        yield found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, meter: Meter) -> tuple[Path, SearchSummary]:
    """Folder of runs in which adapt is done, and a search in OpenVINO."""
    runs = tmp_path_factory.mktemp("runs")
    for step in (pretrain, adapt):
        session = session_in(runs)
        step(session)
        session.locks.close()
    return runs, searched(session_in(runs))


@pytest.fixture
def runs(done: tuple[Path, SearchSummary], tmp_path: Path) -> Path:
    """A copy of the folder, to change."""
    return shutil.copytree(done[0], tmp_path / "runs")


@pytest.fixture
def table(done: tuple[Path, SearchSummary], tmp_path: Path) -> Path:
    """A copy of its latency table."""
    return Path(shutil.copy(done[0] / "tiny" / "search" / "latency_table.json", tmp_path / "table.json"))


def searched(session: Session) -> SearchSummary:
    try:
        return search(session)
    finally:
        session.locks.close()


def test_the_winner_keeps_the_budget_by_the_clock_of_the_runtime(done: tuple[Path, SearchSummary]) -> None:
    """Table, corners and finalists are of one graph."""
    _, summary = done
    (row,) = summary.feasibility
    assert row.limit == pytest.approx(0.75 * row.dense)
    assert summary.table_error is not None
    assert summary.table_error.largest < 0.02
    assert summary.measured_in == f"openvino {RUNTIMES['openvino'].version()}, fp32, batch 1"
    table = LatencyTable.from_json((summary.folder.path / "latency_table.json").read_text())
    assert summary.latency_table_plateaus == table.plateaus, "in --json too"
    winner = summary.winner
    assert winner.latency_ms is not None
    assert winner.latency_ms <= row.limit
    about = read_winner(summary.folder.path / "winner.yaml")[1]
    assert about["measured_with"] == {
        "batch_size": 1, "image_size": [SIDE, SIDE], "precision": "fp32", "device": "cpu", "runtime": "openvino",
        "activations": "fp32", "scope": "model",
    }  # fmt: skip


def test_a_second_search_reads_table_and_latencies_again(
    runs: Path, done: tuple[Path, SearchSummary], meter: Meter
) -> None:
    spent = meter.now_ns
    again = searched(session_in(runs))
    assert meter.now_ns == spent, "nothing was measured"
    assert again.winner == done[1].winner


def test_a_table_of_another_machine_decides_without_a_clock(
    runs: Path, table: Path, meter: Meter, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = LatencyTable.from_json(table.read_text())
    there = {"device": {"name": "a Xeon", "threads": 64}, "runtime_version": "2020.1"}
    table.write_text(replace(elsewhere, identity={**elsewhere.identity, **there}).to_json())
    spent = meter.now_ns
    summary = searched(session_in(runs, {**LATENCY, "latency_table": str(table)}))
    assert meter.now_ns == spent, "nothing was measured"
    winner = summary.winner
    assert (winner.latency_ms, winner.speedup, winner.within_budget) == (None, None, True)
    assert winner.predicted_ms is not None
    assert winner.predicted_ms <= summary.feasibility[0].limit
    about = read_winner(summary.folder.path / "winner.yaml")[1]
    assert about["latency_measured_here"] is False
    assert about["predicted_latency_ms"] == pytest.approx(winner.predicted_ms, abs=1e-3)
    assert about["latency_table"] == {
        "path": str(table), "device": "a Xeon", "threads": 64, "precision": "fp32",
    }  # fmt: skip
    views.show_search(summary)
    told = " ".join(capsys.readouterr().out.split())
    assert "Latencies are predictions by the table of a Xeon (64 threads, fp32): none was measured now" in told
    budget = check_budget(session_in(runs), winner.config)
    assert budget is not None
    assert meter.now_ns == spent, "nothing was measured"
    assert budget.kept is None
    assert "is kept: it is by the latency table of a Xeon (64 threads, fp32), and nothing is measured" in budget.told
    assert (budget.document()["by_table"], budget.document()["image_size"]) == (
        "a Xeon (64 threads, fp32)",
        [SIDE, SIDE],
    )


def test_a_table_is_measured_without_weights_and_a_search_reads_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, torch_alone = tmp_path / "new.json", {"runtime": "torch", "budget_latency": "120%"}
    report = measure_table(session_in(tmp_path / "elsewhere", {**LATENCY, **torch_alone}), path=str(path))
    views.show_table(report)
    assert "runtime: torch" in capsys.readouterr().out
    assert report.table.error is not None
    assert report.table.error.n == 2
    summary = searched(session_in(runs, {**LATENCY, **torch_alone, "latency_table": str(path)}))
    assert summary.table_error == report.table.error
    assert summary.winner.config.is_dense


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"batch_size": 2}, "batch 1 there, 2 here"),
        ({"runtime": "torch"}, "runtime 'openvino' there, 'torch' here"),
        ({"precision": "bf16"}, "precision 'fp32' there, 'bf16' here"),
    ],
)
def test_a_table_of_other_settings_is_refused(runs: Path, table: Path, setting: dict[str, Any], field: str) -> None:
    before = (runs / "tiny" / "search" / "winner.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=rf"search\.latency_table: .*{field}") as caught:
        searched(session_in(runs, {**LATENCY, "latency_table": str(table), **setting}))
    assert caught.value.exit_code == 4
    assert (runs / "tiny" / "search" / "winner.yaml").read_bytes() == before


def test_a_table_that_computed_eight_bits_otherwise_is_refused_if_that_is_asked_for(runs: Path, table: Path) -> None:
    """The same eight bits take 190 ms with bfloat16 around them, and 252 ms with float32."""
    found = LatencyTable.from_json(table.read_text())
    there = {"precision": "int8", "activations": "fp32"}
    table.write_text(replace(found, identity={**found.identity, **there}).to_json())
    settings = {**LATENCY, "precision": "int8", "latency_table": str(table)}

    def given(activations: str, runtime: str = "openvino") -> GivenLatencies:
        session = session_in(runs, {**settings, "runtime": runtime}, export={"activations": activations})
        model = session.model(Categories(tuple("0123456789")))
        return GivenLatencies.read(session, model, session.space(model, 0.8))

    for activations in ("auto", "fp32"):
        assert given(activations).machine["precision"] == "int8+fp32"
    with pytest.raises(CheckpointError, match="activations 'fp32' there, 'bf16' here"):
        given("bf16")
    table.write_text(replace(found, identity={**found.identity, **there, "runtime": "onnxruntime"}).to_json())
    assert given("bf16", "onnxruntime").machine["precision"] == "int8+fp32", "it has no choice"


def test_a_table_of_another_model_or_size_is_refused(runs: Path, table: Path) -> None:
    found = LatencyTable.from_json(table.read_text())
    for change in ({"depths": [2, 4]}, {"image_size": [32, 32]}, {"parameters": 1}):
        table.write_text(replace(found, identity={**found.identity, **change}).to_json())
        with pytest.raises(CheckpointError, match=next(iter(change))):
            searched(session_in(runs, {**LATENCY, "latency_table": str(table)}))


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"format": "sparsevit-latency-table-1"}', b"\xff"])
def test_a_damaged_table_is_refused(runs: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"table\.json"):
        searched(session_in(runs, {**LATENCY, "latency_table": str(path)}))


def test_a_table_is_not_written_over_something_else(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    session = session_in(tmp_path)
    for given, message in (
        ({"path": str(path)}, "no latency table"),
        ({"path": str(tmp_path / "none" / "table.json")}, "no folder"),
        ({"path": str(tmp_path / "new.json"), "ratios": "0.6"}, "--ratios"),
        ({"path": str(tmp_path / "new.json"), "rivals": True}, "--rivals"),
        ({"path": str(tmp_path / "new.json"), "runtime": "openvino"}, "--set search.runtime=openvino"),
        ({"path": str(tmp_path / "new.json"), "img_size": "64,32"}, "--img-size"),
    ):
        with pytest.raises(ConfigError, match=message):
            measure_table(session, **given)  # type: ignore[arg-type]
    assert path.read_text() == "mine"


def test_a_budget_that_no_program_meets_is_refused_with_the_range(runs: Path) -> None:
    with pytest.raises(BudgetError, match="reachable is"):
        searched(session_in(runs, {**LATENCY, "budget_latency": "1%"}))


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [("torch", "int8"), ("onnxruntime", "bf16"), ("openvino", "fp16")],
)
def test_precisions_that_a_runtime_does_not_compute_are_refused(runtime: str, precision: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"precision {precision} is not for runtime {runtime}"):
        session_in(tmp_path, {**LATENCY, "runtime": runtime, "precision": precision})


def test_a_runtime_that_is_not_installed_names_the_extra(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "packages", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"sparsevit-cli\[openvino\]") as caught:
        searched(session_in(runs))
    assert caught.value.exit_code == 2


def test_an_export_of_another_precision_than_the_budget_is_told(runs: Path) -> None:
    for export, told in (({"formats": ["pt2"]}, True), ({"formats": ["onnx", "pt2"]}, False)):
        session = session_in(runs, export={**export, "latency": False})
        searched(session)
        assert isinstance(session.reporter, SilentReporter)
        assert any("the budget is of a file in fp32 for openvino" in w for w in session.reporter.warnings) is told


def test_an_export_is_nothing_to_a_search_without_a_latency_budget(runs: Path) -> None:
    """Nor to a sensitivity. One that will be refused is told to a search with such a budget, and costs it nothing."""

    def told(**search: Any) -> list[str]:
        session = session_in(runs, {**LATENCY, **search}, export={"formats": ["pt2"], "scope": "features"})
        with opened_search(session) as work:  # as of a sensitivity
            assert not session.reporter.warnings  # type: ignore[attr-defined]
            tell_of_export(session, work.model)
        session.locks.close()
        return list(session.reporter.warnings)  # type: ignore[attr-defined]

    assert not told(budget_latency=None, budget_macs="75%")
    (warning,) = told()
    assert "export will fail: export.scope: the model of task" in warning


# -- the budget of the exported file --------------------------------------------------------------------------------


ON: Mapping[str, Any] = {"formats": ["onnx"], "latency": True}


def rewritten(runs: Path, change: Callable[[dict[str, Any]], object]) -> SparsityConfig:
    """Change what the winner's file tells; returns its ratios."""
    path = runs / "tiny" / "search" / "winner.yaml"
    config, about = read_winner(path)
    change(about)
    write_winner(path, config, {name: value for name, value in about.items() if name != "ratios"})
    return config


def unsteady(candidates: Mapping[str, object], **settings: Any) -> dict[str, Latency]:
    return {name: Latency(1, 1, 1, 0, 1, 1, 0, (1,), unsteady="a neighbour") for name in candidates}


def fixed(candidates: Mapping[str, object], **settings: Any) -> dict[str, Latency]:
    """PyTorch's clock, which stands still here."""
    return {name: Latency(1, 1, 1, 0, 1, 1, 0, (1,)) for name in candidates}


@pytest.fixture(scope="module")
def exported(done: tuple[Path, SearchSummary], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportSummary]:
    """Another copy of the folder, in which the winner is exported too."""
    runs = shutil.copytree(done[0], tmp_path_factory.mktemp("exported") / "runs")
    session = session_in(runs, export=ON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_latencies", lambda *given: ())  # ONNX Runtime's, by the real clock
        summary = export_winner(session, weights="adapt")
    session.locks.close()
    return runs, summary


def test_the_exported_file_is_measured_against_the_budget(
    exported: tuple[Path, ExportSummary], done: tuple[Path, SearchSummary], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whatever the settings of the section search are by then."""
    winner, budget = done[1].winner, exported[1].budget
    assert budget is not None
    assert budget.kept
    assert budget.latency is not None
    assert budget.latency.median_ms == pytest.approx(winner.latency_ms, rel=1e-3)
    views.show_export(exported[1])
    told = " ".join(capsys.readouterr().out.split())
    assert "(openvino, fp32, batch 1, 64x64 pixels) is kept: model.onnx takes" in told
    result = json.loads((exported[0] / "tiny" / "export" / "metrics.json").read_text())
    assert result["budget"] == exported[1].document()["budget"] == budget.document()

    runs = shutil.copytree(exported[0], tmp_path / "runs")

    def checked(change: Callable[[dict[str, Any]], object], **sections: Any) -> BudgetCheck:
        found = check_budget(
            session_in(runs, {"runtime": "torch"}, **{"export": ON, **sections}), rewritten(runs, change)
        )
        assert found is not None
        return found

    again = checked(lambda about: about["measured_with"].update(batch_size=2))
    assert again.latency is not None
    assert again.latency.median_ms == pytest.approx(2 * budget.latency.median_ms, rel=1e-3)
    lower = checked(lambda about: about["budget"].update(latency_ms=again.latency.median_ms / 1.01))  # type: ignore[union-attr]
    assert (lower.kept, lower.document()["kept"]) == (False, False)
    assert "is NOT KEPT: model.onnx takes" in lower.told
    assert lower.told.endswith(". Search with a smaller budget")
    search_folder = runs / "tiny" / "search"
    shutil.copy(search_folder / "winner.yaml", search_folder / "winner-40percent.yaml")
    least = checked(lambda about: about["budget"].update(latency_ms=1e6))
    assert least.budget.limit_ms == lower.budget.limit_ms, "of two budgets with one winner the smaller one is checked"
    assert least.kept is False
    off = checked(lambda about: None, export={**ON, "latency": False})
    assert (off.kept, off.why) == (None, "export.latency is false")

    monkeypatch.setattr(program_table, "measure_interleaved", unsteady)
    shaky = checked(lambda about: None)
    assert (shaky.kept, shaky.document()["latency_ms"]) == (None, None)
    assert "model.onnx is not steady, a neighbour" in shaky.told


def test_a_file_of_another_precision_runtime_or_scope_is_not_what_the_budget_is_of(
    exported: tuple[Path, ExportSummary], tmp_path: Path
) -> None:
    for change, told in (
        ({"precision": "int8", "activations": "bf16"}, r"model.onnx is of openvino, fp32, .* of openvino, int8\+bf16"),
        ({"scope": "features"}, "the budget is of openvino, fp32, backbone and neck"),
        ({"image_size": [32, 32]}, "batch 1, 32x32 pixels"),
    ):
        runs = shutil.copytree(exported[0], tmp_path / next(iter(change)))
        config = rewritten(runs, lambda about, new=change: about["measured_with"].update(new))  # type: ignore[misc]
        found = check_budget(session_in(runs, export=ON), config)
        assert found is not None
        assert found.kept is None
        assert re.search(told, found.why), found.why


def test_an_export_without_a_file_of_the_budget_says_so(runs: Path) -> None:
    session = session_in(runs, {"runtime": "torch"}, export={"formats": []})
    summary = export_winner(session, weights="adapt")
    assert isinstance(session.reporter, SilentReporter)
    assert any("openvino reads model.xml or model.onnx" in warning for warning in session.reporter.warnings)
    assert summary.document()["budget"]["kept"] is None
    other = session_in(runs, {"runtime": "torch"})
    assert check_budget(other, SparsityConfig.from_ratios([[0.8], [0.8]])) is None, "no winner"


def test_a_run_says_at_once_that_the_export_is_of_something_else(tmp_path: Path) -> None:
    for export, told in (({"formats": ["pt2"]}, True), ({"formats": ["onnx"]}, False)):
        session = session_in(tmp_path, export=export)
        _check_settings(session)
        assert isinstance(session.reporter, SilentReporter)
        assert any("the budget is of a file in fp32 for openvino" in w for w in session.reporter.warnings) is told


def test_a_run_has_a_table_of_the_runtime_in_which_the_winner_is_the_exported_file(
    exported: tuple[Path, ExportSummary], done: tuple[Path, SearchSummary], meter: Meter,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    session, winner = session_in(exported[0]), done[1].winner
    model = session.model(Categories(tuple("0123456789"))).eval()
    space, size = session.space(model, 0.8), session.img_size
    scored = Score(90.0, {"top1": 90.0}, 8)
    contenders = [
        _Contender("dense (timm)", model, space.dense, True, size, scored, "dense (timm)"),
        _Contender("dense, our kernels", model, space.dense, False, size, scored, "dense, our kernels"),
        _Contender("dense, trained as long", model, space.dense, True, size, scored, "dense (timm)"),
        _Contender("uniform 0.8", model, space.sparsest, True, size, scored, "uniform 0.8"),
        _Contender("winner, before finetuning", model, winner.config, True, size, scored, "winner, finetuned"),
        _Contender("winner, finetuned", model, winner.config, True, size, scored, "winner, finetuned"),
    ]
    assert winner.latency_ms is not None
    took_ms = {space.dense: 2 * winner.latency_ms, space.sparsest: winner.latency_ms / 2}

    def program(self: ProgramSource, config: SparsityConfig) -> Callable[[], object]:
        """Not the winner's: that is the file, whose multiply-adds are counted."""
        return partial(meter.spend, took_ms[config])

    monkeypatch.setattr(ProgramSource, "_load", program)
    monkeypatch.setattr(pipeline, "measure_interleaved", fixed)
    summary = _summary(session, session.folder("run"), contenders, {}, None)
    rows = {row.label: row.exported for row in summary.rows}
    dense, sparsest = rows["dense (timm)"], rows["uniform 0.8"]
    found = rows["winner, finetuned"]
    assert dense is not None
    assert found is not None
    assert sparsest is not None
    assert dense.latency_ms == pytest.approx(2 * winner.latency_ms, rel=1e-3)
    assert found.latency_ms == pytest.approx(winner.latency_ms, rel=1e-3)
    assert (found.speedup, sparsest.speedup) == (pytest.approx(2, rel=1e-3), pytest.approx(4, rel=1e-3))
    assert (rows["winner, before finetuning"], rows["dense, trained as long"]) == (found, dense)
    assert rows["dense, our kernels"] is None, "its program is dense timm's"
    assert summary.budget is not None
    assert (summary.budget.file, summary.budget.kept) == ("model.onnx", True)
    views.show_pipeline(summary)
    told = " ".join(capsys.readouterr().out.split())
    assert "Exported, in openvino" in told
    assert "Not measured there: dense, our kernels." in told
    assert "is kept: model.onnx takes" in told
    documents = {row["label"]: row for row in summary.document()["rows"]}
    assert documents["winner, finetuned"]["exported"]["latency_ms"] == found.latency_ms
    assert "exported" not in documents["dense, our kernels"]

    monkeypatch.setattr(program_table, "measure_interleaved", unsteady)
    shaky = _summary(session, session.folder("run"), contenders, {}, None)
    session.locks.close()
    cost = shaky.rows[-1].exported
    assert cost is not None
    assert (cost.latency_ms, cost.speedup, shaky.clock) == (None, None, "a neighbour")
    assert shaky.budget is not None
    assert shaky.budget.kept is None


def test_a_backbone_is_timed_with_its_neck_as_the_file_holds_both(tmp_path: Path) -> None:
    search = {"runtime": "onnxruntime", "scope": "backbone", "budget_latency": "70%"}
    session = Session(test_instances.tiny(output=str(tmp_path), search=search), SilentReporter())
    model = session.model(session.data().categories)
    with ExitStack() as resources:
        source = latency_source(session, model, resources)
        assert isinstance(source, ProgramSource)
        assert source.identity["scope"] == "features"
        assert "backbone and neck" in source.told
        assert source.workload.model is session.task.exported_features(model)
    assert macs_cost(source.workload)(session.space(model, 0.8).dense) > macs_cost(
        session.workload(model, scope="backbone")
    )(session.space(model, 0.8).dense)
    assert cost_scope(session, "backbone", "latency_ms") == "features"
    assert cost_scope(session, "backbone", "macs") == "backbone"


def test_a_whole_detector_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    search = {"runtime": "onnxruntime", "scope": "model"}
    session = Session(test_instances.tiny(output=str(tmp_path / "runs"), search=search), SilentReporter())
    told = r"search\.runtime: .* answers each image\. Set search\.scope: backbone"
    with pytest.raises(ConfigError, match=told) as caught:
        run_pipeline(session)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_a_winner_of_other_programs_or_of_another_table_is_not_kept(runs: Path, table: Path) -> None:
    assert is_searched(session_in(runs))
    assert not is_searched(session_in(runs, export={"opset": 19}))
    int8 = {**LATENCY, "precision": "int8"}
    settings = {
        search_settings(session_in(runs, int8, export={"activations": each})) for each in ("auto", "fp32", "bf16")
    }
    assert len(settings) == 3
    torch = {**LATENCY, "runtime": "torch"}
    assert search_settings(session_in(runs, torch, export={"opset": 19})) == search_settings(session_in(runs, torch))
    by_table = session_in(runs, {**LATENCY, "latency_table": str(table)})
    searched(by_table)
    assert is_searched(by_table)
    found = LatencyTable.from_json(table.read_text())
    table.write_text(replace(found, base_ms=1.1 * found.base_ms).to_json())
    assert not is_searched(by_table)


def test_bf16_on_a_cpu_without_it_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "activations", lambda self: ("fp32",))
    with pytest.raises(ConfigError, match=r"it would emulate bf16, slower than fp32. Set search.precision: fp32"):
        searched(session_in(runs, {**LATENCY, "precision": "bf16"}))


def test_eight_bits_without_nncf_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "PACKAGES", ("no_such_package",))
    session = session_in(tmp_path, {**LATENCY, "precision": "int8"})
    with pytest.raises(ConfigError, match=r"search.precision int8: no_such_package .* or set search.precision: fp32"):
        computed_in(session, RUNTIMES["openvino"])


def test_programs_of_eight_bits_are_measured(tmp_path: Path, meter: Meter) -> None:
    """What is loaded has eight bits, and the record names the quantiser that made it."""
    pytest.importorskip("nncf")
    session = session_in(tmp_path, {**LATENCY, "precision": "int8"})
    with ExitStack() as resources:
        model = session.model(Categories(tuple("0123456789")))
        source = latency_source(session, model, resources)
        space = session.space(model, 0.8)
        found = source.measure([space.dense, space.sparsest], session.patience)
        assert found[space.sparsest].speedup > 1.2
        files = list(source._programs._files.values())  # type: ignore[attr-defined]
        assert len(files) == 2
        assert all("FakeQuantize" in file.read_text() for file in files)
    assert source.told.endswith(RUNTIMES["openvino"].precisions()[-1])
    assert f"nncf {importlib.metadata.version('nncf')}" in str(source.identity["runtime_version"])


def test_a_cpu_that_is_slow_in_eight_bits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nncf")
    session = session_in(tmp_path, {**LATENCY, "precision": "int8"})
    monkeypatch.setattr(latency_sources, "slow_in_int8", lambda: "no VNNI")
    computed_in(session, RUNTIMES["openvino"])
    assert session.reporter.warnings == ["search: no VNNI"]  # type: ignore[attr-defined]


def test_a_program_that_does_not_load_is_told_by_its_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the name of a temporary file."""

    def broken(self: OpenVino, *given: Any) -> Any:
        raise RuntimeError("no such operator")

    session, path = session_in(tmp_path), tmp_path / "pattern0.xml"
    path.touch()
    monkeypatch.setattr(OpenVino, "_run", broken)
    monkeypatch.setattr(AdjustablePrograms, "file_of", lambda self, pattern: path)
    with ExitStack() as resources:
        model = session.model(Categories(tuple("0123456789")))
        source = latency_source(session, model, resources)
        with pytest.raises(MeasurementError, match=r"the program at .*no such operator.*another search.runtime"):
            source.measure([session.space(model, 0.8).dense], session.patience)
