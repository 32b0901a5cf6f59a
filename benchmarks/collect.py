"""Keep a `sparsevit profile --rivals` in benchmarks/results/<device>.json, and write from all kept ones the tables of
docs/benchmarks.md, the table of the README and the plot.

usage: python benchmarks/collect.py FOLDER_OF_RIVALS...
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.workflows.plots import plot_rivals

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
PAGE = HERE.parent / "docs" / "benchmarks.md"
PLOT = HERE.parent / "docs" / "benchmark.png"
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
SHOWN = re.compile(r"ours, |timm, |timm at .*|authors' flow|timm compile, frozen")
SUMMED_UP = ("ours, ratio 0", "ours, config 2", "ours, 60% everywhere")
SWIN_T = "swin_tiny_patch4_window7_224"
ON_CPU_FP32 = {"ours, config 2": 1.7, "ours, 60% everywhere": 2.9}
ON_CPU_BF16 = {"ours, config 2": 1.6, "ours, 60% everywhere": 2.5}
GOALS = {
    ("cpu", SWIN_T, "672x672", 1, "fp32"): ON_CPU_FP32,
    ("cpu", SWIN_T, "672x672", 4, "fp32"): ON_CPU_FP32,
    ("cpu", SWIN_T, "672x672", 1, "bf16"): ON_CPU_BF16,
    ("cpu", SWIN_T, "672x672", 4, "bf16"): ON_CPU_BF16,
    ("cpu", SWIN_T, "256x704", 6, "fp32"): {"ours, ratio 0": 1.2},
    ("cpu", SWIN_T, "256x704", 6, "bf16"): {"ours, ratio 0": 1.2},
    ("cuda", SWIN_T, "672x672", 1, "bf16"): {"ours, config 3": 3.0},
    ("cuda", SWIN_T, "672x672", 4, "bf16"): {"ours, config 1": 1.7, "ours, config 3": 2.1, "ours, 60% everywhere": 2.6},
    ("cuda", SWIN_T, "256x704", 6, "bf16"): {"ours, ratio 0": 1.4},
}
"""Gains that the engine is built for, over the best dense timm in torch: type of device, model, size, batch, precision
-> row -> gain.
"""
GOALS_IN_RUNTIMES = {
    ("cpu", SWIN_T, "672x672", 1, "fp32"): {"ours, config 2": 1.7, "ours, 60% everywhere": 2.7},
    ("cpu", SWIN_T, "672x672", 1, "bf16"): {"ours, config 2": 1.5, "ours, 60% everywhere": 2.5},
    ("cpu", SWIN_T, "672x672", 1, "int8+bf16"): {"ours, config 2": 1.39, "ours, 60% everywhere": 2.3},
}
"""The same over the best dense in any runtime, for ours in the best runtime."""

PLOTTED = ("cpu", SWIN_T, "672x672", 1, "fp32")
IN_README = (PLOTTED, *((*PLOTTED[:-1], precision) for precision in ("bf16", "int8+fp32", "int8+bf16")))
"""Cells whose medians the README shows side by side, if there are any: they differ in precision alone."""
NAMES = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

Cell = tuple[Any, ...]
"""Type of device, model, size, batch, precision, kernels."""


def keep(folder: Path) -> Path:
    """Add a run to the file of its device, once."""
    report = json.loads((folder / "rivals.json").read_text(encoding="utf-8"))
    device = report["device"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{device['name']} {device['cores']} cores".lower()).strip("-")
    path = RESULTS / f"{name}.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    if any(run["cells"] == report["cells"] for run in kept["runs"]):
        return path
    kept["runs"].append({"date": time.strftime("%Y-%m-%d"), **report})
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return path


def table(path: Path) -> str:
    """Every cell of a device, from the runs of its newest revision: medians over the runs, with the lowest and highest.

    A single run shows its own 95 % interval.
    """
    lines: list[str] = []
    for runs, cells in _newest(path):
        lines += [*([""] * bool(lines)), _measured_with(runs), "", *_summary(cells), *_over_precisions(cells)]
        for where, found in cells.items():
            lines += ["", _heading(where, found), "", *_cell_table(where, found)]
    return "\n".join(lines)


Found = list[dict[str, Any]]
"""The runs of a cell: `rows` by label, and `best`, the row that was the best dense."""


def _newest(path: Path) -> list[tuple[list[dict[str, Any]], dict[Cell, Found]]]:
    """The runs of each revision that has a cell no newer one has with any engine, and these cells; the newest first."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    revisions: list[tuple[list[dict[str, Any]], dict[Cell, Found]]] = []
    known: set[Cell] = set()
    while runs:
        same = [run for run in runs if _versions(run) == _versions(runs[-1])]
        runs = [run for run in runs if _versions(run) != _versions(runs[-1])]
        cells = {where: found for where, found in _cells_of(same).items() if where[:-1] not in known}
        shown = [run for run in same if any(_cell_of(run, cell) in cells for cell in run["cells"])]
        known |= {where[:-1] for where in cells}
        if cells:
            revisions.append((shown, cells))
    return revisions


