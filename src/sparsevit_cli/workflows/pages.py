"""A profile as rows of text, as CSV, and as one HTML page without scripts; text from outside is escaped."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sparsevit_cli.profiling.stages import StageTimes
from sparsevit_cli.sizes import size_text

from .profile_report import ProfileReport, ProfileRow

COLUMNS = ("model", "size", "batch", "GMACs (1 MAC = 2 FLOPs)", "ms per batch [95 %]", "speed-up [95 %]", "images/s",
           "peak MB")  # fmt: skip
STAGE_COLUMNS = ("part", "blocks", "scoring, ranking", "gather, scatter", "merging", "other", "ms")

NOT_STEADY = "not steady"

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 2em}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}tr.losing td{color:#b3261e}"""


def row_values(row: ProfileRow) -> tuple[Any, ...]:
    """Texts under COLUMNS; an unsteady number is none."""
    return (
        row.label, size_text(row.image_size), row.batch, f"{row.gmacs:.2f}",
        f"{row.latency_ms:.2f} [{row.latency_ms_low:.2f}, {row.latency_ms_high:.2f}]" if row.stable else NOT_STEADY,
        f"{row.speedup:.2f}x [{row.speedup_low:.2f}, {row.speedup_high:.2f}]" if row.compares else "-",
        f"{row.throughput:.1f}" if row.stable else "-", f"{row.peak_memory_mb:.0f}",
    )  # fmt: skip


def stage_rows(times: StageTimes) -> list[tuple[str, ...]]:
    """Texts under STAGE_COLUMNS, in milliseconds."""
    return [
        (part.name, *(f"{ms:.2f}" for ms in (part.blocks_ms, part.scoring_ms, part.moves_ms, part.merging_ms,
                                             part.other_ms, part.total_ms)))
        for part in times.rows
    ]  # fmt: skip


def layers_csv(stages: Mapping[str, StageTimes]) -> str:
    """One row per model and part, milliseconds."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("model", *STAGE_COLUMNS))
    for label, times in stages.items():
        writer.writerows((label, *row) for row in stage_rows(times))
    return text.getvalue()


def profile_page(report: ProfileReport) -> str:
    """profile.html: device, versions and settings, the latency table with losing rows marked, and the stages."""
    title = f"{report.model} at {report.config}"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
    ]
    about: Mapping[str, Any] = {**report.environment, "settings": report.settings}
    for name, found in about.items():
        values = ", ".join(f"{key} {value}" for key, value in found.items())
        parts.append(f"<p>{html.escape(f'{name}: {values}')}</p>")
    losing = [number for number, row in enumerate(report.rows) if row.losing]
    parts.append(_table("Latency", COLUMNS, [row_values(row) for row in report.rows], losing))
    for label, times in report.stages.items():
        parts.append(_table(f"Where the time goes: {label}, in ms", STAGE_COLUMNS, stage_rows(times)))
    return "\n".join(parts) + "\n"


def _table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[object]], losing: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{html.escape(column)}" for column in columns)
    body = "\n".join(
        f"<tr{' class=losing' if number in losing else ''}>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row)
        for number, row in enumerate(rows)
    )
    return f"<h2>{html.escape(heading)}</h2><table><tr>{head}\n{body}</table>"
