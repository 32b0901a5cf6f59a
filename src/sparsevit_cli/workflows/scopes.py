"""Multiply-adds of a task's model, of its backbone where that is a part of it, and of what an image takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from sparsevit_cli.data.shrunk import Scale
from sparsevit_cli.errors import DataError
from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.sizes import Size, size_text
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


def per_image(session: Session, size: Size, scale: Scale | None = None) -> float | None:
    """See `Task.per_image`; None if it is not known without data."""
    try:
        return session.task.per_image(size, scale)
    except DataError:
        return None


def image_told(per: str, count: float | None, size: Size, costs: Mapping[str, tuple[float, float | None]]) -> list[str]:
    """A line on what a whole image costs if costs are per window of `size`: `count` windows.

    `costs` are those of a window by the name of a model: GMACs, and milliseconds or None where they are not steady.
    """
    if per == "image" or count == 1:
        return []
    if count is None:
        return [f"costs are per {per} of {size_text(size)}; how many an image takes is not known without the data"]
    told = ", ".join(
        f"{name} {gmacs * count:.3f} GMACs" + ("" if ms is None else f" and {ms * count:.1f} ms")
        for name, (gmacs, ms) in costs.items()
    )
    return [f"a validation image takes {count:.1f} {per}s of {size_text(size)} on average: {told}"]
