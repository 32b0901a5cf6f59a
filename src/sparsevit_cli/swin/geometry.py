"""Sizes of a timm Swin: patch, image, maps, windows, channels, and the weights that one row or patch meets.

Every function takes the Swin itself or a module that holds one, such as a detector. Code outside of this package asks
here, and does not read `patch_embed`, `layers` or `blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import SparsityConfig

from .timm_swin import STAGES, Stage

__all__ = [
    "BlockShape",
    "StageShape",
    "SwinShape",
    "check_image_size",
    "fixed_image_size",
    "has_only_a_swin",
    "image_size",
    "images_seen",
    "input_channels",
    "map_sizes",
    "named_stages",
    "patch_embedding",
    "patch_size",
    "recompute_blocks",
    "set_image_size",
    "set_image_size_in_training",
    "sparsity_or_dense",
    "stage_channels",
    "stem_name",
    "swin_shape",
    "trunk",
    "uses_fused_attention",
    "weights_in",
    "window_sizes",
]


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one block. `window` is in tokens; weights are those of linear layers, the multiply-adds of one row.

    `attention_channels` is the width of q, k and v over all heads. `position_macs` are the multiply-adds of the network
    that makes the position bias of V2 and V2-CR, once per forward; 0 for V1. `weights` are all of the block's.
    """

    window: Size
    attention_channels: int
    qkv_weights: int
    proj_weights: int
    mlp_weights: int
    position_macs: int
    weights: int

    @property
    def window_area(self) -> int:
        """Tokens in a window."""
        return self.window[0] * self.window[1]


