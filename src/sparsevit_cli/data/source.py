"""What training and evaluation read from: samples, batches of them, and the three splits of a data set.

Nothing here knows a task. A sample is whatever a source gives, and a batch holds trees of tensors.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from sparsevit_cli.errors import CheckpointError, DataError
from sparsevit_cli.sizes import ImageSize, Size

_NAMES_SHOWN = 10
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """B samples: `inputs` for the model, `targets` for loss and score, and their numbers in the source (B,) int64.

    Inputs and targets are trees (dicts, tuples) whose leaves are tensors with B as their first dimension, or lists of
    one item per sample.
    """

    inputs: Any
    targets: Any
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> Batch:
        """The batch with inputs and targets on `device`."""
        inputs, targets = (
            tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
            for tree in (self.inputs, self.targets)
        )
        return Batch(inputs, targets, self.indices)

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in parts of `size` samples, the last one with what is left."""
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            yield Batch(part_of(self.inputs, part), part_of(self.targets, part), self.indices[part])

    def is_finite(self) -> Tensor:
        """(B,) bool: False for samples whose inputs hold NaN or infinity."""
        finite = torch.ones(len(self), dtype=torch.bool)
        for number, part in enumerate(self.parts(1)):
            tree_map(lambda leaf, at=number: _note_finite(finite, at, leaf), part.inputs)
        return finite


def part_of(tree: Any, part: slice) -> Any:
    """Some samples of the tree of a batch."""
    if isinstance(tree, Mapping):
        return {key: part_of(value, part) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(part_of(value, part) for value in tree)
    return tree[part]


def _note_finite(finite: Tensor, number: int, leaf: object) -> None:
    if isinstance(leaf, Tensor) and not leaf.isfinite().all():
        finite[number] = False


class BadImages:
    """Unreadable training images, each counted once; more than `max_fraction` of `total` is an error."""

    def __init__(self, total: int, max_fraction: float) -> None:
        self.total, self.max_fraction = total, max_fraction
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def too_many(self, count: int) -> bool:
        """True if `count` unreadable images are above the limit."""
        return count / self.total > self.max_fraction

    def note(self, faults: Iterable[tuple[str, str]]) -> None:
        """Count images, given as (name, reason); warn at the first of all. Raises DataError above the limit."""
        for name, reason in faults:
            if not self._reasons:
                _log.warning("%s: %s. Training goes on without unreadable images.", name, reason)
            self._reasons.setdefault(name, reason)
        if self.too_many(len(self)):
            listed = with_reasons(self._reasons.items())
            raise DataError(
                "data: unreadable training images",
                f"{len(self)} of {self.total}, above data.max_bad_fraction {self.max_fraction:g}: {listed}",
                "Repair or remove them, or raise data.max_bad_fraction.",
            )

    def __str__(self) -> str:
        return f"{len(self)} of {self.total}" + (f": {shorten(list(self._reasons))}" if self._reasons else "")


class Source(ABC):
    """One split: samples by number, each a pure function of (number, epoch)."""

    @property
    def bad_images(self) -> BadImages | None:
        """Where training counts unreadable images; None if there can be none."""
        return None

    @property
    @abstractmethod
    def image_size(self) -> Size:
        """Height and width of the images in pixels, as the model gets them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int, /) -> Any:
        """One sample, by default (image (C, H, W) float32, target). Raises UnreadableImageError."""

    @abstractmethod
    def resized(self, size: ImageSize) -> Source:
        """The same samples with images of another size."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what decides the samples. Of files it covers path and size, not the content."""

    def collate(self, samples: Sequence[Any], seed: int | None) -> tuple[Any, Any]:
        """Inputs and targets of a batch. What is drawn per batch is drawn by `seed`; in evaluation it is None."""
        inputs, targets = default_collate(list(samples))
        return inputs, targets

    def set_epoch(self, epoch: int) -> None:  # noqa: B027 - most sources draw nothing
        """Choose the epoch whose augmentation is drawn; held-out splits do not change."""

    def sample_name(self, index: int) -> str:
        """What to call a sample in a message; may hold any character."""
        return f"sample {index}"

    def sample_file(self, index: int) -> Path | None:
        """The file that a sample's image is read from; None if the sample has no file of its own."""
        return None

    def check_header(self, index: int) -> None:  # noqa: B027 - what is drawn has none
        """Raises UnreadableImageError if the headers of a sample's files tell that it cannot be read.

        Several threads may call it at once.
        """


class WrappedSource(Source):
    """A source that changes something of another one, `inner`, and passes the rest on."""

    def __init__(self, inner: Source) -> None:
        self.inner = inner

    @property
    def bad_images(self) -> BadImages | None:
        return self.inner.bad_images

    @property
    def image_size(self) -> Size:
        return self.inner.image_size

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int, /) -> Any:
        return self.inner[index]

    def fingerprint(self) -> str:
        return self.inner.fingerprint()

    def collate(self, samples: Sequence[Any], seed: int | None) -> tuple[Any, Any]:
        return self.inner.collate(samples, seed)

    def set_epoch(self, epoch: int) -> None:
        self.inner.set_epoch(epoch)

    def sample_name(self, index: int) -> str:
        return self.inner.sample_name(index)

    def sample_file(self, index: int) -> Path | None:
        return self.inner.sample_file(index)

    def check_header(self, index: int) -> None:
        self.inner.check_header(index)


