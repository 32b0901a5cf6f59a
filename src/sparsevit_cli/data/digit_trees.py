"""The scenes of digits as files, in the layouts of COCO and of Cityscapes: both readers can be tried offline.

usage: python -m sparsevit_cli.data.digit_trees coco|cityscapes FOLDER [--canvas 192] [--train 1200] [--val 200]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparsevit_cli.atomic import write_json
from sparsevit_cli.config.paths import as_path
from sparsevit_cli.errors import ConfigError, ThreePartError

from .digit_scenes import SCENES, DigitScenes, Scene
from .digits import DigitsSpec, Split

Mask = NDArray[np.bool_]
Loop = list[tuple[int, int]]
"""Corners (x, y) of a closed line along the edges of pixels."""

COCO_IDS = (1, 2, 3, 5, 7, 11, 13, 17, 19, 90)
"""Category ids of the digits 0 to 9, with gaps as COCO's."""
COCO_SPLITS: Mapping[Split, str] = {"train": "train2017", "val": "val2017"}

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22)
"""Label ids of the digits 0 to 9: Cityscapes' road, sidewalk, building, wall, fence, pole, traffic light, traffic
sign, vegetation and terrain.
"""
BACKGROUND_ID = 23
"""Cityscapes' sky."""
CITIES: Mapping[Split, tuple[str, ...]] = {"train": ("aachen", "bochum"), "val": ("lindau",)}

COUNTS: Mapping[Split, int] = {"train": SCENES["train"], "val": SCENES["val"]}


def write_coco(
    root: Path,
    *,
    spec: DigitsSpec,
    seed: int = 0,
    counts: Mapping[Split, int] = COUNTS,
) -> None:
    """Write `counts` scenes of each split below `root`, as COCO 2017 has them.

    Images are `train2017/000000000001.png` and so on, annotations `annotations/instances_train2017.json`. Polygons run
    along the edges of pixels, so that they cover the masks exactly; a digit with a hole has several. Raises ConfigError
    if `root` holds something, ResourceError on a full disk.
    """
    _refuse_taken(root)
    for split, folder in COCO_SPLITS.items():
        scenes = DigitScenes(spec, split, seed, count=counts[split])
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(len(scenes)):
            scene, number = scenes[index], 1 + 3 * index  # COCO's image ids have gaps too
            name = f"{number:012d}.png"
            _write_image(root / folder / name, scene)
            height, width = scene.image.shape[1:]
            images.append({"id": number, "file_name": name, "height": height, "width": width, "license": 1})
            for annotation in _annotations(scene):
                annotations.append({"id": len(annotations) + 1, "image_id": number, "iscrowd": 0, **annotation})
        document = {
            "info": {"description": "scenes of handwritten digits", "version": "1"},
            "licenses": [{"id": 1, "name": "as scikit-learn's digits", "url": ""}],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": number, "name": name, "supercategory": "digit"}
                for number, name in zip(COCO_IDS, scenes.names, strict=True)
            ],
        }
        write_json(root / "annotations" / f"instances_{folder}.json", document)


def _annotations(scene: Scene) -> Iterator[dict[str, Any]]:
    for box, label, mask in zip(scene.boxes.tolist(), scene.labels.tolist(), scene.masks.numpy(), strict=True):
        left, top, right, bottom = box
        yield {
            "category_id": COCO_IDS[label],
            "bbox": [left, top, right - left, bottom - top],
            "area": int(mask.sum()),
            "segmentation": polygons(mask),
        }


def write_cityscapes(root: Path, *, spec: DigitsSpec, seed: int = 0, counts: Mapping[Split, int] = COUNTS) -> None:
    """Write `counts` scenes of each split below `root`, as Cityscapes has them.

    Images are `leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png` and so on; beside each of them is
    `gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png` with LABEL_IDS and BACKGROUND_ID. Raises as
    `write_coco`.
    """
    _refuse_taken(root)
    ids = np.array([BACKGROUND_ID, *LABEL_IDS], dtype=np.uint8)
    for split, cities in CITIES.items():
        scenes = DigitScenes(spec, split, seed, count=counts[split])
        for index in range(len(scenes)):
            scene, city = scenes[index], cities[index % len(cities)]
            name = f"{city}_{index // len(cities):06d}_000019"  # Cityscapes labels frame 19 of each sequence
            _write_image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", scene)
            truth = root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png"
            truth.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids[scene.class_map.numpy()]).save(truth)


