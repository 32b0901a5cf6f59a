"""evaluate: a checkpoint at given ratios on the validation data."""

from __future__ import annotations

from dataclasses import dataclass

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.runs import RunFolder, missing_result, read_json
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.winner import parse_ratios

from .session import Session, Weights, trained_weights
from .training import score, winner_ratios

TRAININGS = ("finetune", "adapt", "pretrain")
"""Commands that leave weights, the last one first."""


@dataclass(frozen=True)
class EvaluateSummary:
    """Accuracy in percent on the validation data, and multiply-adds per image."""

    folder: RunFolder
    weights: str
    config: SparsityConfig
    top1: float
    loss: float
    count: int
    gmacs: float


def evaluate_checkpoint(session: Session, *, weights: str | None = None, ratios: str | None = None) -> EvaluateSummary:
    """Score `weights` (pretrain, adapt or finetune; default: the last one done) at `ratios` as typed.

    Without ratios: dense for pretrain, else the winner of the search where there is one.
    """
    command, trained = latest_weights(session, weights, "sparsevit evaluate")
    folder = session.folder("evaluate")
    data = session.data(trained)
    model = session.model(trained.class_names, trained).eval()
    config = ratios_to_use(session, model_depths(model), ratios, command)
    set_sparsity(model, config)
    with session.reporter.progress("evaluate", -(-len(data.val) // session.config.data.eval_batch_size)) as progress:
        accuracy = score(session, model, data.val, progress=progress)
    macs = macs_cost(model, (session.config.model.in_chans, *session.img_size))(config)
    folder.set_aside(["metrics.json"], session.reporter)
    folder.write_result(
        {
            "weights": command,
            "weights_sha256": trained.sha256,
            "ratios": config.ratios,
            "top1": accuracy.top1,
            "loss": accuracy.loss,
            "count": accuracy.count,
            "gmacs": macs / 1e9,
            **session.environment,
        }
    )
    return EvaluateSummary(folder, command, config, accuracy.top1, accuracy.loss, accuracy.count, macs / 1e9)


def latest_weights(session: Session, command: str | None, needed_by: str) -> tuple[str, Weights]:
    """The weights of `command`, or of the last training that is done. Raises CheckpointError where there are none."""
    if command is not None and command not in TRAININGS:
        raise ConfigError("--weights", f"{command!r}; allowed are {', '.join(TRAININGS)}", "Name one of them.")
    for name in TRAININGS if command is None else (command,):
        if command is not None or session.earlier(name).result.exists():
            return name, trained_weights(session, name, needed_by)
    raise missing_result(session.earlier("pretrain"), needed_by)


def ratios_to_use(session: Session, depths: tuple[int, ...], typed: str | None, weights: str) -> SparsityConfig:
    """What was typed; else dense for dense weights, the fixed ratios of finetune, or the winner."""
    if typed is not None:
        return parse_ratios(typed, depths)
    if weights == "pretrain":
        return SparsityConfig.dense(depths)
    if weights == "finetune":  # what they were finetuned at, whatever was searched since
        tuned_at = read_json(session.earlier("finetune").path / "sparsity.json")["ratios"]
        return SparsityConfig.from_ratios(tuned_at, depths)
    if session.config.finetune.ratios is not None:
        return SparsityConfig.from_ratios(session.config.finetune.ratios, depths)
    return winner_ratios(session, depths, "sparsevit evaluate")
