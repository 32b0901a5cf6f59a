"""Tensors of a file, of whatever family, placed into a model of ours: exactly or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from torch import Tensor, nn

from sparsevit_cli.config.yaml_loader import printable
from sparsevit_cli.errors import CheckpointError
from sparsevit_cli.windows import Partition

from .families import MAX_LISTED, MICROSOFT, PAD_FIRST, TIMM, SwinTensors, Trunk, find_trunks, swin_tensors
from .files import WeightsFile, read_file

Say = Callable[[str], None]
_log = logging.getLogger(__name__)
tell_log: Say = _log.info
_HEAD = ("head.fc.weight", "head.fc.bias")
_BIAS_TABLE = "relative_position_bias_table"
_OPTIONAL = {"head.": "the head", "norm.": "the final norm", "norms.": "norms of levels"}
"""Parts of a Swin that not every model has, and how they are told."""


def read_weights(path: Path | str, say: Say = tell_log) -> dict[str, Tensor]:
    """The Swin of a file with timm's names, and `norms.<level>` where it has norms of levels; see `read_file`.

    Prefixes of modules around it are taken off, and what lies beside it is left out; `say` is told so. A file without
    a Swin comes back as it is. Raises CheckpointError.
    """
    file = read_file(path)
    trunk, others = _chosen(file.path, file.tensors)
    if trunk is None:
        file.tell(say)
        return file.tensors
    swin = swin_tensors(file.tensors, trunk, others, file.path)
    file.tell(say, *_told(file.tensors, trunk, swin))
    return swin.tensors


def load_weights(
    model: nn.Module,
    path: Path | str | WeightsFile,
    reset_head: bool = False,
    say: Say = tell_log,
    *,
    partition: Partition = "roll_first",
) -> tuple[str, ...]:
    """Load `path` into a timm Swin, or a model around one, exactly or not at all; returns the keys left as they were.

    `path` may be a file that was read already. Takes the families of `families.FAMILIES`. With `reset_head` a
    classifier that does not fit, or is missing, stays as `model` has it. A SwinBackbone takes the backbone of any
    file: head and final norm are left out, and its norms of levels stay as they are if the file has none. Nothing is
    interpolated. A warning tells of weights that were trained with another `partition` than the model's. Raises
    CheckpointError with at most 10 keys and shapes, before anything in the model changes.
    """
    file = path if isinstance(path, WeightsFile) else read_file(path)
    own = model.state_dict()
    fit = _fit(file, own, partition)
    file.tell(say, *fit.told)
    kept = {key: own[key] for key in fit.kept}
    return (*load_state(model, fit.tensors | kept, file.path, reset_head), *fit.kept)


def fitted(
    tensors: dict[str, Tensor],
    model: nn.Module,
    name: str,
    say: Say = tell_log,
    *,
    partition: Partition = "roll_first",
) -> dict[str, Tensor]:
    """`tensors` of a file, by its names, with the names that `model` has for them; see `load_weights`.

    `name` stands for them in messages. Raises CheckpointError.
    """
    own, file = model.state_dict(), WeightsFile(name, tensors)
    fit = _fit(file, own, partition)
    file.tell(say, *fit.told)
    return fit.tensors | {key: own[key] for key in fit.kept}


def with_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of a file by its names, and those of its Swin by ours too; the same if it has no Swin, or several."""
    trunks = find_trunks(tensors)
    return swin_tensors(tensors, trunks[0]).tensors | tensors if len(trunks) == 1 else tensors


def load_state(model: nn.Module, weights: dict[str, Tensor], name: str, reset_head: bool = False) -> tuple[str, ...]:
    """Load tensors that have the model's own names; `name` stands for them in messages. See `load_weights`."""
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


# -- which Swin of the file, and where it goes --------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """Tensors by the model's names, keys of the model that stay as they are, and what there is to tell."""

    tensors: dict[str, Tensor]
    kept: tuple[str, ...] = ()
    told: tuple[str, ...] = ()


def _chosen(name: str, tensors: Mapping[str, Tensor], root: str = "") -> tuple[Trunk | None, tuple[str, ...]]:
    """The Swin of a file, and the prefixes of other ones: the averaged one, else the one below `root`, else the only.

    Raises CheckpointError where there are several.
    """
    trunks = find_trunks(tensors)
    averaged = [trunk for trunk in trunks if trunk.averaged]
    same = [trunk for trunk in trunks if trunk.root == root] or [trunk for trunk in trunks if not trunk.root]
    chosen = averaged if len(averaged) == 1 else same[:1] or trunks
    if len(chosen) > 1:
        got = f"holds several models: {', '.join(f'`{printable(trunk.root)}`' for trunk in chosen[:MAX_LISTED])}"
        raise CheckpointError(name, got, "Save the tensors of one of them with safetensors.torch.save_file.")
    return (chosen[0] if chosen else None), tuple(trunk.root for trunk in trunks if trunk not in chosen)


