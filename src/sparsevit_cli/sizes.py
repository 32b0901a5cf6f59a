"""Sizes of images, in pixels."""

from __future__ import annotations

Size = tuple[int, int]
"""Height and width."""
ImageSize = int | Size
"""One number for a square image, or height and width."""


def as_pair(size: ImageSize) -> Size:
    """Height and width of `size`."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: Size) -> str:
    """`256x704`: height and width as people read them."""
    return f"{size[0]}x{size[1]}"
