"""Pictures of results; matplotlib is optional and imported here alone."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sparsevit_cli.atomic import write_atomic
from sparsevit_cli.reporting import Reporter, optional_output
from sparsevit_cli.search.results import Evaluation
from sparsevit_cli.sizes import size_text
from sparsevit_cli.tasks.task import Metric


def plot_pareto(
    path: Path,
    candidates: Sequence[Evaluation],
    finalists: Sequence[Evaluation],
    front: Sequence[Evaluation],
    winners: Mapping[str, Evaluation],
    units: tuple[Metric, str],
    images: tuple[int, int],
    reporter: Reporter,
) -> None:
    """Metric against cost (`units`), a PNG: candidates on the first `images`, the others on all of them.

    `winners` are by their budgets.
    """
    _draw(path, reporter, partial(_pareto, candidates, finalists, front, winners, units, images))


def _pareto(
    candidates: Sequence[Evaluation],
    finalists: Sequence[Evaluation],
    front: Sequence[Evaluation],
    winners: Mapping[str, Evaluation],
    units: tuple[Metric, str],
    images: tuple[int, int],
    figure: Any,
) -> None:
    (metric, cost_unit), (first, total) = units, images
    axes = figure.add_subplot()

    def draw(points: Iterable[Evaluation], style: str, color: str, size: float, label: str, **others: Any) -> None:
        shown = list(points)
        places = [e.cost for e in shown], [e.metric for e in shown]
        axes.plot(*places, style, color=color, ms=size, label=label, **others)

    draw(candidates, "o", "#9aa5b1", 3.5, f"candidates, on {first} images")
    draw(finalists, "o", "#0b6e4f", 6, f"finalists, on {total} images", fillstyle="none")
    draw(front, "-", "#0b6e4f", 0, "front of the finalists", drawstyle="steps-post")
    told = ", ".join(str(winner.config) for winner in winners.values())
    draw(winners.values(), "*", "#c1121f", 14, f"winner {told}" if len(winners) == 1 else "winners, by budget", ls="")
    budgets: dict[tuple[float, float], list[str]] = {}
    for budget, winner in winners.items() if len(winners) > 1 else ():
        budgets.setdefault((winner.cost, winner.metric), []).append(budget)
    for place, of_one in budgets.items():
        axes.annotate("\n".join(of_one), place, xytext=(0, 10), fontsize=7, textcoords="offset points", ha="center")
    axes.margins(y=0.12)
    axes.set_xlabel(cost_unit)
    axes.set_ylabel(f"{metric.label} on the search split, {metric.unit}".removesuffix(", "))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)


def plot_sensitivity(
    path: Path, ratios: Sequence[float], scores: Mapping[str, Sequence[float]], metric: Metric, reporter: Reporter
) -> None:
    """Metric against ratio, a line per block pair; a PNG."""
    _draw(path, reporter, partial(_sensitivity, ratios, scores, metric))


def _sensitivity(ratios: Sequence[float], scores: Mapping[str, Sequence[float]], metric: Metric, figure: Any) -> None:
    axes = figure.add_subplot()
    for name, values in scores.items():
        axes.plot(ratios, values, "o-", ms=4, label=name)
    axes.set_xlabel("sparsity ratio of one block pair and those after it in its stage, all others dense")
    axes.set_ylabel(f"{metric.label} on the search samples, {metric.unit}".removesuffix(", "))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def plot_training(path: Path, rows: Sequence[Mapping[str, float]], metric: Metric, reporter: Reporter) -> None:
    """Metric and losses of every validation over the epochs; a PNG."""
    _draw(path, reporter, partial(_training, rows, metric))


def _training(rows: Sequence[Mapping[str, float]], metric: Metric, figure: Any) -> None:
    epochs = [row["epoch"] for row in rows]
    scores, losses = figure.subplots(2, sharex=True)
    scores.plot(epochs, [row[metric.key] for row in rows], "o-", color="#0b6e4f", ms=4)
    for row in rows:
        size = size_text((int(row["height"]), int(row["width"])))
        place = (row["epoch"], row[metric.key])
        scores.annotate(size, place, xytext=(0, 7), fontsize=7, textcoords="offset points", ha="center")
    scores.margins(y=0.2)
    scores.set_ylabel(f"validation {metric.column}")
    losses.plot(epochs, [row["train_loss"] for row in rows], "o-", color="#9aa5b1", ms=4, label="training")
    if "val_loss" in rows[0]:  # a score need not hold a loss
        losses.plot(epochs, [row["val_loss"] for row in rows], "o-", color="#c1121f", ms=4, label="validation")
    losses.set_ylabel("loss")
    losses.set_xlabel("epoch")
    losses.legend(fontsize=8)
    for axes in (scores, losses):
        axes.grid(alpha=0.3)


def plot_rivals(path: Path, cells: Sequence[Sequence[Mapping[str, Any]]], reporter: Reporter) -> None:
    """Latency against multiply-adds, ours and the rivals, with the line of an ideal sparse model; a PNG, side by side
    for all cells.
    """
    _draw(path, reporter, partial(_rivals, cells), plots=len(cells), width=9.5)


def _rivals(cells: Sequence[Sequence[Mapping[str, Any]]], figure: Any) -> None:
    for number, rows in enumerate(cells):
        _plot_cell(figure.add_subplot(1, len(cells), number + 1), rows)


RIVAL_STYLES = {
    ("B1", "torch"): ("s", "#9aa5b1", "timm as installed"),
    ("B2", "torch"): ("s", "#52606d", "timm, fused or compiled"),
    ("B2f", "torch"): ("s", "#102a43", "timm, compiled and frozen"),
    ("B2", "onnxruntime"): ("s", "#5b8def", "timm, ONNX Runtime"),
    ("B2", "openvino"): ("s", "#7b3fa0", "timm, OpenVINO"),
    ("B3", "torch"): ("D", "#b7791f", "timm, smaller images"),
    ("B3", "onnxruntime"): ("D", "#5b8def", "timm, smaller images, ONNX Runtime"),
    ("B3", "openvino"): ("D", "#7b3fa0", "timm, smaller images, OpenVINO"),
    ("B0", "torch"): ("v", "#c1121f", "the authors' data flow"),
    ("O", "torch"): ("x", "#627d98", "oracle"),
    ("ours", "torch"): ("o", "#0b6e4f", "ours"),
    ("ours", "onnxruntime"): ("o", "#5b8def", "ours, ONNX Runtime"),
    ("ours", "openvino"): ("o", "#7b3fa0", "ours, OpenVINO"),
}
"""Marker, colour and name by kind and runtime; old results have rows without a runtime, which are torch's."""


