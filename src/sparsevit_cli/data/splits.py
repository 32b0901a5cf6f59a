"""Which training images are held out for search."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparsevit_cli.errors import DataError
from sparsevit_cli.seeding import derive_seed

Indices = NDArray[np.int64]


def carve(keys: Sequence[str], labels: Indices, fraction: float, usable: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """Positions (kept, held out), ascending and disjoint: about `fraction` of every class is held out.

    A class with one usable image keeps it; any other gives at least one and keeps at least one. Images that
    are not `usable` are kept. Chosen by the hash of each key, not by a seed: a command with another seed
    never searches on images that an earlier one trained on, and a new file moves hardly any other.
    Raises DataError where nothing can be held out.
    """
    rank = np.array([_hash(key) for key in keys], dtype=np.uint64)
    held_out = np.zeros(len(labels), dtype=bool)
    ordered = np.flatnonzero(usable)
    ordered = ordered[np.lexsort((rank[ordered], labels[ordered]))]  # class by class, in the order of the hashes
    for members in np.split(ordered, np.flatnonzero(np.diff(labels[ordered])) + 1):
        wanted = max(1, int(len(members) * fraction + 0.5))
        held_out[members[: min(wanted, len(members) - 1)]] = True
    if not held_out.any():
        got = f"no class of the {len(labels)} training images has two usable images, so none can be held out"
        raise DataError("data: search split", got, "Add training images.")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def fixed_subset(length: int, samples: int, seed: int, start: int = 0) -> list[int]:
    """`samples` of `length` positions, ascending; the same for the same arguments. All where there are fewer.

    Those of another `start` follow in the same random order: from one that is `samples` higher, none comes twice.
    """
    return sorted(shuffled(length, derive_seed(seed, "subset"))[start : start + samples].tolist())


def shuffled(length: int, seed: int) -> Indices:
    """Permutation of 0 ... length - 1. From raw bits, which numpy promises not to change between versions."""
    return np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable")


def _hash(text: str) -> int:
    # File names may hold bytes that are not UTF-8: Python carries them as lone surrogates.
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
