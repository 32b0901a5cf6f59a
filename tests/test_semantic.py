"""Semantic segmentation: reading masks, crops, sliding windows, losses, mIoU, Mask2Former, and all commands on it."""

from __future__ import annotations

import itertools
import json
import math
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from typer.testing import CliRunner

from dense_trees import ade_tree, cityscapes_tree, painted, save, squares
from sparsevit_cli.cli import app
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.config.semantic import CropSection
from sparsevit_cli.config.tasks import type_of
from sparsevit_cli.config.yaml_loader import Document
from sparsevit_cli.data.shrunk import Scale, Shrunk
from sparsevit_cli.data.source import Batch, Data
from sparsevit_cli.errors import CheckpointError, ConfigError, DataError, StoppedError
from sparsevit_cli.evaluation import evaluate
from sparsevit_cli.profiling import inputs as profiling_inputs
from sparsevit_cli.profiling.macs import flopcounter_macs
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.schedule import RandomSchedule
from sparsevit_cli.sparsity import SearchSpace
from sparsevit_cli.stopping import StopRequest
from sparsevit_cli.swin import model_depths, sparsify_
from sparsevit_cli.tasks.semantic import SemanticSegmentation
from sparsevit_cli.tasks.semantic.cityscapes import CITYSCAPES
from sparsevit_cli.tasks.semantic.labels import IGNORED, read_numbers
from sparsevit_cli.tasks.semantic.mask2former import Mask2FormerSegmenter
from sparsevit_cli.tasks.semantic.scorer import ConfusionScorer
from sparsevit_cli.tasks.semantic.segmenter import Segmenter, at_size, window_places
from sparsevit_cli.tasks.semantic.transforms import TransformSpec
from sparsevit_cli.tasks.task import BuildOptions, task_of
from sparsevit_cli.training import TrainingJob, plan_training
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.training import adapt
from test_training import StopAt, run

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "experiment": "tiny",
    "device": "cpu",
    "task": {"name": "semantic"},
    "model": {
        "img_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 2, "drop_path_rate": 0.0,
        "fpn": {"channels": 8},
    },
    "data": {"source": "digits", "eval_batch_size": 100, "digits": {"digit_min": 12, "digit_max": 16}},
    "train": {"epochs": 0.1, "batch_size": 32, "eval_every": 0.1, "save_every": 0.1, "ema_decay": 0.9},
    "adapt": {"epochs": 0.05, "batch_size": 32, "lr": 1e-4, "check_ratios": [0.5], "check_random": 1},
    "finetune": {"epochs": 0.05, "batch_size": 32, "lr": 1e-4},
    "search": {
        "budget_macs": "80%", "max_evaluations": 4, "samples": 16, "finalists": 1,
        "seconds": 0.01, "holdout": 2,
    },
    "profile": {"batch_sizes": [1], "seconds": 0.02, "rounds": 6, "max_spread": 100.0},
    "clock": {"wait": 0, "max_neighbour": 1000.0, "max_spread": 1000.0},
    "export": {"formats": [], "latency": False},
}  # fmt: skip
MASK2FORMER: dict[str, Any] = {
    "head": "mask2former", "embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4,
    "mask2former": {
        "queries": 12, "channels": 32, "heads": 4, "encoder_layers": 1, "encoder_feedforward": 32, "decoder_layers": 3,
        "feedforward": 32, "points": 64,
    },
}  # fmt: skip


def tiny_task(**sections: Any) -> SemanticSegmentation:
    """The task of TINY with fields of sections replaced; another source has no digits."""
    merged: dict[str, Any] = {
        name: {**value, **sections.get(name, {})} if isinstance(value, dict) else value for name, value in TINY.items()
    }
    if merged["data"]["source"] != "digits":
        del merged["data"]["digits"]
    task = task_of(type_of(Document(merged, {})).model_validate_json(json.dumps(merged)))
    assert isinstance(task, SemanticSegmentation)
    return task


def city_tree(root: Path) -> str:
    """Where a Cityscapes tree lies; its images are of 40 x 64 pixels."""
    return str(cityscapes_tree(root, size=(40, 64)).root)


def data_of(task: SemanticSegmentation) -> Data:
    return task.data(seed=0, categories=None)


def built(task: SemanticSegmentation) -> Any:
    return task.build(None, BuildOptions())


# -- masks --------------------------------------------------------------------------------------------------------


def test_cityscapes_ids_have_the_train_ids_of_the_benchmark() -> None:
    assert len(CITYSCAPES.names) == 19
    known = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    known |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    found = CITYSCAPES.classes(np.arange(34, dtype=np.uint8)[None], "mask")[0]
    assert found.tolist() == [known.get(number, IGNORED) for number in range(34)]


@pytest.mark.parametrize(("number", "dtype"), [(34, np.uint8), (255, np.uint8), (70000, np.int32), (-1, np.int32)])
def test_a_number_that_is_no_class_is_refused_and_counted(number: int, dtype: type) -> None:
    numbers = np.full((2, 3), 7, dtype=dtype)
    numbers[0, :2] = number
    with pytest.raises(DataError, match=rf"city: .*{number} \(2 pixels\).*train ids"):
        CITYSCAPES.classes(numbers, "city")


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I"])
def test_masks_of_every_kind_of_number_are_read(mode: str, tmp_path: Path) -> None:
    numbers = np.array([[0, 1], [1, 0]]) if mode == "1" else np.array([[0, 7], [200, 255]])
    if mode.startswith("I"):
        numbers = numbers + np.array([[0, 0], [0, 1000]])
    if mode == "P":
        image = Image.fromarray(numbers.astype(np.uint8), "L").convert("P")
        image.putpalette([255 - n // 3 for n in range(768)])  # colours say nothing
        image.putdata(numbers.flatten().tolist())
    elif mode == "1":
        image = Image.fromarray(numbers.astype(bool))
    else:
        image = Image.fromarray(numbers.astype({"L": np.uint8, "I;16": np.uint16, "I": np.int32}[mode]))
    file = tmp_path / ("mask.tif" if mode == "I" else "mask.png")  # PNG has no numbers of 32 bits
    image.save(file)
    assert read_numbers(file, "mask", 1.0).tolist() == numbers.tolist()


@pytest.mark.parametrize(("bits", "numbers"), [(2, [[0, 1, 2, 3], [3, 2, 1, 0]]), (4, [[0, 7, 9, 15], [15, 1, 2, 3]])])
def test_grey_masks_of_few_bits_hold_the_numbers_of_the_file(
    bits: int, numbers: list[list[int]], tmp_path: Path
) -> None:
    """Pillow multiplies them, so that white is 255. It writes no such PNG: the bytes are put together here."""
    rows = [sum(number << bits * (3 - at) for at, number in enumerate(row)).to_bytes(bits // 2) for row in numbers]
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 4, 2, bits, 0, 0, 0, 0), b"IEND": b""}
    chunks[b"IDAT"] = zlib.compress(b"".join(b"\0" + row for row in rows))
    written = b"\x89PNG\r\n\x1a\n"
    for name in (b"IHDR", b"IDAT", b"IEND"):
        body = name + chunks[name]
        written += struct.pack(">I", len(chunks[name])) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "mask.png").write_bytes(written)
    assert read_numbers(tmp_path / "mask.png", "mask", 1.0).tolist() == numbers


def test_masks_of_colours_of_damaged_bytes_or_too_large_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "colour.png", np.zeros((4, 4, 3), dtype=np.uint8))
    save(tmp_path / "large.png", np.zeros((100, 100), dtype=np.uint8))
    (tmp_path / "damaged.png").write_bytes((tmp_path / "large.png").read_bytes()[:40])
    for name, reason in (("colour", "mode RGB"), ("damaged", "not an image"), ("large", "more than 0.005 mega")):
        with pytest.raises(DataError, match=reason):
            read_numbers(tmp_path / f"{name}.png", name, 0.005)


