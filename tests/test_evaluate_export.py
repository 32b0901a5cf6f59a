"""`evaluate --runtime`: an exported file scores as its weights do in PyTorch, for every task, or ends with an error."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import test_instances
import test_semantic
from coco_tree import coco_tree
from dense_models import Dense
from sparsevit_cli.atomic import sha256_file
from sparsevit_cli.checkpoints import save_checkpoint
from sparsevit_cli.cli import app
from sparsevit_cli.config.experiment import ExperimentConfig
from sparsevit_cli.config.tasks import type_of
from sparsevit_cli.config.yaml_loader import Document
from sparsevit_cli.data import Categories
from sparsevit_cli.data.loader import eval_batches
from sparsevit_cli.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    SparseViTError,
    StoppedError,
)
from sparsevit_cli.exporting import MANIFEST, SERVING, WEIGHTS
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runtimes import RUNTIMES
from sparsevit_cli.stopping import StopRequest
from sparsevit_cli.workflows.evaluate import PREDICTIONS, EvaluateSummary, evaluate, evaluate_checkpoint
from sparsevit_cli.workflows.export import _images, export_winner
from sparsevit_cli.workflows.rows import threads_text
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.weights import chosen_weights
from test_exporting import needs_onnx
from test_exporting_dense import session_of as dense_session
from test_runtimes import needs_openvino
from tiny import shaken_, tiny_config

RATIOS = "[[.3],[.5]]"
pytestmark = needs_onnx


def session_of(config: ExperimentConfig) -> Session:
    return Session(config, SilentReporter())


def with_weights(session: Session, folder: Path) -> str:
    """A checkpoint of the session's model with weights that matter."""
    categories = session.data().categories
    model = session.model(categories)
    torch.manual_seed(1)
    shaken_(model)
    state = {"identity": {"categories": categories.saved()}, "seed": session.config.seed}
    return str(save_checkpoint(folder / "weights", 1, {"model": model.state_dict()}, state))


def both(
    config: ExperimentConfig, folder: Path, runtime: str, *, ratios: str = RATIOS
) -> tuple[EvaluateSummary, EvaluateSummary, Session]:
    """The checkpoint in PyTorch, and its exported file."""
    session = session_of(config)
    weights = with_weights(session, folder)
    export_winner(session, weights=weights, ratios=ratios)
    eager = evaluate_checkpoint(session, weights=weights, ratios=ratios)
    if (predictions := eager.folder.path / PREDICTIONS).exists():
        shutil.copyfile(predictions, folder / "eager.json")
    return eager, evaluate(session, runtime=runtime), session


def with_xml(folder: Path) -> None:
    """Let the manifest list OpenVINO's own file, which lies in the folder."""
    changed(folder, lambda manifest: manifest["files"].update(
        {name: {"sha256": sha256_file(folder / name)} for name in ("model.xml", "model.bin")}
    ))  # fmt: skip


