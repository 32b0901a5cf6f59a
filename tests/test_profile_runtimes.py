"""Profiles and rivals in several runtimes: the same rounds, the same threads, and the best dense of any of them."""

from __future__ import annotations

import copy
import html
import importlib.util
import inspect
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from sparsevit_cli import views
from sparsevit_cli.cli import app
from sparsevit_cli.errors import ConfigError, MeasurementError
from sparsevit_cli.exporting import UntraceableError, light
from sparsevit_cli.exporting.light import check_timed, timed_programs
from sparsevit_cli.profiling import latency as latency_module
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runtimes import RUNTIMES, Activations, Program
from sparsevit_cli.swin import set_sparsity, sparsify_
from sparsevit_cli.workflows import in_runtimes, profile_cells, rivals
from sparsevit_cli.workflows.in_runtimes import chosen_runtimes, in_other_runtimes
from sparsevit_cli.workflows.pages import columns, profile_page, rows_of
from sparsevit_cli.workflows.plan import plan_of
from sparsevit_cli.workflows.profile import profile_model
from sparsevit_cli.workflows.profile_report import DENSE, OURS_DENSE, OURS_SPARSE, ProfileReport
from sparsevit_cli.workflows.rivals import measure_rivals
from sparsevit_cli.workflows.rows import threads_text
from sparsevit_cli.workflows.session import Session
from tiny import tiny_config, tiny_swin, write_tiny

ALL = ("torch", "onnxruntime", "openvino")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime", "openvino")),
    reason="needs sparsevit-cli[export,openvino]",
)


class Listening(SilentReporter):
    def __init__(self) -> None:
        self.told: list[str] = []

    def say(self, message: str) -> None:
        self.told.append(message)


def session_in(folder: Path, **profile: Any) -> Session:
    settings = {"batch_sizes": [1], "runtimes": list(ALL), **profile}
    return Session(tiny_config(output=str(folder), profile=settings), Listening(), fresh=True)


def told_in(session: Session) -> str:
    return "\n".join(session.reporter.told)  # type: ignore[attr-defined]


def made_up_in(milliseconds: Mapping[str, float]) -> Callable[..., dict[str, Latency]]:
    """Stands for `measure_interleaved`: everybody runs once, and takes so long; 6 ms where nothing is said."""

    def measure(candidates: Mapping[str, Callable[[], object]], **settings: Any) -> dict[str, Latency]:
        inspect.signature(measure_interleaved).bind(candidates, **settings)
        assert settings["pause_seconds"] > 0
        assert settings["together"]
        with torch.inference_mode():
            for run in candidates.values():
                run()
        rounds = (0.9, 0.95, 1.0, 1.0, 1.05, 1.1)
        return {name: Latency.from_samples([milliseconds.get(name, 6.0) * r for r in rounds]) for name in candidates}

    return measure


