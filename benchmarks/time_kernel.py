"""Time one part of an engine against the portable engine, on random maps, and tell how far apart their results are.

    python benchmarks/time_kernel.py native run_windows_ --channels 96 --size 56 56
    python benchmarks/time_kernel.py triton score_and_rank --channels 384 --size 14 14 --batch 8 --dtype bfloat16

For work on a kernel: figures of whole models come from `sparsevit profile`. On a noisy machine, run it several times.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from sparsevit_cli import kernels, windows
from sparsevit_cli.kernels import Affine, BlockWeights, EmbeddingWeights, MergingWeights, Norm

PARTS = ("run_windows_", "merge_patches", "embed_patches", "score_and_rank")
HEAD_CHANNELS = 32


def main(arguments: list[str] | None = None) -> str:
    """One line: median milliseconds of both engines, their ratio, and the largest difference of their results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=kernels.KERNELS[1:])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--channels", type=int, default=96, help="of the map, or the embedding's outputs")
    parser.add_argument("--size", type=int, nargs=2, default=(56, 56), help="height and width of the map, in tokens")
    parser.add_argument("--window", type=int, default=7, help="side of a window, in tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the windows that are kept")
    parser.add_argument("--unshifted", action="store_true", help="windows without a shift")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, per engine")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    with torch.inference_mode():
        run, takes = arranged(given)
        engine, portable = (kernels.chosen(name, torch.device(given.device)) for name in (given.engine, "portable"))
        if engine.name != given.engine or not takes(engine):
            return f"{given.engine} does not take this: the portable engine computes it"
        difference = (run(engine).float() - run(portable).float()).abs().max().item()
        ms = [median_ms(lambda one=one: run(one), given.seconds) for one in (engine, portable)]
    times = f"{given.part}: {given.engine} {ms[0]:.3f} ms, portable {ms[1]:.3f} ms"
    return f"{times}, {ms[1] / ms[0]:.2f}x; largest difference {difference:.1e}"


def median_ms(run: Callable[[], object], seconds: float) -> float:
    """Median milliseconds of a call; waits for a GPU."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def arranged(given: Any) -> tuple[Callable[[Any], Tensor], Callable[[Any], bool]]:
    """What an engine shall do, as a function of it that returns the result, and whether its own code does it."""
    kind = {"dtype": getattr(torch, given.dtype), "device": given.device}
    channels, (height, width), side = given.channels, given.size, given.window
    x = torch.randn(given.batch, height, width, channels, **kind)

    def affine(inner: int, outer: int) -> Affine:
        return Affine(torch.randn(outer, inner, **kind) / inner**0.5, torch.randn(outer, **kind))

    def norm(of: int) -> Norm:
        return Norm(torch.ones(of, **kind), torch.zeros(of, **kind), 1e-5)

    if given.part == "merge_patches":
        merging = MergingWeights(norm(4 * channels), affine(4 * channels, 2 * channels), norm_first=True)
        return lambda engine: engine.merge_patches(x, merging), lambda engine: engine.takes(x, merging)
    if given.part == "embed_patches":
        images = torch.randn(given.batch, 3, 4 * height, 4 * width, **kind)
        conv = Affine(torch.randn(channels, 3, 4, 4, **kind) / 48**0.5, torch.randn(channels, **kind))
        embedding = EmbeddingWeights(conv, norm(channels))
        return lambda engine: engine.embed_patches(images, embedding), lambda engine: engine.takes(images, embedding)

    shifts = ((0, 0),) if given.unshifted else ((0, 0), (side // 2, side // 2))
    partitions, device = [(height, width, (side, side), shift) for shift in shifts], torch.device(given.device)
    indices = [windows.window_token_index(*partition, "roll_first", device) for partition in partitions]
    count = max(1, round(given.keep * len(indices[0])))
    if given.part == "score_and_rank":
        scored = lambda engine: engine.score_and_rank(x, indices, count, "mean_abs_l2")[-1].indices  # noqa: E731
        return scored, lambda engine: engine.takes(x, None)

    kept = windows.score_and_rank(x, indices, count, "mean_abs_l2")[-1]
    heads = max(1, channels // HEAD_CHANNELS)
    block = BlockWeights(
        norm1=norm(channels), qkv=affine(channels, 3 * channels), proj=affine(channels, channels),
        norm2=norm(channels), fc1=affine(channels, 4 * channels), fc2=affine(4 * channels, channels),
        num_heads=heads, scale=(channels // heads) ** -0.5,
    )  # fmt: skip
    bias, bias_class = torch.randn(1, heads, side**2, side**2, **kind), None
    if not given.unshifted:
        masks, class_of = windows.shift_mask(*partitions[-1], device)
        bias, bias_class = bias + masks[:, None].to(bias), class_of[kept.indices.flatten()]
    padded = windows.has_padding(height, width, (side, side))
    tokens, rows = x.flatten(0, 2), kept.rows.flatten(0, 1)

    def run(engine: Any) -> Tensor:
        found = tokens.clone()  # a block changes its map; the copy is a small part of the time
        engine.run_windows_(found, rows, block, bias, bias_class, padded=padded)
        return found

    return run, lambda engine: engine.takes(tokens, block)


if __name__ == "__main__":
    print(main())
