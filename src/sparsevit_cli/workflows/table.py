"""profile --latency-table: the latency table of a model on this machine, in a file that a search elsewhere reads."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from sparsevit_cli.atomic import write_atomic
from sparsevit_cli.config.paths import as_path, is_there
from sparsevit_cli.documents import read_bytes
from sparsevit_cli.errors import CheckpointError, ConfigError
from sparsevit_cli.search.latency_table import LatencyTable
from sparsevit_cli.sparsity import MAX_TENTHS, SparsityConfig

from .latencies import MeasuredLatencies
from .latency_sources import latency_source, swin_parameters
from .profile_target import built, profile_target
from .session import Session

FLAG = "--latency-table"


@dataclass(frozen=True)
class TableReport:
    """A table that was measured and written, and what it says of three configurations, in milliseconds per batch."""

    path: Path
    table: LatencyTable
    corners_ms: tuple[tuple[SparsityConfig, float], ...]

    def document(self) -> dict[str, object]:
        """The JSON document of `sparsevit profile --latency-table --json`."""
        error = self.table.error
        return {
            "schema_version": 2,
            "path": str(self.path),
            "identity": dict(self.table.identity),
            "latency_table_error": None if error is None else vars(error),
            "measured_ms": [{"ratios": config.ratios, "latency_ms": ms} for config, ms in self.corners_ms],
        }


def measure_table(
    session: Session,
    *,
    path: str,
    model: str | None = None,
    img_size: str | None = None,
    ratios: str | None = None,
    rivals: bool = False,
    runtime: str | None = None,
) -> TableReport:
    """Measure the table of the configuration's model, or timm's `model`, with the settings of its `search` section.

    No trained weights are needed. Raises ConfigError for a path that holds something else, before anything is
    measured, and UnsteadyError where the clock cannot be trusted: then nothing is written.
    """
    if rivals or ratios is not None:
        what = "--rivals" if rivals else "--ratios"
        raise ConfigError(what, f"{FLAG} measures one model at all ratios", f"Leave {what} out.")
    if runtime is not None:
        got = f"{runtime}, and {FLAG} measures in search.runtime ({session.config.search.runtime})"
        raise ConfigError("--runtime", got, f"Type instead: --set search.runtime={runtime.partition(',')[0]}")
    if session.config.search.latency_table is not None:
        got = f"it names a table to read, and {FLAG} measures one"
        raise ConfigError("search.latency_table", got, "Set it to null here.")
    file = _checked(path)
    target = profile_target(session, model=model, img_size=img_size, ratios="0")
    session = target.session
    if len(target.sizes) != 1:
        got = f"{len(target.sizes)} image sizes, and a table is of one"
        raise ConfigError("--img-size", got, "Give one size, e.g. --img-size 672.")
    (size,) = target.sizes
    net = session.sparsified_(built(session, size)).to(session.device)
    space = session.space(net, MAX_TENTHS / 10)
    corners = [space.dense, space.middle, space.sparsest]
    with ExitStack() as resources:
        latencies = MeasuredLatencies(session, latency_source(session, net, resources, size), space)
        measured = latencies.measure(corners)
        known = [(config, measured[config].latency_ms) for config in corners]
        table = latencies.table(known)
    table = replace(table, identity={**table.identity, **swin_parameters(net)})
    write_atomic(file, table.to_json())
    return TableReport(file, table, tuple(known))


def _checked(typed: str) -> Path:
    """The path of a table that may be written: a new file, or one that a table is in."""
    path = as_path(typed, FLAG)
    if not path.absolute().parent.is_dir():
        raise ConfigError(FLAG, f"there is no folder {path.parent}", "Make it first.")
    if is_there(path, FLAG):
        try:
            LatencyTable.from_json(read_bytes(path), str(path))
        except CheckpointError as error:
            raise ConfigError(FLAG, f"{path} is there and no latency table", "Give another name.") from error
    return path
