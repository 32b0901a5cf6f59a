"""Which weights to use: those of a finished training of this experiment, or a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sparsevit_cli.atomic import sha256_file
from sparsevit_cli.checkpoints import STATE, Checkpoint, best_checkpoint, load_checkpoint
from sparsevit_cli.commands import LEAVE_WEIGHTS
from sparsevit_cli.config.loading import config_differences, load_config
from sparsevit_cli.config.paths import as_path, is_there
from sparsevit_cli.data.source import Categories
from sparsevit_cli.errors import CheckpointError, ConfigError
from sparsevit_cli.exporting import WEIGHTS, is_export
from sparsevit_cli.models import tell_partition
from sparsevit_cli.runs import RunFolder, missing_result
from sparsevit_cli.runtimes import RUNTIMES
from sparsevit_cli.weights import WeightsFile, read_file, weights_in

from .session import Session, Weights

BEST = "best"
"""What is typed for the step with the best validation score, of the last training."""

_ONLY_TRAINING = ("model.pretrained", "model.checkpoint", "model.reset_head", "model.drop_path_rate",
                  "model.weight_init", "model.img_size")  # fmt: skip
"""Settings of a model that may differ once it is trained."""


def trained_weights(session: Session, command: str, needed_by: str, *, best: bool = False) -> Weights:
    """Weights of a finished training: the averaged ones if an EMA was kept; those of the last step, or of the `best`.

    Warns where the model is set otherwise now. Raises CheckpointError that says which command to type where it was
    not run or not finished.
    """
    folder = session.earlier(command)
    result = folder.read_result()
    if result is None:
        raise missing_result(folder, needed_by)
    _tell_differences(session, folder)
    path: Path | None = folder.path / result.get("checkpoint", "checkpoints")
    if best and (path := best_checkpoint(folder.checkpoints)) is None:
        raise CheckpointError(str(folder.checkpoints), "no checkpoint is marked best", "Leave --weights out.")
    assert path is not None
    checkpoint = load_checkpoint(path, only=("ema", "model"))
    found = _weights(command, checkpoint, Categories.from_saved(result, str(folder.result)), result)
    return replace(found, is_best=best)


def chosen_weights(session: Session, typed: str | None, needed_by: str) -> Weights:
    """Weights as typed: a command of this experiment or a path; None takes the last training that is done.

    `best` takes the step of that training with the best validation score.

    Raises ConfigError for what is neither, CheckpointError where there are none.
    """
    done = (command for command in LEAVE_WEIGHTS if session.earlier(command).result.exists())
    command = next(done, "pretrain") if typed in (None, BEST) else str(typed)
    if command in LEAVE_WEIGHTS:
        return trained_weights(session, command, needed_by, best=typed == BEST)
    path = as_path(command, "--weights")
    if not is_there(path, "--weights"):
        got = f"{path} is no file; allowed are {', '.join(LEAVE_WEIGHTS)}, {BEST} and paths"
        raise ConfigError("--weights", got, "Name a command, a file of weights, or a checkpoint folder.")
    if is_export(path):
        do = f"Give its {WEIGHTS}; or score its files: sparsevit evaluate --runtime {'|'.join(RUNTIMES)}."
        raise ConfigError("--weights", f"{path} is the folder of an export", do)
    weights = file_weights(path, session.reporter.say)
    session.task.check_checkpoint(WeightsFile(str(weights_in(path)), weights.state_dict))
    tell_partition(path, session.config.model.partition, session.reporter.say)
    return weights


def file_weights(path: Path, say: Callable[[str], None] = lambda text: None) -> Weights:
    """Weights of a file, alone or in a folder of transformers; or of a checkpoint of ours, which knows its categories.

    `say` is told what was taken from a file. Raises CheckpointError.
    """
    path = weights_in(path)
    if not os.path.isdir(path):
        file = read_file(path)
        file.tell(say)
        return Weights(str(path), file.tensors, sha256_file(path))
    checkpoint = load_checkpoint(path, only=("ema", "model"))
    identity = checkpoint.state.get("identity", {})
    categories = Categories.from_saved(identity if isinstance(identity, dict) else {}, str(checkpoint.path / STATE))
    return _weights(str(path), checkpoint, categories, {"seed": checkpoint.state.get("seed")})


def _weights(name: str, checkpoint: Checkpoint, categories: Categories, result: dict[str, object]) -> Weights:
    used = "ema" if "ema" in checkpoint.tensors else "model"
    if used not in checkpoint.tensors:
        raise CheckpointError(str(checkpoint.path), "it holds no weights", "Give another checkpoint.")
    digest = sha256_file(checkpoint.path / f"{used}.safetensors")
    return Weights(name, checkpoint.tensors[used], digest, categories, result)


def _tell_differences(session: Session, folder: RunFolder) -> None:
    """One warning where the model that was trained is not the one that the configuration describes now."""
    saved = folder.path / "config.yaml"
    if not saved.exists():
        return
    try:
        trained_with = load_config(saved)
    except ConfigError as fault:
        session.reporter.warn(f"{saved} is of another version ({fault.what}): the model's settings are not compared")
        return
    differing = config_differences(trained_with, session.config, ignore=_ONLY_TRAINING)
    of_model = [line for line in differing if line.startswith("model.")]
    if of_model:
        session.reporter.warn(f"`sparsevit {folder.command}` trained another model: {'; '.join(of_model)}")
