"""Configurations for real sets, as they are shipped but for sizes, on tiny trees of the sets' layouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dense_trees import cityscapes_tree, coco_tree
from sparsevit_cli.checkpoints import latest_checkpoint, load_checkpoint
from sparsevit_cli.cli import app
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.profiling import inputs
from sparsevit_cli.tasks.task import task_of

CONFIGS = Path(__file__).parents[1] / "configs"
LOOPS = ("train", "adapt", "finetune")


def image_folder(
    root: Path, classes: tuple[str, ...], size: tuple[int, ...], end: str, counts: Mapping[str, int]
) -> None:
    """root/split/class/image of noise; grey where `size` has no channels."""
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, size, dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{number}{end}")


def imagenet_tree(root: Path) -> None:
    classes = ("n01440764", "n01443537", "n01484850")
    image_folder(root, classes, (60, 80, 3), ".JPEG", {"train": 6, "val": 2})


def solar_cells(root: Path) -> None:
    image_folder(root, ("defective", "intact"), (300, 300), ".png", {"train": 8, "val": 3})


def tiles(root: Path) -> None:
    """As examples/trees.py writes them: boxes of one category, without masks."""
    coco_tree(root)
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}2017.json"
        document = json.loads(path.read_text())
        document["categories"] = [{"id": 1, "name": "tree"}]
        document["annotations"] = [
            {key: each[key] for key in ("id", "image_id", "bbox", "area", "iscrowd")} | {"category_id": 1}
            for each in document["annotations"]
            if not each["iscrowd"]
        ]
        path.write_text(json.dumps(document))


@dataclass(frozen=True)
class Shipped:
    """Who writes a tree of the set's layout, the images that it has for search, and what makes the experiment small."""

    write: Callable[[Path], Any]
    search_fraction: float
    small: Mapping[str, Any]
    pixels: Any


FOUR = {"model.embed_dim": 24, "model.depths": [2, 2, 2, 2]}
LIGHT = {
    "model.fpn_channels": 16, "model.box_channels": 32, "model.mask_channels": 16, "model.detections_per_image": 5,
    "model.proposals_test": 20,
}  # fmt: skip
SHIPPED: Mapping[str, Shipped] = {
    "coco_mask_rcnn_swin_t_672": Shipped(coco_tree, 0.12, {**FOUR, **LIGHT}, 64),
    "cityscapes_mask2former_swin_l": Shipped(
        cityscapes_tree,
        0.2,
        {
            **FOUR, "model.num_heads": [1, 2, 4, 8], "model.window_size": 4, "model.mask2former.channels": 32,
            "model.mask2former.queries": 8, "model.mask2former.encoder_layers": 1,
            "model.mask2former.decoder_layers": 3, "model.mask2former.points": 64, "data.crop": [32, 64],
        },
        [64, 128],
    ),
    "imagenet_swin_t": Shipped(imagenet_tree, 0.2, FOUR, 64),
    "solar_cells": Shipped(solar_cells, 0.2, {"model.embed_dim": 8, "model.num_heads": [1, 2, 4]}, 48),
    "trees": Shipped(
        tiles,
        0.2,
        {"model.embed_dim": 8, "model.num_heads": [1, 2, 4], "model.box_channels": 8, "model.fpn_channels": 8},
        64,
    ),
}  # fmt: skip


def settings(name: str, root: Path) -> list[str]:
    """`--set` for a small machine: sizes of model, images, batches and trainings, and no download."""
    shipped = SHIPPED[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    wanted: dict[str, Any] = {
        "device": "cpu", "model.pretrained": False, "model.img_size": shipped.pixels, "data.root": str(root),
        "data.workers": 0, "data.search_fraction": shipped.search_fraction, "data.eval_batch_size": 2, **shipped.small,
        "search.max_evaluations": 6, "search.finalists": 1,
        "search.budget_latency": None, "search.budget_macs": "95%", "search.samples": 2,
    }  # fmt: skip
    for loop in LOOPS:
        phases = [
            {"img_size": shipped.pixels, "epochs": 1, "lr": phase.lr} for phase in getattr(config, loop).curriculum
        ]
        wanted |= {f"{loop}.curriculum": phases[:2], f"{loop}.batch_size": 2, f"{loop}.accumulation": 1}
        wanted |= {f"{loop}.epochs": 2, f"{loop}.eval_every": 1, f"{loop}.save_every": 1}
    return [f"{key}={json.dumps(value)}" for key, value in wanted.items()]


def typed(name: str, command: str, sets: list[str], *words: str) -> list[str]:
    config = ["--config", str(CONFIGS / f"{name}.yaml")]
    return [command, *config, *(word for each in sets for word in ("--set", each)), *words]


def invoke(words: list[str]) -> str:
    done = CliRunner().invoke(app, words, prog_name="sparsevit")
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("name", SHIPPED)
def test_a_configuration_fits_the_layout_of_its_set(name: str, tmp_path: Path) -> None:
    """The data as they are shipped, and the plan of a small model."""
    shipped = SHIPPED[name]
    shipped.write(tmp_path / "tree")
    only = [f"data.root={tmp_path / 'tree'}", f"data.search_fraction={shipped.search_fraction}"]
    data = task_of(load_config(CONFIGS / f"{name}.yaml", only)).data(seed=0, categories=None)
    assert min(map(len, (data.train, data.search, data.val))) > 0
    plan = invoke(typed(name, "pretrain", settings(name, tmp_path / "tree"), "--dry-run"))
    assert "pretrain: " in plan
    assert "multiply-adds per image" in plan


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_configuration_trains_goes_on_after_a_kill_and_evaluates(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own precision, also on a CPU that emulates it; killed while it saved its second checkpoint."""
    monkeypatch.setattr(inputs, "computes_bf16", lambda: True)
    SHIPPED[name].write(tmp_path / "tree")
    sets = [each.replace(" ", "") for each in settings(name, tmp_path / "tree")]
    child = [sys.executable, str(Path(__file__).parent / "killed_child.py"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*child, *typed(name, "pretrain", sets)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / load_config(CONFIGS / f"{name}.yaml").experiment
    found = latest_checkpoint(folder / "pretrain" / "checkpoints")
    assert found is not None
    step = load_checkpoint(found).step
    for command in ("pretrain", "adapt", "search", "finetune", "evaluate"):
        invoke(typed(name, command, sets, "--output", str(tmp_path)))
    newest = latest_checkpoint(folder / "pretrain" / "checkpoints")
    assert newest is not None
    assert 0 < step < load_checkpoint(newest).step
    scores = json.loads((folder / "evaluate" / "metrics.json").read_text())["scores"]
    assert scores
