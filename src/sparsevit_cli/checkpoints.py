"""Durable checkpoints: one folder per save that is whole or absent, found out by SHA-256, without any pickle.

    checkpoints/
      step-00000120/  model.safetensors  optimizer.safetensors  ...  state.json  MANIFEST.json
      latest          name of the newest folder
      best            name of the best folder, once there is one

A save writes a temporary sibling, fsyncs every file, the manifest last, renames it, fsyncs the parent, replaces
`latest`, and only then prunes. A folder newer than the one `latest` names was never announced: its save was cut
short, or the run was taken back to an earlier step. It is used only where nothing announced is left.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .atomic import (
    TEMPORARY,
    disk_errors,
    failpoint,
    free_bytes,
    full_disk,
    remove_leftovers,
    sha256_file,
    sync,
    sync_folder,
    write_atomic,
)
from .documents import exists, parse_json, read_bytes, understood
from .errors import CheckpointError, ConfigError, NonFiniteError, in_one_line, pass_on

FAILPOINTS = (
    "ckpt.before_open",
    "ckpt.mid_model",
    "ckpt.mid_optimizer",
    "ckpt.before_fsync",
    "ckpt.before_manifest",
    "ckpt.before_rename",
    "ckpt.mid_replace",
    "ckpt.after_rename",
    "ckpt.before_latest",
    "ckpt.mid_prune",
    "ckpt.after_prune",
)
"""Where SPARSEVIT_FAILPOINT can kill a save, in order; `mid_replace` is met only where a step is saved again."""

MANIFEST = "MANIFEST.json"
STATE = "state.json"
_FORMAT = 1
_SPACE_FACTOR = 2.2  # a save needs its size once; the rest keeps the disk from running full beside us
_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_ELSEWHERE = "Take another checkpoint, or the `checkpoints` folder for its newest whole one."

Warn = Callable[[str], None]
_warn: Warn = logging.getLogger(__name__).warning


@dataclass(frozen=True)
class Checkpoint:
    """One whole, verified checkpoint: tensors by file (`model`, `optimizer`, ...) and name, and the saved state."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
    *,
    keep: int = 2,
    best: bool = False,
    warn: Warn = _warn,
) -> Path:
    """Write `root/step-<step>` durably, point `latest` (and `best`) to it, prune; returns the folder.

    `tensors` maps a file's name to its tensors, one safetensors file each; aliased and non-contiguous tensors are
    stored in full. `state` holds JSON values (tuples come back as lists). Kept are this checkpoint, the `keep - 1`
    before it and the best one. A step saved before is replaced. Only one process may write to `root`.
    Raises ResourceError where the disk is, or would soon be, full: earlier checkpoints stay and nothing half-written
    does. Raises NonFiniteError for tensors that are not finite, ConfigError for `keep` below 2. A pruning failure only
    warns.
    """
    if keep < 2:
        got = f"{keep}, and the last checkpoint may be the one being written"
        raise ConfigError("keep", got, "Keep at least 2.")
    assert state.get("step", step) == step, f"state of step {state['step']} saved as step {step}"
    state_text = json.dumps({"step": step, **state}, indent=2, ensure_ascii=False) + "\n"
    folder = root / f"step-{step:08d}"
    for name, named in tensors.items():
        if not all_finite(named.values()):
            bad = [key for key, tensor in named.items() if not all_finite([tensor])]
            got = f"{len(bad)} tensors of `{name}` are not finite: {', '.join(bad[:10])}"
            raise NonFiniteError(str(folder), got, "Nothing is saved; earlier checkpoints are as they were.")
    needed = len(state_text) + sum(t.numel() * t.element_size() for file in tensors.values() for t in file.values())
    failpoint("ckpt.before_open")
    if free_bytes(root) < _SPACE_FACTOR * needed:
        raise full_disk(folder, f"a save needs {_SPACE_FACTOR} times its size", math.ceil(_SPACE_FACTOR * needed))
    temporary = root / f"{TEMPORARY}step-{secrets.token_hex(8)}"
    with disk_errors(folder, needed):
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        _restore(root)
        try:
            _write_folder(temporary, step, tensors, state_text)
            _publish(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    if best:  # before `latest`: a run that resumes behind this step marks it again
        write_atomic(root / "best", folder.name + "\n")
    failpoint("ckpt.before_latest")
    write_atomic(root / "latest", folder.name + "\n")
    _prune(root, step, keep, warn)
    failpoint("ckpt.after_prune")
    return folder


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """True where no floating-point tensor holds NaN or infinity: one norm over all of them."""
    filled = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return bool(get_total_norm(filled, norm_type=math.inf).isfinite()) if filled else True


def load_checkpoint(
    path: Path | str, device: str | torch.device = "cpu", *, only: Collection[str] | None = None, warn: Warn = _warn
) -> Checkpoint:
    """Read and verify a checkpoint: a `step-...` folder, or a `checkpoints` folder for its newest whole one.

    `only` names the tensor files to read; the others are verified all the same. Raises CheckpointError on anything
    missing or damaged; a `step-...` folder never falls back to another.
    """
    path = Path(path)
    if is_root(path):
        newest = latest_checkpoint(path, warn)
        if newest is None:
            raise CheckpointError(str(path), "holds no whole checkpoint", "Train first, or give another folder.")
        path = newest
    step, files = _read_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {}
    for name, entry in files.items():
        stem = name.removesuffix(".safetensors")
        if name == STATE:
            state = _read_state(path, entry, step)
        elif only is None or stem in only:
            data = _read_verified(path / name, entry)
            try:
                loaded = safetensors.torch.load(data)
            except Exception as error:  # damaged headers surface as many types
                pass_on(error)
                raise _damaged(path / name, f"is not a safetensors file ({in_one_line(error)})") from error
            tensors[stem] = {key: tensor.to(device, copy=True) for key, tensor in loaded.items()}
        else:
            _verify_file(path / name, entry)
    return Checkpoint(path, step, tensors, state)


def latest_checkpoint(root: Path, warn: Warn = _warn) -> Path | None:
    """Folder of the newest whole checkpoint of `root`; None where there is none. Warns of each it skips, and why.

    Newest is the one `latest` names, then earlier steps, then later steps that were never announced.
    """
    folders = _folders(root)
    announced = _pointer(root, "latest")
    step = math.inf if announced is None else _step(announced)
    unannounced = [folder for folder in folders if _step(folder) > step]
    for folder in [folder for folder in folders if _step(folder) <= step] + unannounced:
        try:
            _verify(folder)
        except CheckpointError as error:
            warn(f"skipped {folder.name}: {error}")
            continue
        if unannounced and folder not in unannounced:
            names = ", ".join(other.name for other in unannounced)
            warn(f"skipped {names}: `latest` names {announced.name if announced else None}, an earlier step")
        return folder
    return None


def best_checkpoint(root: Path) -> Path | None:
    """Folder of the checkpoint marked best; None where none was. Raises CheckpointError where it is damaged."""
    folder = _pointer(root, "best")
    if folder is not None:
        _verify(folder)
    return folder


def pack_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], object]:
    """Split a state_dict (optimizer, gradient scaler, scheduler) into tensors and JSON; `unpack_optimizer` joins them.

    Lossless for dicts with any plain keys, lists, tuples, numbers (infinities too), strings, None, dtypes and tensors.
    Raises TypeError for any other value.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(state_dict, ("",), tensors)


def unpack_optimizer(tensors: Mapping[str, Tensor], packed: object) -> dict[str, Any]:
    """The state_dict that `pack_optimizer` split."""
    state_dict = _unpack(packed, tensors)
    assert isinstance(state_dict, dict)
    return state_dict


# -- writing ------------------------------------------------------------------------------------------------------


def _write_folder(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state_text: str) -> None:
    folder.mkdir()
    files = {}
    for name, named in tensors.items():
        assert _FILE.fullmatch(name), f"{name!r} is no name for a tensor file"
        data = safetensors.torch.save(_own_memory(named), metadata={"format": "pt"})
        files[f"{name}.safetensors"] = _write_file(folder / f"{name}.safetensors", data, f"ckpt.mid_{name}")
    files[STATE] = _write_file(folder / STATE, state_text.encode())
    failpoint("ckpt.before_manifest")
    manifest = json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=2)  # no byte to spare: cuts show
    _write_file(folder / MANIFEST, manifest.encode())
    sync_folder(folder)


def _write_file(path: Path, data: bytes, middle: str = "") -> dict[str, object]:
    """Write and fsync a new file; returns its manifest entry."""
    view = memoryview(data)
    with path.open("xb") as file:
        file.write(view[: len(view) // 2])
        if middle:
            file.flush()
            failpoint(middle)
        file.write(view[len(view) // 2 :])
        file.flush()
        failpoint("ckpt.before_fsync")
        sync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors that share no memory with each other, which safetensors asks for."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        own[name] = plain
    return own


def _restore(root: Path) -> None:
    """Finish what a kill between the two renames of `_publish` left."""
    for old in root.glob("step-*.old"):
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))


def _publish(temporary: Path, folder: Path) -> None:
    failpoint("ckpt.before_rename")
    if folder.exists():  # a step saved again: the old folder stays readable until the new one has its name
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        failpoint("ckpt.mid_replace")
    temporary.rename(folder)
    failpoint("ckpt.after_rename")
    sync_folder(folder.parent)


def _prune(root: Path, step: int, keep: int, warn: Warn) -> None:
    """Remove all folders up to `step` but the newest `keep` and the best. Later steps are not this run's to remove."""
    mine = [folder for folder in _folders(root) if _step(folder) <= step]
    kept = [folder for folder in mine if not folder.name.endswith(".old")][:keep]
    best = _pointer(root, "best")
    for folder in mine:
        if folder in kept or folder == best:
            continue
        doomed = folder.with_name(f"{TEMPORARY}{folder.name}-{secrets.token_hex(4)}")
        try:
            folder.rename(doomed)  # half-deleted folders are never seen under a checkpoint's name
            failpoint("ckpt.mid_prune")
            shutil.rmtree(doomed)
        except OSError as error:
            warn(f"could not remove the old checkpoint {folder}: {error}")


