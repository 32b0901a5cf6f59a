"""How well the latency table of the search predicts configurations that it was not made of.

usage: python benchmarks/latency_table.py [--img-size 448] [--configs 200] [--rounds 10] [--device cpu]

Measures a table, sets its scale by a dozen configurations as the search does, and then measures random ones in one
interleaved run. Printed are the seconds that the table took, and its mean and largest error; beside them by how
much the first ten differ when they are measured once more: the noise of the clock itself.
"""

from __future__ import annotations

import argparse
import json
import time
from random import Random
from statistics import fmean

import timm

from sparsevit_cli.profiling.device import describe_versions, device_identity, resolve_device
from sparsevit_cli.profiling.inputs import TORCH_DTYPE
from sparsevit_cli.profiling.latency_table import measure_configs, measure_latency_table
from sparsevit_cli.profiling.memory import reuse_freed_memory
from sparsevit_cli.profiling.workload import image_workload
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.swin import model_depths, sparsify_

CALIBRATING, REPEATED = 12, 10


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--img-size", type=int, default=448)
    parser.add_argument("--configs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time per entry of the table")
    parser.add_argument("--precision", choices=tuple(TORCH_DTYPE), default="fp32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    reuse_freed_memory()
    model = sparsify_(timm.create_model(args.model, img_size=args.img_size).eval())
    device, dtype = resolve_device(args.device), TORCH_DTYPE[args.precision]
    workload = image_workload(model, args.img_size, device=device, dtype=dtype)
    space, rng = SearchSpace(model_depths(model)), Random(0)

    def measured(configs: list[SparsityConfig]) -> list[tuple[SparsityConfig, float]]:
        """Latency of each as a share of dense's in the same rounds: the machine is faster or slower in others."""
        found = measure_configs(
            workload, [space.dense, *configs], seconds=0.01, rounds=args.rounds, strict=True,
        )  # fmt: skip
        return [(config, 1 / found[config].speedup) for config in configs]

    began = time.perf_counter()
    table = measure_latency_table(workload, seconds=args.seconds)
    seconds = time.perf_counter() - began
    configs = list(dict.fromkeys(space.sample(rng) for _ in range(2 * args.configs)))[: CALIBRATING + args.configs]
    table = table.calibrated(measured(configs[:CALIBRATING]))
    held_out = measured(configs[CALIBRATING:])
    error = table.fit_error(held_out)
    again = measured([config for config, _ in held_out[:REPEATED]])
    repeated = [abs(ms / before - 1) for (_, ms), (_, before) in zip(again, held_out, strict=False)]
    document = {
        "versions": describe_versions(),
        "device": device_identity(device),
        "settings": vars(args),
        "table_seconds": seconds,
        "configs": error.n,
        "mean_error": error.mean,
        "largest_error": error.largest,
        "mean_difference_of_repeated": fmean(repeated),
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
