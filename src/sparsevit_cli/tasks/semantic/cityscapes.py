"""Cityscapes as downloaded: leftImg8bit and gtFine, a folder for each city.

The archive holds labelIds alone. The 19 classes that are scored have their train ids by the table of cityscapesScripts
(`helpers/labels.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

from sparsevit_cli.data.images import is_system_name
from sparsevit_cli.errors import DataError

from .labels import IGNORED, LabelMap
from .pairing import paired
from .records import Pair, Pairs

IMAGES, MASKS = "leftImg8bit", "gtFine"
_IMAGE_END, _MASK_END = "_leftImg8bit.png", "_gtFine_labelIds.png"
_LABEL_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
_TRAIN_IDS = {number: train_id for train_id, number in enumerate(_LABEL_IDS.values())}
_LAST_LABEL_ID = 33
CITYSCAPES = LabelMap(
    tuple(_LABEL_IDS),
    tuple((dict.fromkeys(range(_LAST_LABEL_ID + 1), IGNORED) | _TRAIN_IDS).items()),
    f"labelIds are 0 to {_LAST_LABEL_ID}, is it a file of train ids?",
    "Take the masks as downloaded.",
)


def read_cityscapes(root: Path, split: str, max_megapixels: float) -> Pairs:
    """List a split, without opening an image. Raises DataError for a half or a file of it that is not there."""
    for half in (IMAGES, MASKS):
        if not os.path.isdir(root / half):
            got = f"there is no folder {half} in {root}"
            raise DataError("data.root", got, f"Give the folder that holds {IMAGES} and {MASKS}; both are needed.")
    images, masks = (_listed(root / half / split, end) for half, end in ((IMAGES, _IMAGE_END), (MASKS, _MASK_END)))
    pairs = [
        Pair(key, f"{IMAGES}/{split}/{key}{_IMAGE_END}", f"{MASKS}/{split}/{key}{_MASK_END}")
        for key in paired(split, images, masks, f"*{_IMAGE_END}", f"*{_MASK_END}")
    ]
    return Pairs.listed(root, split, pairs, CITYSCAPES, max_megapixels)


def _listed(folder: Path, end: str) -> set[str]:
    """`city/name` of the files below `folder` whose name has this end."""
    if not os.path.isdir(folder):
        raise DataError(
            "data: split folder", f"there is no folder {folder}", "Set data.train_split and data.val_split."
        )
    found = set()
    for city in sorted(os.listdir(folder)):
        if is_system_name(city) or not os.path.isdir(folder / city):
            continue
        found |= {f"{city}/{name.removesuffix(end)}" for name in os.listdir(folder / city) if name.endswith(end)}
    return found
