"""Latency of exported programs, dense against sparse, each in its runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparsevit_cli.profiling.latency import measure_interleaved
from sparsevit_cli.profiling.neighbours import Patience
from sparsevit_cli.reporting import Reporter
from sparsevit_cli.runtimes import Activations, runtime_for

from .report import RuntimeLatency

MEASURED = ("onnx", "openvino")
"""The formats whose latency is measured."""
_SECONDS, _ROUNDS = 1.0, 15


def measured_latency(
    sparse: Path,
    dense: Path | None,
    image: Tensor,
    *,
    activations: Activations,
    seed: int,
    reporter: Reporter,
    patience: Patience | None,
    max_spread: float,
    retries: int,
    check: Callable[[], None],
) -> RuntimeLatency:
    """Latency of the files in the runtime of their kind on one image (1, C, H, W), measured in turns.

    `dense` is None for a model that is dense itself. `check` may raise, to stop early.
    """
    load = partial(runtime_for(sparse).load, activations=activations, shape=image.shape)
    loaded = load(sparse)
    name = loaded.runtime
    programs = {"sparse": loaded} if dense is None else {"dense": load(dense), "sparse": loaded}
    reporter.say(f"export: measuring {name} latency{', dense against sparse' if dense else ''}")
    latencies = measure_interleaved(
        {label: lambda run=program.run: run(image) for label, program in programs.items()},  # type: ignore[misc]
        device=torch.device("cpu"),
        seconds=_SECONDS,
        rounds=_ROUNDS,
        max_spread=max_spread,
        retries=retries,
        strict=False,
        patience=patience,
        before_round=check,
        seed=seed,
    )
    unsteady = [label for label, latency in latencies.items() if not latency.stable]
    if unsteady:
        reporter.warn(f"export: the {name} latency of {' and '.join(unsteady)} did not settle; the machine is busy")
    found = latencies["sparse"]
    return RuntimeLatency(name, loaded.version, activations, loaded.threads, latencies.get("dense", found), found)
