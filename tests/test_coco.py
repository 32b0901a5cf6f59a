"""Data in COCO's form: quirks, faults, masks, where images and objects go, and AP as pycocotools reckons it."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from coco_tree import coco_tree
from sparsevit_cli.config.instances import CocoData, InstancesAugment
from sparsevit_cli.data import Batch, Data, Shrunk
from sparsevit_cli.data.shrunk import Scale
from sparsevit_cli.errors import ConfigError, DataError
from sparsevit_cli.tasks.instances.coco import read_coco
from sparsevit_cli.tasks.instances.data import build_data
from sparsevit_cli.tasks.instances.masks import Polygons, mask_api, pasted, run_lengths, unpacked
from sparsevit_cli.tasks.instances.model import MASK_SHIFT
from sparsevit_cli.tasks.instances.placing import (
    PlacingSpec,
    frame_of,
    jittered,
    placed_image,
    placed_objects,
    stretched,
)
from sparsevit_cli.tasks.instances.scorer import AveragePrecision, on_image
from sparsevit_cli.tasks.instances.truth import Instance, Truth, Truths

SIZE = (64, 96)


def data(root: Path, *, masks: bool = True, seed: int = 0, **fields: Any) -> Data:
    section = CocoData(root=str(root), search_fraction=0.2, **fields)
    return build_data(section, img_size=SIZE, in_chans=3, seed=seed, masks=masks)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coco_tree(tmp_path_factory.mktemp("coco"))


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_tree_is_read_as_it_is(tree: Path) -> None:
    found = data(tree)
    assert found.categories.names == ("bar", "box", "never seen")
    assert found.categories.ids == (3, 7, 90)
    assert len(found.train) + len(found.search) == 10, "two of twelve training images are empty"
    assert len(found.val) == 4
    assert len(data(tree, keep_empty=True).train) + len(data(tree, keep_empty=True).search) == 12
    names = [{source.sample_name(n) for n in range(len(source))} for source in (found.train, found.search, found.val)]
    assert not names[0] & names[1]
    assert found.findings == ()
    _, target = found.train[0]
    assert target["labels"].tolist() == [2, 1], "the crowd is not trained on"
    assert target["masks"].shape == (2, *SIZE)
    truth = found.val[0][1]["truth"]
    assert [instance.crowd for instance in truth.instances] == [False, False, True]


def flat(truth: Truth) -> Any:
    """All values of a truth, to be compared."""
    return truth.image_id, truth.size, [
        (each.label, each.box, each.area, each.crowd, each.shape and each.shape.coco(truth.size))
        for each in truth.instances
    ]  # fmt: skip


def test_truths_in_arrays_are_those_that_were_put_in() -> None:
    runs = run_lengths(np.eye(6, 8, dtype=bool))
    outlines = (np.array([0.1, 0.2, 5, 0.3, 5, 4.25]), np.array([1.0, 1, 2, 1, 2, 2, 1, 2]))
    truths = [
        Truth(9, (6, 8), ()),
        Truth(-(2**40), (6, 8), (Instance(3, (0.1, 0.2, 5.0, 4.0), 7.5, Polygons(outlines)),
                                 Instance(1, (0.0, 0.0, 8.0, 6.0), 6.0, runs, crowd=True))),
        Truth(5, (60_000, 8), (Instance(0, (1.0, 1.0, 2.0, 2.0), 4.0), Instance(2, (1.0, 1.0, 2.0, 3.0), 2.0, runs),
                               Instance(0, (1.0, 1.0, 2.0, 2.0), 4.0, Polygons(outlines[1:])))),
        Truth(4, (6, 8), ()),
    ]  # fmt: skip
    packed = Truths(truths)
    assert [flat(truth) for truth in packed] == [flat(truth) for truth in truths]
    assert flat(packed[-2]) == flat(truths[-2])
    assert packed.objects().tolist() == [0, 2, 3, 0]
    assert packed.learned().tolist() == [0, 1, 3, 0]
    assert packed.size(2) == (60_000, 8)
    assert flat(pickle.loads(pickle.dumps(packed))[1]) == flat(truths[1])  # as to a loader process that is spawned
    (huge,) = Truths([Truth(10**30, (6, 8), ())])
    assert huge.image_id == 10**30
    assert list(Truths([])) == []


def test_an_annotation_is_no_object_of_python(tmp_path: Path) -> None:
    """Loader processes copied each page with one: counting references writes into it."""
    document = json.loads((coco_tree(tmp_path) / "annotations" / "instances_train2017.json").read_text())
    polygons = [row for row in document["annotations"] if isinstance(row["segmentation"], list)]
    document["annotations"] = [{**polygons[n % 2], "id": n} for n in range(3000)]
    file = tmp_path / "annotations" / "many.json"
    file.write_text(json.dumps(document))
    split = read_coco(file, tmp_path / "train2017", "train", masks=True, max_megapixels=10)
    truths = split.images.truths
    assert truths.objects().sum() == 3000
    reached, waiting = set[int](), [truths]
    while waiting:
        one = waiting.pop()
        if id(one) not in reached and not isinstance(one, type):
            reached.add(id(one))
            waiting += gc.get_referents(one)
    assert len(reached) < 200
    points, of_all_else = 8 * 8, 4 + 4 * 8 + 8 + 1 + 4 + 4 + 4
    assert len(pickle.dumps(truths)) < 3000 * (points + of_all_else) + 5000


def test_search_images_do_not_depend_on_the_seed_and_fingerprints_on_what_is_learned(
    tree: Path, tmp_path: Path
) -> None:
    one, other = data(tree), data(tree, seed=5)
    assert [one.search.sample_name(n) for n in range(2)] == [other.search.sample_name(n) for n in range(2)]
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != data(tree, masks=False).fingerprint
    assert one.val_fingerprint != data(tree, letterbox=True).val_fingerprint
    moved = coco_tree(tmp_path / "moved")
    assert data(moved).fingerprint == one.fingerprint
    changed = coco_tree(tmp_path / "changed", change={"train": lambda d: d["annotations"][0].update(area=1)})
    assert data(changed).fingerprint != one.fingerprint


FAR = "reaches further than an image's size beyond its image"


def of_first(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the first annotation, a polygon."""
    return lambda document: document["annotations"][0].update(changes)


