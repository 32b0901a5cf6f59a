"""One image file to upright RGB, safely: whatever is wrong with the file ends in UnreadableImageError.

What is done to unusual files: EXIF orientation is applied; transparency is laid on white; of 12 or 16 bits
the upper 8 are kept; white-is-zero is inverted; CMYK, palette and greyscale are converted; of an animation the
first frame counts.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from sparsevit_cli.errors import DataError, pass_on
from sparsevit_cli.sizes import Size

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder, by the end of its lower-case name."""

# Pillow opens many more; the fewer parsers see foreign bytes, the better.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_SYSTEM_NAME = re.compile(
    r"#recycle|#snapshot|~snapshot|lost\+found|lost\.dir|\$recycle\.bin|recycle[rd]|found\.\d{3}|__macosx|__pycache__|"
    r"(eh)?thumbs\.db|desktop\.ini|system volume information|network trash folder|temporary items|icon\r|"
    r".*@syno(eastream|resource)"
)

_EXIF_ORIENTATION = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_TIFF_BITS, _TIFF_PHOTOMETRY, _TIFF_LARGEST, _TIFF_SAMPLE_FORMAT = 258, 262, 281, 339
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = {Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90}


def is_system_name(name: str) -> bool:
    """True for hidden files and folders, and for those that systems keep for themselves: thumbnails, bins, indices."""
    hidden = name.startswith((".", "@", "~$")) and name not in (".", "..")
    return hidden or _SYSTEM_NAME.fullmatch(name.lower()) is not None


class UnreadableImageError(DataError):
    """One image that cannot be used: `what` is its name, `got` the reason."""


def decode_image(file: Path | BinaryIO, name: str, max_megapixels: float) -> Image.Image:
    """Upright RGB image of a file or stream. Raises UnreadableImageError; where too large, from the header alone."""
    with opened(file, name, max_megapixels) as image:
        image.load()
        return _upright(to_rgb(image), _orientation(image))


def upright_size(file: Path | BinaryIO, name: str, max_megapixels: float) -> Size:
    """Height and width of the upright image, from its header. Raises UnreadableImageError."""
    with opened(file, name, max_megapixels) as image:
        tags = getattr(image, "tag_v2", {})  # Pillow turns the size of a TIFF when it opens it
        width, height = int(tags.get(_TIFF_WIDTH, image.width)), int(tags.get(_TIFF_HEIGHT, image.height))
        return (width, height) if _UPRIGHT.get(_orientation(image)) in _TURNED else (height, width)


@contextmanager
def opened(
    file: Path | BinaryIO, name: str, max_megapixels: float, formats: tuple[str, ...] = _FORMATS
) -> Iterator[Image.Image]:
    """The image by its header; what goes wrong with it inside the block ends in UnreadableImageError too.

    Inside the block Pillow's own limit is at least `max_megapixels`.
    """
    max_pixels = max_megapixels * 1e6
    try:
        with _LIMIT.raised(int(max_pixels)), Image.open(file, formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        got = f"more than {max_megapixels:g} megapixels"
        raise UnreadableImageError(name, got, "Shrink or remove it, or raise data.max_megapixels.") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(name, f"not an image ({', '.join(formats)})", "Replace or remove it.") from error
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders answer hostile bytes with almost any exception
        pass_on(error)
        got = f"cannot be decoded ({type(error).__name__}: {error})"
        raise UnreadableImageError(name, got, "Repair or remove it.") from error


class _PillowsLimit:
    """Pillow's limit of pixels, which all threads share: raised while one has a file open, and put back by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: int | None = None
        self._asked: list[int] = []

    @contextmanager
    def raised(self, pixels: int) -> Iterator[None]:
        """Inside the block the limit is at least `pixels`."""
        with self._lock:
            self._own = self._own if self._asked else Image.MAX_IMAGE_PIXELS
            self._asked.append(pixels)
            self._set()
        try:
            yield
        finally:
            with self._lock:
                self._asked.remove(pixels)
                self._set()

    def _set(self) -> None:
        Image.MAX_IMAGE_PIXELS = None if self._own is None else max(self._own, *self._asked, 0)


_LIMIT = _PillowsLimit()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of 8 to 16 bits as a new RGB image; transparency on white. Raises ValueError for other pixels."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Grey of 9 to 16 bits as 8 bits. Pillow's own conversion clips at 255, which leaves a white image."""
    tags = getattr(image, "tag_v2", {})
    # Pillow scales PNG and PGM to 16 bits, and leaves the pixels of a TIFF as they are.
    bits = int(tags.get(_TIFF_BITS, (16,))[0]) if image.mode.startswith("I;16") or tags else 32
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        bits = 16
    sample_format = tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0]
    if image.mode == "F" or bits > 16 or sample_format != 1:
        kind = "floating-point" if image.mode == "F" else "signed" if sample_format == 2 else "unsigned"
        raise ValueError(f"{bits} bits per channel ({kind}), of unknown range; save it with 8 or 16, unsigned")
    if largest := tags.get(_TIFF_LARGEST):  # a camera of 12 bits that writes 16
        bits = min(bits, max(8, int(largest[0]).bit_length()))
    values = np.asarray(image).astype(np.int64)
    upper = (values.clip(0, 2**bits - 1) >> (bits - 8)).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRY) == 0:
        upper = 255 - upper
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        upper[values == transparent] = 255
    return Image.fromarray(upper)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 (as stored) where the EXIF block is missing or damaged."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception as error:  # a damaged EXIF block does not make the pixels worse
        pass_on(error)
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)
