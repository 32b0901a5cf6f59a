"""Which engine computes the parts of a model: the portable one, ours in C++ or Triton's where they fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from sparsevit_cli import windows

from . import compiled, windowed
from .embedding import EmbeddingWeights
from .merging import MergingWeights, merge_patches
from .windowed import BlockWeights

Kernels = Literal["auto", "portable", "native", "triton"]
KERNELS: tuple[str, ...] = get_args(Kernels)

_log = logging.getLogger(__name__)


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
        padded: windows.Padded,
    ) -> None: ...


class MergePatches(Protocol):
    """`merging.merge_patches`, or what stands for it."""

    def __call__(self, x: Tensor, weights: MergingWeights) -> Tensor: ...


class EmbedPatches(Protocol):
    """`native.embed_patches`, or what stands for it."""

    def __call__(self, x: Tensor, weights: EmbeddingWeights) -> Tensor | None: ...


class ScoreAndRank(Protocol):
    """`windows.score_and_rank`, or what stands for it."""

    def __call__(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: windows.Importance
    ) -> list[tuple[Tensor, Tensor]]: ...


def chosen_ranking(kernels: str, device: torch.device) -> ScoreAndRank:
    """The function that scores and ranks the windows of a map."""
    engine, _ = _engine(_named(kernels, device), device.type)
    return getattr(engine, "score_and_rank", windows.score_and_rank)


def chosen(kernels: str, block: BlockWeights, device: torch.device) -> RunWindows:
    """The function that runs windows of `block` on `device`.

    `auto` is native on CPUs of a kind that was measured and portable elsewhere: no GPU was yet. `native` falls back to
    portable where the C++ cannot be compiled, with one warning, in `auto` too. `triton` falls back where Triton is not
    installed or the device is a CPU (except in Triton's interpreter). Both do for blocks that they do not support: with
    one warning where they were asked for by name.
    """
    name = _named(kernels, device)
    engine, reason = _engine(name, device.type)
    if engine is not None and engine.supports(block):
        run: RunWindows = engine.run_windows_
        return run
    if kernels == name != "portable":
        _warn_once(f"{reason or engine.LIMITS}: the portable kernels run instead")
    return windowed.run_windows_


def chosen_merging(kernels: str, weights: MergingWeights, device: torch.device) -> MergePatches:
    """The function that merges patches on `device`: C++ where blocks run in C++ and it fits, else the portable one."""
    native = _native_of(kernels, device)
    return native.merge_patches if native is not None and native.supports_merging(weights) else merge_patches


def chosen_embedding(kernels: str, weights: EmbeddingWeights, device: torch.device) -> EmbedPatches | None:
    """The function that embeds patches on `device`; None where timm's own way is taken."""
    native = _native_of(kernels, device)
    return native.embed_patches if native is not None and native.supports_embedding(weights) else None


def _native_of(kernels: str, device: torch.device) -> Any:
    """The module `native`, where it is what `kernels` comes to on `device`."""
    name = _named(kernels, device)
    return _engine(name, device.type)[0] if name == "native" else None


def running(kernels: str, device: torch.device) -> str:
    """Name and version of what `kernels` comes to on `device`: two names that are equal are the same code."""
    name = _named(kernels, device)
    engine, _ = _engine(name, device.type)
    return "portable" if engine is None else f"{name} {engine.version()}"


def explained(kernels: str, device: torch.device) -> str:
    """`running`, and why it is not what was wanted."""
    wanted = "native" if kernels == "auto" and device.type == "cpu" else _named(kernels, device)
    reason = _engine(wanted, device.type)[1]
    return running(kernels, device) + (f" ({reason})" if reason else "")


def _named(kernels: str, device: torch.device) -> str:
    """`kernels`, or what `auto` stands for."""
    if kernels != "auto":
        return kernels
    if device.type != "cpu" or not compiled.may_be_measured():
        return "portable"
    native, reason = _engine("native", device.type)
    if native is None:
        _warn_once(f"{reason}: the portable kernels run instead")
    return "native" if native is not None and native.is_measured() else "portable"


@lru_cache
def _engine(name: str, device_type: str) -> tuple[Any, str]:
    """The module of an engine, or None and why it cannot be taken."""
    try:
        return {"portable": lambda _: None, "native": _native, "triton": _triton}[name](device_type), ""
    except RuntimeError as error:
        return None, str(error)


def _native(device_type: str) -> Any:
    if device_type != "cpu":
        raise RuntimeError(f"the C++ kernels are for CPUs, not for {device_type}")
    from . import native

    native.check_structures()
    return native


def _triton(device_type: str) -> Any:
    try:
        import triton

        if device_type != "cuda" and not triton.knobs.runtime.interpret:
            raise RuntimeError(f"Triton has no {device_type} backend here")
        from . import triton_windows
    except (ImportError, AttributeError) as error:  # no Triton, or one without knobs
        raise RuntimeError(f"Triton cannot be used ({error})") from error
    return triton_windows


@lru_cache
def _warn_once(reason: str) -> None:
    _log.warning(reason)  # Python's warnings are not shown on the command line
