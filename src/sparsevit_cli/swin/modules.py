"""timm's Swin modules with window sparsity; each docstring says how it differs from timm's."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, SwinTransformerStage
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsevit_cli import kernels, windows

from .inference import block_weights, is_inference, merging_weights


class SparsePatchMerging(PatchMerging):
    """timm's patch merging; given its weights, it takes the faster way."""

    def forward(self, x: Tensor, weights: tuple[kernels.Norm, kernels.Affine] | None = None) -> Tensor:
        """Map (B, H, W, C) to (B, H/2, W/2, out)."""
        if weights is None:
            return super().forward(x)  # type: ignore[no-any-return]
        return kernels.merge_patches(x, *weights)


class SparseSwinTransformerBlock(SwinTransformerBlock):
    """timm's block; given `keep_indices`, it computes those windows and leaves the others as they are."""

    def forward(
        self,
        x: Tensor,
        keep_indices: Tensor | None = None,
        token_index: Tensor | None = None,
        weights: kernels.BlockWeights | None = None,
    ) -> Tensor:
        """Map (B, H, W, C) to the same shape; `keep_indices` (B, K), `token_index` (n, N) of `windows`.

        With `weights` the map itself is changed and returned, and no `keep_indices` means all windows.
        """
        if weights is not None and token_index is not None:
            return self._run_(x, keep_indices, token_index, weights)
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

    def _run_(
        self, x: Tensor, keep_indices: Tensor | None, token_index: Tensor, weights: kernels.BlockWeights
    ) -> Tensor:
        batch, height, width, channels = x.shape
        padded = windows.has_padding(height, width, self.window_size)
        if keep_indices is None:
            keep_indices = torch.arange(len(token_index), device=x.device).expand(batch, -1)
        rows = windows.flat_rows(token_index, keep_indices, height * width, scratch_row=padded)  # B, K, N
        bias = self.attn._get_rel_pos_bias().to(x.dtype)  # 1, h, N, N
        bias_class = None
        if any(self.shift_size):
            partition = (height, width, self.window_size, self.shift_size, x.device)
            masks, class_of = windows.shift_mask_of(*partition)
            bias, bias_class = bias + masks[:, None].to(x.dtype), class_of[keep_indices.flatten()]
        tokens = x.view(-1, channels)  # shares the map's memory
        kernels.run_windows_(tokens, rows.flatten(0, 1), weights, bias, bias_class, padded=padded)
        return x

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
    as_timm = True
    """True where a stage without sparsity must give timm's numbers to the bit: the whole model is dense."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H', W', C'), sparse where `sparsity_tenths` says so."""
        if self.as_timm and not any(self.sparsity_tenths):
            return super().forward(x)  # type: ignore[no-any-return]
        infers = is_inference(self, x.device)
        infers &= all(type(block) is SparseSwinTransformerBlock for block in self.blocks)
        merging = merging_weights(self.downsample) if infers and type(self.downsample) is SparsePatchMerging else None
        x = self.downsample(x) if merging is None else self.downsample(x, weights=merging)
        weights = block_weights(self, x) if infers else None
        if weights is not None and merging is None:  # the caller's map, or a view of it, is not ours to change
            x = x.clone(memory_format=torch.contiguous_format)
        ranking = _Ranking(self, x.shape[1], x.shape[2])
        for number, block in enumerate(self.blocks):
            run = partial(block, **ranking.keep(x, block, self.sparsity_tenths[number // 2]))
            if weights is not None:
                x = run(x, token_index=ranking.token_index(block, x.device), weights=weights[number])
            elif self.grad_checkpointing and torch.is_grad_enabled():
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
            index = self.token_index(block, x.device)
            self.ranked[partition] = (windows.rank_windows(self._scores(x, index), count), index)
        keep_indices, index = self.ranked[partition]
        return {"keep_indices": keep_indices[:, :count], "token_index": index}

    def token_index(self, block: SparseSwinTransformerBlock, device: torch.device) -> Tensor:
        """(n, N) of the block's own partition."""
        return windows.token_index_of(self.height, self.width, block.window_size, block.shift_size, device)

    def _scores(self, x: Tensor, index: Tensor) -> Tensor:
        if self.magnitude is None:
            return windows.random_scores(x.shape[0], index.shape[0], self.stage.stage_number, x.device)
        return windows.window_scores(self.magnitude, index)
