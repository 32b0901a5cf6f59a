"""A data section of the config into three sources that share no image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from sparsevit_cli.config.paths import as_path
from sparsevit_cli.config.schema import DataSection
from sparsevit_cli.errors import ConfigError, DataError

from .digits import DigitsDataset, DigitsSpec
from .folder import FolderRecords, read_folder
from .records import Records, RecordSource, check_names, relabelled
from .source import BadImages, ImageSize, ImageSource, shorten
from .splits import carve
from .timm_source import read_timm
from .transforms import TransformSpec, as_pair


@dataclass(frozen=True)
class DataBundle:
    """Training images, those held out of them for search, and validation images.

    `fingerprint` covers the images that are learned and searched from, `val_fingerprint` those of validation, at the
    size they were built for. `rows` is what `describe` says of them.
    """

    train: ImageSource
    search: ImageSource
    val: ImageSource
    class_names: tuple[str, ...]
    fingerprint: str
    val_fingerprint: str
    rows: tuple[tuple[str, str], ...]

    def describe(self) -> list[tuple[str, str]]:
        """Rows (name, value) for people: source, classes, images per split, ignored and unreadable files."""
        bad = self.train.bad_images
        return [*self.rows, *([("unreadable training images so far", str(bad))] if bad is not None else [])]


@dataclass(frozen=True)
class DigitsSource:
    """The embedded digits as an ImageSource."""

    dataset: DigitsDataset
    bad_images: None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.dataset[index]

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def with_image_size(self, size: ImageSize) -> DigitsSource:
        return DigitsSource(self.dataset.with_canvas(_square(size)))

    def sample_name(self, index: int) -> str:
        return self.dataset.sample_name(index)

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()


def build_data(
    data: DataSection, *, img_size: ImageSize, in_chans: int, seed: int, class_names: Sequence[str] | None = None
) -> DataBundle:
    """The three sources of a config. Images are listed, none is decoded.

    Labels follow the training classes, or `class_names` (a checkpoint's), which must be the same set. `seed`
    moves the augmentation, and for the digits the split; for folders and timm the split is always the same.
    Raises DataError or ConfigError; see `read_folder` and `read_timm`.
    """
    if data.source == "digits":
        return _digits(data, img_size, in_chans, seed, class_names)
    spec = TransformSpec.from_config(data, img_size, in_chans)
    train_records, val_records = _read(data, data.train_split), _read(data, data.val_split)
    for records in (train_records, val_records):
        check_names(records)
    _check_apart(train_records, val_records)
    if class_names is not None:
        train_records = relabelled(train_records, class_names, "the checkpoint")
    val_records = relabelled(val_records, train_records.class_names, train_records.split)
    return _bundle(data, train_records, val_records, spec, seed)


def _digits(
    data: DataSection, img_size: ImageSize, in_chans: int, seed: int, class_names: Sequence[str] | None
) -> DataBundle:
    if in_chans != 3:
        raise ConfigError("model.in_chans", f"{in_chans}; the digits have 3", "Set 3, or another data.source.")
    if class_names is not None and tuple(class_names) != DigitsDataset.class_names:
        got = f"the checkpoint knows the classes {shorten(list(class_names))}"
        raise DataError("data.source digits", got, "Use the data it was trained on, or another checkpoint.")
    digits = data.digits
    spec = DigitsSpec(_square(img_size), digits.digit_min, digits.digit_max, digits.clutter)
    train, search, val = (DigitsSource(DigitsDataset(spec, split, seed)) for split in ("train", "search", "val"))
    rows = [
        ("data", "scikit-learn's handwritten digits on cluttered canvases"),
        ("classes", str(len(train.class_names))),
        ("training images", str(len(train))),
        ("search images", str(len(search))),
        ("validation images", str(len(val))),
    ]
    return DataBundle(
        train, search, val, train.class_names, _fingerprint(train, search), val.fingerprint(), tuple(rows)
    )


def _read(data: DataSection, split: str) -> Records:
    root = None if data.root is None else str(as_path(data.root, "data.root"))
    if data.source == "timm":
        return read_timm(data.dataset, root, split, data.max_megapixels)
    assert root is not None, "DataSection lets no folder source through without root"
    return read_folder(Path(root), split, data.max_megapixels)


def _check_apart(train: Records, val: Records) -> None:
    """Raises DataError where validation would run on training images."""
    longer, shorter = sorted((train.origin + os.sep, val.origin + os.sep), key=len, reverse=True)
    if longer.startswith(shorter):
        got = f"training ({train.split}) and validation ({val.split}) read the same images: {train.origin}"
        raise DataError("data.train_split, data.val_split", got, "Give two splits that exist and do not overlap.")
    places = {tuple(facts): place for place, facts in enumerate(val.files.tolist()) if facts[0]}
    candidates = np.flatnonzero(np.isin(train.files[:, 0], val.files[:, 0])).tolist()
    pairs = [(places.get(tuple(train.files[place].tolist())), place) for place in candidates]
    # Some network file systems give two files one inode: size and time tell them apart.
    shared = [
        f"{val.keys[other]} is {train.keys[place]}"
        for other, place in pairs
        if other is not None and train.sizes and val.sizes and train.sizes[place] == val.sizes[other]
    ]
    if shared:
        got = f"{len(shared)} validation images are training images, by a link: {shorten(shared)}"
        raise DataError("data.val_split", got, "Validation needs images of its own.")


def _bundle(
    data: DataSection, train_records: Records, val_records: Records, spec: TransformSpec, seed: int
) -> DataBundle:
    faults = train_records.known_faults()
    usable = np.ones(len(train_records.keys), dtype=bool)
    usable[list(faults)] = False
    kept, held_out = carve(train_records.keys, train_records.labels, data.search_fraction, usable)
    bad_images = BadImages(len(kept), data.max_bad_fraction)
    bad_images.note((train_records.keys[index], reason) for index, reason in faults.items())
    if val_faults := val_records.known_faults():
        listed = shorten([f"{val_records.keys[index]} ({reason})" for index, reason in val_faults.items()])
        got = f"{len(val_faults)} unreadable: {listed}"
        raise DataError("data: validation images", got, "Repair or remove them; evaluation leaves no image out.")

    held_spec = spec.evaluation()
    everything = np.arange(len(val_records.keys))
    train = RecordSource(train_records, kept, spec, seed=seed, bad_images=bad_images)
    search = RecordSource(train_records, held_out, held_spec, seed=seed, bad_images=None)
    val = RecordSource(val_records, everything, held_spec, seed=seed, bad_images=None)
    names = train.class_names
    rows = [
        ("data", f"{data.source} {data.dataset}".strip() + (f" in {data.root}" if data.root else "")),
        ("classes", f"{len(names)}: {shorten(names)}"),
        ("training images", _counts(train)),
        ("search images", f"{_counts(search)}, held out of {train_records.split}"),
        ("validation images", _counts(val)),
    ]
    if isinstance(train_records, FolderRecords) and isinstance(val_records, FolderRecords):
        rows.append(("ignored files", f"{train_records.num_ignored + val_records.num_ignored}"))
    return DataBundle(train, search, val, names, _fingerprint(train, search), val.fingerprint(), tuple(rows))


def _counts(source: RecordSource) -> str:
    per_class = np.bincount(source.labels, minlength=len(source.class_names))
    least, most = int(per_class.min()), int(per_class.max())
    return f"{len(source)} ({least} per class)" if least == most else f"{len(source)} ({least} to {most} per class)"


def _fingerprint(*sources: ImageSource) -> str:
    return hashlib.sha256("\n".join(source.fingerprint() for source in sources).encode()).hexdigest()


def _square(size: ImageSize) -> int:
    height, width = as_pair(size)
    if height != width:
        raise ConfigError("model.img_size", f"{height} x {width}; the digits' canvas is square", "Give one number.")
    return height