def _write_image(path: Path, scene: Scene) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.grey()).convert("RGB").save(path)


def _refuse_taken(root: Path) -> None:
    if root.is_dir() and any(root.iterdir()):
        raise ConfigError(str(root), "the folder holds something", "Name a folder that is empty or not there.")


# -- masks as COCO writes them ----------------------------------------------------------------------------------


def polygons(mask: Mask) -> list[list[int]]:
    """Polygons [x0, y0, x1, y1, ...] whose union is a mask (H, W): outlines along the edges of pixels.

    COCO's polygons have no holes: a mask with a hole is cut in two through the hole.
    """
    loops = outlines(mask)
    hole = next((loop for loop in loops if _twice_area(loop) < 0), None)
    if hole is None:
        return [[value for corner in loop for value in corner] for loop in loops]
    columns = np.arange(mask.shape[1]) <= min(x for x, _ in hole)  # the hole's first column: cut beside it
    return polygons(mask & columns) + polygons(mask & ~columns)


def outlines(mask: Mask) -> list[Loop]:
    """The lines around a mask (H, W), their corners in order; those around holes run the other way round."""
    padded = np.pad(mask, 1)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for dy, dx in ((-1, 0), (0, 1), (1, 0), (0, -1)):  # the neighbour on whose side an edge lies
        beside = padded[1 + dy : 1 + dy + mask.shape[0], 1 + dx : 1 + dx + mask.shape[1]]
        for y, x in np.argwhere(mask & ~beside).tolist():
            # clockwise as seen on the screen, with the mask on the right
            start = (x + (dx > 0 or dy > 0), y + (dy > 0 or dx < 0))
            end = (start[0] - dy, start[1] + dx)
            following.setdefault(start, []).append(end)
    return list(_loops(following))


def _loops(following: dict[tuple[int, int], list[tuple[int, int]]]) -> Iterator[Loop]:
    while following:
        first = next(iter(following))
        loop, here, step = [first], first, (0, 0)
        while True:
            ends = following[here]
            # Where two pixels touch by a corner, turn right: their lines stay apart.
            right = (here[0] - step[1], here[1] + step[0])
            end = right if len(ends) > 1 and right in ends else ends[0]
            ends.remove(end)
            if not ends:
                del following[here]
            direction = (end[0] - here[0], end[1] - here[1])
            if direction == step:
                loop.pop()  # a corner on a straight line is none
            here, step = end, direction
            if here == first:
                break
            loop.append(here)
        yield loop


def _twice_area(loop: Loop) -> int:
    """Twice the area inside a loop that is clockwise on the screen; negative for one around a hole."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, [*loop[1:], loop[0]], strict=True))


# -- the command ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Write one tree, as typed; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sparsevit_cli.data.digit_trees", description=__doc__)
    parser.add_argument("layout", choices=("coco", "cityscapes"))
    parser.add_argument("folder", help="empty, or not there")
    parser.add_argument("--canvas", type=int, default=192, help="side of an image in pixels (%(default)s)")
    parser.add_argument("--train", type=int, default=COUNTS["train"], help="training images (%(default)s)")
    parser.add_argument("--val", type=int, default=COUNTS["val"], help="validation images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="every draw is a function of it (%(default)s)")
    typed = parser.parse_args(arguments)
    counts: Mapping[Split, int] = {"train": typed.train, "val": typed.val}
    write = write_coco if typed.layout == "coco" else write_cityscapes
    try:
        root = as_path(typed.folder, "folder")
        write(root, spec=DigitsSpec(typed.canvas), seed=typed.seed, counts=counts)
    except ThreePartError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"layout": typed.layout, "folder": str(root), **counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
