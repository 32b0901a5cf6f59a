"""The least time a forward could take: every part limited by arithmetic or by memory, whichever is slower.

Parts are the stem, each patch merging, the scoring of a stage, each block as one perfect kernel (its kept rows are read
and written once, its weights read once), and the head. Nothing is launched, cached or latency-bound here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsevit_cli.windows import num_keep, window_grid

from .inputs import InputSize, image_shape, named_stages
from .macs import block_macs, weights_in


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


def roofline_ms(model: nn.Module, input_size: InputSize, batch: int, peak: Peak, precision: str) -> float:
    """Milliseconds of one batch of a timm Swin at the ratios it is set to. Raises ConfigError."""
    channels, *image = image_shape(model, input_size)
    size, trunk = _BYTES[precision], _trunk(model)
    embed = trunk.patch_embed
    height, width = (side // patch for side, patch in zip(image, embed.patch_size, strict=True))
    pixels, out = channels * image[0] * image[1], embed.proj.out_channels
    parts = [(height * width * weights_in(embed), pixels + height * width * out, weights_in(embed))]
    for _, stage in named_stages(model):
        reduction = weights_in(stage.downsample)
        if reduction:
            entering, height, width = height * width * out, (height + 1) // 2, (width + 1) // 2
            out = stage.blocks[0].dim
            parts.append((height * width * reduction, entering + height * width * out, reduction))
        tenths = getattr(stage, "sparsity_tenths", (0,) * len(stage.blocks))
        if any(tenths):
            parts.append((0, height * width * out, 0))
        for number, block in enumerate(stage.blocks):
            rows, cols = window_grid(height, width, block.window_size)
            kept = num_keep(rows * cols, tenths[number // 2])
            tokens = min(kept * block.window_area, height * width)
            parts.append((block_macs(block, height, width, tenths[number // 2]), 2 * tokens * out, weights_in(block)))
    head = getattr(trunk, "head", None)
    parts.append(
        (0 if head is None else weights_in(head), height * width * out, 0 if head is None else weights_in(head))
    )
    operations, memory = 1e12 * peak.tflops[precision], 1e12 * peak.terabytes
    seconds = (max(2 * batch * m / operations, size * (batch * moved + w) / memory) for m, moved, w in parts)
    return 1e3 * float(sum(seconds))


def _trunk(model: nn.Module) -> Any:
    return next(module for module in model.modules() if hasattr(module, "patch_embed"))
