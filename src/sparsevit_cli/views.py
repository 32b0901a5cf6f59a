"""Results as tables and lines on stdout. Each function takes the frozen result of one workflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .commands import COMMANDS
from .console import print_lines, print_table
from .runs import RunFolder, next_command
from .sizes import size_text
from .workflows.rows import NOT_STEADY, threads_text

if TYPE_CHECKING:
    from .models import SupportedModel
    from .tasks.task import Metric
    from .workflows.check_data import DataCheck
    from .workflows.evaluate import EvaluateSummary
    from .workflows.export import ExportSummary
    from .workflows.pipeline import PipelineRow, PipelineSummary, ScopeCost
    from .workflows.profile_report import PartCosts, ProfileReport
    from .workflows.rivals import RivalReport
    from .workflows.search import SearchSummary
    from .workflows.sensitivity import SensitivitySummary
    from .workflows.table import TableReport
    from .workflows.training import TrainingSummary

VALUES_OF_A_CLASSIFIER = 2
"""Its metric and its loss: one line tells the metric, and results.csv the loss."""
MOST_CATEGORIES = 40
"""Rows of a table of categories."""


def _following(folder: RunFolder) -> str:
    """What to type after the command of this folder."""
    following = COMMANDS[folder.command].next_command
    assert following is not None, folder.command
    return next_command(following, folder.argv)


def _told(middle: float | None, low: float | None, high: float | None, form: str, absent: str = "-") -> str:
    """A number with its interval, or what stands for none."""
    return absent if middle is None else f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _gmacs(model: float, backbone: float | None) -> tuple[str, ...]:
    """The cells of multiply-adds: the backbone's first, if there are modules around it."""
    return (f"{model:.3f}",) if backbone is None else (f"{backbone:.3f}", f"{model:.3f}")


def show_models(models: Sequence[SupportedModel]) -> None:
    """The support table."""
    rows = [(model.name, model.generation, model.img_size, model.pretrained) for model in models]
    print_table("timm models that can be made sparse", ("name", "generation", "made for pixels", "weights"), rows)


def show_data_check(found: DataCheck) -> None:
    """What was counted, split by split and category by category, and all that is wrong."""
    print_lines(*(f"{name}: {value}" for name, value in found.rows))
    rows = [
        (split.name, split.samples, split.tried, split.unreadable, size_text(split.image_size))
        for split in found.splits
    ]  # fmt: skip
    print_table("Samples", ("split", "samples", "tried", "unreadable", "pixels"), rows)
    in_train = found.splits[0].categories
    names = list(in_train)
    if len(names) > MOST_CATEGORIES:
        print_lines(
            f"Of {len(names)} categories the {MOST_CATEGORIES} rarest in train are shown; all are in metrics.json."
        )
        names = sorted(names, key=in_train.__getitem__)[:MOST_CATEGORIES]
    if names:
        counts = [(name, *(split.categories.get(name, "-") for split in found.splits)) for name in names]
        columns = ("category", *(split.name for split in found.splits))
        print_table(f"{found.counted.capitalize()} of each", columns, counts)
    for finding in found.findings:
        more = ", ..." if finding.count > len(finding.examples) else ""
        shown = f" ({', '.join(finding.examples)}{more})" if finding.examples else ""
        print_lines(f"{finding.split}, {finding.what}: {finding.count}{shown}")
    if not found.findings:
        tried_all = all(split.tried == split.samples for split in found.splits)
        print_lines("Nothing wrong was found" + ("." if tried_all else " in the samples that were tried."))
    if found.pictures:
        print_lines(f"pictures: {found.folder.path / 'samples.png'}")
    print_lines(f"written: {found.folder.result}", *([f"Next: {_following(found.folder)}"] if found.usable else []))


