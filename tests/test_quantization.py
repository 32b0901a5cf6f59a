"""Eight bits: the ranking stays in float, nothing is sent or printed, and what is lost is told."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsevit_cli.data.source import Batch
from sparsevit_cli.errors import ConfigError, MeasurementError, StoppedError
from sparsevit_cli.exporting import export_model, quantization, structured_images
from sparsevit_cli.exporting.quantization import layer_errors, quantised_layers, quantize
from sparsevit_cli.exporting.rankings import ChangedWindows, Rankings, changed_windows, ranking_nodes
from sparsevit_cli.runtimes import runtime
from sparsevit_cli.swin import set_sparsity, sparsify_
from sparsevit_cli.tasks.task import Metric, Score
from sparsevit_cli.workflows.paired import PairedScorer, change
from tiny import shaken_, tiny_swin

needs_nncf = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nncf", "openvino", "onnxscript")),
    reason="needs sparsevit-cli[openvino,export]",
)
SIDE = 64
SHAPE = (3, SIDE, SIDE)
RATIOS = [[0.5], [0.2, 0.4]]


def images(count: int, seed: int = 0) -> list[Tensor]:
    return list(structured_images(SHAPE, count, seed).split(1))


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse tiny Swin as an OpenVINO file of float32."""
    import openvino

    model = tiny_swin(img_size=SIDE, window_size=2, embed_dim=8, depths=(1, 4), always_partition=True).eval()
    shaken_(model)
    set_sparsity(sparsify_(model), RATIOS)
    folder = tmp_path_factory.mktemp("float")
    export_model(model, folder, input_size=SIDE, formats=("onnx",), measure_ms=False)
    openvino.save_model(openvino.Core().read_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
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
    ranking = ranking_nodes(model)
    assert sum(node.get_type_name() == "TopK" for node in ranking) == 3  # unshifted; unshifted and shifted
    assert len(ranking) == len(ranking_nodes(read(float_file))) > 4
    assert not {node.get_friendly_name() for node in quantisers} & {node.get_friendly_name() for node in ranking}


@needs_nncf
def test_it_computes_what_the_float_file_does_at_any_batch(float_file: Path, int8_file: Path) -> None:
    for count in (1, 3):
        batch = structured_images(SHAPE, count, seed=5)
        ours, theirs = run(int8_file, batch), run(float_file, batch)
        assert not torch.equal(ours, theirs)
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


@needs_nncf
def test_eight_bits_in_the_ranking_are_refused(
    float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NNCF is told nothing of the ranking, and quantisers are found before one of its nodes."""
    real = ranking_nodes

    def wrong(model: Any) -> list[Any]:
        quantised = [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
        return [*real(model), *quantised[:1]]

    monkeypatch.setattr(quantization, "ranking_nodes", wrong)
    with pytest.raises(MeasurementError, match="eight bits in the ranking of windows"):
        quantize(float_file, tmp_path / "int8.xml", images(2))
    assert not list(tmp_path.iterdir())


def test_ranking_nodes_are_those_that_serve_topk_alone() -> None:
    openvino = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    image = ops.parameter([1, 6, 4], name="image")
    scale = ops.constant(2.0)
    the_map = ops.multiply(image, scale)
    score = ops.reduce_mean(ops.abs(the_map), ops.constant([2]), keep_dims=False)
    rank = ops.topk(score, ops.constant(3), 1, "max", "value")
    gathered = ops.gather(the_map, rank.output(1), ops.constant(1))
    model = openvino.Model([ops.result(gathered)], [image], "test")
    assert [node.get_type_name() for node in ranking_nodes(model)] == ["Abs", "ReduceMean", "TopK"]


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
def test_layers_can_stay_in_float(float_file: Path, tmp_path: Path) -> None:
    """Every layer has an error of its own; what is named keeps its 32 bits."""
    errors = {layer.name: layer.error for layer in layer_errors(float_file, images(2), images(4))}
    assert len(errors) == 5 * 6 + 2  # four matrices and two products a block, patch embedding and merging
    assert all(0 < error < 1 for error in errors.values())
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    target = tmp_path / "int8.xml"
    quantize(float_file, target, images(4), in_float=worst)
    assert set(quantised_layers(read(target))) == set(errors) - set(worst)


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
        if name == "nncf" and "switch" not in seen:
            blocked = "openvino_telemetry" in sys.modules and sys.modules["openvino_telemetry"] is None
            seen.update(switch=os.environ.get("NNCF_CI"), blocked=blocked)
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
    """In a process without pytest, in which NNCF would keep quiet by itself; its switch is on before it is imported."""
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
    assert (seen["switch"], seen["blocked"]) == ("1", True)
    assert (seen["sent"], seen["files"]) == ([], [])
    assert seen["telemetry"] == "MagicMock"
    assert (seen["after"], seen["importable"]) == (None, True)  # as it was, for everybody else


# -- windows ------------------------------------------------------------------------------------------------------


def fake_rankings(counts: list[list[int]], *found: list[int]) -> Rankings:
    class Fake(Rankings):
        def __init__(self) -> None:
            self.counts = counts

        def __call__(self, images: Tensor) -> list[Tensor]:
            return [torch.tensor([each]) for each in found]

    return Fake()


def test_windows_that_change_are_counted_for_every_prefix() -> None:
    ours = fake_rankings([[4, 2], [2]], [5, 1, 2, 3], [0, 1])
    theirs = fake_rankings([[4, 2], [2]], [5, 2, 1, 7], [1, 0])
    # of four 3 is gone, of the first two 1 is, and the other ranking has both in another order
    found = changed_windows(ours, theirs, torch.zeros(1))
    assert found == ChangedWindows(2, 8)
    assert found.share == 0.25
    assert changed_windows(ours, ours, torch.zeros(1)).changed == 0


@needs_nncf
def test_rankings_are_those_of_the_model(float_file: Path) -> None:
    """Both stages, unshifted and shifted: as many windows as the ratios leave."""
    found = Rankings(float_file, "fp32")
    batch = structured_images(SHAPE, 2, seed=3)
    assert [windows.shape for windows in found(batch)] == [(2, 32), (2, 12), (2, 12)]
    assert found.counts == [[32], [12, 9], [12, 9]]
    assert changed_windows(found, found, batch).changed == 0


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
