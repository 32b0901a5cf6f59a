"""Paths as settings and flags name them: every one is read here."""

from __future__ import annotations

import os
import sys
import unicodedata
from pathlib import Path
from typing import NoReturn

from sparsevit_cli.errors import ConfigError

from .yaml_loader import printable, shorten

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
"""What the file systems of Linux, macOS and Windows take at most, a name and a whole path."""


def as_path(text: str, what: str) -> Path:
    """The path that `text` names, with `~` and `~user` expanded; `what` is its setting or flag in messages.

    Whether it exists is not asked. Raises ConfigError for a text that can name no file.
    """

    def refuse(got: str, do: str) -> NoReturn:
        raise ConfigError(what, f"{shorten(printable(text)) or 'empty text'} {got}", do)

    if not text.strip():
        refuse("is no path", "Give the path of a file or folder.")
    if any(unicodedata.category(character) == "Cc" for character in text):
        refuse("holds a line break or another control character", "Give a path without one, or rename the file.")
    try:
        path = Path(text).expanduser()
        raw = os.fsencode(path)
    except RuntimeError:
        refuse("begins with the home folder of a user who has none here", "Write the whole path.")
    except UnicodeEncodeError:
        got = f"has letters that file names cannot hold in this locale ({sys.getfilesystemencoding()})"
        refuse(got, "Set PYTHONUTF8=1, or a UTF-8 locale.")
    if len(raw) > MAX_PATH_BYTES or max(map(len, raw.split(os.fsencode(os.sep)))) > MAX_NAME_BYTES:
        got = f"is too long for a path: {MAX_NAME_BYTES} bytes a name and {MAX_PATH_BYTES} in all are the most"
        refuse(got, "Give a shorter one.")
    return path


def names_a_file(text: str) -> bool:
    """True if a text that may also be something else is the path of a file; no text is an error."""
    try:
        return as_path(text, "").is_file()
    except (ConfigError, OSError):
        return False


def is_there(path: Path, what: str) -> bool:
    """True if `path` exists. Raises ConfigError if that cannot be known, as in a folder of another user."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        got = f"{printable(str(path))} cannot be looked at ({error.strerror})"
        raise ConfigError(what, got, "Check the path and its permissions.") from error
    return True
