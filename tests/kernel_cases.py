"""Blocks and windows of every kind, and the comparison of an engine with the portable one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsevit_cli import windows
from sparsevit_cli.kernels import Affine, BlockWeights, Norm
from sparsevit_cli.kernels.portable import run_windows_ as portable_run_windows_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where tensors are made; read at every call, so that a test may set it."""


def block(
    channels: int, heads: int, ratio: int = 4, *, with_bias: bool = True, norm_first: bool = True
) -> BlockWeights:
    """As in V1; without `norm_first` as in V2: cosine attention, and norms after attention and MLP."""

    def affine(inner: int, outer: int, bias: bool = True) -> Affine:
        return Affine(random(outer, inner) / inner**0.5, random(outer) if bias else None)

    def norm() -> Norm:
        return Norm(1 + 0.2 * random(channels), 0.2 * random(channels), 1e-5)

    return BlockWeights(
        norm1=norm(), qkv=affine(channels, 3 * channels, with_bias), proj=affine(channels, channels),
        norm2=norm(), fc1=affine(channels, ratio * channels), fc2=affine(ratio * channels, channels),
        num_heads=heads, norm_first=norm_first, scale=(channels // heads) ** -0.5 if norm_first else 1.0,
        cosine_scale=None if norm_first else 5 + 10 * torch.rand(heads, 1, 1, device=DEVICE),
    )  # fmt: skip


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def case(
    channels: int, heads: int, side: int, size: tuple[int, int], *, batch: int = 2, shifted: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A map's rows, rows of every other window in random order, bias, and mask classes."""
    height, width = size
    window, shift = (side, side), (side // 2, side // 2) if shifted else (0, 0)
    index = windows.window_token_index(height, width, window, shift, "roll_first", torch.device(DEVICE))
    keep = torch.stack([torch.randperm(len(index), device=DEVICE)[: (len(index) + 1) // 2] for _ in range(batch)])
    rows = windows.flat_rows(index, keep, height * width, scratch_row=windows.has_padding(height, width, window))
    bias = random(1, heads, side**2, side**2)
    bias_class = None
    if shifted:
        masks, class_of = windows.shift_mask(height, width, window, shift, torch.device(DEVICE))
        bias, bias_class = bias + masks[:, None], class_of[keep.flatten()]
    return random(batch * height * width, channels), rows.flatten(0, 1), bias, bias_class


def assert_equal_to_portable(
    run_windows_: Callable[..., None],
    tokens: Tensor,
    rows: Tensor,
    weights: BlockWeights,
    bias: Tensor,
    bias_class: Tensor | None,
    tolerance: float,
) -> None:
    """Within `tolerance` of the largest value; skipped tokens to the bit."""
    padded = bool((rows == len(tokens)).any())
    expected, found = tokens.clone(), tokens.clone()
    portable_run_windows_(expected, rows, weights, bias, bias_class, padded=padded)
    run_windows_(found, rows, weights, bias, bias_class, padded=padded)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    skipped = torch.ones(len(tokens) + 1, dtype=torch.bool, device=tokens.device)
    skipped[rows.flatten()] = False
    assert torch.equal(found[skipped[:-1]], tokens[skipped[:-1]])
    assert not torch.equal(found, tokens)


def arranged(
    channels: int, heads: int, side: int, size: tuple[int, int], shifted: bool, batch: int = 2, *,
    norm_first: bool = True,
) -> tuple[Tensor, Tensor, BlockWeights, Tensor, Tensor | None]:  # fmt: skip
    tokens, rows, bias, bias_class = case(channels, heads, side, size, batch=batch, shifted=shifted)
    return tokens, rows, block(channels, heads, norm_first=norm_first), bias, bias_class
