"""evaluate: a checkpoint at given ratios, or an exported file as it is, on the validation data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

from torch import nn

from sparsevit_cli.atomic import write_json
from sparsevit_cli.data.source import Data
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.tasks.task import Metric, Score

from .exported import FileRun, find_exported, set_as_exported, with_file
from .ratios import ratios_of_weights
from .scopes import Gmacs, gmacs_of
from .session import Session, Weights
from .training import score
from .weights import chosen_weights

PREDICTIONS = "predictions.json"


@dataclass(frozen=True)
class EvaluateSummary:
    """Score on the validation data, and multiply-adds per image; the backbone's if there are modules around it.

    `runtime` tells how an exported file was run; None for weights in PyTorch.
    """

    folder: RunFolder
    weights: str
    config: SparsityConfig
    metric: Metric
    score: Score
    gmacs: float
    backbone_gmacs: float | None = None
    runtime: FileRun | None = None


def evaluate(
    session: Session, *, weights: str | None = None, ratios: str | None = None, runtime: str | None = None
) -> EvaluateSummary:
    """`evaluate_export` in a `runtime`, else `evaluate_checkpoint`."""
    if runtime is None:
        return evaluate_checkpoint(session, weights=weights, ratios=ratios)
    if ratios is not None:
        got = f"{ratios}, but an exported file computes at its own ratios"
        raise ConfigError("--ratios", got, "Leave it out, or export at those ratios.")
    return evaluate_export(session, runtime, export=weights)


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
    return _scored(session, folder, trained, data, model, config, gmacs_of(session, model)(config), None)


def evaluate_export(session: Session, runtime: str, *, export: str | None = None) -> EvaluateSummary:
    """Score the file that `runtime` takes of a folder (or a file in one, default: the experiment's export).

    What was not exported, the heads of scope `features`, runs in PyTorch with the weights of the folder. Raises
    ConfigError and CheckpointError for what does not belong together, before anything is written.
    """
    exported = find_exported(session, runtime, export)
    data = session.data(exported.weights)
    model = session.model(data.categories, exported.weights).eval()
    set_as_exported(exported.content, model)
    config = exported.content.saved.sparsity
    gmacs = gmacs_of(session, model)(config)
    run = with_file(session, exported, model, data)
    folder = session.folder("evaluate")
    return _scored(session, folder, exported.weights, data, model, config, gmacs, run)


def _scored(
    session: Session,
    folder: RunFolder,
    weights: Weights,
    data: Data,
    model: nn.Module,
    config: SparsityConfig,
    gmacs: Gmacs,
    run: FileRun | None,
) -> EvaluateSummary:
    """Score `model` as it is, and write the result."""
    with session.reporter.progress("evaluate", -(-len(data.val) // session.config.data.eval_batch_size)) as progress:
        check = partial(session.stop.check, "evaluate", "nothing of this evaluation is saved")
        found = score(session, model, data.val, progress=progress, before_batch=check, with_predictions=True)
    folder.set_aside(["metrics.json", PREDICTIONS], session.reporter)
    if found.predictions is not None:
        write_json(folder.path / PREDICTIONS, found.predictions)
    folder.write_result(
        {
            "weights": weights.told,
            "weights_sha256": weights.sha256,
            "ratios": config.ratios,
            "runtime": None if run is None else asdict(run),
            **session.task.about(),
            "score": found.value,
            "scores": found.values,
            "count": found.count,
            **gmacs,
            **session.environment,
        }
    )
    return EvaluateSummary(folder, weights.told, config, session.task.metric, found, **gmacs, runtime=run)
