"""Two scopes, the backbone and the whole: multiply-adds, times, budgets and tables of a model around a Swin."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from typer.testing import CliRunner

from sparsevit_cli import views
from sparsevit_cli.backbones import SwinBackbone, SwinFPN
from sparsevit_cli.checkpoints import load_checkpoint
from sparsevit_cli.cli import app
from sparsevit_cli.config import tasks as kinds
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.data import Categories
from sparsevit_cli.errors import BudgetError, ConfigError
from sparsevit_cli.profiling.latency_table import measure_latency_table, table_identity
from sparsevit_cli.profiling.macs import analytic_macs, flopcounter_macs, macs_cost, traced_macs
from sparsevit_cli.profiling.memory import peak_memory_mb
from sparsevit_cli.profiling.neighbours import UNWATCHED
from sparsevit_cli.profiling.stages import time_parts, time_stages
from sparsevit_cli.profiling.workload import Workload, image_workload
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.runtimes import RUNTIMES, Program
from sparsevit_cli.search.budget import Budget, check_reachable, parse_budgets
from sparsevit_cli.sparsity import SearchSpace
from sparsevit_cli.swin import get_sparsity, model_depths, set_sparsity, sparsify_
from sparsevit_cli.tasks.task import Metric, Score, Task, load_task
from sparsevit_cli.winner import read_winner
from sparsevit_cli.workflows import in_runtimes
from sparsevit_cli.workflows.evaluate import EvaluateSummary
from sparsevit_cli.workflows.latency_budget import RunAs
from sparsevit_cli.workflows.latency_sources import TorchSource
from sparsevit_cli.workflows.pages import part_rows, parts_csv
from sparsevit_cli.workflows.plan import plan_of
from sparsevit_cli.workflows.profile import _check_mode, profile_model
from sparsevit_cli.workflows.profile_report import PartCost, PartCosts, ProfileReport, ProfileRow
from sparsevit_cli.workflows.search import named_scope
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.smaller import rival_sizes, size_step
from sparsevit_cli.workflows.training import train_dense_baseline
from sparsevit_cli.workflows.weights import trained_weights
from test_workflows import session_in
from tiny import tiny_swin

TASK = '''
from contextlib import contextmanager
import torch
from torch import nn
from sparsevit_cli.data import Data, Source
from sparsevit_cli.tasks.task import Metric, Task


class Squares(Source):
    """Images with one bright square; the truth is its place."""

    def __init__(self, count, first, size):
        self.count, self.first, self._size = count, first, size

    image_size = property(lambda self: self._size)

    def __len__(self): return self.count

    def __getitem__(self, index):
        if index >= self.count: raise IndexError(index)
        drawn = torch.Generator().manual_seed(self.first + index)
        image = 0.1 * torch.randn(3, *self.image_size, generator=drawn)
        top, left = (int(torch.randint(side - 8, (), generator=drawn)) for side in self.image_size)
        image[:, top : top + 8, left : left + 8] = 2.0
        return image, torch.tensor([top, left]) / self.image_size[0]

    def collate(self, samples, seed):
        images, places = zip(*samples)
        return list(images), torch.stack(places)

    def resized(self, size): return Squares(self.count, self.first, (size, size) if isinstance(size, int) else size)

    def fingerprint(self): return f"squares {self.count} from {self.first} at {self.image_size}"


class Finder(nn.Module):
    """Takes a list of images, as detectors do. Its last layers run for answers above `threshold` alone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.threshold = backbone, 1e9
        self.neck = nn.Conv2d(backbone.channels[-1], 8, 1)
        self.head = nn.Linear(8, 2)
        self.mask_head = nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 2))

    def forward(self, images):
        places = self.head(self.neck(list(self.backbone(torch.stack(images)).values())[-1]).mean((2, 3)))
        return places + 0 * self.mask_head(places) if float(places.max()) > self.threshold else places


