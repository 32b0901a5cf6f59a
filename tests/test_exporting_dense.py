"""Export of detectors and segmenters: backbone and neck, or the whole; never a file that is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from dense_models import SETTINGS, SIZE, Dense, Detection, Segmenter, Undecidable, Wrapped, detector, pyramid, sparse
from sparsevit_cli import windows
from sparsevit_cli.backbones import swin_backbone
from sparsevit_cli.checkpoints import save_checkpoint
from sparsevit_cli.config.tasks import add_task, experiment_type
from sparsevit_cli.data import Categories
from sparsevit_cli.errors import CheckpointError, ConfigError, MeasurementError
from sparsevit_cli.exporting import (
    FEATURE_WEIGHTS,
    MANIFEST,
    SPARSITY,
    WEIGHTS,
    UntraceableError,
    export_model,
    load_exported,
    structured_images,
)
from sparsevit_cli.exporting.checks import runner
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.swin import get_sparsity, set_sparsity
from sparsevit_cli.workflows.export import check_exportable, export_winner
from sparsevit_cli.workflows.session import Session
from test_exporting import names, needs_onnx

RATIOS = "[[.5],[.5]]"


def session_of(task: type[Dense], folder: Path, **export: Any) -> Session:
    add_task(task)
    model = {"img_size": SIZE, "always_partition": True, **SETTINGS}
    document = {"task": {"name": task.name}, "output": str(folder), "device": "cpu", "model": model,
                "export": {"latency": False, "check_batch_sizes": [1, 2], **export}}  # fmt: skip
    config = experiment_type(task.name).model_validate_json(json.dumps(document))
    return Session(config, SilentReporter())


def weights_of(session: Session, folder: Path) -> tuple[nn.Module, str]:
    """The session's model at RATIOS, and a checkpoint of its weights."""
    model = session.model(Categories()).eval()
    path = save_checkpoint(folder / "weights", 1, {"model": model.state_dict()}, {})
    set_sparsity(model, [[0.5], [0.5]])
    return model, str(path)


def warnings_of(session: Session) -> str:
    assert isinstance(session.reporter, SilentReporter)
    return " ".join(session.reporter.warnings)


def run(model: nn.Module, images: Tensor) -> Any:
    with torch.no_grad():
        return model(images)


# -- backbone and neck --------------------------------------------------------------------------------------------


@needs_onnx
@pytest.mark.usefixtures("known_kinds")
def test_backbone_and_neck_of_a_task(tmp_path: Path) -> None:
    """Named outputs, at any batch; the module and the whole model come back from the folder."""
    session = session_of(Dense, tmp_path, scope="features")
    model, file = weights_of(session, tmp_path)
    summary = export_winner(session, weights=file, ratios=RATIOS)
    folder, report = summary.folder.path, summary.report
    assert {"features.onnx", "features.pt2", FEATURE_WEIGHTS, WEIGHTS, SPARSITY, MANIFEST} <= names(folder)
    assert report.output_shapes == {
        "level_0": ("batch", 8, 8, 12), "level_1": ("batch", 8, 4, 6), "level_pool": ("batch", 8, 2, 3),
    }  # fmt: skip
    manifest = json.loads(report.manifest.read_text())
    assert (manifest["scope"], manifest["task"]) == ("features", "dense")
    assert "--onnx=features.onnx" in manifest["tensorrt"]["command"]
    assert {WEIGHTS, FEATURE_WEIGHTS} < set(manifest["files"])
    images = structured_images((3, *SIZE), 5, seed=9)
    expected = run(model.pyramid, images)
    for found in (runner(folder / "features.onnx")(images), runner(folder / "features.pt2")(images)):
        torch.testing.assert_close(found, list(expected.values()), atol=1e-4, rtol=1e-4)
    loaded = load_exported(folder)
    assert get_sparsity(loaded) == get_sparsity(model)
    assert all(torch.equal(found, expected[name]) for name, found in run(loaded, images).items())
    whole = copy.deepcopy(model)
    whole.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    assert torch.equal(run(whole, images), run(model, images))


@pytest.mark.usefixtures("known_kinds")
def test_a_segmenter_is_exported_whole_and_a_detector_is_not(tmp_path: Path) -> None:
    session = session_of(Dense, tmp_path / "a", formats=[])
    model, file = weights_of(session, tmp_path / "a")
    report = export_winner(session, weights=file, ratios=RATIOS).report
    assert (report.scope, report.output_shapes) == ("model", {"output": ("batch", 3, *SIZE)})
    with pytest.raises(CheckpointError, match=r"a Segmenter of task dense.*with its own code"):
        load_exported(report.directory)
    session = session_of(Detection, tmp_path / "b", formats=[])
    model, file = weights_of(session, tmp_path / "b")
    report = export_winner(session, weights=file, ratios=RATIOS).report
    assert (report.scope, report.weights.name) == ("features", FEATURE_WEIGHTS)
    check_exportable(session, model)


