"""Multiply-adds of a task's model, and of its backbone where that is a part of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.sparsity import SparsityConfig

from .session import Session

Gmacs = dict[str, float]
"""10^9 multiply-adds per image: `gmacs` of the whole model, `backbone_gmacs` if there are modules around it."""


BACKBONE = "backbone_gmacs"


def gmacs_of(session: Session, model: nn.Module) -> Callable[[SparsityConfig], Gmacs]:
    """A function from configuration to multiply-adds, under the names that they have in all records."""
    costs = {
        "gmacs" if scope == "model" else f"{scope}_gmacs": macs_cost(session.workload(model, scope=scope))
        for scope in reversed(session.task.scopes(model))
    }
    return lambda config: {name: cost(config) / 1e9 for name, cost in costs.items()}
