"""Whatever timm.data.create_dataset reads at random: folders and tars, torchvision (torch/), Hugging Face (hfds/).

timm's own data set replaces an image that it cannot read by the next one. Here files are taken from its
reader and decoded by us, so that evaluation counts every image once and as itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset

from sparsevit_cli.data.files import file_status
from sparsevit_cli.data.images import (
    UnreadableImageError,
    decode_image,
    is_system_name,
    to_rgb,
)
from sparsevit_cli.data.source import shorten
from sparsevit_cli.data.splits import Indices
from sparsevit_cli.errors import DataError, pass_on

from .records import FileFacts, Records, check_classes, facts_array, file_facts

_File = tuple[str, int, FileFacts]
_FOLDER_NAMES = ("folder", "image_folder", "imagefolder", "tar")
_RANDOM_ACCESS = ("torch", "hfds")
_STREAMS = ("tfds", "wds", "hfids")


@dataclass(frozen=True)
class TimmRecords(Records):
    """One split of a timm data set; `open_image` gives a file to decode or an image."""

    open_image: Callable[[int], Any]

    def load(self, index: int) -> Image.Image:
        name = self.keys[index]
        try:
            opened = self.open_image(index)
            if isinstance(opened, Image.Image):
                return to_rgb(opened)
        except Exception as error:  # each library fails in its own way
            pass_on(error)
            got = f"cannot be read ({type(error).__name__}: {error})"
            raise UnreadableImageError(name, got, "Repair the data set.") from error
        if isinstance(opened, Path):
            return decode_image(opened, name, self.max_megapixels)
        with opened:
            return decode_image(opened, name, self.max_megapixels)

    def file(self, index: int) -> Path | None:
        items = getattr(self.open_image, "items", None)
        path = items[index][0] if items else None
        return Path(path) if isinstance(path, str) else None  # a member of a tar is no path


def read_timm(dataset: str, root: str | None, split: str, max_megapixels: float) -> TimmRecords:
    """List one split of a timm data set; nothing is downloaded by timm or torchvision.

    Raises DataError: unknown or streamed data set, data missing, classes or labels unknown, a class without
    images.
    """
    where = f"{dataset} split {split}"
    opened = _open(dataset, root, split)
    if isinstance(opened, ImageDataset):
        listing = _from_reader(where, opened.reader)
    elif hasattr(opened, "samples") and hasattr(opened, "root"):
        listing = _from_samples(where, opened)
    else:
        listing = _from_items(where, opened)
    _refuse_system_files(where, listing.files)
    labels = listing.labels
    names = listing.class_names or tuple(str(label) for label in range(int(labels.max()) + 1))
    if labels.min() < 0 or labels.max() >= len(names):
        got = f"labels from {labels.min()} to {labels.max()} for {len(names)} classes"
        raise DataError(where, got, "Choose a split with labels.")
    records = TimmRecords(
        split=where,
        origin=listing.origin,
        class_names=_distinct(names),
        labels=labels,
        keys=tuple(name for name, _, _ in listing.files) or tuple(f"{where} [{index}]" for index in range(len(labels))),
        sizes=tuple(size for _, size, _ in listing.files) or None,
        files=facts_array(file for _, _, file in listing.files),
        version=f"{where} {listing.version}",
        open_image=listing.open_image,
        max_megapixels=max_megapixels,
    )
    check_classes(records)
    return records


@dataclass(frozen=True)
class _Listing:
    """What a data set tells without decoding; `files` (name, bytes, which file) is empty where it has none."""

    open_image: Callable[[int], Any]
    labels: Indices
    class_names: tuple[str, ...] | None
    files: list[_File]
    origin: str
    version: str = ""


def _from_reader(where: str, reader: Any) -> _Listing:
    """timm's own readers: folder, tar, Hugging Face."""
    if hasattr(reader, "cache_tarfiles"):
        reader.cache_tarfiles = False  # open tars, shared by forked loader processes, would be read in a tangle
    files: list[_File] = []
    if hasattr(reader, "targets"):  # members of tars
        labels = reader.targets
        files = [
            (f"{parent or ''}{child.name if child else ''}:{member.name}", member.size, (0, 0, 0))
            for member, parent, child in reader.samples
        ]
    elif hasattr(reader, "iter_targets"):
        labels = reader.iter_targets()
    else:
        labels = [label for _, label in reader.samples]
        files = [_file(path, reader.root) for path, _ in reader.samples]
    class_to_idx = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return _Listing(
        open_image=_ReaderItem(reader),
        labels=_labels(where, labels),
        class_names=_names_by_index(where, class_to_idx),
        files=files,
        origin=_common_folder(reader.root, files) if files else where,
        version=str(getattr(getattr(reader, "dataset", None), "_fingerprint", "")),
    )


