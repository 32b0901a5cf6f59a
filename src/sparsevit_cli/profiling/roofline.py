"""The least time a forward could take: every part limited by arithmetic or by memory, whichever is slower.

Parts are the stem, each patch merging, the scoring of a stage, each block as one perfect kernel (its kept rows are read
and written once, its weights read once), and the head. Nothing is launched, cached or latency-bound here.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsevit_cli.swin.geometry import sparsity_or_dense, swin_shape
from sparsevit_cli.windows import num_keep, window_grid

from .macs import block_macs
from .workload import Workload


@dataclass(frozen=True)
class Peak:
    """What a device reaches at best: 10^12 operations per second by precision, and terabytes per second."""

    tflops: dict[str, float]
    terabytes: float


PEAKS = {
    "NVIDIA H100": Peak({"bf16": 800.0, "fp16": 800.0}, 3.0),
    "NVIDIA H200": Peak({"bf16": 800.0, "fp16": 800.0}, 4.3),
    "NVIDIA A100-SXM4-80GB": Peak({"bf16": 255.0, "fp16": 255.0}, 1.8),
    "NVIDIA RTX A6000": Peak({"bf16": 155.0, "fp16": 155.0}, 0.77),
}
"""By the beginning of a device's name; matrix units on dense operands, as sustained rather than as printed. H200 and
A100 by their data sheets, at the H100's shares: 0.81 of the arithmetic, 0.9 of the memory bandwidth.
"""

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def known_peak(device_name: str, precision: str) -> Peak | None:
    """The peak of a device, None where it is not known for this precision."""
    found = next((peak for name, peak in PEAKS.items() if device_name.startswith(name)), None)
    return found if found is not None and precision in found.tflops else None


def roofline_ms(workload: Workload, peak: Peak, precision: str) -> float:
    """Milliseconds of one batch of a timm Swin at the ratios it is set to.

    Modules around the Swin inside the workload's model are left out. Raises ConfigError.
    """
    model, image, batch = workload.model, workload.image_size, workload.batch
    size, shape = _BYTES[precision], swin_shape(model, image)
    entering = shape.patches * shape.stem_channels  # values of the map that enters the next part
    parts = [
        (shape.patches * shape.stem_weights, shape.in_channels * image[0] * image[1] + entering, shape.stem_weights)
    ]
    for stage, tenths in zip(shape.stages, sparsity_or_dense(model).tenths, strict=True):
        leaving = stage.tokens * stage.channels
        if stage.merging_weights:
            parts.append((stage.tokens * stage.merging_weights, entering + leaving, stage.merging_weights))
        if any(tenths):
            parts.append((0, leaving, 0))
        for number, block in enumerate(stage.blocks):
            rows, cols = window_grid(stage.height, stage.width, block.window)
            kept = num_keep(rows * cols, tenths[number // 2])
            tokens = min(kept * block.window_area, stage.tokens)
            macs = block_macs(block, stage.height, stage.width, tenths[number // 2])
            parts.append((macs, 2 * tokens * stage.channels, block.weights))
        entering = leaving
    parts.append((shape.head_weights, entering, shape.head_weights))
    operations, memory = 1e12 * peak.tflops[precision], 1e12 * peak.terabytes
    seconds = (max(2 * batch * m / operations, size * (batch * moved + w) / memory) for m, moved, w in parts)
    return 1e3 * float(sum(seconds))
