"""What the listing of a data set tells of a file, before it is opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from functools import cache
from pathlib import Path

NOT_A_FILE = -1
"""Size of what cannot be opened as a file: a link that leads nowhere, a pipe, a device. Opening one may never end."""


def file_status(path: Path | str) -> os.stat_result | None:
    """What lies at `path`, links followed; None if there is nothing, or nothing that may be looked at."""
    try:
        return os.stat(path)
    except (OSError, ValueError):  # a name that no file can have
        return None


def file_bytes(status: os.stat_result | None) -> int:
    """Bytes of a file of that status, or NOT_A_FILE."""
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else NOT_A_FILE


def bytes_at(path: Path | str) -> int:
    """Bytes of the file at `path`, or NOT_A_FILE."""
    return file_bytes(file_status(path))


def file_fault(size: int) -> str | None:
    """Why a file of so many bytes, or NOT_A_FILE, cannot be read; None as far as that does not tell."""
    return {0: "is an empty file", NOT_A_FILE: "cannot be opened as a file"}.get(size)


def real_paths(paths: Iterable[Path | str]) -> list[str]:
    """Where each file lies, links of files and of folders followed. A folder is looked up once, for all its files."""
    real_folder = cache(os.path.realpath)
    found = []
    for path in paths:
        folder, name = os.path.split(path)
        in_folder = os.path.join(real_folder(folder), name)
        found.append(os.path.realpath(in_folder) if os.path.islink(in_folder) else in_folder)
    return found
