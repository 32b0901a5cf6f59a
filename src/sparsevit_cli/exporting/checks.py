"""Whether an exported program gives what eager gives, at more than one batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsevit_cli.errors import CheckpointError, ConfigError, MeasurementError, NonFiniteError, in_one_line, pass_on
from sparsevit_cli.profiling.memory import memory_errors
from sparsevit_cli.reporting import Reporter
from sparsevit_cli.runtimes import Activations, Run, runtime_for

from .images import structured_images
from .openvino_ir import changed_windows
from .programs import ANSWERS, named_tensors

Pairs = list[tuple[Tensor, dict[str, Tensor]]]
Reference = Callable[[int], Pairs]
"""Seed to pairs, one per batch of images to check: images, and eager's outputs by name."""
Draw = Callable[[int], Sequence[Tensor]]
"""Seed to batches of images."""
CANDIDATES = 4
"""Images from which two are taken to check a model of one image."""
LOWERED_TOLERANCE = 0.03
"""Largest accepted difference of the image in the middle, in bfloat16: root mean square over that of eager's values.

bfloat16 rounds by up to 2**-9 = 0.002 each time. Measured medians are 0.002 to 0.006 (Swin-T at 224 pixels and tiny V1
and V2, random weights; a trained tiny one). An image in which two windows swap ranks differs by up to 0.2, one that is
scored in bfloat16 by 0.13 in the median of Swin-T: the median forgives single images, and the bound no wrong ranking.
"""
ROUNDED_TOLERANCE = 0.5
"""The same in eight bits. It finds a file that computes something else; what rounding costs is told by the score."""
_NOT_KEPT = "The file was not kept. Try another opset or format; if all fail, report it with your versions."


@dataclass(frozen=True)
class Difference:
    """Distance of a file's outputs from eager's at one batch size; each number is the largest over all outputs.

    `relative` is `absolute` over eager's largest absolute value, `rms` the root mean square of the difference over that
    of eager's values.
    """

    batch: int
    absolute: float
    relative: float
    rms: float


@dataclass(frozen=True)
class Lowered:
    """How a file that a runtime computes in less than 32 bits differs from eager in float32.

    Of `kept` windows on the check images, all rankings and images counted, `changed` are not those that the file in
    float32 keeps.
    """

    activations: Activations
    differences: tuple[Difference, ...]
    """Of each check image."""
    middle: float
    """The median of their `rms`, the upper one of two."""
    kept: int
    changed: int


@contextmanager
def runs_on(shape: Sequence[int]) -> Iterator[None]:
    """Errors of a forward of images of `shape`, as ConfigError or ResourceError."""
    try:
        with memory_errors(f"forward of {tuple(shape)}"):
            yield
    except Exception as error:
        pass_on(error)
        got = f"the model does not run on {tuple(shape)} ({in_one_line(error)})"
        raise ConfigError("export input size", got, "Give the size that the model was built for.") from error


def batches(shape: tuple[int, int, int], batch_sizes: Sequence[int]) -> Draw:
    """One batch of drawn images of each size."""
    return lambda seed: [structured_images(shape, batch, seed) for batch in batch_sizes]


def single_images(shape: tuple[int, int, int], given: Tensor | None) -> Draw:
    """CANDIDATES images (1, C, H, W): drawn, or of `given` (N, C, H, W); another seed takes the other half of those."""
    if given is None:
        return lambda seed: [structured_images(shape, 1, CANDIDATES * seed + number) for number in range(CANDIDATES)]
    halves = [given[::2], given[1::2]] if len(given) >= 4 else [given, given]
    return lambda seed: list(halves[seed % 2][:CANDIDATES].split(1))


def with_most_different_answers(outputs: Reference) -> Reference:
    """Of the pairs of single images, that with most answers and that with fewest.

    The function raises ConfigError where the model answers nothing: such a check would prove nothing.
    """

    def of_seed(seed: int) -> Pairs:
        pairs = sorted(outputs(seed), key=lambda pair: sum(tensor.numel() for tensor in pair[1].values()))
        if not any(tensor.numel() for tensor in pairs[-1][1].values()):
            got = f"the model finds nothing on any of {len(pairs)} images, so that no file of it could be checked"
            raise ConfigError("export", got, "Give images with objects (check_images), or a trained model.")
        return [pairs[-1], pairs[0]] if len(pairs) > 1 else pairs

    return of_seed


