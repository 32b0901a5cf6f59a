"""What is small enough for tests: a Swin of a few channels, and a whole experiment on 32-pixel digits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from sparsevit_cli.config.classification import DigitsData, FolderData, LabelledData, TimmData
from sparsevit_cli.config.experiment import ExperimentConfig
from sparsevit_cli.config.tasks import type_of
from sparsevit_cli.config.yaml_loader import Document

if TYPE_CHECKING:
    from sparsevit_cli.workflows.session import Session

TINY: dict[str, Any] = {
    "experiment": "tiny",
    "device": "cpu",
    "model": {
        "img_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 2,
        "always_partition": True, "weight_init": "jax", "global_pool": "max", "drop_path_rate": 0.2,
    },
    "data": {"eval_batch_size": 128, "digits": {"digit_min": 12, "digit_max": 16}},
    "train": {"epochs": 0.3, "batch_size": 32, "eval_every": 0.15, "save_every": 0.15, "ema_decay": 0.9},
    "adapt": {"epochs": 0.2, "batch_size": 32, "lr": 1e-4, "check_ratios": [0.5], "check_random": 1, "distill": 0.5},
    "finetune": {"epochs": 0.2, "batch_size": 32, "lr": 1e-4},
    "search": {
        "budget_macs": "70%", "max_evaluations": 8, "samples": 32, "finalists": 2,
        "seconds": 0.01, "holdout": 2,
    },
    "profile": {"batch_sizes": [1, 2], "seconds": 0.02, "rounds": 6, "max_spread": 100.0},
    "clock": {"wait": 0, "max_neighbour": 1000.0, "max_spread": 1000.0},
    "export": {"formats": ["pt2"], "latency": False},
}  # fmt: skip


SWIN = "swin_tiny_patch4_window7_224"


def tiny_swin(
    name: str = SWIN, *, embed_dim: int = 16, depths: tuple[int, ...] = (2, 2, 4, 2), seed: int = 0, **arguments: Any
) -> nn.Module:
    """timm's dense Swin `name`, narrow, as timm leaves it: in training mode, with 1, 2, 4 ... heads and 5 classes.

    `arguments` are further ones of timm.create_model. The global generator starts at `seed`: equal calls give equal
    weights.
    """
    torch.manual_seed(seed)
    heads = tuple(2**stage for stage in range(len(depths)))
    sizes: dict[str, Any] = {"embed_dim": embed_dim, "depths": depths, "num_heads": heads, "num_classes": 5}
    model: nn.Module = timm.create_model(name, **sizes | arguments)
    return model


def tiny_config(**sections: Any) -> ExperimentConfig:
    """TINY with fields of sections replaced: tiny_config(train={"lr": 1.0})."""
    merged = {
        name: ({**value, **sections[name]} if isinstance(value, dict) and name in sections else value)
        for name, value in TINY.items()
    }
    merged |= {name: value for name, value in sections.items() if name not in merged}
    if merged["data"].get("source", "digits") != "digits" and "digits" not in sections.get("data", {}):
        del merged["data"]["digits"]
    return type_of(Document(merged, {})).model_validate_json(json.dumps(merged))


def data_section(source: str, **fields: Any) -> DigitsData | LabelledData:
    """The data section of a source; a data set's name matters to timm alone."""
    if source == "digits":
        return DigitsData(**fields)
    dataset = fields.pop("dataset", "folder")
    return FolderData(**fields) if source == "folder" else TimmData(dataset=dataset, **fields)


def write_tiny(folder: Path, **sections: Any) -> Path:
    """TINY as a YAML file (JSON is YAML)."""
    path = folder / "tiny.yaml"
    path.write_text(tiny_config(**sections).model_dump_json(), encoding="utf-8")
    return path


def train_in(runs: Path, session_in: Callable[[Path], Session], *trainings: Callable[[Session], object]) -> Path:
    """The folder, in which these are done one after the other, each in a session of its own."""
    for training in trainings:
        session = session_in(runs)
        training(session)
        session.locks.close()
    return runs


def shaken_(model: nn.Module) -> None:
    """Move all weights by draws of torch's generator, so that every branch matters."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "logit_scale" not in key:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(1 + 0.05 * torch.randn_like(module.weight))