def _fit(file: WeightsFile, own: Mapping[str, Tensor], partition: Partition) -> _Fit:
    """The tensors of `file` by the names of the model `own`, as far as there is a Swin in both.

    A model that is a Swin alone, with or without norms of levels, takes that from the file and nothing else. Any other
    model takes the whole file.
    """
    swins = find_trunks(own)
    if len(swins) != 1 or swins[0].family is not TIMM:
        return _Fit(file.tensors)
    target = swins[0]
    trunk, others = _chosen(file.path, file.tensors, target.root)
    if trunk is None:
        return _Fit(file.tensors)
    ours, swin = swin_tensors(own, target), swin_tensors(file.tensors, trunk, others, file.path)
    _warn_of_partition(file.path, trunk, swin, partition)
    alone = len(ours.taken) == len(own)
    dropped = [key for key in swin.tensors if key not in ours.tensors and key.startswith(tuple(_OPTIONAL))]
    placed = {_place(target, key): tensor for key, tensor in swin.tensors.items() if key not in dropped}
    around = {} if alone else _around(file.tensors, trunk, target, swin, others)
    levels = {key for key in ours.tensors if key.startswith("norms.")}
    new = tuple(_place(target, key) for key in sorted(levels)) if alone and not levels & swin.tensors.keys() else ()
    told = _told(file.tensors, trunk, swin, target.root, tuple(around.values()))
    told += [
        f"{words} ({count} tensors) left out, for which the model has no place"
        for part, words in _OPTIONAL.items()
        if (count := sum(key.startswith(part) for key in dropped))
    ]
    told += [f"the model's norms of levels stay new ({len(new)} tensors)"] if new else []
    return _Fit(placed | {key: file.tensors[theirs] for key, theirs in around.items()}, new, tuple(told))


def _place(target: Trunk, key: str) -> str:
    """The model's name for our `key`: norms of levels are beside the Swin, all else below it."""
    return (target.parent if key.startswith("norms.") else target.root) + key


def _around(
    tensors: Mapping[str, Tensor], trunk: Trunk, target: Trunk, swin: SwinTensors, others: tuple[str, ...]
) -> dict[str, str]:
    """What is around the Swin: the model's name to the file's.

    A prefix in front of all that the model has, as Lightning's `model.`, is taken off; what is without it is left out.
    """
    extra = trunk.root.removesuffix(target.root) if trunk.root.endswith(target.root) else ""
    return {
        key.removeprefix(extra): key
        for key in tensors
        if key not in swin.taken and key.startswith(extra) and not (others and key.startswith(others))
    }


# -- what is told -------------------------------------------------------------------------------------------------


def _told(
    tensors: Mapping[str, Tensor], trunk: Trunk, swin: SwinTensors, root: str = "", around: Sequence[str] = ()
) -> list[str]:
    """What was recognised, and what was left out of the file; the model's own Swin is below `root`."""
    told: list[str] = []
    family = trunk.family
    if family is not TIMM:
        dense = any(key.startswith("norms.") for key in swin.tensors)
        told.append(f"{family.told} names, {len(swin.tensors)} tensors of a Swin{' and its norms of levels' * dense}")
    if trunk.root != root:
        told.append(f"its prefix `{trunk.root}` becomes `{root}`")
    if swin.unused:
        told.append(f"left out, as it is of no use: {_listed(swin.unused)}")
    if outside := [name for name in tensors if name not in swin.taken and name not in around]:
        told.append(f"left out are {len(outside)} tensors beside the model ({_listed(outside)})")
    return told


def _warn_of_partition(path: str, trunk: Trunk, swin: SwinTensors, partition: Partition) -> None:
    """A warning if the file's library pads a map before it rolls it, and the model does not."""
    saw_padding = trunk.family is not MICROSOFT or any(key.startswith("norms.") for key in swin.tensors)
    if trunk.family.pad_first and saw_padding and partition != PAD_FIRST:
        _log.warning(other_partition(path, PAD_FIRST, partition))


def other_partition(path: Path | str, trained: str, partition: str) -> str:
    """What to say of weights in `path` that were `trained` with another partition than the model's."""
    return (
        f"{printable(str(path))}: the weights were trained with model.partition {trained}, the model has {partition}: "
        f"the same where windows divide every map, worse elsewhere. Set model.partition: {trained}"
    )


def _listed(names: Iterable[str]) -> str:
    """Up to ten names; of many, the modules that they are in."""
    names = list(names)
    if len(names) > MAX_LISTED:
        names = list(dict.fromkeys(f"{re.match(r'[^.]*', name)[0]}.*" for name in names))  # type: ignore[index]
    return ", ".join(names[:MAX_LISTED])


def _shape(weights: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(weights[key].shape) if key in weights else None


def _misfit(
    name: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], wrong: Sequence[str]
) -> CheckpointError:
    """The error that lists what does not fit, and names the setting most likely at fault."""
    both = [key for key in wrong if key in own and key in weights]
    missing, unexpected = ([key for key in wrong if key not in those] for those in (weights, own))
    listed = [*both, *(key for pair in zip_longest(missing, unexpected) for key in pair if key)][:MAX_LISTED]
    lines = [f"{key}: {_text(_shape(weights, key))} here, {_text(_shape(own, key))} in the model" for key in listed]
    more = f"; and {len(wrong) - len(listed)} more" if len(wrong) > len(listed) else ""
    got = f"tensors that do not fit the model: {len(wrong)} ({'; '.join(lines)}{more})"
    windows = [
        (_window_side(weights[key]), _window_side(own[key]), key)
        for key in both
        if key.endswith(_BIAS_TABLE) and own[key].shape[1] == weights[key].shape[1]
    ]
    root = next((trunk.root for trunk in find_trunks(own)), "")
    if root and not any(key.startswith(root) for key in wrong):
        do = (
            "What is around the backbone does not fit. Give the settings that the model was trained with; a file of a "
            "backbone alone goes into model.checkpoint."
        )
    elif all(key in _HEAD for key in wrong):
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