def _cells_of(runs: list[dict[str, Any]]) -> dict[Cell, list[dict[str, Any]]]:
    """For each cell its runs: the rows by label, and the row that was the best dense timm."""
    cells: dict[Cell, list[dict[str, Any]]] = {}
    for run in runs:
        for cell in run["cells"]:
            rows = {row["label"]: row for row in cell["rows"]}
            cells.setdefault(_cell_of(run, cell), []).append({"best": rows[cell["best_dense"]], "rows": rows})
    return cells


def _measured_with(runs: list[dict[str, Any]]) -> str:
    """Device, versions and dates of runs, and what their gain is."""
    versions, device = runs[0]["versions"], runs[0]["device"]
    dates = ", ".join(sorted({run["date"] for run in runs}))
    others = dict.fromkeys(name for run in runs for cell in run["cells"] for name in _runtimes(cell["rows"]))
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", *others))
    rival = f"timm of the same precision in torch, {' or '.join(NAMES[name] for name in others)}" if others else "timm"
    threads = {row["threads"] for run in runs for cell in run["cells"] for row in cell["rows"] if row.get("threads")}
    told = f", {' or '.join(map(str, sorted(threads)))} threads in every runtime" if others else ""
    return (
        f"{device['name']}, {device['cores']} cores, {named}{told}, "
        f"revision {versions.get('git', 'unknown')}, {dates}. "
        f"Gain is the best dense {rival}'s time over this one's in the same rounds. It is the median of the runs, "
        "[lowest, highest], or of a single run its 95 % interval. "
        "Each * is a run in which it or the best dense was unsteady."
    )


