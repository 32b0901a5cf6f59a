"""What a training step at random sparsity costs, against a dense step: its share of multiply-adds is the ideal.

usage: python benchmarks/adaptation_step.py [--img-size 448] [--batch 4] [--steps 24] [--precision fp32]

Dense and random steps take turns; printed are medians per step, the mean share of multiply-adds of the configurations
drawn, and what the random steps take longer than that share.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from statistics import mean, median

import timm
import torch
from torch.nn import functional as F

from sparsevit_cli.profiling.device import describe_versions, device_identity, synchronize
from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.profiling.memory import reuse_freed_memory
from sparsevit_cli.profiling.workload import image_workload
from sparsevit_cli.schedule import RandomSchedule
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity, sparsify_


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--img-size", type=int, default=448)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    reuse_freed_memory()

    device = torch.device(args.device)
    model = sparsify_(timm.create_model(args.model, img_size=args.img_size)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    x = torch.randn(args.batch, 3, args.img_size, args.img_size, device=device)
    labels = torch.randint(0, 1000, (args.batch,), device=device)

    def step(config: SparsityConfig) -> float:
        set_sparsity(model, config)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if args.precision == "bf16" else nullcontext():
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        synchronize(device)
        return 1e3 * (time.perf_counter() - began)

    space = SearchSpace(model_depths(model))
    schedule, macs = RandomSchedule(space, seed=0), macs_cost(image_workload(model, args.img_size))
    configs = [schedule.at(number) for number in range(args.steps)]
    for config in (space.dense, configs[0]):
        step(config)
    pairs = [(step(space.dense), step(config)) for config in configs]
    share = mean(macs(config) for config in configs) / macs(space.dense)
    ratio = mean(sparse for _, sparse in pairs) / mean(dense for dense, _ in pairs)
    settings = {key.replace("_", " "): value for key, value in vars(args).items()}
    print(json.dumps({
        "device": device_identity(device), "versions": describe_versions(), "settings": settings,
        "dense_ms": round(median(dense for dense, _ in pairs), 1),
        "random_ms": round(median(sparse for _, sparse in pairs), 1),
        "share_of_macs": round(share, 3), "share_of_time": round(ratio, 3), "over_ideal": round(ratio / share - 1, 3),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
