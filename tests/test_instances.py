"""Instance segmentation: what the detector sees, torchvision's numbers, draws, resume, and every command."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import boxes as box_ops
from typer.testing import CliRunner

from coco_tree import coco_tree
from sparsevit_cli import weights
from sparsevit_cli.checkpoints import latest_checkpoint, load_checkpoint
from sparsevit_cli.cli import app
from sparsevit_cli.config.experiment import ExperimentConfig
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.config.tasks import type_of
from sparsevit_cli.config.yaml_loader import Document
from sparsevit_cli.data import Batch, Categories, Data, Shrunk, digit_scenes, train_batches
from sparsevit_cli.data.loader import eval_batches
from sparsevit_cli.data.shrunk import Scale
from sparsevit_cli.errors import CheckpointError, ConfigError, StoppedError
from sparsevit_cli.evaluation import evaluate
from sparsevit_cli.profiling.macs import flopcounter_macs
from sparsevit_cli.profiling.stages import time_parts
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.schedule import FixedSchedule, RandomSchedule
from sparsevit_cli.sparsity import SearchSpace
from sparsevit_cli.stopping import StopRequest
from sparsevit_cli.swin import model_depths, set_sparsity, sparsify_
from sparsevit_cli.tasks import task as task_module
from sparsevit_cli.tasks.instances import Instances
from sparsevit_cli.tasks.instances.masks import pasted
from sparsevit_cli.tasks.instances.model import MASK_SHIFT, Detector, categories_of
from sparsevit_cli.tasks.task import BuildOptions, task_of
from sparsevit_cli.training import TrainingJob, _Run, plan_training, train
from sparsevit_cli.workflows.training import _write_rows

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[1] / "configs"
MODEL: dict[str, Any] = {
    "img_size": 64, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "fpn_channels": 8,
    "anchor_sizes": [16, 24, 32], "anchor_ratios": [1.0], "candidates_train": 20, "candidates_test": 10,
    "proposals_train": 20, "proposals_test": 5, "anchors_per_image": 8, "rois_per_image": 8, "box_channels": 8,
    "box_resolution": 3, "mask_resolution": 4, "roi_samples": 1, "mask_convs": 1, "mask_channels": 8,
    "detections_per_image": 5, "score_threshold": 0.0,
}  # fmt: skip
TINY: dict[str, Any] = {
    "experiment": "tiny", "device": "cpu", "task": {"name": "instances"}, "model": MODEL,
    "data": {"eval_batch_size": 4, "digits": {"digit_min": 16, "digit_max": 24}},
    "train": {"epochs": 2.0, "batch_size": 4, "eval_every": 1.0, "save_every": 1.0},
    "adapt": {"epochs": 1.0, "batch_size": 4, "check_ratios": [0.5], "check_random": 1},
    "finetune": {"epochs": 1.0, "batch_size": 4},
    "search": {"budget_macs": "90%", "max_evaluations": 6, "finalists": 1,
               "seconds": 0.01, "holdout": 2},
    "profile": {"batch_sizes": [1], "seconds": 0.02, "rounds": 6, "max_spread": 100.0},
    "clock": {"wait": 0, "max_neighbour": 1000.0, "max_spread": 1000.0},
    "export": {"formats": [], "latency": False},
}  # fmt: skip


def tiny(**sections: Any) -> ExperimentConfig:
    """TINY with fields of sections replaced."""
    merged = {name: {**value, **sections.get(name, {})} if isinstance(value, dict) else value
              for name, value in TINY.items()}  # fmt: skip
    if merged["data"].get("source") == "coco":
        del merged["data"]["digits"]
    return type_of(Document(merged, {})).model_validate_json(json.dumps(merged))


def built(**sections: Any) -> tuple[Instances, Data, Detector]:
    task = task_of(tiny(**sections))
    assert isinstance(task, Instances)
    data = task.data(seed=0, categories=None)
    model = task.build(data.categories, BuildOptions(seed=3))
    assert isinstance(model, Detector)
    return task, data, model


def first_batch(data: Data, size: int = 4) -> Batch:
    return next(iter(train_batches(data.train, batch_size=size, seed=0, epoch=0)))


def coco(tmp_path: Path) -> dict[str, Any]:
    return {"source": "coco", "root": str(coco_tree(tmp_path / "tree")), "search_fraction": 0.2}


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (64, 128), (96, 32)])
def test_the_backbone_gets_the_very_pixels_of_the_batch(size: tuple[int, int], training: bool) -> None:
    _, _, model = built()
    seen: list[Tensor] = []
    model.backbone.body.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, *size)
    target = {"boxes": torch.tensor([[3.0, 4.0, 20.0, 25.0]]), "labels": torch.tensor([2]), "draw": 1,
              "masks": torch.ones(1, *size, dtype=torch.uint8)}  # fmt: skip
    model.train(training)
    model(images, [target, target]) if training else model(images)
    assert len(seen) == 1
    assert torch.equal(seen[0], images)


@pytest.mark.parametrize("masks", [True, False])
def test_outputs_are_those_of_torchvision_with_its_own_transform(masks: bool) -> None:
    """The same weights under torchvision's Mask R-CNN at a size that its transform leaves alone; standard heads."""
    heads = {"fpn_channels": 16, "anchor_sizes": None, "anchor_ratios": [0.5, 1.0, 2.0], "box_resolution": 7,
             "box_channels": 1024, "mask_resolution": 14, "mask_convs": 4, "mask_channels": 256, "roi_samples": 2,
             "candidates_test": 1000, "proposals_test": 1000, "detections_per_image": 10, "score_threshold": 0.05,
             "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}  # fmt: skip
    _, _, model = built(model=heads, task={"masks": masks})
    family = MaskRCNN if masks else FasterRCNN
    theirs = family(copy.deepcopy(model.backbone), num_classes=11, min_size=64, max_size=64,
                    image_mean=[0.0] * 3, image_std=[1.0] * 3, box_detections_per_img=10)  # fmt: skip
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        ours, expected = model.eval()(images), theirs.eval()(list(images))
    assert sum(len(found["boxes"]) for found in ours) > 10
    for found, reference in zip(ours, expected, strict=True):
        for name in ("boxes", "labels", "scores"):
            assert torch.equal(found[name], reference[name]), name
        assert ("masks" in found) == masks
        if masks:
            assert found["masks"].shape == (len(found["boxes"]), 1, 28, 28)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    task, data, model = built()
    torch.manual_seed(99)
    again, other = (task.build(data.categories, BuildOptions(seed=seed)).state_dict() for seed in (3, 4))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert not torch.equal(
        model.roi_heads.box_predictor.cls_score.weight, other["roi_heads.box_predictor.cls_score.weight"]
    )
    like = task.build(None, BuildOptions(like=model.state_dict()))
    like.load_state_dict(model.state_dict())


def test_boxes_are_computed_in_float32_whatever_the_weights_are() -> None:
    _, _, model = built()
    with torch.inference_mode():
        assert model.double().eval()(torch.randn(1, 3, 64, 64).double())[0]["boxes"].dtype == torch.float64
    before = model.float().rpn.head.cls_logits.weight.clone()
    small = model.to(torch.bfloat16)
    assert torch.equal(small.rpn.head.cls_logits.weight, before), "not even rounded on the way"
    assert small.backbone.fpn.layer_blocks[0][0].weight.dtype == torch.bfloat16
    assert small.rpn.head.cls_logits.weight.dtype == torch.float32
    with torch.inference_mode():
        found = small.eval()(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))
    assert found[0]["boxes"].dtype == torch.float32
    assert len(found[0]["boxes"])


