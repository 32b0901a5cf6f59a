"""Exports for OpenVINO, in bfloat16, and what a folder tells so that others can serve from it."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import test_instances
from dense_models import SIZE, pyramid, sparse
from sparsevit_cli.config.classification import FolderData
from sparsevit_cli.data.digits import MEAN, STD
from sparsevit_cli.data.images import decode_image
from sparsevit_cli.errors import CheckpointError, ConfigError, MeasurementError
from sparsevit_cli.exporting import (
    MANIFEST,
    SERVING,
    SPARSITY,
    WEIGHTS,
    ExportReport,
    ModelInfo,
    checks,
    export,
    export_model,
    load_exported,
    structured_images,
)
from sparsevit_cli.exporting import folder as export_folder
from sparsevit_cli.exporting import openvino_ir as ir
from sparsevit_cli.exporting.checks import runner
from sparsevit_cli.exporting.programs import save_onnx, trace
from sparsevit_cli.exporting.report import ExportedFile, serving_json
from sparsevit_cli.exporting.writing import Writer
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runtimes import runtime
from sparsevit_cli.sizes import Size
from sparsevit_cli.swin import set_sparsity, sparsify_
from sparsevit_cli.tasks.classification import Classification
from sparsevit_cli.tasks.classification.transforms import TransformSpec
from test_exporting import NAME, SIDE, TINY, Killed, eager, names, needs_onnx, tiny
from tiny import tiny_config

EXAMPLES = Path(__file__).parents[1] / "examples"
needs_openvino = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("openvino", "onnx", "onnxscript", "onnxruntime")),
    reason="needs sparsevit-cli[export,openvino]",
)
CATEGORIES = tuple(f"kind {number}" for number in range(10))


def in_bf16() -> bool:
    return "bf16" in runtime("openvino").activations()


def spec(size: Size = (SIDE, SIDE), **fields: Any) -> TransformSpec:
    """The evaluation transform of image files."""
    return TransformSpec.from_config(FolderData(root=".", **fields), size, 3).evaluation()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ExportReport]:
    """A classifier for image files, as `sparsevit export` writes it for both runtimes, to be served in float32."""
    model = tiny([[0.6], [0.5]])
    info = ModelInfo(NAME, TINY, "classification", CATEGORIES, tuple(range(3, 13)))
    report = export_model(
        model, tmp_path_factory.mktemp("served"), input_size=SIDE, formats=("openvino", "onnx"), info=info,
        preprocessing=spec().preprocessing(), measure_ms=False,
    )  # fmt: skip
    return model, report


@pytest.fixture
def already_written(served: tuple[nn.Module, ExportReport], monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the served model are copied, not made anew: tracing and translating take seconds."""

    def write(self: Writer, name: str, folder: Path) -> Path:
        path = folder / self.file_name(name)
        for suffix in (path.suffix, ".bin"):
            shutil.copy(served[1].directory / path.with_suffix(suffix).name, folder)
        return path

    monkeypatch.setattr(Writer, "write", write)
    monkeypatch.setattr(export, "traced", lambda *_arguments: None)


# -- OpenVINO's files -----------------------------------------------------------------------------------------------


@needs_openvino
def test_openvino_writes_a_pair_of_files_for_any_batch(served: tuple[nn.Module, ExportReport]) -> None:
    model, report = served
    files = {"model.onnx", "model.xml", "model.bin", WEIGHTS, SPARSITY, SERVING}
    assert names(report.directory) == {*files, MANIFEST}
    manifest = json.loads(report.manifest.read_text())
    assert set(manifest["files"]) == files
    assert manifest["checked_against_eager"]["model.xml"]["differences"][0]["relative"] < 1e-4
    assert (manifest["precision"], manifest["activations"]) == ("fp32", "fp32")
    assert [file.format for file in report.files] == ["onnx", "openvino"]
    for batch in (1, 2, 5):
        images = structured_images((3, SIDE, SIDE), batch, seed=77)
        (output,) = runner(report.directory / "model.xml")(images)
        np.testing.assert_allclose(output.numpy(), eager(model, images)[0], atol=1e-5)
    text = (report.directory / "model.xml").read_text()
    assert str(Path(torch.__file__).parent.parent) not in text
    assert str(report.directory.parent) not in text


