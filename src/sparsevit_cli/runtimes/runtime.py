"""The contract of a runtime: it loads an exported file and runs batches of images through it.

To add one: a subclass of `Runtime` in a module of its own, and a line in `runtimes/__init__.py`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsevit_cli.errors import CheckpointError, ConfigError, check_installed, in_one_line, pass_on
from sparsevit_cli.profiling.device import cpu_flags

Activations = Literal["fp32", "bf16"]
"""What a runtime computes in, where the file does not say eight bits."""
Precision = Literal["fp32", "bf16", "int8"]
"""What an export was made in: in bf16 the file holds float32, and the runtime is asked to compute in bfloat16."""
Run = Callable[[Tensor], list[Tensor]]
"""Images (B, C, H, W) in float32 on the CPU to the outputs in the file's order, in float32 on the CPU."""


@dataclass(frozen=True, eq=False)
class Program:
    """A file as a runtime runs it, with the settings that its latency depends on."""

    runtime: str
    version: str
    activations: Activations
    threads: int
    run: Run


def precision_label(precision: Precision, activations: Activations) -> str:
    """`fp32`, `bf16`, or `int8+bf16`: eight bits, and what all else is computed in."""
    return f"int8+{activations}" if precision == "int8" else activations


class Runtime(ABC):
    """A way to run exported files on this machine's CPU.

    `suffixes` are of the files that it reads, the preferred one first, `packages` what must be installed, `extra` the
    extra of this package that installs them. `otherwise` says what it would do if it were asked for other activations.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str | None] = None
    otherwise: ClassVar[str] = ""

    @abstractmethod
    def activations(self) -> tuple[Activations, ...]:
        """What this machine's CPU computes in by instructions of its own, the slowest first."""

    def runs_int8(self) -> bool:
        """True if it has kernels for eight bits on this machine's CPU."""
        return False

    @abstractmethod
    def _run(
        self,
        path: Path,
        activations: Activations,
        threads: int,
        shape: tuple[int, ...] | None,
        lengths: Mapping[str, int],
    ) -> Run:
        """The loaded file. Raises whatever the runtime raises."""

    def load(
        self,
        path: Path,
        *,
        activations: Activations = "fp32",
        threads: int | None = None,
        shape: Sequence[int] | None = None,
        lengths: Mapping[str, int] | None = None,
    ) -> Program:
        """Load a file on `threads` CPU threads, by default torch's number.

        `shape` (B, C, H, W) compiles for it alone, in OpenVINO; the others run any batch that the file takes.
        `lengths` are those of all its inputs besides the images, by name: vectors whose values do not matter.
        The threads do not spin once a run has ended, so that a program that is measured next has all cores to itself.
        Raises ConfigError (packages, activations), CheckpointError (a file that is missing or cannot be loaded).
        """
        self.check_installed()
        self.check_activations(activations)
        if path.suffix not in self.suffixes:
            do = f"Give a file that ends in {' or '.join(self.suffixes)}."
            raise ConfigError(f"runtime {self.name}", f"it does not read {path.name}", do)
        if not path.is_file():
            raise CheckpointError(str(path), "is missing", "Export the model again.")
        threads = threads or torch.get_num_threads()
        fixed = None if shape is None else tuple(int(side) for side in shape)
        try:
            run = self._run(path, activations, threads, fixed, lengths or {})
        except Exception as error:
            pass_on(error)
            got = f"{self.name} {self.version()} cannot load it ({in_one_line(error)})"
            raise CheckpointError(str(path), got, "Export the model again.") from error
        return Program(self.name, self.version(), activations, threads, run)

    def precisions(self) -> tuple[str, ...]:
        """Labels of all that it computes in on this CPU; see `precision_label`."""
        found = self.activations()
        return (*found, *(precision_label("int8", each) for each in found if self.runs_int8()))

    def version(self) -> str:
        """Version of the installed runtime."""
        return importlib.metadata.version(self.packages[0])

    def is_installed(self) -> bool:
        """True if all packages that it needs are there; none is imported."""
        return all(importlib.util.find_spec(name) is not None for name in self.packages)

    def check_installed(self) -> None:
        """Raises ConfigError that names the extra."""
        check_installed(f"runtime {self.name}", self.packages, self.extra or "")

    def check_activations(self, activations: Activations, setting: str | None = None) -> None:
        """Raises ConfigError for what this CPU would emulate, slower than float32, and for a runtime that is broken.

        `setting` is what asked for it, as users write it.
        """
        try:
            known = self.activations()
        except Exception as error:
            pass_on(error)
            do = f"Install {self.packages[0]} again."
            raise ConfigError(f"runtime {self.name}", f"it cannot be loaded ({in_one_line(error)})", do) from error
        if activations not in known:
            got = f"{activations}: {self.name} on this CPU computes in {' and '.join(known)}{self.otherwise}"
            do = "Take fp32" if setting is None else f"Set {setting}: fp32"
            raise ConfigError(f"runtime {self.name}", got, f"{do}, or another runtime.")

    def check_int8(self, setting: str) -> None:
        """Raises ConfigError for a runtime without kernels of eight bits on this CPU; `setting` asked for them."""
        self.check_activations("fp32", setting)  # one that is broken
        if not self.runs_int8():
            got = f"int8: {self.name} on this CPU computes in {' and '.join(self.activations())}"
            raise ConfigError(f"runtime {self.name}", got, f"Set {setting}: fp32, or another runtime.")


def slow_in_int8() -> str:
    """Why eight bits gain little on this CPU; empty if they do not, and where nothing is known of it."""
    flags = cpu_flags()
    if not flags or flags & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return ""
    return "this CPU multiplies eight bits without VNNI or AMX: int8 may be no faster than fp32 here"
