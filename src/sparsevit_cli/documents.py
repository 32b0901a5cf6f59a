"""Documents of our own (JSON, YAML, rows of a ledger), read back: whatever is wrong with one is told as its fault."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, SparseViTError, in_one_line, stopped_by

MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What code raises that takes the parts of a document for what they should be."""
AGAIN = "Run the command that makes it again."


def read_json(path: Path, do: str = AGAIN) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError where it is missing, unreadable or something else."""
    return parse_json(path, read_bytes(path, do), do)


def read_bytes(path: Path, do: str = AGAIN) -> bytes:
    """The content of a file. Raises CheckpointError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():  # a pipe would be waited for
            raise CheckpointError(str(path), "is no regular file", do)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(str(path), "is missing", do) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", do) from error


def parse_json(path: Path, data: bytes, do: str = AGAIN) -> dict[str, Any]:
    """The JSON object in `data`, the content of `path`. Raises CheckpointError."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"is not JSON ({in_one_line(error)})", do) from error
    if not isinstance(document, dict):
        raise CheckpointError(str(path), f"is not a JSON object but a {type(document).__name__}", do)
    return document


@contextmanager
def understood(path: Path | str, do: str = AGAIN) -> Iterator[None]:
    """Around code that takes the document of `path` apart: its errors become CheckpointErrors about the document."""
    try:
        yield
    except CheckpointError:
        raise
    except MALFORMED as error:
        if (stopped := stopped_by(error)) is not None:
            raise stopped from error
        reason = error.got if isinstance(error, SparseViTError) else in_one_line(error)
        raise CheckpointError(str(path), f"is not what it should be ({reason})", do) from error


def number(value: object) -> float:
    """`value` as a number, of JSON or SQLite. Raises TypeError for anything else: text, truth, nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{type(value).__name__} in place of a number")
    return float(value)


def exists(path: Path) -> bool:
    """True where there is something at `path` that can be reached; names too long, or forbidden, are not there."""
    return os.path.exists(path)
