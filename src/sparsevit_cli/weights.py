"""Weights from anywhere: read as data, renamed to timm's layout, and loaded exactly or not at all."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from .checkpoints import load_checkpoint
from .config.yaml_loader import printable
from .documents import exists
from .errors import CheckpointError, pass_on
from .torch_files import LEGACY_START, ZIP_START, StoredTensor, Unknown, open_torch_file

Say = Callable[[str], None]
_say: Say = logging.getLogger(__name__).info
_MAX_LISTED = 10
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
_STEM = "patch_embed.proj.weight"
"""In every timm Swin; what stands before it is the prefix of a module around the model."""
_BUFFERS = (
    "relative_position_index",
    "relative_coords_table",
    "relative_coordinates_log",
    "attn_mask",
)  # computed by timm since 0.9, stored before
_HEAD = ("head.fc.weight", "head.fc.bias")
_BIAS_TABLE = "relative_position_bias_table"


def read_weights(path: Path | str, say: Say = _say) -> dict[str, Tensor]:
    """Weights on the CPU from a safetensors file, a file of `torch.save`, or a checkpoint folder of ours.

    The format is told by the first bytes, whatever the ending. Averaged (EMA) weights are preferred where there are
    both. Wrapping dicts, other things beside the tensors, and the prefixes of DataParallel, torch.compile and
    Lightning are taken off, and `say` is told so; Microsoft's official names become timm's. Never runs code from the
    file: see `torch_files`. Raises CheckpointError.
    """
    path = Path(path)
    if os.path.isdir(path):
        tensors = load_checkpoint(path, only=("model", "ema")).tensors
        if not tensors:
            raise CheckpointError(str(path), "holds neither `ema` nor `model` weights", "Give another checkpoint.")
        return _timm_layout(_plain_names(path, tensors.get("ema", tensors.get("model", {})), []))
    if not os.path.isfile(path):
        got = "is no file" if exists(path) else "does not exist"
        raise CheckpointError(str(path), got, "Give a .safetensors or .pth file, or a checkpoint folder.")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", "Check its permissions.") from error
    if path.suffix.lower() == ".safetensors" or head[8:9] == b"{":
        return _taken(path, _read_safetensors(path), (), say)
    if not head.startswith((ZIP_START, LEGACY_START)):
        got = f"starts neither like a safetensors file nor like one of torch.save (its ending is {path.suffix!r})"
        raise CheckpointError(str(path), got, f"Copy it again. If it is another format: {_CONVERT}")
    with open_torch_file(path) as found:
        return _taken(path, found.content, found.unknown, say)


def _taken(path: Path, content: object, unknown: Sequence[str], say: Say) -> dict[str, Tensor]:
    """The weights inside `content`, with timm's names; tells `say` where they were and what was left out."""
    candidates = _wrapped(content)
    if not candidates:
        held = content.name if isinstance(content, Unknown) else f"a {type(content).__name__}"
        named = f" (it names {', '.join(unknown[:_MAX_LISTED])})" if unknown else ""
        raise CheckpointError(str(path), f"holds {printable(held)}, not named tensors{printable(named)}", _CONVERT)
    swins = [found for found in candidates if any(str(key).endswith(_STEM) for key in found[1])]
    where, named_tensors = (swins or candidates)[0]
    told = [f"the weights are those of `{'.'.join(where)}`"] if where else []
    tensors = {
        key: tensor.load() if isinstance(tensor, StoredTensor) else tensor
        for key, tensor in named_tensors.items()
        if isinstance(key, str) and isinstance(tensor, (StoredTensor, Tensor))
    }
    if others := [str(key) for key in named_tensors if key not in tensors]:
        told.append(f"left out are {len(others)} entries that are no tensors ({', '.join(others[:_MAX_LISTED])})")
    weights = _plain_names(path, tensors, told)
    if unknown:
        told.append(f"objects beside them were not made: {', '.join(unknown[:_MAX_LISTED])}")
    if told:
        say(printable(f"{path}: {'; '.join(told)}"))
    return _timm_layout(weights)


