"""What a profile found: its rows, and why some of them are not to be relied on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from sparsevit_cli.profiling.neighbours import unsteady
from sparsevit_cli.profiling.stages import StageTimes
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sizes import Size
from sparsevit_cli.sparsity import SparsityConfig

Kind = Literal["dense", "ours dense", "ours sparse"]
DENSE: Kind = "dense"
OURS_DENSE: Kind = "ours dense"
OURS_SPARSE: Kind = "ours sparse"
LABELS: Mapping[Kind, str] = {DENSE: "dense (timm)", OURS_DENSE: "ours at ratio 0", OURS_SPARSE: "ours sparse"}
"""How rows are called on the terminal and in files."""


@dataclass(frozen=True)
class ProfileRow:
    """One measured cell. Latency is milliseconds per batch: median and 95 % interval; speed-up is against dense.

    Peak memory is that of plain PyTorch in every mode.
    """

    kind: Kind
    label: str
    ratios: tuple[tuple[float, ...], ...] | None
    batch: int
    image_size: Size
    dtype: str
    mode: str
    gmacs: float
    latency_ms: float
    latency_ms_low: float
    latency_ms_high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    throughput: float
    """Images per second."""
    peak_memory_mb: float
    parameters: int
    rounds: int
    outliers: int
    stable: bool
    unsteady: str
    """Why the latency is not to be relied on; nothing where it is."""
    compares: bool
    """True where this row and the dense one are steady: then the speed-up is a fact."""

    @property
    def losing(self) -> bool:
        """True where ours, sparse, is slower than dense."""
        return self.kind == OURS_SPARSE and self.compares and self.speedup < 1


@dataclass(frozen=True)
class ProfileReport:
    """All cells, and where the time of the first one goes."""

    folder: RunFolder
    model: str
    config: SparsityConfig
    rows: tuple[ProfileRow, ...]
    stages: Mapping[str, StageTimes]
    macs_check: Mapping[str, float]
    environment: Mapping[str, object]
    settings: Mapping[str, object]
    about: Mapping[str, str]

    def refuse_unsteady(self) -> None:
        """As the function of that name."""
        refuse_unsteady({f"{row.label}, batch {row.batch}": row.unsteady for row in self.rows})

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
            "gmacs_by_counter": self.macs_check,
        }


def refuse_unsteady(rows: Mapping[str, str]) -> None:
    """Raise UnsteadyError where a row (label: why it is unsteady) did not settle: it is written, and marked."""
    shaky = {label: why for label, why in rows.items() if why}
    if shaky:
        label, why = next(iter(shaky.items()))
        raise unsteady("profile", f"{len(shaky)} of {len(rows)} rows are not steady ({label}: {why})")
