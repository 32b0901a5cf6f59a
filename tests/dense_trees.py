"""Tiny trees in the real layouts of COCO, Cityscapes and ADE20K, with their quirks, not by the package's writers.

`coco_tree` and `cityscapes_tree` give the folder and the truth that a reader must find in it. `broken` names one thing
that is wrong with a tree: BROKEN_COCO and BROKEN_CITYSCAPES say what each means.

Sources: cocodataset.org/#format-data; pycocotools (run-length codes); cityscapesScripts, helpers/labels.py (ids) and
preparation/json2labelImg.py (a polygon whose id is negative, a licence plate, is not drawn).
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_masks

Mask = NDArray[np.bool_]


def huge_png(path: Path, width: int = 60_000, height: int = 40_000) -> None:
    """A PNG whose header tells a size that no memory holds; there are no pixels in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def cut(path: Path) -> None:
    """Leave the first third of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


# -- COCO -------------------------------------------------------------------------------------------------------

COCO_CATEGORIES = {1: "person", 2: "bicycle", 3: "car", 13: "stop sign", 90: "toothbrush"}
"""Ids with gaps, as the 80 of COCO have between 1 and 90. No toothbrush is in any image."""

BROKEN_COCO: Mapping[str, str] = {
    "no_annotation_file": "the file of val2017 is not there",
    "empty_annotation_file": "the file of train2017 has no bytes",
    "not_json": "the file of train2017 is no JSON",
    "not_coco": "the file of train2017 is a JSON list",
    "no_images": "train2017 lists no images",
    "no_categories": "train2017 lists no categories",
    "train_without_objects": "train2017 has no annotations",
    "val_without_objects": "val2017 has no annotations",
    "no_image_folder": "the folder val2017 is not there",
    "image_ids_repeat": "two images of train2017 have one id",
    "annotation_ids_repeat": "two annotations of train2017 have one id",
    "category_ids_repeat": "two categories have one id",
    "category_names_repeat": "two categories that are used have one name",
    "spare_category": "the first category has the name of another one, and nothing uses it: Roboflow writes it so",
    "other_categories": "val2017 has another category than train2017",
    "unknown_category": "an annotation of train2017 has a category id that is not listed",
    "unknown_image": "an annotation of train2017 has an image id that is not listed",
    "missing_image": "the file of an image of train2017 is not there",
    "missing_val_image": "the file of an image of val2017 is not there",
    "cut_image": "the file of an image of train2017 ends early",
    "huge_image": "an image of train2017 is above every pixel limit",
    "image_of_another_size": "an image of train2017 has another size than its list says",
    "size_before_turning": "the list has the size of a turned JPEG as it is stored, not upright",
    "mask_of_another_size": "a run-length code of train2017 has another size than its image",
    "runs_too_long": "a run-length code of train2017 has more pixels than its size",
    "two_points": "a polygon of train2017 has two points",
    "odd_polygon": "a polygon of train2017 has an odd number of coordinates",
    "no_segmentation": "an annotation of train2017 has no mask",
    "nan_box": "a box of train2017 holds NaN",
    "short_box": "a box of train2017 has three numbers",
    "box_outside": "a box and a mask of train2017 lie outside of their image",
    "mask_sticks_out": "a polygon of train2017 reaches beyond its image",
}


@dataclass(frozen=True)
class Thing:
    """One object: the id in the file, of its category too, its box x0 y0 x1 y1, and its mask (H, W)."""

    number: int
    category: int
    box: tuple[float, float, float, float]
    mask: Mask


@dataclass(frozen=True)
class CocoSplit:
    """What a reader finds in one split: `sizes` (height, width) by image id, upright, in the order of the file.

    `things` are the objects to learn, by image id; `crowds` those that stand for many, in the same way; `degenerate`
    are the ids of annotations whose box has no area.
    """

    sizes: Mapping[int, tuple[int, int]]
    things: Mapping[int, tuple[Thing, ...]]
    crowds: Mapping[int, tuple[Thing, ...]]
    degenerate: tuple[int, ...]

    @property
    def empty(self) -> tuple[int, ...]:
        """Images without an object to learn."""
        return tuple(image for image in self.sizes if not self.things.get(image))


@dataclass(frozen=True)
class CocoTree:
    """A tree and its truth."""

    root: Path
    train: CocoSplit
    val: CocoSplit


@dataclass
class _Split:
    """A split while it is written."""

    folder: Path
    seed: int
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    things: dict[int, list[Thing]] = field(default_factory=dict)
    crowds: dict[int, list[Thing]] = field(default_factory=dict)
    degenerate: list[int] = field(default_factory=list)

    def image(
        self, number: int, size: tuple[int, int], *objects: dict[str, Any], grey: bool = False, turned: bool = False
    ) -> None:
        """An image (height, width), noise with a brighter patch where each object is, and its annotations."""
        height, width = size
        pixels = np.random.default_rng([self.seed, number]).integers(20, 90, (height, width, 3), dtype=np.uint8)
        self.sizes[number] = size
        for each in objects:
            self._annotate(number, size, pixels, **each)
        picture = Image.fromarray(pixels[:, :, 0] if grey else pixels)
        exif = Image.Exif()
        if turned:  # stored on its side, with the note that it is to be turned by 90 degrees when shown
            picture = picture.transpose(Image.Transpose.ROTATE_90)
            exif[0x0112] = 6
        name = f"{number:012d}.jpg"
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.save(self.folder / name, quality=95, exif=exif)
        self.images.append(
            {
                "license": 4, "file_name": name, "height": height, "width": width, "id": number,
                "coco_url": f"http://images.cocodataset.org/{self.folder.name}/{name}",
                "date_captured": "2013-11-14 11:18:45", "flickr_url": "http://farm7.staticflickr.com/x.jpg",
            }
        )  # fmt: skip

    def _annotate(
        self, image: int, size: tuple[int, int], pixels: NDArray[np.uint8], *, category: int,
        parts: tuple[tuple[int, int, int, int], ...], form: str = "polygon", crowd: bool = False,
        box: tuple[float, float, float, float] | None = None,
    ) -> None:  # fmt: skip
        """An annotation whose mask is the union of rectangles (x0, y0, x1, y1); ids are far apart, as COCO's are."""
        mask = np.zeros(size, dtype=bool)
        for x0, y0, x1, y1 in parts:
            mask[y0:y1, x0:x1] = True
        pixels[mask] = 120 + 20 * (category % 7)
        number = 1_000_000 + 531 * len(self.annotations) + self.seed
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        edges = (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))
        written = box or (edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1])
        forms: dict[str, Callable[[], Any]] = {
            "polygon": lambda: [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in parts],
            "runs": lambda: _runs(mask),
            "compressed": lambda: _compressed(mask),
        }
        self.annotations.append(
            {
                "segmentation": forms[form](), "area": float(mask.sum()), "iscrowd": int(crowd), "image_id": image,
                "bbox": list(written), "category_id": category, "id": number,
            }
        )  # fmt: skip
        if min(written[2:]) <= 0:
            self.degenerate.append(number)
        else:
            (self.crowds if crowd else self.things).setdefault(image, []).append(Thing(number, category, edges, mask))

    def document(self) -> dict[str, Any]:
        """The file of the split."""
        return {
            "info": {"description": "tiny", "url": "", "version": "1.0", "year": 2017, "contributor": "",
                     "date_created": "2017/09/01"},
            "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution"}],
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"supercategory": "thing", "id": n, "name": name} for n, name in COCO_CATEGORIES.items()],
        }  # fmt: skip

    def truth(self) -> CocoSplit:
        """What a reader finds."""
        things, crowds = ({image: tuple(each) for image, each in of.items()} for of in (self.things, self.crowds))
        return CocoSplit(self.sizes, things, crowds, tuple(self.degenerate))