def show_training(summary: TrainingSummary) -> None:
    """Score, the closing table of adapt, and what to type next."""
    if summary.rows:
        both = all(row.backbone_gmacs is not None for row in summary.rows)
        rows = [
            (row.label, summary.metric.text(row.score), *_gmacs(row.gmacs, row.backbone_gmacs if both else None))
            for row in summary.rows
        ]
        columns = ("sparsity", summary.metric.column, *(("backbone GMACs", "model GMACs") if both else ("GMACs",)))
        print_table("Adapted weights at fixed sparsity", columns, rows)
    print_lines(
        f"{summary.command}: {summary.metric.told(summary.score)} after {summary.seconds:.0f} s, "
        f"in {summary.folder.path}",
        f"Next: {_following(summary.folder)}",
    )


def show_search(summary: SearchSummary) -> None:
    """Finalists, winner, errors of the table, and what to type next."""
    metric = summary.metric
    absent = "not here" if summary.not_measured_here else NOT_STEADY
    rows = [
        (
            str(f.config), metric.text(f.score), f"{f.gmacs:.3f}",
            "-" if f.predicted_ms is None else f"{f.predicted_ms:.2f}",
            _told(f.latency_ms, f.latency_ms_low, f.latency_ms_high, ".2f", absent),
            "-" if f.speedup is None else f"{f.speedup:.2f}x",
            "winner" if f is summary.winner else ("yes" if f.within_budget else "no"),
        )
        for f in summary.finalists
    ]  # fmt: skip
    columns = ("ratios", f"search {metric.column}", "GMACs", "predicted ms", "measured ms", "speed-up", "within budget")
    of = f", {summary.of}" if summary.of else ""
    where = f" in {summary.measured_in}" if summary.measured_in else ""
    print_table(f"Finalists, {'predicted' if summary.not_measured_here else 'measured'}{where}{of}", columns, rows)
    lines = [
        f"search: {summary.asked} candidates, {summary.evaluated} evaluated now, "
        f"{summary.asked - summary.evaluated} from the ledger, {summary.infeasible} infeasible"
    ]
    lines.append(f"images: {summary.images:,} behind these scores, {summary.forwarded:,} of them forwarded now")
    if summary.table_error is not None:
        error = summary.table_error
        lines.append(f"latency table: mean error {error.mean:.1%}, largest {error.largest:.1%} on {error.n} held out")
    if summary.proxy_correlation is not None:
        lines.append(
            f"{len(summary.finalists)} finalists, first images against the whole search split: "
            f"rank correlation {summary.proxy_correlation:.2f}"
        )
    lines += [summary.note] if summary.note else []
    lines += [
        f"winner for {other.budget}: {other.finalist.config}, {metric.told(other.finalist.score)}, "
        f"{other.evaluated} evaluated for it, in {other.path}"
        for other in summary.others
    ]
    if summary.not_measured_here:
        lines.append(f"Latencies are predictions by the table of {summary.not_measured_here}: none was measured now.")
    lines.append(f"winner: {summary.winner.config}, in {summary.folder.path / 'winner.yaml'}")
    print_lines(*lines, f"Next: {_following(summary.folder)}")


def show_sensitivity(summary: SensitivitySummary) -> None:
    """The score of every block pair at every ratio."""
    metric = summary.metric
    rows = [(slot, *map(metric.text, scores)) for slot, scores in zip(summary.slots, summary.scores, strict=True)]
    columns = ("pruned, and what follows in its stage", *(f"{ratio:g}" for ratio in summary.ratios))
    print_table(f"Search {metric.column} by sparsity ratio", columns, rows)
    print_lines(
        f"sensitivity: {summary.evaluated} configurations evaluated now",
        f"in {summary.folder.path / 'sensitivity.csv'}",
    )