@dataclass(frozen=True)
class StageShape:
    """Sizes of one stage on a map of `height` x `width` tokens.

    `merging_weights` are those of the patch merging in front of its blocks; 0 where it has none.
    """

    height: int
    width: int
    channels: int
    merging_weights: int
    blocks: tuple[BlockShape, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the map."""
        return self.height * self.width


@dataclass(frozen=True)
class SwinShape:
    """Sizes of a Swin for one image size: the patch embedding, the stages, and the classifier (0 weights: none)."""

    in_channels: int
    grid: Size
    """Patches of an image: the map that leaves the patch embedding."""
    stem_channels: int
    stem_weights: int
    stages: tuple[StageShape, ...]
    head_weights: int

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]


# -- where the Swin is --------------------------------------------------------------------------------------------


def trunk(model: nn.Module) -> nn.Module:
    """The one timm Swin inside `model`: the module that owns the patch embedding and the stages.

    It may be `model` itself. Raises ConfigError where there is none, or more than one.
    """
    owners = [m for m in model.modules() if m._modules.get("patch_embed") is not None and named_stages(m)]
    swins = [m for m in owners if not any(other is not m and other in owners for other in m.modules())]
    if len(swins) != 1:
        found = f"{len(swins)} timm Swin Transformers" if swins else "no timm Swin Transformer"
        raise ConfigError("model", f"{type(model).__name__} contains {found}", "Give a timm Swin, V2 or V2-CR.")
    return swins[0]


def patch_embedding(model: nn.Module) -> Any:
    """timm's patch embedding of the Swin inside `model`. Raises ConfigError as `trunk`."""
    return trunk(model).patch_embed


def named_stages(model: nn.Module) -> list[tuple[str, Stage]]:
    """Name and module of every timm Swin stage, dense or sparse, in order; empty where there is none."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, STAGES)]


def stem_name(model: nn.Module) -> str | None:
    """Name of the module that embeds the patches; None where there is none."""
    return next((name for name, _ in model.named_modules() if name.split(".")[-1] == "patch_embed"), None)


def has_only_a_swin(model: nn.Module) -> bool:
    """True where `model` is the Swin, and no linear layer or convolution stands beside its stem, stages and head."""
    swin: Any = trunk(model)
    parts = [swin.patch_embed, *(stage for _, stage in named_stages(swin)), getattr(swin, "head", None)]
    return swin is model and weights_in(model) == sum(weights_in(part) for part in parts if part is not None)


# -- sizes of images ----------------------------------------------------------------------------------------------


def patch_size(model: nn.Module) -> Size:
    """(height, width) of a patch in pixels. Raises ConfigError as `trunk`."""
    height, width = patch_embedding(model).patch_size
    return int(height), int(width)


def image_size(model: nn.Module) -> Size | None:
    """(height, width) in pixels that the Swin is set to; None where it has no size of its own."""
    size = patch_embedding(model).img_size
    return None if size is None else (int(size[0]), int(size[1]))


def fixed_image_size(model: nn.Module) -> Size | None:
    """The only image size that `model` takes; None where it takes others, or is a module around a Swin.

    A module around a Swin may pad or resize its images.
    """
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", False) else None
    return None if size is None else (int(size[0]), int(size[1]))


def input_channels(model: nn.Module) -> int:
    """Channels of the images that the model's first convolution takes; 3 where it has none."""
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return conv.in_channels if conv is not None else 3


def check_image_size(size: int | Size, patch: int | Size, what: str = "model.img_size") -> None:
    """Refuse, with the two nearest valid sizes, what timm would crop: sides that are no multiple of the patch.

    `size` and `patch` are in pixels, one number or (height, width). Maps that are no multiple of the window, or odd
    before patch merging, are padded exactly by timm. Raises ConfigError about the setting `what`.
    """
    sides = (size,) if isinstance(size, int) else size
    steps = (patch, patch) if isinstance(patch, int) else patch
    pairs = list(zip((sides[0], sides[-1]), steps, strict=True))
    if all(side % step == 0 for side, step in pairs):
        return
    below = [max(side // step, 1) * step for side, step in pairs]
    above = [-(-side // step) * step for side, step in pairs]
    both = [below, above] if below != above else [above, [n + step for n, (_, step) in zip(above, pairs, strict=True)]]
    square = isinstance(size, int) and steps[0] == steps[1]
    texts = [str(choice[0] if square else choice) for choice in both]
    told = steps[0] if steps[0] == steps[1] else list(steps)
    got = f"{size if isinstance(size, int) else list(size)} is not a multiple of the patch size {told}"
    raise ConfigError(what, got, f"The nearest valid sizes are {texts[0]} and {texts[1]}.")


def set_image_size(model: nn.Module, size: int | Size) -> None:
    """Give the Swin inside `model` another input size in place: windows keep their size in tokens, parameters stay.

    Only where a map is, or was, smaller than the window, and without `always_partition`, timm interpolates bias
    tables to another shape: new parameters, unknown to an optimizer. Raises ConfigError for sizes timm would crop.

    timm's `features_only=True` takes a Swin apart. Its stages are then all that is left: without `always_partition`
    their windows stay as small as the smallest map has made them.
    """
    swin: Any = trunk(model)
    check_image_size(size, patch_size(swin))
    pair = (size, size) if isinstance(size, int) else size
    if hasattr(swin, "set_input_size"):
        swin.set_input_size(img_size=pair, window_size=swin._ref_window_sizes)  # timm alone would scale the windows
        return
    swin.patch_embed.set_input_size(img_size=pair)
    for number, (_, stage) in enumerate(named_stages(swin)):
        scale = 2 ** max(number - 1, 0)  # timm gives a stage the size of the map that enters it
        entering = tuple(-(-side // scale) for side in swin.patch_embed.grid_size)
        stage.set_input_size(feat_size=entering, window_size=stage.blocks[0].window_size)


def set_image_size_in_training(model: nn.Module, size: Size, what: str) -> None:
    """`set_image_size` for a model whose parameters an optimizer holds; nothing where it already has this size.

    Raises ConfigError about the setting `what` where timm would exchange parameters.
    """
    if image_size(model) == size:
        return
    before = list(map(id, model.parameters()))
    set_image_size(model, size)
    if list(map(id, model.parameters())) != before:
        got = f"at {size_text(size)} pixels a map is smaller than its window, and timm changes the weights"
        raise ConfigError(what, got, "Set model.always_partition: true, or use larger images.")


def recompute_blocks(model: nn.Module) -> None:
    """Let the Swin inside `model` compute its blocks again in the backward pass, which saves memory; timm's own way."""
    swin: Any = trunk(model)
    swin.set_grad_checkpointing(True)


@contextmanager
def images_seen(model: nn.Module) -> Iterator[list[tuple[int, int, int, int]]]:
    """Shapes (B, C, H, W) of the images that enter the Swin inside the block, one per call of its patch embedding."""
    shapes: list[tuple[int, int, int, int]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        batch, channels, height, width = map(int, inputs[0].shape)
        shapes.append((batch, channels, height, width))

    handle = patch_embedding(model).register_forward_pre_hook(record)
    try:
        yield shapes
    finally:
        handle.remove()


# -- sizes of maps, windows and weights ---------------------------------------------------------------------------


def map_sizes(model: nn.Module, image: Sequence[int]) -> tuple[Size, ...]:
    """Height and width of every stage's map in tokens, for an image (H, W) that enters the Swin."""
    return tuple((stage.height, stage.width) for stage in swin_shape(model, image).stages)


def window_sizes(model: nn.Module) -> tuple[Size, ...]:
    """(height, width) of every stage's windows in tokens; timm has one size in all blocks of a stage."""
    return tuple(_pair(stage.blocks[0].window_size) for _, stage in named_stages(model))


def stage_channels(model: nn.Module) -> tuple[int, ...]:
    """Channels of every stage's map."""
    return tuple(int(stage.blocks[0].dim) for _, stage in named_stages(model))


def swin_shape(model: nn.Module, image: Sequence[int]) -> SwinShape:
    """All sizes of the Swin inside `model`, for an image (H, W) in pixels that enters it. Nothing runs.

    Raises ConfigError as `trunk`.
    """
    swin: Any = trunk(model)
    embed, head = swin.patch_embed, getattr(swin, "head", None)
    rounded_up = getattr(embed, "dynamic_img_pad", False)
    height, width = (
        math.ceil(side / patch) if rounded_up else side // patch
        for side, patch in zip(image, embed.patch_size, strict=True)
    )
    grid, stages = (height, width), []
    for _, stage in named_stages(swin):
        merging = weights_in(stage.downsample)
        if merging:
            height, width = (height + 1) // 2, (width + 1) // 2
        blocks = tuple(map(_block_shape, stage.blocks))
        stages.append(StageShape(height, width, int(stage.blocks[0].dim), merging, blocks))
    return SwinShape(
        embed.proj.in_channels,
        grid,
        embed.proj.out_channels,
        weights_in(embed),
        tuple(stages),
        0 if head is None else weights_in(head),
    )


def _block_shape(block: Any) -> BlockShape:
    return BlockShape(
        window=_pair(block.window_size),
        attention_channels=block.attn.proj.in_features,
        qkv_weights=weights_in(block.attn.qkv),
        proj_weights=weights_in(block.attn.proj),
        mlp_weights=weights_in(block.mlp),
        position_macs=_position_macs(block.attn),
        weights=weights_in(block),
    )


def _position_macs(attn: Any) -> int:
    if hasattr(attn, "cpb_mlp"):
        return int(attn.relative_coords_table.numel() // 2 * weights_in(attn.cpb_mlp))
    if hasattr(attn, "meta_mlp"):
        return len(attn.relative_coordinates_log) * weights_in(attn.meta_mlp)
    return 0


def weights_in(module: nn.Module) -> int:
    """Weights of all linear layers and convolutions inside: the multiply-adds of one row or patch."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def uses_fused_attention(model: nn.Module) -> bool:
    """True where timm's attention runs as one fused operator; never in V2 and V2-CR."""
    return any(bool(getattr(stage.blocks[0].attn, "fused_attn", False)) for _, stage in named_stages(model)[:1])


def sparsity_or_dense(model: nn.Module) -> SparsityConfig:
    """The sparsity configuration that `model` is set to; all zeros where it is not sparse."""
    return SparsityConfig(
        tuple(
            getattr(stage, "sparsity_tenths", (0,) * ((len(stage.blocks) + 1) // 2)) for _, stage in named_stages(model)
        )
    )


def _pair(size: Sequence[int]) -> Size:
    height, width = size
    return int(height), int(width)