def _runs(mask: Mask) -> dict[str, Any]:
    """COCO's uncompressed run-length code, counted pixel by pixel."""
    counts, value = [0], False
    for pixel in mask.ravel(order="F").tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"counts": counts, "size": list(mask.shape)}


def _compressed(mask: Mask) -> dict[str, Any]:
    """COCO's compressed run-length code as its JSON holds it: counts are text."""
    code = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"counts": code["counts"].decode(), "size": list(mask.shape)}


def coco_tree(root: Path, *, broken: str | None = None) -> CocoTree:
    """`annotations/instances_{train,val}2017.json` and the images beside it; `broken` is a name of BROKEN_COCO.

    train2017: objects of one part and of three; a crowd; an image without annotations, and one with a crowd alone; a
    grey JPEG; a JPEG that EXIF turns; masks as polygons and as both run-length codes; an image whose only two boxes
    have no height, as two of COCO's own, and one more beside a good box. Sizes differ, and none is a multiple of 32.
    """
    train, val = _Split(root / "train2017", 0), _Split(root / "val2017", 1)
    several = {"category": 1, "parts": ((10, 5, 20, 15), (10, 25, 20, 35), (14, 40, 30, 44))}
    train.image(391895, (48, 70), several, {"category": 2, "parts": ((40, 10, 62, 40),)})
    train.image(522418, (70, 50), {"category": 3, "parts": ((5, 5, 45, 30),)}, grey=True)
    train.image(184613, (40, 60))
    train.image(318219, (66, 42), {"category": 13, "parts": ((0, 0, 20, 33),)}, turned=True)
    crowd = {"category": 1, "parts": ((30, 0, 60, 45), (2, 30, 30, 40)), "form": "runs", "crowd": True}
    train.image(554625, (45, 60), {"category": 1, "parts": ((3, 3, 25, 25),), "form": "compressed"}, crowd)
    train.image(574769, (52, 52), {"category": 3, "parts": ((8, 8, 40, 44),), "form": "runs"},
                {"category": 2, "parts": ((41, 0, 45, 1),), "box": (41.5, 0.2, 3.03, 0.0)})  # fmt: skip
    train.image(60623, (50, 64), *({"category": 1, "parts": ((9, y, 25, y + 1),), "box": (9.98, float(y), 15.52, 0.0)}
                                   for y in (20, 30)))  # fmt: skip
    train.image(309022, (56, 56), {**crowd, "parts": ((0, 0, 56, 20),)})
    for number in (5802, 222564, 118113, 193271):  # enough for batches and for a search split
        train.image(number, (60, 60), {"category": 1 + number % 3, "parts": ((10, 10, 50, 50),)})
    val.image(
        397133, (47, 64), {"category": 1, "parts": ((5, 5, 35, 40),)}, {"category": 3, "parts": ((40, 8, 60, 30),)}
    )
    val.image(37777, (36, 55))
    val.image(252219, (64, 44), {**crowd, "parts": ((0, 0, 44, 20),)}, {"category": 2, "parts": ((4, 30, 40, 60),)})
    documents = {"train": train.document(), "val": val.document()}
    (root / "annotations").mkdir(parents=True)
    for name in ("captions_train2017.json", "person_keypoints_val2017.json"):  # what the archive has beside them
        (root / "annotations" / name).write_text('{"annotations": []}')
    if broken is not None:
        _break_document(broken, documents)
    for split, document in documents.items():
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))
    if broken is not None:
        _break_coco_files(root, broken, train)
    return CocoTree(root, train.truth(), val.truth())


