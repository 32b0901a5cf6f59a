"""A profile as rows of text, as CSV, and as one HTML page without scripts; text from outside is escaped."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any

from sparsevit_cli.profiling.stages import StageTimes
from sparsevit_cli.sizes import size_text

from .profile_report import LABELS, PartCost, PartCosts, ProfileReport, ProfileRow
from .rows import TORCH, threads_text

THROUGHPUT = "images/s"
COLUMNS = ("model", "scope", "runtime", "precision", "size", "batch", "GMACs (1 MAC = 2 FLOPs)", "ms per batch [95 %]",
           "speed-up [95 %]", "best dense / this [95 %]", THROUGHPUT, "peak MB")  # fmt: skip
OF_SCOPES, OF_RUNTIMES = frozenset({"scope"}), frozenset({"runtime", "precision", "best dense / this [95 %]"})
"""Columns that are there if rows differ in scope, or are not of torch alone."""
PART_COLUMNS = ("part", "dense ms", "sparse ms", "dense GMACs", "sparse GMACs")
_GMACS = ("dense_gmacs", "sparse_gmacs")
STAGE_COLUMNS = ("part", "blocks", "scoring, ranking", "gather, scatter", "merging", "other", "ms")

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 2em}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}
td{white-space:nowrap}td:first-child,th:first-child{text-align:left}tr.losing td{color:#b3261e}"""


def columns(report: ProfileReport) -> tuple[str, ...]:
    """Heads of the columns of latencies; scope and runtime are among them if there is something to tell."""
    return tuple(f"{report.per}s/s" if head == THROUGHPUT else head for head in _columns(report))


def _columns(report: ProfileReport) -> tuple[str, ...]:
    absent = frozenset() if len(report.scopes) > 1 else OF_SCOPES
    absent |= OF_RUNTIMES if report.runtimes == (TORCH,) else set()
    return tuple(head for head in COLUMNS if head not in absent)


def rows_of(report: ProfileReport) -> list[tuple[Any, ...]]:
    """Texts under `columns`; an unsteady number is none."""
    heads = _columns(report)
    return [tuple(_texts(row)[head] for head in heads) for row in report.rows]


def _texts(row: ProfileRow) -> dict[str, Any]:
    """The text under every one of `COLUMNS`."""
    texts = (
        LABELS[row.kind], row.scope, f"{row.runtime} {row.version}, {threads_text(row.threads)}", row.dtype,
        size_text(row.image_size), row.batch, f"{row.gmacs:.2f}", row.latency_text, row.speedup_text, row.gain_text,
        f"{row.throughput:.1f}" if row.stable else "-",
        "-" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}",
    )  # fmt: skip
    return dict(zip(COLUMNS, texts, strict=True))


def part_rows(parts: PartCosts) -> list[tuple[str, ...]]:
    """Texts under PART_COLUMNS, with the share of each in the whole; what follows the model comes on top (+5%)."""
    names = ("dense_ms", "sparse_ms", *_GMACS)
    columns = [[getattr(row, name) for row in parts.told_rows] for name in names]
    texts = [
        _with_shares(values, len(parts.rows), digits) for values, digits in zip(columns, (2, 2, 3, 3), strict=True)
    ]
    return [(row.name, *values) for row, *values in zip(parts.told_rows, *texts, strict=True)]


def _with_shares(values: Sequence[float | None], count: int, digits: int) -> list[str]:
    """Each value with its share in the sum of the first `count`."""
    total = sum(value or 0.0 for value in values[:count]) or 1.0
    signs = ["" if number < count else "+" for number in range(len(values))]
    return [
        "-" if value is None else f"{value:.{digits}f} ({sign}{value / total:.0%})"
        for sign, value in zip(signs, values, strict=True)
    ]


def parts_title(parts: PartCosts) -> str:
    """Head of the table of parts."""
    return f"Where the time goes: parts of the model, batch {parts.batch}, {size_text(parts.image_size)}"


def stage_rows(times: StageTimes) -> list[tuple[str, ...]]:
    """Texts under STAGE_COLUMNS, in milliseconds."""
    return [
        (part.name, *(f"{ms:.2f}" for ms in (part.blocks_ms, part.scoring_ms, part.moves_ms, part.merging_ms,
                                             part.other_ms, part.total_ms)))
        for part in times.rows
    ]  # fmt: skip


def layers_csv(stages: Mapping[str, StageTimes]) -> str:
    """One row per model and stage, milliseconds."""
    return _csv(
        ("model", *STAGE_COLUMNS), [(label, *row) for label, times in stages.items() for row in stage_rows(times)]
    )


def parts_csv(parts: PartCosts | None) -> str:
    """One row per part: milliseconds per batch, and multiply-adds per image in 10^9, dense and sparse."""
    rows = [] if parts is None else [astuple(row) for row in parts.told_rows]
    return _csv([field.name for field in fields(PartCost)], rows)


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(head)
    writer.writerows(rows)
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
    parts.append(_table("Latency", columns(report), rows_of(report), losing))
    parts += [f"<p>{html.escape(line)}.</p>" for line in (*report.told, *report.image_lines())]
    if report.parts is not None:
        parts.append(_table(parts_title(report.parts), PART_COLUMNS, part_rows(report.parts)))
        parts.append(f"<p>{html.escape(report.parts.told())}.</p>")
    for label, times in report.stages.items():
        of = "" if report.parts is None else "backbone, "
        parts.append(_table(f"Where the time goes: {of}{label}, in ms", STAGE_COLUMNS, stage_rows(times)))
    return "\n".join(parts) + "\n"


def _table(heading: str, columns: Sequence[str], rows: Sequence[Sequence[object]], losing: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{html.escape(column)}" for column in columns)
    body = "\n".join(
        f"<tr{' class=losing' if number in losing else ''}>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row)
        for number, row in enumerate(rows)
    )
    return f"<h2>{html.escape(heading)}</h2><table><tr>{head}\n{body}</table>"
