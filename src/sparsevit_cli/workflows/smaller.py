"""The dense rival at a lower resolution: which size is as fast as the winner, and where its training lies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from operator import index

from torch import nn

from sparsevit_cli.atomic import write_json
from sparsevit_cli.backbones import divisor
from sparsevit_cli.data.shrunk import multiples
from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.errors import CheckpointError
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.profiling.macs import flopcounter_macs
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import set_sparsity
from sparsevit_cli.swin.geometry import patch_size, set_image_size, window_sizes

from .session import Session

SIZE_FILE = "size.json"
MOST_SIZES = 9
"""Lower resolutions whose latency is measured, to find the one nearest to the winner's."""
Measure = Callable[[Mapping[str, Callable[[], object]]], dict[str, Latency]]


def open_rival(session: Session, winner: SparsityConfig) -> RunFolder:
    """The rival's folder; that of another winner is set aside: its size stands for another latency."""
    earlier = session.earlier("rival")
    stale = _kept_size(earlier, winner) is None and earlier.path.exists()
    return session.replaced(fresh=session.fresh or stale).folder("rival")


def _kept_size(folder: RunFolder, winner: SparsityConfig) -> Size | None:
    """The size chosen for this winner; None if none was, or if the file does not say."""
    path = folder.path / SIZE_FILE
    try:
        with understood(path):
            document = read_json(path)
            height, width = map(index, document["img_size"])
            return (height, width) if document["winner"] == str(winner) and min(height, width) > 0 else None
    except CheckpointError:
        return None


def equal_size(
    session: Session, folder: RunFolder, model: nn.Module, winner: SparsityConfig, measure: Measure
) -> Size | None:
    """The image size at which the dense `model` is as fast as at `winner` and full size, or nearest to it.

    None if the model takes no smaller images than its own. By multiply-adds if latencies are not steady. It is kept in
    the folder, for noise could pick another one than was trained. The model is left at `winner`.
    """
    set_sparsity(model, winner)
    if (kept := _kept_size(folder, winner)) is not None:
        return kept
    workloads = {"winner": _workload(session, model, session.img_size)}
    step = size_step(session, model)
    known = rival_sizes(session.img_size, step, max(window_sizes(model)[0]) * patch_size(model)[0])
    sizes = sorted(size for size in known if session.task.takes(model, size))
    if not sizes:
        session.reporter.warn(f"run: no dense rival at a lower resolution: sides must be multiples of {step} pixels")
        return None
    for size in sizes:
        dense = _sharing_weights(model)
        set_image_size(dense, size)
        set_sparsity(dense, 0.0, exact=False)  # as fast as the winner's dense parts
        workloads[size_text(size)] = _workload(session, dense, size)
    latencies = measure({name: workload.run for name, workload in workloads.items()})
    costs, cost, unit = {name: latency.median_ms for name, latency in latencies.items()}, "latency", "ms"
    if not all(latency.stable for latency in latencies.values()):
        costs = {name: flopcounter_macs(workload).gmacs for name, workload in workloads.items()}
        cost, unit = "multiply-adds, for latencies are not steady", "GMACs"
    chosen = min(sizes, key=lambda size: abs(costs[size_text(size)] - costs["winner"]))
    session.reporter.say(
        f"run: the dense rival of equal {cost}, takes {size_text(chosen)} pixels "
        f"({costs[size_text(chosen)]:.3g} {unit}, the winner {costs['winner']:.3g} {unit})"
    )
    write_json(folder.path / SIZE_FILE, {"img_size": chosen, "winner": str(winner), "of_equal": cost})
    return chosen


def size_step(session: Session, model: nn.Module) -> int:
    """Pixels that the sides of the model's images are multiples of: a patch, or more if its backbone asks for more."""
    return math.lcm(patch_size(model)[0], divisor(session.task.backbone(model)))


def rival_sizes(img_size: Size, step: int, window: int) -> set[Size]:
    """Sizes from a third of `img_size` up, in steps that fill whole windows of the first stage: no padding slows them.

    `step` is the least one, `window` a side of a window, both in pixels. For 192, 4 and 16: 64, 80 ... 176.
    """
    unit = math.lcm(step, window)
    unit = unit if min(img_size) >= 2 * unit else step
    count = min(img_size) // unit
    numbers = range(max(1, -(-count // 3)), count)
    thinned = numbers[:: max(1, -(-len(numbers) // MOST_SIZES))]
    return {multiples(img_size, number / count, unit) for number in thinned} - {img_size}


def _workload(session: Session, model: nn.Module, size: Size) -> Workload:
    section = session.config.search
    return session.workload(model, size, section.batch_size, section.precision)


def _sharing_weights(model: nn.Module) -> nn.Module:
    """A copy that may take another image size, with the same parameters in the same memory."""
    shared: dict[int, object] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared)
