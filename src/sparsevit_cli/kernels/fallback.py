"""The one place of falling back: an engine with limits, and the portable engine for whatever it does not take."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Self

from torch import Tensor

from sparsevit_cli.windows import Importance, Kept

from .engine import Engine, Moves
from .portable import PORTABLE
from .weights import BlockWeights, EmbeddingWeights, MergingWeights, Weights

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LimitedEngine(ABC):
    """An `Engine` for what `takes` says yes to. Subclasses write the methods with a leading underscore."""

    name: ClassVar[str]
    limits: ClassVar[str]
    """What its blocks must be, in words for the user."""
    warns: bool = False
    """True when the user named this engine: a block that it does not take is told, once."""
    portable: Engine = PORTABLE

    @property
    def moves(self) -> Moves:
        return self.portable.moves

    def with_moves(self, moves: Moves) -> Self:
        return replace(self, portable=self.portable.with_moves(moves))

    @abstractmethod
    def version(self) -> str:
        """Two equal ones are the same code."""

    @abstractmethod
    def takes(self, x: Tensor, weights: Weights | None) -> bool:
        """True when the methods with an underscore compute `weights` on `x`; args as in `Engine.takes`."""

    def leaves_out_padding(self, x: Tensor, weights: BlockWeights) -> bool:
        return self.takes(x, weights) or self.portable.leaves_out_padding(x, weights)

    def run_windows_(
        self,
        tokens: Tensor,
        rows: Tensor,
        weights: BlockWeights,
        bias: Tensor,
        bias_class: Tensor | None,
        *,
        padded: bool,
        places: Tensor | None = None,
    ) -> None:
        if self.takes(tokens, weights):
            self._run_windows_(tokens, rows, weights, bias, bias_class, padded=padded)
            return
        if self.warns:
            warn_once(self.limits)
        self.portable.run_windows_(tokens, rows, weights, bias, bias_class, padded=padded, places=places)

    def merge_patches(self, x: Tensor, weights: MergingWeights) -> Tensor:
        return (self._merge_patches if self.takes(x, weights) else self.portable.merge_patches)(x, weights)

    def embed_patches(self, x: Tensor, weights: EmbeddingWeights) -> Tensor:
        return (self._embed_patches if self.takes(x, weights) else self.portable.embed_patches)(x, weights)

    def score_and_rank(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance
    ) -> list[Kept]:
        score_and_rank = self._score_and_rank if self.takes(x, None) else self.portable.score_and_rank
        return score_and_rank(x, token_indices, count, importance)

    def _run_windows_(
        self,
        tokens: Tensor,
        rows: Tensor,
        weights: BlockWeights,
        bias: Tensor,
        bias_class: Tensor | None,
        *,
        padded: bool,
    ) -> None:
        raise NotImplementedError

    def _merge_patches(self, x: Tensor, weights: MergingWeights) -> Tensor:
        raise NotImplementedError

    def _embed_patches(self, x: Tensor, weights: EmbeddingWeights) -> Tensor:
        raise NotImplementedError

    def _score_and_rank(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance
    ) -> list[Kept]:
        raise NotImplementedError


@lru_cache
def warn_once(reason: str) -> None:
    """Tell that the portable engine runs because of `reason`."""
    _log.warning("%s: the portable kernels run instead", reason)  # the command line shows no Python warnings
