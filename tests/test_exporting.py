"""Export: files that agree with eager, at any batch size, or no files at all."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from sparsevit_cli.atomic import sha256_file
from sparsevit_cli.errors import CheckpointError, ConfigError, MeasurementError, NonFiniteError, ResourceError
from sparsevit_cli.exporting import (
    MANIFEST,
    SERVING,
    SPARSITY,
    WEIGHTS,
    ExportReport,
    ModelInfo,
    checks,
    export_model,
    load_exported,
    load_sparsity,
    structured_images,
)
from sparsevit_cli.exporting import (
    folder as export_folder,
)
from sparsevit_cli.exporting.checks import runner
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runtimes import Run
from sparsevit_cli.swin import get_sparsity, set_sparsity, sparsify_
from tiny import tiny_swin

NAME = "swin_tiny_patch4_window7_224"
TINY = {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 10}
SIDE = 112  # two maps, 28 x 28 and 14 x 14, which windows of 7 divide
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs sparsevit-cli[export]",
)


def tiny(
    ratios: object = 0.5, *, img_size: object = SIDE, importance: str = "mean_abs_l2", **args: object
) -> nn.Module:
    """A deterministic tiny Swin, in training mode."""
    model = tiny_swin(NAME, img_size=img_size, **TINY | args)
    set_sparsity(sparsify_(model, importance=importance), ratios)  # type: ignore[arg-type]
    return model.train()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def eager(model: nn.Module, images: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        output = copy.deepcopy(model).eval()(images)
    return [part.numpy() for part in ([output] if isinstance(output, Tensor) else output)]


def onnx_outputs(path: Path, images: Tensor) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images.numpy()})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ExportReport]:
    """A model with every option, and its export."""
    model = tiny([[0.6], [0.5]])
    info = ModelInfo(NAME, TINY, categories=("[red]", "Straße"), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    return model, export_model(model, tmp_path_factory.mktemp("run") / "export", input_size=SIDE, info=info)


@needs_onnx
def test_files_hashes_and_shapes(exported: tuple[nn.Module, ExportReport]) -> None:
    _, report = exported
    assert names(report.directory) == {"model.onnx", "model.pt2", WEIGHTS, SPARSITY, SERVING, MANIFEST}
    manifest = json.loads(report.manifest.read_text())
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == sha256_file(report.directory / name)
        assert entry["bytes"] == (report.directory / name).stat().st_size
    assert set(manifest["files"]) == names(report.directory) - {MANIFEST}
    assert [file.sha256 for file in report.files] == [sha256_file(file.path) for file in report.files]
    assert report.input_shape == ("batch", 3, SIDE, SIDE)
    assert report.output_shapes == {"output": ("batch", 10)}
    assert manifest["input"]["shape"] == ["batch", 3, SIDE, SIDE]
    assert manifest["outputs"] == [{"name": "output", "shape": ["batch", 10]}]
    assert manifest["opset"] == 20
    assert manifest["sparsity"] == [[0.6], [0.5]]
    assert "get smaller" in manifest["note"]
    assert manifest["tensorrt"]["tested"] is False
    assert "--onnx=model.onnx" in manifest["tensorrt"]["command"]
    assert {"torch", "onnx", "onnxruntime", "timm"} <= set(manifest["versions"])
    assert len({(report.directory / name).stat().st_mode for name in names(report.directory)}) == 1


@needs_onnx
def test_a_program_that_has_run_leaves_the_cores_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that spin on after a run slow the program that is measured next: dense and sparse ones run in turns."""
    import onnxruntime

    def seconds_spent_after(run: Callable[[], object]) -> float:
        """CPU time of this process in the tenth of a second after a run; the least of five."""
        spent = []
        for _ in range(5):
            run()
            before = time.process_time()
            time.sleep(0.1)
            spent.append(time.process_time() - before)
        return min(spent)

    export_model(tiny(), tmp_path, input_size=SIDE, formats=("onnx",), measure_ms=False)
    image, path = torch.randn(4, 3, SIDE, SIDE), tmp_path / "model.onnx"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # the only thread of a run would have none that spins
    ours, options = runner(path), onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    spinning = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    spun = seconds_spent_after(lambda: spinning.run(None, {"image": image.numpy()}))
    assert seconds_spent_after(lambda: ours(image)) < spun / 10


