"""How the parts of a sparse Swin are computed at inference: tensors in, tensors out, the map changed in place.

README.md beside this file tells the contract, the layout, and how one kernel is tested and timed. Training, tracing and
export go through timm's own modules; engines must agree with them to about 1e-5.
"""

from .choice import KERNELS, Kernels, beside_modules, chosen, explained, running, using
from .engine import MOVES, Engine, EngineAround, Moves
from .linear import LinearOps, TorchLinear, linear_ops
from .weights import Affine, BlockWeights, EmbeddingWeights, MergingWeights, Norm, Weights

VERSION = 6
"""Raised when an engine gets faster or slower: latency tables that were measured before are then of no use."""

__all__ = [
    "KERNELS",
    "MOVES",
    "VERSION",
    "Affine",
    "BlockWeights",
    "EmbeddingWeights",
    "Engine",
    "EngineAround",
    "Kernels",
    "LinearOps",
    "MergingWeights",
    "Moves",
    "Norm",
    "TorchLinear",
    "Weights",
    "beside_modules",
    "chosen",
    "explained",
    "linear_ops",
    "running",
    "using",
]
