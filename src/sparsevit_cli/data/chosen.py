"""What the sources of image files of all tasks have in common: records of a listing, chosen for one split."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel

from sparsevit_cli.errors import ConfigError, DataError
from sparsevit_cli.sizes import ImageSize, Size, as_pair

from .files import real_paths
from .source import BadImages, Source, shorten, with_reasons
from .splits import Indices

A = TypeVar("A", bound=BaseModel)


def refuse_unreadable(faults: Mapping[str, str], split: str = "validation") -> None:
    """Raises DataError if there are held-out images, name to reason, that cannot be read."""
    if faults:
        do = "Repair or remove them; evaluation leaves no image out."
        raise DataError(f"data: {split} images", f"{len(faults)} unreadable: {with_reasons(faults.items())}", do)


def refuse_shared(field: str, train: Iterable[Path], val: Mapping[str, Path]) -> None:
    """Raises DataError if files of held-out images, by their names, are training images, whatever links lead there."""
    taught = set(real_paths(train))
    if shared := [name for name, path in zip(val, real_paths(val.values()), strict=True) if path in taught]:
        got = f"{len(shared)} validation images are training images: {shorten(sorted(shared))}"
        raise DataError(field, got, "Validation needs images of its own.")


def refuse_other_channels(in_chans: int, mean: Sequence[float]) -> None:
    """Raises ConfigError unless model and normalisation have the 3 channels of image files."""
    if in_chans != 3 or len(mean) != 3:
        got = f"model.in_chans {in_chans} and {len(mean)} values"
        raise ConfigError("data.mean, data.std", got, "Image files give 3 channels: set 3 of each.")


@dataclass(frozen=True)
class Spec(Generic[A]):
    """How a record becomes a sample, an image of `size` (height, width) for the model; always the same sample without
    `augment`.
    """

    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: A | None = field(kw_only=True)

    augment_version: ClassVar[int | None] = None
    """Of the code that augments: a higher one tells that it draws other samples."""

    def resized(self, size: ImageSize) -> Self:
        """The same for images of another size."""
        return replace(self, size=as_pair(size))

    def evaluation(self) -> Self:
        """The same without augmentation."""
        return replace(self, augment=None)

    def describe(self) -> str:
        """Canonical text of all that it does, for fingerprints."""
        version = {} if self.augment_version is None else {"version": self.augment_version}
        augment = None if self.augment is None else {**self.augment.model_dump(), **version}
        return json.dumps({**asdict(self), "augment": augment}, sort_keys=True)


class ChosenSource(Source):
    """Samples of the records `indices` (n,) of a listing. What is drawn is a function of (seed, epoch, number).

    A subclass adds the listing, `__getitem__`, `sample_name` and `listing_digest`.
    """

    spec: Spec[Any]

    def __init__(self, indices: Indices, *, seed: int, bad_images: BadImages | None) -> None:
        self.indices, self.seed, self._bad_images, self.epoch = indices, seed, bad_images, 0

    @property
    @abstractmethod
    def listing_digest(self) -> str:
        """SHA-256 over the chosen records, without what becomes of them."""

    @property
    def bad_images(self) -> BadImages | None:
        return self._bad_images

    @property
    def image_size(self) -> Size:
        return self.spec.size

    def __len__(self) -> int:
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def resized(self, size: ImageSize) -> Self:
        other = copy.copy(self)
        other.spec = self.spec.resized(size)
        return other

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.listing_digest}\n{self.spec.describe()}".encode()).hexdigest()

    def record(self, index: int) -> int:
        """The place in the listing of a sample. Raises IndexError, which ends iteration over a source."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(self.indices[index])
