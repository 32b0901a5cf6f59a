"""Draw docs/dropped_window.png, how a block drops windows, and docs/kept_windows.png: which windows of a validation
image the winner of `make demo` computes, per stage.

usage: python docs/make_pictures.py [CONFIG RUNS PICTURE [IMAGE ...]]
The configuration of a finished run, its `output`, the file to write and the validation images to show, by number:
configs/digits.yaml runs docs/kept_windows.png 3 11. docs/meadow.jpg: configs/trees.yaml runs docs/meadow.jpg 0 4 8.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle

from sparsevit_cli import windows
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.swin import model_depths, set_sparsity, sparse_stages
from sparsevit_cli.workflows.ratios import winner_ratios
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.weights import trained_weights

IMAGES = (3, 11)
KEPT = Path(__file__).parent / "kept_windows.png"
DRAWING = Path(__file__).parent / "dropped_window.png"
SIDE, WINDOW, TENTHS = 16, 4, 5
"""The drawing's map of SIDE x SIDE tokens, its windows, and their sparsity ratio in tenths."""


def draw_dropped_window() -> None:
    """One block at a sparsity ratio of a half, on a small map. The windows are those that `windows` really keeps."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    tokens = 0.12 + 0.1 * torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    tokens += torch.exp(-(((y - 6) / 3.4) ** 2 + ((x - 8) / 3.0) ** 2)) + 0.5 * (((x - y) % SIDE == 5) & (y > 9))
    index = windows.window_token_index(SIDE, SIDE, (WINDOW, WINDOW), (0, 0), "roll_first", torch.device("cpu"))
    count = windows.num_keep(len(index), TENTHS)
    scores = windows.window_scores(tokens.flatten()[None], index)
    kept, grid = windows.rank_windows(scores, count)[0].tolist(), SIDE // WINDOW
    corners = [(n % grid * WINDOW - 0.5, n // grid * WINDOW - 0.5) for n in range(len(index))]

    figure = Figure(figsize=(11.5, 2.9))
    panels = [figure.add_axes((0.01 + 0.2 * number, 0.17, 0.165, 0.7)) for number in range(5)]
    told = (
        ("map of a stage", "shade: magnitude of a token\n16 windows of 4 x 4 tokens"),
        ("score every window", "window_scores: once per stage,\nat its first sparse block"),
        ("rank, keep half", "num_keep = 8; a higher ratio\nkeeps a prefix of the ranks"),
        ("compute the kept", "attention and MLP, each window\non its own: an engine's work"),
        ("write them back", "tokens of dropped windows\nkeep their bits"),
    )
    for number, (axes, (title, text)) in enumerate(zip(panels, told, strict=True)):
        axes.set(xlim=(-0.7, SIDE - 0.3), ylim=(SIDE - 0.3, -0.7), aspect="equal")
        axes.set_axis_off()
        axes.set_title(f"{number + 1}. {title}", fontsize=10, weight="bold")
        axes.text(SIDE / 2 - 0.5, SIDE + 0.6, text, ha="center", va="top", fontsize=8.5)
    for axes in (panels[0], panels[4]):
        axes.imshow(tokens, cmap="Greys", vmin=0, vmax=1.6)
    for number, corner in enumerate(corners):
        is_kept, middle = number in kept, (corner[0] + WINDOW / 2, corner[1] + WINDOW / 2)
        centred = {"ha": "center", "va": "center", "fontsize": 9}
        panels[1].text(*middle, f"{scores[0, number]:.1f}", **centred)
        panels[2].text(*middle, f"{kept.index(number) + 1}" if is_kept else "-", **centred)
        for axes, fill in zip(panels, (None, None, is_kept, None, is_kept or None), strict=True):
            colour = {None: "none", True: (0.95, 0.75, 0.1, 0.55), False: "0.88"}[fill]
            if axes is not panels[3]:
                axes.add_patch(Rectangle(corner, WINDOW, WINDOW, fc=colour, ec="0.35", lw=0.8))
    for place, number in enumerate(kept):
        left, top = 2.5 + 6 * (place % 2), 4 * (place // 2) - 0.3
        rows = tokens.flatten()[index[number]].view(WINDOW, WINDOW)
        panels[3].imshow(rows, cmap="Greys", vmin=0, vmax=1.6, extent=(left, left + 3.5, top + 3.5, top))
        panels[3].add_patch(Rectangle((left, top), 3.5, 3.5, fc=(0.95, 0.75, 0.1, 0.4), ec="0.35", lw=0.8))
        panels[3].text(left + 4.0, top + 1.75, f"{place + 1}", va="center", fontsize=9)
    panels[3].set(xlim=(-0.7, SIDE - 0.3), ylim=(SIDE - 0.3, -0.7))
    for first, second in pairwise(panels):
        start, end = (SIDE - 0.2, SIDE / 2 - 0.5), (-0.8, SIDE / 2 - 0.5)
        arrow = ConnectionPatch(
            start, end, "data", "data", axesA=first, axesB=second, arrowstyle="-|>", mutation_scale=14
        )
        arrow.set_annotation_clip(False)  # its ends lie beside the panels
        figure.add_artist(arrow)
    FigureCanvasAgg(figure).print_png(str(DRAWING))


def kept_pixels(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Per stage a map (B, H, W) in 0-1: the share of the stage's blocks that compute a token."""

    def record(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stage: int) -> None:
        batch, height, width, _ = args[0].shape
        computed = torch.ones(batch * height * width + 1)
        if (kept := kwargs.get("kept")) is not None:
            computed.zero_()[kept.rows.flatten()] = 1.0  # of all images; padding is the last one
        maps_of[stage].append(computed[:-1].view(batch, height, width))

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
    return [torch.stack(of_stage).mean(0) for of_stage in maps_of]