def test_a_drawn_split_of_another_size_is_of_the_same_kind() -> None:
    _, data, _ = built(task={"masks": False})
    smaller = data.val.resized(48)
    assert (smaller.image_size, data.val.image_size) == ((48, 48), (64, 64))
    assert {"boxes", "labels"} == set(smaller.objects(0)[1])  # type: ignore[attr-defined]
    assert "truth" in smaller[0][1]
    assert smaller.fingerprint() != data.val.fingerprint()
    assert smaller.fingerprint().endswith(", boxes")
    moved = data.train.resized(48)
    moved.set_epoch(1)
    assert not torch.equal(moved[0][0], data.train.resized(48)[0][0]), "each has an epoch of its own"


def test_parts_are_disjoint_and_hold_every_parameter() -> None:
    for masks in (True, False):
        task, _, model = built(task={"masks": masks})
        parts = task.parts(model)
        assert list(parts)[:5] == ["backbone", "neck", "proposals", "box head", "post-processing"]
        found = [id(p) for modules in parts.values() for module in modules for p in module.parameters()]
        assert len(found) == len(set(found))
        assert set(found) == {id(p) for p in model.parameters()}
        assert task.metric.key == ("mask_ap" if masks else "box_ap")
        assert list(task.backbone(model)(torch.randn(1, 3, 64, 64))) == ["0", "1"]
        assert [level.shape[1] for level in task.features(model)(torch.randn(1, 3, 64, 64)).values()] == [8, 8, 8]