@dataclass(frozen=True)
class Categories:
    """What a model tells apart, in the order of its outputs; empty for a task without categories.

    `ids` are the numbers that a file uses for them where these have gaps (COCO); None counts from 0.
    """

    names: tuple[str, ...] = ()
    ids: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def saved(self) -> dict[str, Any]:
        """JSON for checkpoints and results."""
        return {"names": list(self.names), "ids": None if self.ids is None else list(self.ids)}

    @classmethod
    def from_saved(cls, document: Mapping[str, Any], where: str) -> Categories:
        """Those in a result or a checkpoint's identity; none if it holds none. Raises CheckpointError.

        Files from before 2026-11-29 hold the names alone, as `class_names`.
        """
        found = document.get("categories", document.get("class_names", []))
        found = {"names": found} if isinstance(found, list) else found
        try:
            ids = found.get("ids")
            return cls(tuple(map(str, found["names"])), None if ids is None else tuple(map(int, ids)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(where, f"its categories are {found!r:.100}", "Train again.") from error


@dataclass(frozen=True)
class Finding:
    """Something wrong with the files of a data set that training can live with: it was dropped, or left as it is.

    `what` is one line, `split` where it was met, `examples` a few of the `count` names.
    """

    split: str
    what: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    """Samples to train on, those held out of them for search, and those for validation; no two share an image.

    `fingerprint` covers what is learned and searched from, `val_fingerprint` validation, at the size they were built
    for. `split_seed` is the seed that splits them, None if no seed does. `rows` is what `describe` says of them,
    `findings` what was found wrong when they were read.
    """

    train: Source
    search: Source
    val: Source
    categories: Categories = Categories()
    split_seed: int | None = None
    rows: tuple[tuple[str, str], ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the training and the search samples."""
        return hashlib.sha256(
            "\n".join(source.fingerprint() for source in (self.train, self.search)).encode()
        ).hexdigest()

    @property
    def val_fingerprint(self) -> str:
        """SHA-256 of the validation samples."""
        return self.val.fingerprint()

    def describe(self) -> list[tuple[str, str]]:
        """Rows (name, value) for people: source, categories, images per split, ignored and unreadable files."""
        bad = self.train.bad_images
        return [*self.rows, *([("unreadable training images so far", str(bad))] if bad is not None else [])]


def shorten(names: Sequence[str], limit: int = _NAMES_SHOWN) -> str:
    """`a, b, c and 12 more`: at most `limit` names and how many are left out."""
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def with_reasons(faults: Iterable[tuple[str, str]]) -> str:
    """`a (empty), b (no image) and 12 more`: names and what is wrong with each, shortened."""
    return shorten([f"{name} ({reason})" for name, reason in faults])
