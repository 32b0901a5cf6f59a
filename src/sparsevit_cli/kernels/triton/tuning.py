"""Launch settings: block sizes, warps and stages of a kernel, measured on the GPU at hand when that is asked for.

With SPARSEVIT_TUNE=1 in the environment, the first launch of a kernel on each class of shapes tries its candidates, by
Triton's own autotuner: seconds per class. The choice is kept in Triton's cache folder, by GPU, Triton, code, types and
class. Otherwise, in Triton's interpreter, and for classes first met while a CUDA graph is captured, nothing is measured
and the settings that stand in the code are taken. No kernel reads what it writes, so trying leaves results as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton

VARIABLE = "SPARSEVIT_TUNE"


class Tunable(NamedTuple):
    """Candidates of a kernel, and the arguments whose values, with the types of all tensors, make a class of shapes.

    The first candidate is the one for everything that is not measured.
    """

    candidates: tuple[Mapping[str, int], ...]
    class_of: tuple[str, ...]


def _candidates(*names: str) -> Callable[..., tuple[dict[str, int], ...]]:
    """Settings from rows of numbers: blocks of `names`, warps, stages."""
    columns = (*names, "num_warps", "num_stages")
    return lambda *rows: tuple(dict(zip(columns, row, strict=True)) for row in rows)


TUNABLE = {
    "project_kernel": Tunable(
        _candidates("BLOCK_R", "BLOCK_O", "BLOCK_I")(
            (64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (32, 32, 64, 4, 4), (32, 64, 64, 4, 4),
            (64, 128, 32, 4, 3), (128, 64, 32, 4, 4), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3),
        ),
        ("size_class", "in_features", "out_features", "PADDED", "GATHER", "NORM", "GELU", "RESIDUAL", "SCATTER",
         "PRECISION"),
    ),
    "attention_kernel": Tunable(
        _candidates("BLOCK_Q", "BLOCK_K")(
            (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 2, 1), (64, 32, 4, 2), (32, 64, 2, 1), (16, 64, 2, 1),
        ),
        ("size_class", "area", "num_heads", "head_dim", "PADDED", "HAS_CLASS", "COSINE", "PRECISION"),
    ),
    "mlp_kernel": Tunable(
        _candidates("BLOCK_R", "BLOCK_H")(
            (32, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (32, 64, 4, 2),
        ),
        ("size_class", "channels", "hidden", "PADDED", "PRECISION"),
    ),
}  # fmt: skip
"""By the name of the kernel: for tiles of 16 bits on recent GPUs, both few rows (small tiles) and many."""


def is_on() -> bool:
    """True when launches are tuned."""
    return os.environ.get(VARIABLE) == "1" and not triton.knobs.runtime.interpret


def tuned(kernel: Any, tunable: Tunable, measure: Callable[..., Any] | None = None) -> Any:
    """`kernel` with its candidates to choose from; `measure` stands for Triton's `do_bench` in tests."""
    return triton.autotune(
        [_config(settings) for settings in tunable.candidates],
        key=list(tunable.class_of),
        prune_configs_by={"early_config_prune": _first_in_capture},
        do_bench=measure,
        cache_results=True,
    )(kernel)


def size_class(count: int) -> int:
    """The power of two that holds `count`: as many rows want the same settings."""
    power: int = triton.next_power_of_2(count)
    return power


def _config(settings: Mapping[str, int]) -> triton.Config:
    blocks = {name: value for name, value in settings.items() if name.isupper()}
    return triton.Config(blocks, num_warps=settings["num_warps"], num_stages=settings["num_stages"])


def _first_in_capture(candidates: list[Any], arguments: Mapping[str, Any], **_: Any) -> list[Any]:
    return candidates[:1] if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing() else candidates
