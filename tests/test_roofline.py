"""The least time of a forward, against limits reckoned by hand, with rounder parts, for an H100 and an A6000."""

from __future__ import annotations

import pytest
import timm
import torch

from sparsevit_cli.profiling.roofline import PEAKS, known_peak, roofline_ms
from sparsevit_cli.profiling.workload import image_workload
from sparsevit_cli.sparsity import Ratios
from sparsevit_cli.swin import set_sparsity, sparsify_


@pytest.mark.parametrize(
    ("ratios", "h100_ms", "a6000_ms"),
    [(0, 0.45, 2.24), ([[0.7], [0], [0.2, 0.4, 0.5], [0]], 0.34, 1.66), (0.6, 0.22, 1.06)],
)
def test_limits_of_a_swin_t_at_672_and_batch_4(ratios: Ratios, h100_ms: float, a6000_ms: float) -> None:
    with torch.device("meta"):
        model = sparsify_(timm.create_model("swin_tiny_patch4_window7_224", img_size=672, num_classes=0))
    set_sparsity(model, ratios)
    workload = image_workload(model, 672, 4)
    h100, a6000 = PEAKS["NVIDIA H100"], PEAKS["NVIDIA RTX A6000"]
    assert roofline_ms(workload, h100, "bf16") == pytest.approx(h100_ms, rel=0.15)
    assert roofline_ms(workload, a6000, "bf16") == pytest.approx(a6000_ms, rel=0.15)


def test_a_device_is_known_by_the_beginning_of_its_name() -> None:
    assert known_peak("NVIDIA H100 80GB HBM3", "bf16") is PEAKS["NVIDIA H100"]
    assert known_peak("NVIDIA H100 80GB HBM3", "fp32") is None
    assert known_peak("AMD EPYC", "bf16") is None