@needs_onnx
def test_latency_of_dense_and_sparse(exported: tuple[nn.Module, ExportReport]) -> None:
    _, report = exported
    (measured_in,) = report.latencies
    assert measured_in.dense is not measured_in.sparse
    manifest = json.loads(report.manifest.read_text())
    (latency,) = manifest["latencies"]
    assert latency["runtime"] == "onnxruntime, CPUExecutionProvider"
    assert latency["threads"] == measured_in.threads >= 1
    for told, measured in ((latency["dense"], measured_in.dense), (latency["sparse"], measured_in.sparse)):
        numbers = [measured.low_ms, measured.median_ms, measured.high_ms]
        assert 0 < numbers[0] <= numbers[1] <= numbers[2]
        assert told["stable"] == measured.stable
        shown = numbers if measured.stable else [None, None, None]  # a busy machine must not fail this test
        assert [told["low_ms"], told["median_ms"], told["high_ms"]] == shown


@needs_onnx
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_agrees_at_batch_sizes_the_export_did_not_check(
    exported: tuple[nn.Module, ExportReport], batch: int
) -> None:
    model, report = exported
    images = structured_images((3, SIDE, SIDE), batch, seed=77)
    (output,) = onnx_outputs(report.directory / "model.onnx", images)
    (expected,) = eager(model, images)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@needs_onnx
def test_sparsity_changes_what_the_file_computes(exported: tuple[nn.Module, ExportReport]) -> None:
    """The check would be worth nothing if dense and sparse outputs were as close as it allows."""
    model, report = exported
    dense = copy.deepcopy(model)
    set_sparsity(dense, 0)
    images = structured_images((3, SIDE, SIDE), 2, seed=77)
    (output,), (expected,) = onnx_outputs(report.directory / "model.onnx", images), eager(dense, images)
    assert np.abs(output - expected).max() > 10 * report.tolerance * np.abs(expected).max()


@needs_onnx
def test_graph_selects_with_topk_gather_and_scatter_only(exported: tuple[nn.Module, ExportReport]) -> None:
    """No scatter reduces, k is constant, the batch is free, weights are inside, no path of this machine is in it."""
    import onnx

    _, report = exported
    graph = onnx.load(str(report.directory / "model.onnx"), load_external_data=False).graph
    kinds = {node.op_type for node in graph.node}
    assert {"TopK", "ScatterND"} <= kinds
    assert not kinds & {"ScatterElements", "GatherElements", "NonZero", "Loop", "If", "Scan", "Compress"}
    for node in graph.node:
        if node.op_type == "ScatterND":
            assert all(attribute.s == b"none" for attribute in node.attribute if attribute.name == "reduction")
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {output for node in graph.node if node.op_type == "Constant" for output in node.output}
    assert all(node.input[1] in constants for node in graph.node if node.op_type == "TopK")
    shape = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, SIDE, SIDE]
    assert not any(tensor.HasField("data_location") and tensor.data_location == 1 for tensor in graph.initializer)
    here = str(Path(timm.__file__).parent).encode()
    assert here not in (report.directory / "model.onnx").read_bytes()
    assert here not in (report.directory / "model.pt2").read_bytes()