def test_a_mask_may_be_larger_than_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "large.png", np.zeros((100, 100), dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_numbers(tmp_path / "large.png", "large", 0.01).shape == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 100


# -- trees --------------------------------------------------------------------------------------------------------


ADE: dict[str, Any] = {"source": "folders", "classes_file": "objectInfo150.txt", "reduce_zero_label": True}


def ade(root: Path, **fields: Any) -> SemanticSegmentation:
    return tiny_task(data={**ADE, "root": str(root), "classes_file": str(root / ADE["classes_file"]), **fields})


def test_an_ade_tree_has_its_first_class_at_number_1(tmp_path: Path) -> None:
    data = data_of(ade(ade_tree(tmp_path)))
    assert data.categories.names == ("wall", "sky", "tree")
    for number in range(len(data.val)):
        image, truth = data.val[number]
        stored = np.asarray(Image.open(tmp_path / "annotations" / "validation" / f"{data.val.sample_name(number)}.png"))
        assert image.shape == (3, 32, 32)
        assert truth.shape == stored.shape
        assert (truth.numpy() == np.where(stored == 0, IGNORED, stored - 1)).all()


def test_masks_are_found_by_their_suffix_and_ignored_numbers_are_the_settings(tmp_path: Path) -> None:
    for split in ("a", "b"):
        for number in range(3):
            mask = squares(number, (0, 1, 99))
            save(tmp_path / "rgb" / split / "deep" / f"{number}_rgb.png", painted(mask))
            save(tmp_path / "gt" / split / "deep" / f"{number}_mask.png", mask.astype(np.uint16))
    fields = {
        "source": "folders", "root": str(tmp_path), "images": "rgb", "masks": "gt", "image_suffix": "_rgb",
        "mask_suffix": "_mask", "train_split": "a", "val_split": "b", "classes": ["no", "yes"], "ignore": 99,
    }  # fmt: skip
    data = data_of(tiny_task(data=fields))
    assert [data.val.sample_name(n) for n in range(3)] == ["deep/0", "deep/1", "deep/2"]
    assert set(data.val[0][1].unique().tolist()) == {0, 1, IGNORED}


@pytest.mark.parametrize(
    ("image", "mask", "fields"),
    [
        ("{split}/rgb/x/{n}.png", "{split}/gt/x/{n}.png", {"images": "{split}/rgb", "masks": "{split}/gt"}),
        ("{split}/{n}.png", "{split}/{n}_mask.png", {"images": "{split}", "masks": "{split}", "mask_suffix": "_mask"}),
        ("all/{split}/{n}_rgb.png", "all/{split}/{n}.png", {"images": "all", "masks": "all", "image_suffix": "_rgb"}),
    ],
)  # fmt: skip
def test_splits_may_be_above_their_folders_and_images_beside_their_masks(
    image: str, mask: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    for split in ("train", "val"):
        for number in range(3):
            numbers = squares(number, (0, 1))
            save(tmp_path / image.format(split=split, n=number), painted(numbers))
            save(tmp_path / mask.format(split=split, n=number), numbers)
        (tmp_path / image.format(split=split, n="notes")).with_suffix(".txt").write_text("")
    of_split = {"train_split": "train", "val_split": "val", "classes": ["no", "yes"]}
    task = tiny_task(data={"source": "folders", "root": str(tmp_path), **of_split, **fields})
    data = data_of(task)
    assert (len(data.train) + len(data.search), len(data.val)) == (3, 3)
    stored = np.asarray(Image.open(tmp_path / mask.format(split="val", n=2)))
    assert (data.val[2][1].numpy() == stored).all()
    assert dict(data.describe())["ignored files"] == "2"


def one_folder(root: Path, image: str, mask: str, **fields: Any) -> dict[str, Any]:
    """Settings of a tree whose files of sample n are called `image` and `mask`; no two images are alike."""
    for place, split in enumerate(("train", "val")):
        for number in range(3):
            numbers = squares(number + 3 * place, (0, 1))
            save(root / split / image.format(number), painted(numbers))
            save(root / split / mask.format(number), numbers)
    return {"source": "folders", "root": str(root), "images": "{split}", "masks": "{split}", "train_split": "train",
            "val_split": "val", "classes": ["no", "yes"], **fields}  # fmt: skip


def test_in_one_folder_the_ending_tells_a_mask_from_its_image(tmp_path: Path) -> None:
    val = data_of(tiny_task(data=one_folder(tmp_path, "{}.jpg", "{}.png"))).val
    assert [val.sample_name(n) for n in range(3)] == ["0", "1", "2"]
    assert str(val.sample_file(0)).endswith(".jpg")
    assert (val[0][1].numpy() == np.asarray(Image.open(tmp_path / "val" / "0.png"))).all()


@pytest.mark.parametrize(
    ("image", "mask", "told"),
    [
        ("{}.tif", "{}.png", r"0: train/0.png and train/0.tif. Set data.image_suffix and data.mask_suffix, or move"),
        ("{}.png", "{}.png", "lie in one folder, train, and no ending tells them apart. Set data.mask_suffix, or move"),
        ("{}.jpg", "masks/{}.gif", r"3 images .* have no mask \(train/masks/\*\(.png\|.tif\|.tiff\|.bmp\)\)"),
    ],
)
def test_nobody_is_told_to_remove_a_mask_that_was_not_told_from_its_image(
    image: str, mask: str, told: str, tmp_path: Path
) -> None:
    fields = one_folder(tmp_path, image, mask, masks="{split}/masks" if "/" in mask else "{split}")
    with pytest.raises(DataError, match=told) as refused:
        data_of(tiny_task(data=fields))
    assert "emove" not in str(refused.value)


@pytest.mark.parametrize(
    ("image", "mask", "fields"),
    [("{}.png", "masks/{}.png", {"masks": "{split}/masks"}), ("rgb/{}.png", "{}.png", {"images": "{split}/rgb"})],
)
def test_masks_below_their_images_are_no_images(image: str, mask: str, fields: dict[str, Any], tmp_path: Path) -> None:
    data = data_of(tiny_task(data=one_folder(tmp_path, image, mask, **fields)))
    assert (len(data.train) + len(data.search), len(data.val)) == (3, 3)
    assert (data.val[1][1].numpy() == np.asarray(Image.open(tmp_path / "val" / mask.format(1)))).all()


def test_a_file_of_names_may_begin_with_the_mark_of_windows(tmp_path: Path) -> None:
    root = ade_tree(tmp_path)
    (root / "objectInfo150.txt").write_bytes(b"\xef\xbb\xbf" + (root / "objectInfo150.txt").read_bytes())
    assert data_of(ade(root)).categories.names == ("wall", "sky", "tree")


def test_masks_of_0_and_255_are_two_classes_where_numbers_say_so_and_are_refused_where_all_else_is_ignored(
    tmp_path: Path,
) -> None:
    """Elsewhere a model that paints everything as background would have an IoU of 100."""
    for split in ("training", "validation"):
        for number in range(4):
            mask = squares(number, (0, 255))
            save(tmp_path / "images" / split / f"{number}.png", painted(mask))
            save(tmp_path / "annotations" / split / f"{number}.png", mask)
    fields = {"source": "folders", "root": str(tmp_path), "classes": ["background", "object"], "search_fraction": 0.4}
    with pytest.raises(DataError, match=r"no class but background occurs.*classes are 0 to 1, ignored is 255.*numbers"):
        data_of(tiny_task(data=fields))
    with pytest.raises(DataError, match=r"data.ignore: 255, the number of the class object"):
        data_of(tiny_task(data=fields | {"numbers": [0, 255]}))
    with pytest.raises(DataError, match=r"data.numbers: 0, 255, 300 for 2 classes"):
        data_of(tiny_task(data=fields | {"numbers": [0, 255, 300], "ignore": None}))
    with pytest.raises(ValueError, match="each says which number"):
        tiny_task(data=fields | {"numbers": [0, 255], "reduce_zero_label": True})
    val = data_of(tiny_task(data=fields | {"numbers": [0, 255], "ignore": None})).val
    stored = np.asarray(Image.open(tmp_path / "annotations" / "validation" / "0.png"))
    assert (val[0][1].numpy() == stored // 255).all()


def test_wrong_masks_of_a_folder_are_told_with_their_file(tmp_path: Path) -> None:
    task, masks = ade(ade_tree(tmp_path)), tmp_path / "annotations" / "validation"
    first, second, third = sorted(masks.iterdir())
    save(first, squares(0, (0, 1), (40, 63)))
    save(second, squares(0, (4,), (48, 60)))
    third.write_bytes(b"")
    with pytest.raises(DataError, match=r"1 unreadable: ADE_valid_00000002 .its mask is an empty file"):
        data_of(task)
    save(third, squares(0, (0, 1), (56, 56)))
    val = data_of(task).val
    with pytest.raises(DataError, match=r"00000000.png: 40 x 63 pixels, its image 40 x 64"):
        val[0]
    with pytest.raises(DataError, match=r"00000001.png: .*4 \(2880 pixels\).*classes are 1 to 3, ignored is 0, 255"):
        val[1]
    third.unlink()
    with pytest.raises(DataError, match=r"1 images .* have no mask .*ADE_valid_00000002"):
        data_of(task)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"val_split": "training"}, "6 validation images are training images"),
        ({"images": "photos"}, "no folder .*photos/training"),
        ({"ignore": 2}, "the number of the class sky"),
        ({"classes_file": "nothing.txt"}, "cannot be read"),
    ],
)
def test_settings_of_folders_that_cannot_be(fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        data_of(ade(ade_tree(tmp_path), **fields))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "LA"), ("JPEG", "L")])
def test_headers_tell_all_masks_that_are_no_numbers(kind: str, mode: str, tmp_path: Path) -> None:
    val = data_of(ade(ade_tree(tmp_path))).val
    file = sorted((tmp_path / "annotations" / "validation").iterdir())[0]
    val.check_header(0)
    with Image.open(file) as image:
        image.convert(mode).save(file, kind)
    with pytest.raises(DataError, match=r"mode (RGBA?|LA), not one number|not an image \(PNG"):
        val.check_header(0)


