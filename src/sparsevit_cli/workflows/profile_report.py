"""What a profile found: its rows, and why some of them are not to be relied on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.profiling.neighbours import unsteady
from sparsevit_cli.profiling.parts import REST
from sparsevit_cli.profiling.stages import StageTimes
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import SparsityConfig

from .rows import MeasuredRow
from .scopes import image_told

RowKind = Literal["dense", "ours dense", "ours sparse"]
DENSE: RowKind = "dense"
OURS_DENSE: RowKind = "ours dense"
OURS_SPARSE: RowKind = "ours sparse"
LABELS: Mapping[str, str] = {DENSE: "dense (timm)", OURS_DENSE: "ours at ratio 0", OURS_SPARSE: "ours sparse"}
"""How rows are called on the terminal and in files."""


@dataclass(frozen=True, kw_only=True)
class ProfileRow(MeasuredRow):
    """One measured cell; `kind` is a RowKind, and the speed-up is against dense at the same scope, in the same runtime.

    In other runtimes than torch `mode` is `exported`, ours at ratio 0 is dense, and memory is not known. Peak memory is
    that of plain PyTorch in every mode.
    """

    mode: str
    gain: float | None = None
    """The time of the fastest dense in any runtime over this one's, with its 95 % interval; None if one is unsteady."""
    gain_low: float | None = None
    gain_high: float | None = None
    throughput: float
    """Images per second, or windows where costs are per window."""
    peak_memory_mb: float | None
    parameters: int
    rounds: int
    outliers: int
    per_image: float | None = 1.0
    """How many of what costs are per an image takes (`Task.per_image`); None where it is not known without data."""

    @property
    def losing(self) -> bool:
        """True where ours, sparse, is slower than dense: in the same runtime, or in the one that has the fastest."""
        return self.kind == OURS_SPARSE and ((self.compares and self.speedup < 1) or (self.gain or 1) < 1)

    @property
    def gain_text(self) -> str:
        """`1.39x [1.37, 1.40]`, or that it is not known."""
        return "-" if self.gain is None else f"{self.gain:.2f}x [{self.gain_low:.2f}, {self.gain_high:.2f}]"


@dataclass(frozen=True)
class PartCost:
    """What one part of a model around a Swin takes, dense and sparse: milliseconds per batch, multiply-adds per image.

    Times are None where latencies were not steady.
    """

    name: str
    dense_ms: float | None
    sparse_ms: float | None
    dense_gmacs: float
    sparse_gmacs: float


@dataclass(frozen=True)
class PartCosts:
    """The parts of a model and the rest of it, in the order of its forward pass, at one batch and image size.

    `after` is what follows the model (`Task.finish`), which is in no other row; None if nothing does.
    """

    batch: int
    image_size: Size
    rows: tuple[PartCost, ...]
    after: PartCost | None = None

    @property
    def told_rows(self) -> tuple[PartCost, ...]:
        """All rows, what follows the model last."""
        return self.rows if self.after is None else (*self.rows, self.after)

    def told(self) -> str:
        """Which part of the sparse model, or what follows it, costs most, in one sentence."""
        by_time = all(row.sparse_ms is not None for row in self.told_rows)
        costs = {row.name: (row.sparse_ms or 0.0) if by_time else row.sparse_gmacs for row in self.told_rows}
        name = max(costs, key=lambda each: costs[each])
        name_after = "" if self.after is None else self.after.name
        share = costs[name] / (sum(costs.values()) or 1)
        what = {REST: "What runs in no part", name_after: "What follows the model"}.get(name, f"The {name}")
        return f"{what} now costs most: {share:.0%} of the {'time' if by_time else 'multiply-adds'}"

    def document(self) -> dict[str, Any]:
        """The parts in JSON documents."""
        return {**asdict(self), "told": self.told()}

    @classmethod
    def of_profile(cls, profile: Mapping[str, Any]) -> PartCosts | None:
        """Those in the document of a profile; None without. Raises KeyError or TypeError where damaged."""
        if (found := profile.get("parts")) is None:
            return None
        after = found["after"]
        rows = tuple(PartCost(**row) for row in found["rows"])
        return cls(found["batch"], tuple(found["image_size"]), rows, None if after is None else PartCost(**after))


