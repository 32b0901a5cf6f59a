"""Dense timm, ours at ratio 0 and ours sparse, in every runtime: measured in turns at one batch, size and scope."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsevit_cli.acceleration import accelerate_
from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.profiling.inputs import torch_dtype
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.macs import flopcounter_macs
from sparsevit_cli.profiling.memory import peak_memory_mb
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import get_sparsity, set_sparsity

from .in_runtimes import Runtimes, in_other_runtimes, in_torch
from .profile_report import DENSE, LABELS, OURS_DENSE, OURS_SPARSE, ProfileRow, RowKind
from .profile_target import built
from .rows import TORCH, Place, measured
from .session import Session

EXPORTED: tuple[RowKind, ...] = (DENSE, OURS_SPARSE)
"""Ours at ratio 0 is timm's graph."""


def contenders_of(session: Session, size: Size, config: SparsityConfig) -> dict[RowKind, nn.Module]:
    """The three models with the same weights, on the device and in the precision of the profile (fp32 for int8)."""
    dtype = torch_dtype(session.config.profile.precision)
    dense = built(session, size).to(session.device, dtype)
    ours_dense = session.sparsified_(copy.deepcopy(dense))
    set_sparsity(ours_dense, 0.0, exact=False)
    ours_sparse = session.sparsified_(copy.deepcopy(dense))
    set_sparsity(ours_sparse, config)
    return {DENSE: dense, OURS_DENSE: ours_dense, OURS_SPARSE: ours_sparse}


@dataclass(frozen=True)
class _Contender:
    kind: RowKind
    place: Place
    run: Callable[[], object]

    @property
    def label(self) -> str:
        return self.place.named(LABELS[self.kind])


@dataclass(frozen=True)
class Cell:
    """All contenders at one batch, size and scope; `workloads` are eager, `counted` one image, latencies by label."""

    contenders: tuple[_Contender, ...]
    workloads: Mapping[RowKind, Workload]
    counted: Mapping[RowKind, Workload]
    latencies: Mapping[str, Latency]

    def in_torch(self, kind: RowKind) -> Latency | None:
        """The latency of PyTorch; None if torch takes no part, or if it is not steady."""
        latency = self.latencies.get(LABELS[kind])
        return latency if latency is not None and latency.stable else None

    def rows(self, session: Session, per_image: float | None) -> list[ProfileRow]:
        """A row per contender; `per_image` is told of all."""
        dense = {each.place.runtime: self.latencies[each.label] for each in self.contenders if each.kind == DENSE}
        best = min(dense.values(), key=float)
        best_is_known = all(latency.stable for latency in dense.values())
        gmacs = {kind: flopcounter_macs(workload).gmacs for kind, workload in self.counted.items()}
        memory = {kind: peak_memory_mb(workload) for kind, workload in self.workloads.items()} if TORCH in dense else {}
        rows = []
        for each in self.contenders:
            latency, workload, own = self.latencies[each.label], self.workloads[each.kind], dense[each.place.runtime]
            several = len(dense) > 1  # then all were repeated together
            over_best = Latency.from_samples(latency.samples_ms, best.samples_ms) if several else latency
            gains = over_best.as_row() if latency.stable and best_is_known else {}
            config = None if each.kind == DENSE else get_sparsity(workload.model)
            is_torch = each.place.runtime == TORCH
            rows.append(
                ProfileRow(
                    kind=each.kind,
                    **measured(each.place.named(LABELS[each.kind]), each.place, workload, config, latency,
                               own if several else None),
                    mode=session.config.profile.mode if is_torch else "exported",
                    gmacs=gmacs[each.kind],
                    gain=gains.get("speedup"),
                    gain_low=gains.get("speedup_low"),
                    gain_high=gains.get("speedup_high"),
                    throughput=1000 * workload.batch / latency.median_ms,
                    peak_memory_mb=memory[each.kind] if is_torch else None,
                    parameters=sum(parameter.numel() for parameter in workload.model.parameters()),
                    rounds=latency.rounds,
                    outliers=latency.outliers,
                    per_image=per_image,
                    compares=latency.stable and own.stable,
                )
            )  # fmt: skip
        return rows


def measured_cells(
    session: Session, runtimes: Runtimes, models: Mapping[RowKind, nn.Module], size: Size, batch: int
) -> dict[Scope, Cell]:
    """A cell for each scope of the task; a scope that no runtime can run is left out, which is told."""
    scopes = session.task.scopes(models[DENSE])
    cells = {}
    for scope in scopes:
        workloads = {kind: session.workload(model, size, batch, scope=scope) for kind, model in models.items()}
        contenders = _in_torch(session, workloads) if runtimes.has_torch else []
        try:
            contenders += _exported(session, runtimes, workloads)
        except ConfigError as error:
            if scope == "backbone" or len(scopes) == 1:
                raise
            session.reporter.say(
                f"profile: {' and '.join(runtimes.others)} run the backbone alone: the whole model cannot be exported "
                f"({error.what}: {error.got})"
            )
        if contenders:
            counted = {kind: session.workload(model, size, scope=scope) for kind, model in models.items()}
            cells[scope] = Cell(tuple(contenders), workloads, counted, _measured(session, runtimes, contenders))
    return cells


def _in_torch(session: Session, workloads: Mapping[RowKind, Workload]) -> list[_Contender]:
    mode, dense = session.config.profile.mode, workloads[DENSE]
    runnable: dict[RowKind, Any] = {kind: workload.model for kind, workload in workloads.items()}
    if mode == "compile":
        torch._dynamo.reset()  # each cell is compiled anew; past a limit torch would fall back to eager in silence
        session.reporter.say(f"profile: compiling at batch {dense.batch}, {size_text(dense.image_size)}")
        runnable = {kind: torch.compile(model, dynamic=False) for kind, model in runnable.items()}
    elif mode == "graph":
        runnable = {kind: accelerate_(copy.deepcopy(model)) for kind, model in runnable.items()}
    place = in_torch(session)
    return [_Contender(kind, place, workloads[kind].of(model).run) for kind, model in runnable.items()]


def _exported(session: Session, runtimes: Runtimes, workloads: Mapping[RowKind, Workload]) -> list[_Contender]:
    """Programs of the other runtimes. Raises what `in_other_runtimes` raises."""
    if not runtimes.others:
        return []
    first = workloads[DENSE]
    session.reporter.say(
        f"profile: exporting to {' and '.join(runtimes.others)} at batch {first.batch}, {size_text(first.image_size)}"
    )
    return [
        _Contender(kind, found.place, found.run)
        for kind in EXPORTED
        for found in in_other_runtimes(session, runtimes, workloads[kind])
    ]


def _measured(session: Session, runtimes: Runtimes, contenders: list[_Contender]) -> dict[str, Latency]:
    section = session.config.profile
    return measure_interleaved(
        {each.label: each.run for each in contenders},
        device=session.device,
        seconds=section.seconds,
        rounds=section.rounds,
        seed=session.config.seed,
        max_spread=section.max_spread,
        strict=False,
        retries=session.config.clock.retries,
        patience=session.patience,
        together=bool(runtimes.others),  # rows of several runtimes are compared with each other
        pause_seconds=runtimes.pause_seconds,
        before_round=stop_check(session),
    )


def stop_check(session: Session) -> Callable[[], None]:
    """Raises where the command was told to stop."""
    return partial(session.stop.check, "profile", "nothing of this profile is saved")