@pytest.mark.usefixtures("known_kinds")
def test_a_whole_model_that_cannot_be_traced(tmp_path: Path) -> None:
    """Backbone and neck are written instead, and it is told."""
    session = session_of(Undecidable, tmp_path, formats=["pt2"])
    _, file = weights_of(session, tmp_path)
    assert export_winner(session, weights=file, ratios=RATIOS).report.scope == "features"
    assert "cannot trace Undecided (GuardOnDataDependentSymNode" in warnings_of(session)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(lambda: swin_backbone(img_size=SIZE, levels=(1,), **SETTINGS), id="one level"),
        pytest.param(lambda: pyramid(pool=False, name="swinv2_tiny_window8_256"), id="V2 without pool"),
        pytest.param(lambda: pyramid(name="swinv2_cr_tiny_224", size=(64, 96)), id="V2-CR"),
    ],
)
def test_backbones_of_ours_load_from_what_they_were_built_with(module: Any, tmp_path: Path) -> None:
    model = sparse(module())
    body = getattr(model, "body", model)
    size = body.swin.patch_embed.img_size
    export_model(model, tmp_path, input_size=size, formats=(), measure_ms=False)
    loaded, images = load_exported(tmp_path), structured_images((3, *size), 2, seed=0)
    assert all(torch.equal(found, run(model, images)[name]) for name, found in run(loaded, images).items())


