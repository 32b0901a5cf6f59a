"""check-data: counts, findings, what is refused, duplicates between splits, and the sheet of samples."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from sparsevit_cli.cli import app
from sparsevit_cli.config import tasks as kinds
from sparsevit_cli.data.loader import checked_batches
from sparsevit_cli.data.pictures import SMALLEST_SIDE, as_picture, captioned, contact_sheet
from sparsevit_cli.data.shrunk import Scale, Shrunk
from sparsevit_cli.data.source import Source
from sparsevit_cli.errors import DataError, StoppedError
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.sizes import ImageSize
from sparsevit_cli.stopping import StopRequest
from sparsevit_cli.tasks.task import task_of
from sparsevit_cli.workflows.check_data import check_data, duplicates
from sparsevit_cli.workflows.session import Session
from tiny import tiny_config, write_tiny

BLOBS = Path(__file__).parents[1] / "examples" / "blob_counting.py"
CLASSES = ("cat", "dog", "owl")


def typed(folder: Path, *words: str, data: dict[str, Any] | None = None, code: int = 0) -> Result:
    config = write_tiny(folder, **({} if data is None else {"data": data}))
    done = CliRunner().invoke(
        app, ["check-data", "--config", str(config), "--output", str(folder / "runs"), *words], prog_name="sparsevit"
    )
    assert done.exit_code == code, done.output
    return done


def metrics(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "runs" / "tiny" / "check-data" / "metrics.json").read_text())
    return loaded


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """train/<class>/<n>.png and val/<class>/<n>.png, noise, no two alike."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in CLASSES:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


def folder_data(images: Path, **settings: Any) -> dict[str, Any]:
    return {"source": "folder", "root": str(images), **settings}


def test_the_digits_are_counted_and_drawn(tmp_path: Path) -> None:
    document = json.loads(typed(tmp_path, "--json", "--samples", "60").stdout)
    assert document["usable"]
    assert (document["problems"], document["findings"], document["counted"]) == ([], [], "images")
    sizes = {name: (split["samples"], split["tried"]) for name, split in document["splits"].items()}
    assert sizes == {"train": (1197, 60), "search": (250, 60), "val": (350, 60)}
    assert all(sum(split["categories"].values()) == 60 for split in document["splits"].values())
    assert list(document["splits"]["val"]["categories"]) == [str(digit) for digit in range(10)]
    written = metrics(tmp_path)
    assert {name: written[name] for name in document} == document
    assert len(document["pictures"]) == 16
    with Image.open(tmp_path / "runs" / "tiny" / "check-data" / "samples.png") as sheet:
        assert min(sheet.size) > 4 * 192


def test_a_folder_is_checked_again_after_it_was_changed(tmp_path: Path, images: Path) -> None:
    """The earlier result is kept, though settings differ; `--samples` reads some of each split."""
    typed(tmp_path, data=folder_data(images))
    assert metrics(tmp_path)["splits"]["train"]["samples"] == 33
    done = typed(tmp_path, "--samples", "5", data=folder_data(images, search_fraction=0.3))
    assert "the earlier result is kept" in done.stderr
    assert "Nothing wrong was found in the samples that were tried." in done.stdout
    splits = metrics(tmp_path)["splits"]
    assert [(split["samples"], split["tried"]) for split in splits.values()] == [(24, 5), (12, 5), (12, 5)]
    assert (tmp_path / "runs" / "tiny" / "check-data" / "earlier-001" / "samples.png").is_file()


def test_what_training_can_live_with_is_told_and_ends_with_0(tmp_path: Path, images: Path) -> None:
    shutil.copy(images / "train" / "cat" / "3.png", images / "val" / "dog" / "same.png")
    (images / "train" / "owl" / "7.png").write_bytes(b"no image")
    done = typed(tmp_path, "--json", data=folder_data(images, max_bad_fraction=0.2, workers=2))
    document = json.loads(done.stdout)
    found = {(each["split"], each["what"]): each for each in document["findings"]}
    unreadable = found.pop(("train", "samples that cannot be read"))
    assert (unreadable["count"], unreadable["examples"][0][:15]) == (1, "train/owl/7.png")
    same = next(each for key, each in found.items() if "same bytes" in key[1])
    assert (same["split"], same["count"], same["examples"]) == ("val", 1, ["val/dog/same.png is train/cat/3.png"])
    assert len(found) == 1
    assert document["usable"]
    assert document["splits"]["train"]["unreadable"] == 1
    assert document["splits"]["train"]["categories"]["owl"] == 10
    told = typed(tmp_path, data=folder_data(images, max_bad_fraction=0.2)).stdout
    assert "val, files with the same bytes as one of train: 1 (val/dog/same.png is train/cat/3.png)" in told