def show_table(report: TableReport) -> None:
    """What a latency table was measured with, how well it predicts, and how a search takes it."""
    identity, error = report.table.identity, report.table.error
    rows = [(str(config), f"{ms:.2f}") for config, ms in report.corners_ms]
    print_table(f"Measured, batch {identity['batch']}", ("ratios", "ms per batch"), rows)
    lines = [f"runtime: {identity.get('runtime', 'torch')}"]
    if error is not None:
        lines.append(f"latency table: mean error {error.mean:.1%}, largest {error.largest:.1%} on {error.n} held out")
    lines += [report.table.plateaus_told] if report.table.plateaus_told else []
    print_lines(*lines, f"written: {report.path}", f"Elsewhere: --set search.latency_table={report.path.name}")


def show_evaluation(summary: EvaluateSummary) -> None:
    """One line; before it a table of all values of the score, if there are more than the two of a classifier."""
    score = summary.score
    if len(score.values) > VALUES_OF_A_CLASSIFIER:
        digits = summary.metric.digits
        rows = [(name, f"{value:.{digits}f}") for name, value in score.values.items()]
        print_table(f"Score on {score.count} validation images", ("value", ""), rows)
    backbone = "" if summary.backbone_gmacs is None else f" ({summary.backbone_gmacs:.3f} in the backbone)"
    run = summary.runtime
    told = f"weights of {summary.weights}"
    if run is not None:
        told = f"{run.file} ({run.precision}, {run.runtime} {run.version}, {threads_text(run.threads)})"
    print_lines(
        f"evaluate: {told} at {summary.config}: {summary.metric.told(score.value)} "
        f"on {score.count} validation images, {summary.gmacs:.3f} GMACs{backbone}",
        *([f"SHA-256 of {name}: {digest}" for name, digest in run.files.items()] if run is not None else []),
    )


def show_profile(report: ProfileReport) -> None:
    """All cells, the losing ones marked, and where the time goes."""
    from .workflows.pages import STAGE_COLUMNS, columns, rows_of, stage_rows

    losing = [number for number, row in enumerate(report.rows) if row.losing]
    print_table(f"{report.model} at {report.config}", columns(report), rows_of(report), losing=losing)
    print_lines(*(f"{line}." for line in report.image_lines()))
    _show_parts(report.parts)
    for label, times in report.stages.items():
        of = "" if report.parts is None else "backbone, "
        print_table(f"Where the time goes: {of}{label}, first steady size", STAGE_COLUMNS, stage_rows(times))
    for number in losing:
        row = report.rows[number]
        of = f", {row.scope} alone" if row.scope == "backbone" else ""
        where = "" if row.runtime == "torch" else f" in {row.runtime}"
        by = f"{row.speedup:.2f}x of dense" if row.speedup < 1 else f"{row.gain:.2f}x of the best dense"
        print_lines(f"sparse{where} LOSES at batch {row.batch}, {size_text(row.image_size)}{of}: {by}")
    print_lines(*(f"{line}." for line in report.told))
    print_lines(f"written: {report.folder.path / 'profile.json'}")


def _show_parts(parts: PartCosts | None) -> None:
    """What each part costs, and which costs most; nothing if there are no modules around the backbone."""
    from .workflows.pages import PART_COLUMNS, part_rows, parts_title

    if parts is not None:
        print_table(parts_title(parts), PART_COLUMNS, part_rows(parts))
        print_lines(f"{parts.told()}.")


