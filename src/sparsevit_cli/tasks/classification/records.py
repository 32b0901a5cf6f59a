"""Labelled images before any transform, and the source that transforms them."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sparsevit_cli.data.chosen import ChosenSource
from sparsevit_cli.data.files import NOT_A_FILE, file_bytes, file_fault
from sparsevit_cli.data.images import UnreadableImageError, upright_size
from sparsevit_cli.data.source import BadImages, shorten
from sparsevit_cli.data.splits import Indices
from sparsevit_cli.errors import DataError, pass_on
from sparsevit_cli.seeding import derive_seed, seeded
from sparsevit_cli.sizes import ImageSize

from .transforms import TransformSpec, failed_step

FileFacts = tuple[int, int, int]
"""Inode, device and time of change of a file, the same under all its names; the inode is 0 where none is known."""

R = TypeVar("R", bound="Records")

_DRAWS = 4
"""Times that the augmentation of one image is drawn before the image counts as unreadable."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Records(ABC):
    """The images of one split, listed but not decoded.

    Attributes:
        split: what messages call the split: a folder, or a data set and its split.
        origin: where the images lie; equal for two splits only where they are the same images.
        class_names: names in the order of the labels.
        labels: (n,) int64, each an index of `class_names`.
        keys: names of the images, distinct, the same on every machine.
        sizes: bytes of each file, NOT_A_FILE, or None where there are no files.
        files: (n, 3), the FileFacts of each image; (0, 3) where there are no files.
        version: whatever else tells one state of the data from another.
        max_megapixels: size above which an image counts as unreadable.
    """

    split: str
    origin: str
    class_names: tuple[str, ...]
    labels: Indices
    keys: tuple[str, ...]
    sizes: tuple[int, ...] | None
    files: NDArray[np.uint64]
    version: str
    max_megapixels: float

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Upright RGB image. Raises UnreadableImageError."""

    def file(self, index: int) -> Path | None:
        """Where an image lies; None if it has no file of its own."""
        return None

    def read(self, index: int) -> Image.Image:
        """`load`, without touching what the listing already told to be unreadable."""
        reason = self.known_fault(index)
        if reason is not None:
            raise UnreadableImageError(self.keys[index], reason, "Replace or remove it.")
        return self.load(index)

    def known_fault(self, index: int) -> str | None:
        """Why an image is unreadable, as far as the listing tells."""
        return None if self.sizes is None else file_fault(self.sizes[index])

    def known_faults(self) -> dict[int, str]:
        """Unreadable images as far as the listing tells: index to reason."""
        faults = ((index, self.known_fault(index)) for index in range(len(self.keys)))
        return {index: reason for index, reason in faults if reason is not None}


def file_facts(status: os.stat_result | None) -> tuple[int, FileFacts]:
    """Bytes of a file, and which file it is; NOT_A_FILE and zeros for what is none."""
    size = file_bytes(status)
    if status is None or size == NOT_A_FILE:
        return size, (0, 0, 0)
    # Modulo: times before 1970 are negative, inodes of Windows have 128 bits.
    return size, (status.st_ino % 2**64, status.st_dev % 2**64, status.st_mtime_ns % 2**64)


def facts_array(facts: Iterable[FileFacts]) -> NDArray[np.uint64]:
    """(n, 3) array: a million tuples would weigh on every loader process."""
    return np.array(list(facts), dtype=np.uint64).reshape(-1, 3)


def check_names(records: Records) -> None:
    """Raises DataError for class names that no file of a run could hold, or that are one text in two forms."""
    if broken := [ascii(name) for name in records.class_names if not name.isascii() and _is_broken(name)]:
        got = f"{len(broken)} class names are not UTF-8: {shorten(broken)}"
        raise DataError(records.split, got, "Rename them (`convmv -f latin1 -t utf8 -r` does it for a whole tree).")
    forms: dict[str, list[str]] = {}
    for name in records.class_names:
        forms.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    if twins := [" and ".join(map(ascii, names)) for names in forms.values() if len(names) > 1]:
        got = f"class names that are the same text in two Unicode forms: {shorten(twins)}"
        raise DataError(records.split, got, "Merge each two into one.")


def _is_broken(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 are carried as lone surrogates
        return True
    return False


def _spelled(names: Sequence[str]) -> str:
    """Names for a comparison: one that may look like another is followed by its characters, escaped."""
    return shorten([name if re.fullmatch(r"[!-~]+( [!-~]+)*", name) else f"{name} {name!a}" for name in names])


def check_classes(records: Records) -> None:
    """Raises DataError where a class has no image: its label would be learned, or scored, from nothing."""
    counts = np.bincount(records.labels, minlength=len(records.class_names))
    empty = [name for name, count in zip(records.class_names, counts, strict=True) if count == 0]
    if empty:
        raise DataError(records.split, f"no images of {len(empty)} classes: {shorten(empty)}", "Add images of them.")


def relabelled(records: R, class_names: Sequence[str], owner: str) -> R:
    """The records with labels in the order of `class_names`, which `owner` has. Raises DataError where they differ."""
    here, there = set(records.class_names), set(class_names)
    missing = [name for name in class_names if name not in here]
    added = [name for name in records.class_names if name not in there]
    if missing or added:
        parts = [f"{len(missing)} classes of {owner} are missing here: {_spelled(missing)}"] if missing else []
        parts += [f"{len(added)} classes here are not in {owner}: {_spelled(added)}"] if added else []
        same = {unicodedata.normalize("NFKC", name) for name in missing} & {
            unicodedata.normalize("NFKC", name) for name in added
        }
        hint = " Some differ in their Unicode form alone (NFC, NFD): rename those." if same else ""
        raise DataError(records.split, "; ".join(parts), f"Make the classes the same.{hint}")
    if len(there) != len(class_names):
        raise DataError(records.split, f"{owner} names a class twice", "Make class names distinct.")
    position = {name: index for index, name in enumerate(class_names)}
    new_label = np.array([position[name] for name in records.class_names], dtype=np.int64)
    return replace(records, class_names=tuple(class_names), labels=new_label[records.labels])


class RecordSource(ChosenSource):
    """Chosen records as (image, label). Augmentation is a function of (seed, epoch, index), whoever computes it."""

    spec: TransformSpec

    def __init__(
        self, records: Records, indices: Indices, spec: TransformSpec, *, seed: int, bad_images: BadImages | None
    ) -> None:
        super().__init__(indices, seed=seed, bad_images=bad_images)
        self.records, self.spec = records, spec
        self._transform = spec.build()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return self.records.class_names

    @property
    def labels(self) -> Indices:
        """Label of every sample, (n,) int64."""
        return self.records.labels[self.indices]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        record = self.record(index)
        image = self.records.read(record)
        return self._transformed(image, index), int(self.records.labels[record])

    def _transformed(self, image: Image.Image, index: int) -> Tensor:
        """`image` as a tensor. A draw that fails is told and replaced by the next, so that no resume meets it again.

        Raises UnreadableImageError where all of them fail.
        """
        augments = self.spec.augment is not None
        name, reason = self.sample_name(index), ""
        for draw in range(_DRAWS if augments else 1):
            counters = (self.epoch, index, draw) if draw else (self.epoch, index)
            try:
                with seeded(derive_seed(self.seed, "augment", *counters)) if augments else nullcontext():
                    return self._transform(image)
            except Exception as error:
                pass_on(error)
                drawn = f" (seed {self.seed}, epoch {self.epoch}, sample {index}, draw {draw})" if augments else ""
                reason = f"{failed_step(error)}{drawn}"
                if augments:
                    _log.warning("%s: %s. Its augmentation is drawn again.", name, reason)
        raise UnreadableImageError(name, f"cannot be transformed: {reason}", "Remove it, or change data.augment.")

    def resized(self, size: ImageSize) -> Self:
        other = super().resized(size)
        other._transform = other.spec.build()
        return other

    def sample_name(self, index: int) -> str:
        return self.records.keys[self.record(index)]

    def sample_file(self, index: int) -> Path | None:
        return self.records.file(self.record(index))

    def check_header(self, index: int) -> None:
        """Of images that have a file of their own."""
        path = self.sample_file(index)
        if path is not None:
            upright_size(path, self.sample_name(index), self.records.max_megapixels)

    @functools.cached_property
    def listing_digest(self) -> str:
        """SHA-256 over classes, and name, size and label of every image in order of name; not the contents."""
        records, digest = self.records, hashlib.sha256()
        lines = [records.version, repr(records.class_names)]
        for record in sorted(self.indices.tolist(), key=records.keys.__getitem__):
            size = None if records.sizes is None else records.sizes[record]
            lines.append(repr((records.keys[record], size, int(records.labels[record]))))
        for line in lines:
            digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()
