"""Which engine computes the kept windows of a block: the portable one, or Triton's where it is asked for and fits."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from . import windowed
from .windowed import BlockWeights

Kernels = Literal["auto", "portable", "triton"]
KERNELS: tuple[str, ...] = get_args(Kernels)


class RunWindows(Protocol):
    """`windowed.run_windows_`, or what stands for it."""

    def __call__(
        self,
        tokens: Tensor,
        rows: Tensor,
        block: BlockWeights,
        bias: Tensor,
        bias_class: Tensor | None,
        *,
        padded: bool,
    ) -> None: ...


class ScoreAndRank(Protocol):
    """`triton_windows.score_and_rank`."""

    def __call__(self, x: Tensor, token_index: Tensor, count: int, importance: str) -> tuple[Tensor, Tensor]: ...


def chosen_ranking(kernels: str, device: torch.device) -> ScoreAndRank | None:
    """The function that scores and ranks windows of a map in few launches; None for those of `windows`."""
    if kernels != "triton":
        return None
    module, _ = _triton(device.type)
    return None if module is None else module.score_and_rank


def chosen(kernels: str, block: BlockWeights, device: torch.device) -> RunWindows:
    """The function that runs windows of `block` on `device`.

    `triton` falls back to portable, with one warning, where Triton is not installed, where the device is a CPU
    (except in Triton's interpreter), and for blocks that it has no kernels for. `auto` is portable: no GPU has been
    measured yet.
    """
    if kernels != "triton":
        return windowed.run_windows_
    module, reason = _triton(device.type)
    if module is not None and module.supports(block):
        run: RunWindows = module.run_windows_
        return run
    _warn_once(reason or "Triton's kernels are for contiguous weights in float32 or 16 bits, and norms that have some")
    return windowed.run_windows_


def running(kernels: str, device: torch.device) -> str:
    """Name and version of what `kernels` comes to on `device`: two names that are equal are the same code."""
    module = _triton(device.type)[0] if kernels == "triton" else None
    return "portable" if module is None else f"triton {module.triton.__version__}"


@lru_cache
def _triton(device_type: str) -> tuple[Any, str]:
    """Our Triton kernels, or why they cannot be taken."""
    try:
        import triton

        if device_type != "cuda" and not triton.knobs.runtime.interpret:
            return None, f"Triton has no {device_type} backend here"
        from . import triton_windows
    except (ImportError, AttributeError) as error:  # no Triton, or one without knobs
        return None, f"Triton cannot be used ({error})"
    return triton_windows, ""


@lru_cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"{reason}: running without Triton", RuntimeWarning, stacklevel=2)
