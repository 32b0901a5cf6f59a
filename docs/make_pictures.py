"""Draw docs/kept_windows.png: which windows of a validation image the winner of `make demo` computes, per stage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparsevit_cli.config.loading import load_config
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.swin import model_depths, set_sparsity, sparse_stages
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.training import winner_ratios
from sparsevit_cli.workflows.weights import trained_weights

IMAGES = (3, 11)
OUTPUT = Path(__file__).parent / "kept_windows.png"


def kept_pixels(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Per stage a map (B, H, W) in 0-1: the share of the stage's blocks that compute a token."""
    maps: list[torch.Tensor] = []

    def record(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stage: int) -> None:
        batch, height, width, _ = args[0].shape
        kept = torch.ones(batch * height * width + 1)
        if (rows := kwargs.get("rows")) is not None:
            kept.zero_()[rows.flatten()] = 1.0  # of all images; padding is the last one
        maps_of[stage].append(kept[:-1].view(batch, height, width))

    stages = sparse_stages(model)
    maps_of: list[list[torch.Tensor]] = [[] for _ in stages]
    hooks = [
        block.register_forward_pre_hook(lambda b, a, k, n=number: record(b, a, k, n), with_kwargs=True)
        for number, stage in enumerate(stages)
        for block in stage.blocks
    ]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    maps += [torch.stack(of_stage).mean(0) for of_stage in maps_of]
    return maps


def main(config_path: str, output_folder: str) -> None:
    """Draw from a finished run."""
    config = load_config(Path(config_path), [f"output={output_folder}"])
    session = Session(config, SilentReporter())
    weights = trained_weights(session, "finetune", "the picture")
    data = session.data(weights)
    model = session.model(weights.class_names, weights).eval()
    winner = winner_ratios(session, model_depths(model), "the picture")
    set_sparsity(model, winner)
    images = torch.stack([data.val[index][0] for index in IMAGES])
    maps = kept_pixels(model, images)
    figure = Figure(figsize=(2.6 * (len(maps) + 1), 2.9 * len(IMAGES)), layout="constrained")
    grid = figure.subplots(len(IMAGES), len(maps) + 1)
    for row, image in enumerate(images):
        grey = image.mean(0)
        grey = (grey - grey.min()) / (grey.max() - grey.min())
        grid[row][0].imshow(grey, cmap="gray")
        for stage, kept in enumerate(maps):
            share = torch.nn.functional.interpolate(kept[None, row : row + 1], grey.shape, mode="nearest")[0, 0]
            grid[row][stage + 1].imshow(grey * (0.25 + 0.75 * share), cmap="gray", vmin=0, vmax=1)
            grid[row][stage + 1].imshow(
                torch.ones_like(grey), cmap="summer", alpha=(0.22 * share).numpy(), vmin=0, vmax=1
            )
    titles = ["input"] + [
        f"stage {n + 1}: skips {', '.join(f'{r:.0%}' for r in stage)}" for n, stage in enumerate(winner.ratios)
    ]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    for axes in grid.flat:
        axes.set_axis_off()
    FigureCanvasAgg(figure).print_png(str(OUTPUT))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ("configs/digits.yaml", "runs")))
