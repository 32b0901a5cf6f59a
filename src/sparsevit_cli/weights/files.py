"""Files of weights, read as data: tensors by the names in the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sparsevit_cli.checkpoints import is_root, load_checkpoint
from sparsevit_cli.config.yaml_loader import printable
from sparsevit_cli.documents import exists
from sparsevit_cli.errors import CheckpointError, pass_on
from sparsevit_cli.torch_files import LEGACY_START, ZIP_START, StoredTensor, Unknown, open_torch_file

from .families import MAX_LISTED, has_stem

_CONVERT = "Save its tensors alone with safetensors.torch.save_file, and give that file."
_WRAPPERS = (
    *(
        "state_dict_ema",
        "model_ema",
        "ema_state_dict",
        "model_ema_state_dict",
        "ema_model",
        "ema",
        "params_ema",
        "teacher",
    ),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "module"),
    *("backbone", "encoder"),
)  # averaged weights first
_MAX_WRAPPERS = 8
_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
"""What transformers calls its files of weights."""


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds: tensors on the CPU by the names in the file, and what there is to tell of it."""

    path: str
    tensors: dict[str, Tensor]
    told: tuple[str, ...] = ()

    def tell(self, say: Callable[[str], None], *more: str) -> None:
        """`say` what there is to tell, and `more`, in one line."""
        if told := (*self.told, *more):
            say(printable(f"{self.path}: {'; '.join(told)}"))


def read_file(path: Path | str) -> WeightsFile:
    """Tensors of a safetensors file, of a file of `torch.save` or `pickle`, of a checkpoint folder, or of a folder of
    transformers' save_pretrained.

    The format is told by the first bytes, whatever the ending. Averaged (EMA) weights are preferred where there are
    both. Wrapping dicts, other things beside the tensors, and the prefixes of DataParallel and torch.compile are taken
    off; all other names are the file's. Never runs code from the file: see `torch_files`. Raises CheckpointError.
    """
    path = weights_in(Path(path))
    if os.path.isdir(path):
        tensors = load_checkpoint(path, only=("model", "ema")).tensors
        if not tensors:
            raise CheckpointError(str(path), "holds neither `ema` nor `model` weights", "Give another checkpoint.")
        return WeightsFile(str(path), _plain_names(path, tensors.get("ema", tensors.get("model", {}))))
    if not os.path.isfile(path):
        got = "is no file" if exists(path) else "does not exist"
        raise CheckpointError(str(path), got, "Give a .safetensors or .pth file, or a checkpoint folder.")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", "Check its permissions.") from error
    if path.suffix.lower() == ".safetensors" or head[8:9] == b"{":
        return _taken(path, _read_safetensors(path), ())
    if not head.startswith((ZIP_START, LEGACY_START)):
        got = f"starts neither like a safetensors file nor like one of torch.save (its ending is {path.suffix!r})"
        raise CheckpointError(str(path), got, f"Copy it again. If it is another format: {_CONVERT}")
    with open_torch_file(path) as found:
        return _taken(path, found.content, found.unknown)


def weights_in(path: Path) -> Path:
    """The file of weights in a folder of transformers' save_pretrained, or of an export; any other `path` as it is.

    A checkpoint of ours stays the folder that it is, though one of its files has the same name. Raises CheckpointError.
    """
    if not is_root(path):
        return path
    if os.path.isfile(path / f"{_IN_FOLDER[0]}.index.json"):
        do = "Join them: load it with transformers and save it with max_shard_size='100GB'."
        raise CheckpointError(str(path), "its weights lie in several files", do)
    return next((path / name for name in _IN_FOLDER if os.path.isfile(path / name)), path)


def _taken(path: Path, content: object, unknown: Sequence[str]) -> WeightsFile:
    """The weights inside `content`; told is where they were and what was left out."""
    candidates = _wrapped(content)
    if not candidates:
        held = content.name if isinstance(content, Unknown) else f"a {type(content).__name__}"
        named = f" (it names {', '.join(unknown[:MAX_LISTED])})" if unknown else ""
        raise CheckpointError(str(path), f"holds {printable(held)}, not named tensors{printable(named)}", _CONVERT)
    swins = [found for found in candidates if has_stem(found[1])]
    where, named_tensors = (swins or candidates)[0]
    told = [f"the weights are those of `{'.'.join(where)}`"] if where else []
    tensors = {
        key: tensor.load() if isinstance(tensor, StoredTensor) else tensor
        for key, tensor in named_tensors.items()
        if isinstance(key, str) and isinstance(tensor, (StoredTensor, Tensor))
    }
    if others := [str(key) for key in named_tensors if key not in tensors]:
        told.append(f"left out are {len(others)} entries that are no tensors ({', '.join(others[:MAX_LISTED])})")
    weights = _plain_names(path, tensors)
    if unknown:
        told.append(f"objects beside them were not made: {', '.join(unknown[:MAX_LISTED])}")
    return WeightsFile(str(path), weights, tuple(told))


def _wrapped(content: object) -> list[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Dicts with tensors inside `content`, the averaged ones first; also of dicts that hold themselves."""
    found: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = []
    seen: set[int] = set()

    def visit(inner: object, where: tuple[str, ...]) -> None:
        if not isinstance(inner, (Mapping, list, tuple)) or id(inner) in seen or len(where) > _MAX_WRAPPERS:
            return
        seen.add(id(inner))
        if not isinstance(inner, Mapping):
            for number, item in enumerate(inner[:MAX_LISTED]):
                visit(item, (*where, str(number)))
            return
        for key in dict.fromkeys((*_WRAPPERS, *(key for key in inner if isinstance(key, str)))):
            if key in inner:
                visit(inner[key], (*where, key))
        if any(isinstance(key, str) and isinstance(item, (StoredTensor, Tensor)) for key, item in inner.items()):
            found.append((where, inner))

    visit(content, ())
    return found


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # damaged headers surface as many types
        pass_on(error)
        raise CheckpointError(str(path), f"is not a readable safetensors file ({error})", "Copy it again.") from error


def _plain_names(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes of DataParallel (`module.`) and torch.compile (`_orig_mod.`)."""
    plain: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = key.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in plain:
            raise CheckpointError(str(path), f"holds {printable(name)} twice, with and without prefix", _CONVERT)
        plain[name] = tensor
    return plain
