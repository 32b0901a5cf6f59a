"""Keep a `sparsevit profile --rivals` in benchmarks/results/<device>.json, and write the README's table from all kept.

usage: python benchmarks/collect.py FOLDER_OF_RIVALS...
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
SHOWN = re.compile(r"ours, |timm at .*|authors' flow")


def keep(folder: Path) -> Path:
    """Add the cells of a run to the file of its device; a run replaces its cell's newest only by adding to it."""
    report = json.loads((folder / "rivals.json").read_text(encoding="utf-8"))
    device = report["device"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{device['name']} {device['cores']} cores".lower()).strip("-")
    path = RESULTS / f"{name}.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    kept["runs"].append({"date": time.strftime("%Y-%m-%d"), **report})
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return path


def table(path: Path) -> str:
    """Every cell of a device: the median over its runs of best dense / ours, with the lowest and the highest run."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        for cell in run["cells"]:
            rows = {row["label"]: row for row in cell["rows"]}
            best = rows[cell["best_dense"]]
            where = (run["model"], f"{best['image_size'][0]}x{best['image_size'][1]}", best["batch"], best["dtype"])
            cells.setdefault(where, []).append({"best": best, "rows": rows})
    first = runs[0]
    versions, device = first["versions"], first["device"]
    lines = [
        f"{device['name']}, {device['cores']} cores, torch {versions['torch']}, timm {versions['timm']}, "
        f"{', '.join(sorted({run['date'] for run in runs}))}; best dense / this, median of the runs [lowest, highest]:",
        "",
        "| model, size, batch, precision | best dense | contestant | GMACs | ms | best dense / this | realised | tax "
        "| peak memory / timm's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for where, found in cells.items():
        labels = [label for label in found[-1]["rows"] if SHOWN.match(label)]
        for label in labels:
            rows = [run["rows"][label] for run in found if label in run["rows"]]
            ratios = sorted(row["speedup"] for row in rows)
            newest, timm = rows[-1], found[-1]["rows"]["timm eager"]
            memory = f"{newest['peak_memory_mb'] / timm['peak_memory_mb']:.2f}" if newest["peak_memory_mb"] else "-"
            lines.append(
                f"| {where[0]}, {where[1]}, {where[2]}, {where[3]} "
                f"| {found[-1]['best']['label']}, {found[-1]['best']['latency_ms']:.0f} ms | {label} "
                f"| {newest['gmacs']:.1f} | {newest['latency_ms']:.0f} "
                f"| {ratios[len(ratios) // 2]:.2f}x [{ratios[0]:.2f}, {ratios[-1]:.2f}], {len(rows)} runs "
                f"| {_number(newest['realised'], '.2f')} | {_number(newest['tax'], '+.1%')} | {memory} |"
            )
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_readme() -> None:
    """Replace what stands between the markers by the tables of all devices."""
    tables = "\n\n".join(table(path) for path in sorted(RESULTS.glob("*.json")))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sys.stdout.write(f"kept in {keep(Path(argument))}\n")
    write_readme()
