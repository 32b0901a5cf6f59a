"""Samples as pictures for people: a tensor as it is seen, a line of text below it, and a sheet of several."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_SIDE = 192
"""Pixels that the shorter side of a picture has at least, so that a line of text can be read beside it."""
_TEXT_PIXELS = 16
_GAP = 8
_GROUND, _INK = (255, 255, 255), (20, 20, 20)


def as_picture(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """An image (C, H, W), 1 or 3 channels normalised by `mean` and `std`, as it is seen: RGB, `enlarged`."""
    shape = (-1, 1, 1)
    values = image.detach().float().cpu().numpy() * np.reshape(std, shape) + np.reshape(mean, shape)
    pixels = (np.nan_to_num(values) * 255).round().clip(0, 255).astype(np.uint8)
    pixels = pixels if len(pixels) == 3 else pixels[:1].repeat(3, 0)
    return enlarged(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))))


def enlarged(picture: Image.Image) -> Image.Image:
    """A picture whose shorter side is SMALLEST_SIDE at least: a tiny one is enlarged a whole number of times."""
    times = max(1, math.ceil(SMALLEST_SIDE / max(1, min(picture.size))))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """`picture` with a line of text below it; what does not fit in is left out."""
    font = _font(max(_TEXT_PIXELS, picture.height // 20))
    text = " ".join(ascii(text)[1:-1].split())  # Pillow's own font has no other letters
    if font.getlength(text) > picture.width - _GAP:
        while text and font.getlength(f"{text} ...") > picture.width - _GAP:
            text = text[:-1]
        text = f"{text} ..."
    height = math.ceil(font.getbbox("Ayg")[3]) + _GAP
    canvas = Image.new("RGB", (picture.width, picture.height + height), _GROUND)
    canvas.paste(picture)
    ImageDraw.Draw(canvas).text((_GAP // 2, picture.height + _GAP // 2), text, fill=_INK, font=font)
    return canvas


@functools.lru_cache(maxsize=8)
def _font(pixels: int) -> Any:
    return ImageFont.load_default(pixels)


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 4, side: int = 320) -> Image.Image:
    """Pictures in rows, each shrunk into a cell of `side` x `side` pixels if it is larger."""
    shrunk = []
    for picture in pictures:
        copy = picture.convert("RGB")
        copy.thumbnail((side, side), Image.Resampling.LANCZOS)
        shrunk.append(copy)
    width, height = max(each.width for each in shrunk) + _GAP, max(each.height for each in shrunk) + _GAP
    columns = min(columns, len(shrunk))
    sheet = Image.new("RGB", (width * columns + _GAP, height * math.ceil(len(shrunk) / columns) + _GAP), _GROUND)
    for number, each in enumerate(shrunk):
        row, column = divmod(number, columns)
        sheet.paste(each, (_GAP + column * width, _GAP + row * height))
    return sheet
