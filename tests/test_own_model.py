"""Somebody's own segmenter around a Swin that timm took apart: the example from outside, and what it stands on."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import sparsevit_cli as sv
from sparsevit_cli.cli import app
from sparsevit_cli.config import tasks as kinds
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.data import Batch, Shrunk, digit_scenes
from sparsevit_cli.data.shrunk import Scale
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.profiling.workload import image_workload
from sparsevit_cli.swin import model_depths, sparse_stages
from sparsevit_cli.swin.geometry import image_size, set_image_size, set_image_size_in_training, weights_in
from sparsevit_cli.tasks.task import BuildOptions, load_task

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_segmenter.py"
SHORT = [
    *("model.img_size=32", "train.curriculum=[{img_size: 32, epochs: 1}]", "finetune.epochs=1", "search.samples=5"),
    *("adapt.curriculum=[{img_size: 48, epochs: 1}, {img_size: 32, epochs: 1}]", "search.budget_macs=95%"),
    *("search.max_evaluations=6", "search.seconds=0.001"),
    *("search.finalists=1", "search.holdout=2", "adapt.check_random=1"),
    *("profile.seconds=0.001", "profile.rounds=6", "profile.max_spread=100.0", "profile.batch_sizes=[1]"),
    *('export.formats=["pt2"]', "export.check_batch_sizes=[1,2]"),
    *("clock.wait=0", "clock.max_neighbour=1000.0", "clock.max_spread=1000.0", "export.latency=false"),
]


@pytest.fixture
def known_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that a test makes known are forgotten after it."""
    for name in ("KINDS", "_classes", "_TYPES"):
        monkeypatch.setattr(kinds, name, dict(getattr(kinds, name)))


@pytest.mark.usefixtures("known_kinds")
def test_an_own_segmenter_goes_from_nothing_to_an_exported_sparse_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images change size in adapt and for the smaller rival, though timm left nothing that sets the size."""
    for split, count in (("train", 32), ("search", 10), ("val", 10)):
        monkeypatch.setitem(digit_scenes.SCENES, split, count)
    words = ["--task", f"{EXAMPLE}:OwnSegmenter", "--config", str(EXAMPLE.with_suffix(".yaml")), "--output", tmp_path]
    sets = [word for setting in SHORT for word in ("--set", setting)]
    result = CliRunner().invoke(app, ["run", "--json", *map(str, words), *sets])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["task"], document["metric"]) == ("own_segmenter", "miou")
    dense, winner = document["rows"][0], document["rows"][-1]
    assert winner["label"] == "winner, finetuned"
    assert winner["gmacs"] < dense["gmacs"]
    assert any(
        row["label"].startswith("dense at") and row["image_size"] != dense["image_size"] for row in document["rows"]
    )
    exported = tmp_path / "own_segmenter" / "export"
    assert json.loads((exported / "manifest.json").read_text())["files"]
    names = json.loads((tmp_path / "own_segmenter" / "finetune" / "metrics.json").read_text())["categories"]["names"]
    assert names == ["background", *map(str, range(10))]


@pytest.mark.usefixtures("known_kinds")
def test_the_example_says_where_its_backbone_is_and_draws_weights_by_the_seed() -> None:
    load_task(f"{EXAMPLE}:OwnSegmenter")
    task = kinds.task_class("own_segmenter")(load_config(EXAMPLE.with_suffix(".yaml"), ["task.name=own_segmenter"]))
    models = [task.build(None, BuildOptions(seed)).eval() for seed in (0, 0, 1)]
    first, same, other = (torch.cat([each.flatten() for each in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    backbone = task.backbone(models[0])
    assert 0 < weights_in(backbone) < weights_in(models[0])
    assert [tuple(x.shape[1:]) for x in backbone(torch.zeros(1, 3, 128, 128))] == [
        (32, 32, 48),
        (16, 16, 96),
        (8, 8, 192),
    ]


@pytest.mark.usefixtures("known_kinds")
def test_the_examples_smaller_rival_learns_small_masks_and_is_judged_at_full_size() -> None:
    load_task(f"{EXAMPLE}:OwnSegmenter")
    task = kinds.task_class("own_segmenter")(load_config(EXAMPLE.with_suffix(".yaml"), ["task.name=own_segmenter"]))
    data, scale = task.data(seed=0, categories=None), Scale((128, 128), (64, 64))
    assert [tuple(part.shape) for part in Shrunk(data.train, scale)[0]] == [(3, 64, 64), (64, 64)]
    image, truth = Shrunk(data.val, scale)[0]
    assert image.shape == (3, 64, 64)
    assert torch.equal(truth, data.val[0][1])
    scorer = task.scorer(data.val, torch.device("cpu"))
    coarse = nn.functional.one_hot(truth[::2, ::2], 11).permute(2, 0, 1)[None].float()
    scorer.update(coarse, Batch(None, truth[None], torch.arange(1)))
    assert int(scorer.pairs.sum()) == 128 * 128


def test_the_example_has_less_than_60_lines_of_code_and_imports_nothing_private() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    docstring = ast.parse(text).body[0].end_lineno
    lines = [line for line in text.splitlines()[docstring:] if line.strip()]
    assert len(lines) < 60
    assert not any("import _" in line or "._" in line.replace("super().__", "") for line in lines)


NAMES = ("swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224")


def taken_apart(name: str, size: int | tuple[int, int], **settings: Any) -> nn.Module:
    """timm's Swin `name` with features_only=True, narrow and sparse; equal calls give equal weights."""
    torch.manual_seed(0)
    narrow = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}
    free = {"strict_img_size": False, "always_partition": True, **settings}
    model: nn.Module = timm.create_model(name, features_only=True, img_size=size, **narrow, **free).eval()
    return sv.sparsify_(model)


