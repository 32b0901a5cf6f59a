"""What the rows of all reports of latencies share."""

from __future__ import annotations

from dataclasses import dataclass

from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.sizes import Size


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One model in one cell. Latency is milliseconds per batch: median and 95 % interval; `gmacs` are per image.

    `kind` and the row that `speedup` is against are told by each report. Both costs are those of `scope`.
    """

    label: str
    kind: str
    scope: Scope = "model"
    ratios: tuple[tuple[float, ...], ...] | None
    batch: int
    image_size: Size
    dtype: str
    gmacs: float
    latency_ms: float
    latency_ms_low: float
    latency_ms_high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    stable: bool
    unsteady: str = ""
    """Why the latency is not to be relied on; nothing where it is."""
    compares: bool = True
    """True where this row and those that it is compared with are steady: then the speed-up is a fact."""

    @property
    def latency_text(self) -> str:
        """`13.26 [13.20, 13.31]`, or that it is not steady."""
        if not self.stable:
            return NOT_STEADY
        return f"{self.latency_ms:.2f} [{self.latency_ms_low:.2f}, {self.latency_ms_high:.2f}]"

    @property
    def speedup_text(self) -> str:
        """`1.98x [1.98, 2.00]`, or that it is not known."""
        return f"{self.speedup:.2f}x [{self.speedup_low:.2f}, {self.speedup_high:.2f}]" if self.compares else "-"


NOT_STEADY = "not steady"