def _break_document(broken: str, documents: dict[str, dict[str, Any]]) -> None:
    assert broken in BROKEN_COCO, broken
    train, val = documents["train"], documents["val"]
    first, second = train["annotations"][:2]
    coded = next(each for each in train["annotations"] if isinstance(each["segmentation"], dict) and each["iscrowd"])
    changes: dict[str, Callable[[], object]] = {
        "no_images": lambda: train.update(images=[], annotations=[]),
        "no_categories": lambda: train.update(categories=[]),
        "train_without_objects": lambda: train.update(annotations=[]),
        "val_without_objects": lambda: val.update(annotations=[]),
        "image_ids_repeat": lambda: train["images"][1].update(id=train["images"][0]["id"]),
        "annotation_ids_repeat": lambda: second.update(id=first["id"]),
        "category_ids_repeat": lambda: train["categories"].append({"id": 1, "name": "again"}),
        "category_names_repeat": lambda: train["categories"][2].update(name="person"),
        "spare_category": lambda: [
            each["categories"].insert(0, {"id": 0, "name": "car", "supercategory": "none"}) for each in (train, val)
        ],
        "other_categories": lambda: val["categories"].append({"id": 44, "name": "bottle"}),
        "unknown_category": lambda: first.update(category_id=12),
        "unknown_image": lambda: first.update(image_id=999_999),
        "image_of_another_size": lambda: train["images"][0].update(height=96, width=140),
        "mask_of_another_size": lambda: coded["segmentation"].update(size=[90, 120]),
        "runs_too_long": lambda: coded["segmentation"]["counts"].append(10_000),
        "two_points": lambda: first.update(segmentation=[[10, 5, 20, 15]]),
        "odd_polygon": lambda: first.update(segmentation=[[10, 5, 20, 5, 20, 15, 10]]),
        "no_segmentation": lambda: first.pop("segmentation"),
        "nan_box": lambda: first.update(bbox=[math.nan, 5, 10, 10]),
        "short_box": lambda: first.update(bbox=[10, 5, 10]),
        "box_outside": lambda: first.update(bbox=[500, 500, 10, 10], segmentation=[[500, 500, 510, 500, 510, 510]]),
        "mask_sticks_out": lambda: second.update(
            segmentation=[[40, 10, 90, 10, 90, 40, 40, 40]], bbox=[40, 10, 50, 30]
        ),
        "size_before_turning": lambda: [
            each.update(height=each["width"], width=each["height"]) for each in train["images"] if each["id"] == 318219
        ],
    }
    changes.get(broken, lambda: None)()


