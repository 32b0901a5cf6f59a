"""--dry-run: what a command would do, how large it is and how long it takes; nothing is written."""

from __future__ import annotations

import time
from pathlib import Path

from sparsevit_cli.profiling.latency_table import measure_configs
from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.swin import model_depths, set_sparsity, sparsify_
from sparsevit_cli.training import plan_training

from .session import Session

OPTIMIZER_COPIES = 3
"""A checkpoint of AdamW holds the weights and two moments; an EMA adds one more."""
TIMED_STEPS = 3


def plan_lines(session: Session, command: str) -> list[str]:
    """The plan of `command`, line by line, from three timed passes. Raises what reading the data raises."""
    config = session.config
    folder = Path(config.output) / config.experiment / command
    data = session.data()
    lines = [f"command: {command}", f"folder: {folder}{' (exists)' if folder.exists() else ''}"]
    lines += [f"{name}: {value}" for name, value in data.describe()]
    model = session.model(data.class_names).eval()
    space = session.space(model, config.search.max_ratio)
    macs = macs_cost(model, (config.model.in_chans, *session.img_size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines += [
        f"model: {config.model.name}, {parameters / 1e6:.2f} M parameters, depths {list(model_depths(model))}",
        f"multiply-adds per image: {macs(space.dense) / 1e9:.3f} G dense, {macs(space.sparsest) / 1e9:.3f} G sparsest",
        f"configurations: {space.size}",
    ]
    section = {"pretrain": config.train, "adapt": config.adapt, "finetune": config.finetune}.get(command)
    if section is not None:
        plan = plan_training(section, len(data.train), session.img_size)
        seconds = _step_seconds(session, model, section.batch_size)
        share = sum(p.steps * p.img_size[0] * p.img_size[1] for p in plan.phases) / (
            session.img_size[0] * session.img_size[1]
        )
        copies = OPTIMIZER_COPIES + (section.ema_decay is not None)
        lines += [
            f"steps: {plan.total_steps} of {section.batch_size} images",
            f"estimated time: {share * seconds / 60:.1f} min, from {TIMED_STEPS} timed steps, validation left out",
            f"disk: {(section.keep + 1) * copies * 4 * parameters / 1e6:.0f} MB of checkpoints at most",
        ]
    if command in ("search", "run"):
        dense = measure_configs(
            model, [space.dense], (config.model.in_chans, *session.img_size), batch_size=config.search.batch_size,
            device=session.device, seconds=0.1, rounds=TIMED_STEPS,
        )[space.dense]  # fmt: skip
        search = config.search
        asked = min(search.population * (search.generations + 1), search.max_evaluations or space.size, space.size)
        samples = min(search.samples or len(data.search), len(data.search))
        seconds = asked * samples * dense.median_ms / search.batch_size / 1000
        lines += [
            f"candidates: {asked} at most, {samples} images each",
            f"estimated time of the candidates: {seconds / 60:.1f} min at most, from {TIMED_STEPS} timed batches",
        ]
    return lines


def _step_seconds(session: Session, model: object, batch_size: int) -> float:
    """Seconds of one optimizer step, forward and backward at a middle sparsity, of three timed ones."""
    import torch

    trained = sparsify_(model)  # type: ignore[arg-type]
    set_sparsity(trained, 0.0)
    x = torch.randn(batch_size, session.config.model.in_chans, *session.img_size, device=session.device)
    best = float("inf")
    for _ in range(TIMED_STEPS):
        began = time.perf_counter()
        trained(x).sum().backward()
        best = min(best, time.perf_counter() - began)
    return best