def show_rivals(report: RivalReport) -> None:
    """One table per cell; slower than the best dense is marked and said."""
    columns = ("contestant", "kind", "GMACs", "ms per batch [95 %]", "best dense / this [95 %]", "realised", "tax",
               "roofline", "peak MB")  # fmt: skip
    for cell in report.cells:
        rows = [
            (
                row.label, row.kind, f"{row.gmacs:.2f}",
                f"{row.latency_ms:.1f} [{row.latency_ms_low:.1f}, {row.latency_ms_high:.1f}]"
                if row.stable else NOT_STEADY,
                row.speedup_text,
                _told(row.realised, row.realised_low, row.realised_high, ".2f"),
                _told(row.tax, row.tax_low, row.tax_high, "+.1%"),
                "-" if row.roofline is None or not row.stable else f"{row.roofline:.0%}",
                "-" if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}",
            )
            for row in cell.rows
        ]  # fmt: skip
        losing = [
            number for number, row in enumerate(cell.rows) if row.kind == "ours" and row.compares and row.speedup < 1
        ]
        first = cell.rows[0]
        of = "backbone of " if first.scope == "backbone" else ""
        dtypes = "/".join(dict.fromkeys(row.dtype for row in cell.rows))
        title = f"{of}{report.model}, batch {first.batch}, {size_text(first.image_size)}, {dtypes}"
        print_table(title, columns, rows, losing=losing)
        known = any(row.compares for row in cell.rows)
        print_lines(f"best dense: {cell.best_dense if known else 'not known, for dense rows are not steady'}")
        versions = dict.fromkeys(f"{row.runtime} {row.version}" for row in cell.rows)
        print_lines(f"runtimes: {', '.join(versions)}; {threads_text(first.threads)} each")
        print_lines(*(f"{cell.rows[number].label} LOSES: {cell.rows[number].speedup:.2f}x" for number in losing))
    print_lines(f"written: {report.folder.path / 'rivals.json'}")


def show_export(summary: ExportSummary) -> None:
    """Files, their checks, latencies, and what eight bits did."""
    from .exporting import WEIGHTS
    from .runtimes import precision_label

    parts = {"model": "the whole model", "features": "backbone and neck"}
    report = summary.report
    rows = [
        (
            file.path.name,
            f"{file.size_bytes / 1e6:.2f}",
            f"{max(d.relative for d in file.differences):.1e}"
            + ("" if file.lowered is None else f", in {report.precision} {file.lowered.middle:.1e}"),
            "ok",
        )
        for file in report.files
    ]
    weights = dict.fromkeys((report.weights, report.weights.with_name(WEIGHTS)))
    rows += [(path.name, f"{path.stat().st_size / 1e6:.2f}", "-", "ok") for path in weights]
    rows += [(path.name, "0.00", "-", "ok") for path in (report.sparsity_file, report.serving)]
    title = f"Export of {parts[report.scope]}: weights of {summary.weights} at {summary.config}"
    print_table(title, ("file", "MB", "difference", "check"), rows)
    for latency in report.latencies:
        dense, sparse = latency.dense, latency.sparse
        shaky = dense.unsteady or sparse.unsteady
        print_lines(
            f"{latency.runtime} {precision_label(report.precision, latency.activations)}, batch 1: "
            + (
                f"not steady ({shaky})"
                if shaky
                else f"dense {dense.median_ms:.2f} ms, sparse {sparse.median_ms:.2f} ms, speed-up {sparse.speedup:.2f}x"
            )
        )
    if summary.budget is not None and summary.budget.kept:
        print_lines(f"{_capital(summary.budget.told)}.")
    for name, eight_bits in summary.eight_bits.items():
        print_lines(*eight_bits.lines(name))
    print_lines(
        "Window pruning skips computation: weights and file sizes do not shrink.",
        f"written: {report.manifest}",
    )