@needs_openvino
def test_openvino_alone_and_then_without_it(tmp_path: Path) -> None:
    """The ONNX file that it is made from is not handed out; a later export removes both files of the pair."""
    model = tiny()
    settings: dict[str, Any] = {"input_size": SIDE, "measure_ms": False, "info": ModelInfo(NAME, TINY)}
    export_model(model, tmp_path, formats=("openvino",), **settings)
    assert names(tmp_path) == {"model.xml", "model.bin", WEIGHTS, SPARSITY, SERVING, MANIFEST}
    assert json.loads((tmp_path / MANIFEST).read_text())["onnx"] is None
    export_model(model, tmp_path, formats=(), **settings)
    assert names(tmp_path) == {WEIGHTS, SPARSITY, SERVING, MANIFEST}
    assert json.loads((tmp_path / SERVING).read_text())["programs"] == {}


@needs_openvino
@pytest.mark.usefixtures("already_written")
def test_killed_while_a_pair_is_put_into_place(
    served: tuple[nn.Module, ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a manifest beside an xml of one export and a bin of another."""
    model, report = served
    shutil.copytree(report.directory, tmp_path, dirs_exist_ok=True)
    moved: list[str] = []

    def failpoint(name: str) -> None:
        moved.append(name)
        if moved.count("export.mid_publish") == 2:
            raise Killed

    monkeypatch.setattr(export_folder, "failpoint", failpoint)
    with pytest.raises(Killed):
        export_model(model, tmp_path, input_size=SIDE, formats=("openvino",), measure_ms=False)
    assert "model.xml" in names(tmp_path)
    assert MANIFEST not in names(tmp_path)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is missing"):
        load_exported(tmp_path)


@needs_openvino
@pytest.mark.usefixtures("already_written")
def test_a_file_of_openvino_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: Path, activations: Any = "fp32") -> Any:
        run = runner(path, activations)
        return lambda images: [output + 0.1 * output.abs().max() for output in run(images)]

    monkeypatch.setattr(checks, "runner", wrong)
    with pytest.raises(MeasurementError, match=r"model\.xml: differs from eager"):
        export_model(tiny([[0.6], [0.5]]), tmp_path / "new", input_size=SIDE, formats=("openvino",), measure_ms=False)
    assert names(tmp_path) == set()


@needs_openvino
def test_a_whole_detector_in_openvino(tmp_path: Path) -> None:
    """One image at a time, from the ONNX file of torch's older exporter; in 16 bits its answers cannot be compared."""
    _, data, model = test_instances.built()
    set_sparsity(sparsify_(model), 0.5)
    images = torch.stack([data.val[number][0].as_subclass(Tensor) for number in range(2)])
    settings: dict[str, Any] = {"input_size": 64, "formats": ("openvino",), "measure_ms": False, "check_images": images}
    if in_bf16():
        with pytest.raises(ConfigError, match=r"export\.precision: bf16, but the model answers each image.*features"):
            export_model(model, tmp_path / "new", precision="bf16", **settings)
        assert names(tmp_path) == set()
    report = export_model(model, tmp_path, **settings)
    assert report.input_shape == (1, 3, 64, 64)
    assert names(tmp_path) == {"model.xml", "model.bin", WEIGHTS, SPARSITY, SERVING, MANIFEST}


@needs_openvino
def test_what_openvino_cannot_translate(tmp_path: Path) -> None:
    """The last line of its message says what, the first one where in its own code."""
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"OpenVINO cannot translate the model \((?!.*Exception from)"):
        ir.save_openvino(tmp_path / "model.onnx", tmp_path / "model.xml", {})


@needs_openvino
def test_backbone_and_neck_in_openvino_and_the_operators_of_its_onnx_file(tmp_path: Path) -> None:
    report = export_model(
        sparse(pyramid()), tmp_path, input_size=SIZE, formats=("onnx", "openvino"), scope="features",
        measure_ms=False, check_batch_sizes=(1, 2),
    )  # fmt: skip
    assert {"features.xml", "features.bin", "features.onnx"} <= names(tmp_path)
    assert next(iter(report.output_shapes)) == "level_0"
    check_graph(report.directory / "features.onnx", json.loads(report.manifest.read_text())["onnx"])
    assert len(ir.rankings(read(tmp_path / "features.xml"))) > 0


def read(path: Path) -> Any:
    import openvino

    return openvino.Core().read_model(path)


def check_graph(path: Path, told: dict[str, Any]) -> None:
    """What other runtimes need: no loops, no scatter that reduces, and no size that depends on more than the batch."""
    import onnx
    import onnxruntime

    model = onnx.load(str(path))
    kinds = [node.op_type for node in model.graph.node]
    assert told == {"opset": 20, "operators": {kind: kinds.count(kind) for kind in sorted(set(kinds))}}
    assert {"TopK", "ScatterND"} <= set(kinds)
    assert {"Gather", "GatherND"} & set(kinds)
    assert not set(kinds) & {"Loop", "If", "Scan", "NonZero", "Compress", "Unique"}
    scatters = [node for node in model.graph.node if node.op_type in ("ScatterND", "ScatterElements")]
    modes = {attribute.s for node in scatters for attribute in node.attribute if attribute.name == "reduction"}
    assert modes <= {b"none"}
    inner = [output for node in model.graph.node for output in node.output]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=output) for output in inner)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    size = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]

    def shapes(batch: int, seed: int) -> list[np.ndarray[Any, Any]]:
        image = structured_images((size[0], size[1], size[2]), batch, seed).numpy()
        return [np.array(output.shape) for output in session.run(None, {"image": image})]

    one, two, three, other = shapes(1, 0), shapes(2, 0), shapes(3, 0), shapes(2, 5)
    for name, a, b, c, d in zip(inner, one, two, three, other, strict=True):
        assert (b == d).all(), name
        assert (c - b == b - a).all(), name