def changed(folder: Path, change: Callable[[Any], object], name: str = MANIFEST) -> None:
    """Change a JSON file of an export folder; the manifest keeps its hash right."""
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    if name != MANIFEST:
        changed(folder, lambda manifest: manifest["files"][name].update(sha256=sha256_file(folder / name)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluateSummary]:
    """Folder of runs with an export of random weights on digits, and the score of these weights."""
    runs = tmp_path_factory.mktemp("digits")
    session = session_of(tiny_config(output=str(runs), export={"formats": ["onnx", "pt2"]}))
    weights = with_weights(session, runs)
    export_winner(session, weights=weights, ratios=RATIOS)
    eager = evaluate_checkpoint(session, weights=weights, ratios=RATIOS)
    session.locks.close()
    if RUNTIMES["openvino"].is_installed():
        import openvino

        folder = runs / "tiny" / "export"
        openvino.save_model(openvino.convert_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
    return runs, eager


@pytest.fixture
def runs(exported: tuple[Path, EvaluateSummary], tmp_path: Path) -> Path:
    """A copy, to change."""
    return shutil.copytree(exported[0], tmp_path / "runs")


def digits(runs: Path, **sections: Any) -> Session:
    return session_of(tiny_config(output=str(runs), **sections))


def written(runs: Path) -> dict[str, bytes]:
    """All that an evaluation left."""
    return {str(path): path.read_bytes() for path in (runs / "tiny" / "evaluate").rglob("*") if path.is_file()}


# -- the score of the file is that of the weights -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "file"),
    [
        ("torch", "model.pt2"),
        ("onnxruntime", "model.onnx"),
        pytest.param("openvino", "model.onnx", marks=needs_openvino),
        pytest.param("openvino", "model.xml", marks=needs_openvino),
    ],
)
def test_a_file_scores_as_its_weights_and_the_record_tells_how_it_ran(
    runtime: str, file: str, exported: tuple[Path, EvaluateSummary], runs: Path
) -> None:
    folder = runs / "tiny" / "export"
    if file == "model.xml":
        with_xml(folder)
    _, eager = exported
    found = evaluate(digits(runs), runtime=runtime)
    assert found.score.values["loss"] == pytest.approx(eager.score.values["loss"], rel=1e-4)
    assert found.score.value == pytest.approx(eager.score.value, abs=100 / found.score.count + 1e-9)
    assert (found.score.count, found.config, found.gmacs) == (eager.score.count, eager.config, eager.gmacs)
    record = json.loads(found.folder.result.read_text())
    assert record["ratios"] == [[0.3], [0.5]]
    assert record["weights"] == str(folder / file)
    assert record["weights_sha256"] == sha256_file(folder / WEIGHTS)
    files = {file, "model.bin"} if file == "model.xml" else {file}
    assert record["runtime"] == {
        "runtime": runtime, "version": RUNTIMES[runtime].version(), "precision": "fp32",
        "threads": torch.get_num_threads(), "scope": "model", "file": str(folder / file),
        "sha256": sha256_file(folder / file), "files": {name: sha256_file(folder / name) for name in files},
    }  # fmt: skip


def test_the_eager_record_says_that_no_file_was_run(exported: tuple[Path, EvaluateSummary]) -> None:
    _, eager = exported
    assert eager.runtime is None
    assert json.loads(eager.folder.result.read_text())["runtime"] is None


@pytest.mark.parametrize("typed", ["folder", "file"])
def test_the_file_is_named_by_its_folder_or_by_itself(
    typed: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was copied elsewhere is enough; the terminal and --json tell runtime, file and hash."""
    monkeypatch.chdir(tmp_path)
    shutil.move(runs / "tiny" / "export", tmp_path / "there")
    (tmp_path / "tiny.yaml").write_text(tiny_config(output="runs").model_dump_json())
    path = "there" if typed == "folder" else "there/model.onnx"
    words = ["evaluate", "--config", "tiny.yaml", "--runtime", "onnxruntime", "--weights", path]
    done = CliRunner().invoke(app, [*words, "--json"], prog_name="sparsevit")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["runtime"]["file"] == "there/model.onnx"
    assert document["runtime"]["sha256"] == sha256_file(Path("there/model.onnx"))
    assert document["config"] == [[0.3], [0.5]]
    if typed == "file":
        said = " ".join(CliRunner().invoke(app, words, prog_name="sparsevit", env={"COLUMNS": "400"}).stdout.split())
        threads = threads_text(torch.get_num_threads())
        assert f"there/model.onnx (fp32, onnxruntime {RUNTIMES['onnxruntime'].version()}, {threads}" in said
        assert f"SHA-256 of model.onnx: {document['runtime']['sha256']}" in said


@needs_openvino
def test_precision_and_activations_are_the_manifests(
    exported: tuple[Path, EvaluateSummary], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 is of OpenVINO's own file alone. An ONNX file of eight bits computes the rest in float32."""
    folder = runs / "tiny" / "export"
    with_xml(folder)
    changed(folder, lambda manifest: manifest.update(precision="bf16", activations="bf16"))
    if "bf16" in RUNTIMES["openvino"].activations():
        found = evaluate(digits(runs), runtime="openvino")
        assert found.runtime is not None
        assert found.runtime.precision == "bf16"
        loss, wanted = found.score.values["loss"], exported[1].score.values["loss"]
        assert loss != wanted
        assert loss == pytest.approx(wanted, rel=0.05)
    in_float = evaluate(digits(runs), runtime="openvino", weights=str(folder / "model.onnx"))
    assert in_float.runtime is not None
    assert in_float.runtime.precision == "fp32"
    assert in_float.score.values["loss"] == pytest.approx(exported[1].score.values["loss"], rel=1e-4)
    monkeypatch.setattr(type(RUNTIMES["openvino"]), "activations", lambda self: ("fp32",))
    refuse(runs, ConfigError, "bf16: openvino on this CPU computes in fp32", runtime="openvino")


def config_of(
    tiny: Mapping[str, Any], folder: Path, scope: str, kind: str, data: Mapping[str, Any], **model: Any
) -> Any:
    """A configuration like `tiny`, with other data if they name a source, and an export of one format."""
    sections = {
        "output": str(folder),
        "model": {**tiny["model"], **model},
        "data": {"eval_batch_size": 4, **data} if "source" in data else tiny["data"],
        "export": {"formats": [kind], "latency": False, "scope": scope},
    }
    document = {**tiny, **sections}
    return type_of(Document(document, {})).model_validate_json(json.dumps(document))


def semantic(folder: Path, scope: str = "model", *, model: Mapping[str, Any] = {}, **data: Any) -> ExperimentConfig:
    data = {**data, "source": "cityscapes"} if "root" in data else data
    return config_of(test_semantic.TINY, folder, scope, "pt2", data, **model)  # type: ignore[no-any-return]


def instances(folder: Path, scope: str, **data: Any) -> ExperimentConfig:
    data = {**data, "source": "coco", "search_fraction": 0.2}
    return config_of(test_instances.TINY, folder, scope, "onnx" if scope == "model" else "pt2", data)  # type: ignore[no-any-return]


def agree(found: Mapping[str, float], wanted: Mapping[str, float], points: float) -> None:
    """All values of two scores are within so many points."""
    assert found.keys() == wanted.keys()
    assert {name: value for name, value in found.items() if abs(value - wanted[name]) > points} == {}


class Part(nn.Module):
    """What stands for an exported file: a copy of a module, which counts its runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.runs = copy.deepcopy(module), 0

    def forward(self, images: Tensor) -> Any:
        assert images.ndim == 4
        self.runs += 1
        return self.module(images)


def tree_of(tmp_path: Path, task: str) -> str:
    root = tmp_path / "tree"
    return str(coco_tree(root)) if task == "instances" else test_semantic.city_tree(root)


TRANSFORMERS = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "scipy")),
    reason="needs sparsevit-cli[segment]",
)


@pytest.mark.parametrize("scope", ["model", "features"])
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("semantic", {}),
        ("semantic", {"evaluation": "sliding"}),
        pytest.param("semantic", {"model": {**test_semantic.MASK2FORMER, "img_size": 64}}, marks=TRANSFORMERS),
        ("instances", {}),
        ("instances", {"letterbox": True}),
    ],
    ids=["whole images", "sliding windows", "Mask2Former", "detector", "padded images"],
)
def test_what_a_file_computes_takes_its_place_in_the_model(
    task: str, options: Mapping[str, Any], scope: str, tmp_path: Path
) -> None:
    """The part that is replaced has no weights any more, and outputs are as they were."""
    make = instances if task == "instances" else semantic
    session = session_of(make(tmp_path, scope, root=tree_of(tmp_path, task), **options))
    data = session.data()
    model = session.model(data.categories).eval()
    part = model if scope == "model" else session.task.exported_features(model)
    file, forward = Part(part), part.forward
    inputs = next(iter(eval_batches(data.val, 2))).inputs
    with torch.inference_mode():
        if "letterbox" in options:  # a file knows nothing of padding
            part.forward = lambda given, *_: forward(given["images"] if scope == "model" else given)
        expected = tree_leaves(model(inputs))
        part.forward = forward
        replace = session.task.replace_model_ if scope == "model" else session.task.replace_features_
        replace(model, file)
        for parameter in part.parameters():
            parameter.zero_()
        found = tree_leaves(model(inputs))
    assert file.runs
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("letterbox", [False, True])
def test_a_detector_is_checked_on_its_validation_images(letterbox: bool, tmp_path: Path) -> None:
    session = session_of(instances(tmp_path, "model", root=tree_of(tmp_path, "instances"), letterbox=letterbox))
    trained = chosen_weights(session, with_weights(session, tmp_path), "a test")
    images = _images(session, trained)
    assert images is not None
    assert len(images) == 4
    assert torch.equal(images[3], session.data(trained).val[3][0])


@pytest.mark.usefixtures("known_kinds")
def test_features_that_are_no_module_of_the_model_are_told(tmp_path: Path) -> None:
    class Elsewhere(Dense):
        name = "elsewhere"

        def features(self, model: nn.Module) -> nn.Module:
            return nn.Sequential(model.pyramid)

    session = dense_session(Elsewhere, tmp_path)
    with pytest.raises(ConfigError, match=r"no module inside Segmenter.*replace_features_"):
        session.task.replace_features_(session.model(Categories()), nn.Identity())


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["model", "features"])
def test_a_segmenter_and_its_backbone_and_neck(scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole images, and sliding windows. At ratio 0: flat images have many windows of equal score."""
    tree = tree_of(tmp_path, "semantic")
    config = semantic(tmp_path, scope, root=tree)
    eager, found, _ = both(config, tmp_path, "torch", ratios="0")
    assert found.runtime is not None
    assert found.runtime.file.endswith(f"{scope}.pt2")
    agree(found.score.values, eager.score.values, 0.05)
    sliding = session_of(semantic(tmp_path / "sliding", scope, root=tree, evaluation="sliding"))
    eager = evaluate_checkpoint(sliding, weights=str(tmp_path / "weights" / "step-00000001"), ratios="0")
    export = str(tmp_path / "tiny" / "export")
    with pytest.raises(CheckpointError, match="sliding_overlap"):
        evaluate(sliding, runtime="torch", weights=export)
    monkeypatch.setattr(type(sliding.task), "preprocessing", lambda task: None)  # as of a task that does not say
    found = evaluate(sliding, runtime="torch", weights=export)
    agree(found.score.values, eager.score.values, 0.05)


@TRANSFORMERS
@pytest.mark.slow
@pytest.mark.parametrize("scope", ["model", "features"])
def test_mask2former_whole_and_up_to_its_pixel_decoder(scope: str, tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "semantic")
    config = semantic(tmp_path, scope, model={**test_semantic.MASK2FORMER, "img_size": 64}, root=tree)
    eager, found, _ = both(config, tmp_path, "torch", ratios="0")
    agree(found.score.values, eager.score.values, 0.05)


@pytest.mark.parametrize("scope", ["model", pytest.param("features", marks=pytest.mark.slow)])
def test_a_detector_whole_for_one_image_and_its_backbone_and_neck(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All detections agree, and not only their score, which is poor with random weights. Batches hold four images."""
    tree = str(coco_tree(tmp_path / "tree"))
    runtime = "onnxruntime" if scope == "model" else "torch"
    eager, found, session = both(instances(tmp_path, scope, root=tree), tmp_path, runtime)
    assert found.runtime is not None
    assert (found.runtime.scope, found.score.count) == (scope, eager.score.count)
    ours, theirs = (json.loads(path.read_text()) for path in (found.folder.path / PREDICTIONS, tmp_path / "eager.json"))
    assert len(ours) == len(theirs) > 0
    for row, wanted in zip(ours, theirs, strict=True):
        assert (row["image_id"], row["category_id"]) == (wanted["image_id"], wanted["category_id"])
        assert row["score"] == pytest.approx(wanted["score"], abs=1e-4)
        assert row["bbox"] == pytest.approx(wanted["bbox"], abs=1e-2)
    assert isinstance(session.reporter, SilentReporter)
    assert not any("padding" in warning for warning in session.reporter.warnings)
    padded = session_of(instances(tmp_path / "padded", scope, root=tree, letterbox=True))
    export = tmp_path / "tiny" / "export"
    with pytest.raises(CheckpointError, match="resize"):
        evaluate(padded, runtime=runtime, weights=str(export))
    monkeypatch.setattr(type(padded.task), "preprocessing", lambda task: None)  # as of a task that does not say
    assert evaluate(padded, runtime=runtime, weights=str(export)).score.count == 4
    assert isinstance(padded.reporter, SilentReporter)
    assert any("the file computes the padding" in warning for warning in padded.reporter.warnings)


# -- what is refused ----------------------------------------------------------------------------------------------


def refuse(runs: Path, kind: type[SparseViTError], told: str, *, runtime: str = "onnxruntime", **sections: Any) -> None:
    """An evaluation ends with this error, and an earlier result is as it was."""
    before = written(runs)
    with pytest.raises(kind, match=told):
        evaluate(digits(runs, **sections), runtime=runtime)
    assert written(runs) == before


def test_ratios_beside_an_exported_file_are_refused(runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"--ratios: 0\.5, but an exported file computes at its own"):
        evaluate(digits(runs), runtime="onnxruntime", ratios="0.5")


@pytest.mark.parametrize(
    ("weights", "kind", "told"),
    [
        ("finetune", ConfigError, "trained weights, and --runtime runs an exported file"),
        ("best", ConfigError, "trained weights"),
        ("no/such/folder", ConfigError, "is not there"),
        ("tiny/evaluate", CheckpointError, r"no manifest\.json, so no export finished in it"),
        ("tiny/export/model.pt2", ConfigError, r"onnxruntime does not read model\.pt2"),
        ("tiny/export/model.safetensors", ConfigError, r"onnxruntime does not read model\.safetensors"),
    ],
)
def test_weights_that_are_no_export_are_refused(
    weights: str, kind: type[SparseViTError], told: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    with pytest.raises(kind, match=told):
        evaluate(digits(runs), runtime="onnxruntime", weights=weights)


def test_an_export_folder_without_a_runtime_says_what_to_type(runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"is the folder of an export.*evaluate --runtime torch\|onnxruntime"):
        evaluate(digits(runs), weights=str(runs / "tiny" / "export"))


def test_an_experiment_without_an_export_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`sparsevit export` was not run.*Type: sparsevit export"):
        evaluate(digits(tmp_path), runtime="onnxruntime")


def test_an_unknown_runtime_and_one_that_is_not_installed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(runs, ConfigError, "'tensorrt' is not known", runtime="tensorrt")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else found(name, *a))
    refuse(runs, ConfigError, r"openvino not installed.*sparsevit-cli\[openvino\]", runtime="openvino")


@pytest.mark.parametrize("name", ["model.onnx", WEIGHTS, "sparsity.json"])
def test_files_that_are_damaged_or_missing_are_refused(name: str, runs: Path) -> None:
    path = runs / "tiny" / "export" / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refuse(runs, CheckpointError, f"{name}.*another SHA-256")
    path.unlink()
    refuse(runs, CheckpointError, f"{name}: is missing")


@needs_openvino
def test_the_weights_beside_a_file_are_looked_at_too(runs: Path) -> None:
    folder = runs / "tiny" / "export"
    with_xml(folder)
    (folder / "model.bin").write_bytes(b"short")
    refuse(runs, CheckpointError, r"model\.bin: has another SHA-256", runtime="openvino")


def test_a_folder_without_a_file_of_the_runtime(runs: Path) -> None:
    changed(runs / "tiny" / "export", lambda manifest: manifest["files"].pop("model.onnx"))
    refuse(runs, CheckpointError, r"onnxruntime reads model\.onnx; it holds model\.pt2")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("outputs"),
        lambda manifest: manifest.update(precision="int4"),
        lambda manifest: manifest["input"].update(shape=["batch", 3, "height", 32]),
        lambda manifest: manifest.update(files=[]),
    ],
)
def test_a_manifest_that_is_no_manifest(change: Callable[[Any], object], runs: Path) -> None:
    changed(runs / "tiny" / "export", change)
    refuse(runs, CheckpointError, r"manifest\.json")


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"img_size": 48}}, "image size 32x32, the configuration has 48x48"),
        ({"model": {"importance": "l2"}}, "importance mean_abs_l2, the configuration has l2"),
        ({"model": {"partition": "pad_first"}}, "partition roll_first, the configuration has pad_first"),
        ({"model": {"window_size": 4}}, "windows"),
        ({"model": {"embed_dim": 16}}, "tensors that do not fit"),
        ({"model": {"depths": [2, 4]}}, "depths|tensors that do not fit"),
        ({"seed": 1}, "trained with seed 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_an_export_of_another_configuration_is_refused(sections: Any, told: str, runs: Path) -> None:
    refuse(runs, CheckpointError, told, **sections)


def test_images_that_are_prepared_in_another_way_are_refused(runs: Path) -> None:
    """Or the score would not be that of what is served."""
    changed(
        runs / "tiny" / "export",
        lambda told: told["preprocessing"].update(interpolation="bicubic", to=[36, 36]),
        SERVING,
    )
    told = r"to \[36, 36\], the configuration has \[32, 32\]; interpolation bicubic, the configuration has bilinear"
    refuse(runs, CheckpointError, told)


def test_an_export_of_another_task_or_other_categories_is_refused(runs: Path, tmp_path: Path) -> None:
    folder = str(runs / "tiny" / "export")
    other = session_of(semantic(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="task classification, the configuration has semantic"):
        evaluate(other, runtime="onnxruntime", weights=folder)

    def rename(document: Any) -> None:
        document["model"]["categories"][0] = "nought"

    changed(runs / "tiny" / "export", rename, "sparsity.json")
    refuse(runs, DataError, "knows the classes nought")


def test_an_export_with_other_outputs_is_refused(runs: Path) -> None:
    changed(runs / "tiny" / "export", lambda manifest: manifest["outputs"][0].update(shape=["batch", 11]))
    refuse(runs, CheckpointError, r"its outputs are output \('batch', 11\); the configuration's are output \(1, 10\)")


def test_images_of_another_size_are_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a source of one's own may give them."""
    session = digits(runs)
    data = session.data()
    grown = type(data.val).__getitem__
    monkeypatch.setattr(
        type(data.val),
        "__getitem__",
        lambda self, n: (torch.zeros(1, 40, 32).expand(grown(self, n)[0].shape[0], -1, -1), 0),
    )
    refuse(runs, DataError, r"40x32 pixels; .*model\.onnx takes . channels? and 32x32 pixels")


def test_a_runtime_that_gives_nan_ends_as_other_numbers_do(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a later batch, when the folder is open already: no result is left, and none is set aside."""
    kind = type(RUNTIMES["onnxruntime"])
    honest = kind._run
    count = [0]

    def spoilt(self: Any, *arguments: Any) -> Any:
        run = honest(self, *arguments)

        def of(images: Tensor) -> list[Tensor]:
            count[0] += 1
            return [output * math.nan if count[0] > 2 else output for output in run(images)]

        return of

    monkeypatch.setattr(kind, "_run", spoilt)
    result = (runs / "tiny" / "evaluate" / "metrics.json").read_bytes()
    with pytest.raises(NonFiniteError, match=r"model\.onnx: onnxruntime gives NaN"):
        evaluate(digits(runs), runtime="onnxruntime")
    assert count[0] == 3
    assert (runs / "tiny" / "evaluate" / "metrics.json").read_bytes() == result
    assert not list((runs / "tiny" / "evaluate").glob("earlier-*"))


def test_a_signal_ends_it_between_two_batches(runs: Path) -> None:
    shutil.rmtree(runs / "tiny" / "evaluate")
    stop = StopRequest()
    stop.signal_number = signal.SIGINT
    with pytest.raises(StoppedError, match="nothing of this evaluation") as raised:
        evaluate(digits(runs).replaced(stop=stop), runtime="onnxruntime")
    assert raised.value.exit_code == 130
    left = {path.name for path in (runs / "tiny" / "evaluate").rglob("*")}
    assert left == {"config.yaml", "command.txt", "env.json"}


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--runtime", "tensorrt"], 2, "is not known"),
        (["--runtime", "onnxruntime", "--ratios", "0.5"], 2, "its own ratios"),
        (["--runtime", "onnxruntime", "--set", "model.img_size=48"], 4, "another model"),
        (["--runtime", "onnxruntime", "--weights", "elsewhere"], 2, "is not there"),
        (["--weights", "runs/tiny/export"], 2, "--runtime"),
    ],
)
def test_exit_codes(words: list[str], code: int, told: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    (runs.parent / "tiny.yaml").write_text(tiny_config(output="runs").model_dump_json())
    done = CliRunner().invoke(app, ["evaluate", "--config", "tiny.yaml", *words], prog_name="sparsevit")
    assert done.exit_code == code, done.output
    assert told in " ".join(done.output.split())


def test_the_plan_says_that_a_file_is_scored(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    (runs.parent / "tiny.yaml").write_text(tiny_config(output="runs").model_dump_json())
    words = ["evaluate", "--config", "tiny.yaml", "--dry-run", "--runtime", "onnxruntime"]
    done = CliRunner().invoke(app, words, prog_name="sparsevit")
    assert "an exported file in onnxruntime is scored" in " ".join(done.output.split()), done.output