@pytest.mark.parametrize("flavour", [{}, {"feature_cls": "getter"}], ids=["list", "getter"])
@pytest.mark.parametrize("name", NAMES)
def test_a_swin_that_timm_took_apart_is_sparse_counted_and_takes_other_sizes(
    name: str, flavour: dict[str, str]
) -> None:
    model, built = (taken_apart(name, size, **flavour) for size in (128, (96, 160)))
    assert model_depths(model) == (2, 2, 2, 2)
    before = list(map(id, model.parameters()))
    set_image_size(model, (96, 160))
    assert image_size(model) == (96, 160)
    assert list(map(id, model.parameters())) == before, "an optimizer holds them"
    images = torch.randn(2, 3, 96, 160)
    with torch.inference_mode():
        assert all(torch.equal(one, other) for one, other in zip(model(images), built(images), strict=True))
        sv.set_sparsity(model, 0.5)
        sv.set_sparsity(built, 0.5)
        sparse = model(images)
        assert all(torch.equal(one, other) for one, other in zip(sparse, built(images), strict=True))
    cost = macs_cost(image_workload(model, (96, 160)))
    space = sv.SearchSpace((2, 2, 2, 2))
    assert cost(space.uniform(0.5)) < cost(space.dense)
    sum(level.square().mean() for level in model(images)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_always_partition_windows_that_shrank_stay_small() -> None:
    """What set_image_size says of such a model, and the refusal in a training."""
    model = taken_apart(NAMES[0], 128, always_partition=False)
    whole = taken_apart(NAMES[0], 128, always_partition=False, feature_cls="getter")
    for each in (model, whole):
        set_image_size(each, 64)
        set_image_size(each, 128)
    windows = [[block.window_size for block in stage.blocks] for stage in sparse_stages(model)]
    assert windows[3] == [(2, 2), (2, 2)]
    assert [block.window_size for block in sparse_stages(whole)[3].blocks] == [(4, 4), (4, 4)]
    with pytest.raises(ConfigError, match="always_partition"):
        set_image_size_in_training(taken_apart(NAMES[0], 128, always_partition=False), (64, 64), "train.curriculum")