@needs_openvino
def test_operators_and_shapes_of_a_classifier(served: tuple[nn.Module, ExportReport]) -> None:
    _, report = served
    check_graph(report.directory / "model.onnx", json.loads(report.manifest.read_text())["onnx"])


# -- bfloat16 -------------------------------------------------------------------------------------------------------


@needs_openvino
def test_windows_are_ranked_in_float32_whatever_is_computed_in(
    served: tuple[nn.Module, ExportReport], tmp_path: Path
) -> None:
    """bfloat16 scores have ties and other orders: without the marks more windows change."""
    if not in_bf16():
        pytest.skip("needs a CPU with bfloat16")
    path = served[1].directory / "model.xml"
    assert len(ir.rankings(read(path))) == 3  # of two stages: one block, and two with shifted windows
    bare = tmp_path / "bare.xml"
    bare.write_text(path.read_text().replace('name="precise"', 'name="forgotten"'))
    bare.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes())
    batches = [structured_images((3, SIDE, SIDE), 8, seed=seed) for seed in range(4)]
    kept, changed = ir.changed_windows(path, batches, "bf16")
    _, without = ir.changed_windows(bare, batches, "bf16")
    assert ir.changed_windows(path, batches, "fp32") == (kept, 0)
    assert kept == 32 * (6 + 2 + 2)
    assert changed < without / 3
    assert without > 0.02 * kept
    before = path.read_text()
    ir.keep_ranking_exact(path)
    assert path.read_text() == before


@needs_openvino
def test_other_scores(tmp_path: Path) -> None:
    """`l2` has another graph; OpenVINO cannot compute `random`, and says so before anything is written."""
    model = tiny([[0.6], [0.5]], importance="l2").eval()
    save_onnx(trace(model, (3, SIDE, SIDE), (1,)), tmp_path / "model.onnx", ["output"], 20, {})
    ir.save_openvino(tmp_path / "model.onnx", tmp_path / "model.xml", {})
    assert len(ir.rankings(read(tmp_path / "model.xml"))) == 3
    with pytest.raises(ConfigError, match=r"export\.formats: openvino, and the scores `random`.*mean_abs_l2"):
        export_model(tiny(importance="random"), tmp_path / "new", input_size=SIDE, formats=("openvino",))
    assert not (tmp_path / "new").exists()


