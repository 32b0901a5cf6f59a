"""Window sparsity for timm's Swin: the only room that knows timm's Swin.

`sparsify_` swaps the class of every stage and block in place, so parameters keep their names and a ratio of 0
runs timm's own code. The one thing stored on the model is the setting: tenths per block pair, and the importance.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import windows
from .errors import ConfigError
from .sparsity import Ratios, SparsityConfig


class SparseSwinTransformerBlock(SwinTransformerBlock):
    """timm's block; given `keep_indices`, it computes those windows and leaves the others as they are."""

    def forward(self, x: Tensor, keep_indices: Tensor | None = None, token_index: Tensor | None = None) -> Tensor:
        """Map (B, H, W, C) to the same shape; `keep_indices` (B, K), `token_index` (n, N) of `windows`."""
        if keep_indices is None or token_index is None:
            return super().forward(x)  # type: ignore[no-any-return]
        batch, height, width, channels = x.shape
        kept, area = keep_indices.shape[1], self.window_area
        padded = windows.has_padding(height, width, self.window_size)

        rows = windows.flat_rows(token_index, keep_indices, height * width, scratch_row=padded).flatten()  # B*K*N
        tokens = windows.flatten_map(x, scratch_row=padded)  # B*H*W (+ 1), C
        kept_tokens = windows.gather_rows(tokens, rows).view(batch * kept, area, channels)

        normed = self.norm1(kept_tokens)
        if padded:  # timm pads after norm1: a padding token enters attention as zeros
            is_token = rows != batch * height * width
            normed = normed * is_token.to(normed.dtype).view(batch * kept, area, 1)
        attended = self.attn(normed, mask=self._kept_mask(x, keep_indices))  # B*K, N, C
        kept_tokens = kept_tokens.view(batch, kept, area, channels)
        kept_tokens = kept_tokens + self.drop_path1(attended.view(batch, kept, area, channels))
        kept_tokens = kept_tokens + self.drop_path2(self.mlp(self.norm2(kept_tokens)))

        tokens = windows.scatter_rows(tokens, rows, kept_tokens.view(-1, channels))
        return windows.unflatten_map(tokens, (batch, height, width), scratch_row=padded)

    def _kept_mask(self, x: Tensor, keep_indices: Tensor) -> Tensor | None:
        """Shifted-window attention mask of the kept windows: (B*K, N, N), or None without a shift."""
        mask: Tensor | None = self.attn_mask
        if self.dynamic_mask:
            height, width = x.shape[1:3]
            rows, cols = windows.window_grid(height, width, self.window_size)
            mask = self.get_attn_mask(x.new_empty(1, rows * self.window_size[0], cols * self.window_size[1], 1))
        return None if mask is None else mask[keep_indices.flatten()]


