"""The folder that keeps compiled code from one process to the next, and that nobody else can write.

Loading a library runs it. A library is therefore taken only from a folder that no other user can change, as ssh asks of
its own files, and only when its bytes are those that were written: a library that is cut short ends the process.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

from sparsevit_cli.atomic import remove_leftovers, write_atomic
from sparsevit_cli.errors import SparseViTError, first_line

MAX_BYTES = 1 << 26
MAX_LINKS = 40
"""Symbolic links on the way to a folder; Linux follows as many."""
SECONDS_OF_OTHERS = 300
"""Longest wait for another process that compiles; after it both compile."""

_log = logging.getLogger(__name__)


def cache_folder(name: str = "") -> Path:
    """The user's own folder, `$XDG_CACHE_HOME/sparsevit-cli` or `~/.cache/sparsevit-cli`, or `name` in it.

    Made when it is missing. Raises OSError when there is none that only this user can write.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the specification of XDG: such a path is invalid and ignored
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise OSError(errno.ENOENT, str(error), "~") from error
    return private_folder(base / "sparsevit-cli" / name)


def scratch_folder() -> Path:
    """The folder for temporary files. Raises OSError when it is not safe to make a private folder in it."""
    return private_folder(Path(tempfile.gettempdir()), shared=True)


def private_folder(path: Path, *, shared: bool = False) -> Path:
    """`path` with its symbolic links followed; made when it is missing.

    Raises OSError when another user than root owns a folder or link on the way, or can put something there. In a
    sticky folder, such as /tmp, nobody can exchange what belongs to somebody else: it may stand on the way, and with
    `shared` at the end.
    """
    if not path.is_absolute():
        raise OSError(errno.EINVAL, "is no absolute path", str(path))
    folder, ahead, links = Path("/"), [*reversed(path.parts)], 0
    while ahead:
        following = folder.parent if (part := ahead.pop()) == ".." else folder / part
        if not os.path.lexists(following):
            following.mkdir(mode=0o700, exist_ok=True)
        state = following.lstat()
        _refuse_strangers(following, state, shared=True)
        if not stat.S_ISLNK(state.st_mode):
            folder = following
        elif (links := links + 1) > MAX_LINKS:
            raise OSError(errno.ELOOP, "is a circle of symbolic links", str(path))
        else:
            ahead += reversed(following.readlink().parts)
    _refuse_strangers(folder, state := folder.lstat(), shared=shared)
    if not stat.S_ISDIR(state.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(folder))
    return folder


def keep_compilers_private() -> None:
    """Keep code of torch.compile and Triton in folders of ours, unless the user names others.

    torch's own stands in the folder for temporary files, under a name that another user may take first.
    """
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        if variable not in os.environ:
            try:
                os.environ[variable] = str(cache_folder(variable.split("_")[0].lower()))
            except OSError:
                os.environ[variable] = _process_folder().name


@lru_cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    """Ends with the process."""
    return tempfile.TemporaryDirectory(prefix="sparsevit-cli-", ignore_cleanup_errors=True)


def read_library(path: Path) -> bytes | None:
    """The library that `keep_library` wrote to `path`; None when it is missing, damaged, or something else."""
    content = read_own_file(path)
    if content is None or content != sealed(path.name, library := content[: -hashlib.sha256().digest_size]):
        return None
    return library


def keep_library(path: Path, library: bytes) -> None:
    """Write `library` to `path`, for `read_library`; a failure is only told."""
    try:
        write_atomic(path, sealed(path.name, library))
        path.chmod(0o600)  # whatever the umask: what others can write is not read again
    except (OSError, SparseViTError) as error:
        _log.warning("the C++ kernels cannot be kept in %s, and each process compiles them (%s)", path.parent, error)


def sealed(name: str, library: bytes) -> bytes:
    """The library and a hash of it and its name: loaders ignore what follows the end of a library."""
    return library + hashlib.sha256(name.encode() + library).digest()


def read_own_file(path: Path) -> bytes | None:
    """The bytes of a regular file that only this user (or root) can have written, else None; waits for nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            state = os.fstat(descriptor)
            _refuse_strangers(path, state, shared=False)
            is_sane = stat.S_ISREG(state.st_mode) and state.st_size <= MAX_BYTES
            return file.read(MAX_BYTES) if is_sane else None
    except OSError:
        return None


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """One process at a time works in `folder`; what a killed one left there is deleted.

    Where the file system knows no locks, or another process takes too long, this one goes on: files are replaced whole.
    """
    lock = FileLock(folder / "lock", timeout=SECONDS_OF_OTHERS)
    try:
        lock.acquire()
        remove_leftovers(folder)
    except (Timeout, OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


def in_words(error: OSError) -> str:
    """The path and the reason of an error of `private_folder`."""
    return f"{error.filename} {first_line(error.strerror)}"


def _refuse_strangers(path: Path, state: os.stat_result, *, shared: bool) -> None:
    """Raise PermissionError when another user than this one and root owns `path` or can write it."""
    if state.st_uid not in (os.geteuid(), 0, *(_disguises_of_root() if shared else ())):
        raise PermissionError(errno.EPERM, f"belongs to user {state.st_uid}", str(path))
    if stat.S_ISLNK(state.st_mode) or (shared and state.st_mode & stat.S_ISVTX):
        return
    if state.st_mode & stat.S_IWOTH or (state.st_mode & stat.S_IWGRP and not _is_own_group(path, state.st_gid)):
        raise PermissionError(errno.EPERM, "can be written by other users", str(path))


@lru_cache
def _disguises_of_root() -> tuple[int, ...]:
    """The user that root's folders seem to belong to.

    Some containers (Apptainer) know no other user than this one: there all others, root too, look like one user. Such a
    folder may stand on the way; what is in the last one must be this user's.
    """
    try:
        lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
        if any(line.split()[0] == "0" for line in lines):
            return ()
        return (int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii")),)
    except (OSError, ValueError):
        return ()


def _is_own_group(path: Path, number: int) -> bool:
    """True for a group of this user alone, as most Linux distributions make one for each; false beside access lists."""
    import grp  # Windows has neither, and no need
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
        has_list = "system.posix_acl_access" in os.listxattr(path, follow_symlinks=False)
    except (KeyError, OSError):
        return False
    return (
        number == user.pw_gid and group.gr_name == user.pw_name and not has_list and {*group.gr_mem} <= {user.pw_name}
    )
