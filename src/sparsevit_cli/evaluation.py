"""ONE evaluation loop, for every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .data.loader import MAX_WAIT_SECONDS, eval_batches
from .data.source import Source
from .errors import ConfigError, NonFiniteError
from .reporting import Progress
from .tasks.task import Score, Scorer, Task


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
    was_training = model.training
    model.eval()
    scorer, count = scorer or task.scorer(source, device), 0
    try:
        with torch.inference_mode():
            batches = eval_batches(
                source, batch_size, workers, subset, max_wait_seconds=max_wait_seconds, check=before_batch
            )
            for batch in batches:
                before_batch()
                on_device = batch.to(device)
                scorer.update(model(on_device.inputs), on_device)
                count += len(batch)
                if progress is not None:
                    progress.advance()
    finally:
        model.train(was_training)
    values = dict(scorer.compute())
    if task.metric.key not in values:
        got = f"its scorer gives {', '.join(values) or 'nothing'}, and its metric is {task.metric.key}"
        raise ConfigError(f"task {task.name}", got, "Let compute() return the metric under its key.")
    for name, value in values.items():
        if not math.isfinite(value):
            got = f"{name} over {count} images is {value}"
            raise NonFiniteError("evaluation", got, "Check the weights; train with a lower lr or in fp32.")
    predictions = getattr(scorer, "predictions", None) if with_predictions else None
    return Score(values[task.metric.key], values, count, None if predictions is None else predictions())
