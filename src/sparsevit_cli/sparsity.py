"""Sparsity configurations and the space of them: frozen values, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from itertools import combinations_with_replacement, product
from numbers import Real
from random import Random
from typing import Union

from .errors import ConfigError

MAX_TENTHS = 8
"""Largest sparsity ratio of the method, in tenths (paper section 3.2: 0 to 80 %)."""

Ratios = Union["SparsityConfig", float, Sequence[Sequence[float]]]
"""What the public API takes for ratios: a config, one number for everywhere, or lists per stage and pair."""


def pairs_per_stage(depths: Sequence[int]) -> tuple[int, ...]:
    """Number of block pairs of each stage; the last pair of an odd depth holds one block."""
    return tuple((depth + 1) // 2 for depth in depths)


def ratio_to_tenths(ratio: object, where: str = "sparsity ratio") -> int:
    """Integer tenths of a ratio on the grid 0, 0.1 ... 0.8. Raises ConfigError off the grid."""
    allowed = f"allowed are 0, 0.1 ... {MAX_TENTHS / 10}"
    if isinstance(ratio, bool) or not isinstance(ratio, (Real, Decimal)):
        raise ConfigError(where, f"{ratio!r} is not a number; {allowed}", "Give the share of windows to skip.")
    try:
        value = float(ratio)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ConfigError(where, f"{ratio!r} is not finite; {allowed}", "Give the share of windows to skip.")
    tenths = round(max(-1.0, min(value, 1.0)) * 10)  # 1e308 times ten is no number
    if abs(value * 10 - tenths) > 1e-6 or not 0 <= tenths <= MAX_TENTHS:
        raise ConfigError(where, f"{ratio!r} is not on the grid; {allowed}", "Round it to the nearest tenth.")
    return tenths


@dataclass(frozen=True, order=True)
class SparsityConfig:
    """Sparsity ratio of every block pair, as integer tenths per stage; never decreasing within a stage.

    `SparsityConfig(((3,), (0,), (1, 2, 2), (0,)))` is the published `[[.3], [0], [.1, .2, .2], [0]]`.
    Compared, ordered and hashed by its tenths; prints as its ratios. Raises ConfigError.
    """

    tenths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "tenths", tuple(tuple(stage) for stage in self.tenths))
        except TypeError:
            got = f"{self.tenths!r} is not one tuple of tenths per stage"
            raise ConfigError("sparsity", got, "Use from_ratios for one number or fractions.") from None
        if not self.tenths or not all(self.tenths):
            raise ConfigError("sparsity", f"{self.tenths!r} has an empty stage", "Give one ratio per block pair.")
        for number, stage in enumerate(self.tenths):
            for tenths in stage:
                if type(tenths) is not int or not 0 <= tenths <= MAX_TENTHS:  # a bool is none, nor a NumPy integer
                    got = f"{tenths!r} tenths; allowed are integers 0 ... {MAX_TENTHS}"
                    raise ConfigError(f"sparsity of stage {number}", got, "Use from_ratios for fractions.")
            if list(stage) != sorted(stage):
                got = f"{[t / 10 for t in stage]} decreases with depth, and a skipped window is never computed again"
                raise ConfigError(f"sparsity of stage {number}", got, f"Try {[t / 10 for t in sorted(stage)]}.")

    @classmethod
    def from_ratios(cls, ratios: Ratios, depths: Sequence[int] | None = None) -> SparsityConfig:
        """Config from a SparsityConfig, one number for every pair (needs `depths`), or nested lists.

        `depths` (blocks per stage), where given, must agree with the number of pairs. Raises ConfigError.
        """
        if isinstance(ratios, SparsityConfig):
            config = ratios
        elif isinstance(ratios, (int, float)):
            if depths is None:
                raise ConfigError("sparsity", f"one number ({ratios!r}) for a model of unknown depth", "Give lists.")
            tenths = ratio_to_tenths(ratios)
            config = cls(tuple((tenths,) * pairs for pairs in pairs_per_stage(depths)))
        else:
            config = cls(tuple(_stage_tenths(number, stage) for number, stage in enumerate(_as_list(ratios))))
        if depths is not None and config.pairs != pairs_per_stage(depths):
            got = f"ratios for block pairs {list(config.pairs)}, the model has {list(pairs_per_stage(depths))}"
            raise ConfigError("sparsity", got, "Give one list per stage with one ratio per pair of blocks.")
        return config

    @classmethod
    def dense(cls, depths: Sequence[int]) -> SparsityConfig:
        """Nothing skipped."""
        return cls.from_ratios(0, depths)

    @property
    def ratios(self) -> tuple[tuple[float, ...], ...]:
        """Share of windows skipped, per stage and block pair."""
        return tuple(tuple(t / 10 for t in stage) for stage in self.tenths)

    @property
    def pairs(self) -> tuple[int, ...]:
        """Number of block pairs per stage."""
        return tuple(len(stage) for stage in self.tenths)

    @property
    def is_dense(self) -> bool:
        """True where no window is skipped anywhere."""
        return not any(any(stage) for stage in self.tenths)

    def __str__(self) -> str:
        return "[" + ", ".join("[" + ", ".join(f"{r:g}" for r in stage) + "]" for stage in self.ratios) + "]"


def _as_list(value: object) -> list[object]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        got = f"{value!r} is not a list; expected e.g. [[0.6], [0], [0.2, 0.4, 0.5], [0]]"
        raise ConfigError("sparsity", got, "Give one list per stage with one ratio per pair of blocks.")
    return list(value)


def _stage_tenths(number: int, stage: object) -> tuple[int, ...]:
    return tuple(ratio_to_tenths(r, f"sparsity of stage {number}") for r in _as_list(stage))


@dataclass(frozen=True)
class SearchSpace:
    """All configurations of a model with `depths` blocks per stage, ratios from 0 to `max_ratio`.

    A gene is the ratio of one block pair; order within a stage is repaired by sorting (paper section 3.3).
    Swin-T has 9 * 9 * C(11, 3) * 9 = 120,285 configurations. Raises ConfigError.
    """

    depths: tuple[int, ...]
    max_ratio: float = MAX_TENTHS / 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        if not self.depths or any(isinstance(d, bool) or not isinstance(d, int) or d < 1 for d in self.depths):
            got = f"{self.depths!r}; expected the number of blocks per stage, each at least 1"
            raise ConfigError("search space depths", got, "Give e.g. (2, 2, 6, 2).")
        ratio_to_tenths(self.max_ratio, "search space max_ratio")

    @cached_property
    def max_tenths(self) -> int:
        """Largest ratio of a pair, in tenths."""
        return ratio_to_tenths(self.max_ratio)

    @property
    def pairs(self) -> tuple[int, ...]:
        """Number of block pairs (genes) per stage."""
        return pairs_per_stage(self.depths)

    @property
    def dense(self) -> SparsityConfig:
        """The configuration that skips nothing."""
        return SparsityConfig(tuple((0,) * pairs for pairs in self.pairs))

    @property
    def middle(self) -> SparsityConfig:
        """Half of the largest ratio (rounded down to the grid) everywhere."""
        return SparsityConfig(tuple((self.max_tenths // 2,) * pairs for pairs in self.pairs))

    @property
    def sparsest(self) -> SparsityConfig:
        """The configuration that skips most."""
        return SparsityConfig(tuple((self.max_tenths,) * pairs for pairs in self.pairs))

    def uniform(self, ratio: float) -> SparsityConfig:
        """One ratio for every pair."""
        return SparsityConfig.from_ratios(ratio, self.depths)

    @property
    def size(self) -> int:
        """Number of configurations; unlike `len`, not bounded by the machine's word."""
        return math.prod(math.comb(self.max_tenths + pairs, pairs) for pairs in self.pairs)

    def __len__(self) -> int:
        return self.size

    def __contains__(self, config: object) -> bool:
        return (
            isinstance(config, SparsityConfig)
            and config.pairs == self.pairs
            and all(t <= self.max_tenths for stage in config.tenths for t in stage)
        )

    def __iter__(self) -> Iterator[SparsityConfig]:
        stages = [combinations_with_replacement(range(self.max_tenths + 1), pairs) for pairs in self.pairs]
        return (SparsityConfig(tenths) for tenths in product(*stages))

    def sample(self, rng: Random) -> SparsityConfig:
        """Each pair's ratio uniform on the grid, then sorted within the stage."""
        return self.repair([[rng.randint(0, self.max_tenths) for _ in range(pairs)] for pairs in self.pairs])

    def repair(self, tenths: Sequence[Sequence[int]]) -> SparsityConfig:
        """Sort the genes of each stage, so that ratios never decrease with depth."""
        return SparsityConfig(tuple(tuple(sorted(stage)) for stage in tenths))
