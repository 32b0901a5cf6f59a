"""How the kept windows of a Swin block are computed at inference: plain tensors in, the map changed in place.

Training, tracing and export go through timm's own modules; what is here must agree with them to about 1e-5.
"""

from .choice import (
    KERNELS,
    EmbedPatches,
    Kernels,
    MergePatches,
    RunWindows,
    ScoreAndRank,
    chosen,
    chosen_embedding,
    chosen_merging,
    chosen_ranking,
    explained,
    running,
)
from .embedding import EmbeddingWeights
from .linear import Affine, LinearOps, TorchLinear, linear_ops
from .merging import MergingWeights
from .windowed import BlockWeights, Norm, run_windows_

VERSION = 6
"""Raised when what is here gets faster or slower: latencies measured before stand for something else."""

__all__ = [
    "KERNELS",
    "VERSION",
    "Affine",
    "BlockWeights",
    "EmbedPatches",
    "EmbeddingWeights",
    "Kernels",
    "LinearOps",
    "MergePatches",
    "MergingWeights",
    "Norm",
    "RunWindows",
    "ScoreAndRank",
    "TorchLinear",
    "chosen",
    "chosen_embedding",
    "chosen_merging",
    "chosen_ranking",
    "explained",
    "linear_ops",
    "run_windows_",
    "running",
]