def of_second(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the run lengths of the second annotation."""
    return lambda document: document["annotations"][1]["segmentation"].update(changes)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (of_first(bbox=[3, 4, 10, 0]), "box without area"),
        (of_first(bbox=[3, 4, 10**400, 5]), "box that is not four finite numbers"),
        (of_first(bbox=None), "box that is not four finite numbers"),
        (of_first(segmentation=[[1, 2, math.nan, 4, 5, 6]]), "mask without a polygon of three or more finite points"),
        (of_first(segmentation=[[700, 2, 710, 2, 710, 20]]), "mask outside its image"),
        (of_first(segmentation=[[2, 3, 1e15, 3, 1e15, 1e15]]), f"mask that {FAR}"),
        (of_second(size=[10, 10]), "mask of another size than its image"),
        (of_second(counts="Z"), "mask of unreadable run lengths"),
        (of_second(counts=[5, "a"]), "mask of unreadable run lengths"),
        (lambda document: document["annotations"].__setitem__(0, 3), "object of an image that is not listed"),
    ],
)
def test_objects_that_cannot_be_used_are_left_out_and_told(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = data(coco_tree(tmp_path, change={"train": change}))
    (finding,) = found.findings
    assert (finding.split, finding.what, finding.count) == ("train", what, 1)
    assert what in caplog.text
    assert any(what in value for _, value in found.describe())
    source = found.train if "000000000100" in found.train.sample_name(0) else found.search
    assert len(source.images.truths[0].instances) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("polygon", [[1, 1, 5, 5], [1, 1, 5, 1, 5, 5, 1], [1, 1, 5, math.nan, 5, 5]])
def test_a_polygon_that_is_none_beside_a_good_one_is_left_out_alone(tmp_path: Path, polygon: list[float]) -> None:
    polygons = [[2, 3, 12, 3, 12, 11, 2, 11], polygon]
    found = data(coco_tree(tmp_path, change={"train": of_first(segmentation=polygons)}))
    assert found.findings[0].what == "polygon that is not three or more finite points, left out of its mask"
    assert len(found.train.images.truths[0].instances) == 3  # type: ignore[attr-defined]


def test_a_polygon_that_reaches_far_beyond_its_image_is_left_out_before_its_pixels_fill_the_memory(
    tmp_path: Path,
) -> None:
    polygons = [[2, 3, 12, 3, 12, 11, 2, 11], [2, 3, 12, -1e15, 12, 11]]
    found = data(coco_tree(tmp_path, change={"train": of_first(segmentation=polygons)}))
    assert found.findings[0].what == f"polygon that {FAR}, left out of its mask"
    first = found.train.images.truths[0]  # type: ignore[attr-defined]
    assert len(first.instances) == 3
    assert first.instances[0].shape.pixels(first.size).sum() == 80
    beyond = [[2, 3, 70, 3, 70, 11, 2, 11]]
    assert not data(coco_tree(tmp_path / "beyond", change={"train": of_first(segmentation=beyond)})).findings


def emptied(document: dict[str, Any]) -> None:
    document["annotations"] = []


def renamed(document: dict[str, Any]) -> None:
    document["categories"] = [dict(row, name=row["name"].upper()) for row in document["categories"]]


@pytest.mark.parametrize(
    ("split", "change", "told"),
    [
        ("val", emptied, "none of 0 annotations is an object"),
        ("val", renamed, "6 categories are in one of the two files only: 3 bar in training"),
        ("train", lambda d: d["images"][0].pop("width"), "image 0 is"),
        ("train", lambda d: d["images"][0].update(file_name="../secret.png"), "image 0 is"),
        ("train", lambda d: d["images"][0].update(height=True), "image 0 is"),
        ("train", lambda d: d["images"][1].update(file_name=d["images"][0]["file_name"]), "file names stand twice"),
        ("train", lambda d: d["categories"][0].pop("name"), "1 of 3 categories"),
        ("val", lambda d: d["images"][0].update(height=90000, width=90000), "more than data.max_megapixels"),
        ("val", lambda d: [row.pop("segmentation") for row in d["annotations"]], "task.masks: false"),
    ],
)
def test_what_training_or_evaluation_would_fail_at_is_refused_before(
    tmp_path: Path, split: str, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    tree = coco_tree(tmp_path, change={split: change})
    with pytest.raises(DataError) as refused:
        data(tree)
    assert told in str(refused.value)
    assert refused.value.exit_code == 3


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe\x00"])
def test_annotation_files_that_no_json_reader_takes_are_refused(tmp_path: Path, content: bytes) -> None:
    tree = coco_tree(tmp_path)
    (tree / "annotations" / "instances_val2017.json").write_bytes(content)
    with pytest.raises(DataError, match="no JSON"):
        data(tree)


def test_validation_on_training_images_is_refused(tree: Path) -> None:
    same = {"val_images": "train2017", "val_annotations": "annotations/instances_train2017.json"}
    with pytest.raises(DataError, match="12 validation images are training images"):
        data(tree, **same)


def test_names_with_the_backslashes_of_windows_are_found_elsewhere(tmp_path: Path) -> None:
    def of_windows(document: dict[str, Any]) -> None:
        for row in document["images"]:
            row["file_name"] = "deep\\" + row["file_name"]

    tree = coco_tree(tmp_path, change={"val": of_windows})
    (tree / "val2017" / "deep").mkdir()
    files = sorted((tree / "val2017").glob("*.png"))
    for file in files[:-1]:
        file.rename(file.parent / "deep" / file.name)
    files[-1].rename(files[-1].parent / f"deep\\{files[-1].name}")
    val = data(tree).val
    assert [val[n][0].shape for n in range(4)] == [(3, *SIZE)] * 4
    assert [val.sample_name(n).count("/") for n in range(4)] == [2, 2, 2, 1], "a file is called as the list says"


def test_validation_on_a_training_image_is_refused_by_whatever_path_it_is_named(tmp_path: Path) -> None:
    def shared(document: dict[str, Any]) -> None:
        document["images"][0].update(file_name="./linked/000000000100.png")

    tree = coco_tree(tmp_path, change={"val": shared})
    (tree / "val2017" / "linked").symlink_to(tree / "train2017")
    with pytest.raises(DataError, match=r"1 validation images are training images: \./linked/0+100.png"):
        data(tree)


def test_the_extra_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.delitem(sys.modules, "faster_coco_eval.core", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'sparsevit-cli\[detect\]'"):
        mask_api()


# -- masks ------------------------------------------------------------------------------------------------------------

PIXELS = st.tuples(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 1.0])
)


def drawn(height: int, width: int, seed: int, share: float) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width)) < share


@given(PIXELS)
def test_run_lengths_are_cocos(drawing: tuple[int, int, int, float]) -> None:
    pixels = drawn(*drawing)
    found = run_lengths(pixels)
    assert np.array_equal(found.pixels(pixels.shape), pixels)
    assert found.area == pixels.sum()
    packed = reference_masks.encode(np.asfortranarray(pixels.astype(np.uint8)))
    assert np.array_equal(unpacked(packed["counts"]), found.counts)
    plain = reference_masks.frPyObjects(found.coco(pixels.shape), *pixels.shape)
    assert plain["counts"] == packed["counts"]


@given(st.binary(max_size=12) | st.text(st.characters(max_codepoint=200), max_size=12))
def test_texts_that_are_no_run_lengths_are_refused_or_read(text: bytes | str) -> None:
    with contextlib.suppress(ValueError):
        assert unpacked(text).ndim == 1


def test_polygons_have_the_pixels_of_pycocotools() -> None:
    outlines = [[3.2, 4.1, 30.7, 6.0, 20.5, 33.3], [1.0, 1.0, 9.5, 1.0, 9.5, 7.25, 1.0, 7.25]]
    found = Polygons(tuple(map(np.array, outlines))).pixels((40, 50))
    expected = reference_masks.decode(reference_masks.merge(reference_masks.frPyObjects(outlines, 40, 50)))
    assert np.array_equal(found, expected.astype(bool))


def test_a_pasted_mask_is_the_one_that_torchvision_teaches() -> None:
    """What the mask head learns for a box, cut out by torchvision, gives the object's pixels back."""
    from torchvision.models.detection.roi_heads import project_masks_on_boxes

    ys, xs = np.mgrid[:80, :100]
    pixels = ((ys - 41.3) / 22) ** 2 + ((xs - 52.8) / 31) ** 2 < 1
    box = torch.tensor([[20.3, 17.6, 85.9, 66.2]])
    taught = project_masks_on_boxes(torch.from_numpy(pixels[None]).to(torch.uint8), box, torch.zeros(1), 28)[0]

    def overlap(shift: float) -> float:
        found = pasted(taught, tuple((box[0] + shift).tolist()), (80, 100))
        return float((found & pixels).sum() / (found | pixels).sum())

    assert overlap(MASK_SHIFT) > 0.985
    assert overlap(MASK_SHIFT) > max(overlap(0.0), overlap(1.0)) + 0.005


def test_a_mask_outside_the_image_is_empty() -> None:
    assert not pasted(torch.ones(4, 4), (-9.0, 2.0, -1.0, 5.0), (20, 20)).any()
    assert pasted(torch.ones(4, 4), (-9.0, -9.0, 40.0, 40.0), (20, 20)).all()


# -- where images and objects go --------------------------------------------------------------------------------------

SIDES = st.tuples(st.integers(8, 90), st.integers(8, 90))
CANVASES = st.tuples(st.integers(1, 3).map(lambda n: 32 * n), st.integers(1, 3).map(lambda n: 32 * n))


@given(
    image=SIDES, canvas=CANVASES, scale=st.floats(0.2, 2.5), keep_aspect=st.booleans(), mirrored=st.booleans(),
    at=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)), seed=st.integers(0, 999),
)  # fmt: skip
def test_boxes_stay_around_their_masks_wherever_an_image_goes(
    image: tuple[int, int], canvas: tuple[int, int], scale: float, keep_aspect: bool, mirrored: bool,
    at: tuple[float, float], seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    height, width = image
    y0, x0 = int(rng.integers(0, height - 4)), int(rng.integers(0, width - 4))
    y1, x1 = int(rng.integers(y0 + 4, height + 1)), int(rng.integers(x0 + 4, width + 1))
    pixels = np.zeros(image, dtype=bool)
    pixels[y0:y1, x0:x1] = True
    box = (float(x0), float(y0), float(x1 - x0), float(y1 - y0))
    truth = Truth(1, image, (Instance(4, box, float(pixels.sum()), run_lengths(pixels)),))
    placement = jittered(image, canvas, scale, keep_aspect=keep_aspect, at=at)
    placement = type(placement)(**{**placement.__dict__, "mirrored": mirrored})
    found: Any = placed_objects(truth, placement, masks=True)
    assert found["masks"].shape[1:] == canvas
    assert len(found["boxes"]) == len(found["labels"]) == len(found["masks"]) <= 1
    for edges, mask in zip(found["boxes"].tolist(), found["masks"], strict=True):
        assert found["labels"].tolist() == [5]
        ys, xs = mask.any(1).nonzero(), mask.any(0).nonzero()
        around = [xs[0].item(), ys[0].item(), xs[-1].item() + 1, ys[-1].item() + 1]
        assert max(abs(a - b) for a, b in zip(edges, around, strict=True)) <= 1.01
        assert min(edges[2] - edges[0], edges[3] - edges[1]) > 0
    if not mirrored and placement.corner == (0, 0) and placement.part == placement.scaled:
        back = on_image(found["boxes"].as_subclass(Tensor), frame_of(placement)[0].as_subclass(Tensor), image)
        if len(back):
            assert torch.allclose(back[0], torch.tensor([x0, y0, x1, y1]).float(), atol=0.02)


def test_an_image_goes_where_its_masks_go() -> None:
    """A bright square in the image and its mask cover the same pixels, cropped, mirrored and padded."""
    image = Image.new("RGB", (60, 40))
    image.paste((255, 255, 255), (30, 10, 50, 30))
    pixels = np.zeros((40, 60), dtype=bool)
    pixels[10:30, 30:50] = True
    truth = Truth(1, (40, 60), (Instance(0, (30, 10, 20, 20), 400.0, run_lengths(pixels)),))
    spec = PlacingSpec((64, 64), (0.5,) * 3, (0.5,) * 3, False, augment=None)
    for scale, mirrored, at in ((1.6, True, (0.5, 0.5)), (0.7, True, (0, 0)), (1.0, False, (0, 0))):
        placement = jittered((40, 60), (64, 64), scale, keep_aspect=False, at=at)
        placement = type(placement)(**{**placement.__dict__, "mirrored": mirrored})
        drawn_image = placed_image(image, placement, spec)
        assert drawn_image.shape == (3, 64, 64)
        bright = (drawn_image[0] > 0).numpy()
        mask = placed_objects(truth, placement, masks=True)["masks"].numpy()[0].astype(bool)  # type: ignore[attr-defined]
        assert (bright & mask).sum() / (bright | mask).sum() > 0.97


@pytest.mark.parametrize("wide", [1, 2])
def test_a_crack_is_still_taught_on_a_canvas_on_which_it_has_half_of_no_pixel(wide: int) -> None:
    ys, xs = np.mgrid[:400, :400]
    pixels = abs(ys - xs) < wide
    thick = abs(ys + xs - 399) < 40
    instances = tuple(Instance(0, (0, 0, 400, 400), float(each.sum()), run_lengths(each)) for each in (pixels, thick))
    found: Any = placed_objects(Truth(1, (400, 400), instances), stretched((400, 400), (64, 64)), masks=True)
    assert found["boxes"].tolist() == [[0, 0, 64, 64]] * 2
    crack, broad = (mask.numpy().astype(bool) for mask in found["masks"])
    assert crack.diagonal().all(), "whole from end to end"
    assert crack.sum() <= 3 * 64
    rows, columns = np.mgrid[:64, :64]
    assert not broad[abs(rows + columns - 63) > 7].any(), "others are no wider than they were"


def test_augmentation_is_a_function_of_seed_epoch_and_number(tree: Path) -> None:
    augment = InstancesAugment(hflip=0.5, jitter=(0.3, 2.0))
    source = data(tree, augment=augment).train
    source.set_epoch(1)
    first = [source[n] for n in range(4)]
    source.set_epoch(2)
    other = [source[n] for n in range(4)]
    again = data(tree, augment=augment).train
    again.set_epoch(1)
    for n, (image, target) in enumerate(first):
        assert torch.equal(image, again[n][0])
        assert torch.equal(target["boxes"], again[n][1]["boxes"])
        assert image.shape == (3, *SIZE)
    assert not all(torch.equal(one[0], two[0]) for one, two in zip(first, other, strict=True))
    held = data(tree, augment=augment).val
    held.set_epoch(3)
    assert torch.equal(held[0][0], data(tree).val[0][0])


def test_shrunk_training_samples_keep_boxes_around_masks(tree: Path) -> None:
    small = Shrunk(data(tree).train, Scale(SIZE, (32, 48)))
    (images, targets), whole = small.collate([small[0], small[1]], 3), data(tree).train[0][1]
    assert images.shape == (2, 3, 32, 48)
    assert targets[0]["masks"].shape == (2, 32, 48)
    assert torch.allclose(targets[0]["boxes"], whole["boxes"].as_subclass(Tensor) / 2)
    for box, mask in zip(targets[0]["boxes"], targets[0]["masks"], strict=True):
        ys, xs = mask.any(1).nonzero(), mask.any(0).nonzero()
        around = torch.stack([xs[0, 0], ys[0, 0], xs[-1, 0] + 1, ys[-1, 0] + 1])
        assert (box - around).abs().max() <= 0.75, "half a pixel of both sizes"
    assert type(targets[0]["boxes"]) is Tensor
    assert targets[0]["draw"] != targets[1]["draw"]


# -- average precision ------------------------------------------------------------------------------------------------


def detections(truth: Truth, frame: Tensor, rng: np.random.Generator, *, noise: float) -> dict[str, Tensor]:
    """What a detector might find of a truth, on the canvas: moved boxes, wrong labels, invented objects."""
    boxes, labels, masks = [], [], []
    height, width = truth.size
    scale = (frame[2:] - frame[:2]) / torch.tensor([width, height])
    for instance in truth.instances * (1 if noise == 0 else 2):
        x, y, w, h = instance.box
        x, y, w, h = np.array([x, y, w, h]) + rng.normal(0, noise, 4)
        box = torch.tensor([x, y, x + max(w, 1), y + max(h, 1)]).float() * scale.repeat(2) + frame[:2].repeat(2)
        boxes.append(box)
        labels.append(1 + (instance.label if rng.random() > 0.1 * noise else int(rng.integers(3))))
        masks.append(torch.from_numpy(rng.random((1, 28, 28)) > 0.1 * noise).float())
    scores = torch.from_numpy(np.sort(rng.random(len(boxes)))[::-1].copy()).float()
    return {
        "boxes": torch.stack(boxes) if boxes else torch.zeros(0, 4), "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": scores, "masks": torch.stack(masks) if masks else torch.zeros(0, 1, 28, 28),
    }  # fmt: skip


def scored(found: Data, source: Any, *, noise: float, masks: bool = True) -> AveragePrecision:
    scorer, rng = AveragePrecision(found.categories, masks=masks), np.random.default_rng(0)
    for number in range(len(source)):
        images, targets = source.collate([source[number]], None)
        frame = targets[0]["frame"][0]
        outputs = [detections(targets[0]["truth"], frame, rng, noise=noise)]
        scorer.update(outputs, Batch(images, targets, torch.tensor([number])))
    return scorer


def by_pycocotools(file: Path, results: list[dict[str, Any]], kind: str) -> list[float]:
    """The first six statistics, from the annotation file itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        rows = [{key: value for key, value in row.items() if key != ("bbox" if kind == "segm" else "segmentation")}
                for row in results]  # fmt: skip
        evaluation = COCOeval(truth, truth.loadRes(rows), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:6]]


@pytest.mark.parametrize("letterbox", [False, True])
def test_ap_is_that_of_pycocotools_on_the_file_itself(tmp_path: Path, letterbox: bool) -> None:
    """With crowds, gaps in the ids, a category without an object, and empty images."""
    tree = coco_tree(tmp_path, val=15)
    found = data(tree, letterbox=letterbox)
    scorer = scored(found, found.val, noise=1.5)
    assert {row["category_id"] for row in scorer.detections} <= {3, 7, 90}
    values = scorer.compute()
    file = tree / "annotations" / "instances_val2017.json"
    for kind, prefix in (("segm", "mask"), ("bbox", "box")):
        expected = by_pycocotools(file, json.loads(json.dumps(scorer.predictions())), kind)
        names = [f"{prefix}_{name}" for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")]
        assert 0 < expected[0] < 0.9, "neither perfect nor nothing"
        for name, value in zip(names, expected, strict=True):
            assert (name in values) == (value >= 0)
            assert value < 0 or values[name] == pytest.approx(100 * value, abs=1e-9)


def test_a_box_that_reaches_beyond_its_image_is_scored_as_pycocotools_does_and_said_to_be(tmp_path: Path) -> None:
    tree = coco_tree(tmp_path, val=6, change={"val": of_first(bbox=[-8, -6, 20, 18])})
    found = data(tree)
    (told,) = found.findings
    assert told.what == "box that reaches beyond its image: cut in training, scored as it is"
    scorer = scored(found, found.val, noise=0)
    expected = by_pycocotools(tree / "annotations" / "instances_val2017.json", scorer.predictions(), "bbox")
    assert expected[0] < 0.99, "what is found inside the image is less than the box"
    assert scorer.compute()["box_ap"] == pytest.approx(100 * expected[0], abs=1e-9)


def of_large_ids(document: dict[str, Any]) -> None:
    """Ids as of clocks and hashes, next to each other and beyond what a double or eight bytes hold."""
    ids = {row["id"]: (2**53, 10**18, 2**63)[n % 3] + n for n, row in enumerate(document["images"])}
    for row in document["images"]:
        row["id"] = ids[row["id"]]
    for row in document["annotations"]:
        row.update(image_id=ids[row["image_id"]], category_id=10**18 + row["category_id"])
    for row in document["categories"]:
        row["id"] += 10**18


def test_ids_may_be_as_large_as_json_has_them(tmp_path: Path, tree: Path) -> None:
    """faster_coco_eval reads them as doubles."""
    large = data(coco_tree(tmp_path, change={"train": of_large_ids, "val": of_large_ids}))
    scorer, small = scored(large, large.val, noise=1.5), data(tree)
    assert scorer.compute() == scored(small, small.val, noise=1.5).compute()
    assert {row["image_id"] for row in scorer.predictions()} <= {2**53, 10**18 + 1, 2**63 + 2, 2**53 + 3}
    assert {row["category_id"] for row in scorer.predictions()} <= {10**18 + 3, 10**18 + 7, 10**18 + 90}


@pytest.mark.parametrize("shrunk", [False, True])
def test_who_finds_everything_has_all_of_the_ap_at_any_size(tree: Path, shrunk: bool) -> None:
    found = data(tree, letterbox=True)
    source = Shrunk(found.val, Scale(SIZE, (32, 48))) if shrunk else found.val
    values = scored(found, source, noise=0).compute()
    assert values["box_ap"] == pytest.approx(100)
    assert values["mask_ap50"] == pytest.approx(100)
    assert set(scored(found, source, noise=0, masks=False).compute()) == {
        "box_ap",
        "box_ap50",
        "box_ap75",
        "box_ap_small",
    }


def test_nothing_found_is_zero_and_nothing_to_find_is_told(tree: Path) -> None:
    found = data(tree)
    images, targets = found.val.collate([found.val[0]], None)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0),
               "masks": torch.zeros(0, 1, 28, 28)}  # fmt: skip
    scorer = AveragePrecision(found.categories, masks=True)
    scorer.update([nothing], Batch(images, targets, torch.tensor([0])))
    assert scorer.compute()["mask_ap"] == 0
    empty = AveragePrecision(found.categories, masks=True)
    target = {"truth": Truth(1, (40, 60), ()), "frame": frame_of(stretched((40, 60), SIZE))}
    empty.update([nothing], Batch(images, [target], torch.tensor([0])))
    with pytest.raises(DataError, match="holds an object"):
        empty.compute()