def eager_reference(model: nn.Module, draw: Draw, prefix: str = "output") -> Reference:
    """Eager's outputs, computed once per seed, under names that begin with `prefix`.

    The function raises ConfigError, NonFiniteError, ResourceError.
    """

    @lru_cache
    def of_seed(seed: int) -> Pairs:
        pairs = []
        for images in draw(seed):
            with torch.no_grad(), runs_on(images.shape):
                outputs = dict(named_tensors(model(images), prefix))
            bad = [name for name, output in outputs.items() if not output.isfinite().all()]
            if bad:
                got = f"{bad[0]} of the model has NaN or infinite values on a check image"
                raise NonFiniteError("export", got, "Export weights that give finite outputs.")
            pairs.append((images, outputs))
        return pairs

    return of_seed


def output_shapes_of(pairs: Pairs, one_image: bool = False) -> dict[str, tuple[int | str, ...]]:
    """Shape of every output; `batch` where two batch sizes give two lengths.

    Of `one_image` the first dimension is the number of answers.
    """
    if one_image:
        return {name: (ANSWERS, *tensor.shape[1:]) for name, tensor in pairs[0][1].items()}
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
        run = runner(path)
        for attempt in (seed, seed + 1):
            tries.append(
                tuple(_difference(run(images), list(named.values()), len(images)) for images, named in outputs(attempt))
            )
            worst = _worst(tries[-1])
            if worst <= tolerance:
                sizes = " and ".join(dict.fromkeys(str(difference.batch) for difference in tries[-1]))
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
    except CheckpointError as error:
        raise MeasurementError(path.name, error.got, _NOT_KEPT) from error
    except Exception as error:
        pass_on(error)
        got = f"does not run where the model does ({in_one_line(error)})"
        raise MeasurementError(path.name, got, _NOT_KEPT) from error
    found = " and ".join(f"{_worst(differences):.1e}" for differences in tries)
    got = f"differs from eager by {found} of its largest output; {tolerance:g} is allowed"
    raise MeasurementError(path.name, got, _NOT_KEPT)


def runner(path: Path, activations: Activations = "fp32") -> Run:
    """The file in the runtime of its kind, with torch's number of threads."""
    return runtime_for(path).load(path, activations=activations).run


def checked_lowered(
    path: Path,
    outputs: Reference,
    *,
    seed: int,
    activations: Activations,
    reporter: Reporter,
    exact: Path | None = None,
) -> Lowered:
    """How a file does as it is served, on the images of two seeds: one of eight bits, made of the file `exact`.

    Without `exact` it is one of OpenVINO that is right in float32, in `activations`. Raises MeasurementError where the
    image in the middle differs by more than LOWERED_TOLERANCE, of eight bits ROUNDED_TOLERANCE.
    """
    run = runner(path, activations)
    label, tolerance = (activations, LOWERED_TOLERANCE) if exact is None else ("int8", ROUNDED_TOLERANCE)
    pairs = [*outputs(seed), *outputs(seed + 1)]
    differences: list[Difference] = []
    for images, named in pairs:
        found = run(images)
        for number in range(len(images)):
            ours, eager = ([tensor[number : number + 1] for tensor in each] for each in (found, named.values()))
            differences.append(_difference(ours, eager, 1))
    middle = sorted(math.inf if math.isnan(d.rms) else d.rms for d in differences)[len(differences) // 2]
    told = f"{path.name} in {label}: an image in the middle differs from eager by {middle:.1e} (root mean square)"
    if middle > tolerance:
        got = f"{told}; {tolerance:g} is allowed"
        raise MeasurementError(path.name, got, "The file was not kept. Set export.precision: fp32.")
    kept, changed = changed_windows(exact or path, [images for images, _ in pairs], activations, path)
    reporter.say(f"export: {told}; {changed} of {kept} kept windows are others")
    return Lowered(activations, tuple(differences), middle, kept, changed)


def _worst(differences: Sequence[Difference]) -> float:
    """Largest relative difference; infinite where one is NaN."""
    return max(math.inf if math.isnan(d.relative) else d.relative for d in differences)


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor], batch: int) -> Difference:
    """Compare outputs for `batch` images; an output of another shape differs infinitely, none at all by nothing."""
    pairs = list(zip(actual, expected, strict=True))
    absolute = [_largest(a.double() - e.double()) if a.shape == e.shape else math.inf for a, e in pairs]
    largest = [max(_largest(e), torch.finfo(torch.float32).tiny) for e in expected]
    relative = [a / e for a, e in zip(absolute, largest, strict=True)]
    rms = [_rms(a.double() - e) / max(_rms(e), 1e-30) if a.shape == e.shape else math.inf for a, e in pairs]
    # torch's max, unlike Python's, is NaN where one value is
    return Difference(batch, *(float(torch.tensor(each).max()) for each in (absolute, relative, rms)))


def _largest(tensor: Tensor) -> float:
    """Largest absolute value; 0 of an empty tensor."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _rms(tensor: Tensor) -> float:
    """Root mean square; 0 of an empty tensor."""
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