def _wrapped(content: object) -> list[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Dicts with tensors inside `content`, the averaged ones first; also of dicts that hold themselves."""
    found: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = []
    seen: set[int] = set()

    def visit(inner: object, where: tuple[str, ...]) -> None:
        if not isinstance(inner, (Mapping, list, tuple)) or id(inner) in seen or len(where) > _MAX_WRAPPERS:
            return
        seen.add(id(inner))
        if not isinstance(inner, Mapping):
            for number, item in enumerate(inner[:_MAX_LISTED]):
                visit(item, (*where, str(number)))
            return
        for key in dict.fromkeys((*_WRAPPERS, *(key for key in inner if isinstance(key, str)))):
            if key in inner:
                visit(inner[key], (*where, key))
        if any(isinstance(key, str) and isinstance(item, (StoredTensor, Tensor)) for key, item in inner.items()):
            found.append((where, inner))

    visit(content, ())
    return found


def load_weights(model: nn.Module, path: Path | str, reset_head: bool = False, say: Say = _say) -> tuple[str, ...]:
    """Load `path` into a timm Swin, exactly or not at all; returns the keys left as they were (the new head).

    Takes timm's layout and Microsoft's official one. With `reset_head` a classifier that does not fit, or is
    missing, stays as `model` has it. Nothing is interpolated. Raises CheckpointError with at most 10 keys and
    shapes, before anything in the model changes.
    """
    return load_state(model, read_weights(path, say), str(path), reset_head)


def load_state(model: nn.Module, weights: dict[str, Tensor], name: str, reset_head: bool = False) -> tuple[str, ...]:
    """`load_weights` for tensors at hand; `name` stands for them in messages."""
    own = model.state_dict()
    wrong = [
        key for key in (*own, *(key for key in weights if key not in own)) if _shape(own, key) != _shape(weights, key)
    ]
    kept = tuple(key for key in wrong if key in _HEAD) if reset_head else ()
    wrong = [key for key in wrong if key not in kept]
    if wrong:
        raise _misfit(name, own, weights, wrong)
    fitting = {key: tensor for key, tensor in weights.items() if key not in kept}
    model.load_state_dict(fitting | {key: own[key] for key in kept if key in own})
    return kept


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # damaged headers surface as many types
        pass_on(error)
        raise CheckpointError(str(path), f"is not a readable safetensors file ({error})", "Copy it again.") from error


def _plain_names(path: Path, weights: Mapping[str, Tensor], told: list[str]) -> dict[str, Tensor]:
    """Keys without the prefixes of DataParallel (`module.`), torch.compile (`_orig_mod.`) and of a module around.

    What lies outside of such a module (`model.` of Lightning, `backbone.`) is left out; `told` gets a line on it.
    """
    plain: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = key.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in plain:
            raise CheckpointError(str(path), f"holds {printable(name)} twice, with and without prefix", _CONVERT)
        plain[name] = tensor
    prefixes = [name.removesuffix(_STEM) for name in plain if name.endswith((_STEM, f".{_STEM}"))]
    averaged = [prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix)]
    chosen = averaged if len(averaged) == 1 else [prefix for prefix in prefixes if not prefix] or prefixes
    if len(chosen) > 1:
        got = f"holds several models: {', '.join(f'`{printable(prefix)}`' for prefix in chosen[:_MAX_LISTED])}"
        raise CheckpointError(str(path), got, "Save the tensors of one of them with safetensors.torch.save_file.")
    prefix = chosen[0] if chosen else ""
    others = tuple(other for other in prefixes if other != prefix)
    inside = {
        name.removeprefix(prefix): tensor
        for name, tensor in plain.items()
        if name.startswith(prefix) and not (others and not prefix and name.startswith(others))
    }
    if prefix:
        told.append(f"the prefix `{prefix}` is taken off")
    if outside := [name for name in plain if name.removeprefix(prefix) not in inside]:
        told.append(f"left out are {len(outside)} tensors beside the model ({', '.join(outside[:_MAX_LISTED])})")
    return inside


def _timm_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as timm has them: stored buffers dropped, Microsoft's official keys renamed.

    Officially a stage ends with its merging, in timm the next one starts with it. The renaming is that of timm's
    `checkpoint_filter_fn`, which would also interpolate bias tables and patches that do not fit.
    """
    kept = {key: tensor for key, tensor in weights.items() if not key.endswith(_BUFFERS)}
    if "head.weight" in kept and any(key.startswith("stages.") for key in kept):
        return {_first_cr_name(key): (1 / tensor).log() if ".tau" in key else tensor for key, tensor in kept.items()}
    if "layers.0.downsample.reduction.weight" not in kept:
        return kept

    def renamed(key: str) -> str:
        key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.", key)
        return re.sub(r"^head\.(?!fc\.)", "head.fc.", key)

    return {renamed(key): tensor for key, tensor in kept.items()}


def _first_cr_name(key: str) -> str:
    """Names of timm's first V2-CR files: the head without `fc`, and the inverse of today's logit_scale."""
    return re.sub(r"^head\.", "head.fc.", key).replace(".tau", ".logit_scale")


def _shape(weights: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None


def _misfit(
    name: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], wrong: Sequence[str]
) -> CheckpointError:
    """The error that lists what does not fit, and names the setting most likely at fault."""
    both = [key for key in wrong if key in own and key in weights]
    missing, unexpected = ([key for key in wrong if key not in those] for those in (weights, own))
    listed = [*both, *(key for pair in zip_longest(missing, unexpected) for key in pair if key)][:_MAX_LISTED]
    lines = [f"{key}: {_text(_shape(weights, key))} here, {_text(_shape(own, key))} in the model" for key in listed]
    more = f"; and {len(wrong) - len(listed)} more" if len(wrong) > len(listed) else ""
    got = f"tensors that do not fit the model: {len(wrong)} ({'; '.join(lines)}{more})"
    windows = [
        (_window_side(weights[key]), _window_side(own[key]), key)
        for key in both
        if key.endswith(_BIAS_TABLE) and own[key].shape[1] == weights[key].shape[1]
    ]
    if all(key in _HEAD for key in wrong):
        do = "Set model.reset_head to start with a new head, or give the model as many outputs as the checkpoint has."
    elif windows and len(windows) == len(wrong):
        theirs, ours, key = windows[0]
        do = (
            f"Its windows are {theirs}, the model's {ours} ({key.rpartition('.attn')[0]}). "
            "Set model.window_size, or model.always_partition where the image is so small that timm shrinks windows."
        )
    else:
        do = "Give the name, embed_dim, depths, num_heads, window_size and in_chans it was trained with."
    return CheckpointError(name, got, do)


def _text(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "scalar"


def _window_side(table: Tensor) -> str:
    side = (table.shape[0] ** 0.5 + 1) / 2
    return f"{side:g}x{side:g}" if side.is_integer() else f"{table.shape[0]} relative positions"
