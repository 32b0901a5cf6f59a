"""The trade-off between metric and cost."""

from __future__ import annotations

from collections.abc import Iterable

from .results import Evaluation


def pareto_front(history: Iterable[Evaluation]) -> tuple[Evaluation, ...]:
    """Evaluations that no other beats in metric (higher) and cost (lower) at once, cheapest first.

    Of evaluations equal in both, the one with the smaller tenths stands for all.
    """
    front: list[Evaluation] = []
    for evaluation in sorted(history, key=lambda e: (e.cost, -e.metric, e.config)):
        if not front or evaluation.metric > front[-1].metric:
            front.append(evaluation)
    return tuple(front)
