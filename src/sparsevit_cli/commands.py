"""The commands that work on an experiment, in one table: what each depends on, and what comes after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command.

    A second run in its folder must agree on the settings in `sections`. `training` is the section of a training, which
    goes on in its folder; other commands set an earlier result aside. `next_command` is what people type after it.
    Without the files `needed` it is not done, whatever its numbers say.
    """

    sections: tuple[str, ...]
    training: str | None = None
    next_command: str | None = None
    needed: tuple[str, ...] = ()


COMMANDS: Mapping[str, Command] = {
    "check-data": Command((), next_command="pretrain"),
    "pretrain": Command(("seed", "task", "model", "data", "train"), "train", "adapt"),
    "adapt": Command(("seed", "task", "model", "data", "adapt"), "adapt", "search --budget-latency 70%"),
    "search": Command(("task", "model", "data"), next_command="finetune"),
    "finetune": Command(("seed", "task", "model", "data", "finetune"), "finetune", "profile"),
    "rival": Command(("seed", "task", "model", "data", "finetune"), "finetune"),
    "dense_adapt": Command(("seed", "task", "model", "data", "adapt"), "adapt"),
    "dense_finetune": Command(("seed", "task", "model", "data", "finetune"), "finetune"),
    "evaluate": Command(("task", "model", "data")),
    "profile": Command(("task", "model"), needed=("profile.json",)),
    "rivals": Command(("task", "model")),
    "export": Command(("task", "model"), needed=("manifest.json",)),
    "run": Command(("task", "model", "data")),
}
LEAVE_WEIGHTS = ("finetune", "adapt", "pretrain")
"""Trainings whose weights other commands take, the last one first."""