def _break_coco_files(root: Path, broken: str, train: _Split) -> None:
    files = {split: root / "annotations" / f"instances_{split}2017.json" for split in ("train", "val")}
    image, val_image = train.folder / train.images[0]["file_name"], root / "val2017" / "000000037777.jpg"
    changes: dict[str, Callable[[], object]] = {
        "no_annotation_file": files["val"].unlink,
        "empty_annotation_file": lambda: files["train"].write_text(""),
        "not_json": lambda: files["train"].write_text(files["train"].read_text()[:-40]),
        "not_coco": lambda: files["train"].write_text("[1, 2]"),
        "no_image_folder": lambda: (root / "val2017").rename(root / "elsewhere"),
        "missing_image": image.unlink,
        "missing_val_image": val_image.unlink,
        "cut_image": lambda: cut(image),
        "huge_image": lambda: huge_png(image),  # Pillow looks at the bytes, not at the name
    }
    changes.get(broken, lambda: None)()


# -- Cityscapes -------------------------------------------------------------------------------------------------

TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
             28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
"""Label id to train id of Cityscapes' 19 classes; all other ids, 0 to 33, are ignored."""
IGNORED = 255
CITYSCAPES_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

BROKEN_CITYSCAPES: Mapping[str, str] = {
    "no_gtfine": "the half with the labels is not there",
    "no_images": "the half with the images is not there",
    "no_val": "neither half has a folder val",
    "empty_city": "a city of train has images and no labels",
    "missing_label": "one label image of train is not there",
    "missing_image": "one image of val is not there",
    "only_polygons": "val has polygons alone: no label image was made",
    "label_of_another_size": "a label image of train has another size than its image",
    "value_outside": "a label image of train holds 77, which is no label id",
    "value_255": "a label image of train holds 255: other tools write the -1 of licence plates so",
    "colours": "a label image of train is in colour",
    "sixteen_bits": "a label image of train has 16 bits, with the same values",
    "val_ignored": "no pixel of val has a class that counts",
    "cut_image": "an image of train ends early",
    "cut_label": "a label image of train ends early",
    "huge_image": "an image of train is above every pixel limit",
}


@dataclass(frozen=True)
class CityscapesTree:
    """A tree and its truth: the map (H, W) uint8 of train ids, IGNORED elsewhere, by the name `aachen_000000_000019`.

    `test` has the names of the test split, whose labels are not public.
    """

    root: Path
    train: Mapping[str, NDArray[np.uint8]]
    val: Mapping[str, NDArray[np.uint8]]
    test: tuple[str, ...]