def test_splits_of_which_one_holds_the_other_or_links_to_it_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(3):
            mask = squares(number, (0, 1))
            save(tmp_path / "rgb" / split / f"{number}.png", painted(mask))
            save(tmp_path / "gt" / split / f"{number}.png", mask)
    fields = {"source": "folders", "root": str(tmp_path), "images": "rgb", "masks": "gt", "classes": ["no", "yes"],
              "train_split": "train", "val_split": "val"}  # fmt: skip
    assert len(data_of(tiny_task(data=fields)).val) == 3
    with pytest.raises(DataError, match=r"data.val_split: 3 validation images are training images: 0"):
        data_of(tiny_task(data={**fields, "train_split": "."}))
    linked = tmp_path / "rgb" / "val" / "1.png"
    linked.unlink()
    linked.symlink_to(tmp_path / "rgb" / "train" / "2.png")
    with pytest.raises(DataError, match=r"1 validation images are training images: 1\."):
        data_of(tiny_task(data=fields))


def test_unreadable_training_images_are_counted_and_too_many_are_an_error(tmp_path: Path) -> None:
    ade_tree(tmp_path)
    (tmp_path / "images" / "training" / "ADE_train_00000000.jpg").write_bytes(b"")
    data = data_of(ade(tmp_path, max_bad_fraction=0.5))
    assert data.train.bad_images is not None
    assert len(data.train.bad_images) == 1
    with pytest.raises(DataError, match=r"unreadable training images: 1 of 5.*its image is an empty file"):
        data_of(ade(tmp_path))


