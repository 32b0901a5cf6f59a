"""doctor: what a bug report needs."""

from __future__ import annotations

import importlib.util

from sparsevit_cli.errors import in_one_line, pass_on
from sparsevit_cli.kernels import explained
from sparsevit_cli.profiling.device import describe_device, describe_versions, resolve_device
from sparsevit_cli.profiling.neighbours import Patience, Vigil
from sparsevit_cli.runtimes import RUNTIMES, Runtime

EXTRAS = {
    "demo": ("sklearn", "matplotlib"),
    "plot": ("matplotlib",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "detect": ("faster_coco_eval",),
    "segment": ("transformers", "scipy"),
    "optuna": ("optuna",),
}
"""Packages that an extra brings, by import name."""


def examine() -> dict[str, object]:
    """Device, versions, kernels, runtimes and what they compute in, what else runs, and for each extra what is missing
    and how to install it."""
    device = resolve_device("auto")
    found: dict[str, object] = {**describe_versions(), **describe_device(device), "kernels": explained("auto", device)}
    found["neighbours"] = Vigil(Patience(), device).glance() or "none: a latency would be steady now"
    for runtime in RUNTIMES.values():
        found[f"runtime {runtime.name}"] = _told(runtime)
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        install = f"missing {', '.join(missing)}: pip install 'sparsevit-cli[{extra}]'"
        found[f"extra {extra}"] = install if missing else "installed"
    return found


def _told(runtime: Runtime) -> str:
    """Version, files, and what it computes in on this CPU; or why it does not run."""
    if not runtime.is_installed():
        return "not installed"
    try:
        precisions = ", ".join(runtime.precisions())
    except Exception as error:
        pass_on(error)
        return f"{runtime.version()}, cannot be loaded ({in_one_line(error)})"
    return f"{runtime.version()}, runs {' and '.join(runtime.suffixes)} files in {precisions}"