def test_what_other_commands_refuse_ends_with_3_and_is_written(tmp_path: Path, images: Path) -> None:
    for name in ("train/cat/1.png", "train/cat/2.png", "val/cat/1.png"):
        (images / name).write_bytes((images / name).read_bytes()[:100])
    done = typed(tmp_path, data=folder_data(images), code=3)
    assert "1 of 12 cannot be read: val/cat/1.png" in done.stderr
    assert "above data.max_bad_fraction" in done.stderr
    assert "Also wrong" in done.stderr
    assert "Next:" not in done.stdout
    document = metrics(tmp_path)
    assert not document["usable"]
    assert len(document["problems"]) == 2
    assert [each["count"] for each in document["findings"]] == [2, 1]


def test_data_whose_lists_cannot_be_used_end_with_3(tmp_path: Path, images: Path) -> None:
    shutil.rmtree(images / "val" / "cat")
    done = typed(tmp_path, data=folder_data(images), code=3)
    assert "1 classes of train are missing here: cat" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_validation_split_that_cannot_be_read_at_all_ends_with_3(tmp_path: Path, images: Path) -> None:
    """No category of it was counted, and the table shows so."""
    for file in (images / "val").rglob("*.png"):
        file.write_bytes(b"no image")
    done = typed(tmp_path, data=folder_data(images), code=3)
    assert "12 of 12 cannot be read" in done.stderr
    rows = [re.findall(r"[\w-]+", line) for line in done.stdout.splitlines()]
    assert ["owl", "11", "1", "-"] in rows


