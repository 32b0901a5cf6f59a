"""Files that appear whole or not at all: temporary sibling, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError, ResourceError, SparseViTError, pass_on

TEMPORARY = ".tmp-"
"""Start of the name of everything unfinished: safe to delete once its writer is gone."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_OF_THE_PATH = (*_FORBIDDEN, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY,
                errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.EXDEV, errno.ETXTBSY)  # fmt: skip
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENOLCK)
"""What file systems answer to a request that they do not know: network shares, FUSE, clouds, other systems' disks."""
_NOT_SYNCED = (*UNSUPPORTED, *_FORBIDDEN, errno.EBADF, errno.EISDIR)
_FULL_TEXT = re.compile(  # torch and safetensors wrap the system's error in text; torch drops its number
    r"No space left|Disk quota|File too large|os error (27|28|122)\b|inline_container.*(unexpected pos|write failed)"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_log = logging.getLogger(__name__)
_warned: set[str] = set()


def failpoint(name: str) -> None:
    """For tests: kill this process here where SPARSEVIT_FAILPOINT is `<name>:kill`. Unset: one look-up."""
    if os.environ.get("SPARSEVIT_FAILPOINT") == f"{name}:kill":
        os.kill(os.getpid(), signal.SIGKILL)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8), durably: after a crash the file is the old or the new one, whole.

    Makes missing parent folders; a symbolic link is replaced, not followed. Raises ResourceError on a full disk,
    ConfigError where writing is not permitted; then no temporary file is left.
    """
    # a byte of a file name that is no UTF-8 is written as an escape: a result must not be lost for it
    raw = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    with disk_errors(path, len(raw)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
        try:
            with temporary.open("xb") as file:
                file.write(raw)
                file.flush()
                sync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, obj: object) -> None:
    """Write `obj` as `json_text`, as `write_atomic` does."""
    write_atomic(path, json_text(obj))


def json_text(obj: object) -> str:
    """Readable, strict JSON (ValueError on NaN and infinity), which reads back as it was.

    Bytes of file names that are no UTF-8 (lone surrogates in Python) are the only characters written as escapes.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    if os.name != "posix":  # elsewhere folders cannot be opened, and renames are journalled
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NOT_SYNCED:
            raise
        _warn_unsupported("folders cannot be opened", error)
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """fsync, as far as the file system knows it; an error of the disk itself is raised."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SYNCED:
            raise
        _warn_unsupported("fsync is refused", error)


def _warn_unsupported(what: str, error: OSError) -> None:
    """One warning a process: files are whole after a crash of ours, perhaps not after a power cut."""
    if what not in _warned:
        _warned.add(what)
        _log.warning(
            "%s on the file system of the run folder (%s): a power cut may cost the newest files", what, error.strerror
        )


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer left unfinished in `folder`. Only for the one process that writes there."""
    with suppress(OSError):
        for path in folder.glob(TEMPORARY + "*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Free space of the file system that holds `path`, or its nearest existing parent.

    Where the file system does not say (some report a size of zero), that is as much as any file needs.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return sys.maxsize
    return usage.free if usage.total else sys.maxsize


def full_disk(path: Path, got: str, needed_bytes: int) -> ResourceError:
    """The error that says that `path` did not fit."""
    if _is_out_of_inodes(path):
        got = f"{got}: no inodes are free, the file system holds as many files as it can"
        return ResourceError(str(path), got, "Remove files (many small ones), or choose another output.")
    free = free_bytes(path)
    got = f"{got}: {needed_bytes} bytes needed, {free} free"
    if needed_bytes < free:  # what was written so far is removed by now, and its inodes are free again
        got += "; so inodes, a quota or a file size limit ran out"
    return ResourceError(str(path), got, "Free space, raise the quota or file size limit, or choose another output.")


def has_no_room(path: Path) -> bool:
    """True if nothing more can be written beside `path`."""
    return free_bytes(path) == 0 or _is_out_of_inodes(path)


def _is_out_of_inodes(path: Path) -> bool:
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    try:
        found = os.statvfs(existing)
    except (OSError, AttributeError):  # AttributeError: Windows has no inodes
        return False
    return found.f_files > 0 and found.f_favail == 0


@contextmanager
def disk_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Translate a full disk met while writing `path`, also as torch and safetensors word it, to ResourceError.

    What the user can mend about the path becomes ConfigError; every other error passes as it is.
    """
    try:
        yield
    except Exception as error:
        pass_on(error)
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL or _FULL_TEXT.search(str(error)):
            raise full_disk(path, f"could not be written ({error})", needed_bytes) from error
        if number in _OF_THE_PATH:
            raise ConfigError(str(path), f"could not be written ({error})", "Choose another output folder.") from error
        raise


def told_of(error: OSError) -> SparseViTError | None:
    """What an error of the operating system means for the user; None if that is not known."""
    named = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else None
    if error.errno in FULL and named is None:
        do = "Make room on the disk of the run folder, of temporary files (TMPDIR) and in shared memory (/dev/shm)."
        return ResourceError("disk", str(error.strerror), do)
    if error.errno in FULL and named is not None:
        return full_disk(Path(named), f"could not be written ({error.strerror})", 0)
    if error.errno in _OF_THE_MACHINE:
        do = "Look at the disk and the limit of open files (ulimit -n), then type the command again."
        return ResourceError(named or "files", str(error.strerror), do)
    if error.errno in _OF_THE_PATH and named is not None:
        return ConfigError(named, str(error.strerror), "Check this path and its permissions.")
    return None