# -- crops --------------------------------------------------------------------------------------------------------


def spec(**fields: Any) -> TransformSpec:
    standard: dict[str, Any] = {
        "size": (32, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3, "short_side": None, "crop": None, "is_sliding": False,
        "max_megapixels": 1.0,
        "augment": CropSection(),
    }  # fmt: skip
    return TransformSpec(**standard | fields)


@settings(max_examples=40, deadline=None)
@given(
    index=st.integers(0, 10_000),
    sides=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    scale=st.sampled_from([0.5, 1.0, 2.0]),
    short_side=st.sampled_from([None, 24]),
)
def test_a_crop_shows_image_and_mask_at_the_same_place(
    index: int, sides: tuple[int, int], scale: float, short_side: int | None
) -> None:
    mask = torch.from_numpy(squares(index, (0, 1, 2), sides))
    pixels = torch.from_numpy(painted(mask.numpy())).permute(2, 0, 1)
    crop = spec(augment=CropSection(scale_min=scale, scale_max=scale), short_side=short_side)
    state = torch.get_rng_state()
    image, truth = crop.drawn(tv_tensors.Image(pixels), tv_tensors.Mask(mask), 3, 1, index)
    same = crop.drawn(tv_tensors.Image(pixels), tv_tensors.Mask(mask), 3, 1, index)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(image, same[0])
    assert torch.equal(truth, same[1])
    assert image.shape == (3, 32, 48)
    assert truth.shape == (32, 48)
    assert (image[:, truth == IGNORED] == 0).all(), "what lies beside is of mean colour"
    if scale == 1.0 and short_side is None:
        shown = ((image * 0.5 + 0.5) * 255).round().permute(1, 2, 0)
        seen = truth != IGNORED
        assert (shown[seen] == torch.from_numpy(painted(truth.numpy()))[seen]).all()
        assert int(seen.sum()) == min(32, sides[0]) * min(48, sides[1])


def test_masks_lie_where_the_image_is_in_crops_that_are_scaled_down() -> None:
    crop = spec(size=(96, 96), augment=CropSection(scale_min=0.7, scale_max=0.7, hflip=0))
    shifts = []
    for place in range(12):
        mask = torch.zeros(96, 96, dtype=torch.uint8)
        mask[20 + place : 41 + place, 30 + place : 60 + place] = 1
        pixels = (mask * 255).expand(3, -1, -1)
        image, truth = crop.drawn(tv_tensors.Image(pixels), tv_tensors.Mask(mask), 0, 0, place)
        bright = (image[0] > 0).as_subclass(Tensor).nonzero().float().mean(0)
        shifts.append(bright - (truth == 1).as_subclass(Tensor).nonzero().float().mean(0))
    assert torch.stack(shifts).mean(0).abs().max() < 0.15, "in pixels"


def test_crops_move_with_seed_epoch_and_sample(tmp_path: Path) -> None:
    task = tiny_task(data={"source": "cityscapes", "root": city_tree(tmp_path), "crop": [16, 32]})
    source = data_of(task).train
    assert source.image_size == (16, 32), "crops are no larger than data.crop"
    assert source.resized(8).image_size == (8, 8)
    first = source[0]
    source.set_epoch(1)
    moved = source.resized(32)[0]
    assert not torch.equal(first[0], moved[0])
    assert torch.equal(moved[0], source[0][0])
    assert isinstance(first[1], tv_tensors.Mask)
    assert data_of(task).val.image_size == (32, 32)


def test_colours_change_and_the_mask_does_not() -> None:
    mask = torch.from_numpy(squares(0, (0, 1, 2), (32, 48)))
    pixels = torch.from_numpy(painted(mask.numpy())).permute(2, 0, 1)
    one = CropSection(scale_min=1.0, scale_max=1.0, hflip=0.0)
    plain, coloured = (
        spec(augment=one.model_copy(update={"color_jitter": strength})).drawn(
            tv_tensors.Image(pixels), tv_tensors.Mask(mask), 0, 0, 0
        )
        for strength in (0.0, 0.5)
    )
    assert not torch.equal(plain[0], coloured[0])
    assert torch.equal(plain[1], coloured[1])


def test_a_strip_is_refused_before_it_is_enlarged() -> None:
    strip = tv_tensors.Image(torch.zeros(3, 1, 5000, dtype=torch.uint8))
    sliding = spec(short_side=480, is_sliding=True, augment=None)
    assert sliding.evaluated(strip[:, :, :2], "short").shape == (3, 480, 960)
    with pytest.raises(DataError, match=r"strip: 480 x 2400000 pixels at data.short_side 480"):
        sliding.evaluated(strip, "strip")


# -- windows ------------------------------------------------------------------------------------------------------


@given(
    image=st.tuples(st.integers(32, 200), st.integers(32, 200)),
    window=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    overlap=st.floats(0, 0.9),
)
def test_windows_cover_the_image_with_the_overlap_that_was_asked_for(
    image: tuple[int, int], window: tuple[int, int], overlap: float
) -> None:
    places = window_places(image, window, overlap)
    for axis in (0, 1):
        starts = sorted({place[axis] for place in places})
        assert starts[0] == 0
        assert starts[-1] + window[axis] == image[axis]
        step = max(1, int(window[axis] * (1 - overlap)))
        assert all(b - a <= step for a, b in itertools.pairwise(starts))
    assert len(set(places)) == len(places)


class Pointwise(Segmenter):
    """A model whose score of a pixel is that pixel: what windows show does not matter."""

    def __init__(self) -> None:
        super().__init__(1 / 3)
        self.inner = tiny_task(model={"img_size": [16, 24]})
        self.net = built(self.inner)

    @property
    def swin(self) -> Any:
        return self.net.swin

    def scores(self, images: Tensor) -> Tensor:
        assert images.shape[2:] == (16, 24)
        return images


@pytest.mark.parametrize("size", [(16, 24), (40, 100), (7, 90), (5, 5)])
def test_windows_give_back_what_the_whole_would(size: tuple[int, int]) -> None:
    image = torch.randn(3, *size)
    (found,) = Pointwise()([image])
    assert torch.allclose(found, image, atol=1e-6)


def test_a_sliding_evaluation_scores_images_of_any_size(tmp_path: Path) -> None:
    task = ade(ade_tree(tmp_path), evaluation="sliding")
    data, model = data_of(task), sparsify_(built(task))
    sizes = [tuple(data.val[n][0].shape[1:]) for n in range(3)]
    assert sizes == [tuple(data.val[n][1].shape) for n in range(3)]
    assert len(set(sizes)) == 3
    score = evaluate(task, model, data.val, batch_size=2, device=CPU)
    alone = [evaluate(task, model, data.val, batch_size=1, device=CPU, subset=[n]).values["accuracy"] for n in range(3)]
    labelled = [int((data.val[n][1] != IGNORED).sum()) for n in range(3)]
    mean = sum(a * b for a, b in zip(alone, labelled, strict=True)) / sum(labelled)
    assert score.values["accuracy"] == pytest.approx(mean)
    small = Shrunk(data.val, Scale((32, 32), (16, 16)))
    assert [tuple(small[n][0].shape[1:]) for n in range(3)] == [(h // 2, w // 2) for h, w in sizes]
    for source, scale in ((data.val, None), (small, Scale((32, 32), (16, 16)))):
        places = [window_places(tuple(source[n][0].shape[1:]), (16, 24), 1 / 3) for n in range(3)]
        assert task.per_image((16, 24), scale) == sum(map(len, places)) / 3 > 1
    assert task.about()["per"] == "window"
    assert ade(tmp_path).per_image((16, 24)) == 1
    with pytest.raises(DataError, match="classes_file"):
        ade(tmp_path / "nowhere", evaluation="sliding").per_image((16, 24))
    with pytest.raises(ValueError, match="sliding windows are trained for by crops of"):
        ade(tmp_path, evaluation="sliding", crop=16)


# -- scores -------------------------------------------------------------------------------------------------------


def scored(scores: Tensor, truth: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    scorer = ConfusionScorer(names, CPU)
    scorer.update(scores, Batch(None, truth, torch.arange(len(truth))))
    return dict(scorer.compute())


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(1, 6), seen=st.integers(1, 6))
def test_the_mean_iou_is_that_of_its_definition(seed: int, classes: int, seen: int) -> None:
    drawn = np.random.default_rng(seed)
    truth = drawn.integers(0, min(seen, classes), (3, 5, 7))
    truth[drawn.random(truth.shape) < 0.3] = IGNORED
    truth[0, 0, 0] = 0
    found = drawn.integers(0, classes, truth.shape)
    scores = torch.nn.functional.one_hot(torch.from_numpy(found), classes).permute(0, 3, 1, 2).float()
    result = scored(scores, torch.from_numpy(truth).byte(), tuple("abcdef"[:classes]))
    labelled, each = truth != IGNORED, {}
    for label in range(classes):
        both = ((truth == label) & (found == label)).sum()
        either = (((truth == label) | (found == label)) & labelled).sum()
        if either:
            each["abcdef"[label]] = 100 * both / either
    assert result["miou"] == pytest.approx(np.mean(list(each.values())))
    assert result["accuracy"] == pytest.approx(100 * (found == truth)[labelled].mean())
    told = {key.removeprefix("iou_"): value for key, value in result.items() if key.startswith("iou_")}
    assert told == pytest.approx({name: each[name] for name in each if (truth == "abcdef".index(name)).any()})


def test_scores_are_judged_at_the_size_of_the_truth() -> None:
    truth = torch.zeros(1, 8, 8, dtype=torch.uint8)
    truth[:, :, 4:] = 1
    scores = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # (1, 2, 1, 2)
    assert scored(scores, truth, ("left", "right"))["miou"] == 100


def test_nothing_to_score_and_scores_that_are_no_numbers_are_told() -> None:
    with pytest.raises(DataError, match="no pixel of these images has a class"):
        scored(torch.zeros(1, 2, 4, 4), torch.full((1, 4, 4), IGNORED, dtype=torch.uint8), ("a", "b"))
    broken = torch.full((1, 2, 4, 4), math.nan)
    assert math.isnan(scored(broken, torch.zeros(1, 4, 4, dtype=torch.uint8), ("a", "b"))["miou"])


def test_a_smaller_model_learns_from_small_masks_and_is_scored_at_full_size() -> None:
    task = tiny_task()
    data, scale = data_of(task), Scale((32, 32), (16, 16), 8)
    train, val = Shrunk(data.train, scale), Shrunk(data.val, scale)
    assert [tuple(part.shape) for part in train[0]] == [(3, 16, 16), (16, 16)]
    assert set(train[0][1].unique().tolist()) <= set(data.train[0][1].unique().tolist())
    assert [tuple(part.shape) for part in val[0]] == [(3, 16, 16), (32, 32)]
    model = built(task).eval()
    assert evaluate(task, model, val, batch_size=64, device=CPU, subset=range(64)).count == 64


class OnMac(Tensor):
    """On a device without float64, as a Mac's GPU is."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func.__name__ == "cpu":
            return found.as_subclass(Tensor)
        if isinstance(found, cls) and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found


def test_scores_and_weights_need_no_float64_on_the_device() -> None:
    scorer = ConfusionScorer(("left", "right"), CPU)
    truth = torch.tensor([[[0, 1], [1, IGNORED]]], dtype=torch.uint8)
    scorer.update(torch.zeros(1, 2, 2, 2), Batch(None, truth, torch.arange(1)))
    scorer.pixels = scorer.pixels.as_subclass(OnMac)
    assert scorer.compute()["accuracy"] == pytest.approx(100 / 3)
    task = tiny_task(task={"background_weight": 0.25})
    batch = Batch(None, truth.as_subclass(OnMac), torch.arange(1))
    assert task.weight(batch) == tiny_task(task={"background_weight": 0.25}).weight(Batch(None, truth, batch.indices))
    assert task.weight(batch) == 2.25


# -- losses -------------------------------------------------------------------------------------------------------


def batch_of(count: int, size: int, classes: int, seed: int = 0) -> Batch:
    """Random images, and masks of which the second is ignored everywhere, and a third of the others' pixels."""
    drawn = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (count, size // 8, size // 8), generator=drawn).repeat_interleave(8, 1)
    truth = truth.repeat_interleave(8, 2).byte()
    truth[:, : size // 3] = IGNORED
    truth[1] = IGNORED
    return Batch(torch.randn(count, 3, size, size, generator=drawn), truth, torch.arange(count))


def gradients(task: SemanticSegmentation, model: nn.Module, batch: Batch, size: int) -> dict[str, Tensor]:
    """Those of a step in parts of `size` samples, as the training loop adds them up."""
    model.zero_grad()
    torch.manual_seed(5)
    for part in batch.parts(size):
        if share := task.weight(part) / task.weight(batch):
            (sum(task.loss(model, part, task.config.train, None).values()) * share).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("head", ["fpn", "weighted fpn", "mask2former"])
def test_micro_batches_do_not_change_the_training(head: str) -> None:
    sections: dict[str, Any] = {"task": {"background_weight": 0.25}} if head == "weighted fpn" else {}
    task = tiny_task(**sections, **({"model": {**MASK2FORMER, "img_size": 64}} if head == "mask2former" else {}))
    model = built(task).train()
    batch = batch_of(4, 64, 11)
    whole, parts = (gradients(task, model, batch, size) for size in (4, 1))
    assert whole.keys() == parts.keys()
    assert any(gradient.abs().max() > 0 for gradient in whole.values())
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("head", ["fpn", "mask2former"])
def test_ignored_pixels_teach_nothing(head: str) -> None:
    task = tiny_task(model={**MASK2FORMER, "img_size": 64} if head == "mask2former" else {})
    model = built(task).train()
    nothing = batch_of(2, 64, 11)
    nothing.targets.fill_(IGNORED)
    loss = sum(task.loss(model, nothing, task.config.train, None).values())
    assert task.weight(nothing) == 0
    assert float(loss) == 0
    loss.backward()  # a step of such images alone must not fail


def test_masks_count_for_nothing_far_inside_of_what_is_ignored() -> None:
    task = tiny_task(model={**MASK2FORMER, "img_size": 64})
    model = built(task)
    assert isinstance(model, Mask2FormerSegmenter)
    truth = torch.zeros(64, 64, dtype=torch.uint8)
    truth[32:] = IGNORED
    classes, masks = (torch.randn(12, 12), torch.randn(12, 16, 16, requires_grad=True))
    model._loss([(classes, masks)], truth)["mask"].backward()
    assert masks.grad is not None
    rows = masks.grad.abs().amax((0, 2))
    assert (rows[:8] > 0).any()
    assert (rows[9:] == 0).all()


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"model": {"img_size": 32}}, "model.img_size"),
        (
            {"train": {"curriculum": [{"img_size": 32, "epochs": 1}, {"img_size": 64, "epochs": 1}]}},
            "train.curriculum.0",
        ),
    ],
)
def test_a_map_of_one_number_per_group_is_refused_before_any_training(sections: dict[str, Any], what: str) -> None:
    """torch's group norm raised a bare ValueError at the first image that came alone."""
    model = {**MASK2FORMER, "img_size": 64, **sections.get("model", {})}
    others = {name: fields for name, fields in sections.items() if name != "model"}
    with pytest.raises(ConfigError, match=rf"{what}.*32x32 pixels, whose coarsest map is 1x1.*channels, now 32, to 64"):
        built(tiny_task(model=model, **others))
    taken = built(tiny_task(model={**MASK2FORMER, "img_size": 64}))
    assert taken.eval()(torch.randn(1, 3, 64, 64)).shape[2:] == (64, 64)
    assert not taken.takes((32, 32))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        taken(torch.randn(1, 3, 32, 32))
    wider = tiny_task(model={**model, "mask2former": {**MASK2FORMER["mask2former"], "channels": 64}}, **others)
    assert built(wider).eval()(torch.randn(1, 3, 32, 32)).shape[2:] == (32, 32)
    with pytest.raises(ConfigError, match="image size: 32x32"):
        task_of(tiny_task(model={**MASK2FORMER, "img_size": 64}).config).build(None, BuildOptions(img_size=(32, 32)))


def test_weights_of_classes_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"task.class_weights: 2 weights for 11 classes"):
        built(tiny_task(task={"class_weights": [1.0, 2.0]}))
    with pytest.raises(ConfigError, match="Mask2Former's loss has none"):
        built(tiny_task(task={"background_weight": 0.5}, model={**MASK2FORMER, "img_size": 64}))
    with pytest.raises(ValueError, match="only one can give the weights"):
        tiny_task(task={"background_weight": 0.5, "class_weights": [1.0] * 11})


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"img_size": 36}}, "model.img_size: 36x36 pixels; the stages need multiples of 8"),
        (
            {"train": {"curriculum": [{"img_size": 20, "epochs": 1}, {"img_size": 32, "epochs": 1}]}},
            r"curriculum.0.img_size",
        ),
    ],
)
def test_sizes_that_the_stages_cannot_halve_are_refused_at_once(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        built(tiny_task(**sections))


# -- Mask2Former --------------------------------------------------------------------------------------------------


def blocks(size: int) -> Tensor:
    """Two images (2, 3, size, size) of 6 x 6 blocks."""
    drawn = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2
    return torch.nn.functional.interpolate(drawn, (size, size))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former-Swin with random weights, as transformers saves it: such that no class wins everywhere."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(3)
    swin = SwinConfig(
        embed_dim=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=4, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1, decoder_layers=3,
        num_attention_heads=4, encoder_feedforward_dim=32, dim_feedforward=32, num_queries=12, num_labels=11,
        train_num_points=64,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
        model.class_predictor.weight.mul_(40)
        model.class_predictor.bias.sub_(model(blocks(384)).class_queries_logits.mean((0, 1)))
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    return folder


def from_saved(saved: Path, **sections: Any) -> SemanticSegmentation:
    model = {**MASK2FORMER, "img_size": 384, "checkpoint": str(saved), **sections.pop("model", {})}
    return tiny_task(model=model, **sections)


def test_a_model_that_transformers_saved_gives_its_scores(saved: Path) -> None:
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(saved).eval()
    task = from_saved(saved)
    model, images = built(task).eval(), blocks(384)
    assert task.checkpoint_is_whole
    with torch.inference_mode():
        outputs, found = theirs(images), model(images)
        maps = Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs, [(300, 500), (384, 384)])
        (classes, masks), *_ = model.queries(images)
    assert torch.allclose(masks, outputs.masks_queries_logits, rtol=1e-4, atol=1e-4)
    assert torch.allclose(classes, outputs.class_queries_logits, rtol=1e-4, atol=1e-4)
    assert len(torch.cat([each.flatten() for each in maps]).unique()) > 3
    targets, ties = [], 0
    for scores, truth in zip(found, maps, strict=True):
        first, second = at_size(scores, (truth.shape[0], truth.shape[1])).topk(2, dim=0).values
        near = first - second < 1e-4 * first  # rounding decides which class is first
        ties += int(near.sum())
        targets.append(truth.where(~near, IGNORED).byte())
    assert ties < 300, "nearly all of the 297,456 pixels are compared"
    result = ConfusionScorer(tuple("abcdefghijk"), CPU)
    result.update(found, Batch(images, targets, torch.arange(2)))
    assert result.compute()["accuracy"] == 100, "ours, scored against what transformers says"


def test_a_model_of_transformers_needs_its_partition_where_windows_do_not_divide(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import Mask2FormerForUniversalSegmentation

    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(saved).eval()
    images = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():  # pixel features: queries attend where a mask is above a half, which rounding may flip
        wanted = theirs.model.pixel_level_module(images).decoder_last_hidden_state
        for partition, warned in (("pad_first", False), ("roll_first", True)):
            task = from_saved(saved, model={"img_size": 160, "partition": partition})
            model = sparsify_(built(task).eval(), partition=partition)
            found = model.model.pixel_level_module(images).decoder_last_hidden_state
            assert (float((found - wanted).norm() / wanted.norm()) > 1e-3) == warned
            assert ("Set model.partition: pad_first" in caplog.text) == warned


def test_commands_take_the_folder_that_transformers_saved(saved: Path, tmp_path: Path) -> None:
    """`adapt` starts from it without a `pretrain`, and `evaluate --weights` scores it."""
    tree = ade_tree(tmp_path / "tree", {"training": 6, "validation": 1})
    (tree / "objectInfo150.txt").write_text("".join(f"class {number}\n" for number in range(11)))
    config = {
        **TINY,
        "model": {**MASK2FORMER, "img_size": 64, "partition": "pad_first", "checkpoint": str(saved)},
        "data": {**ADE, "root": str(tree), "classes_file": str(tree / ADE["classes_file"])},
        "adapt": {**TINY["adapt"], "batch_size": 2},
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    stop = StopRequest()

    class Stopping(SilentReporter):
        """Sends a signal when the folder was opened."""

        def say(self, message: str) -> None:
            if message.startswith("adapt: "):
                stop.signal_number = 15

    with pytest.raises(StoppedError, match="step 1 of 1 is saved"):
        adapt(Session(load_config(tmp_path / "tiny.yaml", [f"output={tmp_path}"]), Stopping(), stop))
    words = ["evaluate", "--weights", str(saved), "--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path)]
    done = CliRunner().invoke(app, words, prog_name="sparsevit")
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, [*words, "--set", "model.mask2former.heads=8"], prog_name="sparsevit")
    assert done.exit_code == 4
    assert "num_attention_heads 4, here 8" in done.output


def test_the_loss_of_one_image_is_that_of_transformers(saved: Path) -> None:
    from transformers import Mask2FormerForUniversalSegmentation

    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(saved).eval()
    task = from_saved(saved, model={"img_size": 128})
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    truth = torch.from_numpy(squares(0, (1, 4, 7), (128, 128)))[None]
    present = truth.unique().long()
    torch.manual_seed(3)
    wanted = theirs(images, mask_labels=[(truth[0] == present[:, None, None]).float()], class_labels=[present]).loss
    torch.manual_seed(3)
    losses = built(task).eval().losses(images, truth)
    assert losses.keys() == {"cross_entropy", "mask", "dice"}
    assert float(sum(losses.values())) == pytest.approx(float(wanted), rel=1e-4)


def test_settings_that_shapes_do_not_tell_are_compared(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: .*num_attention_heads 4, here 8"):
        built(from_saved(saved, model={"mask2former": {**MASK2FORMER["mask2former"], "heads": 8}}))
    built(from_saved(saved, model={"mask2former": {**MASK2FORMER["mask2former"], "points": 9}}))  # of the loss alone


def test_another_number_of_classes_needs_a_new_head(saved: Path, tmp_path: Path) -> None:
    data = {"source": "cityscapes", "root": str(tmp_path)}
    with pytest.raises(CheckpointError, match="class_predictor"):
        built(from_saved(saved, data=data))
    model = built(from_saved(saved, data=data, model={"reset_head": True}))
    assert model.class_predictor.out_features == 20
    same = built(from_saved(saved))
    key = "transformer_module.queries_features.weight"
    assert torch.equal(model.model.state_dict()[key], same.model.state_dict()[key])


def test_mask2former_is_measured_in_bfloat16() -> None:
    """Search and profile of the shipped configuration ask for it."""
    task = tiny_task(model={**MASK2FORMER, "img_size": 64})
    model = sparsify_(built(task).eval())
    workload = Session(task.config, SilentReporter()).workload(model, precision="bf16")
    with torch.inference_mode():
        found, wanted = workload.model(workload.inputs), model(workload.inputs.float())
    assert found.dtype == torch.bfloat16
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_what_is_not_installed_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"model.head: transformers is needed.*sparsevit-cli\[segment\]"):
        built(tiny_task(model={**MASK2FORMER, "img_size": 64}))


def test_a_mask2former_that_was_stopped_trains_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, as the shipped configuration has it, also on a CPU that emulates it."""
    monkeypatch.setattr(profiling_inputs, "computes_bf16", lambda: True)
    root = city_tree(tmp_path / "tree")
    fields = {"batch_size": 2, "epochs": 2, "eval_every": 1, "save_every": 1, "ema_decay": None, "precision": "bf16"}

    def job(folder: str) -> TrainingJob:
        task = tiny_task(
            model={**MASK2FORMER, "img_size": 64, "drop_path_rate": 0.1},
            data={"source": "cityscapes", "root": root}, train=fields,
        )  # fmt: skip
        data, section = data_of(task), task.config.train
        model = sparsify_(built(task))

        def validate(model: nn.Module, img_size: Any, before_batch: Any) -> Any:
            return evaluate(task, model, data.val.resized(img_size), batch_size=2, device=CPU)

        return TrainingJob(
            kind="train", task=task, model=model, section=section,
            schedule=RandomSchedule(SearchSpace(model_depths(model)), 0),
            plan=plan_training(section, len(data.train), (64, 64)), source=data.train, validate=validate,
            checkpoints=tmp_path / folder, device=CPU, seed=0, identity={"data": data.fingerprint},
        )  # fmt: skip

    straight, stop = job("straight"), StopAt(job("stopped"), 1)
    run(straight)
    with pytest.raises(StoppedError):
        run(stop.job, stop)
    torch.manual_seed(99)  # points of the loss are drawn from the global generator: its state must not matter
    again = job("stopped")
    assert run(again).resumed_from == 2
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


# -- parts and pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fpn", "mask2former"])
def test_parts_are_apart_and_features_are_what_stands_on_the_swin(head: str) -> None:
    task = tiny_task(model={**MASK2FORMER, "img_size": 64} if head == "mask2former" else {})
    model = built(task).eval()
    parts = [set(map(id, module.parameters())) for modules in task.parts(model).values() for module in modules]
    assert sum(map(len, parts)) == len(set().union(*parts))
    left = {name for name, p in model.named_parameters() if id(p) not in set().union(*parts)}
    assert not left
    size = task.image_size[0]
    features = task.features(model)(torch.randn(1, 3, size, size))
    first = features[0] if isinstance(features, tuple) else features
    assert first.shape[2:] == (size // 4, size // 4)
    assert task.backbone(model) is model.swin
    counted = flopcounter_macs(Workload(model, torch.randn(1, 3, size, size), (size, size), 1), task.parts(model))
    assert counted.parts["rest"] == 0
    if head == "mask2former":  # every class of every query at every pixel
        queries, classes = MASK2FORMER["mask2former"]["queries"], len(task._names)
        assert counted.parts["post-processing"] == queries * classes * size**2
    (classes_of_pixels,) = task.finish(torch.eye(3)[None, :, :, None].repeat(1, 1, 1, 3), (6, 6))
    assert classes_of_pixels.tolist() == [[row // 2] * 6 for row in range(6)]


def unenlarged(picture: Image.Image, mask: Tensor) -> np.ndarray:
    """The pixels (H, W, 3) of a picture without its line of text."""
    times = picture.width // mask.shape[1]
    height, width = (side * times for side in mask.shape)
    assert picture.width == width
    assert picture.height > height
    return np.asarray(picture).astype(int)[:height:times, :width:times]


def test_pictures_show_the_classes_and_leave_the_rest(tmp_path: Path) -> None:
    digits = tiny_task()
    source = data_of(digits).val
    picture, mask = unenlarged(digits.picture(source, 0), source[0][1]), source[0][1].numpy()
    grey = np.ptp(picture, axis=2) == 0
    assert grey[mask == 0].all()
    assert not grey[mask != 0].any()
    city = tiny_task(data={"source": "cityscapes", "root": city_tree(tmp_path), "evaluation": "sliding"})
    val = data_of(city).val
    stored = np.asarray(Image.open(tmp_path / "leftImg8bit" / "val" / f"{val.sample_name(0)}_leftImg8bit.png"))
    shown, truth = unenlarged(city.picture(val, 0), val[0][1]), val[0][1].numpy()
    assert (shown[truth == IGNORED] == stored[truth == IGNORED]).all()
    assert (shown[truth != IGNORED] != stored[truth != IGNORED]).any()


def test_examples_are_scenes_of_the_size_that_is_asked_for() -> None:
    task = tiny_task()
    assert torch.equal(task.example((32, 32), 2)[0], data_of(task).val[0][0])
    assert task.example((32, 64), 2).shape == (2, 3, 32, 64)


# -- commands -----------------------------------------------------------------------------------------------------


def test_every_command_runs_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"source": "cityscapes", "root": city_tree(tmp_path / "tree"), "eval_batch_size": 2, "evaluation": "sliding"}
    loops = {name: {**TINY[name], "epochs": 1, "batch_size": 2} for name in ("train", "adapt", "finetune")}
    (tmp_path / "tiny.yaml").write_text(json.dumps({**TINY, **loops, "data": data}))
    done = CliRunner().invoke(app, ["run", "--config", "tiny.yaml"], prog_name="sparsevit")
    assert done.exit_code == 0, done.output
    runs = tmp_path / "runs" / "tiny"
    rows = json.loads((runs / "run" / "metrics.json").read_text())["rows"]
    assert {"dense (timm)", "winner, finetuned"} <= {row["label"] for row in rows}
    assert all(0 <= row["score"] <= 100 for row in rows)
    assert {row["per_image"] for row in rows if row["image_size"] == [32, 32]} == {6.0}, "40 x 64 pixels"
    whole = f"a validation image takes 6.0 windows of 32x32 on average: dense {6 * rows[0]['gmacs']:.3f} GMACs"
    assert whole in done.output
    profiled = json.loads((runs / "profile" / "profile.json").read_text())
    assert (profiled["per"], profiled["rows"][0]["per_image"]) == ("window", 6.0)
    page = (runs / "profile" / "profile.html").read_text()
    assert whole in page
    assert "windows/s" in page
    tuned = json.loads((runs / "finetune" / "metrics.json").read_text())
    assert {"miou", "val_accuracy", "val_iou_road"} <= tuned["history"][-1].keys()
    assert tuned["categories"]["names"] == list(CITYSCAPES.names)
    evaluated = json.loads((runs / "evaluate" / "metrics.json").read_text())
    assert {"miou", "accuracy", "iou_road"} <= evaluated["scores"].keys()


def test_the_shipped_experiment_learns_from_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first step, on fewer images: the configuration, the data and the model fit each other."""
    config = load_config(Path(__file__).parents[1] / "configs" / "digits_semantic.yaml")
    task = task_of(config)
    data = task.data(seed=0, categories=None)
    model = sparsify_(task.build(data.categories, BuildOptions()))
    source = data.train.resized(config.train.curriculum[0].img_size)
    inputs, targets = source.collate([source[n] for n in range(4)], 0)
    batch = Batch(inputs, targets, torch.arange(4))
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(6):
        loss = task.loss(model, batch, config.train, None)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
