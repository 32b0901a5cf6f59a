"""How libraries name a Swin's tensors: one table per library, read in both directions, exact to the bit.

Our names are timm's, and `norms.<level>` for the LayerNorm of a level that a dense backbone gives. Theirs are the
names in their *files*: transformers 5 renames modules when it loads a file, and names them back when it saves one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from sparsevit_cli.config.yaml_loader import printable
from sparsevit_cli.errors import CheckpointError

STEM = "patch_embed.proj.weight"
"""In every timm Swin; what stands before it is the prefix of a module around the model."""
BUFFERS = ("relative_position_index", "relative_coords_table", "relative_coordinates_log", "attn_mask")
"""Computed from the sizes; files hold them, timm does so no more since 0.9."""
PAD_FIRST = "pad_first"
"""The partition of the libraries that pad a map before they roll it."""

MAX_LISTED = 10
"""Names told of many."""

_DETECTRON2 = ("sem_seg_head.", "proposal_generator.", "roi_heads.")
_UP = "^"


@dataclass(frozen=True)
class Family:
    """A library's names, below the module that holds the patch embedding.

    A row of `names` is a pattern of ours and its spellings in files, of which the first is written. In patterns `{s}`
    stands for a number, `{s+1}` for the next one, `{p}` for weight or bias, `{rest}` for anything. A spelling that
    starts with `^` is beside that module, not below it. `read` and `write` change tensors by our name.
    """

    name: str
    told: str
    stem: str
    names: tuple[tuple[str, tuple[str, ...]], ...]
    pad_first: bool = True
    root: str = ""
    """What a classifier's file has in front of its Swin."""
    dense_root: str = ""
    """What a file with norms of levels has there."""
    splits_qkv: bool = False
    unused: tuple[str, ...] = ()
    """Names of theirs that take no part in a forward pass."""
    read: Callable[[str, Tensor], Tensor] = field(default=lambda name, tensor: tensor, repr=False)
    write: Callable[[str, Tensor], Tensor] | None = field(default=lambda name, tensor: tensor, repr=False)


@dataclass(frozen=True)
class Trunk:
    """A Swin inside a file: its family, and what stands in front of its names."""

    family: Family
    root: str

    @property
    def parent(self) -> str:
        """The prefix of the module around it: `model.` for `model.swin.`."""
        return re.sub(r"[^.]+\.$", "", self.root)

    @property
    def averaged(self) -> bool:
        """True for the weights of an exponential moving average."""
        return "ema" in re.split(r"[._]", self.root)


@dataclass(frozen=True)
class SwinTensors:
    """A Swin of a file, with our names. `taken` are its names there, `unused` those of them that nothing computes."""

    tensors: dict[str, Tensor]
    taken: frozenset[str]
    unused: tuple[str, ...]


# -- the tables ---------------------------------------------------------------------------------------------------

_TABLE = "relative_position_bias_table"
_BLOCK = "layers.{s}.blocks.{b}"


_MERGING = re.compile(r"layers\.\d+\.downsample\.(reduction|norm)\.\w+")


def _unfold(name: str, tensor: Tensor) -> Tensor:
    """Ours to mmdet's order of the 4 C inputs of a patch merging.

    timm concatenates the four neighbours, column by column: input (w, h, c). nn.Unfold gives (c, h, w).
    """
    return _turned(tensor, (2, 2, -1)) if _MERGING.fullmatch(name) else tensor


def _fold(name: str, tensor: Tensor) -> Tensor:
    """mmdet's order to ours: the inverse of `_unfold`."""
    return _turned(tensor, (-1, 2, 2)) if _MERGING.fullmatch(name) else tensor