@pytest.fixture
def eager_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take seconds each: where they are not what is tested, the model itself runs."""

    def stand_in(
        model: torch.nn.Module, images: Tensor, runtimes: Sequence[str], precision: str, *, threads: int
    ) -> dict[str, Program]:
        def program(name: str) -> Program:
            activations: Activations = "bf16" if precision == "bf16" else "fp32"
            return Program(name, RUNTIMES[name].version(), activations, threads, lambda x: [model(x)])

        return {name: program(name) for name in runtimes}

    assert set(inspect.signature(stand_in).parameters) == set(inspect.signature(timed_programs).parameters)
    monkeypatch.setattr(in_runtimes, "timed_programs", stand_in)


# -- profile ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> ProfileReport:
    return profile_model(session_in(tmp_path_factory.mktemp("profile")), ratios="0.5")


def test_a_profile_measures_dense_and_sparse_of_each_runtime_in_the_same_rounds(profiled: ProfileReport) -> None:
    rows = profiled.rows
    assert [(row.runtime, row.kind) for row in rows] == [
        ("torch", DENSE), ("torch", OURS_DENSE), ("torch", OURS_SPARSE),
        ("onnxruntime", DENSE), ("openvino", DENSE), ("onnxruntime", OURS_SPARSE), ("openvino", OURS_SPARSE),
    ]  # fmt: skip
    assert len({row.rounds for row in rows}) == 1
    assert {(row.dtype, row.threads) for row in rows} == {("fp32", torch.get_num_threads())}
    assert {row.version for row in rows} == {torch.__version__, *(RUNTIMES[name].version() for name in ALL[1:])}
    by_label = {row.label: row for row in rows}
    for row in rows:
        assert row.gmacs == by_label["dense (timm)" if row.kind != OURS_SPARSE else "ours sparse"].gmacs
        assert row.kind != DENSE or row.speedup == 1
        assert (row.peak_memory_mb is None) == (row.runtime != "torch") == (row.mode == "exported")
    document = json.loads((profiled.folder.path / "profile.json").read_text())
    assert document["settings"]["runtimes"] == list(ALL)
    assert {row["runtime"] for row in document["rows"]} == set(ALL)


def test_the_tables_of_a_profile_tell_runtime_precision_and_threads(
    profiled: ProfileReport, capsys: pytest.CaptureFixture[str]
) -> None:
    profiled = replace(profiled, rows=tuple(replace(row, stable=True) for row in profiled.rows))  # whoever else is busy
    heads = columns(profiled)
    table = [dict(zip(heads, row, strict=True)) for row in rows_of(profiled)]
    version = RUNTIMES["openvino"].version()
    assert table[-1]["runtime"] == f"openvino {version}, {threads_text(torch.get_num_threads())}"
    assert (table[-1]["precision"], table[-1]["peak MB"]) == ("fp32", "-")
    (sentence,) = profiled.told
    assert sentence.startswith("Batch 1, 32x32: the fastest dense is ")
    assert html.escape(sentence) in profile_page(profiled)
    views.show_profile(profiled)
    assert sentence in capsys.readouterr().out


@pytest.mark.usefixtures("eager_programs")
def test_a_sparse_model_that_the_best_dense_beats_loses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"dense (timm)": 12.0, "ours sparse": 8.0, "dense (timm), openvino": 4.0, "ours sparse, openvino": 2.0,
             "dense (timm), onnxruntime": 3.0, "ours sparse, onnxruntime": 5.0}  # fmt: skip
    monkeypatch.setattr(profile_cells, "measure_interleaved", made_up_in(times))
    report = profile_model(session_in(tmp_path), ratios="0.5")
    rows = {row.label: row for row in report.rows}
    assert (rows["ours sparse"].speedup, rows["ours sparse"].gain) == pytest.approx((12 / 8, 3 / 8))
    assert (rows["ours sparse, openvino"].speedup, rows["ours sparse, openvino"].gain) == pytest.approx((2, 1.5))
    losing = [label for label, row in rows.items() if row.losing]
    assert losing == ["ours sparse", "ours sparse, onnxruntime"]
    views.show_profile(report)
    told = capsys.readouterr().out
    assert "sparse LOSES at batch 1, 32x32: 0.38x of the best dense" in told
    assert "sparse in onnxruntime LOSES at batch 1, 32x32: 0.60x of dense" in told
    assert "the fastest dense is onnxruntime's with 3.00 ms, the fastest of ours openvino's with 2.00 ms: 1.50x" in told
    page = profile_page(report)
    assert page.count("<tr class=losing") == 2


def test_a_precision_that_a_runtime_lacks_leaves_it_out_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_in(tmp_path, precision="bf16")
    monkeypatch.setattr(type(RUNTIMES["openvino"]), "activations", lambda self: ("fp32", "bf16"))
    found = chosen_runtimes(session, "profile")
    assert found.names == ("torch", "openvino")
    assert "profile: without onnxruntime: bf16: onnxruntime on this CPU computes in fp32" in told_in(session)
    assert list(found.settings["runtimes_left_out"]) == ["onnxruntime"]  # type: ignore[call-overload]
    monkeypatch.setattr(type(RUNTIMES["openvino"]), "activations", lambda self: ("fp32",))
    assert chosen_runtimes(session_in(tmp_path, precision="bf16"), "profile").names == ("torch",)
    assert chosen_runtimes(session_in(tmp_path, precision="fp16"), "profile").names == ("torch",)


@pytest.mark.usefixtures("eager_programs")
def test_bf16_is_measured_in_torch_and_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(RUNTIMES["openvino"]), "activations", lambda self: ("fp32", "bf16"))
    report = profile_model(session_in(tmp_path, precision="bf16"), ratios="0.5")
    assert {(row.runtime, row.dtype) for row in report.rows} == {("torch", "bf16"), ("openvino", "bf16")}


@pytest.mark.usefixtures("eager_programs")
def test_one_runtime_alone_is_measured_without_torch(tmp_path: Path) -> None:
    report = profile_model(session_in(tmp_path, runtimes=["onnxruntime"]), ratios="0.5")
    assert [(row.runtime, row.kind) for row in report.rows] == [("onnxruntime", DENSE), ("onnxruntime", OURS_SPARSE)]
    assert not report.stages
    assert "runtime" in columns(report)
    assert report.told == ()


# -- what is refused --------------------------------------------------------------------------------------------


def typed(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, words)), prog_name="sparsevit")
    return done.exit_code, done.output


def test_unknown_runtimes_and_precisions_are_refused_with_the_nearest(tmp_path: Path) -> None:
    config = write_tiny(tmp_path, output=str(tmp_path / "runs"))
    for words, told in (
        (("--runtime", "openvin"), "Did you mean openvino?"),
        (("--runtime", "torch,onnx-runtime"), "Did you mean onnxruntime?"),
        (("--runtime", "torch,torch"), "names one twice"),
        (("--set", "profile.precision=int9"), "Did you mean int8?"),
        (("--set", "profile.contestants=[B2,ours]"), "lacks B1, B2 or ours"),
    ):
        code, output = typed("profile", "--config", config, "--ratios", "0.5", *words)
        assert code == 2, output
        assert told in output
    assert not (tmp_path / "runs").exists()


def test_a_runtime_that_is_not_installed_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(RUNTIMES["openvino"]), "packages", ("no_such_package_of_anybody",))
    config = write_tiny(tmp_path, output=str(tmp_path / "runs"))
    code, output = typed("profile", "--config", config, "--ratios", "0.5", "--runtime", "openvino")
    assert code == 2
    assert 'pip install "sparsevit-cli[openvino]"' in " ".join(output.split())
    found = chosen_runtimes(session_in(tmp_path, runtimes=None), "rivals", all_installed=True)
    assert found.names == ("torch", "onnxruntime")
    assert found.left_out == {"openvino": "not installed"}


def test_what_no_runtime_does_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch computes in fp32, bf16, fp16"):
        chosen_runtimes(session_in(tmp_path, runtimes=["torch"], precision="int8"), "profile")
    with pytest.raises(ConfigError, match=r"profile\.precision: fp16"):
        chosen_runtimes(session_in(tmp_path, runtimes=["onnxruntime", "openvino"], precision="fp16"), "profile")
    session = session_in(tmp_path)
    session.__dict__["device"] = torch.device("cuda")
    with pytest.raises(ConfigError, match="onnxruntime runs on the CPU, the device is cuda"):
        chosen_runtimes(session, "profile")
    assert chosen_runtimes(session_in(tmp_path, runtimes=None), "profile").names == ("torch",)
    for name in ALL[1:]:
        check_timed(name, "fp32")
    with pytest.raises(ConfigError, match="no programs of it for onnxruntime"):
        check_timed("onnxruntime", "fp16")


# -- programs for the clock -------------------------------------------------------------------------------------


def sparse_swin() -> torch.nn.Module:
    model = sparsify_(tiny_swin(img_size=64, depths=(2, 2)).eval())
    set_sparsity(model, 0.5)
    return model


def test_programs_give_the_models_outputs_at_one_shape_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model, images = sparse_swin(), light.structured_images((3, 64, 64), 2, 7)
    found = timed_programs(model, images, ALL[1:], "fp32", threads=1)
    with torch.no_grad():
        expected = model(images)
    for name, each in found.items():
        assert (each.runtime, each.threads, each.activations) == (name, 1, "fp32")
        assert torch.allclose(each.run(images)[0], expected, atol=1e-3)
    if "bf16" in RUNTIMES["openvino"].activations():
        rounded = timed_programs(model, images, ["openvino"], "bf16", threads=1)["openvino"]
        assert rounded.activations == "bf16"
        assert 0 < (rounded.run(images)[0] - expected).norm() < 0.5 * expected.norm()
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = SimpleNamespace(activations=lambda: ("fp32",))
    wrong.load = lambda *_, **__: SimpleNamespace(run=lambda images: [torch.ones(len(images), 5)])
    monkeypatch.setattr(light, "runtime", lambda name: wrong)
    monkeypatch.setattr(light, "trace_fixed", lambda *_: None)
    monkeypatch.setattr(light, "save_onnx", lambda *_, **__: None)
    with pytest.raises(MeasurementError, match=r"onnxruntime, fp32: outputs are off by"):
        timed_programs(sparse_swin(), torch.zeros(1, 3, 64, 64), ["onnxruntime"], "fp32", threads=1)
    wrong.load = lambda *_, **__: SimpleNamespace(run=lambda images: [torch.ones(1, 4)])
    with pytest.raises(MeasurementError, match="are not the model's"):
        timed_programs(sparse_swin(), torch.zeros(1, 3, 64, 64), ["onnxruntime"], "fp32", threads=1)


def test_models_whose_work_hangs_on_the_images_are_not_exported_for_the_clock(tmp_path: Path) -> None:
    class Detector(torch.nn.Module):
        def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
            return [{"boxes": image.flatten()[:4]} for image in images]

    with pytest.raises(UntraceableError, match="answers each image with as many"):
        timed_programs(Detector(), torch.zeros(2, 3, 8, 8), ["openvino"], "fp32", threads=1)
    session = session_in(tmp_path)
    workload = session.workload(tiny_swin(img_size=32))
    listed = type(workload)(workload.model, [workload.inputs], (32, 32), 1)
    with pytest.raises(UntraceableError, match="more than one tensor"):
        in_other_runtimes(session, chosen_runtimes(session, "profile"), listed)


def test_a_pause_stands_before_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(latency_module.time, "sleep", lambda seconds: events.append(f"slept {seconds}"))
    ticks = iter(range(0, 10**15, 10**7))
    measure_interleaved(
        {name: lambda name=name: events.append(name) for name in "ab"}, device=torch.device("cpu"), seconds=0.01,
        rounds=2, retries=0, strict=False, clock=lambda: next(ticks), pause_seconds=0.25,
    )  # fmt: skip
    assert "a" in events
    for before, after in itertools.pairwise(events):
        assert "slept 0.25" in (before, after) or before == after  # a block is several calls of one


# -- rivals -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager_programs")
def test_the_best_dense_of_any_runtime_is_the_rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "timm eager": 12.0, "timm eager, fused": 12.0, "timm compile": 9.0, "timm compile, fused": 9.0,
        "ours, ratio 0": 10.0, "ours, 60% everywhere": 5.0,
        "oracle, 60% everywhere": 4.0, "timm, onnxruntime": 11.0, "timm, openvino": 8.0,
        "ours, 60% everywhere, onnxruntime": 9.0, "ours, 60% everywhere, openvino": 4.0,
    }  # fmt: skip
    monkeypatch.setattr(torch, "compile", lambda model, **_: copy.deepcopy(model))
    monkeypatch.setattr(rivals, "measure_interleaved", made_up_in(times))
    session = session_in(tmp_path, runtimes=None, contestants=["B1", "B2", "ours", "O"])
    report = measure_rivals(session, img_size="64")
    (cell,) = report.cells
    rows = {row.label: row for row in cell.rows}
    assert cell.best_dense == "timm, openvino"
    assert {row.kind for row in cell.rows} == {"B1", "B2", "ours", "O"}
    for label, milliseconds in times.items():
        assert (rows[label].latency_ms, rows[label].speedup) == pytest.approx((milliseconds, 8.0 / milliseconds))
    dense, sparse = rows["timm, openvino"], rows["ours, 60% everywhere, openvino"]
    assert sparse.gmacs < dense.gmacs == rows["timm eager"].gmacs
    saved = 1 - sparse.gmacs / dense.gmacs
    assert sparse.realised == pytest.approx((1 - 4 / 8) / saved)
    assert rows["ours, 60% everywhere, onnxruntime"].realised == pytest.approx((1 - 9 / 11) / saved)
    ours = rows["ours, 60% everywhere"]
    assert ours.realised == pytest.approx((1 - 5 / 10) / (1 - ours.gmacs / rows["ours, ratio 0"].gmacs))
    assert ours.tax == pytest.approx(5 / 4 - 1)
    assert sparse.tax is sparse.peak_memory_mb is sparse.roofline is None
    assert report.settings["runtimes"] == list(ALL)
    assert {(row.runtime, row.threads) for row in cell.rows} == {(name, torch.get_num_threads()) for name in ALL}
    assert (report.folder.path / "rivals.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("eager_programs")
def test_rivals_without_torch_are_chosen_and_compared_in_their_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "measure_interleaved", made_up_in({"ours, 60% everywhere, openvino": 7.0}))
    session = session_in(tmp_path, runtimes=["openvino"])
    report = measure_rivals(session, img_size="64", ratios="[[.2],[.4]]")
    labels = [row.label for row in report.cells[0].rows]
    assert labels[:3] == ["timm, openvino", "ours, 60% everywhere, openvino", "ours, [[0.2], [0.4]], openvino"]
    assert len(labels) == 4
    assert labels[3].startswith("timm at ")
    assert "rivals: exporting timm to openvino" in told_in(session)
    views.show_rivals(report)
    told = capsys.readouterr().out
    assert "best dense: timm, openvino" in told
    assert "ours, 60% everywhere, openvino LOSES: 0.86x" in told
    assert f"runtimes: openvino {RUNTIMES['openvino'].version()}; {threads_text(torch.get_num_threads())} each" in told


def test_plans_name_the_runtimes(tmp_path: Path) -> None:
    session = session_in(tmp_path / "runs")
    assert "runtimes: torch, onnxruntime, openvino" in plan_of(session, "profile", ratios="0.5").lines
    assert any("7 rows each" in line for line in plan_of(session, "profile", ratios="0.5").lines)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs sparsevit-cli[openvino]")
def test_eight_bits_are_of_exported_programs_and_for_the_clock(tmp_path: Path) -> None:
    session = session_in(tmp_path, precision="int8")
    assert chosen_runtimes(session, "profile").names == ("onnxruntime", "openvino")
    assert "profile: without torch: int8" in told_in(session)
    model = sparsify_(tiny_swin(img_size=32, depths=(1,), embed_dim=8).eval())
    set_sparsity(model, 0.5)
    images = light.structured_images((3, 32, 32), 2, 7)
    in_float = timed_programs(model, images, ["onnxruntime"], "fp32", threads=1)["onnxruntime"].run(images)[0]
    for name, found in timed_programs(model, images, ALL[1:], "int8", threads=1).items():
        assert f"int8+{found.activations}" in RUNTIMES[name].precisions()
        assert found.run(images)[0].shape == (2, 5)
        assert 0 < (found.run(images)[0] - in_float).norm() < 0.5 * in_float.norm()


@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs sparsevit-cli[openvino]")
def test_a_cpu_that_gains_little_by_eight_bits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_runtimes, "slow_in_int8", lambda: "no VNNI")
    for precision, told in (("int8", ["profile: no VNNI"]), ("fp32", [])):
        session = session_in(tmp_path, precision=precision)
        warned: list[str] = []
        monkeypatch.setattr(session.reporter, "warn", warned.append)
        chosen_runtimes(session, "profile")
        assert warned == told
