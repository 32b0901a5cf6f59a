"""Files that appear whole or not at all: temporary sibling, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError, ResourceError, SparseViTError

TEMPORARY = ".tmp-"
"""Start of the name of everything unfinished: safe to delete once its writer is gone."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL_TEXT = re.compile(  # torch and safetensors wrap the system's error in text; torch drops its number
    r"No space left|Disk quota|File too large|os error (27|28|122)\b|inline_container.*(unexpected pos|write failed)"
)


def failpoint(name: str) -> None:
    """For tests: kill this process here where SPARSEVIT_FAILPOINT is `<name>:kill`. Unset: one look-up."""
    if os.environ.get("SPARSEVIT_FAILPOINT") == f"{name}:kill":
        os.kill(os.getpid(), signal.SIGKILL)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8), durably: after a crash the file is the old or the new one, whole.

    Makes missing parent folders; a symbolic link is replaced, not followed. Raises ResourceError on a full disk,
    ConfigError where writing is not permitted; then no temporary file is left.
    """
    raw = data.encode() if isinstance(data, str) else data
    with disk_errors(path, len(raw)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
        try:
            with temporary.open("xb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, obj: object) -> None:
    """Write `obj` as `json_text`, as `write_atomic` does."""
    write_atomic(path, json_text(obj))


def json_text(obj: object) -> str:
    """Readable, strict JSON (ValueError on NaN and infinity)."""
    return json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    if os.name != "posix":  # elsewhere folders cannot be opened, and renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer left unfinished in `folder`. Only for the one process that writes there."""
    for path in folder.glob(TEMPORARY + "*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Free space of the file system that holds `path`, or its nearest existing parent."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def full_disk(path: Path, got: str, needed_bytes: int) -> ResourceError:
    """The error that says that `path` did not fit."""
    got = f"{got}: {needed_bytes} bytes needed, {free_bytes(path)} free"
    return ResourceError(str(path), got, "Free space, raise the quota or file size limit, or choose another output.")


@contextmanager
def disk_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Translate a full disk met while writing `path`, also as torch and safetensors word it, to ResourceError.

    Missing permission becomes ConfigError; every other error passes as it is.
    """
    try:
        yield
    except SparseViTError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or _FULL_TEXT.search(str(error)):
            raise full_disk(path, f"could not be written ({error})", needed_bytes) from error
        if number in _FORBIDDEN:
            raise ConfigError(str(path), f"could not be written ({error})", "Choose another output folder.") from error
        raise
