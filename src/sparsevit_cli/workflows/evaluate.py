"""evaluate: a checkpoint at given ratios on the validation data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sparsevit_cli.atomic import write_json
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.tasks.task import Metric, Score

from .ratios import ratios_of_weights
from .scopes import gmacs_of
from .session import Session
from .training import score
from .weights import chosen_weights

PREDICTIONS = "predictions.json"


@dataclass(frozen=True)
class EvaluateSummary:
    """Score on the validation data, and multiply-adds per image; the backbone's if there are modules around it."""

    folder: RunFolder
    weights: str
    config: SparsityConfig
    metric: Metric
    score: Score
    gmacs: float
    backbone_gmacs: float | None = None


def evaluate_checkpoint(session: Session, *, weights: str | None = None, ratios: str | None = None) -> EvaluateSummary:
    """Score `weights` (pretrain, adapt, finetune or a path; default: the last one done) at `ratios` as typed.

    Without ratios: what the weights were finetuned at, the winner for those of adapt, dense for all others.
    """
    trained = chosen_weights(session, weights, "sparsevit evaluate")
    data = session.data(trained)
    model = session.model(data.categories, trained).eval()
    config = ratios_of_weights(session, model_depths(model), ratios, trained)
    folder = session.folder("evaluate")
    set_sparsity(model, config)
    with session.reporter.progress("evaluate", -(-len(data.val) // session.config.data.eval_batch_size)) as progress:
        check = partial(session.stop.check, "evaluate", "nothing of this evaluation is saved")
        found = score(session, model, data.val, progress=progress, before_batch=check, with_predictions=True)
    gmacs = gmacs_of(session, model)(config)
    folder.set_aside(["metrics.json", PREDICTIONS], session.reporter)
    if found.predictions is not None:
        write_json(folder.path / PREDICTIONS, found.predictions)
    folder.write_result(
        {
            "weights": trained.told,
            "weights_sha256": trained.sha256,
            "ratios": config.ratios,
            **session.task.about(),
            "score": found.value,
            "scores": found.values,
            "count": found.count,
            **gmacs,
            **session.environment,
        }
    )
    return EvaluateSummary(folder, trained.told, config, session.task.metric, found, **gmacs)
