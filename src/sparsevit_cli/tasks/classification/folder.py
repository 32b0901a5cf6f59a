"""ImageFolder trees: split/class/.../image. The class is the first folder below the split, at any depth."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sparsevit_cli.data.images import IMAGE_EXTENSIONS, decode_image, is_system_name
from sparsevit_cli.data.source import shorten
from sparsevit_cli.errors import DataError

from .records import FileFacts, Records, facts_array, file_facts

_log = logging.getLogger(__name__)
_Listed = tuple[str, int, FileFacts]
"""A path below the split folder, its bytes, and which file it is."""


@dataclass(frozen=True)
class FolderRecords(Records):
    """The images of one split folder; `num_ignored` files in it are not images of a class."""

    folder: Path
    num_ignored: int

    def load(self, index: int) -> Image.Image:
        return decode_image(self.file(index), self.keys[index], self.max_megapixels)

    def file(self, index: int) -> Path:
        return self.folder / self.keys[index].removeprefix(self.split + "/")


def read_folder(root: Path, split: str, max_megapixels: float) -> FolderRecords:
    """List `root/split`, in the order of class and file name, without opening an image.

    Classes are in natural order (`2` before `10`), as timm has them. Links are followed. Ignored, and counted
    in one warning: other files, images outside a class folder, hidden files and folders, those of systems
    (`is_system_name`). Raises DataError: folder missing or unreadable, a class without images, fewer than two
    classes, links in a circle or leading nowhere.
    """
    folder = root / split
    if not os.path.isdir(root):
        raise DataError("data.root", f"{root} is not a folder", "Give the folder that holds train and val.")
    if not os.path.isdir(folder):
        there = sorted(entry.name for entry in _entries(root) if not is_system_name(entry.name) and entry.is_dir())
        got = f"there is no folder {split} in {root}; there are: {shorten(there) or 'none'}"
        raise DataError("data: split folder", got, "Set data.train_split and data.val_split, or data.root.")

    per_class, ignored = _walk(folder)
    _check(folder, per_class)
    if ignored:
        _log.warning(
            "%s: %d files or folders are not images in a class folder, ignored: %s",
            folder,
            len(ignored),
            shorten(ignored),
        )

    class_names = tuple(sorted(per_class, key=_natural_key))
    listed = [(label, *file) for label, name in enumerate(class_names) for file in sorted(per_class[name])]
    return FolderRecords(
        split=split,
        origin=os.path.realpath(folder),
        class_names=class_names,
        labels=np.array([label for label, *_ in listed], dtype=np.int64),
        keys=tuple(f"{split}/{path}" for _, path, _, _ in listed),
        sizes=tuple(size for _, _, size, _ in listed),
        files=facts_array(file for _, _, _, file in listed),
        version="folder",
        folder=folder,
        max_megapixels=max_megapixels,
        num_ignored=len(ignored),
    )


def _check(folder: Path, per_class: dict[str, list[_Listed]]) -> None:
    known = f"Images end in {' '.join(IMAGE_EXTENSIONS)}."
    empty = sorted((name for name, files in per_class.items() if not files), key=_natural_key)
    if not per_class or len(empty) == len(per_class):
        got = f"no class folder with images in it (expected {folder}/<class>/<image>)"
        raise DataError(str(folder), got, f"Sort the images into one folder per class. {known}")
    if empty:
        got = f"{len(empty)} class folders without images: {shorten(empty)}"
        raise DataError(str(folder), got, f"Add images, or remove the folders from every split. {known}")
    if len(per_class) == 1:
        got = f"only one class folder: {next(iter(per_class))}"
        raise DataError(str(folder), got, "Give at least two; perhaps data.root is a level too high.")


def _walk(folder: Path) -> tuple[dict[str, list[_Listed]], list[str]]:
    """Images of each class folder, and the paths of what is ignored."""
    per_class: dict[str, list[_Listed]] = {}
    ignored: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]  # a path and the folders above it
    while waiting:
        path, above = waiting.pop()
        here = os.stat(folder / path)
        if (here.st_dev, here.st_ino) in above:
            raise DataError(str(folder / path), "a link to a folder that contains it", "Remove the link.")
        above |= {(here.st_dev, here.st_ino)}
        class_name = path.partition("/")[0]
        for entry in _entries(folder / path):
            inner = f"{path}/{entry.name}" if path else entry.name
            if is_system_name(entry.name):  # before anything of it is looked at
                ignored.append(inner)
                continue
            is_image = entry.name.lower().endswith(IMAGE_EXTENSIONS)
            status = _status(entry, is_image=is_image, in_class=bool(path))
            if status is not None and stat.S_ISDIR(status.st_mode):
                waiting.append((inner, above))
                if not path:
                    per_class[entry.name] = []
            elif is_image and path:
                per_class[class_name].append((inner, *file_facts(status)))
            else:
                ignored.append(inner)
    return per_class, sorted(ignored)


def _status(entry: os.DirEntry[str], *, is_image: bool, in_class: bool) -> os.stat_result | None:
    """What the entry is; None where it is a link that leads nowhere, and no class folder."""
    try:
        return entry.stat()
    except OSError as error:
        if is_image or (in_class and entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP)):
            return None
        # It may be a link to a class folder: to ignore it would shift the labels.
        got = f"cannot be read ({error.strerror}); is it a link that leads nowhere?"
        raise DataError(entry.path, got, "Repair or remove it.") from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(str(folder), f"cannot be listed ({error.strerror})", "Give read access to it.") from error


def _natural_key(name: str) -> tuple[list[str | int], str]:
    """Numbers by value, letters without case, ties by the name itself."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [int(part) if number % 2 else part for number, part in enumerate(parts)], name