@needs_openvino
@pytest.mark.usefixtures("already_written")
def test_an_export_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_bf16():
        pytest.skip("needs a CPU with bfloat16")
    said: list[str] = []
    reporter, model = SilentReporter(), tiny([[0.6], [0.5]])
    monkeypatch.setattr(reporter, "say", said.append)
    report = export_model(
        model, tmp_path, input_size=SIDE, formats=("openvino",), measure_ms=False, precision="bf16", reporter=reporter
    )
    (file,) = report.files
    assert file.lowered is not None
    assert file.lowered.activations == report.activations == "bf16"
    assert all(difference.relative < 1e-4 for difference in file.differences)
    assert 1e-4 < file.lowered.middle < 0.02
    assert any("kept windows are others" in line for line in said)
    told = json.loads((tmp_path / MANIFEST).read_text())
    assert (told["precision"], told["activations"]) == ("bf16", "bf16")
    lowered = json.loads(report.manifest.read_text())["checked_against_eager"]["model.xml"]["lowered"]
    assert lowered["kept"] == 8 * (6 + 2 + 2)
    dense = copy.deepcopy(model).eval()
    set_sparsity(dense, 0)
    wrong = checks.eager_reference(dense, checks.batches((3, SIDE, SIDE), (1, 3)))
    with pytest.raises(MeasurementError, match=r"model\.xml in bf16.*0\.03 is allowed.*export\.precision: fp32"):
        checks.checked_lowered(file.path, wrong, seed=0, activations="bf16", reporter=reporter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "bf16"}, r"export\.precision: bf16, and of all formats only openvino.*export\.formats"),
        ({"precision": "int4"}, r"export\.precision: 'int4'; allowed are fp32, bf16"),
        ({"activations": "fp16"}, r"export\.activations: 'fp16'; allowed are auto"),
        ({"activations": "bf16"}, r"export\.activations: bf16, and export\.precision is fp32"),
        ({"activations": "fp32", "precision": "bf16"}, r"export\.activations: fp32, and export\.precision is bf16"),
    ],
)
def test_precisions_that_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_model(tiny(), tmp_path / "new", input_size=SIDE, formats=("pt2",), **settings)
    assert names(tmp_path) == set()


@needs_openvino
def test_a_cpu_without_bfloat16_and_a_runtime_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"input_size": SIDE, "formats": ("openvino",), "precision": "bf16"}
    with monkeypatch.context() as patch:
        patch.setattr(type(runtime("openvino")), "activations", lambda _self: ("fp32",))
        with pytest.raises(
            ConfigError, match=r"bf16: openvino on this CPU computes in fp32.*Set export.precision"
        ) as refused:
            export_model(tiny(), tmp_path / "new", **settings)
    assert refused.value.exit_code == 2
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(ConfigError, match=r"openvino not installed.*sparsevit-cli\[openvino\]"):
        export_model(tiny(), tmp_path / "new", **settings)
    assert names(tmp_path) == set()


# -- latency --------------------------------------------------------------------------------------------------------


