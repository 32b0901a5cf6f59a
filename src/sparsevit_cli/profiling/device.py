"""The device and the software that a number was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from sparsevit_cli.errors import ConfigError, pass_on


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Device by name; `auto` takes cuda, else mps, else cpu. Raises ConfigError where it is absent."""
    here = available_devices()
    if str(name) == "auto":
        return torch.device(next((d for d in ("cuda:0", "mps") if d in here), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("device", f"{name!r} is no device; this machine has {', '.join(here)}", _DO) from None
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if "cuda:0" in here else 0)
    if str(device) not in here:
        raise ConfigError("device", f"{device} is not there; this machine has {', '.join(here)}", _DO)
    return device


_DO = "Choose one of them, or auto."


def available_devices() -> tuple[str, ...]:
    """Names of the devices of this machine that torch can use: cpu first."""
    cuda = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    return ("cpu", *cuda, *(("mps",) if torch.backends.mps.is_available() else ()))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_identity(device: torch.device) -> dict[str, str | int]:
    """What makes latencies comparable: equal for two runs on the same device with the same settings."""
    identity: dict[str, str | int] = {"type": device.type, "float32_matmul": torch.get_float32_matmul_precision()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        identity |= {
            "name": properties.name,
            "cores": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_mb": properties.total_memory // 10**6,
        }
    else:
        identity |= {
            "name": _cpu_info("model name") or platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    return identity


def describe_device(device: str | torch.device) -> dict[str, str | int | float]:
    """`device_identity`, and the state it is in where readable: clock, temperature, load. For reports."""
    device = torch.device(device)
    return device_identity(device) | (_cuda_state(device) if device.type == "cuda" else _cpu_state())


def describe_versions() -> dict[str, str]:
    """Versions of what takes part in a measurement: name -> version; absent packages are left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("sparsevit-cli", "torch", "timm", "fvcore", "triton", "onnxruntime", "openvino", "nncf"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with the build: 2.12.0+cu130
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
    if (revision := source_revision()) is not None:
        versions["git"] = revision
    return versions


@lru_cache
def source_revision() -> str | None:
    """Commit of the checkout that this package runs from, `-dirty` where files differ; None outside of one."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, timeout=5, check=True)
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _cpu_info(name: str) -> str:
    """What Linux tells of the first CPU under that name; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def cpu_flags() -> frozenset[str]:
    """What Linux says that an x86 CPU can do, such as `avx512_vnni`; empty elsewhere."""
    return frozenset(_cpu_info("flags").split())


def _cpu_state() -> dict[str, str | int | float]:
    state: dict[str, str | int | float] = {}
    if hasattr(os, "getloadavg"):
        state["load_1min"] = round(os.getloadavg()[0], 2)
    clock = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    governor = clock.with_name("scaling_governor")
    if clock.is_file():
        state["clock_mhz"] = int(clock.read_text()) // 1000
    if governor.is_file():
        state["governor"] = governor.read_text().strip()
    return state


def _cuda_state(device: torch.device) -> dict[str, str | int | float]:
    readers = {
        "clock_mhz": torch.cuda.clock_rate,
        "temperature_c": torch.cuda.temperature,
        "power_mw": torch.cuda.power_draw,
        "utilization_percent": torch.cuda.utilization,
    }
    state: dict[str, str | int | float] = {}
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        state["driver"] = driver.read_text().splitlines()[0].removeprefix("NVRM version:").strip()
    for name, read in readers.items():
        # torch reads these through pynvml or amdsmi, which need not be installed nor permitted.
        try:
            state[name] = read(device)
        except Exception as error:
            pass_on(error)
            state[name] = f"not readable ({type(error).__name__})"
    return state
