"""Programs whose keep counts are inputs: a model is traced once, and serves every configuration of the same pattern.

A *pattern* says which block pairs skip windows at all: a pair that does not is traced as timm computes it, without a
gather. A count is the length of an input of its own (`keep_0_1`: stage 0, pair 1), whose values do not matter. Given
its lengths, a runtime folds them into constants, and what it runs is the graph of a fixed export.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit_cli.runtimes import Activations, Program, Runtime
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import get_sparsity, keep_counts, set_sparsity
from sparsevit_cli.windows import num_keep

from .checks import runs_on
from .export import inference_copy
from .images import structured_images
from .light import timed_file
from .programs import (
    OPSET,
    Around,
    batched,
    named_tensors,
    save_onnx,
    trace_inputs,
)
from .quantization import check_installed

Pattern = tuple[tuple[bool, ...], ...]
"""Of each stage and block pair: true where windows are skipped."""


def keep_input(stage: int, pair: int) -> str:
    """Name of the input whose length is the count of a block pair."""
    return f"keep_{stage}_{pair}"


@dataclass(frozen=True)
class Counts:
    """How many windows each stage has, and so what a configuration keeps of them."""

    windows: tuple[int, ...]

    def pattern(self, config: SparsityConfig) -> Pattern:
        """Which pairs skip windows: a map of one window has none to skip."""
        return tuple(
            tuple(num_keep(count, tenths) < count for tenths in stage)
            for count, stage in zip(self.windows, config.tenths, strict=True)
        )

    def lengths(self, config: SparsityConfig) -> dict[str, int]:
        """Length of every `keep` input of the program of its pattern."""
        return {
            keep_input(number, pair): num_keep(count, tenths)
            for number, (count, stage) in enumerate(zip(self.windows, config.tenths, strict=True))
            for pair, tenths in enumerate(stage)
            if num_keep(count, tenths) < count
        }


class Adjustable(Around):
    """A sparse model (B, C, H, W) that keeps as many windows as further inputs are long, one per pair of `pattern`."""

    def __init__(self, model: nn.Module, pattern: Pattern) -> None:
        super().__init__(model)
        self.pattern = pattern

    def forward(self, images: Tensor, *keeps: Tensor) -> Any:
        lengths = iter([keep.shape[0] for keep in keeps])
        counts = [[next(lengths) if sparse else None for sparse in stage] for stage in self.pattern]
        with keep_counts(self.model, counts):
            return self.model(images)


def trace_adjustable(
    model: nn.Module, shape: tuple[int, int, int], pattern: Pattern, counts: Counts
) -> torch.export.ExportedProgram:
    """Trace a sparse model of images `shape` (C, H, W) with free counts and a free batch.

    The model's ratios are left as they were. Raises UntraceableError.
    """
    before = get_sparsity(model)
    keeps, dims = [], []
    for stage, (count, sparse) in enumerate(zip(counts.windows, pattern, strict=True)):
        falling = itertools.count(max(2, count - 1), -1)
        for pair in (pair for pair, skips in enumerate(sparse) if skips):
            keeps.append(torch.zeros(max(2, next(falling)), dtype=torch.uint8))
            dims.append({0: torch.export.Dim(keep_input(stage, pair), min=1, max=count)})
    images = structured_images(shape, 2, seed=0)
    free = {0: torch.export.Dim("batch")}
    set_sparsity(model, SparsityConfig(tuple(tuple(map(int, stage)) for stage in pattern)), exact=False)
    try:
        if not keeps:
            return trace_inputs(model, (images,), (free,))
        return trace_inputs(Adjustable(model, pattern), (images, *keeps), {"images": free, "keeps": tuple(dims)})
    finally:
        set_sparsity(model, before)


class AdjustablePrograms:
    """A sparse model in one runtime, at any ratios: one file per pattern, made in `folder` when it is first needed.

    `images` (B, C, H, W) give the shape that programs are compiled for, `windows` are the numbers of windows of stages.
    The model is copied. Raises UntraceableError for a model that answers each image.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        windows: Sequence[int],
        runtime: Runtime,
        folder: Path | str,
        *,
        activations: Activations = "fp32",
        opset: int = OPSET,
        eight_bits: bool = False,
        before_step: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.images, self.counts = images.float().cpu(), Counts(tuple(windows))
        self.runtime, self.folder, self.activations, self.opset = runtime, Path(folder), activations, opset
        self.eight_bits, self.before_step, self.say = eight_bits, before_step, say
        if eight_bits:
            check_installed("search.precision")
        self._files: dict[Pattern, Path] = {}
        copied = inference_copy(model)
        with runs_on(images.shape):
            self.model = batched(copied, lambda batch: self.images[:1].repeat(batch, 1, 1, 1), (1, 2))
        with torch.no_grad():
            self.output_names = [name for name, _ in named_tensors(self.model(self.images[:1]))]

    def load(self, config: SparsityConfig) -> Program:
        """The program at `config`. Raises UntraceableError, ConfigError, CheckpointError."""
        return self.runtime.load(
            self.file_of(self.counts.pattern(config)),
            activations=self.activations,
            shape=tuple(self.images.shape),
            lengths=self.counts.lengths(config),
        )

    def file_of(self, pattern: Pattern) -> Path:
        """The file of all configurations of a pattern."""
        if pattern not in self._files:
            self.before_step()
            number = len(self._files)
            self.say(f"tracing program {number + 1}, sparse in {_told(pattern)}")
            self._files[pattern] = self._made(pattern, self.folder / f"pattern{number}.onnx")
        return self._files[pattern]

    def _made(self, pattern: Pattern, path: Path) -> Path:
        _, channels, height, width = self.images.shape
        program = trace_adjustable(self.model, (channels, height, width), pattern, self.counts)
        names = [keep_input(s, p) for s, p in _sparse(pattern)]
        save_onnx(program, path, self.output_names, self.opset, {}, lengths=names)
        counts = {keep_input(s, p): max(1, self.counts.windows[s] // 2) for s, p in _sparse(pattern)}
        made = timed_file(
            path, self.runtime.name, (1, channels, height, width),
            eight_bits=self.eight_bits, lengths=counts, check=self.before_step,
        )  # fmt: skip
        for file in path.parent.glob(f"{path.name}*") if made != path else ():
            file.unlink()
        return made


def _sparse(pattern: Pattern) -> list[tuple[int, int]]:
    """Stage and pair of every pair that skips windows."""
    return [(s, p) for s, stage in enumerate(pattern) for p, skips in enumerate(stage) if skips]


def _told(pattern: Pattern) -> str:
    """`stage 0, stage 2 (last 1 of 3 pairs)`, or `no stage`."""
    told = [
        f"stage {number}" + ("" if all(stage) else f" (last {sum(stage)} of {len(stage)} pairs)")
        for number, stage in enumerate(pattern)
        if any(stage)
    ]
    return ", ".join(told) or "no stage"
