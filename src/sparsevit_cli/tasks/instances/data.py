"""The images of an instance experiment: three sources that share none."""

from __future__ import annotations

from sparsevit_cli.config.instances import CocoData, DigitScenesData
from sparsevit_cli.data.digit_scenes import DigitScenes
from sparsevit_cli.data.digits import DigitsSpec
from sparsevit_cli.data.source import Categories, Data
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.sizes import ImageSize

from .source import SceneSource, square


def build_data(
    data: DigitScenesData | CocoData, *, img_size: ImageSize, in_chans: int, seed: int, masks: bool
) -> Data:
    """The three sources of a configuration. Raises DataError or ConfigError."""
    assert isinstance(data, DigitScenesData)
    return _digits(data, img_size, in_chans, seed, masks)


def _digits(data: DigitScenesData, img_size: ImageSize, in_chans: int, seed: int, masks: bool) -> Data:
    if in_chans != 3:
        raise ConfigError("model.in_chans", f"{in_chans}; the scenes have 3", "Set 3, or another data.source.")
    digits = data.digits
    spec = DigitsSpec(square(img_size), digits.digit_min, digits.digit_max, digits.clutter)
    train, search, val = (SceneSource(DigitScenes(spec, split, seed), masks=masks) for split in ("train", "search", "val"))
    rows = [
        ("data", "scenes of scikit-learn's handwritten digits on cluttered canvases"),
        ("categories", str(len(DigitScenes.names))),
        ("training images", f"{len(train)}, drawn anew in every epoch"),
        ("search images", str(len(search))),
        ("validation images", str(len(val))),
    ]
    return Data(train, search, val, Categories(DigitScenes.names), split_seed=seed, rows=tuple(rows))
