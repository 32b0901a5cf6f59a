"""Cut two aerial photographs with 853 trees into tiles, as a COCO tree for configs/trees.yaml: much of them is meadow.

usage: pip install --no-deps deepforest && python examples/trees.py trees

The photographs and boxes come from the package deepforest (MIT), which the user installs: National Ecological
Observatory Network, Yellowstone, 0.1 m per pixel. Every fourth tile is for validation, so both splits show one place.
"""

import importlib.util
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from PIL import Image

PHOTOGRAPHS = ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop")
TILE, LEAST_SHARE = 400, 0.3
"""Side of a tile in pixels; a tree belongs to a tile that holds this share of its box."""


def boxes_of(path: Path) -> list[list[float]]:
    """x0, y0, x1, y1 of all trees, in pixels."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    return [[float(box.findtext(side, "")) for side in sides] for box in ET.parse(path).iter("bndbox")]


def inside(box: list[float], left: int, top: int) -> list[float] | None:
    """COCO's x, y, width, height of a box in the tile at (left, top); None if too little of it is there."""
    x0, y0, x1, y1 = box
    cut = [max(x0 - left, 0), max(y0 - top, 0), min(x1 - left, TILE), min(y1 - top, TILE)]
    width, height = cut[2] - cut[0], cut[3] - cut[1]
    if width <= 0 or height <= 0 or width * height < LEAST_SHARE * (x1 - x0) * (y1 - y0):
        return None
    return [cut[0], cut[1], width, height]


def main(target: Path) -> None:
    spec = importlib.util.find_spec("deepforest")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("trees.py: deepforest is not installed. Type: pip install --no-deps deepforest")
    data = Path(spec.submodule_search_locations[0]) / "data"
    images: dict[str, list] = {"train2017": [], "val2017": []}
    annotations: dict[str, list] = {"train2017": [], "val2017": []}
    number = 0
    for name in PHOTOGRAPHS:
        photograph, boxes = Image.open(data / f"{name}.png").convert("RGB"), boxes_of(data / f"{name}.xml")
        for top in range(0, photograph.height - TILE + 1, TILE):
            for left in range(0, photograph.width - TILE + 1, TILE):
                number += 1
                split = "val2017" if number % 4 == 0 else "train2017"
                file = f"{name[-5:]}_{top}_{left}.png"
                (target / split).mkdir(parents=True, exist_ok=True)
                photograph.crop((left, top, left + TILE, top + TILE)).save(target / split / file)
                images[split].append({"id": number, "file_name": file, "width": TILE, "height": TILE})
                for x, y, width, height in filter(None, (inside(box, left, top) for box in boxes)):
                    annotations[split].append({
                        "id": len(annotations["train2017"]) + len(annotations["val2017"]) + 1, "image_id": number,
                        "category_id": 1, "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0,
                    })  # fmt: skip
    (target / "annotations").mkdir(exist_ok=True)
    for split, listed in images.items():
        trees = annotations[split]
        document = {"images": listed, "annotations": trees, "categories": [{"id": 1, "name": "tree"}]}
        (target / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
        print(f"{split}: {len(listed)} tiles, {len(trees)} trees")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).expanduser())
