"""evaluate: a checkpoint at given ratios on the validation data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.profiling.macs import macs_cost
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.tasks.task import Metric, Score
from sparsevit_cli.winner import parse_ratios

from .session import Session, Weights
from .training import score, winner_ratios
from .weights import chosen_weights


@dataclass(frozen=True)
class EvaluateSummary:
    """Score on the validation data, and multiply-adds per image."""

    folder: RunFolder
    weights: str
    config: SparsityConfig
    metric: Metric
    score: Score
    gmacs: float


def evaluate_checkpoint(session: Session, *, weights: str | None = None, ratios: str | None = None) -> EvaluateSummary:
    """Score `weights` (pretrain, adapt, finetune or a path; default: the last one done) at `ratios` as typed.

    Without ratios: what the weights were finetuned at, the winner for those of adapt, dense for all others.
    """
    trained = chosen_weights(session, weights, "sparsevit evaluate")
    data = session.data(trained)
    model = session.model(data.categories, trained).eval()
    config = ratios_to_use(session, model_depths(model), ratios, trained)
    folder = session.folder("evaluate")
    set_sparsity(model, config)
    with session.reporter.progress("evaluate", -(-len(data.val) // session.config.data.eval_batch_size)) as progress:
        check = partial(session.stop.check, "evaluate", "nothing of this evaluation is saved")
        found = score(session, model, data.val, progress=progress, before_batch=check)
    macs = macs_cost(session.workload(model))(config)
    folder.set_aside(["metrics.json"], session.reporter)
    folder.write_result(
        {
            "weights": trained.name,
            "weights_sha256": trained.sha256,
            "ratios": config.ratios,
            **session.task.about(),
            "score": found.value,
            "scores": found.values,
            "count": found.count,
            "gmacs": macs / 1e9,
            **session.environment,
        }
    )
    return EvaluateSummary(folder, trained.name, config, session.task.metric, found, macs / 1e9)


def ratios_to_use(session: Session, depths: tuple[int, ...], typed: str | None, weights: Weights) -> SparsityConfig:
    """What was typed; else what finetune trained at, the winner for adapted weights, dense for all others."""
    if typed is not None:
        return parse_ratios(typed, depths)
    if weights.name == "finetune":  # whatever was searched since
        path = session.earlier("finetune").path / "sparsity.json"
        with understood(path, f"Type: {session.earlier('finetune').typed}"):
            return SparsityConfig.from_ratios(read_json(path)["ratios"], depths)
    if weights.name != "adapt":
        session.reporter.say(
            f"weights of {weights.name}: no ratios are given, all windows are computed (--ratios 0.6 prunes)"
        )
        return SparsityConfig.dense(depths)
    if session.config.finetune.ratios is not None:
        return SparsityConfig.from_ratios(session.config.finetune.ratios, depths)
    return winner_ratios(session, depths, "sparsevit evaluate")