def test_dry_run_reads_and_writes_nothing(tmp_path: Path, images: Path) -> None:
    (images / "train" / "cat" / "1.png").write_bytes(b"no image")
    done = typed(tmp_path, "--dry-run", data=folder_data(images))
    assert "training images: 33 (11 per class)" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_signal_ends_the_check_and_leaves_no_result(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.signal_number = 15
    session = Session(tiny_config(output=str(tmp_path)), SilentReporter(), stop)
    with pytest.raises(StoppedError, match="nothing of this check is saved"):
        check_data(session)
    assert not (tmp_path / "tiny" / "check-data" / "metrics.json").exists()


def test_a_task_that_draws_and_counts_nothing_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KINDS", "_classes", "_TYPES"):
        monkeypatch.setattr(kinds, name, dict(getattr(kinds, name)))
    config = BLOBS.with_suffix(".yaml")
    words = ["--task", f"{BLOBS}:BlobCounting", "--config", str(config), "--output", str(tmp_path), "--samples", "20"]
    done = CliRunner().invoke(app, ["check-data", *words, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["pictures"], document["splits"]["val"]["categories"]) == ([], {})
    assert "samples.png is left out" in done.stderr
    assert not (tmp_path / "blob_counting" / "check-data" / "samples.png").exists()


# -- reading ----------------------------------------------------------------------------------------------------


class Faulty(Source):
    """Ten images: number 2 raises an error of another library, 4 cannot be read, 6 is NaN, 8 has another size."""

    image_size = (4, 4)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 2:
            raise KeyError("boxes")
        if index == 4:
            raise DataError("image 4", "damaged", "Replace it.")
        return torch.full((3, 4, 5 if index == 8 else 4), float("nan") if index == 6 else 0.0), index

    def resized(self, size: ImageSize) -> Faulty:
        return self

    def fingerprint(self) -> str:
        return "faulty"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_tried_whatever_is_wrong_with_one(workers: int) -> None:
    checked = list(checked_batches(Faulty(), 4, workers))
    read = [[] if batch is None else batch.indices.tolist() for batch, _ in checked]
    assert read == [[0, 1, 3], [5, 6, 7], []]
    told = dict(pair for _, bad in checked for pair in bad)
    assert sorted(told) == ["image 4", "sample 2", "sample 8", "sample 9"]
    assert told["image 4"] == "damaged"
    assert told["sample 2"] == "KeyError: 'boxes'"
    assert told["sample 8"].startswith("makes no batch with its neighbours (RuntimeError")
    assert not checked[1].batch.is_finite()[1]  # type: ignore[union-attr]


def test_some_samples_can_be_asked_for() -> None:
    (checked,) = checked_batches(Faulty(), 4, subset=[0, 4, 9])
    assert (checked.batch.indices.tolist(), len(checked.bad)) == ([0, 9], 1)  # type: ignore[union-attr]


class Files(Source):
    """Samples that are files."""

    image_size = (1, 1)

    def __init__(self, paths: Sequence[Path | None]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> None:
        raise NotImplementedError

    def resized(self, size: ImageSize) -> Files:
        return self

    def fingerprint(self) -> str:
        return ""

    def sample_name(self, index: int) -> str:
        return str(self.paths[index] and self.paths[index].name)  # type: ignore[union-attr]

    def sample_file(self, index: int) -> Path | None:
        return self.paths[index]


@settings(max_examples=40)
@given(
    contents=st.lists(st.lists(st.sampled_from(["", "a", "b", "ab", "ba", "abc"]), max_size=4), min_size=3, max_size=3)
)
def test_duplicates_are_the_contents_that_two_splits_share(
    contents: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    sources: dict[str, Source] = {}
    for split, texts in zip(("train", "search", "val"), contents, strict=True):
        paths = [folder / f"{split}{number}" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        sources[split] = Shrunk(Files([*paths, None, folder / "absent"]), Scale((1, 1), (1, 1)))
    sets = {split: set(texts) - {""} for split, texts in zip(sources, contents, strict=True)}
    wanted = {
        (other, f"files with the same bytes as one of {one}"): len(sets[one] & sets[other])
        for one, other in (("train", "search"), ("train", "val"), ("search", "val"))
        if sets[one] & sets[other]
    }
    assert {(each.split, each.what): each.count for each in duplicates(sources)} == wanted


# -- pictures ---------------------------------------------------------------------------------------------------


def test_a_picture_is_the_image_as_the_model_gets_it_with_its_class_below(images: Path) -> None:
    data = {**folder_data(images), "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]}
    task = task_of(tiny_config(data=data))
    train = task.data(seed=0, categories=None).train
    image, label = train[5]
    times = SMALLEST_SIDE // 32
    picture = task.picture(Shrunk(train, Scale((32, 32), (32, 32))), 5)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, : 32 * times : times, : 32 * times : times]
    scaled = (image * torch.tensor([0.2, 0.3, 0.1])[:, None, None] + torch.tensor([0.5, 0.4, 0.3])[:, None, None]) * 255
    assert torch.allclose(pixels.float(), scaled.clamp(0, 255), atol=0.51)
    train.set_epoch(1)
    assert task.picture(train, 5).tobytes() != picture.tobytes(), "augmentation is drawn anew"
    named = captioned(as_picture(image, [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]), CLASSES[label])
    assert named.tobytes() == picture.tobytes()


@given(text=st.text(), width=st.integers(30, 400))
def test_a_line_of_text_takes_any_characters_and_widens_nothing(text: str, width: int) -> None:
    picture = Image.new("RGB", (width, 60), "red")
    done = captioned(picture, text)
    assert done.width == width
    assert done.height > 60
    assert done.crop((0, 0, width, 60)).tobytes() == picture.tobytes()


@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=9), columns=st.integers(1, 4)
)
def test_a_sheet_shows_every_picture(sizes: list[tuple[int, int]], columns: int) -> None:
    colours = [(20 * number + 10, 0, 0) for number in range(len(sizes))]
    pictures = [Image.new("RGB", size, colour) for size, colour in zip(sizes, colours, strict=True)]
    sheet = contact_sheet(pictures, columns, side=50)
    seen = {colour for _, colour in sheet.getcolors(maxcolors=100_000) or []}
    assert seen == {*colours, (255, 255, 255)}
    assert all(picture.size == size for picture, size in zip(pictures, sizes, strict=True)), "pictures stay as they are"
