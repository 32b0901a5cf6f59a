"""Write the tables of the embedded experiments in docs/benchmarks.md, and a short part of them in the README.

They come from docs/results: `runs/<experiment>/run/metrics.json`, kept as `<experiment>_seed<n>_cpu.json`.

usage: python docs/make_results.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE / "benchmarks.md"
README = HERE.parent / "README.md"
DENSE_TASKS = {
    "digits_instances": {"mask_ap": "mask AP", "box_ap": "box AP"},
    "digits_semantic": {"miou": "mIoU"},
}
"""Experiments of dense tasks, and the scores that their tables show."""


def score(row: dict[str, Any]) -> float:
    """The metric of a row; documents from before 2026-11-29 call it by its name."""
    return float(row["score"] if "score" in row else row["top1"])


def tables(documents: dict[str, dict[str, Any]]) -> str:
    """One line per seed, then every row of the first."""
    lines = [
        "| seed | dense top-1 % | winner | winner's top-1 %, finetuned | multiply-adds gone "
        "| speed-up over timm [95 %] | dense of about equal latency |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, document in documents.items():
        if document.get("clock"):
            raise SystemExit(
                f"seed {seed}: its latencies are not steady ({document['clock']}); type `sparsevit run` again"
            )
        rows = {row["label"]: row for row in document["rows"]}
        dense, winner = rows["dense (timm)"], rows["winner, finetuned"]
        rival = next(row for label, row in rows.items() if label.startswith("dense at"))
        lines.append(
            f"| {seed} | {score(dense):.2f} | `{json.dumps(winner['ratios'])}` "
            f"| {score(winner):.2f} ({score(winner) - score(dense):+.2f}) "
            f"| {1 - winner['gmacs'] / dense['gmacs']:.0%} | {_gain(winner)} "
            f"| {rival['image_size'][0]} px: {score(rival):.2f} % in {rival['latency_ms'] / winner['latency_ms']:.2f} "
            "of the winner's time |"
        )
    seed, document = next(iter(documents.items()))
    lines += [
        "", f"All rows of seed {seed}:", "",
        "| model | top-1 % | GMACs | ms per batch [95 %] | speed-up [95 %] |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['label']} | {score(row):.2f} | {row['gmacs']:.3f} "
        f"| {row['latency_ms']:.1f} [{row['latency_ms_low']:.1f}, {row['latency_ms_high']:.1f}] | {_gain(row)} |"
        for row in document["rows"]
    ]
    return "\n".join(lines)


def sentences(documents: dict[str, dict[str, Any]]) -> str:
    """What the winners of all seeds cost and gain, at worst and at best."""
    found = [{row["label"]: row for row in document["rows"]} for document in documents.values()]
    pairs = [(rows["dense (timm)"], rows["winner, finetuned"]) for rows in found]
    gone = [1 - winner["gmacs"] / dense["gmacs"] for dense, winner in pairs]
    lost = [score(dense) - score(winner) for dense, winner in pairs]
    gains = [winner["speedup"] for _, winner in pairs]
    first = next(iter(documents.values()))
    height, width = pairs[0][0]["image_size"]
    return (
        f"The demo was run with {len(documents)} seeds ({height} x {width}, timed in fp32 at batch {first['batch']}, "
        f"{first['device']['name']}, {first['device']['cores']} cores). "
        f"Its winners need {min(gone):.0%} to {max(gone):.0%} fewer multiply-adds than dense timm.\n"
        f"They run at {min(gains):.2f}x to {max(gains):.2f}x the speed of eager timm, "
        f"and lose {min(lost):.2f} to {max(lost):.2f} points of top-1 accuracy "
        f"on {first['validation_images']} validation images."
    )


def dense_tables(documents: dict[str, dict[str, Any]], shown: dict[str, str]) -> str:
    """Every row of every seed: scores, and what backbone and whole model cost."""
    lines = []
    for seed, document in documents.items():
        heads = " | ".join(shown.values())
        lines += [
            "", f"Seed {seed}, {document['validation_images']} validation images, batch {document['batch']}, "
            f"{document['device']['name']}, {document['device']['cores']} cores:", "",
            f"| model | {heads} | backbone, GMACs | gone | backbone, speed-up | whole, GMACs | whole, speed-up |",
            "|---|" + "---|" * (len(shown) + 5),
        ]  # fmt: skip
        dense = document["rows"][0]["backbone"]["gmacs"]
        for row in document["rows"]:
            scores = " | ".join(f"{row['scores'][name]:.1f}" for name in shown)
            backbone, gone = row["backbone"], 1 - row["backbone"]["gmacs"] / dense
            lines.append(
                f"| {row['label']}{_ratios(row)} | {scores} | {backbone['gmacs']:.3f} | {gone:.0%} "
                f"| {_gain(backbone)} | {row['gmacs']:.3f} | {_gain(row)} |"
            )
    return "\n".join(lines[1:])


def dense_summary() -> str:
    """What the winners of dense tasks reach, one line per experiment and seed."""
    lines = [
        "| scenes of digits, 192 x 192 | seed | dense | dense, trained as long | winner "
        "| backbone's multiply-adds gone | backbone, speed-up | whole, speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for experiment, shown in DENSE_TASKS.items():
        for seed, document in documents(experiment).items():
            rows = {row["label"]: row for row in document["rows"]}
            dense, winner = rows["dense (timm)"], rows["winner, finetuned"]
            scores = [
                " / ".join(f"{row['scores'][name]:.1f}" for name in shown)
                for row in (dense, rows["dense, trained as long"], winner)
            ]
            gone = 1 - winner["backbone"]["gmacs"] / dense["backbone"]["gmacs"]
            lines.append(
                f"| {' / '.join(shown.values())} | {seed} | {' | '.join(scores)} | {gone:.0%} "
                f"| {_gain(winner['backbone'])} | {_gain(winner)} |"
            )
    return "\n".join(lines)


def _ratios(row: dict[str, Any]) -> str:
    found = row["label"].startswith("winner, f")
    return f" `{json.dumps(row['ratios'])}`" if found else ""


def _gain(row: dict[str, Any]) -> str:
    if row["speedup"] is None:
        return "not steady"
    return f"{row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"


def documents(experiment: str) -> dict[str, dict[str, Any]]:
    """The kept documents by seed."""
    paths = sorted((HERE / "results").glob(f"{experiment}_seed*_cpu.json"))
    return {path.stem.split("_")[-2].removeprefix("seed"): json.loads(path.read_text("utf-8")) for path in paths}


def marks(name: str) -> tuple[str, str]:
    """What stands before and after a generated part of a page."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write(page: Path, name: str, told: str) -> None:
    """Between the marks `name: begin` and `name: end` of a page."""
    begin, end = marks(name)
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n{told}\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    demo = documents("digits")
    write(PAGE, "demo", tables(demo))
    write(README, "demo", sentences(demo))
    write(README, "dense", dense_summary())
    for experiment, shown in DENSE_TASKS.items():
        write(PAGE, experiment, dense_tables(documents(experiment), shown))
