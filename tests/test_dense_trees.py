"""The trees of dense_trees hold what they say, as other people's tools read them; each broken one differs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from dense_trees import (
    BROKEN_CITYSCAPES,
    BROKEN_COCO,
    COCO_CATEGORIES,
    IGNORED,
    TRAIN_IDS,
    cityscapes_tree,
    coco_tree,
)
from sparsevit_cli.data.images import UnreadableImageError, decode_image


def test_pycocotools_finds_the_truth_of_a_coco_tree(tmp_path: Path) -> None:
    tree = coco_tree(tmp_path)
    for split, truth in (("train2017", tree.train), ("val2017", tree.val)):
        with contextlib.redirect_stdout(io.StringIO()):
            read = COCO(str(tmp_path / "annotations" / f"instances_{split}.json"))
        assert read.getCatIds() == list(COCO_CATEGORIES)
        assert list(read.imgs) == list(truth.sizes)
        for number, image in read.imgs.items():
            with Image.open(tmp_path / split / image["file_name"]) as opened:
                upright = ImageOps.exif_transpose(opened)
            assert (upright.height, upright.width) == truth.sizes[number] == (image["height"], image["width"])
            found = read.loadAnns(read.getAnnIds(number))
            kept = [each for each in found if each["id"] not in truth.degenerate]
            told = [*truth.things.get(number, ()), *truth.crowds.get(number, ())]
            assert sorted(each["id"] for each in kept) == sorted(thing.number for thing in told)
            for thing in told:
                annotation = read.anns[thing.number]
                x, y, width, height = annotation["bbox"]
                assert (thing.category, thing.box) == (annotation["category_id"], (x, y, x + width, y + height))
                assert np.array_equal(read.annToMask(annotation), thing.mask)
    assert len(tree.train.degenerate) == 3
    assert tree.train.empty == (184613, 60623, 309022)
    assert tree.val.empty == (37777,)
    kinds = {type(each["segmentation"]).__name__ for each in read.anns.values()}
    assert kinds == {"list", "dict"}


def test_a_coco_tree_has_a_grey_and_a_turned_image(tmp_path: Path) -> None:
    coco_tree(tmp_path)
    with Image.open(tmp_path / "train2017" / "000000522418.jpg") as grey:
        assert grey.mode == "L"
    turned = tmp_path / "train2017" / "000000318219.jpg"
    with Image.open(turned) as stored:
        assert (stored.width, stored.height) == (66, 42)
    upright = np.asarray(decode_image(turned, "turned", 1.0)).astype(int)
    assert upright[:33, :20].mean() > upright[40:].mean() + 50, "the object is where its box says"


def test_the_truth_of_a_cityscapes_tree_is_that_of_its_label_ids(tmp_path: Path) -> None:
    tree = cityscapes_tree(tmp_path)
    for split in ("train", "val"):
        truth = getattr(tree, split)
        files = {
            path.name.removesuffix("_gtFine_labelIds.png"): path
            for path in (tmp_path / "gtFine" / split).rglob("*labelIds.png")
        }
        assert set(files) == set(truth)
        for name, path in files.items():
            ids = np.asarray(Image.open(path))
            assert ids.max() <= 33
            for label in np.unique(ids).tolist():
                assert set(truth[name][ids == label].tolist()) == {TRAIN_IDS.get(label, IGNORED)}
            assert (truth[name] == IGNORED).any()
            kinds = sorted(other.name.rpartition("_")[2] for other in path.parent.glob(f"{name}_*"))
            assert kinds == ["color.png", "instanceIds.png", "labelIds.png", "polygons.json"]
            image = Image.open(tmp_path / "leftImg8bit" / split / name.partition("_")[0] / f"{name}_leftImg8bit.png")
            assert (image.height, image.width) == truth[name].shape
    seen = set(np.unique(np.stack(list(tree.train.values()))).tolist())
    assert seen == {0, 1, 2, 8, 10, 11, 13, 18, IGNORED}
    hidden = np.asarray(Image.open(next((tmp_path / "gtFine" / "test").rglob("*labelIds.png"))))
    assert set(np.unique(hidden).tolist()) == {0, 1, 2, 3}


def state(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module", params=[(coco_tree, BROKEN_COCO), (cityscapes_tree, BROKEN_CITYSCAPES)])
def kind(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Mapping[str, str]]:
    found: tuple[Callable[..., Any], Mapping[str, str]] = request.param
    return found


def test_a_broken_tree_differs_from_a_whole_one_and_from_every_other(
    kind: tuple[Callable[..., Any], Mapping[str, str]], tmp_path: Path
) -> None:
    build, names = kind
    build(tmp_path / "whole")
    build(tmp_path / "again")
    whole = state(tmp_path / "whole")
    assert state(tmp_path / "again") == whole, "a tree is the same each time"
    seen: dict[frozenset[tuple[str, str]], str] = {}
    for broken in names:
        build(tmp_path / broken, broken=broken)
        differing = frozenset(set(state(tmp_path / broken).items()) ^ set(whole.items()))
        assert differing, f"{broken} changes nothing"
        assert differing not in seen, f"{broken} is {seen[differing]}"
        seen[differing] = broken


def test_unknown_names_are_no_way_to_break_a_tree(tmp_path: Path) -> None:
    for build in (coco_tree, cityscapes_tree):
        with pytest.raises(AssertionError, match="nothing"):
            build(tmp_path / build.__name__, broken="nothing")


def test_a_huge_image_is_known_by_its_header(tmp_path: Path) -> None:
    coco_tree(tmp_path, broken="huge_image")
    with pytest.raises(UnreadableImageError, match="more than 100 megapixels"):
        decode_image(tmp_path / "train2017" / "000000391895.jpg", "huge", 100.0)
