"""Windows of a feature map as rows of tokens: index, score, rank, gather, scatter.

Pure functions: they remember nothing (`kernels.held` does), and know neither timm nor kernels.

Shapes: B images, H x W tokens, C channels, n windows of N tokens, K kept windows. A window has N slots; a slot holds a
token, or padding at the bottom and right of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Importance = Literal["mean_abs_l2", "l2", "random"]
IMPORTANCES: tuple[str, ...] = get_args(Importance)
Partition = Literal["roll_first", "pad_first"]
"""What comes first where windows are shifted and do not divide the map.

`roll_first`: the map is rolled, then padded at the bottom and right, as timm does. `pad_first`: it is padded, then
rolled, as transformers, mmdet and Microsoft's own code do. Without padding, or without a shift, both are equal.
"""
PARTITIONS: tuple[str, ...] = get_args(Partition)


def num_keep(num_windows: int, tenths: int) -> int:
    """Windows kept of `num_windows` at a ratio of `tenths` tenths; integer arithmetic, at least one."""
    return max(1, num_windows * (10 - tenths) // 10)


def window_grid(height: int, width: int, window_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of windows that cover the map once it is padded at the bottom and right."""
    # Not -(-height // window): torch's TorchScript exporter to ONNX cuts quotients towards zero, negative ones too.
    return (height + window_size[0] - 1) // window_size[0], (width + window_size[1] - 1) // window_size[1]


def window_token_index(
    height: int,
    width: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    partition: Partition,
    device: torch.device,
) -> Tensor:
    """Row of every token of every window in the flattened map: roll, pad and partition in one index.

    Returns (n, N) int64 with values in 0 ... H*W - 1, and H*W for a padding token. `roll_first` rolls the map by the
    shift and pads it after (timm/models/swin_transformer.py, SwinTransformerBlock._attn). `pad_first` rolls the padded
    map, so that padding stands inside of it (transformers/models/swin/modeling_swin.py, SwinLayer.forward).
    """
    rows, cols = window_grid(height, width, window_size)
    padded_height, padded_width = rows * window_size[0], cols * window_size[1]
    y, x = torch.arange(padded_height, device=device), torch.arange(padded_width, device=device)
    if partition == "pad_first":
        y, x = (y + shift_size[0]) % padded_height, (x + shift_size[1]) % padded_width
    padding = (y >= height)[:, None] | (x >= width)  # Hp, Wp
    if partition == "roll_first":
        y, x = (y + shift_size[0]) % height, (x + shift_size[1]) % width
    source = torch.where(padding, height * width, (y * width)[:, None] + x)  # Hp, Wp
    source = source.view(rows, window_size[0], cols, window_size[1]).permute(0, 2, 1, 3)
    return source.reshape(rows * cols, window_size[0] * window_size[1])


class Kept(NamedTuple):
    """The windows that a block computes of a batch of maps, and the tokens that they hold."""

    indices: Tensor
    """(B, K) int64: the windows of each map. A ranking puts the best one first."""
    rows: Tensor
    """(B, K, N) int64 in 0 ... B*H*W: the row of every token in the flattened batch. Padding is row B*H*W."""
    places: Tensor | None = None
    """`token_places` of `rows`. None without padding, for some of the windows, and on a CPU, which needs none."""

    def best(self, count: int) -> Kept:
        """The first `count` windows of each map."""
        return Kept(self.indices[:, :count], self.rows[:, :count])


def every_window(token_index: Tensor, batch: int) -> Tensor:
    """Indices of all windows in order: (n, N) -> (B, n) int64."""
    return torch.arange(len(token_index), device=token_index.device).expand(batch, -1)


def token_places(rows: Tensor, num_tokens: int) -> Tensor | None:
    """Slots of all tokens among those of all windows: rows (B, n, N) -> (B*H*W,) int64; None without padding.

    `num_tokens` is B*H*W, the row of padding. `places[r]` is the slot in 0 ... B*n*N - 1 that holds row r.
    """
    if rows.numel() == num_tokens:
        return None
    return rows.flatten().argsort()[:num_tokens]  # padding has the highest row, so it comes last


def shift_mask(
    height: int, width: int, window_size: tuple[int, int], shift_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Attention mask of shifted windows as a few classes: inside, right edge, bottom edge, corner.

    Returns the masks (4, N, N), 0 or -100, and the class of every window (n,) int64. Equal to timm's `get_attn_mask`
    (timm/models/swin_transformer.py), which has one mask per window. Both partitions have the same classes.
    """
    rows, cols = window_grid(height, width, window_size)

    def regions(side: int, shift: int, *, at_edge: bool) -> Tensor:
        inside = torch.zeros(side, dtype=torch.int64, device=device)
        inside[side - shift :] = at_edge
        return inside

    masks = []
    for at_bottom, at_right in ((False, False), (False, True), (True, False), (True, True)):
        y = regions(window_size[0], shift_size[0], at_edge=at_bottom)
        x = regions(window_size[1], shift_size[1], at_edge=at_right)
        region = (2 * y[:, None] + x).flatten()  # N
        masks.append(torch.where(region[:, None] == region, 0.0, -100.0))
    last_row = torch.arange(rows, device=device) == rows - 1
    last_col = torch.arange(cols, device=device) == cols - 1
    return torch.stack(masks), (2 * last_row[:, None] + last_col.long()).flatten()


def has_padding(height: int, width: int, window_size: tuple[int, int]) -> bool:
    """True when the windows cover more than the map."""
    return height % window_size[0] != 0 or width % window_size[1] != 0


def token_magnitude(x: Tensor, importance: Importance) -> Tensor:
    """Share of each token in the score of its window: x (B, H, W, C) -> (B, H*W) float32, not differentiable.

    `mean_abs_l2`: mean over channels of |x| (the released code); `l2`: the L2 norm over channels, so that a
    window's score is the L2 norm over all its tokens and channels (the paper's wording).
    """
    x = x.detach().flatten(1, 2)
    if importance == "mean_abs_l2":
        return x.abs().mean(-1, dtype=torch.float32)  # no copy in float32 of a map in 16 bits
    return x.float().square().sum(-1).sqrt()


def window_scores(magnitude: Tensor, token_index: Tensor) -> Tensor:
    """L2 norm over each window's tokens: (B, H*W), (n, N) -> (B, n). Padding tokens count as zero."""
    padded = torch.nn.functional.pad(magnitude, (0, 1))
    return padded[:, token_index].square().sum(-1).sqrt()


