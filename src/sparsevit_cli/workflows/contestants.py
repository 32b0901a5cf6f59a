"""Who takes part in one cell of `profile --rivals`: dense models as users run them, ours, and an oracle of each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit_cli.acceleration import accelerate_
from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.profiling.inputs import torch_dtype
from sparsevit_cli.profiling.latency import measure_interleaved
from sparsevit_cli.profiling.macs import flopcounter_macs
from sparsevit_cli.profiling.rivals import Memory, dense_variants, foreseen, frozen_variant, oracle
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import Ratios, SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.swin.authors_flow import authors_flow
from sparsevit_cli.swin.fused import has_fused_attention, with_fused_attention

from .in_runtimes import Runtimes, in_other_runtimes, in_torch
from .profile_target import built
from .rows import Place
from .session import Session

PUBLISHED: Mapping[str, Ratios] = {
    "config 1": [[0.3], [0], [0.1, 0.2, 0.2], [0]],
    "config 2": [[0.6], [0], [0.2, 0.4, 0.5], [0]],
    "config 3": [[0.7], [0], [0.2, 0.4, 0.5], [0]],
}
"""The authors' configurations of a Swin-T (paper, table 2); other depths are measured at uniform ratios alone."""
PUBLISHED_DEPTHS = (2, 2, 6, 2)
UNIFORM: Mapping[str, Ratios] = {"60% everywhere": 0.6}
EXPORTED = ("config 2", "60% everywhere")
"""Configurations that other runtimes are measured at, besides those that were typed."""
OURS_DENSE = "ours, ratio 0"
TIMM = "timm"
SMALLER_SHARES = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
"""Sides tried for the dense model at a lower resolution, as shares of the full ones."""


@dataclass(frozen=True)
class Bench:
    """What is measured in every cell: the backbone of the task's model, which is all of it where `scope` is model."""

    session: Session
    scope: Scope
    runtimes: Runtimes

    def built(self, size: Size) -> nn.Module:
        """Dense, on the session's device, in the precision of the profile (fp32 for int8)."""
        backbone = self.session.task.backbone(built(self.session, size))
        return backbone.to(self.session.device, torch_dtype(self.session.config.profile.precision))

    def workload(self, model: nn.Module, size: Size, batch: int = 1) -> Workload:
        """`model` as it is."""
        of_scope = self.session.backbone_workload if self.scope == "backbone" else self.session.workload
        return of_scope(model, size, batch)

    def takes(self, kind: str) -> bool:
        """True if contestants of this kind are asked for."""
        return kind in self.session.config.profile.contestants


@dataclass(frozen=True)
class Contestant:
    """What runs; `model` is what is counted, and `is_eager` says that it runs as it is, so that memory can be seen.

    `dense` is the label that a sparse model's share of saved latency is told against: ours at ratio 0 in torch, and the
    dense program elsewhere. `oracle` is the label of its oracle.
    """

    kind: str
    place: Place
    run: Callable[[], object]
    model: nn.Module
    config: SparsityConfig | None
    size: Size
    is_eager: bool = False
    dense: str | None = None
    oracle: str | None = None


def contestants(bench: Bench, size: Size, batch: int, typed: Mapping[str, SparsityConfig]) -> dict[str, Contestant]:
    """By label; the first is dense timm. `typed` configurations take part besides the published ones."""
    dense = bench.built(size)
    found = _dense_in_torch(bench, dense, size, batch) if bench.runtimes.has_torch else {}
    found |= _exported(bench, TIMM, "B2", dense, None, size, batch)
    depths = model_depths(dense)
    chosen = {**(PUBLISHED if depths == PUBLISHED_DEPTHS else {}), **UNIFORM}
    configs = {label: SparsityConfig.from_ratios(ratios, depths) for label, ratios in chosen.items()} | dict(typed)
    middle = "config 2" if "config 2" in configs else "60% everywhere"
    sparse = {}
    for label, config in configs.items():
        sparse[label] = bench.session.sparsified_(with_fused_attention(dense, fused=False))
        set_sparsity(sparse[label], config)
        if bench.runtimes.has_torch:
            found |= _sparse_in_torch(bench, label, sparse[label], config, size, batch)
        if label in EXPORTED or label in typed:
            found |= _exported(bench, f"ours, {label}", "ours", sparse[label], config, size, batch)
    if bench.takes("B3"):
        found |= _smaller(bench, size, batch, sparse[middle])
    return found


def _dense_in_torch(bench: Bench, dense: nn.Module, size: Size, batch: int) -> dict[str, Contestant]:
    """timm's variants, and ours at ratio 0."""
    session, place = bench.session, in_torch(bench.session)
    x, found = bench.workload(dense, size, batch).inputs, {}
    for number, variant in enumerate(dense_variants(dense, max_autotune=session.config.profile.max_autotune)):
        kind, run = "B2" if number else "B1", partial(variant.run, x)
        found[variant.label] = Contestant(kind, place, run, variant.counted, None, size, variant.is_eager)
    if session.device.type == "cpu" and bench.takes("B2f"):
        frozen = partial(frozen_variant(dense), x)
        found["timm compile, frozen"] = Contestant("B2f", place, frozen, dense, None, size)
    ours = session.sparsified_(with_fused_attention(dense, fused=False))
    set_sparsity(ours, 0.0, exact=False)
    zero = SparsityConfig.dense(model_depths(dense))
    found[OURS_DENSE] = Contestant("ours", place, partial(_fastest(ours), x), ours, zero, size, is_eager=True)
    return found


