"""Rank correlation: does a cheap metric order candidates as the full one does?"""

from __future__ import annotations

import math
from collections.abc import Sequence


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, -1 to 1; ties share their mean rank. NaN where either side is constant."""
    assert len(a) == len(b), f"{len(a)} against {len(b)} values"
    if not a:
        return math.nan
    x, y = _ranks(a), _ranks(b)
    mean = (len(a) - 1) / 2
    covariance = sum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    spread = math.sqrt(sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y))
    return covariance / spread if spread else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 0; equal values get the mean of the ranks they take up."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            ranks[index] = (start + end - 1) / 2
        start = end
    return ranks