def show_pipeline(summary: PipelineSummary) -> None:
    """The one table; one of the backbone if there are modules around it, and one of `search.runtime` if not torch."""
    from .workflows.pipeline import TRAINED_AS_LONG

    device = summary.environment["device"]
    metric = summary.metric
    name = device.get("name", "this machine") if isinstance(device, dict) else "this machine"
    dense, ours, winner = summary.rows[0], summary.rows[1], summary.rows[-1]
    rows = [(row.label, metric.text(row.score), f"{row.gmacs:.3f}", *_speed(row)) for row in summary.rows]
    title = f"Dense against sparse: {name}, batch {summary.batch}, {summary.count} validation images"
    print_table(title, ("model", metric.column, "GMACs", *SPEED), rows, losing=_losing(summary.rows))
    if dense.backbone is not None:
        _show_costs("Its backbone alone", [(row.label, row.backbone) for row in summary.rows])
    _show_parts(summary.parts)
    if summary.runtime is not None:
        title = f"Exported, in {summary.runtime}, batch {summary.batch}"
        _show_costs(title, [(row.label, row.exported) for row in summary.rows])
        print_lines(f"Not measured there: {', '.join(row.label for row in summary.rows if row.exported is None)}.")
    longer = [row for row in summary.rows if row.label == TRAINED_AS_LONG]
    print_lines(
        *(f"{line}." for line in summary.image_lines()),
        f"winner {[list(stage) for stage in winner.ratios or ()]}: {_gone(winner, dense)}, "
        f"{_faster(winner, ours)}{_points(winner.score - dense.score, metric)} of {metric.label}",
        *(f"against dense trained as long: {_points(winner.score - row.score, metric)}" for row in longer),
        *([] if summary.budget is None else [f"{_capital(summary.budget.told)}."]),
        *([] if not summary.without_clock else ["The search left its latency budget out: the clock was not steady."]),
        *([] if summary.clock is None else [f"not steady: {summary.clock}. Type the command again for latencies."]),
        "written:",
        *(f"  {path}" for path in summary.written),
    )


SPEED = ("ms per batch [95 %]", "speed-up [95 %]")


def _show_costs(title: str, costs: Sequence[tuple[str, ScopeCost | None]]) -> None:
    """What a part of each model costs; a model without that has no row. The first one is dense timm."""
    known = [(label, cost) for label, cost in costs if cost is not None]
    dense = known[0][1]
    rows = [(label, f"{cost.gmacs:.3f}", f"{1 - cost.gmacs / dense.gmacs:.0%}", *_speed(cost)) for label, cost in known]
    print_table(title, ("model", "GMACs", "gone", *SPEED), rows, losing=_losing([cost for _, cost in known]))


def _speed(cost: ScopeCost) -> tuple[str, str]:
    """The cells under SPEED."""
    return (
        _told(cost.latency_ms, cost.latency_ms_low, cost.latency_ms_high, ".2f", NOT_STEADY),
        "-" if cost.speedup is None else f"{cost.speedup:.2f}x [{cost.speedup_low:.2f}, {cost.speedup_high:.2f}]",
    )


def _losing(costs: Sequence[ScopeCost]) -> list[int]:
    """Numbers of those slower than the first one, dense timm."""
    return [number for number, cost in enumerate(costs) if number and (cost.speedup or 1) < 1]


def _points(difference: float, metric: Metric) -> str:
    """`-0.57 points`"""
    unit = "points" if metric.unit == "%" else metric.unit
    return f"{difference:+.{metric.digits}f} {unit}".rstrip()


def _gone(winner: PipelineRow, dense: PipelineRow) -> str:
    """How many multiply-adds were saved, of what."""
    of_model = f"{1 - winner.gmacs / dense.gmacs:.0%} of the"
    if winner.backbone is None or dense.backbone is None:
        return f"{of_model} multiply-adds gone"
    saved = 1 - winner.backbone.gmacs / dense.backbone.gmacs
    return f"{saved:.0%} of the backbone's multiply-adds gone, {of_model} model's"


def _faster(winner: PipelineRow, ours: PipelineRow) -> str:
    """Against timm and our own dense; the backbone's gain, if there are modules around it."""
    speed = "" if winner.speedup is None else f"{winner.speedup:.2f}x as fast as timm, "
    if winner.speedup is not None and ours.speedup is not None:
        speed += f"{winner.speedup / ours.speedup:.2f}x as our own dense, "
    if winner.backbone is not None and winner.backbone.speedup is not None:
        speed += f"its backbone {winner.backbone.speedup:.2f}x as timm's, "
    return speed