@dataclass(frozen=True)
class ProfileReport:
    """All cells, and where the time of the first one goes.

    `stages` are those of the backbone. `parts` are there if the model has modules around its backbone; then there are
    rows of both scopes.
    """

    folder: RunFolder
    model: str
    config: SparsityConfig
    rows: tuple[ProfileRow, ...]
    stages: Mapping[str, StageTimes]
    macs_check: Mapping[str, float]
    environment: Mapping[str, object]
    settings: Mapping[str, object]
    about: Mapping[str, str]
    parts: PartCosts | None = None

    @property
    def told(self) -> tuple[str, ...]:
        """One sentence per cell of several runtimes: which dense and which sparse model is the fastest there."""
        if len(self.runtimes) < 2:
            return ()
        cells: dict[tuple[Scope, Size, int], list[ProfileRow]] = {}
        for row in self.rows:
            cells.setdefault((row.scope, row.image_size, row.batch), []).append(row)
        sentences = []
        for (scope, size, batch), rows in cells.items():
            of = f", {scope}" if len(self.scopes) > 1 else ""
            dense, sparse = ([row for row in rows if row.kind == kind] for kind in (DENSE, OURS_SPARSE))
            best, ours = (min(each, key=lambda row: row.latency_ms) for each in (dense, sparse))
            steady = all(row.stable for row in (*dense, *sparse))
            found = (
                f"the fastest dense is {best.runtime}'s with {best.latency_ms:.2f} ms, the fastest of ours "
                f"{ours.runtime}'s with {ours.latency_ms:.2f} ms: {ours.gain_text}"
                if steady else "which runtime is the fastest is not known, for rows are not steady"
            )  # fmt: skip
            sentences.append(f"Batch {batch}, {size_text(size)}{of}: {found}")
        return tuple(sentences)

    def refuse_unsteady(self) -> None:
        """As the function of that name."""
        refuse_unsteady({f"{row.label}, batch {row.batch}": row.unsteady for row in self.rows})

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes of the rows."""
        return tuple(dict.fromkeys(row.runtime for row in self.rows))

    @property
    def per(self) -> str:
        """What costs are per."""
        return self.about.get("per", "image")

    def image_lines(self) -> list[str]:
        """What whole images cost, a line per size of windows, times at the last batch; none without windows."""
        lines = []
        names = {DENSE: "dense", OURS_SPARSE: "sparse"}
        for size in dict.fromkeys(row.image_size for row in self.rows):
            rows = [row for row in self.rows if row.image_size == size and row.scope == self.scopes[-1]]
            costs = {
                row.place.named(names[row.kind]): (row.gmacs, row.latency_ms / row.batch if row.stable else None)
                for row in rows
                if row.kind in names
            }
            lines += image_told(self.per, rows[0].per_image, size, costs)
        return lines

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scopes of the rows."""
        return tuple(dict.fromkeys(row.scope for row in self.rows))

    def document(self) -> dict[str, object]:
        """The JSON document of `sparsevit profile --json`."""
        return {
            "schema_version": 2,
            **self.about,
            **self.environment,
            "model": self.model,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "stages": {label: asdict(times) for label, times in self.stages.items()},
            **({} if self.parts is None else {"parts": self.parts.document()}),
            "gmacs_by_counter": self.macs_check,
        }


def refuse_unsteady(rows: Mapping[str, str]) -> None:
    """Raise UnsteadyError where a row (label: why it is unsteady) did not settle: it is written, and marked."""
    shaky = {label: why for label, why in rows.items() if why}
    if shaky:
        label, why = next(iter(shaky.items()))
        raise unsteady("profile", f"{len(shaky)} of {len(rows)} rows are not steady ({label}: {why})")