@needs_onnx
def test_pt2_runs_without_this_package(exported: tuple[nn.Module, ExportReport], tmp_path: Path) -> None:
    model, report = exported
    images = structured_images((3, SIDE, SIDE), 4, seed=5)
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch\n"
        "extra = {'sparsity.json': ''}\n"
        "program = torch.export.load(sys.argv[1], extra_files=extra)\n"
        "assert '\"ratios\"' in extra['sparsity.json']\n"
        "torch.save(program.module()(torch.load(sys.argv[2])), sys.argv[3])\n"
        "assert not any(name.startswith(('timm', 'sparsevit_cli')) for name in sys.modules)\n"
    )
    paths = [str(report.directory / "model.pt2"), str(tmp_path / "images.pt"), str(tmp_path / "output.pt")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    np.testing.assert_allclose(torch.load(tmp_path / "output.pt").detach().numpy(), eager(model, images)[0], atol=1e-5)


@needs_onnx
def test_weights_load_into_timm_and_back(exported: tuple[nn.Module, ExportReport]) -> None:
    from safetensors.torch import load_file

    model, report = exported
    dense = tiny_swin(NAME, img_size=SIDE, **TINY)
    assert list(load_file(report.weights)) == sorted(dense.state_dict())
    dense.load_state_dict(load_file(report.weights))
    loaded = load_exported(report.directory)
    assert get_sparsity(loaded) == get_sparsity(model)
    images = structured_images((3, SIDE, SIDE), 2, seed=1)
    np.testing.assert_array_equal(eager(loaded, images)[0], eager(model, images)[0])
    saved = load_sparsity(report.sparsity_file)
    assert saved == load_sparsity(report.directory)
    assert saved.sparsity == get_sparsity(model)
    assert (saved.depths, saved.importance, saved.img_size) == ((1, 2), "mean_abs_l2", (SIDE, SIDE))
    assert saved.model.categories == ("[red]", "Straße")
    assert saved.model.args == TINY


@needs_onnx
@pytest.mark.parametrize(
    ("img_size", "importance", "args"),
    [
        pytest.param((136, 200), "l2", {}, id="padded and not square"),
        pytest.param((SIDE, SIDE), "random", {}, id="random control"),
        pytest.param((SIDE, SIDE), "mean_abs_l2", {"features_only": True}, id="several outputs"),
    ],
)
def test_other_models(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    img_size: tuple[int, int],
    importance: str,
    args: dict[str, object],
) -> None:
    """They agree with eager, and the exporters' chatter reaches nobody."""
    model = tiny(0.6, img_size=img_size, importance=importance, **args)
    report = export_model(model, tmp_path, input_size=img_size, measure_ms=False, opset=18)
    assert capfd.readouterr() == ("", "")
    assert [file.format for file in report.files] == ["onnx", "pt2"]
    assert all(d.relative < 1e-4 for file in report.files for d in file.differences)
    assert report.latencies == ()
    images = structured_images((3, *img_size), 2, seed=9)
    for output, expected in zip(onnx_outputs(tmp_path / "model.onnx", images), eager(model, images), strict=True):
        np.testing.assert_allclose(output, expected, atol=1e-4)
    if "features_only" in args:
        assert list(report.output_shapes) == ["output_0", "output_1"]
        assert report.output_shapes["output_1"] == ("batch", 14, 14, 32)


def test_dense_model_and_model_is_not_touched(tmp_path: Path) -> None:
    """Ratio 0 exports; training flags, gradients, weights, hooks and random state stay as they were."""
    model = tiny(0.0)
    model.set_grad_checkpointing(True)
    model.layers[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    report = export_model(model, tmp_path, input_size=SIDE, formats=("pt2",), measure_ms=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.layers[0].grad_checkpointing
    assert report.sparsity.is_dense
    assert names(tmp_path) == {"model.pt2", WEIGHTS, SPARSITY, SERVING, MANIFEST}
    manifest = json.loads(report.manifest.read_text())
    assert manifest["latencies"] == []
    assert "tensorrt" not in manifest


def test_a_module_around_the_backbone_exports(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny(0.5, features_only=True)
            self.head = nn.Conv2d(32, 2, 1)

        def forward(self, x: Tensor) -> dict[str, object]:
            features = self.backbone(x)
            return {"map": self.head(features[-1].permute(0, 3, 1, 2)), "features": features[:1]}

    report = export_model(Wrapper(), tmp_path, input_size=SIDE, formats=("pt2",), measure_ms=False)
    assert report.output_shapes == {"output_map": ("batch", 2, 14, 14), "output_features_0": ("batch", 28, 28, 16)}


# -- bad files ----------------------------------------------------------------------------------------------------


def spoil(when: Callable[[int], bool]) -> Callable[[Path], Run]:
    """A runner whose call number n gives wrong numbers where `when(n)`."""

    def spoiled(path: Path) -> Run:
        run, calls = runner(path), iter(range(10**6))

        def wrong(images: Tensor) -> list[Tensor]:
            outputs, number = run(images), next(calls)
            return [output + 0.1 * output.abs().max() for output in outputs] if when(number) else outputs

        return wrong

    return spoiled


def test_a_file_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier export stays as it was, to the byte."""
    model = tiny()
    export_model(model, tmp_path, input_size=SIDE, formats=("pt2",), measure_ms=False)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    monkeypatch.setattr(checks, "runner", spoil(lambda number: True))
    set_sparsity(model, 0.2)
    with pytest.raises(MeasurementError, match=r"model\.pt2: differs from eager by 1\.0e-01 and 1\.0e-01"):
        export_model(model, tmp_path, input_size=SIDE, formats=("pt2",), measure_ms=False)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_second_images_may_agree_and_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "runner", spoil(lambda number: number == 1))
    reporter = SilentReporter()
    report = export_model(tiny(), tmp_path, input_size=SIDE, formats=("pt2",), measure_ms=False, reporter=reporter)
    (file,) = report.files
    assert [d.batch for d in file.first_differences] == [1, 3]
    assert file.first_differences[1].relative == pytest.approx(0.1, rel=1e-3)
    assert all(d.relative < 1e-5 for d in file.differences)
    assert any("swapped ranks" in warning for warning in reporter.warnings)
    checked = json.loads(report.manifest.read_text())["checked_against_eager"]["model.pt2"]
    assert checked["first_differences"][1]["relative"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("wrong", [float("nan"), "shape", "count", "crash"])
def test_broken_outputs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    def broken(path: Path) -> Run:
        def run(images: Tensor) -> list[Tensor]:
            if wrong == "crash":
                raise RuntimeError("Guard failed: x.size()[0] == 2")
            if wrong == "count":
                return []
            return [torch.zeros(len(images), 9) if wrong == "shape" else torch.full((len(images), 10), wrong)]

        return run

    monkeypatch.setattr(checks, "runner", broken)
    with pytest.raises(MeasurementError):
        export_model(tiny(), tmp_path / "new" / "deep", input_size=SIDE, formats=("pt2",), measure_ms=False)
    assert names(tmp_path) == set()


def test_a_new_export_replaces_the_old_one_and_removes_what_it_does_not_write(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("of an earlier export")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".tmp-export-0123").mkdir()
    model = tiny()
    export_model(model, tmp_path, input_size=SIDE, formats=("pt2",), measure_ms=False)
    first = json.loads((tmp_path / MANIFEST).read_text())["files"]
    set_sparsity(model, 0.2)
    export_model(model, tmp_path, input_size=SIDE, formats=(), measure_ms=False)
    assert names(tmp_path) == {"notes.txt", WEIGHTS, SPARSITY, SERVING, MANIFEST}
    second = json.loads((tmp_path / MANIFEST).read_text())["files"]
    assert first[WEIGHTS] == second[WEIGHTS]
    assert first[SPARSITY] != second[SPARSITY]
    assert load_sparsity(tmp_path).sparsity == get_sparsity(model)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and nothing is cleaned up."""


@pytest.mark.parametrize(("point", "whole"), [("export.before_publish", True), ("export.mid_publish", False)])
def test_killed_while_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, whole: bool) -> None:
    """The old export stays whole, or it has no manifest: never a manifest that vouches for other files."""

    def failpoint(name: str) -> None:
        if name == point:
            raise Killed

    model = tiny()
    settings = {"input_size": SIDE, "formats": (), "measure_ms": False, "info": ModelInfo(NAME, TINY)}
    export_model(model, tmp_path, **settings)
    set_sparsity(model, 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(export_folder, "failpoint", failpoint)
        patch.setattr(shutil, "rmtree", lambda *_args, **_kwargs: None)
        with pytest.raises(Killed):
            export_model(model, tmp_path, **settings)
    assert any(name.startswith(".tmp-") for name in names(tmp_path))
    if whole:
        assert get_sparsity(load_exported(tmp_path)).ratios[0] == (0.5,)
    else:
        with pytest.raises(CheckpointError, match=r"manifest\.json: is missing"):
            load_exported(tmp_path)
    export_model(model, tmp_path, **settings)
    assert get_sparsity(load_exported(tmp_path)).ratios[0] == (0.2,)
    assert names(tmp_path) == {WEIGHTS, SPARSITY, SERVING, MANIFEST}


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_args: object, **_kwargs: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save", no_space)
    with pytest.raises(ResourceError, match="bytes needed"):
        export_model(tiny(), tmp_path / "new", input_size=SIDE, formats=(), measure_ms=False)
    assert names(tmp_path) == set()


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"formats": ("tflite",)}, "formats.*onnx, pt2"),
        ({"formats": ("pt2", "pt2")}, "formats"),
        ({"formats": "onnx"}, "formats"),
        ({"opset": 17}, "opset: 17.*18 to 25"),
        ({"opset": True}, "opset"),
        ({"check_batch_sizes": (2, 2)}, "check_batch_sizes"),
        ({"check_batch_sizes": (0, 2)}, "check_batch_sizes"),
        ({"check_batch_sizes": (True, 2)}, "check_batch_sizes"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"input_size": 0}, "input size"),
        ({"input_size": 160}, r"input size: 160 x 160 pixels"),
        ({"input_size": (1, SIDE, SIDE)}, r"does not run on \(1, 1, 112, 112\)"),
        ({"info": ModelInfo("swin", {"act_layer": nn.GELU})}, "does not fit into JSON"),
    ],
)
def test_settings_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    arguments = {"input_size": SIDE, "formats": ("pt2",), "measure_ms": False, **settings}
    with pytest.raises(ConfigError, match=message):
        export_model(tiny(), tmp_path / "new", **arguments)  # type: ignore[arg-type]
    assert names(tmp_path) == set()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(ConfigError, match=r"onnx, onnxscript, onnxruntime not installed.*sparsevit-cli\[export\]"):
        export_model(tiny(), tmp_path / "new", input_size=SIDE)
    assert names(tmp_path) == set()


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = tiny()

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x) * float(x.mean() > 0)  # depends on data

    with pytest.raises(ConfigError, match=r"torch\.export cannot trace Counts"):
        export_model(Counts(), tmp_path / "new", input_size=SIDE, formats=("pt2",))
    with pytest.raises(ConfigError, match="bfloat16"):
        export_model(tiny().bfloat16(), tmp_path / "new", input_size=SIDE)
    with pytest.raises(ConfigError, match="sparsify_"):
        export_model(tiny_swin(NAME, img_size=SIDE, **TINY), tmp_path / "new", input_size=SIDE)
    broken = tiny()
    with torch.no_grad():
        broken.head.fc.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="output of the model has NaN"):
        export_model(broken, tmp_path / "new", input_size=SIDE)
    assert names(tmp_path) == set()


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        export_model(tiny(), tmp_path / "file", input_size=SIDE, formats=(), measure_ms=False)
    (tmp_path / "folder" / WEIGHTS).mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder"):
        export_model(tiny(), tmp_path / "folder", input_size=SIDE, formats=(), measure_ms=False)


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    export_model(tiny(), folder, input_size=SIDE, formats=(), measure_ms=False, info=ModelInfo(NAME, TINY))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"ratios": [[0.5]]}, "block pairs"),
        ({"ratios": [[0.55], [0.5]]}, "not on the grid"),
        ({"ratios": None}, "is not what it should be"),
        ({"importance": "luck"}, "luck"),
        ({"img_size": 128}, "is not what it should be"),
        ({"model": []}, "is not what it should be"),
        ({"versions": 3}, "is not what it should be"),
    ],
)
def test_bad_sparsity_files(saved_folder: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    contents = json.loads((saved_folder / SPARSITY).read_text()) | change
    (tmp_path / SPARSITY).write_text(json.dumps(contents))
    with pytest.raises(CheckpointError, match=message):
        load_sparsity(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"format": 1}', "[" * 100_000])
def test_sparsity_files_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / SPARSITY).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        load_sparsity(tmp_path / SPARSITY)


