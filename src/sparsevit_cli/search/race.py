"""The race of a search's best candidates: all on the same growing set of images, until few are left for all images.

Images are taken in laps of equal size, none twice. Every candidate ran lap 0: that is the search itself. The best ones
run lap after lap, and each lap is scored alone. A metric that is no mean over images, such as an AP, is raced by its
mean over laps. So a lap's score is one number, whatever the task, and it can be kept in a ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from sparsevit_cli.sparsity import SparsityConfig

CRITICAL = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86)
"""Student's t at 5 % on one side, for 1, 2, ... degrees of freedom; the last one for all further ones."""
FEWEST = 3
"""Laps that a difference must be seen in, before it drops a candidate."""


@dataclass(frozen=True)
class Race:
    """`order`: all that entered, best first, those left before those dropped. `scores`: of each, one per lap run."""

    order: tuple[SparsityConfig, ...]
    scores: Mapping[SparsityConfig, tuple[float, ...]]


def race(
    entrants: Mapping[SparsityConfig, float],
    run_lap: Callable[[Sequence[SparsityConfig], int], Sequence[float]],
    *,
    laps: int,
    keep: int,
) -> Race:
    """Run laps 1 to `laps` - 1 with the `entrants`, given best first with their scores of lap 0, until `keep` are left.

    `run_lap(configs, lap)` gives a score per configuration, higher is better. After a lap a candidate is dropped if it
    is worse than the leader by a paired t-test over the laps. Each time the images have doubled, the better half
    stays, or `keep`. Ties go to the one that entered first. A function of its arguments alone.
    """
    scores: dict[SparsityConfig, tuple[float, ...]] = {config: (score,) for config, score in entrants.items()}
    racing, dropped = list(scores), list[SparsityConfig]()
    for lap in range(1, laps):
        if len(racing) <= keep:
            break
        for config, score in zip(racing, run_lap(racing, lap), strict=True):
            scores[config] += (score,)
        racing.sort(key=lambda config: -fmean(scores[config]))  # stable
        worse = [config for config in racing[keep:] if is_worse(scores[config], scores[racing[0]])]
        stays = [config for config in racing if config not in worse]
        has_doubled = (lap + 1) & lap == 0
        most = max(keep, len(racing) // 2) if has_doubled else len(racing)
        kept = stays[:most]
        dropped = [config for config in racing if config not in kept] + dropped
        racing = kept
    return Race((*racing, *dropped), scores)


def is_worse(scores: Sequence[float], leader: Sequence[float]) -> bool:
    """True if `scores` are below those of the `leader` on the same laps, by more than chance explains."""
    differences = [own - best for own, best in zip(scores, leader, strict=True)]
    if len(differences) < FEWEST:
        return False
    critical = CRITICAL[min(len(differences) - 2, len(CRITICAL) - 1)]
    return fmean(differences) < -critical * stdev(differences) / math.sqrt(len(differences))
