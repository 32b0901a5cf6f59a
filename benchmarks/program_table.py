"""How well the latency table of exported programs predicts configurations that it was not made of.

usage: python benchmarks/program_table.py [--runtime openvino] [--precision fp32] [--configs 50] [--fixed 5]

Makes programs of a Swin with random weights whose keep counts are inputs, measures the table, sets its scale by dense,
middle and sparsest as the search does, and then measures random configurations. `--fixed` of them are exported at their
ratios too, as `sparsevit export` does, and both programs are measured in the same rounds: their ratio should be 1.

Printed are the seconds of every step, mean and largest error, and for each stage the milliseconds of a block pair at
each ratio beside the windows it keeps: plateaus show there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import fmean

import timm
import torch

from sparsevit_cli.exporting.adjustable import AdjustablePrograms
from sparsevit_cli.exporting.light import timed_file
from sparsevit_cli.exporting.programs import OPSET, save_onnx, trace
from sparsevit_cli.profiling.device import describe_versions, device_identity
from sparsevit_cli.profiling.latency import measure_interleaved
from sparsevit_cli.profiling.latency_table import program_design
from sparsevit_cli.profiling.neighbours import UNWATCHED, Patience
from sparsevit_cli.profiling.program_table import measure_program_table, measure_programs
from sparsevit_cli.profiling.workload import image_workload
from sparsevit_cli.runtimes import RUNTIMES
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity, sparsify_


class Steps:
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds what the block takes."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--img-size", type=int, default=672)
    parser.add_argument("--runtime", choices=("openvino", "onnxruntime"), default="openvino")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32")
    parser.add_argument("--configs", type=int, default=50, help="random configurations")
    parser.add_argument("--fixed", type=int, default=5, help="of these, also exported at their ratios")
    parser.add_argument("--own-dense", action="store_true", help="measure every stage dense: more programs to make")
    parser.add_argument("--rounds", type=int, default=6, help="of the table")
    parser.add_argument("--check-rounds", type=int, default=10, help="of the random configurations")
    parser.add_argument("--unwatched", action="store_true", help="a trial: beside other work, numbers mean nothing")
    parser.add_argument("--max-spread", type=float, default=0.10)
    args = parser.parse_args()
    steps, runtime = Steps(), RUNTIMES[args.runtime]
    model = sparsify_(timm.create_model(args.model, img_size=args.img_size).eval())
    workload = image_workload(model, args.img_size)
    design = program_design(workload, own_dense=args.own_dense)
    kept = design.kept
    space, rng = SearchSpace(model_depths(model)), Random(0)
    activations = "fp32" if args.precision == "fp32" else runtime.activations()[-1]
    with tempfile.TemporaryDirectory() as name:
        programs = AdjustablePrograms(
            model,
            workload.images,
            [counts[0] for counts in kept],
            runtime,
            Path(name),
            activations=activations,
            eight_bits=args.precision == "int8",
        )

        def load(config: SparsityConfig) -> Callable[[], object]:
            with steps.step("trace and convert"):
                programs.file_of(programs.counts.pattern(config))
            with steps.step("load and compile"):
                program = programs.load(config)
            return lambda: program.run(programs.images)

        settings = {"seconds": 0.01, "max_spread": args.max_spread, **_patience(args)}
        with steps.step("table"):
            table = measure_program_table(load, design, {}, rounds=args.rounds, **settings)
            corners = [space.dense, space.middle, space.sparsest]
            found = measure_programs(load, corners, rounds=args.check_rounds, strict=True, **settings)
            dense_ms = found[space.dense].median_ms
            table = table.calibrated([(config, dense_ms / found[config].speedup) for config in corners])
        table_steps = dict(steps.seconds)
        configs = list(dict.fromkeys(space.sample(rng) for _ in range(2 * args.configs)))[: args.configs]
        with steps.step("random configurations"):
            measured = measure_programs(
                load, [space.dense, *configs], rounds=args.check_rounds, strict=False, **settings
            )
        known = [(config, dense_ms / measured[config].speedup) for config in configs]
        fixed = [
            _fixed(args, model, config, load, runtime, activations, Path(name)) for config in configs[: args.fixed]
        ]
    error = table.fit_error(known)
    rows = sorted((table.predict(config) / ms - 1, str(config)) for config, ms in known)
    document = {
        "versions": describe_versions(),
        "device": device_identity(torch.device("cpu")),
        "settings": vars(args),
        "activations": activations,
        "seconds of the table": table_steps,
        "programs": len(design.configs()),
        "patterns": len(programs._files),
        "dense_ms": dense_ms,
        "sparsest_ms": dense_ms / found[space.sparsest].speedup,
        "configs": error.n,
        "mean_error": error.mean,
        "mean_signed_error": fmean(share for share, _ in rows),
        "largest_error": error.largest,
        "worst": [rows[0], rows[-1]],
        "unsteady": sum(not measured[config].stable for config in configs),
        "bound over fixed": fixed,
        "pair_ms": [
            {"windows": counts, "ms": [round(ms, 3) for ms in stage[0]], "overhead_ms": round(overhead, 3)}
            for counts, stage, overhead in zip(kept, table.pair_ms, table.overhead_ms, strict=True)
        ],
        "base_ms": table.base_ms,
    }
    print(json.dumps(document, indent=1))


def _patience(args: argparse.Namespace) -> dict[str, Patience]:
    return {"patience": UNWATCHED} if args.unwatched else {}


def _fixed(
    args: argparse.Namespace,
    model: torch.nn.Module,
    config: SparsityConfig,
    load: Callable[[SparsityConfig], Callable[[], object]],
    runtime: object,
    activations: str,
    folder: Path,
) -> dict[str, object]:
    """The program whose counts were bound against the export at these ratios, in the same rounds."""
    side, path = args.img_size, folder / "fixed.onnx"
    set_sparsity(model, config)
    save_onnx(trace(model, (3, side, side), ()), path, ["output"], OPSET, {})
    path = timed_file(path, args.runtime, (1, 3, side, side), eight_bits=args.precision == "int8")
    images = torch.randn(1, 3, side, side)
    program = RUNTIMES[args.runtime].load(path, activations=activations, shape=tuple(images.shape))
    found = measure_interleaved(
        {"fixed": lambda: program.run(images), "bound": load(config)},
        device=torch.device("cpu"), seconds=0.01, rounds=args.check_rounds, strict=False, max_spread=args.max_spread,
        **_patience(args),
    )  # fmt: skip
    ratio = 1 / found["bound"].speedup
    return {"ratios": str(config), "bound over fixed": ratio, "stable": found["bound"].stable}


if __name__ == "__main__":
    main()
