"""Annotation files in COCO's form, read as they are: what cannot be used is left out, counted and told."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsevit_cli.data.chosen import refuse_shared
from sparsevit_cli.data.files import NOT_A_FILE, bytes_at, file_fault
from sparsevit_cli.data.source import Categories, Finding, shorten
from sparsevit_cli.errors import DataError
from sparsevit_cli.sizes import Size, size_text

from .masks import Polygons, RunLengths, Shape, unpacked
from .source import Images
from .truth import Instance, Truth, Truths

_EXAMPLES = 5
_ROUNDING = 1.0
"""Pixels by which a box may stick out of its image without a word: COCO's own do by less."""
_PARTS = ("images", "annotations", "categories")
_Listed = Mapping[int, tuple[str, Size]]
"""File name and size by image id."""


@dataclass(frozen=True)
class CocoSplit:
    """One annotation file and its images; `with_object` (images,) is true for those that hold one to learn from."""

    images: Images
    categories: Categories
    findings: tuple[Finding, ...]
    with_object: NDArray[np.bool_]


def read_coco(file: Path, folder: Path, split: str, *, masks: bool, max_megapixels: float) -> CocoSplit:
    """Read `file` and list the images in `folder`; none is decoded. Categories are in the order of their ids.

    Left out and counted: objects of unknown images or categories, without a box that has an area inside the image,
    and, if there are to be `masks`, without a mask of their image's size; and categories as `_without_spares` says.
    Raises DataError: a file that is not there or not of COCO's form, ids or file names that stand twice, no category,
    no object.
    """
    content = _content(file)
    document = _document(file, content)
    found = _Found(split)
    used = {row["category_id"] for row in document["annotations"] if _has_category(row)}
    ids, categories = _categories(file, document["categories"], used, found)
    listed = _listed(file, document["images"])
    for name in _twice(document["annotations"]):
        found.note("annotation id that stands twice", name)
    instances: dict[int, list[Instance]] = {image_id: [] for image_id in listed}
    for number, row in enumerate(document["annotations"]):
        note = partial(found.note, name=_name(row, number, listed))
        try:
            instance = _instance(row, listed, ids, note, masks=masks)
        except _UnusableError as error:
            note(str(error))
        else:
            instances[row["image_id"]].append(instance)
    truths = Truths(Truth(key, size, tuple(instances[key])) for key, (_, size) in listed.items())
    with_object = truths.learned() > 0
    if not with_object.any():
        lost = "; ".join(f"{finding.count} {finding.what}" for finding in found.told())
        do = "Correct them; without masks, set task.masks: false." if "mask" in lost else "Correct the annotations."
        got = f"none of {len(document['annotations'])} annotations is an object to learn from"
        raise DataError(str(file), got + (f": {lost}" if lost else ""), do)
    names, sizes, faults = _files(folder, listed.values(), max_megapixels)
    digest = hashlib.sha256(hashlib.sha256(content).digest() + repr(sizes).encode()).hexdigest()
    images = Images(split, folder, names, truths, faults, digest, max_megapixels)
    return CocoSplit(images, categories, found.told(), with_object)


class _Found:
    """What is wrong with objects, by kind."""

    def __init__(self, split: str) -> None:
        self.split = split
        self._names: dict[str, list[str]] = {}

    def note(self, what: str, name: str) -> None:
        self._names.setdefault(what, []).append(name)

    def told(self) -> tuple[Finding, ...]:
        return tuple(
            Finding(self.split, what, len(names), tuple(names[:_EXAMPLES])) for what, names in self._names.items()
        )


class _UnusableError(Exception):
    """Why an annotation is left out."""


def _name(row: Any, number: int, listed: _Listed) -> str:
    """`annotation 17 of 000000000139.jpg`"""
    if not isinstance(row, dict):
        return f"annotation number {number}"
    image_id = row.get("image_id")
    of = f" of {listed[image_id][0]}" if isinstance(image_id, int) and image_id in listed else ""
    return f"annotation {row.get('id')}{of}"


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        do = "Set data.root, data.train_annotations and data.val_annotations."
        raise DataError(str(file), f"it cannot be read ({error.strerror})", do) from error
    if not content.strip():
        raise DataError(str(file), "it is empty", "Copy it again.")
    return content


def _document(file: Path, content: bytes) -> Mapping[str, list[Any]]:
    do = "Give a file of COCO's form for instances."
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(str(file), f"it is no JSON ({error})", "Copy it again.") from error
    missing = [part for part in _PARTS if not isinstance(document, dict) or not isinstance(document.get(part), list)]
    if missing:
        there = shorten(list(map(str, document))) if isinstance(document, dict) else type(document).__name__
        raise DataError(str(file), f"it has no list of {' or '.join(missing)}; it has: {there or 'nothing'}", do)
    found: Mapping[str, list[Any]] = document
    return found