def test_the_choice_of_detections_is_a_part_and_pasting_follows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    task, _, model = built()
    now_ns, choose = 0, RoIHeads.postprocess_detections

    def slowly(*answers: Any) -> Any:
        nonlocal now_ns
        now_ns += 4 * 10**6
        return choose(*answers)

    monkeypatch.setattr(RoIHeads, "postprocess_detections", slowly)
    workload = Workload(model.eval(), torch.randn(1, 3, 64, 64), (64, 64), 1, loaded=task.at_full_load)
    assert flopcounter_macs(workload, task.parts(model)).parts["post-processing"] == 0
    times = time_parts(workload, task.parts(model), passes=1, clock=lambda: now_ns)
    assert {name for name, ms in times.ms.items() if ms} == {"post-processing"}
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    found = {
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]]) - MASK_SHIFT,
        "masks": torch.ones(1, 1, 4, 4),
    }
    (on_image,) = task.finish([found], (64, 96))[0]
    assert on_image.sum() > 380, "all but the corners of 20 x 20 pixels"
    assert (on_image == pasted(torch.ones(4, 4), (10, 20, 30, 40), (64, 96))).all()
    assert not task_of(tiny(task={"masks": False})).finishing


@pytest.mark.parametrize(
    ("model", "train", "told"),
    [
        ({"img_size": 60}, {}, "model.img_size: 60x60 pixels; the stages need multiples of 8"),
        ({}, {"curriculum": [{"img_size": 36, "epochs": 1}, {"img_size": 64, "epochs": 1}]}, "train.curriculum.0"),
        ({"anchor_sizes": [8, 16]}, {}, "2 sizes for 3 levels, of strides 4, 8, 16"),
        ({"in_chans": 1}, {}, "model.in_chans"),
        ({"img_size": [64, 96]}, {}, "canvas is square"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model: dict[str, Any], train: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        built(model=model, train=train)
    assert told in str(refused.value)


# -- losses and draws -------------------------------------------------------------------------------------------------


def losses_of(task: Instances, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    return task.loss(model.train(), batch, task.config.train, None)


def test_losses_do_not_depend_on_how_a_step_is_split() -> None:
    """Anchors and regions of an image are drawn by its own seed, and every loss is a mean over images."""
    task, data, model = built(model={"img_size": 96, "rois_per_image": 4, "drop_path_rate": 0.0})
    batch = first_batch(data)
    torch.manual_seed(1)
    whole = losses_of(task, model, batch)
    assert set(whole) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    torch.manual_seed(2)
    parts = [(task.weight(part) / task.weight(batch), losses_of(task, model, part)) for part in batch.parts(1)]
    for name, value in whole.items():
        assert value > 0
        torch.testing.assert_close(sum(share * part[name] for share, part in parts), value, msg=name)
    other = Batch(batch.inputs, [{**t, "draw": t["draw"] + 1} for t in batch.targets], batch.indices)
    assert losses_of(task, model, other)["loss_objectness"] != whole["loss_objectness"]


@pytest.mark.parametrize("masks", [True, False])
def test_images_without_an_object_are_trained_on(masks: bool) -> None:
    task, _, model = built(task={"masks": masks})
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "draw": 5,
               "masks": torch.zeros(0, 64, 64, dtype=torch.uint8)}  # fmt: skip
    batch = Batch(torch.randn(2, 3, 64, 64), [nothing, nothing], torch.arange(2))
    losses = losses_of(task, model, batch)
    total = sum(losses.values())
    assert isinstance(total, Tensor)
    total.backward()
    assert torch.isfinite(total)


def test_a_smaller_rival_trains_on_shrunk_images_and_truth() -> None:
    task, data, model = built()
    small = Shrunk(data.train, Scale((64, 64), (48, 48)))
    batch = next(iter(train_batches(small, batch_size=2, seed=0, epoch=0)))
    assert batch.inputs.shape == (2, 3, 48, 48)
    assert batch.targets[0]["masks"].shape[1:] == (48, 48)
    assert batch.targets[0]["boxes"].max() <= 48
    assert all(torch.isfinite(loss) for loss in losses_of(task, model, batch).values())
    score = evaluate(
        task, model, Shrunk(data.val, Scale((64, 64), (48, 48))), batch_size=4, device=CPU, subset=range(8)
    )
    assert score.count == 8


class StopAt(StopRequest):
    """A signal that arrives while the given step runs."""

    def __init__(self, schedule: Any, step: int) -> None:
        super().__init__()
        self.schedule, self.step = schedule, step

    def at(self, number: int) -> Any:
        if number == self.step:
            self.signal_number = 15
        return self.schedule.at(number)


def test_a_stopped_training_ends_as_the_straight_one_to_the_bit(tmp_path: Path) -> None:
    """With random sparsity, a canvas that grows, micro-batches, averaged weights and jittered images."""
    section = {"curriculum": [{"img_size": 32, "epochs": 1}, {"img_size": 64, "epochs": 1}], "accumulation": 2,
               "ema_decay": 0.9, "eval_every": 1.0, "batch_size": 2}  # fmt: skip
    fields = coco(tmp_path) | {"augment": {"jitter": [0.5, 1.5]}}
    task, data, model = built(data=fields, train=section)
    space = SearchSpace(model_depths(model))

    def run(folder: str, stop_at: int | None = None) -> dict[str, Any]:
        schedule: Any = RandomSchedule(space, 0)
        stop = StopRequest() if stop_at is None else StopAt(schedule, stop_at)
        fresh = sparsify_(task.build(data.categories, BuildOptions(seed=3)))

        def validate(model: nn.Module, img_size: Any, before_batch: Any) -> Any:
            set_sparsity(model, space.uniform(0.5))
            found = evaluate(task, model, data.val.resized(img_size), batch_size=2, device=CPU)
            lacking = "box_ap75" if img_size == (32, 32) else ""  # as AP of sizes that no object has
            return replace(found, values={name: value for name, value in found.values.items() if name != lacking})

        job = TrainingJob(
            kind="adapt", task=task, model=fresh, section=task.config.train,
            schedule=schedule if stop_at is None else stop,  # type: ignore[arg-type]
            plan=plan_training(task.config.train, len(data.train), (64, 64)), source=data.train, validate=validate,
            checkpoints=tmp_path / folder, device=CPU, seed=0,
        )  # fmt: skip
        train(job, SilentReporter(), stop)
        newest = latest_checkpoint(tmp_path / folder)
        assert newest is not None
        saved = load_checkpoint(newest)
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in saved.state["history"]]
        return {"rows": rows, **saved.tensors}

    straight = run("straight")
    for step in (1, 5):
        with pytest.raises(StoppedError):
            run("stopped", step)
        torch.manual_seed(77)
    resumed = run("stopped")
    assert resumed["rows"] == straight["rows"]
    assert "val_box_ap" in straight["rows"][-1]
    for group in ("model", "ema", "optimizer"):
        for name, tensor in straight[group].items():
            assert torch.equal(tensor, resumed[group][name]), (group, name)


@pytest.mark.parametrize("layer_decay", [None, 0.9])
def test_norms_biases_and_tables_of_positions_have_no_weight_decay(layer_decay: float | None, tmp_path: Path) -> None:
    task, data, model = built(train={"layer_decay": layer_decay})
    job = TrainingJob(
        kind="train", task=task, model=sparsify_(model), section=task.config.train,
        schedule=FixedSchedule(SearchSpace(model_depths(model)).dense), source=data.train, checkpoints=tmp_path,
        plan=plan_training(task.config.train, len(data.train), (64, 64)), device=CPU, seed=0,
        validate=lambda *arguments: None,  # type: ignore[arg-type,return-value]
    )  # fmt: skip
    decay = {
        id(parameter): group["weight_decay"]
        for group in _Run(job, SilentReporter()).optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or name.endswith(("bias", "relative_position_bias_table"))
        assert decay[id(parameter)] == (0 if exempt else 0.05), name


# -- padding ----------------------------------------------------------------------------------------------------------


def test_what_lies_in_the_padding_changes_nothing(tmp_path: Path) -> None:
    """Its windows are neither ranked nor counted, and no proposal lies in it."""
    task, data, model = built(data=coco(tmp_path) | {"letterbox": True})
    batch = next(iter(eval_batches(data.val, 4)))
    assert sorted(batch.inputs["sizes"]) == [(32, 64), (43, 64), (64, 43), (64, 64)]
    set_sparsity(sparsify_(model), 0.5)
    loud = batch.inputs["images"].clone()
    for image, (height, width) in zip(loud, batch.inputs["sizes"], strict=True):
        image[:, -(-height // 8) * 8 :] = image[:, :, -(-width // 8) * 8 :] = 9.0
    with torch.inference_mode():
        plain, noisy = (model.eval()({**batch.inputs, "images": images}) for images in (batch.inputs["images"], loud))
        unaware = model(loud)
    for found, same, number in zip(plain, noisy, range(4), strict=True):
        assert torch.equal(found["boxes"], same["boxes"])
        assert torch.equal(found["scores"], same["scores"])
        height, width = batch.inputs["sizes"][number]
        if (height, width) != (64, 64):
            assert not torch.equal(found["scores"], unaware[number]["scores"])
    proposed, _ = model.rpn(ImageList(loud, batch.inputs["sizes"]), model.backbone(loud, batch.inputs["sizes"]))
    for boxes, (height, width) in zip(proposed, batch.inputs["sizes"], strict=True):
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
    model.roi_heads.box_predictor.bbox_pred.bias.data[0::4] = 10.0  # all boxes move right by their width
    with torch.inference_mode():
        moved = model(batch.inputs)
    for found, (height, width) in zip(moved, batch.inputs["sizes"], strict=True):
        assert (found["boxes"][:, 2:] <= torch.tensor([width, height])).all()
    part = next(iter(batch.parts(3)))
    assert part.inputs["sizes"] == batch.inputs["sizes"][:3]
    assert task.category_counts(batch, data.categories).tolist() == [4, 4, 0]


@pytest.mark.parametrize("fields", [{"augment": {"jitter": [0.4, 0.8]}}, {"letterbox": True}])
def test_training_images_smaller_than_the_canvas_tell_their_size(tmp_path: Path, fields: dict[str, Any]) -> None:
    task, data, model = built(data=coco(tmp_path) | fields)
    batch = first_batch(data)
    for image, size, target in zip(batch.inputs["images"], batch.inputs["sizes"], batch.targets, strict=True):
        height, width = size
        assert min(height, width) < 64
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()
        assert image[:, :height, :width].abs().amin(0).count_nonzero() > 0.9 * height * width
        assert (target["boxes"][:, 2:] <= torch.tensor([width, height])).all()
    assert all(torch.isfinite(loss) for loss in losses_of(task, model, batch).values())
    small = next(iter(train_batches(Shrunk(data.train, Scale((64, 64), (48, 48))), batch_size=4, seed=0, epoch=0)))
    for size, shrunk in zip(batch.inputs["sizes"], small.inputs["sizes"], strict=True):
        assert shrunk == tuple(math.ceil(side * 0.75) for side in size)
    assert all(torch.isfinite(loss) for loss in losses_of(task, model, small).values())


def test_images_that_fill_the_canvas_come_as_one_tensor(tmp_path: Path) -> None:
    assert built(data=coco(tmp_path) | {"augment": {"jitter": [1.0, 2.0]}})[1].train.spec.pads is False  # type: ignore[attr-defined]
    assert isinstance(first_batch(built(data=coco(tmp_path))[1]).inputs, Tensor)


# -- examples, pictures, commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [True, False])
def test_examples_are_validation_images_and_pictures_show_the_truth(tmp_path: Path, files: bool) -> None:
    task, data, _ = built(data=coco(tmp_path) if files else {})
    shown = task.example((32, 32), 5, seed=0)
    assert shown.shape == (5, 3, 32, 32)
    assert torch.equal(shown, task.example((32, 32), 5, seed=0))
    expected = data.val.resized((32, 32) if files else 32)[0][0]
    assert torch.equal(shown[0], expected.as_subclass(Tensor))
    assert task.example((32, 64), 1).shape == (1, 3, 32, 64)
    for source in (data.train, data.val):
        picture = task.picture(source, 0)
        assert picture.size == (64, 64)
        plain = source.objects(0)[0].as_subclass(Tensor)  # type: ignore[attr-defined]
        colours = torch.tensor(list(picture.getdata())).float()
        assert (colours.max(1).values - colours.min(1).values).max() > 60, "something is drawn in colour"
        assert plain.shape == (3, 64, 64)


def test_at_full_load_the_heads_get_as_many_boxes_as_they_ever_do() -> None:
    task, _, model = built(model={"score_threshold": 0.9})
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), task.at_full_load(model.eval()):
        assert [len(found["masks"]) for found in model(images)] == [5, 5]
    with torch.inference_mode():
        assert [len(found["masks"]) for found in model(images)] == [0, 0]


def test_at_full_load_a_proposal_is_compared_once_and_nothing_is_suppressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 proposals of 80 categories were 80,000 boxes: so many no image asks for."""
    compared, suppress = [], box_ops.batched_nms

    def counted(boxes: Tensor, *others: Any) -> Tensor:
        compared.append(len(boxes))
        return suppress(boxes, *others)

    monkeypatch.setattr(box_ops, "batched_nms", counted)
    task, _, model = built()
    heads = model.roi_heads
    counts, outputs = [40, 2], 11
    proposals = [torch.tensor([[8.0, 8.0, 40.0, 40.0]]).repeat(count, 1) for count in counts]
    answers = torch.randn(sum(counts), outputs), torch.zeros(sum(counts), 4 * outputs), proposals, [(64, 64)] * 2
    with task.at_full_load(model):
        boxes, _, labels = heads.suppression(heads, *answers)
    assert compared == [40, 6], "two proposals stand for three categories each, for five detections"
    assert [len(of_image) for of_image in boxes] == [5, 5]
    assert all(of_image.min() >= 1 for of_image in labels)
    assert (heads.score_thresh, heads.nms_thresh) == (0.0, 0.5)
    heads.suppression(heads, *answers)
    assert compared[2:] == [400, 20]


def test_what_is_profiled_before_a_training_has_the_categories_of_the_data(tmp_path: Path) -> None:
    absent = {"source": "coco", "root": str(tmp_path / "absent")}
    for data, categories in (({}, 10), (coco(tmp_path), 3), (absent, 80)):
        task = task_of(tiny(data=data))
        assert categories_of(task.build(None, BuildOptions()).state_dict()) == categories


def test_a_value_that_a_validation_lacks_is_an_empty_cell(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "pretrain")
    _write_rows(folder, ({"step": 1, "mask_ap": 2.0}, {"step": 2, "mask_ap": 3.0, "val_large": 4.0}), SilentReporter())
    assert (tmp_path / "results.csv").read_text().split() == ["step,mask_ap,val_large", "1,2.0,", "2,3.0,4.0"]


def typed(folder: Path, config: ExperimentConfig, *words: str) -> list[str]:
    path = folder / "tiny.yaml"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    return [*words, "--config", str(path), "--output", str(folder / "runs")]


def test_commands_work_on_coco_files_one_by_one(tmp_path: Path) -> None:
    """The checkpoint knows the ids of the file, and `evaluate` tells all that its users expect."""
    config = tiny(data=coco(tmp_path))
    for command in ("pretrain", "adapt", "search", "finetune", "evaluate"):
        result = CliRunner().invoke(app, typed(tmp_path, config, command))
        assert result.exit_code == 0, f"{command}: {result.output}"
    metrics = json.loads((tmp_path / "runs" / "tiny" / "evaluate" / "metrics.json").read_text())
    assert {"mask_ap", "mask_ap50", "mask_ap_small", "box_ap", "box_ap50"} <= set(metrics["scores"])
    trained = json.loads((tmp_path / "runs" / "tiny" / "finetune" / "metrics.json").read_text())
    assert trained["categories"] == {"names": ["bar", "box", "never seen"], "ids": [3, 7, 90]}


@pytest.mark.slow
def test_run_compares_the_winner_with_a_smaller_rival(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, typed(tmp_path, tiny(data=coco(tmp_path)), "run", "--json"))
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["task"], document["metric"]) == ("instances", "mask_ap")
    rows = document["rows"]
    assert rows[-1]["label"] == "winner, finetuned"
    assert rows[-1]["gmacs"] < rows[0]["gmacs"]
    assert any("dense at" in row["label"] for row in rows)
    assert (tmp_path / "runs" / "tiny" / "profile" / "profile.json").exists()


def test_digits_and_boxes_alone_are_trained_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 24), ("search", 8), ("val", 8)):
        monkeypatch.setitem(digit_scenes.SCENES, split, count)
    config = tiny(task={"masks": False}, train={"epochs": 0.5})
    result = CliRunner().invoke(app, typed(tmp_path, config, "pretrain", "--json"))
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "runs" / "tiny" / "pretrain" / "metrics.json").read_text())
    assert metrics["metric"] == "box_ap"
    assert "val_mask_ap" not in metrics["history"][-1]
    dry = CliRunner().invoke(app, typed(tmp_path, config, "adapt", "--dry-run"))
    assert dry.exit_code == 0, dry.output


def test_bad_annotations_end_with_the_exit_code_of_data(tmp_path: Path) -> None:
    fields = coco(tmp_path)
    (tmp_path / "tree" / "annotations" / "instances_val2017.json").write_text("{}")
    result = CliRunner().invoke(app, typed(tmp_path, tiny(data=fields), "pretrain"))
    assert result.exit_code == 3
    assert "it has no list of images" in result.output


def test_without_data_noise_is_measured_on() -> None:
    task = task_of(tiny(data={"source": "coco", "root": "nowhere"}))
    assert torch.equal(task.example((32, 64), 2, seed=1), task.example((32, 64), 2, seed=1))
    assert task.example((32, 64), 2).std() > 0.9


def test_the_authors_detector_has_as_many_weights_as_theirs() -> None:
    """mmdet's Mask R-CNN of Swin-T has 47.8 million."""
    config = load_config(CONFIGS / "coco_mask_rcnn_swin_t_672.yaml", ["model.pretrained=false"])
    model = task_of(config).build(None, BuildOptions())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(47.8, abs=0.05)
    assert model.rpn.anchor_generator.sizes == ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))


def test_the_packaged_configuration_has_light_heads_and_a_shift_everywhere() -> None:
    config = load_config(CONFIGS / "digits_instances.yaml")
    task = task_of(config)
    model = task.build(None, BuildOptions(like={"roi_heads.box_predictor.cls_score.weight": torch.zeros(11, 1)}))
    assert sum(p.numel() for p in model.parameters()) < 4e6
    shifts = [block.shift_size for stage in task.backbone(model).swin.layers for block in stage.blocks]
    assert all(max(shift) > 0 for shift in shifts[1::2])
    assert FixedSchedule(SearchSpace(model_depths(model)).dense).at(0).is_dense


def test_a_checkpoint_may_be_that_of_a_whole_detector_or_of_its_backbone(tmp_path: Path) -> None:
    _, _, trained = built()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    whole, backbone = str(tmp_path / "whole.safetensors"), str(tmp_path / "backbone.safetensors")
    safetensors.torch.save_file(trained.state_dict(), whole)
    safetensors.torch.save_file(trained.backbone.body.state_dict(), backbone)
    task, data, again = built(model={"checkpoint": whole})
    assert task.checkpoint_is_whole
    assert all(map(torch.equal, again.state_dict().values(), trained.state_dict().values()))
    task, _, half = built(model={"checkpoint": backbone})
    assert not task.checkpoint_is_whole, "the heads have to be trained"
    assert torch.equal(half.backbone.body.norms["0"].weight, trained.backbone.body.norms["0"].weight)
    assert not torch.equal(half.rpn.head.cls_logits.weight, trained.rpn.head.cls_logits.weight)
    others = Categories(("one", "two"))
    with pytest.raises(CheckpointError, match=r"cls_score"):
        task_of(tiny(model={"checkpoint": whole})).build(others, BuildOptions())
    reset: Any = task_of(tiny(model={"checkpoint": whole, "reset_head": True})).build(others, BuildOptions())
    assert len(reset.roi_heads.box_predictor.cls_score.weight) == 3
    assert torch.equal(reset.rpn.head.cls_logits.weight, trained.rpn.head.cls_logits.weight)
    assert len(data.categories) == 10


def test_a_checkpoint_is_read_once_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is that of a whole detector was asked of the file before, and its backbone taken from it once more."""
    _, data, trained = built()
    read, reads = weights.files.read_file, []
    for module in (task_module, weights.loading, weights):
        monkeypatch.setattr(module, "read_file", lambda path: reads.append(path) or read(path))
    for name, tensors in (("whole", trained.state_dict()), ("backbone", trained.backbone.body.state_dict())):
        file = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file(tensors, str(file))
        for asked_first in (True, False):
            reads.clear()
            task = task_of(tiny(model={"checkpoint": str(file)}))
            whole = task.checkpoint_is_whole if asked_first else None
            task.build(data.categories, BuildOptions())
            assert task.checkpoint_is_whole == (name == "whole")
            assert whole in (None, task.checkpoint_is_whole)
            assert reads == [file]
            assert "_checkpoint" not in vars(task), "not kept beside the model's own weights"
