"""timm's Swin blocks and patch mergings with window sparsity; each docstring says how it differs from timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from sparsevit_cli import kernels, windows
from sparsevit_cli.kernels import held
from sparsevit_cli.windows import Kept

from .bias import forget_bias, remembered_bias
from .timm_swin import v1, v2, v2cr


class StockMerging(NamedTuple):
    """A patch merging of timm's own code, ready to be computed by `engine`."""

    weights: kernels.MergingWeights
    engine: kernels.Engine


class StockBlock(NamedTuple):
    """A block of timm's own code, ready to be computed by `engine`."""

    weights: kernels.BlockWeights
    engine: kernels.Engine


class SparseMerging(nn.Module):
    """timm's patch merging. Differs: given `stock`, an engine computes it."""

    def forward(self, x: Tensor, stock: StockMerging | None = None) -> Tensor:
        """Map (B, H, W, C) to (B, H/2, W/2, out)."""
        if stock is None:
            return super().forward(x)  # type: ignore[no-any-return]
        return stock.engine.merge_patches(x, stock.weights)


class SparsePatchMerging(SparseMerging, v1.PatchMerging):
    """timm's patch merging of V1. Differs as `SparseMerging` says, and in nothing else."""


class SparsePatchMergingV2(SparseMerging, v2.PatchMerging):
    """timm's patch merging of V2. Differs as `SparseMerging` says, and in nothing else."""


class SparsePatchMergingV2Cr(SparseMerging, v2cr.PatchMerging):
    """timm's patch merging of V2-CR. Differs as `SparseMerging` says, and in nothing else."""


