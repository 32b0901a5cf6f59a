"""What the race of a search's best candidates is worth, on made-up answers of 32 candidates to each image.

A candidate's accuracy is drawn around 86 %, with a deviation of 3 points. Images differ in how hard they are, for all
candidates alike, and a bit for each alone. The regret is what the winner's accuracy on all images is short of the best
candidate's. Wins and losses are worlds in which the winner is better or worse than without a race.

usage: python benchmarks/search_race.py      (seconds; prints the table of docs/search.md)
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist, fmean, median
from typing import Any

import numpy as np

from sparsevit_cli.search.race import race
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

WORLDS, CANDIDATES, FINALISTS, ALONE = 200, 32, 4, 0.5
CASES = ((250, 125), (250, 64), (250, 32), (1000, 250), (1000, 125), (1000, 64))
"""Images of the search split, and `search.samples`."""


def world(seed: int, images: int) -> Any:
    """100 for a right answer, else 0, (candidates, images)."""
    rng = np.random.default_rng(seed)
    accuracies = np.clip(rng.normal(0.86, 0.03, CANDIDATES), 0.5, 0.99)
    ability = np.array([NormalDist().inv_cdf(each) for each in accuracies]) * (1 + ALONE**2) ** 0.5
    hardness = rng.normal(size=images) + ALONE * rng.normal(size=(CANDIDATES, images))
    return 100.0 * (ability[:, None] > hardness)


def searched(right: Any, samples: int, racers: int) -> tuple[float, int]:
    """Regret and images forwarded of a search that scores all candidates on `samples` images, then lets some race."""
    configs = list(SearchSpace((2, 2)))[:CANDIDATES]
    answers = dict(zip(configs, right, strict=True))
    total, images = right.shape[1], CANDIDATES * samples
    first = {config: float(answers[config][:samples].mean()) for config in configs}
    ranked = sorted(configs, key=lambda config: -first[config])

    def run_lap(racing: Sequence[SparsityConfig], lap: int) -> list[float]:
        nonlocal images
        images += len(racing) * samples
        return [float(answers[config][lap * samples : (lap + 1) * samples].mean()) for config in racing]

    entrants = {config: first[config] for config in ranked[:racers]}
    found = race(entrants, run_lap, laps=total // (2 * samples), keep=FINALISTS)
    finalists = found.order[:FINALISTS]
    images += sum(total - samples * len(found.scores[config]) for config in finalists)
    return float(right.mean(1).max() - max(answers[config].mean() for config in finalists)), images


def main() -> None:
    """Print the table."""
    print("| search split | `samples` | race | images forwarded | regret, mean | worst | wins, losses |")
    print("|---|---|---|---|---|---|---|")
    for total, samples in CASES:
        worlds = [world(seed, total) for seed in range(WORLDS)]
        without = [searched(right, samples, FINALISTS) for right in worlds]
        for racers in (FINALISTS, 16):
            rows = [searched(right, samples, racers) for right in worlds]
            regrets, images = zip(*rows, strict=True)
            if racers > FINALISTS and images == tuple(each for _, each in without):
                continue  # no race: half of the split was seen
            ahead = [before - after for (before, _), after in zip(without, regrets, strict=True)]
            versus = f"{sum(a > 1e-9 for a in ahead)}, {sum(a < -1e-9 for a in ahead)}" if racers > FINALISTS else ""
            race_told = "16 of 32" if racers > FINALISTS else "none"
            numbers = f"{median(images):,.0f} | {fmean(regrets):.2f} | {max(regrets):.2f}"
            print(f"| {total} | {samples} | {race_told} | {numbers} | {versus} |")


if __name__ == "__main__":
    main()