# -- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def is_root(path: Path) -> bool:
    """True for a folder that is no checkpoint, whole or damaged, but may hold some."""
    return os.path.isdir(path) and not exists(path / MANIFEST) and _FOLDER.fullmatch(path.name) is None


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest step first, a replaced one after its replacement."""
    folders = [path for path in root.glob("step-*") if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: (-_step(path), path.name))


def _step(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    assert match
    return int(match[1])


def _pointer(root: Path, name: str) -> Path | None:
    """Folder that the pointer file `name` names, or is about to replace; None without such a file or a name in it."""
    try:
        target = (root / name).read_text("utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(str(root / name), f"cannot be read ({error})", _ELSEWHERE) from error
    if not _FOLDER.fullmatch(target):
        return None
    replaced = root / f"{target}.old"  # left by a kill between the two renames of a step saved again
    return replaced if replaced.is_dir() and not (root / target).exists() else root / target


def _damaged(path: Path, got: str) -> CheckpointError:
    return CheckpointError(str(path), got, _ELSEWHERE)


def _verify(folder: Path) -> None:
    step, files = _read_manifest(folder)
    for name, entry in files.items():
        if name == STATE:
            _read_state(folder, entry, step)
        else:
            _verify_file(folder / name, entry)


def _read_manifest(folder: Path) -> tuple[int, dict[str, _Entry]]:
    path = folder / MANIFEST
    if not os.path.isdir(folder):
        raise _damaged(folder, "is not a checkpoint folder" if exists(folder) else "does not exist")
    manifest = parse_json(path, read_bytes(path, _ELSEWHERE), _ELSEWHERE)
    with understood(path, _ELSEWHERE):
        if manifest["format"] != _FORMAT:
            got = f"has format {manifest['format']!r}, this version reads {_FORMAT}"
            raise CheckpointError(str(path), got, "Read it with the version of sparsevit-cli that wrote it.")
        step = manifest["step"]
        files = {name: _Entry(entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    named = _FOLDER.fullmatch(folder.name)
    if type(step) is not int or (named and step != int(named[1])):
        raise _damaged(path, f"belongs to step {step!r}, the folder to another")
    strange = [name for name in files if name != STATE and not re.fullmatch(_FILE.pattern + r"\.safetensors", name)]
    if strange or STATE not in files:
        raise _damaged(path, f"lists {strange or list(files)}; expected {STATE} and .safetensors files beside it")
    return step, files


def _read_state(folder: Path, entry: _Entry, step: int) -> dict[str, Any]:
    state = parse_json(folder / STATE, _read_verified(folder / STATE, entry), _ELSEWHERE)
    if state.get("step") != step:
        raise _damaged(folder / STATE, f"belongs to step {state.get('step')!r}, the manifest to step {step}")
    return state


def _read_verified(path: Path, entry: _Entry) -> bytes:
    """Bytes of the file, checked after reading: what is used is what was hashed."""
    data = read_bytes(path, _ELSEWHERE)
    _compare(path, entry, _Entry(len(data), hashlib.sha256(data).hexdigest()))
    return data


def _verify_file(path: Path, entry: _Entry) -> None:
    try:
        size = path.stat().st_size
        found = _Entry(size, sha256_file(path) if size == entry.bytes else "")
    except FileNotFoundError as error:
        raise _damaged(path, "is missing") from error
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    _compare(path, entry, found)


def _compare(path: Path, expected: _Entry, found: _Entry) -> None:
    if found.bytes != expected.bytes:
        raise _damaged(path, f"has {found.bytes} bytes, {MANIFEST} says {expected.bytes}")
    if found.sha256 != expected.sha256:
        raise _damaged(path, f"has another SHA-256 than {MANIFEST} says: its bytes changed")


# -- state_dict <-> tensors and JSON ------------------------------------------------------------------------------


def _pack(value: object, where: tuple[str, ...], tensors: dict[str, Tensor]) -> object:
    """JSON for `value`; whatever JSON lacks becomes an object with one key, its kind."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        name = ".".join(where[1:]) or "value"
        while name in tensors:
            name += "_"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_pack(key, where, tensors), _pack(item, (*where, str(key)), tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [_pack(item, (*where, str(number)), tensors) for number, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"state{'.'.join(where)}: a {type(value).__name__} cannot be saved without pickle")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no data type")
    return dtype


def _unpack(packed: object, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(packed, list):
        return [_unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    found: Any
    match kind:
        case "float":
            found = float(content)
        case "tensor":
            found = tensors[content]
        case "dtype":
            found = _dtype(content)
        case "tuple":
            found = tuple(_unpack(item, tensors) for item in content)
        case "dict":
            found = {_unpack(key, tensors): _unpack(item, tensors) for key, item in content}
        case _:
            raise ValueError(f"unknown kind {kind!r}")
    return found
