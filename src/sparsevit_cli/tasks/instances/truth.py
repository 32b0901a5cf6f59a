"""What an image holds: objects with category, box and mask, at the image's own size."""

from __future__ import annotations

from dataclasses import dataclass

from sparsevit_cli.sizes import Size

from .masks import Shape


@dataclass(frozen=True, eq=False)
class Instance:
    """One object. `label` counts categories from 0; `box` is x, y, width, height in pixels, as COCO writes it.

    `area` is in pixels; a `crowd` stands for many objects: it is not trained on, and detections in it are no faults.
    """

    label: int
    box: tuple[float, float, float, float]
    area: float
    shape: Shape | None = None
    crowd: bool = False


@dataclass(frozen=True, eq=False)
class Truth:
    """The objects of one image of `size` (height, width). A leaf of a batch: the model does not get it."""

    image_id: int
    size: Size
    instances: tuple[Instance, ...]