class SparseSwinTransformerStage(SwinTransformerStage):
    """timm's stage; scores its windows once, at the first pruned block, and hands each block its share."""

    sparsity_tenths: tuple[int, ...]
    importance: windows.Importance
    stage_number: int

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H', W', C'), sparse where `sparsity_tenths` says so."""
        if not any(self.sparsity_tenths):
            return super().forward(x)  # type: ignore[no-any-return]
        x = self.downsample(x)
        ranking = _Ranking(self, x.shape[1], x.shape[2])
        for number, block in enumerate(self.blocks):
            run = partial(block, **ranking.keep(x, block, self.sparsity_tenths[number // 2]))
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, x, use_reentrant=False)
            else:
                x = run(x)
        return x


class _Ranking:
    """The rankings of one forward pass of one stage: at most one per partition (plain, shifted).

    Lives for one forward only: the magnitude is taken at the first pruned block, later blocks take prefixes.
    """

    def __init__(self, stage: SparseSwinTransformerStage, height: int, width: int) -> None:
        self.stage, self.height, self.width = stage, height, width
        self.magnitude: Tensor | None = None
        self.ranked: dict[tuple[tuple[int, int], tuple[int, int]], tuple[Tensor, Tensor]] = {}

    def keep(self, x: Tensor, block: SparseSwinTransformerBlock, tenths: int) -> dict[str, Tensor]:
        """Arguments that make `block` compute the windows kept at `tenths`; none where all are kept."""
        rows, cols = windows.window_grid(self.height, self.width, block.window_size)
        count = windows.num_keep(rows * cols, tenths)
        if count == rows * cols:
            return {}
        if self.magnitude is None and self.stage.importance != "random":
            self.magnitude = windows.token_magnitude(x, self.stage.importance)
        partition = (block.window_size, block.shift_size)
        if partition not in self.ranked:  # ratios never decrease with depth: the first block keeps most
            index = windows.token_index_of(self.height, self.width, *partition, x.device)
            self.ranked[partition] = (windows.rank_windows(self._scores(x, index), count), index)
        keep_indices, index = self.ranked[partition]
        return {"keep_indices": keep_indices[:, :count], "token_index": index}

    def _scores(self, x: Tensor, index: Tensor) -> Tensor:
        if self.magnitude is None:
            return windows.random_scores(x.shape[0], index.shape[0], self.stage.stage_number, x.device)
        return windows.window_scores(self.magnitude, index)


def sparsify_(model: nn.Module, *, importance: windows.Importance = "mean_abs_l2") -> nn.Module:
    """Make every timm Swin stage inside `model` window-sparse, in place; returns `model`, still at ratio 0.

    A second call changes the importance only. Parameters, buffers and state-dict keys stay timm's. Raises
    ConfigError where `model` holds no timm Swin stage, a subclass of one, or for an unknown importance.
    """
    if importance not in windows.IMPORTANCES:
        got = f"{importance!r}; allowed are {', '.join(windows.IMPORTANCES)}"
        raise ConfigError("importance", got, "Take mean_abs_l2 if in doubt.")
    stages = [module for module in model.modules() if isinstance(module, SwinTransformerStage)]
    if not stages:
        got = f"{type(model).__name__} contains no timm Swin Transformer stage"
        raise ConfigError("model", got, "Give a timm `swin_*` or `swin_s3_*` model, or a module that holds one.")
    blocks = [block for stage in stages for block in stage.blocks]
    for module in (*stages, *blocks):
        if type(module) not in _SPARSE_CLASS and type(module) not in _SPARSE_CLASS.values():
            got = f"{type(module).__name__} is not timm's own class, its forward would be replaced"
            raise ConfigError("model", got, "Give an unmodified timm Swin.")
    for number, stage in enumerate(stages):
        if type(stage) is SwinTransformerStage:
            stage.sparsity_tenths = (0,) * ((len(stage.blocks) + 1) // 2)
        stage.importance, stage.stage_number = importance, number
    for module in (*stages, *blocks):
        module.__class__ = _SPARSE_CLASS.get(type(module), type(module))
    return model


_SPARSE_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    SwinTransformerStage: SparseSwinTransformerStage,
    SwinTransformerBlock: SparseSwinTransformerBlock,
}


def sparse_stages(model: nn.Module) -> list[SparseSwinTransformerStage]:
    """The sparse stages in order. Raises ConfigError where there are none."""
    stages = [module for module in model.modules() if isinstance(module, SparseSwinTransformerStage)]
    if not stages:
        raise ConfigError("model", f"{type(model).__name__} is not sparse", "Call sparsify_(model) first.")
    return stages


def model_depths(model: nn.Module) -> tuple[int, ...]:
    """Blocks per stage of a dense or sparse model. Raises ConfigError where there is no timm Swin stage."""
    depths = tuple(len(module.blocks) for module in model.modules() if isinstance(module, SwinTransformerStage))
    if not depths:
        raise ConfigError("model", f"{type(model).__name__} contains no timm Swin stage", "Give a timm `swin_*`.")
    return depths


def set_sparsity(model: nn.Module, ratios: Ratios) -> None:
    """Set the sparsity ratio of every block pair: a SparsityConfig, lists per stage and pair, or one number.

    Everything is validated before anything changes. Raises ConfigError (a ValueError).
    """
    stages = sparse_stages(model)
    config = SparsityConfig.from_ratios(ratios, tuple(len(stage.blocks) for stage in stages))
    for stage, tenths in zip(stages, config.tenths, strict=True):
        stage.sparsity_tenths = tenths


def get_sparsity(model: nn.Module) -> SparsityConfig:
    """The sparsity configuration that `model` runs at. Raises ConfigError where it is not sparse."""
    return SparsityConfig(tuple(stage.sparsity_tenths for stage in sparse_stages(model)))
