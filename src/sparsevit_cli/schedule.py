"""Sparsity schedules: which configuration a training step runs at. Pure functions of the step, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol

from .sparsity import SearchSpace, SparsityConfig


class SparsitySchedule(Protocol):
    """The three kinds of training differ in this alone."""

    def at(self, step: int) -> SparsityConfig:
        """Configuration of optimizer step `step`."""


@dataclass(frozen=True)
class FixedSchedule:
    """The same configuration at every step: dense training, and finetuning of a winner."""

    config: SparsityConfig

    def at(self, step: int) -> SparsityConfig:
        """The configuration, whatever the step."""
        return self.config


@dataclass(frozen=True)
class RandomSchedule:
    """A new configuration at every step, a function of (seed, step): sparsity-aware adaptation (paper 3.2).

    The same after a resume and on every rank, since nothing is drawn from a global generator.
    """

    space: SearchSpace
    seed: int

    def at(self, step: int) -> SparsityConfig:
        """Each pair's ratio uniform on the grid, then sorted within its stage."""
        return self.space.sample(Random(f"sparsity:{self.seed}:{step}"))
