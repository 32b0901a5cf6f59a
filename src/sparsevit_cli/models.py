"""timm Swin models by name, built with the overrides and weights of a configuration."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .checkpoints import load_checkpoint
from .config.experiment import ModelSection
from .config.paths import as_path
from .documents import read_json
from .errors import CheckpointError, ConfigError, in_one_line, pass_on
from .swin import GENERATIONS, model_depths
from .swin.geometry import check_image_size, patch_embedding
from .weights import Say, load_weights, other_partition, tell_log, weights_in

__all__ = [
    "SupportedModel",
    "build_model",
    "model_arguments",
    "model_depths",
    "support_table",
    "supported_models",
    "tell_partition",
]

_PATCH_SIZE = 4  # of every timm Swin
_RESHAPING = ("embed_dim", "depths", "num_heads", "mlp_ratio")
_OF_EXPORTS = ("model.safetensors", "features.safetensors")  # of the whole model, of backbone and neck
_OVERRIDES = (*_RESHAPING, "window_size", "patch_size", "global_pool", "drop_path_rate", "always_partition")


@dataclass(frozen=True)
class SupportedModel:
    """A timm name that can be made sparse; every one is tested against timm, at reduced width.

    `img_size` is the side in pixels it was made for, `pretrained` the number of timm's weights for it.
    """

    name: str
    generation: str
    img_size: int
    pretrained: int


def supported_models() -> tuple[str, ...]:
    """Names that `model.name` may hold, without pretrained tags."""
    return tuple(name for module in GENERATIONS.values() for name in timm.list_models(module=module))


def support_table() -> tuple[SupportedModel, ...]:
    """Every supported name with its generation."""
    return tuple(
        SupportedModel(
            name, generation, timm.get_pretrained_cfg(name).input_size[-1],
            len(timm.list_models(f"{name}.*", pretrained=True)),
        )
        for generation, module in GENERATIONS.items()
        for name in timm.list_models(module=module)
    )  # fmt: skip


def model_arguments(section: ModelSection, outputs: int) -> dict[str, Any]:
    """Arguments of timm.create_model, besides `img_size`, with which the weights of a trained model fit."""
    given = {key: value for key in _OVERRIDES if (value := getattr(section, key)) is not None}
    return {"in_chans": section.in_chans, "num_classes": outputs, **given}


def build_model(
    section: ModelSection,
    outputs: int,
    *,
    img_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    any_size: bool = False,
    say: Say = tell_log,
) -> nn.Module:
    """The dense timm Swin of `section`, with its overrides, weights and so many `outputs` (0: no head).

    `img_size` (pixels, one number or (height, width)) replaces the section's. Windows keep their size in tokens
    whatever the image (in V2-CR without `window_size` they are timm's, an eighth of the patch grid); without
    `always_partition` timm shrinks a window to a map that is smaller. With `any_size` the model takes images of other
    sizes too, and `always_partition` is on unless the section says otherwise: timm would drop the shift of a stage
    whose map is no larger than a window, and never bring it back at larger images. A head in a `checkpoint` is left
    out where there are no outputs. Initial weights are a function of `seed`.
    `built_with` of the model are its arguments of timm.create_model besides `img_size`, for exports to build it again.
    `say` is told what was taken from a checkpoint file. `pretrained` goes through timm, which replaces a classifier of
    other size and interpolates for other windows, patches and input channels; a `checkpoint` must fit exactly. Raises
    ConfigError, CheckpointError.
    """
    size = section.img_size if img_size is None else img_size
    _check_name(section)
    check_image_size(size, section.patch_size or _PATCH_SIZE)
    reshaping = [key for key in _RESHAPING if getattr(section, key) is not None]
    if section.pretrained and reshaping:
        got = f"timm's weights do not fit a model with its own {', '.join(reshaping)}"
        raise ConfigError("model.pretrained", got, "Drop these overrides, or train from scratch.")
    if section.weight_init == "jax" and not section.name.startswith("swin_"):
        raise ConfigError("model.weight_init", f"'jax' is not offered by timm for {section.name}", "Take 'timm'.")
    arguments = model_arguments(section, outputs)
    if any_size:
        arguments = {"strict_img_size": False, "always_partition": True, **arguments}
    scheme = {"weight_init": "jax"} if section.weight_init == "jax" else {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which moves every GPU's generator too
            model: nn.Module = timm.create_model(
                section.name,
                pretrained=section.pretrained,
                img_size=size,
                **scheme,
                **arguments,
            )
            if section.weight_init == "quiet_background" and not section.pretrained:
                embed_flat_patches_as_zero_(model)
    except Exception as error:  # assertions, indices, divisions, downloads: timm checks nothing before it builds
        pass_on(error)
        got = f"timm cannot build {section.name} with {arguments} ({in_one_line(error)})"
        if section.pretrained:
            do = "Check the network, drop overrides, or give model.checkpoint a local file."
            raise CheckpointError("model.pretrained", got, do) from error
        do = "Give as many num_heads as depths, and no more heads than channels in each stage."
        raise ConfigError("model", got, do) from error
    remembers: Any = model
    remembers.built_with = {"name": section.name.partition(".")[0], **arguments}
    if section.checkpoint is not None:
        path = as_path(section.checkpoint, "model.checkpoint")
        reset = section.reset_head or not outputs  # without outputs there is no head to fit
        load_weights(model, path, reset, say, partition=section.partition)
        tell_partition(path, section.partition, say)
    return model


def tell_partition(path: Path, partition: str, say: Say) -> None:
    """Tell `say` if the weights in `path` were trained with another `partition`.

    Known are checkpoint folders of ours, and files of an export, by the sparsity.json beside them. Raises
    CheckpointError for damaged ones.
    """
    path = weights_in(path)
    if os.path.isdir(path):
        settings = load_checkpoint(path, only=()).state.get("settings", {})
        trained = settings.get("model.partition", "roll_first")  # there was no other before it was a setting
    else:
        beside = path.with_name("sparsity.json")
        if path.name not in _OF_EXPORTS or not beside.is_file():
            return
        trained = read_json(beside).get("partition", "roll_first")
    if trained != partition:
        say(other_partition(path, trained, partition))


def embed_flat_patches_as_zero_(model: nn.Module) -> None:
    """Draw new biases of the patch embedding such that a flat patch of mean brightness embeds to zero, in place.

    timm's Swin normalises each embedded patch, so with its usual weights every token has the same magnitude, and
    the scores of the first stage's windows mean nothing before training has changed that. Uses torch's generator.
    """
    embed = patch_embedding(model)
    with torch.no_grad():
        bias = embed.proj.bias.normal_()
        embed.norm.bias.copy_(-torch.nn.functional.layer_norm(bias, bias.shape, eps=embed.norm.eps))


def _check_name(section: ModelSection) -> None:
    """Names of timm's own Swin only: no hub prefix, no path, no other architecture."""
    names = supported_models()
    name, _, tag = section.name.partition(".")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
        got = f"{section.name!r} is not a Swin Transformer of timm {timm.__version__}"
        raise ConfigError("model.name", got, f"Did you mean {', '.join(near)}?")
    tags = timm.list_models(f"{name}.*", pretrained=True)
    if tag and section.name not in tags:
        got = f"{name} has no pretrained tag {tag!r}"
        raise ConfigError("model.name", got, f"Take {name} alone, or one of {', '.join(tags)}.")