def _categories(file: Path, rows: list[Any], used: Collection[int], found: _Found) -> tuple[dict[int, int], Categories]:
    """Label of every category id, and the categories; `used` are the ids in annotations."""
    if not rows:
        raise DataError(str(file), "it lists no categories", "Give a file of COCO's form for instances.")
    usable = [
        row for row in rows if isinstance(row, dict) and _is_id(row.get("id")) and isinstance(row.get("name"), str)
    ]
    if len(usable) < len(rows):
        got = f"{len(rows) - len(usable)} of {len(rows)} categories have no whole number as id, or no name"
        raise DataError(str(file), got, "Correct them.")
    _refuse_twins(file, "category ids", (row["id"] for row in usable))
    ordered = _without_spares(sorted(usable, key=lambda row: int(row["id"])), used, found)
    _refuse_twins(file, "category names", (row["name"] for row in ordered))
    ids = tuple(int(row["id"]) for row in ordered)
    return {number: label for label, number in enumerate(ids)}, Categories(tuple(row["name"] for row in ordered), ids)


def _without_spares(rows: list[dict[str, Any]], used: Collection[int], found: _Found) -> list[dict[str, Any]]:
    """Categories, in the order of their ids, without those that share a name and that no annotation uses.

    Roboflow writes such a one, the first, for its project. The last one stays if nothing uses any of a name.
    """
    ids: dict[str, list[int]] = {}
    for row in rows:
        ids.setdefault(row["name"], []).append(row["id"])
    kept = {number for twins in ids.values() for number in [each for each in twins if each in used] or twins[-1:]}
    for row in rows:
        if row["id"] not in kept:
            found.note("category that no annotation uses, and that is called as another", f"{row['id']} {row['name']}")
    return [row for row in rows if row["id"] in kept]


def _has_category(row: Any) -> bool:
    return isinstance(row, dict) and _is_id(row.get("category_id"))


def _listed(file: Path, rows: list[Any]) -> _Listed:
    """File name and size of every image id, in the order of the file."""
    if not rows:
        raise DataError(str(file), "it lists no images", "Give a file of COCO's form for instances.")
    for number, row in enumerate(rows):
        whole = isinstance(row, dict) and _is_id(row.get("id")) and _is_name(row.get("file_name"))
        if not whole or not all(_is_id(row.get(side)) and row[side] > 0 for side in ("height", "width")):
            got = f"image {number} is {json.dumps(row, default=str):.120}"
            do = "Give each a whole id, height and width, and a file_name below the folder of images."
            raise DataError(str(file), got, do)
    _refuse_twins(file, "image ids", (row["id"] for row in rows))
    _refuse_twins(file, "file names", (_with_slashes(row["file_name"]) for row in rows))
    return {row["id"]: (row["file_name"], (row["height"], row["width"])) for row in rows}