def main(config_path: str, runs: str, picture: str, *numbers: str) -> None:
    """Draw `picture` from a finished run."""
    config = load_config(Path(config_path), [f"output={runs}"])
    session = Session(config, SilentReporter())
    weights = trained_weights(session, "finetune", "the picture")
    data = session.data(weights)
    model = session.model(weights.categories, weights).eval()
    winner = winner_ratios(session, model_depths(model), "the picture")
    set_sparsity(model, winner)
    images = torch.stack([data.val[int(number)][0] for number in numbers or IMAGES])
    maps = kept_pixels(model, images)
    figure = Figure(figsize=(2.6 * (len(maps) + 1), 2.6 * len(images) + 0.4), layout="constrained")
    grid = figure.subplots(len(images), len(maps) + 1, squeeze=False)
    for row, image in enumerate(images):
        shown = image.permute(1, 2, 0)  # (H, W, 3)
        shown = (shown - shown.min()) / (shown.max() - shown.min())
        grid[row][0].imshow(shown)
        for stage, kept in enumerate(maps):
            share = torch.nn.functional.interpolate(kept[None, row : row + 1], shown.shape[:2], mode="nearest")[0, 0]
            grid[row][stage + 1].imshow(shown * (0.25 + 0.75 * share[..., None]))
            grid[row][stage + 1].imshow(
                torch.ones_like(share), cmap="summer", alpha=(0.22 * share).numpy(), vmin=0, vmax=1
            )
    titles = ["input"] + [
        f"stage {n + 1}: skips {', '.join(f'{r:.0%}' for r in stage)}" for n, stage in enumerate(winner.ratios)
    ]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    for axes in grid.flat:
        axes.set_axis_off()
    FigureCanvasAgg(figure).print_figure(picture)  # PNG or JPEG, by its name


if __name__ == "__main__":
    draw_dropped_window()
    main(*(sys.argv[1:] or ("configs/digits.yaml", "runs", str(KEPT))))
