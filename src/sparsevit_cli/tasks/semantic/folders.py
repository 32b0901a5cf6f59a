"""Folders of images and of masks for each split; pairs have the same name but for the ending, at any depth."""

from __future__ import annotations

import os
from pathlib import Path

from sparsevit_cli.config.paths import as_path
from sparsevit_cli.config.semantic import PairedFolders
from sparsevit_cli.data.images import IMAGE_EXTENSIONS, is_system_name
from sparsevit_cli.data.source import shorten
from sparsevit_cli.errors import DataError

from .labels import IGNORED, MAX_CLASSES, LabelMap
from .pairing import paired
from .records import Pair, Pairs

_MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp")
"""GIF is no format of masks: who writes one renumbers the colours that occur, in each file anew."""
_ENDINGS = f"({'|'.join(_MASK_EXTENSIONS)})"


def read_folders(data: PairedFolders, split: str, labels: LabelMap) -> Pairs:
    """List a split, without opening an image. Raises DataError for folders or files that are not there."""
    root, (image_end, mask_end) = as_path(data.root, "data.root"), (data.image_suffix, data.mask_suffix)
    of_images, of_masks = (_of_split(folder, split) for folder in (data.images, data.masks))
    if not os.path.isdir(root):
        raise DataError("data.root", f"{root} is not a folder", f"Give the one that holds {of_images}.")
    places = [os.path.realpath(root / folder) for folder in (of_images, of_masks)]
    is_one = places[0] == places[1]
    image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    if is_one and image_end == mask_end:  # the ending tells which is which: a JPEG is no mask
        image_extensions = tuple(each for each in IMAGE_EXTENSIONS if each not in _MASK_EXTENSIONS)
    images, others = _listed(root, of_images, image_end, image_extensions, mask_end if is_one else "", places[1])
    masks, more = _listed(root, of_masks, mask_end, _MASK_EXTENSIONS, image_end if is_one else "", places[0])
    if masks and not images and is_one and image_end == mask_end:
        got = f"images and masks lie in one folder, {of_images}, and no ending tells them apart"
        raise DataError(f"data: {split}", got, "Set data.mask_suffix, or move the masks to a folder of their own.")
    keys = paired(split, images, masks, f"{of_images}/*{image_end}.*", f"{of_masks}/*{mask_end}{_ENDINGS}")
    pairs = [Pair(key, images[key], masks[key]) for key in keys]
    ignored = others - len(masks) if is_one else others + more
    return Pairs.listed(root, split, pairs, labels, data.max_megapixels, ignored)


def _of_split(folder: str, split: str) -> str:
    """Where the files of a split are: its name in place of `{split}`, or below the folder."""
    return folder.replace("{split}", split) if "{split}" in folder else f"{folder}/{split}"


def folder_labels(data: PairedFolders) -> LabelMap:
    """The numbers of a configuration's classes. Raises DataError for names that repeat or cannot be read."""
    names = data.classes or _names_in(data.classes_file or "")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not 2 <= len(names) <= MAX_CLASSES:
        got = f"{len(names)} names" + (f"; twice: {shorten(twice)}" if twice else "")
        raise DataError("data.classes", got, f"Give 2 to {MAX_CLASSES} names, each once.")
    first = int(data.reduce_zero_label)
    numbers = data.numbers or range(first, first + len(names))
    if len(set(numbers)) != len(names) or len(numbers) != len(names):
        got = f"{shorten([str(number) for number in numbers])} for {len(names)} classes"
        raise DataError("data.numbers", got, "Give one number for each class, each once.")
    pairs = dict.fromkeys([0] if data.reduce_zero_label else [], IGNORED)
    pairs |= {number: label for label, number in enumerate(numbers)}
    if data.ignore is not None:
        if data.ignore in pairs and pairs[data.ignore] != IGNORED:
            got = f"{data.ignore}, the number of the class {names[pairs[data.ignore]]}"
            raise DataError("data.ignore", got, "Give a number that no class has, or null.")
        pairs[data.ignore] = IGNORED
    ignored = ", ".join(str(number) for number, label in pairs.items() if label == IGNORED) or "none"
    told = shorten([str(number) for number in numbers]) if data.numbers else f"{first} to {first + len(names) - 1}"
    known = f"classes are {told}, ignored is {ignored}"
    do = "See data.classes, data.numbers and data.ignore."
    return LabelMap(tuple(names), tuple(sorted(pairs.items())), known, do)


def _names_in(path_text: str) -> list[str]:
    path = as_path(path_text, "data.classes_file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows begins files with a mark of UTF-8
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("data.classes_file", f"{path} cannot be read ({error})", "Give a UTF-8 text file.") from error
    return [line.strip() for line in lines if line.strip()]


def _listed(
    root: Path, folder: str, suffix: str, extensions: tuple[str, ...], not_of: str, not_in: str
) -> tuple[dict[str, str], int]:
    """Paths below `root` of the files below `folder`, by their name without suffix and ending; and how many others.

    Names that end with `not_of`, if it is longer than `suffix`, belong to files of the other kind in that folder, and
    so does a folder below, `not_in`. Links are followed, those to a folder that was seen before are not.
    """
    if not os.path.isdir(root / folder):
        got = f"there is no folder {root / folder}"
        raise DataError("data: split folder", got, "Set data.images, data.masks, data.train_split and data.val_split.")
    found: dict[str, str] = {}
    ignored, seen = 0, {not_in}
    for where, folders, names in os.walk(root / folder, followlinks=True):
        seen.add(os.path.realpath(where))
        inner = {name: os.path.realpath(os.path.join(where, name)) for name in sorted(folders)}
        folders[:] = [name for name, path in inner.items() if not is_system_name(name) and path not in seen]
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            is_other = len(not_of) > len(suffix) and stem.endswith(not_of)
            if is_system_name(name) or ending.lower() not in extensions or not stem.endswith(suffix) or is_other:
                ignored += 1
                continue
            path = os.path.relpath(os.path.join(where, name), root)
            key = os.path.relpath(os.path.join(where, stem.removesuffix(suffix)), root / folder)
            if key in found:
                do = "Set data.image_suffix and data.mask_suffix, or move one of them to another folder."
                raise DataError(folder, f"two files for {key}: {found[key]} and {path}", do)
            found[key] = path
    return found, ignored