def _sparse_in_torch(
    bench: Bench, label: str, sparse: nn.Module, config: SparsityConfig, size: Size, batch: int
) -> dict[str, Contestant]:
    """Ours at a configuration, its oracle, and the authors' flow at two configurations."""
    place, x = in_torch(bench.session), bench.workload(sparse, size, batch).inputs
    name, found = f"oracle, {label}", {}
    found[f"ours, {label}"] = Contestant(
        "ours", place, partial(_fastest(sparse), x), sparse, config, size, is_eager=True, dense=OURS_DENSE,
        oracle=name if bench.takes("O") else None,
    )  # fmt: skip
    if bench.takes("O"):
        perfect = partial(_as_oracle, _fastest(sparse), x, foreseen(sparse, x))
        found[name] = Contestant("O", place, perfect, sparse, config, size)
    compared = bench.takes("B0") and label in ("config 3", "60% everywhere")
    theirs = authors_flow(sparse) if compared else None
    if theirs is not None:
        run = partial(_fastest(theirs), x)
        found[f"authors' flow, {label}"] = Contestant("B0", place, run, theirs, config, size, is_eager=True)
    return found


def _exported(
    bench: Bench, label: str, kind: str, model: nn.Module, config: SparsityConfig | None, size: Size, batch: int
) -> dict[str, Contestant]:
    """`model` as a program of every other runtime."""
    if bench.runtimes.others:
        bench.session.reporter.say(f"rivals: exporting {label} to {' and '.join(bench.runtimes.others)}")
    return {
        found.place.named(label): Contestant(
            kind, found.place, found.run, model, config, size, dense=found.place.named(TIMM) if config else None
        )
        for found in in_other_runtimes(bench.session, bench.runtimes, bench.workload(model, size, batch))
    }


def _fastest(model: nn.Module) -> nn.Module:
    """`model` as users would run it: on a GPU a copy that replays CUDA graphs, as the dense rivals may."""
    return accelerate_(copy.deepcopy(model)) if next(model.parameters()).is_cuda else model


def _as_oracle(model: nn.Module, x: Tensor, memory: Memory) -> None:
    with oracle(memory):
        model(x)


def _smaller(bench: Bench, size: Size, batch: int, ours: nn.Module) -> dict[str, Contestant]:
    """B3: dense with fused attention, compiled and in every runtime, at the side that takes nearest to `ours`."""
    nearest, model = _nearest(bench, size, batch, ours)
    label = f"{TIMM} at {size_text(nearest)}"
    found = {}
    if bench.runtimes.has_torch:
        place, x = in_torch(bench.session), bench.workload(model, nearest, batch).inputs
        told = f"{label}, fused" if has_fused_attention(model) else label
        mode = "reduce-overhead" if bench.session.device.type == "cuda" else None
        compiled: Any = torch.compile(model, dynamic=False, mode=mode)
        found = {
            told: Contestant("B3", place, partial(_fastest(model), x), model, None, nearest, is_eager=True),
            f"{told}, compiled": Contestant("B3", place, partial(compiled, x), model, None, nearest),
        }
    return found | _exported(bench, label, "B3", model, None, nearest, batch)


def _nearest(bench: Bench, size: Size, batch: int, ours: nn.Module) -> tuple[Size, nn.Module]:
    """The side, of `SMALLER_SHARES`, at which dense timm takes nearest to `ours`, both uncompiled in torch.

    Without torch, or a quiet machine, the side whose multiply-adds are nearest.
    """
    session = bench.session
    sides = {_rounded(size, share) for share in SMALLER_SHARES}
    models = {s: with_fused_attention(bench.built(s), fused=True) for s in sides}
    costs: dict[str, float] = {}
    if bench.runtimes.has_torch:
        calls: dict[str, Any] = {"ours": bench.workload(ours, size, batch).of(_fastest(ours)).run}
        calls |= {str(s): bench.workload(model, s, batch).of(_fastest(model)).run for s, model in models.items()}
        quick = measure_interleaved(
            calls, device=session.device, seconds=0.01, rounds=3, strict=False, retries=0, max_spread=1.0,
            patience=session.patience, before_round=partial(session.stop.check, "rivals", "nothing is measured yet"),
        )  # fmt: skip
        if all(latency.stable for latency in quick.values()):
            costs = {name: latency.median_ms for name, latency in quick.items()}
        else:
            session.reporter.warn("the smaller dense model is chosen by multiply-adds: latencies are not steady")
    if not costs:
        costs = {str(s): flopcounter_macs(bench.workload(model, s)).gmacs for s, model in models.items()}
        costs["ours"] = flopcounter_macs(bench.workload(ours, size)).gmacs
    nearest = min(sides, key=lambda s: abs(costs[str(s)] - costs["ours"]))
    return nearest, models[nearest]


def _rounded(size: Size, share: float, multiple: int = 32) -> Size:
    height, width = (max(multiple, round(side * share / multiple) * multiple) for side in size)
    return height, width
