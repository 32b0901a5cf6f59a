"""Eight bits: the ranking stays in float, nothing is sent or printed, and what is lost is told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsevit_cli.checkpoints import save_checkpoint
from sparsevit_cli.data.images import UnreadableImageError
from sparsevit_cli.data.source import Batch, Categories, Source
from sparsevit_cli.errors import ConfigError, DataError, MeasurementError, StoppedError
from sparsevit_cli.exporting import (
    WEIGHTS,
    export,
    export_model,
    latency,
    named_tensors,
    quantization,
    resolved_activations,
    structured_images,
)
from sparsevit_cli.exporting.openvino_ir import changed_windows, ranking_nodes, rankings
from sparsevit_cli.exporting.quantization import LayerError, layer_errors, load_nncf, quantised_layers, quantize
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runtimes import runtime
from sparsevit_cli.swin import set_sparsity, sparsify_
from sparsevit_cli.tasks.task import Metric, Score
from sparsevit_cli.workflows import eight_bits
from sparsevit_cli.workflows.eight_bits import WINDOW_IMAGES, Deployed, Quantiser
from sparsevit_cli.workflows.evaluate import evaluate_export
from sparsevit_cli.workflows.export import export_winner
from sparsevit_cli.workflows.paired import PairedScorer, change
from sparsevit_cli.workflows.plan import plan_of
from sparsevit_cli.workflows.session import Session
from test_exporting_runtimes import example_of, photograph
from tiny import shaken_, tiny_config, tiny_swin

needs_nncf = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nncf", "openvino", "onnxscript")),
    reason="needs sparsevit-cli[openvino,export]",
)
SIDE = 64
SHAPE = (3, SIDE, SIDE)
RATIOS = [[0.5], [0.2]]


def images(count: int, seed: int = 0) -> list[Tensor]:
    return list(structured_images(SHAPE, count, seed).split(1))


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse tiny Swin as an OpenVINO file of float32."""
    model = tiny_swin(img_size=SIDE, window_size=2, embed_dim=8, depths=(1, 2), always_partition=True).eval()
    shaken_(model)
    set_sparsity(sparsify_(model), RATIOS)
    folder = tmp_path_factory.mktemp("float")
    export_model(model, folder, input_size=SIDE, formats=("onnx", "openvino"), measure_ms=False)
    return folder / "model.xml"


@pytest.fixture(scope="module")
def int8_file(float_file: Path) -> Path:
    target = float_file.with_name("int8.xml")
    quantize(float_file, target, images(8))
    return target


def read(path: Path) -> Any:
    import openvino

    return openvino.Core().read_model(path)


def run(path: Path, batch: Tensor) -> Tensor:
    return runtime("openvino").load(path).run(batch)[0]


# -- the file -----------------------------------------------------------------------------------------------------


@needs_nncf
def test_matrices_have_eight_bits_and_the_ranking_has_none(float_file: Path, int8_file: Path) -> None:
    model = read(int8_file)
    quantisers = [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
    assert len(quantisers) > 10
    assert int8_file.with_suffix(".bin").stat().st_size < 0.6 * float_file.with_suffix(".bin").stat().st_size
    ranking = list(ranking_nodes(model))
    assert sum(node.get_type_name() == "TopK" for node in ranking) == 3  # unshifted; unshifted and shifted
    assert len(ranking) == len(list(ranking_nodes(read(float_file)))) > 3 * 4
    assert not {node.get_friendly_name() for node in quantisers} & {node.get_friendly_name() for node in ranking}


@needs_nncf
def test_it_computes_what_the_float_file_does_at_any_batch(float_file: Path, int8_file: Path) -> None:
    for count in (1, 3):
        batch = structured_images(SHAPE, count, seed=5)
        ours, theirs = run(int8_file, batch), run(float_file, batch)
        assert not torch.equal(ours, theirs)
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


@needs_nncf
@pytest.mark.parametrize("place", ["score", "map"])
def test_eight_bits_in_the_ranking_are_refused(
    place: str, float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if NNCF rounded the scores of a stage, or the map that is scored."""
    from openvino import opset13 as ops

    model = read(float_file)
    ranking = rankings(model)[0]
    node = ranking.top if place == "score" else ranking.scoring[-1]
    low, high = ops.constant(np.float32(0)), ops.constant(np.float32(9))
    rounded = ops.fake_quantize(node.input_value(0), low, high, low, high, 256)
    node.input(0).replace_source_output(rounded.output(0))
    monkeypatch.setattr(quantization, "_by_nncf", lambda *args, **kwargs: model)
    with pytest.raises(MeasurementError, match="eight bits in 1 of 3 rankings of windows"):
        quantize(float_file, tmp_path / "int8.xml", images(2))
    assert not list(tmp_path.iterdir())


@needs_nncf
def test_eight_bits_in_the_ranking_of_an_onnx_file_are_refused(
    float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There eight bits are whole numbers, which are made floats again before they are scored."""
    import onnx
    from onnx import TensorProto, helper

    source = float_file.with_suffix(".onnx")
    model = onnx.load(source)
    scored = next(node for node in model.graph.node if node.op_type == "Abs")
    model.graph.initializer.extend(
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1]),
            helper.make_tensor("zero", TensorProto.INT8, [], [3]),
        ]
    )
    pair = [
        helper.make_node("QuantizeLinear", [scored.input[0], "scale", "zero"], ["whole"]),
        helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["rounded"]),
    ]
    scored.input[0] = "rounded"
    number = list(model.graph.node).index(scored)
    nodes = [*model.graph.node][:number] + pair + [*model.graph.node][number:]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    monkeypatch.setattr(quantization, "_by_nncf", lambda *args, **kwargs: model)
    with pytest.raises(MeasurementError, match="eight bits in 1 of 3 rankings of windows"):
        quantize(source, tmp_path / "int8.onnx", images(2))
    assert not list(tmp_path.iterdir())