def _turned(tensor: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """The last dimension as three of `sizes`, the first and the third exchanged."""
    if (
        not tensor.dim() or tensor.shape[-1] % 4
    ):  # no merging of four neighbours: the shape does not fit, which loading tells
        return tensor
    return tensor.reshape(*tensor.shape[:-1], *sizes).transpose(-1, -3).reshape(tensor.shape)


def _first_cr_values(name: str, tensor: Tensor) -> Tensor:
    """timm's first V2-CR files hold the inverse of today's logit_scale, before its logarithm."""
    return (1 / tensor).log() if name.endswith("logit_scale") else tensor


TIMM = Family(
    "timm", "timm's", STEM, (("norms.{l}.{p}", ("^norms.{l}.{p}",)), ("{rest}", ("{rest}",))),
    pad_first=False, dense_root="swin.",
)  # fmt: skip
"""timm/models/swin_transformer*.py, and our SwinBackbone, which keeps timm's names below `swin.`."""

FIRST_V2_CR = Family(
    "timm_v2_cr", "timm's first V2-CR", STEM,
    (("head.fc.{p}", ("head.{p}",)), ("{rest}logit_scale", ("{rest}tau",)), ("{rest}", ("{rest}",))),
    pad_first=False, read=_first_cr_values, write=None,
)  # fmt: skip

_MICROSOFT = (
    ("layers.{s+1}.downsample.{rest}", ("layers.{s}.downsample.{rest}",)),
    (f"{_BLOCK}.{{rest}}", (f"{_BLOCK}.{{rest}}",)),
    ("patch_embed.{rest}", ("patch_embed.{rest}",)),
    ("norms.{l}.{p}", ("norm{l}.{p}",)),
)
_CLASSIFIER = (("norm.{p}", ("norm.{p}",)), ("head.fc.{p}", ("head.{p}", "head.fc.{p}")))

MICROSOFT = Family("microsoft", "Microsoft's", STEM, (*_MICROSOFT, *_CLASSIFIER), unused=("mask_token",))
"""Swin-Transformer/models/swin_transformer.py, swin_transformer_v2.py, and the backbone of its detection repository,
mmdet/models/backbones/swin_transformer.py: a stage ends with its merging, in timm the next one starts with it."""

DETECTRON2 = Family("detectron2", "detectron2's", STEM, _MICROSOFT)
"""D2SwinTransformer of Mask2Former/mask2former/modeling/backbone/swin.py: Microsoft's names, below `backbone.`."""

MMDET = Family(
    "mmdet", "mmdet's", "patch_embed.projection.weight",
    (
        ("patch_embed.proj.{p}", ("patch_embed.projection.{p}",)),
        ("patch_embed.norm.{p}", ("patch_embed.norm.{p}",)),
        ("layers.{s+1}.downsample.{rest}", ("stages.{s}.downsample.{rest}",)),
        (f"{_BLOCK}.attn.qkv.{{p}}", ("stages.{s}.blocks.{b}.attn.w_msa.qkv.{p}",)),
        (f"{_BLOCK}.attn.proj.{{p}}", ("stages.{s}.blocks.{b}.attn.w_msa.proj.{p}",)),
        (f"{_BLOCK}.attn.{_TABLE}", (f"stages.{{s}}.blocks.{{b}}.attn.w_msa.{_TABLE}",)),
        (f"{_BLOCK}.mlp.fc1.{{p}}", ("stages.{s}.blocks.{b}.ffn.layers.0.0.{p}",)),
        (f"{_BLOCK}.mlp.fc2.{{p}}", ("stages.{s}.blocks.{b}.ffn.layers.1.{p}",)),
        (f"{_BLOCK}.norm{{n}}.{{p}}", ("stages.{s}.blocks.{b}.norm{n}.{p}",)),
        ("norms.{l}.{p}", ("norm{l}.{p}",)),
    ),
    read=_fold, write=_unfold,
)  # fmt: skip
"""mmdet/models/backbones/swin.py (mmseg's is the same), and PatchMerging of mmdet/models/layers/transformer/utils.py,
whose nn.Unfold orders the merging's inputs otherwise."""

_HF_BLOCK = "encoder.layers.{s}.blocks.{b}"
_TRANSFORMERS = (
    ("patch_embed.proj.{p}", ("embeddings.patch_embeddings.projection.{p}",)),
    ("patch_embed.norm.{p}", ("embeddings.norm.{p}",)),
    ("layers.{s+1}.downsample.{rest}", ("encoder.layers.{s}.downsample.{rest}",)),
    (f"{_BLOCK}.norm1.{{p}}", (f"{_HF_BLOCK}.layernorm_before.{{p}}",)),
    (f"{_BLOCK}.norm2.{{p}}", (f"{_HF_BLOCK}.layernorm_after.{{p}}",)),
    (f"{_BLOCK}.attn.proj.{{p}}", (f"{_HF_BLOCK}.attention.output.dense.{{p}}", f"{_HF_BLOCK}.attention.o_proj.{{p}}")),
    (f"{_BLOCK}.mlp.fc1.{{p}}", (f"{_HF_BLOCK}.intermediate.dense.{{p}}", f"{_HF_BLOCK}.mlp.fc1.{{p}}")),
    (f"{_BLOCK}.mlp.fc2.{{p}}", (f"{_HF_BLOCK}.output.dense.{{p}}", f"{_HF_BLOCK}.mlp.fc2.{{p}}")),
    ("norms.{l}.{p}", ("hidden_states_norms.stage{l+1}.{p}", "^hidden_states_norms.stage{l+1}.{p}",
                       "^hidden_states_norms.{l}.{p}")),
    ("norm.{p}", ("layernorm.{p}", "swin.layernorm.{p}")),
    ("head.fc.{p}", ("^classifier.{p}",)),
)  # fmt: skip
_QKV = tuple(
    (f"{_BLOCK}.attn.qkv.{{p}}#{part}",
     (f"{_HF_BLOCK}.attention.self.{old}.{{p}}", f"{_HF_BLOCK}.attention.{new}.{{p}}"))
    for part, (old, new) in enumerate((("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")))
)  # fmt: skip
TRANSFORMERS = Family(
    "transformers", "transformers'", "embeddings.patch_embeddings.projection.weight",
    (
        *_TRANSFORMERS, *_QKV,
        (f"{_BLOCK}.attn.{_TABLE}", (f"{_HF_BLOCK}.attention.self.{_TABLE}",
                                     f"{_HF_BLOCK}.attention.relative_position_bias.{_TABLE}")),
    ),
    root="swin.", splits_qkv=True, unused=("embeddings.mask_token",),
)  # fmt: skip
"""transformers/models/swin and models/maskformer (modeling_maskformer_swin.py). The second spellings are the names
in memory of version 5, which torch.save of a state_dict writes."""

TRANSFORMERS_V2 = Family(
    "transformers_v2", "transformers' Swin V2", TRANSFORMERS.stem,
    (
        (f"{_BLOCK}.attn.q_bias", (f"{_HF_BLOCK}.attention.self.query.bias",)),
        (f"{_BLOCK}.attn.v_bias", (f"{_HF_BLOCK}.attention.self.value.bias",)),
        (f"{_BLOCK}.attn.cpb_mlp.{{rest}}", (f"{_HF_BLOCK}.attention.self.continuous_position_bias_mlp.{{rest}}",)),
        (f"{_BLOCK}.attn.logit_scale", (f"{_HF_BLOCK}.attention.self.logit_scale",)),
        *_TRANSFORMERS, *_QKV,
    ),
    root="swinv2.", splits_qkv=True, unused=("embeddings.mask_token",),
)  # fmt: skip
"""transformers/models/swinv2: q and v have a bias, k has none."""

FAMILIES = {
    family.name: family for family in (TIMM, FIRST_V2_CR, MICROSOFT, DETECTRON2, MMDET, TRANSFORMERS, TRANSFORMERS_V2)
}
_STEMS = tuple(dict.fromkeys(family.stem for family in FAMILIES.values()))


# -- from their names to ours -------------------------------------------------------------------------------------


def has_stem(names: Iterable[object]) -> bool:
    """True where one of `names` is the weight of a Swin's patch embedding."""
    return any(_root(str(name), stem) is not None for name in names for stem in _STEMS)


def find_trunks(names: Iterable[str]) -> tuple[Trunk, ...]:
    """Every Swin among the names of a file, in their order."""
    names = tuple(names)
    found = ((stem, _root(name, stem)) for name in names for stem in _STEMS)
    return tuple(Trunk(_family(stem, root, names), root) for stem, root in found if root is not None)


def _root(name: str, stem: str) -> str | None:
    """What stands before `stem` in `name`; None where something else ends so."""
    root = name.removesuffix(stem)
    return root if name.endswith(stem) and (not root or root.endswith(".")) else None


def _family(stem: str, root: str, names: tuple[str, ...]) -> Family:
    """The family of the Swin below `root`, told by what it and its neighbours are named."""
    inside = {name.removeprefix(root) for name in names if name.startswith(root)}
    if stem == MMDET.stem:
        return MMDET
    if stem == TRANSFORMERS.stem:
        return TRANSFORMERS_V2 if any(name.endswith(".logit_scale") for name in inside) else TRANSFORMERS
    if "head.weight" in inside and any(name.startswith("stages.") for name in inside):
        return FIRST_V2_CR
    if "layers.0.downsample.reduction.weight" not in inside:
        return TIMM
    return DETECTRON2 if root and any(name.startswith(_DETECTRON2) for name in names) else MICROSOFT


def swin_tensors(
    tensors: Mapping[str, Tensor], trunk: Trunk, others: tuple[str, ...] = (), name: str = "weights"
) -> SwinTensors:
    """The Swin `trunk` of a file with our names, without buffers; `others` are prefixes of other Swins in the file.

    `name` stands for the file in messages.

    Raises CheckpointError for tensors below the Swin that the family does not have, for two that are the same one of
    ours, and where one of q, k and v is missing.
    """
    family = trunk.family
    ours: dict[str, Tensor] = {}
    taken: list[str] = []
    unused: list[str] = []
    unknown: list[str] = []
    for key, tensor in tensors.items():
        inside = key.startswith(trunk.root) and not (others and not trunk.root and key.startswith(others))
        if not inside and not (trunk.root and key.startswith(trunk.parent)):
            continue
        relative = key.removeprefix(trunk.root) if inside else _UP + key.removeprefix(trunk.parent)
        renamed = _renamed(relative, _reading(family))
        if not inside and renamed is None:
            continue
        taken.append(key)
        if relative in family.unused:
            unused.append(key)
        elif key.endswith(BUFFERS):
            continue
        elif renamed is None:
            unknown.append(key)
        elif renamed in ours:
            got = f"holds two tensors that are `{renamed}` of a Swin, one of them {printable(key)}"
            raise CheckpointError(name, got, "Keep one of them.")
        else:
            ours[renamed] = tensor
    if unknown:
        got = f"{family.told} Swin has {len(unknown)} tensors for which ours has no place ({_listed(unknown)})"
        raise CheckpointError(name, got, "Give weights of a plain Swin, without them.")
    joined = _joined(ours, trunk, name) if family.splits_qkv else ours
    return SwinTensors({n: family.read(n, t) for n, t in joined.items()}, frozenset(taken), tuple(unused))


def _joined(parts: dict[str, Tensor], trunk: Trunk, file: str) -> dict[str, Tensor]:
    """q, k and v as one tensor, q first: `qkv.weight#0`, `#1` and `#2` become `qkv.weight`."""
    whole: dict[str, Tensor] = {}
    for name, tensor in parts.items():
        base, mark, _ = name.partition("#")
        if not mark:
            whole[name] = tensor
        elif base not in whole:
            missing = [f"{base}#{part}" for part in range(3) if f"{base}#{part}" not in parts]
            if missing:
                theirs = [trunk.root + str(_renamed(part, _writing(trunk.family))) for part in missing]
                got = f"{_listed(theirs)}: missing here, beside the others of q, k and v"
                raise CheckpointError(file, got, "Copy it again.")
            pieces = [parts[f"{base}#{part}"] for part in range(3)]
            if not pieces[0].dim() or len({piece.shape for piece in pieces}) > 1:
                raise CheckpointError(
                    file, f"q, k and v of {base} are of other shapes than each other", "Copy it again."
                )
            whole[base] = torch.cat(pieces)
    return whole


# -- from our names to theirs -------------------------------------------------------------------------------------


def to_family(tensors: Mapping[str, Tensor], family: str | Family, prefix: str = "") -> dict[str, Tensor]:
    """The Swin inside `tensors`, of ours by name, with the names and tensors of `family`'s files, below `prefix`.

    Takes the state_dict of a timm Swin, of a SwinBackbone, or of a model around one, whose other tensors are left
    out. Buffers of theirs, which they compute, are not made. Raises CheckpointError for an unknown family, and
    where theirs has no place for a tensor: a head in mmdet's backbone.
    """
    wanted = FAMILIES.get(family) if isinstance(family, str) else family
    if wanted is None or wanted.write is None:
        writable = ", ".join(name for name, each in FAMILIES.items() if each.write is not None)
        raise CheckpointError(str(family), "is no family of weights that can be written", f"Take one of {writable}.")
    trunks = find_trunks(tensors)
    if len(trunks) != 1 or trunks[0].family is not TIMM:
        got = f"there are {len(trunks)} Swins{''.join(f', {trunk.family.told}' for trunk in trunks)}"
        raise CheckpointError("to_family", got, "Give the state_dict of one timm Swin or SwinBackbone.")
    ours = swin_tensors(tensors, trunks[0]).tensors
    dense = any(name.startswith("norms.") for name in ours)
    trunk = Trunk(wanted, prefix + (wanted.dense_root if dense else wanted.root))
    theirs: dict[str, Tensor] = {}
    homeless: list[str] = []
    for name, tensor in _parted(ours).items() if wanted.splits_qkv else ours.items():
        found = _renamed(name, _writing(wanted))
        if found is None:
            homeless.append(name)
            continue
        place = trunk.parent + found.removeprefix(_UP) if found.startswith(_UP) else trunk.root + found
        theirs[place] = wanted.write(name, tensor)
    if homeless:
        got = f"{wanted.told} Swin has no place for {len(homeless)} tensors ({_listed(homeless)})"
        raise CheckpointError("to_family", got, "Give another family, or a SwinBackbone, which has no head.")
    return theirs


def _parted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if re.search(r"\.attn\.qkv\.\w+$", name):
            parts |= {f"{name}#{part}": piece.clone() for part, piece in enumerate(tensor.chunk(3))}
        else:
            parts[name] = tensor
    return parts


def _listed(names: list[str]) -> str:
    return printable(", ".join(names[:MAX_LISTED]))


# -- patterns -----------------------------------------------------------------------------------------------------

_FIELD = re.compile(r"\{(\w+?)(\+1)?\}")
_Rules = tuple[tuple[re.Pattern[str], dict[str, int], str], ...]


@cache
def _reading(family: Family) -> _Rules:
    return tuple(_rule(theirs, ours) for ours, spellings in family.names for theirs in spellings)


@cache
def _writing(family: Family) -> _Rules:
    return tuple(_rule(ours, spellings[0]) for ours, spellings in family.names)


def _rule(source: str, target: str) -> tuple[re.Pattern[str], dict[str, int], str]:
    """A compiled pattern, what its numbers are ahead of the fields, and the pattern to fill."""
    ahead = {match[1]: int(bool(match[2])) for match in _FIELD.finditer(source)}
    return re.compile("".join(_source(source))), ahead, target


def _source(pattern: str) -> Iterator[str]:
    """The parts of a regular expression for `pattern`."""
    end = 0
    for match in _FIELD.finditer(pattern):
        yield re.escape(pattern[end : match.start()])
        kind = {"p": "weight|bias", "rest": r"(?!\^).*"}.get(match[1], r"\d+")
        yield f"(?P<{match[1]}>{kind})"
        end = match.end()
    yield re.escape(pattern[end:])


def _renamed(name: str, rules: _Rules) -> str | None:
    """`name` by the first rule that fits; None where none does."""
    for pattern, ahead, target in rules:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        fields = match.groupdict()
        numbers = {key: int(text) - ahead[key] for key, text in fields.items() if key not in ("p", "rest")}
        if any(number < 0 for number in numbers.values()):
            continue

        def filled(found: re.Match[str], fields: dict[str, str] = fields, numbers: dict[str, int] = numbers) -> str:
            key = found[1]
            return str(numbers[key] + bool(found[2])) if key in numbers else fields[key]

        return _FIELD.sub(filled, target)
    return None