def _from_samples(where: str, dataset: Any) -> _Listing:
    """torchvision's data sets of one file per image."""
    labels = _labels(where, [label for _, label in dataset.samples])
    files = [_file(path, dataset.root) for path, _ in dataset.samples]
    return _Listing(_SamplePath(dataset), labels, _torch_names(dataset), files, _common_folder(dataset.root, files))


def _from_items(where: str, dataset: Any) -> _Listing:
    """torchvision's other data sets, images in memory."""
    targets = getattr(dataset, "targets", None)
    labels = _labels(where, (dataset[i][1] for i in range(len(dataset))) if targets is None else targets)
    # torchvision takes every split that timm does not know as the test split.
    train = getattr(dataset, "train", None)
    origin = where if train is None else f"{type(dataset).__name__} {'train' if train else 'test'}"
    return _Listing(_DatasetItem(dataset), labels, _torch_names(dataset), [], origin)


def _open(dataset: str, root: str | None, split: str) -> Any:
    prefix, slash, _ = dataset.partition("/")
    prefix = prefix.lower()
    if slash and prefix in _STREAMS:
        got = f"{dataset!r} is read as a stream, and training needs images by number"
        raise DataError("data.dataset", got, "Use the same data as a folder, a tar, torch/... or hfds/...")
    if prefix not in (_RANDOM_ACCESS if slash else _FOLDER_NAMES):
        got = f"{dataset!r}; known are {', '.join(_FOLDER_NAMES)}, torch/<name> and hfds/<name>"
        raise DataError("data.dataset", got, "Choose one of them.")
    if root is None and prefix != "hfds":
        raise DataError("data.root", f"missing, and {dataset!r} is read from a folder", "Set data.root.")
    try:
        # timm prints its advice on missing packages; stdout is for results.
        with contextlib.redirect_stdout(sys.stderr):
            opened = create_dataset(dataset if slash else "", root=root, split=split)
        size = len(opened)
    except (Exception, SystemExit) as error:  # asserts, ImportError, RuntimeError, whatever the library raises
        pass_on(error)
        got = f"split {split!r} cannot be opened ({type(error).__name__}: {error})"
        raise DataError(f"data.dataset {dataset}", got, "Check data.dataset, data.root and the split names.") from error
    if size == 0:
        raise DataError(f"data.dataset {dataset}", f"split {split!r} is empty", "Choose another split.")
    return opened


@dataclass(frozen=True)
class _ReaderItem:
    reader: Any

    def __call__(self, index: int) -> Any:
        return self.reader[index][0]

    @property
    def items(self) -> Any:
        """Pairs of path and label, if the reader has them."""
        return getattr(self.reader, "samples", None)


@dataclass(frozen=True)
class _SamplePath:
    dataset: Any

    def __call__(self, index: int) -> Path:
        return Path(self.items[index][0])

    @property
    def items(self) -> Any:
        """Pairs of path and label."""
        return self.dataset.samples


@dataclass(frozen=True)
class _DatasetItem:
    dataset: Any

    def __call__(self, index: int) -> Any:
        return self.dataset[index][0]


def _labels(where: str, values: Iterable[Any]) -> Indices:
    labels = np.array([np.asarray(value) for value in values])
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        got = f"labels of shape {labels.shape[1:]} and type {labels.dtype}"
        raise DataError(where, got, "Use a data set with one whole number as the label of an image.")
    return labels.astype(np.int64)


def _common_folder(root: str, files: list[_File]) -> str:
    # The root itself may hold both splits (torchvision's ImageNet).
    return os.path.realpath(
        root if os.path.isfile(root) else os.path.join(root, os.path.commonpath([f for f, _, _ in files]))
    )


def _file(path: str, root: str) -> _File:
    return (Path(os.path.relpath(path, root)).as_posix(), *file_facts(file_status(path)))


def _refuse_system_files(where: str, files: list[_File]) -> None:
    """timm and torchvision take every file for an image, and its folder for a class."""
    found = [name for name, _, _ in files if any(map(is_system_name, re.split("[/:]", name)))]
    if found:
        got = f"{len(found)} hidden files or files of a system are read as images: {shorten(found)}"
        raise DataError(where, got, "Remove them, or use data.source: folder, which leaves them out.")


def _names_by_index(where: str, class_to_idx: dict[str, int] | None) -> tuple[str, ...] | None:
    if not class_to_idx:
        return None
    if sorted(class_to_idx.values()) != list(range(len(class_to_idx))):
        got = f"class numbers with gaps: {shorten([str(index) for index in sorted(class_to_idx.values())])}"
        raise DataError(where, got, "Number the classes from 0.")
    return tuple(sorted(class_to_idx, key=class_to_idx.__getitem__))


def _torch_names(dataset: Any) -> tuple[str, ...] | None:
    # torchvision's ImageNet gives a tuple of synonyms per class.
    classes = getattr(dataset, "classes", None)
    return classes and tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes)


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names that occur twice (ImageNet has two cranes) get their label as well."""
    count = Counter(names)
    return tuple(f"{name} ({label})" if count[name] > 1 else name for label, name in enumerate(names))