@needs_openvino
def test_latency_in_both_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and sparse of each, through the one measuring protocol; what a runtime was asked to compute in is told."""
    from sparsevit_cli.exporting import latency
    from sparsevit_cli.profiling.latency import Latency

    measured: list[dict[str, Tensor]] = []

    def outputs_of(candidates: Any, **_settings: Any) -> dict[str, Latency]:
        measured.append({label: run()[0] for label, run in candidates.items()})
        return {label: Latency.from_samples([1.0 + number] * 9) for number, label in enumerate(candidates)}

    monkeypatch.setattr(latency, "measure_interleaved", outputs_of)
    model = tiny([[0.6], [0.5]])
    precision: Any = "bf16" if in_bf16() else "fp32"
    formats = ("onnx", "openvino")
    report = export_model(model, tmp_path, input_size=SIDE, formats=formats, precision=precision)
    assert [(each.runtime, each.activations) for each in report.latencies] == [
        ("onnxruntime", "fp32"), ("openvino", precision),
    ]  # fmt: skip
    for outputs in measured:
        assert list(outputs) == ["dense", "sparse"]
        assert not torch.allclose(outputs["dense"], outputs["sparse"], rtol=1e-2)
    assert torch.allclose(measured[0]["dense"], measured[1]["dense"], rtol=0.05, atol=0.01)
    manifest = json.loads(report.manifest.read_text())
    assert [each["dense"]["median_ms"] for each in manifest["latencies"]] == [1.0, 1.0]
    assert not (tmp_path / "dense").exists()


# -- serving.json and the examples ----------------------------------------------------------------------------------


@needs_openvino
def test_serving_json_tells_all(served: tuple[nn.Module, ExportReport]) -> None:
    serving = json.loads(served[1].serving.read_text())
    assert serving == {
        "format": 2,
        "task": "classification",
        "scope": "model",
        "programs": {
            "onnx": {"file": "model.onnx", "precision": "fp32", "activations": "fp32"},
            "openvino": {"file": "model.xml", "precision": "fp32", "activations": "fp32"},
        },
        "input": {"name": "image", "shape": ["batch", 3, SIDE, SIDE], "dtype": "float32"},
        "outputs": [{"name": "output", "shape": ["batch", 10]}],
        "preprocessing": {
            "size": [SIDE, SIDE], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize": "cover",
            "to": [124, 124], "interpolation": "bicubic", "crop": "center", "padding": "none", "channel_order": "RGB",
            "value_range": [0.0, 1.0], "sliding_overlap": None, "layout": "NCHW", "dtype": "float32",
        },
        "categories": list(CATEGORIES),
        "category_ids": list(range(3, 13)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "activations", "told"),
    [
        ("bf16", "bf16", {"onnx": ("fp32", "fp32"), "pt2": ("fp32", "fp32"), "openvino": ("bf16", "bf16")}),
        ("int8", "bf16", {"onnx": ("int8", "fp32"), "pt2": ("fp32", "fp32"), "openvino": ("int8", "bf16")}),
    ],
)
def test_serving_json_tells_what_each_file_is_computed_in(
    precision: Any, activations: Any, told: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    """A .pt2 file beside eight bits is in float, and ONNX Runtime computes in float32 what is not in eight."""
    report = export_model(tiny(), tmp_path, input_size=SIDE, formats=(), measure_ms=False)
    files = tuple(ExportedFile(kind, tmp_path, "", 0, ()) for kind in told)
    changed = replace(report, files=files, precision=precision, activations=activations)
    programs: Any = serving_json(changed)["programs"]
    assert {kind: (each["precision"], each["activations"]) for kind, each in programs.items()} == told


def photograph(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    """An image file with structure, (width, height)."""
    (image,) = structured_images((3, size[1], size[0]), 1, seed)
    pixels = (image * 0.25 + 0.5).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
    return path


@needs_openvino
@pytest.mark.parametrize(("example", "package"), [("serve_onnxruntime", "onnxruntime"), ("serve_openvino", "openvino")])
def test_examples_serve_what_evaluation_computes(
    served: tuple[nn.Module, ExportReport], tmp_path: Path, example: str, package: str
) -> None:
    """Equal scores for image files of any aspect, upright or not, without torch and without this package."""
    model, report = served
    files = [
        photograph(tmp_path / f"{number}.png", size) for number, size in enumerate([(150, 97), (97, 260), (60, 60)])
    ]
    turned = Image.open(files[0])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    grey = tmp_path / "grey.png"
    Image.open(files[1]).convert("L").save(grey)
    files += [tmp_path / "turned.png", grey]
    code = (
        f"import json, sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {example} as served\n"
        "found = [served.scores(sys.argv[1], file)[1].tolist() for file in sys.argv[2:]]\n"
        "assert not {'torch', 'timm', 'torchvision', 'sparsevit_cli'} & set(sys.modules)\n"
        "print(json.dumps(found))"
    )
    arguments = [str(report.directory), *map(str, files)]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    images = torch.stack([spec().build()(decode_image(file, file.name, 64)) for file in files])
    np.testing.assert_allclose(json.loads(ran.stdout), eager(model, images)[0], atol=1e-5)
    typed = [sys.executable, str(EXAMPLES / f"{example}.py"), str(report.directory), str(files[0])]
    lines = subprocess.run(typed, check=True, capture_output=True, text=True).stdout.splitlines()
    shares = torch.tensor(eager(model, images[:1])[0][0]).softmax(0)
    best = shares.argsort(descending=True)[:5].tolist()
    assert [line.split(" ", 1)[1] for line in lines] == [CATEGORIES[number] for number in best]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(shares[best].tolist(), abs=1e-4)
    text = (EXAMPLES / f"{example}.py").read_text()
    assert len(text.splitlines()) < 40
    assert f"import {package}\n" in text


@needs_openvino
def test_the_openvino_example_compiles_what_latencies_are_of(
    served: tuple[nn.Module, ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of one shape: one of any batch may be slower, and is not what was measured."""
    import openvino

    shapes: list[tuple[bool, Any]] = []

    class Core(openvino.Core):  # type: ignore[misc]
        def compile_model(self, model: Any, *settings: Any) -> Any:
            shapes.append((model.input(0).partial_shape.is_static, settings[-1]["PERFORMANCE_HINT"]))
            return super().compile_model(model, *settings)

    monkeypatch.setattr(openvino, "Core", Core)
    example_of("serve_openvino").scores(served[1].directory, photograph(tmp_path / "picture.png", (80, 60)))
    assert shapes == [(True, "LATENCY")]


