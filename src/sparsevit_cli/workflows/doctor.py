"""doctor: what a bug report needs."""

from __future__ import annotations

import importlib.util

import torch

from sparsevit_cli.config.experiment import ModelSection
from sparsevit_cli.errors import SparseViTError, in_one_line, pass_on
from sparsevit_cli.kernels import explained
from sparsevit_cli.models import build_model
from sparsevit_cli.profiling.device import describe_device, describe_versions, resolve_device
from sparsevit_cli.profiling.inputs import evaluating
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.neighbours import Patience, Vigil
from sparsevit_cli.profiling.workload import image_workload
from sparsevit_cli.runtimes import RUNTIMES, Runtime, slow_in_int8

EXTRAS = {
    "demo": ("sklearn", "matplotlib"),
    "plot": ("matplotlib",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "detect": ("faster_coco_eval",),
    "segment": ("transformers", "scipy"),
    "cluster": ("distributed",),
    "optuna": ("optuna",),
}
"""Packages that an extra brings, by import name."""

TWICE_SECONDS = 4.0
"""Measuring time of each of the two; with warming up and what a small machine needs for it, about ten seconds."""
MOST_APART = 0.03
"""Share that a model may differ from itself."""


def examine() -> dict[str, object]:
    """Device, versions, kernels, what else runs, whether the clock is steady, runtimes and what they compute in.

    For each extra what is missing, and how to install it.
    """
    device = resolve_device("auto")
    found: dict[str, object] = {**describe_versions(), **describe_device(device), "kernels": explained("auto", device)}
    found["neighbours"] = Vigil(Patience(), device).glance() or "none"
    try:
        found["clock"] = told_of_clock(*measured_twice(device))
    except (SparseViTError, RuntimeError) as error:  # a device that is full or broken: that is what a report needs
        found["clock"] = f"could not be measured ({in_one_line(error)})"
    for runtime in RUNTIMES.values():
        found[f"runtime {runtime.name}"] = _told(runtime)
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        install = f"missing {', '.join(missing)}: pip install 'sparsevit-cli[{extra}]'"
        found[f"extra {extra}"] = install if missing else "installed"
    return found


def measured_twice(device: torch.device) -> tuple[Latency, Latency]:
    """The same dense Swin-T against itself, in turns and without waiting for neighbours (an A/A test)."""
    model = build_model(ModelSection(), 1000).to(device)
    workload = image_workload(model)
    with evaluating(model):
        first, second = measure_interleaved(
            {"a model": workload.run, "the same model again": workload.run}, device=device, seconds=TWICE_SECONDS,
            warmup_seconds=TWICE_SECONDS / 4, rounds=6, retries=0, strict=False, patience=Patience(0.0),
        ).values()  # fmt: skip
    return first, second


def told_of_clock(first: Latency, second: Latency) -> str:
    """Whether a latency that is measured now may be relied on."""
    apart = abs(second.speedup - 1)
    why = first.unsteady or second.unsteady or ("they should be equal" if apart > MOST_APART else "")
    numbers = f"the same model twice: {first.median_ms:.4g} and {second.median_ms:.4g} ms, {apart:.1%} apart"
    return f"not steady, {numbers}: {why}" if why else f"steady, {numbers}"


def _told(runtime: Runtime) -> str:
    """Version, files, and what it computes in on this CPU; or why it does not run."""
    if not runtime.is_installed():
        return "not installed"
    try:
        precisions = ", ".join(runtime.precisions())
    except Exception as error:
        pass_on(error)
        return f"{runtime.version()}, cannot be loaded ({in_one_line(error)})"
    found = f"{runtime.version()}, runs {' and '.join(runtime.suffixes)} files in {precisions}"
    slow = slow_in_int8() if runtime.runs_int8() else ""
    return f"{found}; {slow}" if slow else found
