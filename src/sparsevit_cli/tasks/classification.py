"""Image classification: losses and top-1 accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit_cli.data.loader import MAX_WAIT_SECONDS, eval_batches
from sparsevit_cli.data.source import ImageSource
from sparsevit_cli.errors import NonFiniteError
from sparsevit_cli.reporting import Progress


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in percent and mean cross-entropy over `count` images, each counted once."""

    top1: float
    loss: float
    count: int


def evaluate(
    model: nn.Module,
    source: ImageSource,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    max_wait_seconds: float = MAX_WAIT_SECONDS,
    subset: Sequence[int] | None = None,
    resize: tuple[int, int] | None = None,
    progress: Progress | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Accuracy of `model` at its current sparsity on `source`, or on the samples of `subset`.

    `resize` shrinks the images on the way in (the dense rival at a lower resolution). `before_batch` may raise, to
    stop early, also while a batch is awaited. Raises NonFiniteError for outputs that are not numbers, DataError for
    images that cannot be read.
    """
    was_training = model.training
    model.eval()
    correct, loss, count = 0, 0.0, 0
    try:
        with torch.inference_mode():
            batches = eval_batches(
                source, batch_size, workers, subset, max_wait_seconds=max_wait_seconds, check=before_batch
            )
            for batch in batches:
                before_batch()
                images, labels = batch.images.to(device), batch.labels.to(device)
                logits = model(shrink(images, resize)).float()
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
                correct += int((logits.argmax(1) == labels).sum())
                count += len(labels)
                if progress is not None:
                    progress.advance()
    finally:
        model.train(was_training)
    if not torch.isfinite(torch.tensor(loss)):
        got = f"the loss over {count} images is {loss}"
        raise NonFiniteError("evaluation", got, "Check the weights; train with a lower lr or in fp32.")
    return Accuracy(100 * correct / max(count, 1), loss / max(count, 1), count)


def shrink(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images (B, C, H, W) at `size`, bilinear with antialiasing; unchanged for None or their own size."""
    if size is None or tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def classification_loss(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy against class indices (B,) or mixed-up class probabilities (B, classes)."""
    smoothing = label_smoothing if target.ndim == 1 else 0.0  # mixup smooths its own targets
    return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL divergence from the teacher at `temperature`, scaled by its square (Hinton et al. 2015, section 2)."""
    student = F.log_softmax(logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
