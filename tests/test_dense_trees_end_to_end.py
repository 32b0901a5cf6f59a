"""Trees of the real sets' layout, not by our own writers: read, checked, trained, evaluated, killed and resumed.

Every way in which such a tree can be broken is refused with its exit code, or counted and told.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import dense_trees
from dense_trees import BROKEN_CITYSCAPES, BROKEN_COCO, CITYSCAPES_NAMES, COCO_CATEGORIES
from sparsevit_cli.checkpoints import latest_checkpoint, load_checkpoint
from sparsevit_cli.cli import app
from sparsevit_cli.config.experiment import ExperimentConfig
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.config.tasks import type_of
from sparsevit_cli.config.yaml_loader import Document
from sparsevit_cli.data.loader import eval_batches, train_batches
from sparsevit_cli.errors import DataError, SparseViTError
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.stopping import StopRequest
from sparsevit_cli.tasks.instances.source import FileSource
from sparsevit_cli.tasks.semantic.records import PairSource
from sparsevit_cli.tasks.task import task_of
from sparsevit_cli.workflows.check_data import DataCheck, check_data
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.training import pretrain
from test_shipped_configs import CONFIGS, settings

SWIN: dict[str, Any] = {
    "img_size": 64, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4, "drop_path_rate": 0.1,
}  # fmt: skip
LOOP: dict[str, Any] = {"epochs": 2, "batch_size": 2, "eval_every": 1, "save_every": 1}


@dataclass(frozen=True)
class Kind:
    """A layout: who writes it, and the experiment that reads it."""

    write: Callable[..., Any]
    task: str
    data: Mapping[str, Any]
    model: Mapping[str, Any]

    def config(self, root: Path, output: Path, **data: Any) -> ExperimentConfig:
        document = {
            "experiment": "tree", "device": "cpu", "output": str(output), "task": {"name": self.task},
            "model": {**SWIN, **self.model}, "data": {**self.data, "root": str(root), "eval_batch_size": 2, **data},
            "train": LOOP,
        }  # fmt: skip
        return type_of(Document(document, {})).model_validate_json(json.dumps(document))


COCO = Kind(
    dense_trees.coco_tree,
    "instances",
    {"source": "coco", "search_fraction": 0.12, "letterbox": True, "augment": {"jitter": [0.5, 1.5]}},
    {
        "fpn_channels": 8, "anchor_sizes": [16, 24, 32], "anchor_ratios": [1.0], "candidates_train": 20,
        "candidates_test": 10, "proposals_train": 20, "proposals_test": 5, "anchors_per_image": 8, "rois_per_image": 8,
        "box_channels": 8, "box_resolution": 3, "mask_resolution": 4, "roi_samples": 1, "mask_convs": 1,
        "mask_channels": 8, "detections_per_image": 5, "score_threshold": 0.0,
    },
)  # fmt: skip
CITYSCAPES = Kind(
    dense_trees.cityscapes_tree, "semantic", {"source": "cityscapes", "search_fraction": 0.2}, {"fpn": {"channels": 8}}
)
KINDS = {"coco": COCO, "cityscapes": CITYSCAPES}


def invoke(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)), prog_name="sparsevit")
    assert done.exit_code == 0, done.output
    return done.stdout


# -- whole trees ------------------------------------------------------------------------------------------------


def test_a_coco_tree_is_read_as_it_is(tmp_path: Path) -> None:
    tree = dense_trees.coco_tree(tmp_path / "tree")
    data = task_of(COCO.config(tree.root, tmp_path)).data(seed=0, categories=None)
    assert dict(zip(data.categories.ids or (), data.categories.names, strict=True)) == COCO_CATEGORIES
    (finding,) = data.findings
    assert (finding.what, finding.count) == ("box without area", len(tree.train.degenerate))
    for source, truth in ((data.train, tree.train), (data.val, tree.val)):
        assert isinstance(source, FileSource)
        assert [found.image_id for found in source.images.truths] == list(truth.sizes)
        for found in source.images.truths:
            assert found.size == truth.sizes[found.image_id]
            for crowd, expected in ((False, truth.things), (True, truth.crowds)):
                here = [instance for instance in found.instances if instance.crowd is crowd]
                for instance, thing in zip(here, expected.get(found.image_id, ()), strict=True):
                    x, y, width, height = instance.box
                    assert (data.categories.ids or ())[instance.label] == thing.category
                    assert (x, y, x + width, y + height) == thing.box
                    assert instance.shape is not None
                    assert np.array_equal(instance.shape.pixels(found.size), thing.mask)
    assert len(data.train) + len(data.search) == len(tree.train.sizes) - len(tree.train.empty)
    assert len(data.val) == len(tree.val.sizes)


def test_a_cityscapes_tree_is_read_as_it_is(tmp_path: Path) -> None:
    tree = dense_trees.cityscapes_tree(tmp_path / "tree")
    data = task_of(CITYSCAPES.config(tree.root, tmp_path)).data(seed=0, categories=None)
    assert data.categories.names == CITYSCAPES_NAMES
    for source, truth in ((data.train, tree.train), (data.val, tree.val)):
        assert isinstance(source, PairSource)
        found = {pair.key.rpartition("/")[2]: source.pairs.read(n)[1] for n, pair in enumerate(source.pairs.pairs)}
        assert found.keys() == truth.keys()
        assert all(np.array_equal(found[name], truth[name]) for name in truth)
    assert len(data.train) + len(data.search) == len(tree.train)
    names = [{source.sample_name(n) for n in range(len(source))} for source in (data.train, data.search)]
    assert not names[0] & names[1]
    again = task_of(CITYSCAPES.config(tree.root, tmp_path)).data(seed=0, categories=None)
    assert (again.fingerprint, again.val_fingerprint) == (data.fingerprint, data.val_fingerprint)
    dense_trees.cut(next((tree.root / "leftImg8bit" / "val").rglob("*.png")))
    again = task_of(CITYSCAPES.config(tree.root, tmp_path)).data(seed=0, categories=None)
    assert again.fingerprint == data.fingerprint
    assert again.val_fingerprint != data.val_fingerprint


def test_objects_and_pixels_are_counted_and_duplicates_are_told(tmp_path: Path) -> None:
    """In training images what lies on the canvas; in held-out ones everything."""
    coco, city = dense_trees.coco_tree(tmp_path / "coco"), dense_trees.cityscapes_tree(tmp_path / "city")
    shutil.copy(coco.root / "train2017" / "000000005802.jpg", coco.root / "val2017" / "000000037777.jpg")
    document = json.loads((coco.root / "annotations" / "instances_val2017.json").read_text())
    next(each for each in document["images"] if each["id"] == 37777).update(height=60, width=60)
    (coco.root / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    frames = [
        city.root / "leftImg8bit" / place
        for place in ("train/zurich/zurich_000000_000019", "val/munster/munster_000000_000019")
    ]
    shutil.copy(*(f"{frame}_leftImg8bit.png" for frame in frames))
    for kind, root, counted in ((COCO, coco.root, "objects"), (CITYSCAPES, city.root, "pixels")):
        session = Session(kind.config(root, tmp_path / "out", search_fraction=0.2), SilentReporter(), StopRequest())
        found = check_data(session)
        assert found.counted == counted
        assert found.usable
        assert len(found.pictures) == len(session.data().train)
        (same,) = [each for each in found.findings if each.what.startswith("files with the same bytes")]
        assert (same.split, same.count) == ("val", 1)
        val = next(split for split in found.splits if split.name == "val").categories
        if kind is COCO:
            things = [COCO_CATEGORIES[thing.category] for of_image in coco.val.things.values() for thing in of_image]
            assert val == {name: things.count(name) for name in COCO_CATEGORIES.values()}
        else:
            pixels = np.bincount(np.concatenate([mask.ravel() for mask in city.val.values()]), minlength=256)
            assert val == dict(zip(CITYSCAPES_NAMES, pixels[:19].tolist(), strict=True))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trees, configurations, and trainings that were killed while they saved their second checkpoint.

    That of Cityscapes is the shipped one, Mask2Former, but for its size.
    """
    folder, cases = tmp_path_factory.mktemp("killed"), []
    for name, kind in KINDS.items():
        tree = folder / "trees" / name
        kind.write(tree)
        shipped = "cityscapes_mask2former_swin_l"
        config = (
            kind.config(tree, folder / "unused")
            if name == "coco"
            else load_config(CONFIGS / f"{shipped}.yaml", [*settings(shipped, tree), "experiment=tree"])
        )
        (folder / f"{name}.yaml").write_text(config.model_dump_json(), encoding="utf-8")
        cases.append([str(folder / name), "pretrain", "--config", str(folder / f"{name}.yaml")])
    words = [word for case in cases for word in ("--", *case)][1:]
    child = [sys.executable, str(Path(__file__).parent / "killed_child.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def weights(folder: Path) -> tuple[int, dict[str, Tensor]]:
    newest = latest_checkpoint(folder)
    assert newest is not None
    saved = load_checkpoint(newest)
    return saved.step, {
        f"{group}.{key}": tensor for group in saved.tensors for key, tensor in saved.tensors[group].items()
    }


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_training_goes_on_to_the_same_weights(name: str, killed: Path, tmp_path: Path) -> None:
    """Checked, trained, evaluated; with images in padding, crops, and stochastic depth."""
    config = ("--config", killed / f"{name}.yaml")
    run = Path("tree") / "pretrain" / "checkpoints"
    first, _ = weights(killed / name / run)
    assert json.loads(invoke("check-data", *config, "--output", tmp_path, "--json"))["usable"]
    torch.manual_seed(99)
    for output in (killed / name, tmp_path):
        invoke("pretrain", *config, "--output", output)
    resumed, straight = (weights(output / run) for output in (killed / name, tmp_path))
    assert 0 < first < resumed[0] == straight[0]
    assert resumed[1].keys() == straight[1].keys()
    assert all(torch.equal(tensor, straight[1][key]) for key, tensor in resumed[1].items())
    scores = []
    for output in (killed / name, tmp_path):
        invoke("evaluate", *config, "--output", output)
        scores.append(json.loads((output / "tree" / "evaluate" / "metrics.json").read_text())["scores"])
    assert scores[0] == scores[1]
    assert (tmp_path / "tree" / "evaluate" / "predictions.json").exists() == (name == "coco")
    assert all(0 <= value <= 100 for value in scores[0].values())


# -- broken trees -----------------------------------------------------------------------------------------------

REFUSED: Mapping[str, Mapping[str, str]] = {
    "coco": {
        "no_annotation_file": r"instances_val2017.json: it cannot be read",
        "empty_annotation_file": r"instances_train2017.json: it is empty",
        "not_json": r"instances_train2017.json: it is no JSON",
        "not_coco": r"no list of images or annotations or categories; it has: list",
        "no_images": r"it lists no images",
        "no_categories": r"it lists no categories",
        "train_without_objects": r"instances_train2017.json: none of 0 annotations",
        "val_without_objects": r"instances_val2017.json: none of 0 annotations",
        "no_image_folder": r"val2017: there is no such folder",
        "image_ids_repeat": r"1 image ids stand twice: 391895",
        "category_ids_repeat": r"1 category ids stand twice: 1",
        "category_names_repeat": r"1 category names stand twice: person",
        "other_categories": r"1 categories are in one of the two files only: 44 bottle in validation",
        "missing_val_image": r"validation images: 1 unreadable: val/000000037777.jpg",
    },
    "cityscapes": {
        "no_gtfine": r"no folder gtFine",
        "no_images": r"no folder leftImg8bit",
        "no_val": r"no folder .*leftImg8bit/val",
        "empty_city": r"2 images .* have no mask .*hamburg_000000_042505",
        "missing_label": r"1 images .* have no mask .*aachen_000000_000019",
        "missing_image": r"1 masks .* have no image .*munster_000000_000019",
        "only_polygons": r"3 images .* have no mask .*frankfurt",
        "val_ignored": r"validation images: no pixel of their masks has a class",
    },
}
"""What no command takes: exit code 3, before anything is decoded."""

UNREADABLE: Mapping[str, Mapping[str, str]] = {
    "coco": {
        "missing_image": r"000000391895.jpg \(cannot be opened",
        "cut_image": r"000000391895.jpg \(cannot be decoded",
        "huge_image": r"000000391895.jpg \(more than 64 megapixels",
        "image_of_another_size": r"000000391895.jpg \(it has 48 x 70 pixels, its annotations 96 x 140\)",
        "size_before_turning": r"000000318219.jpg .*66 x 42 pixels, its annotations 42 x 66; EXIF turns it",
    },
    "cityscapes": {
        "label_of_another_size": r"labelIds.png \(32 x 64 pixels, its image 64 x 128",
        "value_outside": r"labelIds.png \(numbers that are no class: 77 \(40 pixels\); labelIds are 0 to 33",
        "value_255": r"labelIds.png \(numbers that are no class: 255 \(40 pixels\).*train ids",
        "colours": r"labelIds.png \(pixels of mode RGB",
        "cut_image": r"leftImg8bit.png \(cannot be decoded",
        "cut_label": r"labelIds.png \(cannot be decoded",
        "huge_image": r"leftImg8bit.png \(more than 64 megapixels",
    },
}
"""A training sample that cannot be read: told and replaced, and exit code 3 above data.max_bad_fraction."""

TOLD: Mapping[str, Mapping[str, str]] = {
    "coco": {
        "annotation_ids_repeat": "annotation id that stands twice",
        "spare_category": "category that no annotation uses, and that is called as another",
        "unknown_category": "object of a category that is not listed",
        "unknown_image": "object of an image that is not listed",
        "mask_of_another_size": "mask of another size than its image",
        "runs_too_long": "mask whose run lengths do not fill its image",
        "two_points": "mask without a polygon of three or more finite points",
        "odd_polygon": "mask without a polygon of three or more finite points",
        "no_segmentation": "object without a mask",
        "nan_box": "box that is not four finite numbers",
        "short_box": "box that is not four finite numbers",
        "box_outside": "box outside its image",
        "mask_sticks_out": "box that reaches beyond its image: cut in training, scored as it is",
    },
    "cityscapes": {"sixteen_bits": ""},
}
"""What is counted as a finding; nothing is wrong with 16 bits."""


def checked(name: str, broken: str, folder: Path, max_bad_fraction: float) -> DataCheck:
    kind = KINDS[name]
    if not (folder / "tree").exists():
        kind.write(folder / "tree", broken=broken)
    config = kind.config(folder / "tree", folder / str(max_bad_fraction), max_bad_fraction=max_bad_fraction)
    return check_data(Session(config, SilentReporter(), StopRequest()))


def of_every_kind(table: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    return [(name, broken) for name, entries in table.items() for broken in entries]


def test_every_way_to_break_a_tree_is_tried() -> None:
    tried = {name: [*REFUSED[name], *UNREADABLE[name], *TOLD[name]] for name in KINDS}
    assert {name: sorted(entries) for name, entries in tried.items()} == {
        "coco": sorted(BROKEN_COCO),
        "cityscapes": sorted(BROKEN_CITYSCAPES),
    }


@pytest.mark.parametrize(("name", "broken"), of_every_kind(REFUSED))
def test_what_no_command_takes_ends_with_3(name: str, broken: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=REFUSED[name][broken]) as refused:
        checked(name, broken, tmp_path, 0.5)
    assert refused.value.exit_code == 3
    assert refused.value.do.endswith(".")


@pytest.mark.parametrize(("name", "broken"), of_every_kind(UNREADABLE))
def test_an_unreadable_training_sample_is_told_and_replaced(name: str, broken: str, tmp_path: Path) -> None:
    told = UNREADABLE[name][broken]
    found = checked(name, broken, tmp_path, 0.5)
    assert found.usable
    (finding,) = [each for each in found.findings if each.what == "samples that cannot be read"]
    assert (finding.split, finding.count) == ("train", 1)
    assert re.search(told, finding.examples[0])
    assert train_epoch(name, tmp_path, 0.5) == 1
    with pytest.raises(SparseViTError, match=told) as refused:
        checked(name, broken, tmp_path, 0.01).refuse_unusable()
    assert refused.value.exit_code == 3
    with pytest.raises(DataError, match=told):
        train_epoch(name, tmp_path, 0.01)


@pytest.mark.parametrize("split", ["search", "val"])
@pytest.mark.parametrize("name", KINDS)
def test_a_held_out_file_of_another_size_is_told_before_any_training(name: str, split: str, tmp_path: Path) -> None:
    """Else the first validation would end the training, after days."""
    KINDS[name].write(tmp_path / "files")
    session = Session(KINDS[name].config(tmp_path / "files", tmp_path), SilentReporter(), StopRequest())
    source = getattr(session.data(), split)
    path = source.sample_file(0)
    if isinstance(source, PairSource):
        path = source.pairs.root / source.pairs.pairs[source.record(0)].mask
    Image.fromarray(np.tile(np.array([7, 8], dtype=np.uint8), (10, 6))).save(path)
    with pytest.raises(DataError, match=rf"{split}.* images: 1 unreadable: .*10 x 12 pixels, its "):
        pretrain(session)
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize(("name", "broken"), of_every_kind(TOLD))
def test_an_annotation_that_cannot_be_used_is_counted(name: str, broken: str, tmp_path: Path) -> None:
    found = checked(name, broken, tmp_path, 0.0)
    assert found.usable
    whole = {"box without area", "categories without an example"}
    told = [(each.split, each.what, each.count) for each in found.findings if each.what not in whole]
    splits = ("train", "val") if broken == "spare_category" else ("train",)
    assert told == [(split, TOLD[name][broken], 1) for split in splits if TOLD[name][broken]]
    assert train_epoch(name, tmp_path, 0.0) == 0


def train_epoch(name: str, folder: Path, max_bad_fraction: float) -> int:
    """Read an epoch as training does, and what is held out; how many samples could not be read."""
    config = KINDS[name].config(folder / "tree", folder, max_bad_fraction=max_bad_fraction)
    data = task_of(config).data(seed=0, categories=None)
    for batch in train_batches(data.train, batch_size=2, seed=0, epoch=0, drop_last=False):
        assert batch.is_finite().all()
    for source in (data.search, data.val):
        assert sum(map(len, eval_batches(source, 2))) == len(source)
    assert data.train.bad_images is not None
    return len(data.train.bad_images)
