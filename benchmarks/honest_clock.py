"""How honest the clock is: the same model twice, and one that is 1.10 times slower, alone and beside busy processes.

usage: python benchmarks/honest_clock.py [--sessions 20] [--img-size 64] [--noise none "one core" ...]

Counts, per kind of noise: sessions whose three rows are all steady; of those, sessions in which the same model twice is
within 3 % of itself, in which its interval says that it differs (it does not), and in which the slower one is found
(interval above 1, 1.07 to 1.13). Beside noise a session must not be steady, unless the noise was away: "comes and goes"
leaves quiet slices, of which a session may be made. Nothing is waited for: that would only take longer.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

from sparsevit_cli.errors import UnsteadyError
from sparsevit_cli.profiling.device import describe_versions, device_identity
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.memory import reuse_freed_memory
from sparsevit_cli.profiling.neighbours import Patience

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the noise is that of the tests

from noise import NOISE, beside

CALLS, SLOWER_CALLS = 10, 11
DEPTHS, HEADS = (2, 2), (3, 6)
"""Two stages: a session takes seconds."""


def session(model: nn.Module, x: torch.Tensor, seed: int, wait_seconds: float) -> dict[str, Latency] | UnsteadyError:
    """One A/A/B measurement, or why there is none."""

    def calls(count: int) -> None:
        for _ in range(count):
            model(x)

    candidates = {"a": partial(calls, CALLS), "a again": partial(calls, CALLS), "b": partial(calls, SLOWER_CALLS)}
    try:
        return measure_interleaved(candidates, device=x.device, seconds=1.0, seed=seed, patience=Patience(wait_seconds))
    except UnsteadyError as error:
        return error


def counts(sessions: list[dict[str, Latency] | UnsteadyError]) -> dict[str, int | list[float] | list[str]]:
    """What became of the sessions."""
    steady = [found for found in sessions if not isinstance(found, UnsteadyError)]
    middles = sorted(found["a"].median_ms / CALLS for found in steady)
    again, slower = [found["a again"] for found in steady], [found["b"] for found in steady]
    return {
        "sessions": len(sessions),
        "steady": len(steady),
        "same model within 3 %": sum(abs(row.speedup - 1) <= 0.03 for row in again),
        "same model told as different": sum(not row.speedup_low <= 1 <= row.speedup_high for row in again),
        "1.10x slower found": sum(row.speedup_high < 1 and 1.07 <= 1 / row.speedup <= 1.13 for row in slower),
        "ms of a call, least and most": [round(ms, 3) for ms in middles[:1] + middles[-1:]],
        "why not": sorted({found.got for found in sessions if isinstance(found, UnsteadyError)})[:3],
    }


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for neighbours, each session")
    parser.add_argument("--noise", nargs="*", default=["none", *NOISE], choices=["none", *NOISE])
    args = parser.parse_args()
    reuse_freed_memory()
    model = timm.create_model(args.model, img_size=args.img_size, depths=DEPTHS, num_heads=HEADS).eval()
    x = torch.randn(1, 3, args.img_size, args.img_size)
    found = {}
    for noise in args.noise:
        with nullcontext() if noise == "none" else beside(noise):
            found[noise] = counts([session(model, x, seed, args.wait) for seed in range(args.sessions)])
        print(noise, found[noise], file=sys.stderr, flush=True)
    document = {
        "versions": describe_versions(),
        "device": device_identity(x.device),
        "settings": vars(args),
        "counts": found,
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