def random_scores(batch: int, num_windows: int, seed: int, device: torch.device) -> Tensor:
    """The control: (B, n) scores in [0, 1) that are a function of (seed, image, window) alone.

    An integer hash (two rounds of multiply and xor-shift, after Wellons' "lowbias32") instead of a generator:
    no hidden state, and it compiles and exports.
    """
    image = torch.arange(batch, device=device)[:, None]
    value = (torch.arange(num_windows, device=device) + image * 7919 + seed * 104729) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x846CA68B):
        value = ((value ^ (value >> 16)) * multiplier) & 0xFFFFFFFF
    return (value ^ (value >> 16)).to(torch.float32) / 2**32


def rank_windows(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` best windows, best first: (B, n) -> (B, count). A prefix serves a higher ratio."""
    return torch.topk(scores, count, dim=1, sorted=True).indices


def flat_rows(token_index: Tensor, keep_indices: Tensor, num_tokens: int, *, scratch_row: bool) -> Tensor:
    """Rows of the kept windows in the flattened batch: (n, N), (B, K) -> (B, K, N) in 0 ... B*H*W.

    With `scratch_row` every padding token of every image maps to the one row B*H*W; without, there is no padding.
    """
    rows = token_index[keep_indices]  # B, K, N
    batch = keep_indices.shape[0]
    offset = torch.arange(batch, device=rows.device)[:, None, None] * num_tokens
    if not scratch_row:
        return rows + offset
    return torch.where(rows == num_tokens, batch * num_tokens, rows + offset)


def rows_of(keep_indices: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
    """Rows of the tokens of some windows: (B, K), (n, N) -> (B, K, N) in 0 ... B*H*W; padding is row B*H*W.

    `num_tokens` is H*W. The windows hold padding when they have more slots than the map has tokens.
    """
    padded = token_index.numel() != num_tokens
    return flat_rows(token_index, keep_indices, num_tokens, scratch_row=padded)


RowsOf = Callable[[Tensor, Tensor, int], Tensor]
"""`rows_of`, or a function with its arguments."""


def score_and_rank(
    x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance, rows_of: RowsOf = rows_of
) -> list[Kept]:
    """The `count` best windows of maps x (B, H, W, C), for one or two partitions of the same maps.

    Each of `token_indices` (n, N) comes from `window_token_index`; all have one shape. `importance` is `mean_abs_l2`
    or `l2`. Returns one `Kept` per partition: indices (B, count), best first, and rows (B, count, N).
    """
    magnitude = token_magnitude(x, importance)
    scores = (window_scores(magnitude, index) for index in token_indices)
    return rank(scores, token_indices, count, x.shape[1] * x.shape[2], rows_of)


def rank(
    scores: Iterable[Tensor],
    token_indices: Sequence[Tensor],
    count: int,
    num_tokens: int,
    rows_of: RowsOf = rows_of,
) -> list[Kept]:
    """The `count` best windows by the scores (B, n) of each partition, for maps of `num_tokens` tokens."""
    kept = [rank_windows(values, count) for values in scores]
    return [Kept(keep, rows_of(keep, index, num_tokens)) for keep, index in zip(kept, token_indices, strict=True)]


def flatten_map(x: Tensor, *, scratch_row: bool) -> Tensor:
    """Map (B, H, W, C) as rows (B*H*W, C), with one zero row more, the place of padding tokens, if `scratch_row`."""
    tokens = x.reshape(-1, x.shape[-1])
    return torch.nn.functional.pad(tokens, (0, 0, 0, 1)) if scratch_row else tokens


def scatter_rows_(tokens: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`values` (R, C) into `tokens` at `rows`, in place; every other row keeps its bits."""
    return tokens.index_copy_(0, rows, values)


def gather_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows (R, C) of a flattened map, `rows` (R,) int64."""
    return tokens.index_select(0, rows)


def scatter_rows(tokens: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy of `tokens` with `values` (R, C) at `rows`; every other row keeps its bits."""
    return tokens.index_put((rows,), values.to(tokens.dtype))


def unflatten_map(tokens: Tensor, shape: tuple[int, int, int], *, scratch_row: bool) -> Tensor:
    """Inverse of `flatten_map`; `shape` is (B, H, W)."""
    return (tokens[:-1] if scratch_row else tokens).view(*shape, tokens.shape[-1])
