"""A cost that is a sum of table entries, so that it can be told for millions of configurations at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.sparsity import SparsityConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class AdditiveCost:
    """`base` and one entry per block pair; a `Cost`, and its twin for arrays.

    `pairs[stage][pair][tenths]` is what both blocks of a pair cost at that ratio. `overhead[stage]` is added once where
    any pair of the stage is pruned. Both twins add in the same order, so that they agree to the bit.
    """

    base: float
    pairs: tuple[tuple[tuple[float, ...], ...], ...]
    overhead: tuple[float, ...]

    def __call__(self, config: SparsityConfig) -> float:
        """Cost of one configuration. Raises ConfigError for one of another model, or outside the table."""
        pairs, top = tuple(map(len, self.pairs)), len(self.pairs[0][0]) - 1
        if config.pairs != pairs:
            got = f"{config} has block pairs {list(config.pairs)}, the model {list(pairs)}"
            raise ConfigError("sparsity", got, "Give a configuration of this model.")
        if max(map(max, config.tenths)) > top:
            got = f"{config} has ratios above {top / 10}, and nothing is known of their cost"
            raise ConfigError("sparsity", got, "Give a configuration within the table.")
        total = self.base
        for entries, overhead, stage in zip(self.pairs, self.overhead, config.tenths, strict=True):
            part = 0.0
            for entry, tenths in zip(entries, stage, strict=True):
                part += entry[tenths]
            total += part + (overhead if any(stage) else 0.0)
        return total

    def of_stage(self, stage: int, tenths: NDArray[Any]) -> NDArray[Any]:
        """Share of one stage, for tenths of shape (configurations, pairs of that stage); shape (configurations,)."""
        import numpy as np

        part = np.zeros(len(tenths))
        for pair, entry in enumerate(self.pairs[stage]):
            part += np.asarray(entry, dtype=np.float64)[tenths[:, pair]]
        return part + np.where(tenths.any(axis=1), self.overhead[stage], 0.0)
