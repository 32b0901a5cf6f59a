"""A small data set in COCO's form with the quirks of the real one, written by hand and by pycocotools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "box"}, {"id": 3, "name": "bar"}, {"id": 90, "name": "never seen"}]
"""In no order, with gaps, as ids are in COCO."""
Change = Callable[[dict[str, Any]], object]
SIZES = ((40, 60), (60, 40), (48, 48), (32, 64))


def coco_tree(root: Path, *, train: int = 12, val: int = 4, change: dict[str, Change] | None = None) -> Path:
    """Images and annotation files below `root`, named as COCO's; `change` is done to the document of a split."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count, first in (("train", train, 100), ("val", val, 900)):
        folder = root / f"{split}2017"
        folder.mkdir(exist_ok=True)
        document = annotated(folder, count, first)
        if change and split in change:
            change[split](document)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))
    return root


def annotated(folder: Path, count: int, first: int) -> dict[str, Any]:
    """The document of one split: bright rectangles on noise, in every form of mask; every fifth image is empty."""
    from pycocotools import mask as masks

    rng = np.random.default_rng(first)
    images, annotations = [], []
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        image_id, name = first + 7 * number, f"{first + 7 * number:012d}.png"
        images.append({"id": image_id, "file_name": name, "height": height, "width": width, "license": 1})
        for form in range(0 if number % 5 == 4 else 3):
            x, y = 2 + 12 * form, 3 + 9 * form
            w, h = 10, 8 + 4 * (form % 2)
            pixels[y : y + h, x : x + w] = 120 + 60 * form
            mask = np.zeros((height, width), dtype=np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            packed = masks.encode(mask)
            segmentation: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if form == 1:
                segmentation = {"size": packed["size"], "counts": packed["counts"].decode()}
            if form == 2:  # a crowd, in run lengths that are not compressed
                flat = mask.T.reshape(-1)
                edges = np.flatnonzero(np.diff(flat)) + 1
                segmentation = {"size": [height, width], "counts": np.diff([0, *edges, len(flat)]).tolist()}
            annotations.append(
                {
                    "id": 1000 + len(annotations), "image_id": image_id, "category_id": CATEGORIES[form % 2]["id"],
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": int(form == 2), "segmentation": segmentation,
                }
            )  # fmt: skip
        Image.fromarray(pixels).save(folder / name)
    return {"info": {}, "images": images, "annotations": annotations, "categories": [dict(row) for row in CATEGORIES]}
