"""Our outputs against those of the authors' own implementation (fp32, CPU), at the published configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsevit_cli.swin import set_sparsity, sparsify_
from tiny import tiny_swin

REFERENCE = Path(__file__).parent / "data" / "swin24_448.npz"
SIZE = 448
CONFIGS = {"dense": 0.0, "cfg1": [[0.3], [0], [0.1, 0.2, 0.2], [0]]}


def reference_model() -> torch.nn.Module:
    """The reference's model, its weights a closed formula of parameter number and flat index."""
    model = tiny_swin(img_size=SIZE, embed_dim=24, depths=(2, 2, 6, 2), num_classes=0, drop_path_rate=0).eval()
    for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
        at = np.arange(parameter.numel(), dtype=np.float64)
        value = np.sin(0.7311 * at + 1.37 * number) + 0.5 * np.cos(0.0913 * at + 0.77 * number)
        if "norm" in name and name.endswith("weight"):
            weight = 1 + 0.1 * value
        elif parameter.dim() > 1:
            weight = 1.2 * value / np.sqrt(parameter[0].numel())
        else:
            weight = 0.1 * value
        parameter.data = torch.from_numpy(weight.astype(np.float32)).view_as(parameter)
    return model


def reference_images() -> torch.Tensor:
    """Two smooth images with one textured spot each."""
    y, x = np.meshgrid(np.arange(SIZE, dtype=np.float64), np.arange(SIZE, dtype=np.float64), indexing="ij")
    planes = [
        0.3 * np.sin(0.031 * (c + 1) * x + b)
        + 0.3 * np.cos(0.017 * (c + 2) * y - b)
        + 2
        * np.exp(-((x - SIZE * (0.3 + 0.2 * b)) ** 2 + (y - SIZE * (0.6 - 0.15 * b)) ** 2) / (2 * (0.11 * SIZE) ** 2))
        * np.sin(0.9 * x + 0.7 * y + c)
        + 0.2 * np.sin(0.0131 * x * y + c + b)
        for b in range(2)
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(planes).reshape(2, 3, SIZE, SIZE).astype(np.float32))


@pytest.mark.parametrize("name", CONFIGS)
def test_stage_outputs_equal_the_authors(name: str) -> None:
    expected = np.load(REFERENCE)
    model = sparsify_(reference_model())
    set_sparsity(model, CONFIGS[name])
    with torch.no_grad():
        _, stages = model.forward_intermediates(reference_images())
    for number, stage in enumerate(stages):
        output = stage.permute(0, 2, 3, 1).flatten()  # (B, H, W, C)
        picked = output[torch.linspace(0, output.numel() - 1, 509).long()]
        np.testing.assert_allclose(picked, expected[f"{name}_{number}"], atol=1e-5, rtol=1e-5)
        norms = [output.norm(), output.mean(), output.abs().max()]
        np.testing.assert_allclose(norms, expected[f"{name}_{number}_norm"], atol=1e-5, rtol=1e-5)
