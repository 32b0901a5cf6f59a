"""Which image belongs to which mask."""

from __future__ import annotations

from collections.abc import Collection

from sparsevit_cli.data.source import shorten
from sparsevit_cli.errors import DataError


def paired(split: str, images: Collection[str], masks: Collection[str], image: str, mask: str) -> list[str]:
    """The keys that both have, in order. Raises DataError, which names those that lack one of both.

    `image` and `mask` say what the names of the files look like.
    """
    if not images and not masks:
        raise DataError(f"data: {split}", f"no files {image} and no files {mask}", "Check data.root and the split.")
    lacking = [
        (f"{len(found)} {what}: {shorten(found)}")
        for what, found in (
            (f"images ({image}) have no mask ({mask})", sorted(set(images) - set(masks))),
            (f"masks ({mask}) have no image ({image})", sorted(set(masks) - set(images))),
        )
        if found
    ]
    if lacking:
        do = "Add the files that are missing, or move the others away."
        raise DataError(f"data: {split}", "; ".join(lacking), do)
    return sorted(images)