def _plot_cell(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    dense = [row for row in rows if row["kind"] in ("B1", "B2")]
    if all(row["stable"] for row in dense):
        best = min(dense, key=lambda row: row["latency_ms"])
        axes.plot([0, best["gmacs"]], [0, best["latency_ms"]], "--", color="#9aa5b1", label="best dense, scaled")
    for (kind, runtime), (marker, color, name) in RIVAL_STYLES.items():
        for stable in (True, False):
            points = [
                row for row in rows
                if (row["kind"], row.get("runtime", "torch"), row["stable"]) == (kind, runtime, stable)
            ]  # fmt: skip
            if points:
                axes.plot(
                    [row["gmacs"] for row in points], [row["latency_ms"] for row in points], marker, color=color, ms=6,
                    ls="none", fillstyle="full" if stable else "none", label=name if stable else f"{name}, not steady",
                )  # fmt: skip
    height, width = rows[0]["image_size"]
    axes.set_xlabel("multiply-adds per image, G")
    axes.set_ylabel(f"ms per batch of {rows[0]['batch']}, {height}x{width}, {rows[0]['dtype']}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside the plot: it would hide points


def _draw(path: Path, reporter: Reporter, drawn: Callable[[Any], None], plots: int = 1, width: float = 7.0) -> None:
    """Write the figure that `drawn` fills, as wide as so many plots of `width` inches; whatever fails is one warning.

    matplotlib's objects are used without pyplot: no window, and no backend but the one for files.
    """
    with optional_output(reporter, path.name):
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError("matplotlib is not installed (pip install 'sparsevit-cli[plot]')")
        with _own_backend():
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        figure = Figure(figsize=(width * plots, 4.5), layout="constrained")
        drawn(figure)
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
        write_atomic(path, picture.getvalue())


@contextmanager
def _own_backend() -> Iterator[None]:
    """Hide MPLBACKEND: importing matplotlib fails on one that is not installed, as a notebook's is elsewhere."""
    foreign = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if foreign is not None:
            os.environ["MPLBACKEND"] = foreign
