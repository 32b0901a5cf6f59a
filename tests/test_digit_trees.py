"""The scenes of digits as files: other people's readers find in them exactly what was drawn."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from typer.testing import CliRunner

from sparsevit_cli.cli import app
from sparsevit_cli.data.digit_scenes import DigitScenes
from sparsevit_cli.data.digit_trees import (
    BACKGROUND_ID,
    COCO_IDS,
    LABEL_IDS,
    main,
    outlines,
    polygons,
    write_cityscapes,
    write_coco,
)
from sparsevit_cli.data.digits import DigitsSpec, Split
from sparsevit_cli.errors import ConfigError

SPEC = DigitsSpec(96)
COUNTS: dict[Split, int] = {"train": 3, "val": 2}
CONFIGS = Path(__file__).parents[1] / "configs"


def coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_pycocotools_finds_the_scenes_in_a_coco_tree(tmp_path: Path) -> None:
    write_coco(tmp_path, spec=SPEC, seed=1, counts=COUNTS)
    for split, folder in (("train", "train2017"), ("val", "val2017")):
        read = coco(tmp_path / "annotations" / f"instances_{folder}.json")
        scenes = DigitScenes(SPEC, split, 1, count=COUNTS[split])  # type: ignore[arg-type, index]
        assert [category["id"] for category in read.loadCats(read.getCatIds())] == list(COCO_IDS)
        assert len(read.imgs) == len(scenes)
        for image, index in zip(read.loadImgs(sorted(read.imgs)), range(len(scenes)), strict=True):
            scene, annotations = scenes[index], read.loadAnns(read.getAnnIds(image["id"]))
            pixels = np.asarray(Image.open(tmp_path / folder / image["file_name"]))
            assert np.array_equal(pixels, scene.grey()[:, :, None].repeat(3, 2))
            assert [COCO_IDS.index(each["category_id"]) for each in annotations] == scene.labels.tolist()
            assert all(
                np.array_equal(read.annToMask(each), mask.numpy())
                for each, mask in zip(annotations, scene.masks, strict=True)
            )
            tight = [coco_masks.toBbox(read.annToRLE(each)).tolist() for each in annotations]
            assert [each["bbox"] for each in annotations] == tight


masks = arrays.arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 7)))


@given(mask=masks)
def test_polygons_are_the_mask_whatever_it_looks_like(mask: np.ndarray) -> None:
    """Holes, islands in holes, pixels that touch by a corner, the edge of the image."""
    height, width = mask.shape
    parts = polygons(mask)
    found = np.zeros((height, width), dtype=bool)
    if parts:  # pycocotools takes no empty list
        found = coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(parts, height, width))).astype(bool)
    assert np.array_equal(found, mask)
    assert all(len(part) >= 8 for part in parts)


def test_an_outline_has_corners_alone_and_runs_the_other_way_round_a_hole() -> None:
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    outer, inner = sorted(outlines(ring), key=min)
    assert sorted(outer) == [(0, 0), (0, 3), (3, 0), (3, 3)]
    assert sorted(inner) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len(polygons(ring)) == 2


def test_a_cityscapes_tree_holds_the_scenes_under_label_ids(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, spec=SPEC, seed=2, counts=COUNTS)
    images = sorted((tmp_path / "leftImg8bit").rglob("*.png"))
    assert [str(path.relative_to(tmp_path / "leftImg8bit")) for path in images] == [
        "train/aachen/aachen_000000_000019_leftImg8bit.png",
        "train/aachen/aachen_000001_000019_leftImg8bit.png",
        "train/bochum/bochum_000000_000019_leftImg8bit.png",
        "val/lindau/lindau_000000_000019_leftImg8bit.png",
        "val/lindau/lindau_000001_000019_leftImg8bit.png",
    ]
    scene = DigitScenes(SPEC, "train", 2, count=3)[2]
    truth = tmp_path / "gtFine" / "train" / "aachen" / "aachen_000001_000019_gtFine_labelIds.png"
    with Image.open(truth) as opened:
        assert opened.mode == "L"
        ids = np.asarray(opened)
    assert np.array_equal(ids, np.array([BACKGROUND_ID, *LABEL_IDS])[scene.class_map.numpy()])
    assert np.array_equal(np.asarray(Image.open(images[1]))[:, :, 0], scene.grey())


@pytest.mark.parametrize(
    ("layout", "config"), [("coco", "coco_mask_rcnn_swin_t_672"), ("cityscapes", "cityscapes_mask2former_swin_l")]
)
def test_the_command_writes_a_tree_that_our_own_reader_takes(
    layout: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits"
    typed = [layout, str(folder), "--canvas", "64", "--train", "8", "--val", "2"]
    assert main(typed) == 0
    assert json.loads(capsys.readouterr().out)["train"] == 8
    words = ["check-data", "--config", str(CONFIGS / f"{config}.yaml"), "--output", str(tmp_path / "runs"), "--json"]
    sets = [f"data.root={folder}", "model.img_size=64", "data.workers=0", "device=cpu"]
    loops = [f"{loop}.curriculum=[]" for loop in ("train", "adapt", "finetune")]
    sets += ["data.crop=64"] if layout == "cityscapes" else loops
    done = CliRunner().invoke(app, [*words, *(word for each in sets for word in ("--set", each))])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {each["what"] for each in found["findings"]} <= {"categories without an example"}
    counted = list(found["splits"]["val"]["categories"].values())
    scenes = [DigitScenes(DigitsSpec(64), "val", 0, count=2)[index] for index in range(2)]
    if layout == "coco":
        assert counted == np.bincount(np.concatenate([scene.labels for scene in scenes]), minlength=10).tolist()
    else:  # the digits have the first ten train ids, the background is sky, which is the eleventh
        background, *digits = np.bincount(np.concatenate([scene.class_map.ravel() for scene in scenes]), minlength=11)
        assert counted == [*digits, background, *[0] * 8]
    assert main(typed) == ConfigError.exit_code
    assert "holds something" in capsys.readouterr().err