def _runtimes(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Runtimes of rows besides torch; old results name none."""
    return [name for name in NAMES if name != "torch" and any(row.get("runtime") == name for row in rows)]


def _has_runtimes(found: Found) -> bool:
    return any(_runtimes(run["rows"].values()) for run in found)


def _cell_of(run: dict[str, Any], cell: dict[str, Any]) -> Cell:
    row, engine = cell["rows"][0], run["settings"].get("kernels", "portable").split()[0].rstrip(",")
    size = f"{row['image_size'][0]}x{row['image_size'][1]}"
    model = run["model"] if run.get("scope", "model") == "model" else f"{run['scope']} of {run['model']}"
    dtype = min(each["dtype"] for each in cell["rows"])  # int8+bf16 beside a runtime of int8+fp32
    return run["device"]["type"], model, size, row["batch"], dtype, engine


def _summary(cells: dict[Cell, list[dict[str, Any]]]) -> list[str]:
    names = " | ".join(label.removeprefix("ours, ") for label in SUMMED_UP)
    rival = "the best dense" if any(map(_has_runtimes, cells.values())) else "the best dense timm in torch alone"
    lines = [f"| gain over {rival} | runs | its ms | {names} | peak memory / timm eager's |"]
    lines.append("|" + "---|" * (4 + len(SUMMED_UP)))
    for where, found in cells.items():
        gains = (_in_best_runtime(where, found, label) for label in SUMMED_UP)
        ms = median(run["best"]["latency_ms"] for run in found)
        memory = _memory(found, SUMMED_UP[0])
        lines.append(f"| {' | '.join((_named(where), str(len(found)), f'{ms:.0f}', *gains, memory))} |")
    told = "\n".join(lines)
    if goals := told.count("(goal "):
        lines += ["", f"Goals over {rival}: {goals - told.count(': missed)')} of {goals} reached."]
    return lines


def _named(where: Cell) -> str:
    _, model, size, batch, precision, engine = where
    return f"{model}, {size}, batch {batch}, {precision}, {engine}"


def _told_gain(where: Cell, found: Found, label: str) -> str:
    """A gain, and the goal for it if there is one and no other runtime takes part."""
    runs = [run for run in found if label in run["rows"]]
    goal = None if _has_runtimes(found) else GOALS.get(where[:-1], {}).get(label)
    return _with_goal(runs, label, goal) if runs else "-"


def _with_goal(runs: Found, label: str, goal: float | None) -> str:
    if goal is None:
        return _gain(runs, label)
    reached = median(run["rows"][label]["speedup"] for run in runs) >= goal
    return f"{_gain(runs, label)} (goal {goal}{'' if reached else ': missed'})"


def _in_best_runtime(where: Cell, found: Found, label: str) -> str:
    """The gain of one of ours in the runtime where it is the fastest, and the goal for it."""
    if not _has_runtimes(found):
        return _told_gain(where, found, label)
    labels = dict.fromkeys(each for run in found for each in run["rows"] if each in _in_runtimes(label))
    if not labels:
        return "-"
    runs = {each: [run for run in found if each in run["rows"]] for each in labels}
    best = max(labels, key=lambda each: median(run["rows"][each]["speedup"] for run in runs[each]))
    runtime = runs[best][0]["rows"][best]["runtime"]
    return f"{NAMES[runtime]}: {_with_goal(runs[best], best, GOALS_IN_RUNTIMES.get(where[:-1], {}).get(label))}"


def _in_runtimes(label: str) -> list[str]:
    """Labels of a contestant in every runtime; torch goes without saying."""
    return [label, *(f"{label}, {name}" for name in NAMES if name != "torch")]


def _over_precisions(cells: dict[Cell, Found]) -> list[str]:
    """The fastest dense of any precision over the fastest of ours, for cells that differ in precision alone."""
    alike: dict[Cell, list[tuple[str, Found]]] = {}
    for where, found in cells.items():
        alike.setdefault((*where[:4], where[-1]), []).append((where[4], found))
    lines = []
    for where, precisions in alike.items():
        if len(precisions) < 2 or not any(_has_runtimes(found) for _, found in precisions):
            continue
        told = []
        for label in SUMMED_UP[1:]:
            pairs = [_fastest(runs, label) for runs in zip(*(found for _, found in precisions), strict=False)]
            known = [(dense["latency_ms"], ours["latency_ms"]) for dense, ours in pairs if ours is not None]
            if known:
                dense, ours = pairs[-1]
                gains = [theirs / our for theirs, our in known]
                told.append(
                    f"{label.removeprefix('ours, ')} {median(gains):.2f}x [{min(gains):.2f}, {max(gains):.2f}] "
                    f"({median(theirs for theirs, _ in known):.0f} ms, {_placed(dense)}, over "
                    f"{median(our for _, our in known):.0f} ms, {_placed(ours)})"
                )
        if told:
            _, model, size, batch, _ = where
            lines += [
                "",
                f"In any precision, {model}, {size}, batch {batch}, the fastest dense over the fastest of ours: "
                f"{'; '.join(told)}. These are ratios of medians: precisions are measured one after another.",
            ]
    return lines


def _placed(row: dict[str, Any]) -> str:
    return f"{NAMES[row.get('runtime', 'torch')]} {row['dtype']}"


def _fastest(runs: Sequence[dict[str, Any]], label: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The fastest dense of runs in several precisions, and the fastest of ours."""
    ours = [run["rows"][each] for run in runs for each in _in_runtimes(label) if each in run["rows"]]
    by_time = itemgetter("latency_ms")
    return min((run["best"] for run in runs), key=by_time), min(ours, key=by_time, default=None)


def _versions(run: dict[str, Any]) -> dict[str, str]:
    """Versions of a run; edited files beside the revision are told in its own document."""
    return {name: str(value).removesuffix("-dirty") for name, value in run["versions"].items()}


def _heading(where: tuple[Any, ...], found: list[dict[str, Any]]) -> str:
    won = Counter(run["best"]["label"] for run in found).most_common()
    best = ", ".join(label if len(won) == 1 else f"{label} ({count}x)" for label, count in won)
    ms = median(run["best"]["latency_ms"] for run in found)
    return f"**{_named(where)}**; {len(found)} run{'s' * (len(found) > 1)}; best dense: {best}, {ms:.0f} ms"


def _cell_table(where: Cell, found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| contestant | GMACs | ms | gain | realised | tax | roofline | peak memory / timm eager's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label in dict.fromkeys(label for run in found for label in run["rows"] if SHOWN.match(label)):
        rows = [run["rows"][label] for run in found if label in run["rows"]]
        seldom = f" ({len(rows)} of {len(found)} runs)" if len(rows) < len(found) else ""
        columns = (
            label + seldom, f"{rows[-1]['gmacs']:.1f}", f"{median(row['latency_ms'] for row in rows):.0f}",
            _told_gain(where, found, label), _interval(rows, "realised", ".2f"), _interval(rows, "tax", "+.1%"),
            _median(rows, "roofline", ".0%"), _memory(found, label),
        )  # fmt: skip
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def _gain(runs: list[dict[str, Any]], label: str) -> str:
    """Of the same contestant in all runs of a cell that have it."""
    unsteady = sum(not (run["rows"][label]["stable"] and run["best"]["stable"]) for run in runs)
    return f"{_interval([run['rows'][label] for run in runs], 'speedup', '.2f', 'x')}{'*' * unsteady}"


def _interval(rows: list[dict[str, Any]], name: str, form: str, unit: str = "") -> str:
    """The median of the runs with the lowest and highest; of a single run its 95 % interval."""
    rows = [row for row in rows if row[name] is not None]
    values = [row[name] for row in rows]
    if not values:
        return "-"
    if len(values) > 1:
        low, high = min(values), max(values)
    else:
        low, high = (rows[0].get(f"{name}_{end}", values[0]) for end in ("low", "high"))
    return f"{median(values):{form}}{unit} [{low:{form}}, {high:{form}}]"


def _memory(found: list[dict[str, Any]], label: str) -> str:
    """Peak memory, which is the same in all runs, over that of timm as installed."""
    rows = next((run["rows"] for run in found if label in run["rows"]), {})
    memory = rows[label]["peak_memory_mb"] if "timm eager" in rows else None
    return f"{memory / rows['timm eager']['peak_memory_mb']:.2f}" if memory else "-"


def _median(rows: list[dict[str, Any]], name: str, form: str) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return format(median(values), form) if values else "-"


def front_table(path: Path) -> str:
    """The README's table: dense timm, its best rival and ours, in the cells of `IN_README`; empty without the first."""
    revisions = _newest(path)
    found, places = {}, {}
    for _, cells_of in reversed(revisions):  # the newest decides
        found |= {where[:-1]: cell for where, cell in cells_of.items()}
        places |= {where[:-1]: where for where in cells_of}
    if IN_README[0] not in found:
        return ""
    shown = [where for where in IN_README if where in found]
    cells = [found[where] for where in shown]
    _, model, size, batch, _ = IN_README[0]
    columns = " | ".join(f"{where[-1]}, ms | {where[-1]}, gain" for where in shown)
    lines = [f"| {model}, {size}, batch {batch} | GMACs | {columns} |", "|---" * (2 + 2 * len(cells)) + "|"]
    runs = [[run["rows"] for run in cell] for cell in cells]
    best = [[{"best": run["best"]} for run in cell] for cell in cells]
    others = _runtimes(row for cell in runs for rows in cell for row in rows.values())
    elsewhere = "".join(f", {NAMES[name]}" for name in others)
    smaller = _usual_smaller(runs)
    named = {
        "timm eager": "dense: timm as installed",
        **{f"timm, {name}": f"dense: timm in {NAMES[name]}" for name in others},
        "best": f"dense, best rival: timm, the fastest of eager, fused and compiled{elsewhere}",
        smaller: f"dense, smaller images: {smaller}",
        "ours, ratio 0": "dense, our kernels",
    }
    for label in SUMMED_UP[1:]:
        what = label.removeprefix("ours, ")
        named |= {label: f"sparse, our kernels: {what}"}
        named |= {f"{label}, {name}": f"sparse, {NAMES[name]}: {what}" for name in others}
    for label, name in named.items():
        rows = best if label == "best" else [[run for run in cell if label in run] for cell in runs]
        if any(rows):
            told = (_front_cells(of_cell, cell, label) for of_cell, cell in zip(rows, cells, strict=True))
            gmacs = next(of_cell for of_cell in rows if of_cell)[-1][label]["gmacs"]
            lines.append(f"| {name} | {gmacs:.1f} | {' | '.join(told)} |")
    for same, cells_of in revisions:
        taken = {where: cell for where, cell in cells_of.items() if where in [places[each] for each in shown]}
        if taken:
            with_them = [run for run in same if any(_cell_of(run, cell) in taken for cell in run["cells"])]
            lines += ["", _measured_with(with_them), *_over_precisions(taken)]
    return "\n".join(lines)


def _front_cells(rows: list[dict[str, Any]], cell: list[dict[str, Any]], label: str) -> str:
    """Milliseconds and gain of a row: medians over the runs that have it."""
    if not rows:
        return "- | -"
    ms = median(run[label]["latency_ms"] for run in rows)
    if label == "best":
        return f"{ms:.0f} | 1.00x"
    seldom = f", {len(rows)} of {len(cell)} runs" if len(rows) < len(cell) else ""
    return f"{ms:.0f} | {_gain([run for run in cell if label in run['rows']], label)}{seldom}"


def _usual_smaller(runs: list[list[dict[str, Any]]]) -> str:
    """Label of the smaller dense timm that most runs have; the fastest of several. Runs choose its size themselves."""
    gains: dict[str, list[float]] = {}
    for rows in (rows for cell in runs for rows in cell):
        for label in filter(re.compile(r"timm at ").match, rows):
            gains.setdefault(label, []).append(rows[label]["speedup"])
    return max(gains, key=lambda label: (len(gains[label]), median(gains[label])), default="")


def write_pages() -> None:
    """Replace what stands between the markers of docs/benchmarks.md and of the README."""
    paths = sorted(RESULTS.glob("*.json"))
    _replace(PAGE, "\n\n".join(map(table, paths)))
    _replace(README, "\n\n".join(filter(None, map(front_table, paths))))


def _replace(page: Path, tables: str) -> None:
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def draw_plot() -> None:
    """The last run of the cell that the plot shows."""
    runs = [run for path in sorted(RESULTS.glob("*.json")) for same, _ in reversed(_newest(path)) for run in same]
    cells = [cell["rows"] for run in runs for cell in run["cells"] if _cell_of(run, cell)[:-1] == PLOTTED]
    if cells:
        plot_rivals(PLOT, cells[-1:], SilentReporter())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sys.stdout.write(f"kept in {keep(Path(argument))}\n")
    write_pages()
    draw_plot()
