"""The images of a segmentation experiment: three sources that share none."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sparsevit_cli.config.images import DigitScenesData
from sparsevit_cli.config.paths import as_path
from sparsevit_cli.config.semantic import BACKGROUND, CityscapesData, MaskFiles, PairedFolders
from sparsevit_cli.data.chosen import refuse_shared, refuse_unreadable
from sparsevit_cli.data.digit_scenes import DigitScenes
from sparsevit_cli.data.digits import DigitsSpec
from sparsevit_cli.data.images import UnreadableImageError
from sparsevit_cli.data.source import BadImages, Categories, Data, Source, shorten
from sparsevit_cli.data.splits import carve
from sparsevit_cli.errors import DataError
from sparsevit_cli.sizes import ImageSize

from .cityscapes import CITYSCAPES, read_cityscapes
from .folders import folder_labels, read_folders
from .labels import IGNORED
from .records import Pairs, PairSource
from .scenes import SceneSource
from .transforms import TransformSpec


def build_data(data: DigitScenesData | MaskFiles, *, img_size: ImageSize, in_chans: int, seed: int) -> Data:
    """The three sources of a configuration. Files are listed; opened are held-out masks, until two classes were seen.

    `seed` moves the augmentation, and for the digits the split; for files the split is always the same. Raises
    DataError, ConfigError.
    """
    if isinstance(data, DigitScenesData):
        return _digits(data, img_size, in_chans, seed)
    train, val = (_listed(data, split) for split in (data.train_split, data.val_split))
    taught = (train.root / pair.image for pair in train.pairs)
    held_out = {pair.key: val.root / pair.image for pair in val.pairs}
    refuse_shared("data.train_split, data.val_split", taught, held_out)
    spec = TransformSpec.from_config(data, img_size, in_chans)
    return _bundle(data, train, val, spec, spec.evaluation().resized(img_size), seed)


def class_names(data: DigitScenesData | MaskFiles) -> tuple[str, ...]:
    """The names of the classes, in their order; no image is looked at. Raises DataError for a file of names."""
    if isinstance(data, DigitScenesData):
        return (BACKGROUND, *DigitScenes.names)
    if isinstance(data, CityscapesData):
        return CITYSCAPES.names
    assert isinstance(data, PairedFolders)
    return folder_labels(data).names


def _digits(data: DigitScenesData, img_size: ImageSize, in_chans: int, seed: int) -> Data:
    spec = DigitsSpec.of(data.digits, img_size, in_chans)
    train, search, val = (SceneSource(DigitScenes(spec, split, seed)) for split in ("train", "search", "val"))
    rows = [
        ("data", "scenes of scikit-learn's handwritten digits"),
        ("classes", "11: the background and ten digits"),
        *((f"{name} images", str(len(source))) for name, source in _named(train, search, val)),
    ]
    return Data(train, search, val, Categories(class_names(data)), split_seed=seed, rows=tuple(rows))


def _listed(data: MaskFiles, split: str) -> Pairs:
    if isinstance(data, CityscapesData):
        return read_cityscapes(as_path(data.root, "data.root"), split, data.max_megapixels)
    assert isinstance(data, PairedFolders)
    return read_folders(data, split, folder_labels(data))


def _bundle(
    data: MaskFiles, train: Pairs, val: Pairs, spec: TransformSpec, held_spec: TransformSpec, seed: int
) -> Data:
    faults = train.faults()
    usable = np.ones(len(train.pairs), dtype=bool)
    usable[list(faults)] = False
    kept, held_out = carve(
        [pair.key for pair in train.pairs], np.zeros(len(usable), dtype=np.int64), data.search_fraction, usable
    )
    bad_images = BadImages(len(kept), data.max_bad_fraction)
    bad_images.note((train.pairs[index].key, reason) for index, reason in faults.items())
    refuse_unreadable({val.pairs[index].key: reason for index, reason in val.faults().items()})
    sources = (
        PairSource(train, kept, spec, seed=seed, bad_images=bad_images),
        PairSource(train, held_out, held_spec, seed=seed, bad_images=None),
        PairSource(val, np.arange(len(val.pairs)), held_spec, seed=seed, bad_images=None),
    )
    for name, pairs, numbers in (("search", train, held_out), ("validation", val, range(len(val.pairs)))):
        _refuse_one_class(name, pairs, map(int, numbers))
    names = train.labels.names
    rows = [
        ("data", f"{data.source} in {train.root}"),
        ("classes", f"{len(names)}: {shorten(names)}"),
        *((f"{name} images", str(len(source))) for name, source in _named(*sources)),
        ("ignored files", str(train.ignored + val.ignored)),
    ]
    return Data(*sources, Categories(names), rows=tuple(rows))


def _refuse_one_class(name: str, pairs: Pairs, numbers: Iterable[int]) -> None:
    """Raises DataError if the masks show no two classes.

    Without any there would be no score, after hours of training. With one alone every model would have all of it.
    """
    seen: set[int] = set()
    try:
        for number in numbers:
            seen |= set(np.unique(pairs.classes(number)).tolist()) - {IGNORED}
            if len(seen) > 1:
                return
    except UnreadableImageError:  # the reading tells of it
        return
    if not seen:
        got = "no pixel of their masks has a class: all are ignored"
        raise DataError(f"data: {name} images", got, "Check the masks; a test split has none.")
    got = f"no class but {pairs.labels.names[seen.pop()]} occurs in their masks; {pairs.labels.known}"
    more = " Or raise data.search_fraction." if name == "search" else ""
    raise DataError(f"data: {name} images", got, f"A score would mean nothing. {pairs.labels.do}{more}")


def _named(train: Source, search: Source, val: Source) -> list[tuple[str, Source]]:
    return list(zip(("training", "search", "validation"), (train, search, val), strict=True))