def _refuse_twins(file: Path, what: str, values: Iterable[object]) -> None:
    counts: dict[object, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    if twins := [str(value) for value, count in counts.items() if count > 1]:
        raise DataError(str(file), f"{len(twins)} {what} stand twice: {shorten(twins)}", "Make them distinct.")


def _twice(rows: list[Any]) -> list[str]:
    """Annotations whose id an earlier one has. They are kept: nothing here goes by these ids."""
    seen: set[object] = set()
    found = []
    for row in rows:
        number = row.get("id") if isinstance(row, dict) else None
        if _is_id(number):
            if number in seen:
                found.append(f"annotation {number}")
            seen.add(number)
    return found


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: object) -> bool:
    """True for a path that stays below its folder."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    path = PurePosixPath(_with_slashes(value))
    return not path.is_absolute() and ".." not in path.parts


def _with_slashes(name: str) -> str:
    """A path as Windows writes it, or any other one, with slashes."""
    return name.replace("\\", "/")


def _instance(
    row: Any,
    listed: _Listed,
    labels: Mapping[int, int],
    note: Callable[[str], None],
    *,
    masks: bool,
) -> Instance:
    """An annotation as an object; `note` is told what is left out of it. Raises _UnusableError."""
    if not isinstance(row, dict) or not _is_id(row.get("image_id")) or row["image_id"] not in listed:
        raise _UnusableError("object of an image that is not listed")
    _, size = listed[row["image_id"]]
    if not _has_category(row) or row["category_id"] not in labels:
        raise _UnusableError("object of a category that is not listed")
    box = _box(row.get("bbox"), size, note)
    shape = _shape(row.get("segmentation"), size, note) if masks else None
    area = _numbers([row.get("area")])
    if area is None or area[0] < 0:
        area = [float(box[2] * box[3] if shape is None else shape.pixels(size).sum())]
    return Instance(labels[row["category_id"]], box, area[0], shape, bool(row.get("iscrowd", 0)))


def _box(value: Any, size: Size, note: Callable[[str], None]) -> tuple[float, float, float, float]:
    box = _numbers(value)
    if box is None or len(box) != 4:
        raise _UnusableError("box that is not four finite numbers")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise _UnusableError("box without area")
    if min(x + width, size[1]) - max(x, 0) <= 0 or min(y + height, size[0]) - max(y, 0) <= 0:
        raise _UnusableError("box outside its image")
    if min(x, y) < -_ROUNDING or x + width > size[1] + _ROUNDING or y + height > size[0] + _ROUNDING:
        note("box that reaches beyond its image: cut in training, scored as it is")  # pycocotools scores it so
    return x, y, width, height


def _shape(segmentation: Any, size: Size, note: Callable[[str], None]) -> Shape:
    if isinstance(segmentation, list) and segmentation:
        return _polygons(segmentation, size, note)
    if isinstance(segmentation, dict):
        return _run_lengths(segmentation, size)
    raise _UnusableError("object without a mask")


def _polygons(polygons: list[Any], size: Size, note: Callable[[str], None]) -> Polygons:
    numbers = [_numbers(polygon) or [] for polygon in polygons]
    outlines = tuple(np.asarray(each) for each in numbers if len(each) >= 6 and len(each) % 2 == 0)
    if not outlines:
        raise _UnusableError("mask without a polygon of three or more finite points")
    if len(outlines) < len(polygons):
        note("polygon that is not three or more finite points, left out of its mask")
    near = tuple(outline for outline in outlines if _is_near(outline, size))
    points = np.concatenate([outline.reshape(-1, 2) for outline in near or outlines])
    if (points.max(0) <= 0).any() or (points.min(0) >= (size[1], size[0])).any():
        raise _UnusableError("mask outside its image")
    if not near:
        raise _UnusableError("mask that reaches further than an image's size beyond its image")
    if len(near) < len(outlines):
        note("polygon that reaches further than an image's size beyond its image, left out of its mask")
    return Polygons(near)


def _is_near(outline: NDArray[np.float64], size: Size) -> bool:
    """False for a polygon with a point so far away that drawing it would fill the memory."""
    points, sides = outline.reshape(-1, 2), (size[1], size[0])
    return bool((points >= np.negative(sides)).all() and (points <= np.multiply(sides, 2)).all())


def _run_lengths(segmentation: dict[str, Any], size: Size) -> RunLengths:
    if segmentation.get("size") != list(size):
        raise _UnusableError("mask of another size than its image")
    counts = segmentation.get("counts")
    try:
        lengths = unpacked(counts) if isinstance(counts, str) else np.asarray(counts, dtype=np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        raise _UnusableError("mask of unreadable run lengths") from error
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != math.prod(size):
        raise _UnusableError("mask whose run lengths do not fill its image")
    return RunLengths(lengths)


def _numbers(value: Any) -> list[float] | None:
    """A list of finite numbers; None for everything else."""
    if not isinstance(value, list):
        return None
    if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in value):
        return None
    return [float(number) for number in value] if all(map(_is_finite, value)) else None


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond float64
        return False


def _files(
    folder: Path, listed: Iterable[tuple[str, Size]], max_megapixels: float
) -> tuple[tuple[str, ...], list[int], dict[int, str]]:
    """Name and bytes of every image file, and why some cannot be read, as far as names, sizes and annotations tell."""
    if not os.path.isdir(folder):
        raise DataError(str(folder), "there is no such folder", "Set data.root, data.train_images and data.val_images.")
    names, found, faults = [], [], {}
    for number, (listed_name, size) in enumerate(listed):
        name, length = _file(folder, listed_name)
        names.append(name)
        found.append(length)
        if reason := file_fault(length):
            faults[number] = reason
        elif math.prod(size) > max_megapixels * 1e6:
            faults[number] = f"has {size_text(size)} pixels, more than data.max_megapixels {max_megapixels:g}"
    return tuple(names), found, faults


def _file(folder: Path, name: str) -> tuple[str, int]:
    """The name and the bytes of an image file: with slashes if there is none with the backslashes of its list."""
    length, other = bytes_at(folder / name), _with_slashes(name)
    return (other, bytes_at(folder / other)) if length == NOT_A_FILE and other != name else (name, length)


def check_same_categories(train: CocoSplit, val: CocoSplit) -> None:
    """Raises DataError if the two files number or name their categories differently."""
    ours, theirs = (set(zip(split.categories.ids or (), split.categories.names, strict=True)) for split in (train, val))
    if ours != theirs:
        only = [f"{number} {name} in training" for number, name in sorted(ours - theirs)]
        only += [f"{number} {name} in validation" for number, name in sorted(theirs - ours)]
        got = f"{len(only)} categories are in one of the two files only: {shorten(only)}"
        raise DataError("data.val_annotations", got, "Give both files the same ids and names.")


def check_apart(train: CocoSplit, val: CocoSplit) -> None:
    """Raises DataError if validation would run on training images."""
    images = train.images
    taught = (images.folder / name for name in images.names)
    refuse_shared("data.val_annotations", taught, {name: val.images.folder / name for name in val.images.names})