def test_a_backbone_that_was_changed_names_nothing_that_would_not_build_it(tmp_path: Path) -> None:
    model = pyramid()
    model.body.norms["0"] = nn.Identity()
    reporter = SilentReporter()
    export_model(sparse(model), tmp_path, input_size=SIZE, formats=(), measure_ms=False, reporter=reporter)
    with pytest.raises(CheckpointError, match="no model name: what was exported is a SwinFPN"):
        load_exported(tmp_path)
    assert any("not what it was built as" in line for line in reporter.warnings)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"levels": [0, 7]}, "levels"),
        ({"levels": 3}, "is not what it should be"),
        ({"colour": "red"}, "is not what it should be"),
        ({"out_channels": "many"}, "does not load"),
    ],
)
def test_bad_descriptions_of_a_pyramid(module: dict[str, object], message: str, folder: Path, tmp_path: Path) -> None:
    contents = json.loads((folder / SPARSITY).read_text())
    contents["module"] |= module
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / SPARSITY).write_text(json.dumps(contents))
    manifest = json.loads((folder / MANIFEST).read_text())
    from sparsevit_cli.atomic import sha256_file

    manifest["files"][SPARSITY]["sha256"] = sha256_file(tmp_path / SPARSITY)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_exported(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the weights of a pyramid."""
    path = tmp_path_factory.mktemp("pyramid")
    export_model(sparse(pyramid()), path, input_size=SIZE, formats=(), measure_ms=False, scope="features")
    return path


# -- whole models -------------------------------------------------------------------------------------------------


def test_outputs_of_a_class_of_their_own_become_a_dict(tmp_path: Path) -> None:
    model = sparse(Wrapped(pyramid()))
    report = export_model(
        model, tmp_path, input_size=SIZE, formats=("pt2",), measure_ms=False, check_batch_sizes=(1, 2)
    )
    assert report.output_shapes == {"output_classes": ("batch", 3, *SIZE)}
    images = structured_images((3, *SIZE), 4, seed=3)
    found = run(torch.export.load(tmp_path / "model.pt2").module(), images)
    assert type(found) is dict
    torch.testing.assert_close(found["classes"], run(model, images)["classes"], atol=1e-5, rtol=1e-4)
    state = Segmenter(pyramid()).state_dict()
    assert list(safetensors.torch.load_file(tmp_path / WEIGHTS)) == sorted(state)


@pytest.fixture
def as_first_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows counted by -(-a // b), which torch's TorchScript exporter translates to another number."""

    def window_grid(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
        return -(-height // size[0]), -(-width // size[1])

    monkeypatch.setattr(windows, "window_grid", window_grid)


def detector_file(folder: Path, model: nn.Module | None = None, **changes: Any) -> Path:
    settings: dict[str, Any] = {"input_size": SIZE, "formats": ("onnx",), "measure_ms": False, **changes}
    return export_model(model or sparse(detector(pyramid())), folder, **settings).files[0].path


@needs_onnx
def test_a_whole_detector_for_one_image_with_padded_maps(tmp_path: Path) -> None:
    """As many answers as there are, in images that were not traced; the model around is left as it was."""
    model = sparse(detector(pyramid()))
    path = detector_file(tmp_path, model)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["input"]["shape"] == [1, 3, *SIZE]
    assert not manifest["dynamic_batch"]
    assert {output["name"]: output["shape"] for output in manifest["outputs"]} == {
        "output_boxes": ["answers", 4], "output_labels": ["answers"], "output_scores": ["answers"],
        "output_masks": ["answers", 1, *SIZE],
    }  # fmt: skip
    counts, in_onnxruntime = set(), runner(path)
    for seed in range(20, 28):
        image = structured_images((3, *SIZE), 1, seed=seed)
        expected, found = run(model, image)[0], in_onnxruntime(image)
        counts.add(len(expected["boxes"]))
        for name, output in zip(expected, found, strict=True):
            torch.testing.assert_close(output, expected[name], atol=1e-4, rtol=1e-4)
    assert len(counts) > 2
    assert str(Path(torch.__file__).parent.parent).encode() not in path.read_bytes()


@needs_onnx
@pytest.mark.usefixtures("as_first_written")
def test_a_wrong_file_of_a_detector_is_found_and_not_handed_out(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"model\.onnx: (differs from eager|does not run)"):
        detector_file(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_detector_as_pt2_is_refused_by_the_name_of_the_operator(tmp_path: Path) -> None:
    with pytest.raises(UntraceableError, match=r"_batched_nms_coordinate_trick.*export\.formats: \[onnx\]"):
        detector_file(tmp_path / "new", formats=("pt2",))
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("known_kinds")
def test_what_cannot_be_exported_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    session = session_of(Detection, tmp_path, scope="model")
    with pytest.raises(ConfigError, match=r"export\.formats: pt2.*export\.scope: features"):
        check_exportable(session, session.model(Categories()))


def test_a_detector_that_finds_nothing_is_not_checked_and_so_refused(tmp_path: Path) -> None:
    blind = sparse(detector(pyramid(), threshold=1.0))
    with pytest.raises(ConfigError, match=r"finds nothing on any of 4 images.*check_images"):
        export_model(blind, tmp_path / "new", input_size=SIZE, formats=("onnx",), measure_ms=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("known_kinds")
def test_a_detector_is_checked_on_images_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsevit_cli.workflows import export as workflow

    given: list[Tensor] = []

    def seen(*arguments: Any, check_images: Tensor, **settings: Any) -> Any:
        given.append(check_images)
        return export_model(*arguments, check_images=check_images, **{**settings, "formats": ()})

    monkeypatch.setattr(workflow, "export_model", seen)
    session = session_of(Detection, tmp_path, scope="model", formats=["onnx"])
    _, file = weights_of(session, tmp_path)
    assert export_winner(session, weights=file, ratios=RATIOS).report.scope == "model"
    assert torch.equal(given[0][1], session.data().val[1][0])


def test_settings_that_only_one_image_makes_impossible(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="opset: 23; for a model that answers each image, torch writes 18 to 20"):
        detector_file(tmp_path / "new", opset=23)


@pytest.mark.usefixtures("known_kinds")
def test_scopes_that_a_task_does_not_have(tmp_path: Path) -> None:
    class Bare(Dense):
        name = "bare"

        def build(self, categories: Any, options: Any) -> nn.Module:
            return self.swin(3, options)

        def features(self, model: nn.Module) -> nn.Module:
            return model

    session = session_of(Bare, tmp_path, scope="features", formats=[])
    model, file = weights_of(session, tmp_path)
    with pytest.raises(ConfigError, match=r"is its Swin.*export\.scope: model"):
        export_winner(session, weights=file, ratios=RATIOS)
    report = export_winner(session_of(Bare, tmp_path, formats=[]), weights=file, ratios=RATIOS).report
    images = structured_images((3, *SIZE), 1, seed=0)
    assert (report.info.name, report.info.task) == ("swin_tiny_patch4_window7_224", "bare")
    assert torch.equal(run(load_exported(report.directory), images), run(model, images))


@pytest.mark.slow
@needs_onnx
def test_whole_mask2former(tmp_path: Path) -> None:
    """In both formats, at two batch sizes; the .pt2 file runs without transformers."""
    pytest.importorskip("transformers")
    from test_semantic import MASK2FORMER, built, tiny_task

    light = {"queries": 5, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 16, "encoder_feedforward": 16}
    model = sparse(built(tiny_task(model={
        **MASK2FORMER, "img_size": 64, "depths": [1, 1, 2, 1],
        "mask2former": {**MASK2FORMER["mask2former"], **light},
    })))  # fmt: skip
    report = export_model(model, tmp_path, input_size=(64, 64), measure_ms=False)
    assert report.output_shapes == {"output": ("batch", 11, 64, 64)}
    images = structured_images((3, 64, 64), 2, seed=5)
    expected = run(model, images)
    torch.testing.assert_close(runner(tmp_path / "model.onnx")(images)[0], expected, atol=1e-5, rtol=1e-4)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(run(program, images), expected)
