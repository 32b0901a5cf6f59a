"""Pictures of results; matplotlib is optional and imported here alone."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from sparsevit_cli.reporting import Reporter
from sparsevit_cli.search.results import Evaluation
from sparsevit_cli.sparsity import SparsityConfig


def plot_pareto(
    path: Path,
    history: Sequence[Evaluation],
    front: Sequence[Evaluation],
    winner: SparsityConfig,
    cost_unit: str,
    reporter: Reporter,
) -> None:
    """Accuracy against cost of every evaluated candidate, the front as a line, the winner marked; a PNG."""
    if importlib.util.find_spec("matplotlib") is None:
        reporter.warn(f"{path.name} is left out: matplotlib is not installed (pip install 'sparsevit-cli[plot]')")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter([e.cost for e in history], [e.metric for e in history], s=14, color="#9aa5b1", label="evaluated")
    axes.plot(
        [e.cost for e in front], [e.metric for e in front], "o-", color="#0b6e4f", drawstyle="steps-post", ms=4,
        label="Pareto front",
    )  # fmt: skip
    best = [e for e in history if e.config == winner]
    axes.plot([e.cost for e in best], [e.metric for e in best], "*", color="#c1121f", ms=15, label=f"winner {winner}")
    axes.set_xlabel(cost_unit)
    axes.set_ylabel("top-1 on the search samples, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    temporary = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_png(str(temporary))
    os.replace(temporary, path)