def test_a_scale_between_a_mean_and_a_matrix_of_eight_bits_is_why_the_classifier_stays_in_float() -> None:
    """OpenVINO's fused mean takes a scale of channels for another one. Once this fails, `behind_means` can go."""
    openvino = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    from sparsevit_cli.runtimes.openvino import compiled

    generator = np.random.default_rng(0)
    scale = generator.uniform(0.5, 2, (1, 32)).astype(np.float32)
    matrix = (generator.integers(-127, 128, (8, 32)) / 127).astype(np.float32)
    matrix[:, 0] = 1
    one = ops.constant(np.float32(1))
    low = ops.constant(np.float32(-1))
    maps = ops.parameter([-1, 4, 4, 32], name="maps")
    pooled = ops.multiply(ops.reduce_mean(maps, ops.constant([1, 2]), keep_dims=False), ops.constant(scale))
    rounded = ops.fake_quantize(pooled, low, one, low, one, 256)
    weights = ops.fake_quantize(ops.constant(matrix), low, one, low, one, 255)
    product = ops.matmul(rounded, weights, transpose_a=False, transpose_b=True)
    model = openvino.Model([ops.result(product)], [maps], "test")
    drawn = generator.uniform(-1, 1, (3, 4, 4, 32)).astype(np.float32)
    found = compiled(model, "fp32", 1)(torch.from_numpy(drawn))[0].numpy()
    right = drawn.mean((1, 2)) * scale @ matrix.T
    assert np.abs(found - right).max() > 0.1 * np.abs(right).max()
    assert quantization.behind_means(model) == []  # a scale stands between; before quantisation there is none


@needs_nncf
@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_layers_can_stay_in_float(suffix: str, float_file: Path, tmp_path: Path) -> None:
    """Every layer has an error of its own; what is named keeps its 32 bits, in the files of both runtimes."""
    float_file = float_file.with_suffix(suffix)
    errors = {layer.name: layer.error for layer in layer_errors(float_file, images(2), images(4))}
    assert len(errors) == 3 * 5 + 2  # four matrices and a product a block (NNCF leaves one), patch embedding, merging
    assert all(0 < error < 1 for error in errors.values())
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    target = tmp_path / f"int8{suffix}"
    quantize(float_file, target, images(4), in_float=worst)
    assert set(quantised_layers(read(target))) == set(errors) - set(worst)


