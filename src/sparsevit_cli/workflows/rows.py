"""What the rows of all reports of latencies share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.sizes import Size
from sparsevit_cli.sparsity import SparsityConfig

TORCH = "torch"


@dataclass(frozen=True)
class Place:
    """Where a row was measured: the runtime and its version, the precision as tables call it, CPU threads."""

    runtime: str
    version: str
    precision: str
    threads: int | None

    def named(self, label: str) -> str:
        """The label of a row: torch goes without saying."""
        return label if self.runtime == TORCH else f"{label}, {self.runtime}"


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One model in one cell. Latency is milliseconds per batch: median and 95 % interval; `gmacs` are per image.

    It was measured in a version of `runtime` on `threads` CPU threads. `dtype` is the precision's label, such as `fp32`
    or `int8+bf16`. `kind` and the row that `speedup` is against are told by each report. Both costs are of `scope`.
    """

    label: str
    kind: str
    scope: Scope = "model"
    ratios: tuple[tuple[float, ...], ...] | None
    batch: int
    image_size: Size
    dtype: str
    runtime: str = "torch"
    version: str = ""
    threads: int | None = None
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
    def place(self) -> Place:
        """Where it was measured."""
        return Place(self.runtime, self.version, self.dtype, self.threads)

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


def measured(
    label: str, place: Place, workload: Workload, config: SparsityConfig | None, latency: Latency, over: Latency | None
) -> dict[str, Any]:
    """The fields that rows of all reports have, but `kind`, `gmacs` and `compares`.

    The speed-up is over the samples of `over` from the same rounds, or the latency's own. `config` is None for timm.
    """
    compared = latency if over is None else Latency.from_samples(latency.samples_ms, over.samples_ms)
    return {
        "label": label,
        "scope": workload.scope,
        "ratios": None if config is None else config.ratios,
        "batch": workload.batch,
        "image_size": workload.image_size,
        "dtype": place.precision,
        "runtime": place.runtime,
        "version": place.version,
        "threads": place.threads,
        **compared.as_row(),
        "stable": latency.stable,
        "unsteady": latency.unsteady,
    }


def threads_text(count: int | None) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} thread{'' if count == 1 else 's'}"


NOT_STEADY = "not steady"