CITIES: Mapping[str, tuple[str, ...]] = {
    "train": ("aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313", "hamburg_000000_042505",
              "hamburg_000000_044747", "zurich_000000_000019"),
    "val": ("frankfurt_000000_000294", "frankfurt_000001_000538", "munster_000000_000019"),
    "test": ("berlin_000000_000019", "mainz_000000_000093"),
}  # fmt: skip


def cityscapes_tree(root: Path, *, size: tuple[int, int] = (64, 128), broken: str | None = None) -> CityscapesTree:
    """`leftImg8bit` and `gtFine` as their archives unpack; `broken` is a name of BROKEN_CITYSCAPES.

    Beside `_labelIds.png` are `_color.png` (RGBA), `_instanceIds.png` (16 bits) and `_polygons.json`; train ids are not
    written, nor is there gtCoarse. Labels hold ids that do not count. The car has a licence plate: a polygon, of which
    label images show nothing. The test split has images and labels of the ego vehicle and borders alone.
    """
    by_label = np.array([TRAIN_IDS.get(label, IGNORED) for label in range(34)], dtype=np.uint8)
    truth: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for split, names in CITIES.items():
        truth[split] = {}
        for number, name in enumerate(names):
            labels = _street(size, number) if split != "test" else _hidden(size)
            _write_frame(root, split, name, labels, seed=(len(split), number))
            truth[split][name] = by_label[labels]
    (root / "license.txt").write_text("see the web page\n")
    if broken is not None:
        _break_cityscapes(root, broken)
    return CityscapesTree(root, truth["train"], truth["val"], tuple(truth["test"]))


