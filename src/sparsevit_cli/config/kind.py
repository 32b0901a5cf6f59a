"""The sections of one task. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .experiment import (
    AdaptSection,
    DataSection,
    FinetuneSection,
    ModelSection,
    TaskSection,
    TrainSection,
)


@dataclass(frozen=True)
class Kind:
    """The sections of one task; `sources` are those of its data by the name of the source, the default one first.

    `home` is where its class is (`module:name`), None if the class was handed in.
    """

    home: str | None = None
    task: type[TaskSection] = TaskSection
    model: type[ModelSection] = ModelSection
    train: type[TrainSection] = TrainSection
    adapt: type[AdaptSection] = AdaptSection
    finetune: type[FinetuneSection] = FinetuneSection
    sources: Mapping[str, type[DataSection]] = field(default_factory=lambda: {"own": DataSection})
