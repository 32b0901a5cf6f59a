"""What an image holds: objects with category, box and mask, at the image's own size; and many of them in few arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsevit_cli.sizes import Size

from .masks import Polygons, RunLengths, Shape


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


class Truths:
    """The truths of many images, in a few arrays; each is made of them when it is asked for.

    Loader processes share the arrays with their parent. Objects of Python they would copy page by page, since counting
    references writes into them. Masks stay encoded: all points of polygons in one array, all run lengths in another.
    """

    def __init__(self, truths: Iterable[Truth]) -> None:
        images = list(truths)
        objects = [instance for truth in images for instance in truth.instances]
        outlines = [each.shape.outlines if isinstance(each.shape, Polygons) else () for each in objects]
        counts = [[each.shape.counts] if isinstance(each.shape, RunLengths) else [] for each in objects]
        self._ids = _whole([truth.image_id for truth in images])
        self._sizes = _whole([side for truth in images for side in truth.size]).reshape(-1, 2)
        self._first = _starts(len(truth.instances) for truth in images)
        self._labels = _whole([each.label for each in objects])
        self._boxes = np.array([each.box for each in objects], dtype=np.float64).reshape(-1, 4)
        self._areas = np.array([each.area for each in objects], dtype=np.float64)
        self._crowds = np.array([each.crowd for each in objects], dtype=np.bool_)
        self._first_outline, self._first_counts = _starts(map(len, outlines)), _starts(map(len, counts))
        self._outlines = _Ragged(list(chain.from_iterable(outlines)))
        self._counts = _Ragged(list(chain.from_iterable(counts)))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Truth:
        index = range(len(self))[index]
        numbers = _between(self._first, index)
        return Truth(int(self._ids[index]), self.size(index), tuple(map(self._instance, numbers)))

    def size(self, number: int) -> Size:
        """Height and width of an image in pixels."""
        height, width = self._sizes[number]
        return int(height), int(width)

    def objects(self) -> NDArray[np.int64]:
        """How many objects each image holds, crowds among them: (images,)."""
        counts: NDArray[np.int64] = np.diff(self._first).astype(np.int64)
        return counts

    def learned(self) -> NDArray[np.int64]:
        """How many objects of each image are no crowds: (images,)."""
        before = np.concatenate([[0], np.cumsum(~self._crowds)])
        counts: NDArray[np.int64] = np.diff(before[self._first]).astype(np.int64)
        return counts

    def _instance(self, number: int) -> Instance:
        x, y, width, height = self._boxes[number].tolist()
        return Instance(
            int(self._labels[number]), (x, y, width, height), float(self._areas[number]), self._shape(number),
            bool(self._crowds[number]),
        )  # fmt: skip

    def _shape(self, number: int) -> Shape | None:
        if outlines := _between(self._first_outline, number):
            return Polygons(tuple(self._outlines[at] for at in outlines))
        if counts := _between(self._first_counts, number):
            return RunLengths(self._counts[counts[0]])
        return None


class _Ragged:
    """Arrays of different lengths and one type, end to end."""

    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        values = np.concatenate(arrays) if arrays else np.zeros(0)
        self.values = _whole(values) if values.dtype.kind == "i" else values
        self.first = _starts(map(len, arrays))

    def __getitem__(self, number: int) -> NDArray[Any]:
        within = _between(self.first, number)
        return self.values[within.start : within.stop]


def _between(first: NDArray[Any], number: int) -> range:
    """The positions of the parts of `number`, of which `first` holds the first ones."""
    return range(int(first[number]), int(first[number + 1]))


def _starts(lengths: Iterable[int]) -> NDArray[Any]:
    """Where each of some parts begins, end to end, and where the last one ends."""
    return _whole(list(accumulate(lengths, initial=0)))


def _whole(numbers: Sequence[int] | NDArray[Any]) -> NDArray[Any]:
    """Whole numbers in four bytes each, in eight where one needs them; as they are where a file has larger ones."""
    try:
        wide = np.asarray(numbers, dtype=np.int64)
    except OverflowError:
        return np.array(numbers, dtype=object)
    small = np.iinfo(np.int32)
    fits = not wide.size or (small.min <= wide.min() and wide.max() <= small.max)
    return wide.astype(np.int32) if fits else wide