def edit(folder: Path, **model: object) -> None:
    """Change sparsity.json's model and make the manifest agree."""
    contents = json.loads((folder / SPARSITY).read_text())
    contents["model"] |= model
    (folder / SPARSITY).write_text(json.dumps(contents))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][SPARSITY]["sha256"] = sha256_file(folder / SPARSITY)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": None}, "no model name"),
        ({"name": "hf-hub:someone/something"}, "hf-hub"),
        ({"args": {**TINY, "checkpoint_path": "evil.pth"}}, "checkpoint_path"),
        ({"args": {**TINY, "embed_dim": 24}}, "does not load into"),
        ({"name": "swin_of_mars"}, "does not load into"),
    ],
)
def test_models_that_do_not_load(saved_folder: Path, tmp_path: Path, model: dict[str, object], message: str) -> None:
    for path in saved_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit(tmp_path, **model)
    with pytest.raises(CheckpointError, match=message):
        load_exported(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, SPARSITY])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found(saved_folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    for path in saved_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / name).read_bytes())
    if damage == "remove":
        (tmp_path / name).unlink()
    else:
        data[-5] ^= 1
        (tmp_path / name).write_bytes(data if damage == "flip" else data[:-9])
    with pytest.raises(CheckpointError, match=name):
        load_exported(tmp_path)


def test_structured_images_give_windows_of_different_scores() -> None:
    from sparsevit_cli import windows

    images = structured_images((3, SIDE, SIDE), 4, seed=3)
    assert torch.equal(images, structured_images((3, SIDE, SIDE), 4, seed=3))
    assert not torch.equal(images, structured_images((3, SIDE, SIDE), 4, seed=4))
    index = windows.window_token_index(SIDE, SIDE, (7, 7), (0, 0), "roll_first", images.device)
    magnitude = windows.token_magnitude(images.permute(0, 2, 3, 1), "mean_abs_l2")
    scores = windows.window_scores(magnitude, index)
    assert all(len(set(row.tolist())) == index.shape[0] for row in scores)
    assert (scores.amax(1) > 3 * scores.amin(1)).all()