@needs_nncf
def test_a_layer_that_does_not_stay_in_float_is_told(
    float_file: Path, int8_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NNCF says nothing of a name that it does not find."""
    layer = next(iter(quantised_layers(read(int8_file))))
    monkeypatch.setattr(quantization, "_by_nncf", lambda *_, **__: read(int8_file))
    for name in (layer, "no such layer"):
        with pytest.raises(MeasurementError, match=f"int8: {name} should stay in float and did not"):
            quantize(float_file, tmp_path / "int8.xml", images(1), in_float=[name])
        assert not list(tmp_path.iterdir())


@needs_nncf
def test_the_classifier_of_an_onnx_file_is_not_ranked(float_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has 32 bits anyway. OpenVINO names its matrix after the layer, with a suffix that the ONNX file has not."""
    monkeypatch.setattr(quantization, "_outputs", lambda *_: [torch.ones(1)])  # names are enough
    source = float_file.with_suffix(".onnx")
    classifier = quantization.behind_means(read(source))
    assert classifier[0].endswith("/WithoutBiases")
    layers = [layer.name for layer in layer_errors(source, images(1), images(1))]
    assert len(layers) == 3 * 5 + 2
    assert not set(classifier) & set(layers)


@needs_nncf
def test_no_image_and_no_package_are_refused(float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no image to calibrate on"):
        quantize(float_file, tmp_path / "int8.xml", [])
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "nncf" else real(name, *rest))
    with pytest.raises(ConfigError, match=r"nncf not installed. Type: pip install \"sparsevit-cli\[openvino\]\""):
        quantize(float_file, tmp_path / "int8.xml", images(2))
    assert not list(tmp_path.iterdir())


@needs_nncf
def test_it_stops_between_two_images_and_leaves_nothing(float_file: Path, tmp_path: Path) -> None:
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise StoppedError("export", "SIGINT arrived", "Again.", interrupted=True)

    with pytest.raises(StoppedError):
        quantize(float_file, tmp_path / "int8.xml", images(8), check=check)
    assert not list(tmp_path.iterdir())


CHILD = """
import importlib.abc, json, os, socket, sys, urllib.request
from pathlib import Path

seen = {}

class Watching(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("nncf", "openvino"):
            blocked = "openvino_telemetry" in sys.modules and sys.modules["openvino_telemetry"] is None
            seen[name] = (os.environ.get("NNCF_CI"), blocked)
        return None

sys.meta_path.insert(0, Watching())
sent = []
socket.socket.connect = lambda *args: sent.append("connect")
urllib.request.urlopen = lambda *args, **kwargs: sent.append("urlopen")

import torch
from sparsevit_cli.exporting.quantization import quantize

source, target = map(Path, sys.argv[1:3])
quantize(source, target, [torch.rand(1, 3, 64, 64)])
import nncf.telemetry.decorator as decorator
files = [str(path) for path in Path.home().rglob("*") if path.is_file()]
seen.update(sent=sent, files=files, telemetry=type(decorator.telemetry).__name__, after=os.environ.get("NNCF_CI"))
seen["importable"] = sys.modules.get("openvino_telemetry", "") is not None
Path(sys.argv[3]).write_text(json.dumps(seen))
"""


@needs_nncf
def test_nothing_is_sent_stored_at_home_or_printed(float_file: Path, tmp_path: Path) -> None:
    """In a process without pytest, beside which NNCF keeps quiet by itself. The switches are set before each import."""
    home = tmp_path / "home"
    home.mkdir()
    told = tmp_path / "told.json"
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "NNCF_CI", "NNCF_DEV")}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(float_file), str(tmp_path / "int8.xml"), str(told)],
        env={**environment, "HOME": str(home)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert (child.stdout, child.stderr) == ("", "")
    seen = json.loads(told.read_text())
    assert seen["nncf"] == ["1", True]
    assert seen["openvino"][1] is True
    assert (seen["sent"], seen["files"]) == ([], [])
    assert seen["telemetry"] == "MagicMock"
    assert (seen["after"], seen["importable"]) == (None, True)  # as it was, for everybody else


# -- windows ------------------------------------------------------------------------------------------------------


@needs_nncf
def test_windows_that_change_are_counted(float_file: Path, int8_file: Path) -> None:
    """Of two stages, the first with one ranking and the second with two: 32 and twice 12 windows an image."""
    batches = [structured_images(SHAPE, 2, seed=3)]
    assert changed_windows(float_file, batches, "fp32") == (2 * (32 + 12 + 12), 0)
    kept, changed = changed_windows(float_file, batches, "fp32", int8_file)
    assert kept == 2 * (32 + 12 + 12)
    assert changed < 0.2 * kept


# -- what is lost -------------------------------------------------------------------------------------------------


class _Task:
    """As much of a task as a paired scorer asks for."""

    def __init__(self, *, mean_over_images: bool) -> None:
        self.metric = Metric("m", "m", mean_over_images=mean_over_images)


class _Ratio:
    """Right over all, in percent: a ratio of sums, and a mean over images if all count the same."""

    def __init__(self) -> None:
        self.right = self.total = 0.0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        self.right += float((outputs * batch.targets).sum())
        self.total += float(batch.targets.sum())

    def add(self, other: _Ratio) -> None:
        self.right, self.total = self.right + other.right, self.total + other.total

    def compute(self) -> Mapping[str, float]:
        return {"m": 100 * self.right / self.total}


def scored(task: Any, right: Tensor, weights: Tensor, make: Callable[[], Any] = _Ratio) -> tuple[Score, PairedScorer]:
    scorer = PairedScorer(task, make)
    for numbers in torch.arange(len(right)).split(7):
        scorer.update(right[numbers], Batch(weights[numbers], weights[numbers], numbers))
    return Score(scorer.compute()["m"], {}, len(right)), scorer


def test_a_mean_over_images_is_paired() -> None:
    before, after = (torch.randn(50) > 0).double(), (torch.randn(50) > 0.3).double()
    task: Any = _Task(mean_over_images=True)
    ones = torch.ones(50)
    found = change(task, scored(task, before, ones), scored(task, after, ones))
    differences = (100 * (after - before)).tolist()
    assert found.difference == pytest.approx(sum(differences) / 50)
    assert found.standard_error == pytest.approx(stdev(differences) / math.sqrt(50))
    assert found.method == "paired over 50 images"


def test_another_metric_leaves_groups_of_images_out() -> None:
    """The error of a ratio of sums, against that of many drawn sets of images."""
    count = 400
    weights = torch.rand(count).double() + 0.2
    before, after = (torch.rand(2, count) < torch.tensor([[0.8], [0.75]])).double()
    task: Any = _Task(mean_over_images=False)
    found = change(task, scored(task, before, weights), scored(task, after, weights))
    assert found.method == "jackknife over 20 groups of images"
    drawn = torch.randint(count, (2000, count))
    of_drawn = 100 * ((after - before) * weights)[drawn].sum(1) / weights[drawn].sum(1)
    assert found.standard_error == pytest.approx(float(of_drawn.std()), rel=0.4)


def test_a_scorer_that_cannot_add_gives_no_error() -> None:
    class Plain:
        def __init__(self) -> None:
            self.inner = _Ratio()
            self.update, self.compute = self.inner.update, self.inner.compute

    task: Any = _Task(mean_over_images=False)
    ones = torch.ones(30)
    both = [scored(task, ones, ones, Plain) for _ in range(2)]
    found = change(task, *both)
    assert (found.standard_error, found.method, found.difference) == (None, "not known", 0.0)


# -- the command --------------------------------------------------------------------------------------------------

INT8 = {"formats": ["openvino"], "precision": "int8", "activations": "fp32", "latency": False, "calibration_images": 6}
RATIOS_TYPED = "[[.5],[.5]]"


def session_in(folder: Path, **export: Any) -> Session:
    data = {"eval_batch_size": 128, "digits": {"digit_min": 12, "digit_max": 16}}
    return Session(tiny_config(output=str(folder), data=data, export={**INT8, **export}), SilentReporter())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a tiny model that nobody trained: its scores fall in int8 or rise, as chance has it."""
    folder = tmp_path_factory.mktemp("weights")
    model = session_in(folder).model(Categories(tuple("0123456789")))
    shaken_(model)
    return str(save_checkpoint(folder / "weights", 1, {"model": model.state_dict()}, {}))


def test_images_for_eight_bits_are_read_when_they_are_asked_for(weights: str, tmp_path: Path) -> None:
    """Not held: those of 1024 x 2048 pixels would take 3 GB."""
    session = session_in(tmp_path)
    data = session.data()
    images = Quantiser(session, session.model(data.categories), data, "model", "fp32").images
    held = weakref.ref(images[0])
    assert held() is None
    assert (len(images), tuple(images[0].shape)) == (6, (1, 3, *session.img_size))
    assert torch.equal(images[5], images[3:][2])
    assert len(list(images)) == 6


def test_windows_of_a_sliding_segmenter_are_not_all_of_one_corner(weights: str, tmp_path: Path) -> None:
    session = session_in(tmp_path)
    data = session.data()
    deployed = Deployed(session, session.model(data.categories), "model")
    windows = torch.rand(3, 3, *session.img_size)
    deployed.model = lambda _image: deployed._run(windows)  # type: ignore[assignment]
    for sample in range(4):
        assert torch.equal(deployed.input_of(data.search, sample), windows[sample % 3][None])


@pytest.mark.parametrize("formats", [["onnx"], ["onnx", "openvino"]])
def test_a_plan_tells_how_often_the_validation_data_are_scored(formats: list[str], tmp_path: Path) -> None:
    session = session_in(tmp_path, formats=formats)
    (line,) = (line for line in plan_of(session, "export").lines if line.startswith("int8: "))
    assert f"350 validation images are scored {1 + len(formats)} times, in fp32 and in int8 for " in line


def test_an_export_is_measured_by_the_section_clock(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    class ReachedError(Exception):
        """Enough was seen."""

    def measured(_candidates: Any, **settings: Any) -> Any:
        given.update(settings)
        raise ReachedError

    monkeypatch.setattr(latency, "measure_interleaved", measured)
    export = {"formats": ["onnx"], "latency": True}
    clock = {"retries": 7, "max_spread": 0.33, "wait": 0}
    session = Session(tiny_config(output=str(tmp_path), export=export, clock=clock), SilentReporter())
    with pytest.raises(ReachedError):
        export_winner(session, weights=weights, ratios=RATIOS_TYPED)
    assert (given["retries"], given["max_spread"]) == (7, 0.33)


@needs_nncf
def test_the_dense_model_for_the_clock_is_quantised_on_drawn_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever 128 images are given: they would change no latency, and take minutes."""
    counts: list[int] = []
    real = quantization.quantize

    def counted(source: Path, target: Path, calibration: Any, **settings: Any) -> None:
        counts.append(len(calibration))
        real(source, target, calibration, **settings)

    monkeypatch.setattr(export, "quantize", counted)
    monkeypatch.setattr(
        latency, "measure_interleaved", lambda runs, **_: {name: Latency.from_samples([1.0] * 9) for name in runs}
    )
    model = tiny_swin(img_size=SIDE, window_size=2, embed_dim=8, depths=(1, 1), always_partition=True).eval()
    set_sparsity(sparsify_(model), 0.5)
    export_model(model, tmp_path, input_size=SIDE, formats=("openvino",), precision="int8", calibration=images(5))
    assert counts == [5, 2]


@needs_nncf
def test_the_command_tells_the_score_before_and_after(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both formats, each in its runtime. The float32 files are the same graph: one of them is scored."""
    session = session_in(tmp_path, max_loss=100.0, formats=["onnx", "openvino"])
    real, passes, said = Deployed.score, list[str](), list[str]()

    def counted(self: Deployed, path: Path, *others: Any) -> Any:
        passes.append(path.name)
        return real(self, path, *others)

    monkeypatch.setattr(Deployed, "score", counted)
    monkeypatch.setattr(session.reporter, "say", said.append)
    summary = export_winner(session, weights=weights, ratios=RATIOS_TYPED)
    assert passes == ["model.onnx", "model.onnx", "model.xml"]
    assert any("350 validation images are scored 3 times, in fp32 and in int8 for onnx and openvino" in s for s in said)
    assert list(summary.eight_bits) == ["model.onnx", "model.xml"]
    manifest = summary.document()
    assert (manifest["precision"], manifest["activations"]) == ("int8", "fp32")
    for runtime_name, (name, found) in zip(("onnxruntime", "openvino"), summary.eight_bits.items(), strict=True):
        assert (found.calibration_images, found.in_float, found.window_images) == (6, (), WINDOW_IMAGES)
        assert found.change.method == "paired over 350 images"
        assert 0 < (found.change.standard_error or 0) < 10
        assert 0 < found.changed < 0.3 * found.kept
        assert manifest["int8"][{"model.onnx": "onnx", "model.xml": "openvino"}[name]] == found.document()
        checked = manifest["checked_against_eager"][name]
        assert checked["differences"][0]["rms"] < 1e-4
        assert 1e-3 < checked["lowered"]["middle"] < 0.5
        told = "\n".join(found.lines(name))
        number = r"[+-]?[\d.]+"
        words = (
            f"{name} in int8: top-1 {number} % in fp32, {number} % in int8: {number}, standard error {number} .paired"
        )
        assert re.match(words, told), told
        assert f"{found.changed} of {found.kept} kept windows are others in int8" in told
        # what was scored is what is deployed
        assert quantised_layers(read(summary.folder.path / name))
        scored = evaluate_export(session_in(tmp_path), runtime_name, export=str(summary.folder.path))
        assert scored.score.value == found.change.after.value
        assert scored.runtime is not None
        assert scored.runtime.precision == "int8+fp32"
        served = example_of(f"serve_{runtime_name}")
        picture = photograph(tmp_path / "picture.png", (40, 30))
        steps = json.loads(summary.report.serving.read_text())["preprocessing"]
        image = torch.from_numpy(served.model_input(picture, steps))
        found_there = served.scores(summary.folder.path, picture)[1]
        np.testing.assert_allclose(
            found_there, runtime(runtime_name).load(summary.folder.path / name, shape=image.shape).run(image)[0][0],
            atol=1e-5,
        )  # fmt: skip


def is_mapped(path: Path) -> bool:
    """True if weights in that file are in this process's memory: Windows would neither write nor move it then."""
    maps = Path("/proc/self/maps")
    return maps.is_file() and str(path.with_suffix(".bin")) in maps.read_text()


@needs_nncf
def test_layers_that_cost_most_stay_in_float_if_too_much_is_lost(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with fewer than two layers in float loses too much: one is tried, then two. None is open meanwhile."""
    real, layers = Deployed.score, dict[str, object]()
    written, moved, write, move = list[Path](), list[Path](), quantize, Path.replace

    def quantise(source: Path, target: Path, *given: Any, **settings: Any) -> None:
        assert not is_mapped(target)
        written.append(target)
        write(source, target, *given, **settings)

    def replace(self: Path, target: Path) -> Path:
        assert not is_mapped(self)
        assert not is_mapped(target)
        moved.append(self)
        return move(self, target)

    monkeypatch.setattr(eight_bits, "quantize", quantise)
    monkeypatch.setattr(Path, "replace", replace)

    def score(self: Deployed, path: Path, *others: Any) -> Any:
        found, scorer = real(self, path, *others)
        if path.parent.name == "int8":
            quantised = quantised_layers(read(path))
            layers.update({} if layers else quantised)
            if len(quantised) > len(layers) - 2:
                found = dataclasses.replace(found, value=found.value - 50)
        return found, scorer

    def ranked(self: Quantiser, source: Path) -> tuple[LayerError, ...]:
        return tuple(LayerError(name, 1 / number) for number, name in enumerate(layers, 1))

    monkeypatch.setattr(Deployed, "score", score)
    monkeypatch.setattr(Quantiser, "_ranked", ranked)
    session = session_in(tmp_path, max_loss=40.0, calibration_images=2)
    (found,) = export_winner(session, weights=weights, ratios=RATIOS_TYPED).eight_bits.values()
    assert [layer.name for layer in found.in_float] == list(layers)[:2]
    assert found.without is not None
    assert found.without.difference < -40 < found.change.difference
    assert len(written) == 3
    assert {path.name for path in moved} >= {"model.xml", "model.bin"}
    folder = tmp_path / "tiny" / "export"
    assert set(quantised_layers(read(folder / "model.xml"))) == set(list(layers)[2:])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["int8"]["openvino"]["in_float"] == list(layers)[:2]


@needs_nncf
def test_a_file_of_eight_bits_that_computes_something_else_is_not_kept(float_file: Path, tmp_path: Path) -> None:
    """Here it is that of other weights."""

    def quantise(source: Path, target: Path) -> dict[str, Any]:
        for suffix in (".xml", ".bin"):
            shutil.copyfile(float_file.with_suffix(suffix), target.with_suffix(suffix))
        return {}

    model = tiny_swin(img_size=SIDE, window_size=2, embed_dim=8, depths=(1, 2), always_partition=True, seed=1).eval()
    shaken_(model)
    set_sparsity(sparsify_(model), RATIOS)
    settings: dict[str, Any] = {"formats": ("openvino",), "precision": "int8", "measure_ms": False}
    with pytest.raises(MeasurementError, match=r"model.xml in int8: an image in the middle differs .* 0.5 is allowed"):
        export_model(model, tmp_path / "e", input_size=SIDE, calibration=images(1), quantise=quantise, **settings)
    assert not (tmp_path / "e").exists()


@needs_nncf
def test_settings_that_contradict_int8_are_refused() -> None:
    assert resolved_activations("int8", "auto", ("onnx",)) == "fp32"
    assert resolved_activations("int8", "fp32", ("openvino",)) == "fp32"
    assert resolved_activations("int8", "auto", ("onnx", "openvino")) == runtime("openvino").activations()[-1]
    with pytest.raises(ConfigError, match="of all formats only onnx and openvino have eight bits"):
        resolved_activations("int8", "auto", ("pt2",))
    with pytest.raises(ConfigError, match=r"export.activations: bf16, and of all formats only openvino"):
        resolved_activations("int8", "bf16", ("onnx",))


@needs_nncf
@pytest.mark.parametrize("fault", ["lost", "stopped", "unreadable", "empty"])
def test_what_cannot_be_quantised_leaves_the_earlier_export(
    fault: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny" / "export"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("earlier")
    session = session_in(tmp_path)
    data = session.data()
    if fault == "lost":
        monkeypatch.setattr(Quantiser, "_lost_too_much", lambda self, found: True)
        monkeypatch.setattr(Quantiser, "_ranked", lambda self, source: (LayerError("a", 1.0),))
        expected: Any = pytest.raises(MeasurementError, match="0 of 1 layers in float")
    elif fault == "stopped":
        monkeypatch.setattr(session.stop, "signal_number", signal.SIGINT)
        expected = pytest.raises(StoppedError, match="an earlier export is as it was")
    elif fault == "unreadable":

        def unreadable(self: Source, index: int) -> Any:
            raise UnreadableImageError(f"image {index}", "cannot be decoded", "Repair it.")

        monkeypatch.setattr(type(data.search), "__getitem__", unreadable)
        expected = pytest.raises(DataError, match="cannot be decoded")
    else:
        monkeypatch.setattr(type(data.search), "__len__", lambda self: 0)
        expected = pytest.raises(DataError, match=r"the search split, .* is empty")
    with expected:
        export_winner(session, weights=weights, ratios=RATIOS_TYPED)
    assert (folder / "manifest.json").read_text() == "earlier"
    assert not [path for path in folder.rglob("*") if path.suffix in (".xml", ".bin") or path.name.startswith(".tmp")]


@needs_nncf
@pytest.mark.parametrize("task", ["instances", "semantic"])
def test_backbone_and_neck_of_a_dense_task(task: str, tmp_path: Path) -> None:
    """Calibrated on what they get inside the model; the whole model is scored, with the heads in PyTorch.

    Each level is near the one of float32, for an image of the calibration.
    """
    from coco_tree import coco_tree
    from test_evaluate_export import instances, semantic, with_weights

    root = str(coco_tree(tmp_path / "tree")) if task == "instances" else ""
    config = instances(tmp_path, "features", root=root) if root else semantic(tmp_path, "features")
    section = config.export.model_copy(update={**INT8, "formats": ("openvino",), "max_loss": 100.0})
    session = Session(config.model_copy(update={"export": section}), SilentReporter())
    summary = export_winner(session, weights=with_weights(session, tmp_path), ratios="[[.3],[.5]]")
    (found,) = summary.eight_bits.values()
    assert summary.report.scope == "features"
    path = summary.folder.path / "features.xml"
    assert quantised_layers(read(path))
    assert found.kept > 0
    data = session.data()
    model = session.model(data.categories).eval()
    model.load_state_dict(load_file(summary.folder.path / WEIGHTS))
    set_sparsity(model, [[0.3], [0.5]])
    image = Deployed(session, model, "features").input_of(data.search, 0)
    with torch.no_grad():
        levels = [level for _, level in named_tensors(session.task.exported_features(model)(image))]
    rounded = runtime("openvino").load(path).run(image)
    for ours, theirs in zip(rounded, levels, strict=True):
        assert 0 < (ours - theirs).norm() < 0.2 * theirs.norm()
    if task == "semantic":
        assert found.change.standard_error is not None
        assert re.fullmatch(r"jackknife over \d+ groups of images", found.change.method)


@needs_nncf
def test_nncf_leaves_the_handlers_of_others_alone() -> None:
    """It set the level of pytest's, and warnings of ours were lost from then on."""
    theirs, log = logging.NullHandler(), logging.getLogger("nncf")
    log.addHandler(theirs)
    try:
        load_nncf()
    finally:
        log.removeHandler(theirs)
    assert theirs.level == logging.NOTSET
    assert not log.isEnabledFor(logging.WARNING)
