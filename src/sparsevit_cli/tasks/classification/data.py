"""The images of a classification experiment: three sources that share none."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sparsevit_cli.config.classification import DigitsData, FolderData, LabelledData, TimmData
from sparsevit_cli.config.paths import as_path
from sparsevit_cli.data.chosen import refuse_unreadable
from sparsevit_cli.data.digits import DigitsDataset, DigitsSpec
from sparsevit_cli.data.drawn import DrawnSource
from sparsevit_cli.data.source import BadImages, Categories, Data, shorten
from sparsevit_cli.data.splits import carve
from sparsevit_cli.errors import DataError
from sparsevit_cli.sizes import ImageSize

from .folder import FolderRecords, read_folder
from .records import Records, RecordSource, check_names, relabelled
from .timm_source import read_timm
from .transforms import TransformSpec


class DigitsSource(DrawnSource[DigitsDataset]):
    """The embedded digits with their labels."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return self.drawn.names

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.drawn[index]


def build_data(
    data: DigitsData | LabelledData,
    *,
    img_size: ImageSize,
    in_chans: int,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> Data:
    """The three sources of a config. Images are listed, none is decoded.

    Labels follow the training classes, or `class_names` (a checkpoint's), which must be the same set. `seed`
    moves the augmentation, and for the digits the split; for folders and timm the split is always the same.
    Raises DataError or ConfigError; see `read_folder` and `read_timm`.
    """
    if isinstance(data, DigitsData):
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


def _digits(data: DigitsData, img_size: ImageSize, in_chans: int, seed: int, class_names: Sequence[str] | None) -> Data:
    if class_names is not None and tuple(class_names) != DigitsDataset.names:
        got = f"the checkpoint knows the classes {shorten(list(class_names))}"
        raise DataError("data.source digits", got, "Use the data it was trained on, or another checkpoint.")
    spec = DigitsSpec.of(data.digits, img_size, in_chans)
    train, search, val = (DigitsSource(DigitsDataset(spec, split, seed)) for split in ("train", "search", "val"))
    rows = [
        ("data", "scikit-learn's handwritten digits on cluttered canvases"),
        ("classes", str(len(DigitsDataset.names))),
        ("training images", str(len(train))),
        ("search images", str(len(search))),
        ("validation images", str(len(val))),
    ]
    return Data(train, search, val, Categories(DigitsDataset.names), split_seed=seed, rows=tuple(rows))


def _read(data: LabelledData, split: str) -> Records:
    if isinstance(data, TimmData):
        root = None if data.root is None else str(as_path(data.root, "data.root"))
        return read_timm(data.dataset, root, split, data.max_megapixels)
    assert isinstance(data, FolderData)
    return read_folder(as_path(data.root, "data.root"), split, data.max_megapixels)


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


def _bundle(data: LabelledData, train_records: Records, val_records: Records, spec: TransformSpec, seed: int) -> Data:
    faults = train_records.known_faults()
    usable = np.ones(len(train_records.keys), dtype=bool)
    usable[list(faults)] = False
    kept, held_out = carve(train_records.keys, train_records.labels, data.search_fraction, usable)
    bad_images = BadImages(len(kept), data.max_bad_fraction)
    bad_images.note((train_records.keys[index], reason) for index, reason in faults.items())
    refuse_unreadable({val_records.keys[index]: reason for index, reason in val_records.known_faults().items()})

    held_spec = spec.evaluation()
    everything = np.arange(len(val_records.keys))
    train = RecordSource(train_records, kept, spec, seed=seed, bad_images=bad_images)
    search = RecordSource(train_records, held_out, held_spec, seed=seed, bad_images=None)
    val = RecordSource(val_records, everything, held_spec, seed=seed, bad_images=None)
    names = train.class_names
    rows = [
        ("data", _told(data)),
        ("classes", f"{len(names)}: {shorten(names)}"),
        ("training images", _counts(train)),
        ("search images", f"{_counts(search)}, held out of {train_records.split}"),
        ("validation images", _counts(val)),
    ]
    if isinstance(train_records, FolderRecords) and isinstance(val_records, FolderRecords):
        rows.append(("ignored files", f"{train_records.num_ignored + val_records.num_ignored}"))
    return Data(train, search, val, Categories(names), rows=tuple(rows))


def _told(data: LabelledData) -> str:
    if isinstance(data, TimmData):
        return f"timm {data.dataset}" + (f" in {data.root}" if data.root else "")
    return f"folder in {data.root}" if isinstance(data, FolderData) else data.source


def _counts(source: RecordSource) -> str:
    per_class = np.bincount(source.labels, minlength=len(source.class_names))
    least, most = int(per_class.min()), int(per_class.max())
    return f"{len(source)} ({least} per class)" if least == most else f"{len(source)} ({least} to {most} per class)"