def example_of(name: str) -> Any:
    """The module of an example."""
    loaded = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("example", "package"), [("serve_onnxruntime", "onnxruntime"), ("serve_openvino", "openvino")])
def test_examples_refuse_what_they_would_serve_wrong(example: str, package: str, tmp_path: Path) -> None:
    """A detector's backbone gives maps, and its images are padded."""
    pytest.importorskip(package)
    (tmp_path / SERVING).write_text(json.dumps({"task": "instances"}))
    with pytest.raises(AssertionError, match="serves instances, which has outputs of other kinds"):
        example_of(example).scores(tmp_path, tmp_path / "none.png")
    other = {"onnxruntime": "openvino", "openvino": "onnx"}[package]
    (tmp_path / SERVING).write_text(json.dumps({"task": "classification", "programs": {other: {}}}))
    with pytest.raises(AssertionError, match=r"has no \w+ file: add \w+ to export\.formats"):
        example_of(example).scores(tmp_path, tmp_path / "none.png")


@needs_onnx
@pytest.mark.parametrize("size", [(SIDE, SIDE), (96, 160)])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_in_words_is_the_one_of_evaluation(
    tmp_path: Path, size: Size, crop_pct: float, interpolation: str
) -> None:
    """To the bit but for one rounding: Pillow resizes in both."""
    ours = spec(size, crop_pct=crop_pct, interpolation=interpolation)
    model_input = example_of("serve_onnxruntime").model_input
    for shape in ((333, 211), (90, 411), (40, 41), (224, 224)):
        file = photograph(tmp_path / "image.png", shape)
        expected = ours.build()(decode_image(file, "image", 64))
        found = model_input(file, json.loads(json.dumps(ours.preprocessing().document())))
        np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-6)


@needs_onnx
def test_a_canvas_of_digits_as_a_picture(tmp_path: Path) -> None:
    task = Classification(tiny_config())
    told = task.preprocessing()
    assert (told.size, told.mean, told.std, told.resize) == (task.image_size, (MEAN,) * 3, (STD,) * 3, "stretch")
    image = task.data(seed=0, categories=None).val[0][0]
    pixels = (image[0] * STD + MEAN).clamp(0, 1).mul(255).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    found = example_of("serve_onnxruntime").model_input(tmp_path / "digit.png", told.document())
    np.testing.assert_allclose(found[0], (image.clamp(-MEAN / STD, (1 - MEAN) / STD)).numpy(), atol=0.51 / 255 / STD)


def test_older_folders_are_read(tmp_path: Path) -> None:
    """One without serving.json, and without the manifest's new keys."""
    export_model(tiny(), tmp_path, input_size=SIDE, formats=(), measure_ms=False, info=ModelInfo(NAME, TINY))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / SERVING).unlink()
    del manifest["files"][SERVING]
    for key in ("precision", "activations", "onnx", "latencies"):
        del manifest[key]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert load_exported(tmp_path).num_classes == 10
