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

from sparsevit_cli.data.digit_scenes import DigitScenes
from sparsevit_cli.data.digit_trees import (
    BACKGROUND_ID,
    COCO_IDS,
    LABEL_IDS,
    main,
    outlines,
    polygons,
    run_lengths,
    write_cityscapes,
    write_coco,
)
from sparsevit_cli.data.digits import DigitsSpec, Split
from sparsevit_cli.errors import ConfigError

SPEC = DigitsSpec(96)
COUNTS: dict[Split, int] = {"train": 3, "val": 2}


def coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.mark.parametrize("masks", ["polygons", "rle"])
def test_pycocotools_finds_the_scenes_in_a_coco_tree(masks: str, tmp_path: Path) -> None:
    write_coco(tmp_path, spec=SPEC, seed=1, counts=COUNTS, masks=masks)  # type: ignore[arg-type]
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


def test_jpeg_images_have_their_names_in_the_list(tmp_path: Path) -> None:
    write_coco(tmp_path, spec=SPEC, counts=COUNTS, suffix="jpg")
    listed = coco(tmp_path / "annotations" / "instances_val2017.json").imgs
    assert {Image.open(tmp_path / "val2017" / each["file_name"]).format for each in listed.values()} == {"JPEG"}


masks = arrays.arrays(bool, st.tuples(st.integers(1, 7), st.integers(1, 7)))


@given(mask=masks)
def test_run_lengths_and_polygons_are_the_mask_whatever_it_looks_like(mask: np.ndarray) -> None:
    """Holes, islands in holes, pixels that touch by a corner, the edge of the image."""
    height, width = mask.shape
    runs = run_lengths(mask)
    assert np.array_equal(coco_masks.decode(coco_masks.frPyObjects(runs, height, width)), mask)
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


def test_the_command_writes_a_tree_and_refuses_a_folder_that_is_in_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["coco", str(tmp_path / "digits"), "--canvas", "64", "--train", "2", "--val", "1"]
    assert main(typed) == 0
    assert json.loads(capsys.readouterr().out)["train"] == 2
    assert len(list((tmp_path / "digits" / "train2017").iterdir())) == 2
    assert main(typed) == ConfigError.exit_code
    assert "holds something" in capsys.readouterr().err