class SparseBlock(nn.Module):
    """timm's block. Differs: given `kept`, it computes those windows and leaves the others as they are.

    If `partition` is `pad_first`, timm's own attention gets a map that is padded already.
    """

    partition: windows.Partition = "roll_first"
    window_size: tuple[int, int]
    shift_size: tuple[int, int]
    window_area: int
    dynamic_mask: bool
    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any
    norm3: Any
    drop_path1: Any
    drop_path2: Any

    def forward(
        self, x: Tensor, kept: Kept | None = None, stock: StockBlock | None = None, moves: kernels.Moves = kernels.MOVES
    ) -> Tensor:
        """Map (B, H, W, C) to the same shape.

        Args:
            x: the map. It is changed and returned when `stock` is given, and left alone otherwise.
            kept: the windows to compute; None for timm's own forward, on all of them.
            stock: weights and engine that compute the windows; None for timm's modules between gather and scatter.
            moves: gathers and scatters around timm's modules.
        """
        if kept is None:
            return super().forward(x)  # type: ignore[no-any-return]
        if stock is not None:
            return self._on_whole_map(self._run_(x, kept, stock))
        batch, height, width, channels = x.shape
        count, area = kept.indices.shape[1], self.window_area
        padded = windows.has_padding(height, width, self.window_size)

        rows = kept.rows.flatten()  # B*K*N
        tokens = moves.flatten_map(x, scratch_row=padded)  # B*H*W (+ 1), C
        kept_tokens = moves.gather_rows(tokens, rows).view(batch, count, area, channels)
        is_token = (rows != batch * height * width).view(batch, count, area, 1) if padded else None
        kept_tokens = self._residuals(kept_tokens, is_token, self._kept_mask(x, kept.indices))
        tokens = moves.scatter_rows(tokens, rows, kept_tokens.view(-1, channels))
        return self._on_whole_map(moves.unflatten_map(tokens, (batch, height, width), scratch_row=padded))

    def train(self, mode: bool = True) -> Self:
        """torch's `train`. Differs: a change of mode forgets the position bias."""
        if mode != self.training:
            forget_bias(self)
        return super().train(mode)

    def _residuals(self, tokens: Tensor, is_token: Tensor | None, mask: Tensor | None) -> Tensor:
        """Both residual branches on kept windows (B, K, N, C); `is_token` (B, K, N, 1) is False for padding."""
        raise NotImplementedError

    def _position_bias(self) -> Tensor:
        """(1, h, N, N), added to the attention scores."""
        raise NotImplementedError

    def _bias_sources(self) -> tuple[Tensor, ...]:
        """The tensors that `_position_bias` is made of."""
        raise NotImplementedError

    def _on_whole_map(self, x: Tensor) -> Tensor:
        """What timm does with the whole map after its windows."""
        return x

    def _attended(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """timm's attention `attend` of all windows of a map `x` (B, H, W, C), which timm would roll before it pads it.

        With `pad_first` it gets a padded map and finds nothing left to pad; its masks are of such a map anyway.
        """
        height, width = x.shape[1:3]
        if self.partition == "roll_first" or not windows.has_padding(height, width, self.window_size):
            return attend(x)
        bottom, right = (-side % window for side, window in zip((height, width), self.window_size, strict=True))
        padded = nn.functional.pad(x, (0, 0, 0, right, 0, bottom))  # B, Hp, Wp, C
        return attend(padded)[:, :height, :width]

    def _run_(self, x: Tensor, kept: Kept, stock: StockBlock) -> Tensor:
        """The map (B, H, W, C) itself, its `kept` windows replaced."""
        _, height, width, channels = x.shape
        padded = windows.has_padding(height, width, self.window_size)
        bias, class_of = self._attention_bias(x)
        bias_class = None if class_of is None else class_of[kept.indices.flatten()]
        tokens, rows = x.view(-1, channels), kept.rows.flatten(0, 1)  # T, C, sharing the map's memory; M, N
        stock.engine.run_windows_(tokens, rows, stock.weights, bias, bias_class, padded=padded, places=kept.places)
        return x

    def _attention_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Added to the attention scores of all windows (1, h, N, N); with a shift (4, h, N, N), by the class (n,)."""
        partition = (x.shape[1], x.shape[2], self.window_size, self.shift_size, x.device)
        masks, class_of = held.shift_mask_of(*partition) if any(self.shift_size) else (None, None)

        def make() -> Tensor:
            bias = self._position_bias().to(x.dtype)
            return bias if masks is None else bias + masks[:, None].to(x.dtype)

        key = (self.window_size, self.shift_size, x.device, x.dtype)
        return remembered_bias(self, key, self._bias_sources(), make), class_of

    def _kept_mask(self, x: Tensor, keep_indices: Tensor) -> Tensor | None:
        """Shifted-window attention mask of the kept windows: (B*K, N, N), or None without a shift."""
        block: Any = self
        mask: Tensor | None = block.attn_mask
        if self.dynamic_mask:
            height, width = x.shape[1:3]
            rows, cols = windows.window_grid(height, width, self.window_size)
            mask = block.get_attn_mask(x.new_empty(1, rows * self.window_size[0], cols * self.window_size[1], 1))
        return None if mask is None else mask[keep_indices.flatten()]


class SparseSwinTransformerBlock(SparseBlock, v1.SwinTransformerBlock):
    """timm's block of V1. Differs as `SparseBlock` says.

    Norms come before attention and MLP. timm pads after the first norm, so padding enters attention as zeros.
    """

    def _attn(self, x: Tensor) -> Tensor:
        return self._attended(x, super()._attn)

    def _residuals(self, tokens: Tensor, is_token: Tensor | None, mask: Tensor | None) -> Tensor:
        normed = self.norm1(tokens)
        if is_token is not None:
            normed = normed * is_token.to(normed.dtype)
        attended = self.attn(normed.flatten(0, 1), mask=mask).view(tokens.shape)
        tokens = tokens + self.drop_path1(attended)
        return tokens + self.drop_path2(self.mlp(self.norm2(tokens)))  # type: ignore[no-any-return]

    def _position_bias(self) -> Tensor:
        return self.attn._get_rel_pos_bias()  # type: ignore[no-any-return]

    def _bias_sources(self) -> tuple[Tensor, ...]:
        return (self.attn.relative_position_bias_table, self.attn.relative_position_index)


class PostNormBlock(SparseBlock):
    """What blocks of V2 and V2-CR share: norms come after attention and MLP, so padding is the map's own zeros."""

    def _residuals(self, tokens: Tensor, is_token: Tensor | None, mask: Tensor | None) -> Tensor:
        attended = self.norm1(self.attn(tokens.flatten(0, 1), mask=mask)).view(tokens.shape)
        tokens = tokens + self.drop_path1(attended)
        return tokens + self.drop_path2(self.norm2(self.mlp(tokens)))  # type: ignore[no-any-return]


class SparseSwinTransformerV2Block(PostNormBlock, v2.SwinTransformerV2Block):
    """timm's block of V2. Differs as `SparseBlock` says, and in nothing else."""

    def _attn(self, x: Tensor) -> Tensor:
        return self._attended(x, super()._attn)

    def _position_bias(self) -> Tensor:
        attn, area = self.attn, self.window_area  # as in timm's WindowAttention.forward
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        bias = table[attn.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1).contiguous()
        return (16 * torch.sigmoid(bias)).unsqueeze(0)

    def _bias_sources(self) -> tuple[Tensor, ...]:
        attn = self.attn
        return (attn.relative_coords_table, attn.relative_position_index, *attn.cpb_mlp.parameters())


class SparseSwinTransformerV2CrBlock(PostNormBlock, v2cr.SwinTransformerV2CrBlock):
    """timm's block of V2-CR. Differs as `SparseBlock` says.

    A third norm, in blocks that have one, takes the whole map: it changes the skipped windows too.
    """

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return self._attended(x, super()._shifted_window_attn)

    def _position_bias(self) -> Tensor:
        return self.attn._relative_positional_encodings()  # type: ignore[no-any-return]

    def _bias_sources(self) -> tuple[Tensor, ...]:
        return (self.attn.relative_coordinates_log, *self.attn.meta_mlp.parameters())

    def _on_whole_map(self, x: Tensor) -> Tensor:
        return self.norm3(x)  # type: ignore[no-any-return]


SPARSE_BLOCKS: dict[type[nn.Module], type[SparseBlock]] = {
    v1.SwinTransformerBlock: SparseSwinTransformerBlock,
    v2.SwinTransformerV2Block: SparseSwinTransformerV2Block,
    v2cr.SwinTransformerV2CrBlock: SparseSwinTransformerV2CrBlock,
}
SPARSE_MERGINGS: dict[type[nn.Module], type[SparseMerging]] = {
    v1.PatchMerging: SparsePatchMerging,
    v2.PatchMerging: SparsePatchMergingV2,
    v2cr.PatchMerging: SparsePatchMergingV2Cr,
}
