"""How the kept windows of a Swin block are computed at inference: plain tensors in, the map changed in place.

Training, tracing and export go through timm's own modules; what is here must agree with them to about 1e-5.
"""

from .choice import KERNELS, Kernels, RunWindows, ScoreAndRank, chosen, chosen_ranking, explained, running
from .linear import Affine, LinearOps, TorchLinear, linear_ops
from .merging import MergingWeights, merge_patches
from .windowed import BlockWeights, Norm, run_windows_

VERSION = 3
"""Raised when what is here gets faster or slower: latencies measured before stand for something else."""

__all__ = [
    "KERNELS",
    "VERSION",
    "Affine",
    "BlockWeights",
    "Kernels",
    "LinearOps",
    "MergingWeights",
    "Norm",
    "RunWindows",
    "ScoreAndRank",
    "TorchLinear",
    "chosen",
    "chosen_ranking",
    "explained",
    "linear_ops",
    "merge_patches",
    "run_windows_",
    "running",
]
