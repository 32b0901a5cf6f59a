"""Dense against sparse in onnxruntime, at the published configuration 2 and at 60 % everywhere.

usage: python benchmarks/onnx_runtime.py [--img-size 672]

Exports a Swin with random weights, checks it against PyTorch, and measures both files in turns at batch 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile

import timm

from sparsevit_cli.exporting import export_model
from sparsevit_cli.profiling.device import describe_versions
from sparsevit_cli.swin import set_sparsity, sparsify_
from sparsevit_cli.workflows.rivals import PUBLISHED, UNIFORM


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--img-size", type=int, default=672)
    args = parser.parse_args()
    found = {}
    for label, ratios in {"config 2": PUBLISHED["config 2"], **UNIFORM}.items():
        model = sparsify_(timm.create_model(args.model, img_size=args.img_size).eval())
        set_sparsity(model, ratios)
        with tempfile.TemporaryDirectory() as folder:
            report = export_model(model, folder, input_size=args.img_size, formats=("onnx",))
        (latency,) = report.latencies
        found[label] = {
            "dense_ms": latency.dense.median_ms,
            **latency.sparse.as_row(),
            "stable": latency.dense.stable and latency.sparse.stable,
        }
    settings = {"model": args.model, "img size": args.img_size, "batch": 1}
    print(json.dumps({"versions": describe_versions(), "settings": settings, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