def _street(size: tuple[int, int], number: int) -> NDArray[np.uint8]:
    """Label ids of a street: sky, buildings, trees, a road with a car, people, and what does not count."""
    height, width = size
    labels = np.full(size, 23, dtype=np.uint8)

    def fill(label: int, top: float, bottom: float, left: float, right: float) -> None:
        labels[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = label

    fill(11, 0.2, 0.6, 0, 0.4)  # building
    fill(21, 0.1, 0.6, 0.4, 0.6)  # vegetation
    fill(29, 0.45, 0.6, 0.6, 0.7)  # caravan: ignored
    fill(4, 0.3, 0.6, 0.7, 0.8)  # static: ignored
    fill(7, 0.6, 1, 0, 1)  # road
    fill(8, 0.6, 0.8, 0, 0.2)  # sidewalk
    fill(9, 0.6, 0.7, 0.8, 1)  # parking: ignored
    left = 0.3 + 0.05 * (number % 4)
    fill(26, 0.5, 0.8, left, left + 0.2)  # car
    fill(24, 0.45, 0.8, 0.1, 0.15)  # person
    fill(33, 0.6, 0.8, 0.85, 0.95)  # bicycle
    return _bordered(labels)


def _hidden(size: tuple[int, int]) -> NDArray[np.uint8]:
    return _bordered(np.zeros(size, dtype=np.uint8))  # unlabeled


def _bordered(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """With the bonnet of the ego vehicle, the rectification border and a line out of the region of interest."""
    labels[-4:, 10:-10] = 1
    labels[:, :2] = labels[:, -2:] = 2
    labels[0] = 3
    return labels


_COLOURS = np.random.default_rng(19).integers(0, 256, (34, 3), dtype=np.uint8)


def _write_frame(root: Path, split: str, name: str, labels: NDArray[np.uint8], seed: tuple[int, int]) -> None:
    height, width = labels.shape
    city = name.partition("_")[0]
    image, truth = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
    for folder in (image, truth):
        folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-9, 10, (height, width, 3))
    shade = _COLOURS[labels].astype(int) // 2 + 60 if split != "test" else np.full((height, width, 3), 90)
    Image.fromarray((shade + noise).astype(np.uint8)).save(image / f"{name}_leftImg8bit.png")
    Image.fromarray(labels).save(truth / f"{name}_gtFine_labelIds.png")
    opaque = np.full((height, width, 1), 255, dtype=np.uint8)
    Image.fromarray(np.concatenate([_COLOURS[labels], opaque], 2)).save(truth / f"{name}_gtFine_color.png")
    instances = np.where(np.isin(labels, (24, 25, 26, 27, 28, 31, 32, 33)), labels.astype(np.uint16) * 1000, labels)
    Image.fromarray(instances.astype(np.uint16)).save(truth / f"{name}_gtFine_instanceIds.png")
    corners = [[0, 0], [width, 0], [width, height], [0, height]]
    objects = [
        {"label": "sky", "polygon": corners},
        {"label": "license plate", "polygon": [[50, 40], [55, 40], [55, 43]]},
    ]
    polygons = {"imgHeight": height, "imgWidth": width, "objects": objects if split != "test" else []}
    (truth / f"{name}_gtFine_polygons.json").write_text(json.dumps(polygons))


def _break_cityscapes(root: Path, broken: str) -> None:
    assert broken in BROKEN_CITYSCAPES, broken
    images, labels = root / "leftImg8bit", root / "gtFine"
    image = images / "train" / "aachen" / "aachen_000000_000019_leftImg8bit.png"
    label = labels / "train" / "aachen" / "aachen_000000_000019_gtFine_labelIds.png"
    ids = np.array(Image.open(label))

    def rewrite(values: NDArray[Any], path: Path = label) -> None:
        Image.fromarray(values).save(path)

    def with_value(value: int) -> NDArray[np.uint8]:
        changed = ids.copy()
        changed[10:14, 20:30] = value
        return changed

    def each(pattern: str, change: Callable[[Path], object]) -> None:
        for path in sorted(labels.glob(pattern)):
            change(path)

    changes: dict[str, Callable[[], object]] = {
        "no_gtfine": lambda: labels.rename(root / "gtFine_trainvaltest"),
        "no_images": lambda: images.rename(root / "images"),
        "no_val": lambda: [half.joinpath("val").rename(half / "validation") for half in (images, labels)],
        "empty_city": lambda: each("train/hamburg/*", Path.unlink),
        "missing_label": label.unlink,
        "missing_image": (images / "val" / "munster" / "munster_000000_000019_leftImg8bit.png").unlink,
        "only_polygons": lambda: each("val/*/*.png", Path.unlink),
        "label_of_another_size": lambda: rewrite(ids[::2, ::2]),
        "value_outside": lambda: rewrite(with_value(77)),
        "value_255": lambda: rewrite(with_value(255)),
        "colours": lambda: rewrite(_COLOURS[ids]),
        "sixteen_bits": lambda: rewrite(ids.astype(np.uint16)),
        "val_ignored": lambda: each("val/*/*_labelIds.png", lambda path: rewrite(_hidden(ids.shape), path)),  # type: ignore[arg-type]
        "cut_image": lambda: cut(image),
        "cut_label": lambda: cut(label),
        "huge_image": lambda: huge_png(image),
    }
    changes[broken]()


# -- ADE20K -----------------------------------------------------------------------------------------------------


def squares(seed: int, numbers: tuple[int, ...], size: tuple[int, int] = (40, 64)) -> np.ndarray:
    """A mask (H, W) uint8 of blocks of 8 pixels, each of one of `numbers`."""
    height, width = size
    drawn = np.random.default_rng(seed).choice(numbers, (-(-height // 8), -(-width // 8)))
    return np.kron(drawn, np.ones((8, 8))).astype(np.uint8)[:height, :width]


def painted(mask: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) whose colours tell the numbers of a mask."""
    numbers = mask.astype(int)
    return np.stack([numbers * 5 % 256, numbers * 91 % 256, 255 - numbers * 5 % 256], -1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def ade_tree(root: Path, counts: Mapping[str, int] = {"training": 6, "validation": 3}) -> Path:
    """images and annotations as ADEChallengeData2016 unpacks: JPEG and grey PNG, 0 is no class, sizes differ."""
    for split, count in counts.items():
        for number in range(count):
            mask = squares(number + 100 * len(split), (0, 1, 2, 3), (40 + 8 * number, 64 - 4 * number))
            name = f"ADE_{split[:5]}_{number:08d}"
            save(root / "images" / split / f"{name}.jpg", painted(mask))
            save(root / "annotations" / split / f"{name}.png", mask)
    (root / "objectInfo150.txt").write_text("wall\nsky\ntree\n")
    return root
