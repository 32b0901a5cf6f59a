"""Decoding: every kind of file becomes upright RGB or UnreadableImageError, nothing else."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparsevit_cli.data.files import NOT_A_FILE, file_bytes, file_fault, file_status
from sparsevit_cli.data.images import UnreadableImageError, decode_image, is_system_name, opened, upright_size

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def decode(data: bytes, max_megapixels: float = 1.0) -> Image.Image:
    return decode_image(io.BytesIO(data), "cat.jpg", max_megapixels)


def noise(image_format: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), image_format, **options)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int, extra: bytes = b"") -> bytes:
    """A small PNG file whose header promises an image of any size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(bytes(10_000_000), 9))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + png_chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(noise("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def palette_image() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


@pytest.mark.parametrize(
    ("image", "image_format", "options", "expected"),
    [
        (Image.new("L", (4, 4), 7), "PNG", {}, (7, 7, 7)),
        (Image.new("1", (4, 4), 1), "PNG", {}, WHITE),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", {}, RED),
        (palette_image(), "PNG", {}, RED),
        (palette_image(), "PNG", {"transparency": 1}, WHITE),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), "PNG", {}, RED),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG", {}, WHITE),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "PNG", {}, (255, 204, 204)),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", {}, WHITE),
        (Image.new("RGB", (4, 4), RED), "PNG", {"transparency": RED}, WHITE),
        (Image.fromarray(np.full((4, 4), 0x9C40, np.uint16)), "PNG", {}, (0x9C, 0x9C, 0x9C)),
        (Image.fromarray(np.full((4, 4), 0x9C40, np.uint16)), "TIFF", {}, (0x9C, 0x9C, 0x9C)),
        (Image.fromarray(np.full((4, 4), 0x9C40, np.uint16)), "PPM", {}, (0x9C, 0x9C, 0x9C)),
        (palette_image(), "GIF", {"save_all": True, "append_images": [Image.new("L", (4, 4), 0)]}, RED),
    ],
)
def test_unusual_modes(image, image_format, options, expected):
    decoded = decode(encoded(image, image_format, **options))
    assert decoded.mode == "RGB"
    assert decoded.size == (4, 4)
    assert decoded.getpixel((1, 1)) == expected


def tiff(order: str, bits: int, pixels: bytes, photometry: int = 1, sample_format: int = 1) -> bytes:
    """A grey TIFF of 4 x 4 pixels."""
    tags = [(256, 4), (257, 4), (258, bits), (259, 1), (262, photometry), (273, 8 + 2 + 12 * 10 + 4), (277, 1)]
    tags += [(278, 4), (279, len(pixels)), (339, sample_format)]
    end = {"<": b"II", ">": b"MM"}[order]
    fields = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return end + struct.pack(f"{order}HI", 42, 8) + struct.pack(f"{order}H", 10) + fields + bytes(4) + pixels


def twelve_bits(value: int) -> bytes:
    return bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255]) * 8


def png_16(value: int, extra: bytes = b"") -> bytes:
    rows = (b"\0" + struct.pack(">H", value) * 4) * 4
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "grey"),
    [
        (tiff("<", 12, twelve_bits(4000)), 250),
        (tiff("<", 12, twelve_bits(4095)), 255),
        (tiff("<", 16, struct.pack("<H", 4000) * 16), 15),
        (tiff(">", 16, struct.pack(">H", 0x9C40) * 16), 0x9C),
        (tiff("<", 16, struct.pack("<H", 0x9C40) * 16, photometry=0), 255 - 0x9C),
        (tiff("<", 16, struct.pack("<H", 0) * 16, photometry=0), 255),
        (tiff("<", 8, bytes([40] * 16), photometry=0), 215),
        (b"P5 4 4 4095\n" + struct.pack(">H", 4000) * 16, 250),
        (b"P5 4 4 1023\n" + struct.pack(">H", 1023) * 16, 255),
        (b"P5 4 4 65535\n" + struct.pack(">H", 4000) * 16, 15),
        (b"P5 4 4 100\n" + bytes([50] * 16), 128),
        (b"P2 4 4 4095\n" + b"4000 " * 16, 250),
        (png_16(4000), 15),
        (png_16(0x9C40, png_chunk(b"tRNS", struct.pack(">H", 0x9C40))), 255),
        (png_16(0x9C40, png_chunk(b"tRNS", struct.pack(">H", 7))), 0x9C),
    ],
)
def test_depth_and_photometry_of_grey_come_from_the_file(data, grey):
    assert decode(data).getpixel((1, 1)) == (grey,) * 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff("<", 16, struct.pack("<h", -5) * 16, sample_format=2), r"16 bits per channel \(signed\)"),
        (tiff("<", 32, struct.pack("<I", 5) * 16), r"32 bits per channel \(unsigned\)"),
        (tiff(">", 32, struct.pack(">i", 5) * 16, sample_format=2), r"32 bits per channel \(signed\)"),
        (tiff("<", 32, struct.pack("<f", 0.5) * 16, sample_format=3), r"32 bits per channel \(floating-point\)"),
        (tiff("<", 32, struct.pack("<f", 0.5) * 16, 0, 3), r"32 bits per channel \(floating-point\)"),
        (b"Pf 4 4 -1.0\n" + struct.pack("<f", 0.5) * 16, r"32 bits per channel \(floating-point\)"),
    ],
)
def test_grey_of_unknown_range_is_refused(data, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        decode(data)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(image_format):
    lying = Image.new("RGB", (32, 16))
    lying.paste(RED, (0, 0, 16, 16))  # the left half; orientation 6 says: turn right by a quarter
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(lying, image_format, exif=exif)
    upright = decode(data)
    assert upright.size == (16, 32)
    assert upright_size(io.BytesIO(data), "cat.jpg", 1.0) == (32, 16), "height and width, from the header"
    assert upright_size(io.BytesIO(encoded(lying, image_format)), "cat.jpg", 1.0) == (16, 32)
    top, bottom = np.asarray(upright)[4, 8].astype(int), np.asarray(upright)[28, 8].astype(int)
    assert abs(top - RED).max() < 10
    assert abs(bottom - BLACK).max() < 10


def test_damaged_exif_leaves_the_image_as_stored():
    assert decode(noise("JPEG", exif=b"Exif\0\0garbage")).size == (32, 32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"this is a text\n" * 50, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (noise("JPEG")[:-200], "truncated"),
        (noise("PNG")[:1500], "truncated"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "32 bits"),
    ],
    ids=["empty", "text", "postscript", "truncated jpeg", "truncated png", "float"],
)
def test_unreadable(data, reason):
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        decode(data)
    assert caught.value.what == "cat.jpg"
    assert caught.value.exit_code == 3
    if reason == "not an image":
        with pytest.raises(UnreadableImageError, match=reason):
            upright_size(io.BytesIO(data), "cat.jpg", 1.0)


