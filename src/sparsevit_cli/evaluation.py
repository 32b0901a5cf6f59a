"""ONE evaluation loop, for every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from torch import nn

from .data.loader import MAX_WAIT_SECONDS, eval_batches
from .data.source import Batch, Source
from .errors import ConfigError, NonFiniteError
from .reporting import Progress
from .sparsity import SparsityConfig
from .swin import set_sparsity, shared_prefixes
from .tasks.task import Score, Scorer, Task


class CandidatesError(NonFiniteError):
    """Candidates whose numbers are not finite; `finite` has the scores of the others that ran beside them."""

    finite: Mapping[SparsityConfig, Score] = MappingProxyType({})


def evaluate(
    task: Task,
    model: nn.Module,
    source: Source,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    max_wait_seconds: float = MAX_WAIT_SECONDS,
    subset: Sequence[int] | None = None,
    progress: Progress | None = None,
    before_batch: Callable[[], None] = lambda: None,
    with_predictions: bool = False,
    scorer: Scorer | None = None,
) -> Score:
    """Score of `model` at its current sparsity on `source`, or on the samples of `subset`.

    `scorer` replaces a fresh one of the task. `before_batch` may raise, to stop early, also while a batch is awaited.
    Raises NonFiniteError for scores that are not numbers, DataError for images that cannot be read.
    """
    scorer = scorer or task.scorer(source, device)
    batches = partial(eval_batches, source, batch_size, workers, subset, max_wait_seconds, before_batch)
    count = _forward(model, batches, [(lambda: None, scorer)], device, before_batch, progress)
    predictions = getattr(scorer, "predictions", None) if with_predictions else None
    score = _score(task, scorer, count, "evaluation")
    return score if predictions is None else replace(score, predictions=predictions())


def evaluate_each(
    task: Task,
    model: nn.Module,
    source: Source,
    configs: Collection[SparsityConfig],
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    max_wait_seconds: float = MAX_WAIT_SECONDS,
    subset: Sequence[int] | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[SparsityConfig, Score]:
    """The score at each of `configs`, each batch read once, and what their first stages have in common computed once.

    As `evaluate` otherwise, but numbers that are not finite raise CandidatesError. Every configuration has a scorer of
    its own in memory.
    """
    scorers = {config: task.scorer(source, device) for config in sorted(configs)}
    runs = [(partial(set_sparsity, model, config), scorer) for config, scorer in scorers.items()]
    batches = partial(eval_batches, source, batch_size, workers, subset, max_wait_seconds, before_batch)
    with shared_prefixes(model):
        count = _forward(model, batches, runs, device, before_batch)
    finite: dict[SparsityConfig, Score] = {}
    wrong: list[NonFiniteError] = []
    for config, scorer in scorers.items():
        try:
            finite[config] = _score(task, scorer, count, f"candidate {config}")
        except NonFiniteError as error:
            wrong.append(error)
    if wrong:
        told = CandidatesError(*wrong[0].args)
        told.finite, told.others = finite, tuple(f"{error.what}: {error.got}." for error in wrong[1:])
        raise told
    return finite


def _forward(
    model: nn.Module,
    batches: Callable[[], Iterator[Batch]],
    runs: Sequence[tuple[Callable[[], None], Scorer]],
    device: torch.device,
    before_batch: Callable[[], None],
    progress: Progress | None = None,
) -> int:
    """Each scorer gets the outputs for all batches, its setting of the model being made first; returns the images."""
    was_training, count = model.training, 0
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches():
                on_device = batch.to(device)
                for make_setting, scorer in runs:
                    before_batch()
                    make_setting()
                    scorer.update(model(on_device.inputs), on_device)
                count += len(batch)
                if progress is not None:
                    progress.advance()
    finally:
        model.train(was_training)
    return count


def _score(task: Task, scorer: Scorer, count: int, what: str) -> Score:
    """What a scorer found. Raises ConfigError for one without the task's metric, NonFiniteError."""
    values = dict(scorer.compute())
    if task.metric.key not in values:
        got = f"its scorer gives {', '.join(values) or 'nothing'}, and its metric is {task.metric.key}"
        raise ConfigError(f"task {task.name}", got, "Let compute() return the metric under its key.")
    for name, value in values.items():
        if not math.isfinite(value):
            got = f"{name} over {count} images is {value}"
            raise NonFiniteError(what, got, "Check the weights; train with a lower lr or in fp32.")
    return Score(values[task.metric.key], values, count)
