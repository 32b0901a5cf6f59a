"""Linear layers with GELU or a residual after them: nearly all multiply-adds of a block."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .weights import Affine


class LinearOps(Protocol):
    """Three forms of a linear layer on x (rows, in); each returns (rows, out)."""

    def linear(self, x: Tensor, layer: Affine) -> Tensor:
        """x @ weight.T + bias"""

    def linear_gelu(self, x: Tensor, layer: Affine) -> Tensor:
        """The exact GELU (by the error function) of `linear`."""

    def linear_add(self, x: Tensor, layer: Affine, residual: Tensor) -> Tensor:
        """`linear` plus `residual` (rows, out)."""


class TorchLinear:
    """`LinearOps` by public torch functions, on any device."""

    def linear(self, x: Tensor, layer: Affine) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    def linear_gelu(self, x: Tensor, layer: Affine) -> Tensor:
        return F.gelu(self.linear(x, layer))

    def linear_add(self, x: Tensor, layer: Affine, residual: Tensor) -> Tensor:
        return self.linear(x, layer).add_(residual)


class OneDnnLinear:
    """`LinearOps` by oneDNN on a CPU: GELU and the residual are epilogues of its matrix product.

    These operators are the ones TorchInductor calls on a CPU when it freezes a model. The weights are handed over as
    they are: packing them would gain a few percent more, double their memory, and go stale when they change.
    """

    def __init__(self) -> None:
        self._pointwise: Any = torch.ops.mkldnn._linear_pointwise

    def linear(self, x: Tensor, layer: Affine) -> Tensor:
        return self._pointwise(x, layer.weight, layer.bias, "none", [], "")  # type: ignore[no-any-return]

    def linear_gelu(self, x: Tensor, layer: Affine) -> Tensor:
        return self._pointwise(x, layer.weight, layer.bias, "gelu", [], "none")  # type: ignore[no-any-return]

    def linear_add(self, x: Tensor, layer: Affine, residual: Tensor) -> Tensor:
        return self._pointwise.binary(x, residual, layer.weight, layer.bias, "add")  # type: ignore[no-any-return]


def linear_ops(x: Tensor) -> LinearOps:
    """The fastest `LinearOps` for inputs like `x`."""
    return OneDnnLinear() if x.device.type == "cpu" and onednn_takes(x.dtype) else TorchLinear()


def onednn_takes(dtype: torch.dtype) -> bool:
    """True when oneDNN computes `dtype` on this CPU."""
    backend, ops = torch.backends.mkldnn, torch.ops.mkldnn
    if not (backend.is_available() and backend.enabled and hasattr(ops, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))
