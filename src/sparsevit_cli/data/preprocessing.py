"""What becomes of an image file before a model sees it, told in words that other programs can follow."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparsevit_cli.sizes import Size

Resize = Literal["none", "stretch", "cover", "fit", "short_side"]
"""How an image of (h, w) pixels is resized to `to` (H, W), with antialiasing.

- `none`: not at all.
- `stretch`: to (H, W), whatever its aspect.
- `cover`: with its aspect, as small as it covers (H, W). Sides are `int(H * side / min(h, w))` if H equals W, else
  `round(side / min(h / H, w / W))`.
- `fit`: with its aspect, as large as it fits into (H, W); sides are `round(side * min(H / h, W / w))`, at least 1.
- `short_side`: with its aspect, so that the shorter side is H; sides are `round(side * (H / min(h, w)))`.
"""


@dataclass(frozen=True)
class Preprocessing:
    """From an upright image file to the input of a model; sizes are (height, width) in pixels.

    The image is taken in `channel_order` (`RGB`, or `L` for grey) and resized. A `center` crop of `size` begins at
    `round((side - size) / 2)`; `bottom_right` padding fills up to `size` with the mean, after normalisation zero. Its
    values are scaled to `value_range`; `mean` is subtracted and the rest divided by `std`, per channel. The result is
    (batch, channels, height, width) in float32.

    `sliding_overlap` is None, or the image is larger than `size`: windows of `size` slide over it, and this is the
    share of a window that the next one overlaps at least; their outputs are averaged.
    """

    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "stretch"
    to: Size | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop: Literal["none", "center"] = "none"
    padding: Literal["none", "bottom_right"] = "none"
    channel_order: Literal["RGB", "L"] = "RGB"
    value_range: tuple[float, float] = (0.0, 1.0)
    sliding_overlap: float | None = None

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "to": self.to or self.size, "layout": "NCHW", "dtype": "float32"}
