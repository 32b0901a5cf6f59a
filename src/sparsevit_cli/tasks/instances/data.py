"""The images of an instance experiment: three sources that share none."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from sparsevit_cli.config.images import DigitScenesData
from sparsevit_cli.config.instances import CocoData
from sparsevit_cli.config.paths import as_path
from sparsevit_cli.data.chosen import refuse_unreadable
from sparsevit_cli.data.digit_scenes import DigitScenes
from sparsevit_cli.data.digits import DigitsSpec
from sparsevit_cli.data.source import BadImages, Categories, Data, Finding, shorten
from sparsevit_cli.data.splits import Indices, carve
from sparsevit_cli.sizes import ImageSize

from .coco import CocoSplit, check_apart, check_same_categories, read_coco
from .placing import PlacingSpec
from .source import FileSource, SceneSource

_log = logging.getLogger(__name__)


def build_data(data: DigitScenesData | CocoData, *, img_size: ImageSize, in_chans: int, seed: int, masks: bool) -> Data:
    """The three sources of a configuration. Annotations are read, no image is decoded.

    `seed` moves the augmentation, and for the digits the split; images from files are always split alike. Raises
    ConfigError, and DataError for what training or evaluation would fail at; see `read_coco`.
    """
    if isinstance(data, DigitScenesData):
        return _digits(data, img_size, in_chans, seed, masks)
    return _coco(data, PlacingSpec.from_config(data, img_size, in_chans), seed, masks)


def _digits(data: DigitScenesData, img_size: ImageSize, in_chans: int, seed: int, masks: bool) -> Data:
    spec = DigitsSpec.of(data.digits, img_size, in_chans)
    train, search, val = (
        SceneSource(DigitScenes(spec, split, seed), masks=masks) for split in ("train", "search", "val")
    )
    rows = [
        ("data", "scenes of scikit-learn's handwritten digits on cluttered canvases"),
        ("categories", str(len(DigitScenes.names))),
        ("training images", f"{len(train)}, drawn anew in every epoch"),
        ("search images", str(len(search))),
        ("validation images", str(len(val))),
    ]
    return Data(train, search, val, Categories(DigitScenes.names), split_seed=seed, rows=tuple(rows))


def _coco(data: CocoData, spec: PlacingSpec, seed: int, masks: bool) -> Data:
    root = as_path(data.root, "data.root")
    places = {
        "train": (root / data.train_annotations, root / data.train_images),
        "val": (root / data.val_annotations, root / data.val_images),
    }
    train, val = (
        read_coco(file, folder, split, masks=masks, max_megapixels=data.max_megapixels)
        for split, (file, folder) in places.items()
    )
    check_same_categories(train, val)
    check_apart(train, val)
    findings = (*train.findings, *val.findings)
    _tell(findings)
    refuse_unreadable({val.images.key(number): reason for number, reason in val.images.faults.items()})
    kept, held_out = _split(data, train)
    bad_images = BadImages(len(kept), data.max_bad_fraction)
    faults, chosen = train.images.faults, set(kept.tolist())
    bad_images.note((train.images.key(number), reason) for number, reason in faults.items() if number in chosen)
    everything = np.arange(len(val.images.names))
    held_spec = spec.evaluation()
    sources = (
        FileSource(train.images, kept, spec, masks=masks, seed=seed, bad_images=bad_images),
        FileSource(train.images, held_out, held_spec, masks=masks, seed=seed, bad_images=None),
        FileSource(val.images, everything, held_spec, masks=masks, seed=seed, bad_images=None),
    )
    names = train.categories.names
    empty = int((~train.with_object).sum())
    rows = [
        ("data", f"COCO annotations in {data.root}"),
        ("categories", f"{len(names)}: {shorten(names)}"),
        ("training images", _counted(train, kept)),
        ("training images without an object", f"{empty}, {'kept' if data.keep_empty else 'left out'}"),
        ("search images", f"{_counted(train, held_out)}, held out of the training images"),
        ("validation images", _counted(val, everything)),
        *((f"wrong in {found.split}", _told(found)) for found in findings),
    ]
    return Data(*sources, train.categories, rows=tuple(rows), findings=findings)


def _split(data: CocoData, train: CocoSplit) -> tuple[Indices, Indices]:
    """Numbers of the training and of the search images."""
    numbers = np.arange(len(train.images.names))
    usable = train.with_object
    chosen = numbers if data.keep_empty else numbers[usable]
    readable = np.array([number not in train.images.faults for number in chosen.tolist()])
    keys = [train.images.names[number] for number in chosen.tolist()]
    kept, held_out = carve(keys, usable[chosen].astype(np.int64), data.search_fraction, readable)
    return chosen[kept], chosen[held_out]


def _counted(split: CocoSplit, numbers: Indices) -> str:
    objects = split.images.truths.objects()[numbers].sum()
    return f"{len(numbers)} with {objects} objects"


def _tell(findings: Sequence[Finding]) -> None:
    if findings:
        listed = "; ".join(f"{found.split}: {_told(found)}" for found in findings)
        _log.warning("faults in the annotations; what cannot be used is left out: %s", listed)


def _told(found: Finding) -> str:
    return f"{found.count} x {found.what} ({shorten(found.examples, 3)})"