class Finding(Task):
    name, metric = "finding", Metric("near", "near", unit="")

    def data(self, *, seed, categories):
        return Data(*(Squares(count, first, self.image_size) for count, first in ((32, 0), (8, 100), (12, 200))))

    def build(self, categories, options): return Finder(self.swin_backbone(options, levels=(0, 1)))

    def loss(self, model, batch, section, teacher):
        return {"distance": (model(batch.inputs) - batch.targets).square().mean()}

    def example(self, size, batch_size, *, seed=0): return list(super().example(size, batch_size, seed=seed))

    def backbone(self, model): return model.backbone

    def parts(self, model):
        return {"backbone": [model.backbone], "neck": [model.neck], "box head": [model.head],
                "mask head": [model.mask_head]}

    @contextmanager
    def at_full_load(self, model):
        before, model.threshold = model.threshold, -1e9
        yield
        model.threshold = before

    def scorer(self, source, device):
        class Near:
            distances = []
            def update(self, outputs, batch): self.distances.append(float((outputs - batch.targets).abs().sum()))
            def compute(self):
                far = sum(self.distances)
                return {"near": -far, "near_small": -far / 2, "near_large": -far / 3}
        return Near()
'''
SHORT = [
    *("experiment=finding", "seed=3", "device=cpu", "model.img_size=32", "model.embed_dim=8", "model.depths=[2,2]"),
    *("model.num_heads=[1,2]", "model.window_size=2", "model.always_partition=true"),
    *(f"{section}.batch_size=8" for section in ("train", "adapt", "finetune")),
    *("train.epochs=1", "adapt.epochs=0.5", "finetune.epochs=0.75", "search.max_evaluations=8"),
    *("search.finalists=2", "search.seconds=0.01", "search.holdout=2"),
    *("profile.seconds=0.02", "profile.rounds=6", "profile.max_spread=100.0", "profile.batch_sizes=[2]"),
    *("clock.wait=0", "clock.max_neighbour=1000.0", "clock.max_spread=1000.0", "export.formats=[]"),
    *("search.scope=backbone", "search.budget_macs=70%", "run.dense_baseline=true", "adapt.check_random=1"),
]


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "finding.py"
    path.write_text(TASK)
    return path


@pytest.fixture(autouse=True)
def known_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that a test makes known are forgotten after it."""
    for name in ("KINDS", "_classes", "_TYPES"):
        monkeypatch.setattr(kinds, name, dict(getattr(kinds, name)))


def typed(task_file: Path, folder: Path, *words: str, sets: tuple[str, ...] = ()) -> Any:
    flags = [word for setting in (*SHORT, *sets) for word in ("--set", setting)]
    command, *others = words
    return CliRunner().invoke(
        app, [command, "--task", f"{task_file}:Finding", "--output", str(folder), *others, *flags]
    )


# -- counters ---------------------------------------------------------------------------------------------------


def swin_fpn(**settings: Any) -> SwinFPN:
    return SwinFPN(SwinBackbone(tiny_swin(img_size=64, strict_img_size=False, window_size=4, **settings)), 16)


class Pyramid(nn.Module):
    """Both counters can follow this one: backbone, neck and a head, without a choice that hangs on values."""

    def __init__(self) -> None:
        super().__init__()
        self.fpn, self.head = swin_fpn(), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.head(level) for level in self.fpn(images).values()]


def mask_rcnn() -> nn.Module:
    """torchvision's own with narrow heads, at full load: random weights give 20 detections an image."""
    return MaskRCNN(
        swin_fpn(), min_size=64, max_size=64, box_score_thresh=0.0, box_detections_per_img=20,
        rpn_post_nms_top_n_test=50, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        box_head=TwoMLPHead(16 * 7 * 7, 32), box_predictor=FastRCNNPredictor(32, 5),
        mask_head=MaskRCNNHeads(16, (8, 8), 1), mask_predictor=MaskRCNNPredictor(8, 8, 5),
    ).eval()  # fmt: skip


def parts_of(model: Any) -> dict[str, list[nn.Module]]:
    heads = model.roi_heads
    return {
        "backbone": [model.backbone.body], "neck": [model.backbone.fpn], "proposals": [model.rpn],
        "box head": [heads.box_head, heads.box_predictor], "mask head": [heads.mask_head, heads.mask_predictor],
    }  # fmt: skip


def images(batch: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("ratios", [0.6])
def test_the_counters_agree_part_by_part_on_what_both_can_follow(ratios: float) -> None:
    model = sparsify_(Pyramid().eval())
    set_sparsity(model, ratios)
    workload = image_workload(model, 64, 2)
    parts = {"backbone": [model.fpn.body], "neck": [model.fpn.fpn], "head": [model.head]}
    counted, traced = flopcounter_macs(workload, parts), traced_macs(workload)
    assert counted.total == traced.total
    assert list(counted.parts) == ["backbone", "neck", "head", "rest"]
    assert counted.parts["rest"] == 0
    alone = analytic_macs(image_workload(model.fpn.body, 64))
    assert counted.parts["backbone"] == alone.total == sum(alone.parts.values())
    assert traced.parts["head"] == counted.parts["neck"] + counted.parts["head"]


@pytest.fixture(scope="module")
def detector() -> Workload:
    return Workload(sparsify_(mask_rcnn()), images(2), (64, 64), 2)


def test_a_detector_is_counted_by_hand_and_by_part(detector: Workload) -> None:
    model: Any = detector.model
    set_sparsity(model, 0)
    report = flopcounter_macs(detector, parts_of(model))
    assert report.uncounted == {}
    assert report.parts["rest"] == 0
    assert report.total == pytest.approx(sum(report.parts.values()))
    assert report.parts["backbone"] == analytic_macs(image_workload(model.backbone.body, 64)).total
    sides = (16, 8, 4, 2, 1)
    channels = (16, 32, 64, 128)
    pixels = [side * side for side in sides]
    inner = sum(n * c * 16 for n, c in zip(pixels, channels, strict=False))
    assert report.parts["neck"] == inner + sum(pixels[:4]) * 9 * 16 * 16
    anchors = model.rpn.head.cls_logits.out_channels
    assert report.parts["proposals"] == sum(pixels) * (9 * 16 * 16 + 5 * anchors * 16)
    boxes = len(model(detector.inputs)[0]["boxes"])
    assert boxes == 20, "at full load"
    convs = 14 * 14 * 9 * (16 * 8 + 8 * 8)
    predictor = 14 * 14 * 8 * 8 * 4 + 28 * 28 * 8 * 5
    assert report.parts["mask head"] == boxes * (convs + predictor)
    proposals, rest = divmod(report.parts["box head"], 16 * 49 * 32 + 32 * 32 + 32 * 5 * 5)
    assert (proposals, rest) == (50, 0)


def test_the_cost_of_a_detector_follows_its_sparsity_in_the_backbone_alone(detector: Workload) -> None:
    model: Any = detector.model
    set_sparsity(model, 0.3)
    cost = macs_cost(detector)
    assert get_sparsity(model).ratios[0] == (0.3,), "as it was"
    space = SearchSpace(model_depths(model))
    backbone = macs_cost(image_workload(model.backbone.body, 64, scope="backbone"))
    for config in (space.dense, space.uniform(0.5), space.sparsest):
        set_sparsity(model, config)
        own = flopcounter_macs(detector, parts_of(model))
        assert own.parts["backbone"] == backbone(config) == analytic_macs(image_workload(model.backbone.body, 64)).total
        assert cost(space.dense) - cost(config) == pytest.approx(backbone(space.dense) - backbone(config))


class Hidden(nn.Module):
    """Multiplies in operators that no formula is known for, and does much that multiplies nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.layer_norm(x.softmax(-1), x.shape[1:])
        x = torch.cat((x, x.sort(-1).values), 1)[:, x.argmax(1).flatten() % 2]
        return torch.cdist(x.flatten(2), x.flatten(2)) @ torch.ones(x.shape[1])


def test_operators_that_may_multiply_and_have_no_count_are_told() -> None:
    assert flopcounter_macs(image_workload(Hidden(), 8)).uncounted == {"aten::_euclidean_dist": 1, "aten::mv": 1}


def test_attention_of_torch_is_counted() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    report = flopcounter_macs(Workload(layer, torch.randn(2, 5, 16), (1, 5), 2))
    assert report.total == 5 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16
    assert report.uncounted == {}
    assert torch.backends.mha.get_fastpath_enabled()


# -- times ------------------------------------------------------------------------------------------------------


class Ticking:
    """A clock that modules turn: a second each."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def spend(self, module: nn.Module, ms: int) -> None:
        def spent(*_: object) -> None:
            self.now_ns += ms * 10**6

        module.register_forward_hook(spent)


def test_the_time_of_every_part_is_told_and_scaled_to_the_whole() -> None:
    clock, model = Ticking(), mask_rcnn()
    parts = parts_of(model)
    workload = Workload(model, images(1), (64, 64), 1)
    rpn: Any = model.rpn
    clock.spend(model.transform, 5)  # type: ignore[arg-type]
    clock.spend(model.backbone.body, 30)  # type: ignore[union-attr, arg-type]
    clock.spend(rpn.head, 20)
    clock.spend(model.roi_heads.mask_head, 45)  # type: ignore[union-attr, arg-type]
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    times = time_parts(workload, parts, passes=2, clock=clock, total_ms=50)
    assert times.marked_ms == 100
    assert times.ms == {"backbone": 15, "neck": 0, "proposals": 10, "box head": 0, "mask head": 22.5, "rest": 2.5}
    assert times.shares["mask head"] == 0.45
    assert before == [len(module._forward_pre_hooks) for module in model.modules()]
    assert times.after_ms is None
    absent = {"absent": [nn.Linear(1, 1)]}
    assert time_parts(workload, absent, passes=1, clock=clock).ms == {"absent": 0, "rest": 100}

    def paste(detections: list[dict[str, Tensor]]) -> None:
        assert detections[0]["masks"].shape == (20, 1, 64, 64), "the outputs of the pass"
        clock.now_ns += 7 * 10**6

    times = time_parts(workload, parts, passes=2, clock=clock, total_ms=50, after=paste)
    assert (times.marked_ms, times.after_ms) == (100, 7), "beside the model, and not scaled to it"


def test_a_detector_with_lists_of_inputs_is_timed_in_stages_and_its_memory_seen(detector: Workload) -> None:
    set_sparsity(detector.model, 0.5)
    rows = time_stages(detector, passes=1).rows
    assert [row.name for row in rows] == ["stem", "stage 0", "stage 1", "stage 2", "stage 3", "head"]
    weights_mb = sum(p.numel() for p in detector.model.parameters()) * 4 / 1e6
    assert peak_memory_mb(detector) > weights_mb


# -- budgets ----------------------------------------------------------------------------------------------------


def test_budgets_name_their_scope_where_there_are_two() -> None:
    latency, macs = (replace(each, scope="backbone") for each in parse_budgets("70%", "60%"))
    assert str(macs) == "60% of the dense backbone's multiply-adds"
    assert str(latency) == "70% of the dense backbone's latency"
    assert str(replace(latency, scope="features")) == "70% of the dense backbone and neck's latency"
    assert str(replace(macs, scope=None)) == "60% of dense"
    assert str(macs.resolve(10e9)) == "6 GMACs of the backbone"
    assert macs.resolve(10e9) == Budget(6e9, "macs", "backbone")
    with pytest.raises(BudgetError, match="1 GMACs of the backbone is below the sparsest configuration"):
        check_reachable(Budget(1e9, "macs", "backbone"), 10e9, 2e9)


def test_a_classifier_has_one_scope_and_refuses_the_other(tmp_path: Path) -> None:
    session = session_in(tmp_path, search={"scope": "backbone"})
    model = session.model(None)  # type: ignore[arg-type]
    assert session.task.scopes(model) == ("model",)
    with pytest.raises(ConfigError, match=r"search\.scope: backbone.*nothing stands around the Swin"):
        named_scope(session, model)
    assert named_scope(session_in(tmp_path), model) is None
    assert session.workload(model, scope="backbone").model is model
    assert rival_sizes((32, 32), size_step(session, model), 8) == {(16, 16), (24, 24)}


def test_sizes_of_a_rival_are_those_that_its_backbone_takes() -> None:
    assert rival_sizes((192, 192), 32, 16) == {(side, side) for side in (64, 96, 128, 160)}
    assert rival_sizes((64, 64), 32, 16) == {(32, 32)}
    assert rival_sizes((32, 32), 32, 16) == set()


# -- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(task_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("KINDS", "_classes", "_TYPES"):
            patch.setattr(kinds, name, dict(getattr(kinds, name)))
        result = typed(task_file, folder, "run")
    assert result.exit_code == 0, result.output
    return folder / "finding", result.output


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_tells_both_scopes(done: tuple[Path, str]) -> None:
    folder, told = done
    document = read(folder / "run" / "metrics.json")
    rows = {row["label"]: row for row in document["rows"]}
    dense, winner = rows["dense (timm)"], rows["winner, finetuned"]
    around = dense["gmacs"] - dense["backbone"]["gmacs"]
    assert around > 0
    for row in document["rows"]:
        assert row["latency_ms"] > 0
        assert row["backbone"]["latency_ms"] > 0
        if row["image_size"] == dense["image_size"]:
            assert row["gmacs"] - row["backbone"]["gmacs"] == pytest.approx(around)
    assert winner["backbone"]["gmacs"] <= 0.7 * dense["backbone"]["gmacs"]
    assert dense["backbone"]["speedup"] == dense["speedup"] == 1
    assert "Its backbone alone" in told
    assert document["parts"] == read(folder / "profile" / "profile.json")["parts"]
    assert f"{document['parts']['told']}." in told
    assert "of the backbone's multiply-adds gone" in told
    assert "against dense trained as long" in told
    assert "70% of the dense backbone's multiply-adds" in told


def test_a_winner_tells_that_its_latencies_are_of_the_backbone(done: tuple[Path, str]) -> None:
    about = read_winner(done[0] / "search" / "winner.yaml")[1]["measured_with"]
    assert about["scope"] == "backbone"
    assert "torch, fp32, backbone, batch 1" in str(RunAs.of(about))


def test_the_dense_baseline_is_trained_as_long_and_costs_what_dense_does(done: tuple[Path, str]) -> None:
    folder, _ = done
    steps = {name: read(folder / name / "metrics.json")["steps"] for name in
             ("adapt", "finetune", "dense_adapt", "dense_finetune")}  # fmt: skip
    assert (steps["dense_adapt"], steps["dense_finetune"]) == (steps["adapt"], steps["finetune"])
    dense, _, longer = read(folder / "run" / "metrics.json")["rows"][:3]
    assert longer["label"] == "dense, trained as long"
    assert longer["ratios"] == dense["ratios"]
    assert longer["score"] != dense["score"]
    costs = {"gmacs", "latency_ms", "speedup", "backbone", "speedup_low"}
    assert {name: longer[name] for name in costs} == {name: dense[name] for name in costs}
    assert read(folder / "dense_finetune" / "sparsity.json") == {"ratios": dense["ratios"]}
    assert longer["score"] == read(folder / "dense_finetune" / "metrics.json")["score"]


def test_the_smaller_rival_goes_on_from_the_dense_baseline(done: tuple[Path, str], task_file: Path) -> None:
    folder, _ = done
    session = session_of(task_file, folder.parent)
    longer = trained_weights(session, "dense_finetune", "a test").sha256
    state = load_checkpoint(folder / "rival" / "checkpoints").state
    assert state["identity"]["start"].startswith(f"{longer} at ")


def session_of(task_file: Path, folder: Path, *sets: str) -> Session:
    load_task(f"{task_file}:Finding")
    overrides = [*SHORT, *sets, "task.name=finding", f"output={folder}"]
    return Session(load_config(None, overrides, is_packaged=False), SilentReporter())


def test_a_dense_baseline_that_is_done_is_not_trained_again(done: tuple[Path, str], task_file: Path) -> None:
    folder, _ = done
    before = {name: (folder / name / "metrics.json").stat().st_mtime_ns for name in ("dense_adapt", "dense_finetune")}
    session = session_of(task_file, folder.parent)
    weights, seconds = train_dense_baseline(session)
    session.locks.close()
    assert weights.sha256 == trained_weights(session, "dense_finetune", "a test").sha256
    assert seconds == sum(read(folder / name / "metrics.json")["seconds"] for name in before)
    assert before == {name: (folder / name / "metrics.json").stat().st_mtime_ns for name in before}


def test_a_search_says_its_scope_in_all_its_records(done: tuple[Path, str]) -> None:
    folder, _ = done
    search = read(folder / "search" / "metrics.json")
    assert search["scope"] == "backbone"
    assert "scope: backbone" in (folder / "search" / "winner.yaml").read_text()
    dense = read(folder / "run" / "metrics.json")["rows"][0]["backbone"]["gmacs"]
    assert search["budget"]["macs"] == pytest.approx(0.7e9 * dense)
    with (folder / "search" / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert {row["scope"] for row in history} == {"backbone"}
    assert all(float(row["gmacs"]) <= 0.7 * dense for row in history)


def test_a_profile_tells_both_scopes_and_where_the_time_goes(done: tuple[Path, str]) -> None:
    folder, _ = done
    profile = read(folder / "profile" / "profile.json")
    assert "scope" not in profile
    assert [(row["scope"], row["kind"]) for row in profile["rows"]] == [
        (scope, kind) for scope in ("backbone", "model") for kind in ("dense", "ours dense", "ours sparse")
    ]
    backbone, model = (
        {row["kind"]: row for row in profile["rows"] if row["scope"] == scope} for scope in ("backbone", "model")
    )
    parts = {row["name"]: row for row in profile["parts"]["rows"]}
    assert list(parts) == ["backbone", "neck", "box head", "mask head", "rest"]
    for kind, name in (("dense", "dense"), ("ours sparse", "sparse")):
        assert parts["backbone"][f"{name}_gmacs"] == pytest.approx(backbone[kind]["gmacs"])
        total_gmacs, total_ms = (sum(part[f"{name}_{unit}"] for part in parts.values()) for unit in ("gmacs", "ms"))
        assert total_gmacs == pytest.approx(model[kind]["gmacs"])
        assert total_ms == pytest.approx(model[kind]["latency_ms"])
    per_image = 1e-9 * (2 * 64 + 64 * 64 + 64 * 2)
    assert parts["mask head"]["dense_gmacs"] == pytest.approx(per_image), "at full load"
    assert parts["neck"]["dense_gmacs"] == parts["neck"]["sparse_gmacs"]
    assert parts["backbone"]["sparse_gmacs"] < parts["backbone"]["dense_gmacs"]
    assert profile["parts"]["told"].startswith("The backbone now costs most: ")
    assert [row["name"] for row in profile["stages"]["ours sparse"]["rows"]][:2] == ["stem", "stage 0"]
    page = (folder / "profile" / "profile.html").read_text()
    assert "<td>mask head" in page
    assert "now costs most" in page
    with (folder / "profile" / "parts.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == list(parts)


def test_evaluate_tells_all_values_and_both_scopes(done: tuple[Path, str], task_file: Path) -> None:
    folder, _ = done
    evaluation = typed(task_file, folder.parent, "evaluate")
    assert evaluation.exit_code == 0, evaluation.output
    for words in ("near_small", "near_large", "in the backbone"):
        assert words in evaluation.stdout
    found = read(folder / "evaluate" / "metrics.json")
    assert found["backbone_gmacs"] < found["gmacs"]


def test_a_profile_is_shown_with_its_scopes_and_parts(
    done: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """From what its file holds: nothing that is shown is missing there."""
    folder, _ = done
    document = read(folder / "profile" / "profile.json")
    parts = document["parts"]
    shown = PartCosts(parts["batch"], tuple(parts["image_size"]), tuple(PartCost(**row) for row in parts["rows"]))
    rows = tuple(ProfileRow(**{**row, "image_size": tuple(row["image_size"])}) for row in document["rows"])
    slow = replace(rows[2], speedup=0.5)
    config = SearchSpace((2, 2)).dense
    views.show_profile(
        ProfileReport(RunFolder(folder, "profile"), "a Swin", config, (*rows, slow), {}, {}, {}, {}, {}, shown)
    )
    told = capsys.readouterr().out
    for words in ("scope", "sparse GMACs", "mask head", parts["told"], "32x32, backbone alone: 0.50x of dense"):
        assert words in told


def test_a_plan_counts_the_dense_baseline(done: tuple[Path, str], task_file: Path) -> None:
    plan = "\n".join(plan_of(session_of(task_file, done[0].parent), "run").lines)
    for words in ("of these in the backbone", "dense_adapt: 2 steps", "dense_finetune: 3 steps"):
        assert words in plan


def test_latencies_of_a_search_are_of_its_scope(tmp_path: Path, task_file: Path) -> None:
    identities = {}
    for scope in ("model", "backbone"):
        session = session_of(task_file, tmp_path, f"search.scope={scope}")
        model: Any = session.model(Categories()).eval()
        assert named_scope(session, model) == scope
        latencies = TorchSource(session, model)
        assert latencies.workload.model is (model if scope == "model" else model.backbone)
        identities[scope] = latencies.identity
    assert {name for name, value in identities["model"].items() if value != identities["backbone"][name]} == {
        "scope", "parameters",
    }  # fmt: skip
    table = measure_latency_table(latencies.workload, seconds=1e-6, rounds=2, max_spread=1e9, patience=UNWATCHED)
    assert table.predict(session.space(model, 0.8).dense) > 0
    latencies.workload.run()
    whole = session.workload(model)
    whole.run()
    assert model.threshold == 1e9, "put back"


def test_a_size_that_the_backbone_cannot_take_is_rounded_up_for_it_alone(tmp_path: Path, task_file: Path) -> None:
    session = session_of(task_file, tmp_path)
    model = session.model(Categories()).eval()
    assert size_step(session, model) == 8
    workload = session.workload(model, (30, 41), 2, scope="backbone")
    assert (workload.image_size, workload.batch, workload.scope) == ((32, 48), 2, "backbone")
    assert [tuple(level.shape) for level in workload.run().values()] == [(2, 8, 8, 12), (2, 16, 4, 6)]


def test_other_runtimes_run_the_backbone_alone_if_the_whole_cannot_be_exported(
    tmp_path: Path, task_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(model: Any, images: Any, names: Any, precision: str, *, threads: int) -> dict[str, Program]:
        return {name: Program(name, "1", "fp32", threads, lambda x: list(model(x).values())) for name in names}

    monkeypatch.setattr(in_runtimes, "timed_programs", stand_in)
    monkeypatch.setattr(in_runtimes, "check_timed", lambda *_: None)
    monkeypatch.setattr(RUNTIMES["openvino"], "check_installed", lambda: None)
    told: list[str] = []
    monkeypatch.setattr(SilentReporter, "say", lambda self, text: told.append(text))
    session = session_of(task_file, tmp_path, "profile.runtimes=[torch,openvino]", "profile.batch_sizes=[1]")
    rows = profile_model(session, ratios="0.5").rows
    assert {(row.scope, row.runtime) for row in rows} == {
        ("backbone", "torch"), ("backbone", "openvino"), ("model", "torch"),
    }  # fmt: skip
    assert sum("openvino run the backbone alone: the whole model cannot be exported" in text for text in told) == 1


def test_cuda_graphs_of_a_model_around_a_swin_are_refused(tmp_path: Path, task_file: Path) -> None:
    session = session_of(task_file, tmp_path, "profile.mode=graph", "device=cuda")
    session.__dict__["device"] = torch.device("cuda")
    with pytest.raises(ConfigError, match="around its backbone cannot be captured"):
        _check_mode(session, ("backbone", "model"))


# -- sentences --------------------------------------------------------------------------------------------------


def part(name: str, ms: float | None, gmacs: float) -> PartCost:
    return PartCost(name, ms, ms, gmacs, gmacs)


def test_what_now_costs_most_is_named_by_time_or_else_by_multiply_adds() -> None:
    rows = (part("backbone", 30, 3.0), part("mask head", 41, 2.0), part("rest", 29, 0.0))
    assert PartCosts(1, (64, 64), rows).told() == "The mask head now costs most: 41% of the time"
    untimed = tuple(part(row.name, None, row.dense_gmacs) for row in rows)
    assert PartCosts(1, (64, 64), untimed).told() == "The backbone now costs most: 60% of the multiply-adds"
    rest = PartCosts(1, (64, 64), (part("backbone", 1, 1), part("rest", 3, 0)))
    assert rest.told() == "What runs in no part now costs most: 75% of the time"
    pasting = replace(rest, after=part("after the model: masks pasted", 12, 0))
    assert pasting.told() == "What follows the model now costs most: 75% of the time"
    assert [row[0] for row in part_rows(pasting)] == ["backbone", "rest", "after the model: masks pasted"]
    assert [row[1] for row in part_rows(pasting)] == ["1.00 (25%)", "3.00 (75%)", "12.00 (+300%)"]
    assert parts_csv(pasting).splitlines()[-1] == "after the model: masks pasted,12,12,0,0"


def test_a_classifier_is_evaluated_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = session_in(tmp_path).earlier("evaluate")
    score = Score(90.0, {"top1": 90.0, "loss": 0.3}, 350)
    config = SearchSpace((2, 2)).dense
    views.show_evaluation(EvaluateSummary(folder, "finetune", config, Metric("top1", "top-1"), score, 0.5))
    assert capsys.readouterr().out.count("\n") == 1


def test_scope_is_part_of_a_latency_tables_identity() -> None:
    model = sparsify_(swin_fpn())
    whole, alone = (table_identity(image_workload(model, 64, scope=scope)) for scope in ("model", "backbone"))
    assert {name for name in whole if whole[name] != alone[name]} == {"scope"}


def test_a_task_says_of_which_scope_a_record_is(tmp_path: Path) -> None:
    task: Task = session_in(tmp_path).task
    assert task.about()["scope"] == "model"
    assert task.about("backbone")["scope"] == "backbone"
