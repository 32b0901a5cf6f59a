"""Whether an exported program gives what eager gives, at more than one batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsevit_cli.errors import ConfigError, MeasurementError, NonFiniteError, in_one_line, pass_on
from sparsevit_cli.profiling.memory import memory_errors
from sparsevit_cli.reporting import Reporter

from .images import structured_images
from .programs import named_tensors, onnx_runner, pt2_runner

Reference = Callable[[int], list[tuple[Tensor, dict[str, Tensor]]]]
"""Seed to pairs, one per batch size to check: images, and eager's outputs by name."""
_NOT_KEPT = "The file was not kept. Try another opset or format; if all fail, report it with your versions."


@dataclass(frozen=True)
class Difference:
    """Distance of a file's outputs from eager's at one batch size; `relative` to eager's largest absolute value.

    Each is the largest over all outputs.
    """

    batch: int
    absolute: float
    relative: float


def eager_reference(model: nn.Module, shape: tuple[int, int, int], batch_sizes: Sequence[int]) -> Reference:
    """Eager's outputs, computed once per seed. The function raises ConfigError, NonFiniteError, ResourceError."""

    @lru_cache
    def of_seed(seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        pairs = []
        for batch in batch_sizes:
            images = structured_images(shape, batch, seed)
            try:
                with torch.no_grad(), memory_errors(f"forward of {tuple(images.shape)}"):
                    outputs = dict(named_tensors(model(images)))
            except Exception as error:
                pass_on(error)
                got = f"the model does not run on {tuple(images.shape)} ({in_one_line(error)})"
                raise ConfigError("export input size", got, "Give the size that the model was built for.") from error
            bad = [name for name, output in outputs.items() if not output.isfinite().all()]
            if bad:
                got = f"{bad[0]} of the model has NaN or infinite values on a check image"
                raise NonFiniteError("export", got, "Export weights that give finite outputs.")
            pairs.append((images, outputs))
        return pairs

    return of_seed


def output_shapes_of(pairs: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, tuple[int | str, ...]]:
    """Shape of every output; `batch` where two batch sizes give two lengths."""
    (_, one), (_, other) = min(pairs, key=lambda pair: len(pair[0])), max(pairs, key=lambda pair: len(pair[0]))
    return {
        name: tuple(a if a == b else "batch" for a, b in zip(one[name].shape, other[name].shape, strict=True))
        for name in one
    }


def checked(
    path: Path, outputs: Reference, *, seed: int, tolerance: float, reporter: Reporter
) -> tuple[tuple[Difference, ...], tuple[Difference, ...]]:
    """Differences that are within the tolerance, and those of the first images where a second try was needed.

    Raises MeasurementError where both tries disagree with eager.
    """
    tries: list[tuple[Difference, ...]] = []
    try:
        run = (onnx_runner if path.suffix == ".onnx" else pt2_runner)(path)
        for attempt in (seed, seed + 1):
            tries.append(tuple(_difference(run(images), list(named.values())) for images, named in outputs(attempt)))
            worst = _worst(tries[-1])
            if worst <= tolerance:
                sizes = " and ".join(str(difference.batch) for difference in tries[-1])
                reporter.say(
                    f"export: {path.name} agrees with eager at batch {sizes} ({worst:.1e} of its largest output)"
                )
                return tries[-1], tries[-2] if attempt > seed else ()
            if not math.isfinite(worst):
                break
            if attempt == seed:
                reporter.warn(
                    f"export: {path.name} differs from eager by {worst:.1e} of its largest output on the first images; "
                    "windows of almost equal score may have swapped ranks: trying others"
                )
    except Exception as error:
        pass_on(error)
        got = f"does not run where the model does ({in_one_line(error)})"
        raise MeasurementError(path.name, got, _NOT_KEPT) from error
    found = " and ".join(f"{_worst(differences):.1e}" for differences in tries)
    got = f"differs from eager by {found} of its largest output; {tolerance:g} is allowed"
    raise MeasurementError(path.name, got, _NOT_KEPT)


def _worst(differences: Sequence[Difference]) -> float:
    """Largest relative difference; infinite where one is NaN."""
    return max(math.inf if math.isnan(d.relative) else d.relative for d in differences)


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    """Compare outputs; an output of another shape differs infinitely."""
    pairs = list(zip(actual, expected, strict=True))
    absolute = [float((a.double() - e.double()).abs().max()) if a.shape == e.shape else math.inf for a, e in pairs]
    largest = [max(float(e.abs().max()), torch.finfo(torch.float32).tiny) for e in expected]
    relative = [a / e for a, e in zip(absolute, largest, strict=True)]
    # torch's max, unlike Python's, is NaN where one value is
    return Difference(len(expected[0]), float(torch.tensor(absolute).max()), float(torch.tensor(relative).max()))