def test_what_a_listing_tells_of_a_file(tmp_path):
    (tmp_path / "image").write_bytes(b"1234")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("image")
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    sizes = {"image": 4, "link": 4, "empty": 0} | dict.fromkeys(
        ["folder", "broken", "pipe", "nowhere", "no\0name", "image/inside"], NOT_A_FILE
    )
    assert {name: file_bytes(file_status(tmp_path / name)) for name in sizes} == sizes
    assert {file_fault(size) for size in sizes.values()} == {None, "is an empty file", "cannot be opened as a file"}


TEXT_BOMB = b"k\0\0" + zlib.compress(bytes(100_000_000), 9)
TEXT_CHUNK = png_chunk(b"zTXt", TEXT_BOMB)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_of_size(20_000, 20_000), "more than 64 megapixels"),
        (png_of_size(8_001, 8_000), "more than 64 megapixels"),
        (jpeg_of_size(65_500, 65_500), "more than 64 megapixels"),
        (png_of_size(4, 4, TEXT_CHUNK), "too large"),
    ],
    ids=["400 Mpx png", "just above", "jpeg header", "zTXt"],
)
def test_bombs_are_refused_before_their_pixels_are_decoded(data, reason, monkeypatch):
    assert len(data) < 200_000

    def load(image):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(UnreadableImageError, match=reason):
        decode(data, max_megapixels=64)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_can_be_raised_above_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match="megapixels"):
        decode(noise("PNG"), max_megapixels=0.001)
    assert decode(noise("PNG"), max_megapixels=1).size == (32, 32)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_the_limit_stays_raised_until_the_last_thread_has_read(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    first, second = (opened(io.BytesIO(noise("PNG")), "cat.png", 1) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 1_000_000
    second.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 100


@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_one_kind_of_error(image_format, changes, kept):
    data = bytearray(noise(image_format))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        assert decode(bytes(data[: int(kept * len(data)) + 1])).mode == "RGB"
    except UnreadableImageError as error:
        assert error.got  # noqa: PT017


def test_a_camera_of_twelve_bits_that_writes_sixteen_says_so_in_a_tag() -> None:
    data = io.BytesIO()
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(data, "TIFF", tiffinfo={281: 4095})
    assert decode(data.getvalue()).getpixel((1, 1)) == (250,) * 3


@pytest.mark.parametrize("name", [
    "@Transcode", "@SynoResource", "@docker", "RECYCLER", "Recycled", "FOUND.000", "a.jpg@SynoEAStream", "~$x.jpg",
    ".x", "@eaDir", "System Volume Information", "Thumbs.db", "#recycle", "lost+found", "$RECYCLE.BIN",
])  # fmt: skip
def test_names_of_systems_are_known(name: str) -> None:
    assert is_system_name(name)


@pytest.mark.parametrize(
    "name", ["cat", "found", "found.jpg", "recycling", "thumbs", "a@b.jpg", "..", "lost and found"]
)
def test_names_of_users_are_not_taken_for_those_of_systems(name: str) -> None:
    assert not is_system_name(name)
