"""Which part of a model is exported: what `export.scope` means for a task's model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.exporting import ExportScope, OneImage, runs_on, with_fixed_outputs
from sparsevit_cli.profiling.inputs import evaluating, model_device
from sparsevit_cli.sizes import Size

from .session import Session


@dataclass(frozen=True)
class Part:
    """The part of a model that is exported, and its scope.

    `one_image` is true for a whole model that answers each image, as detectors do. `unless` is exported where
    torch.export cannot trace `module`.
    """

    scope: ExportScope
    module: nn.Module
    one_image: bool = False
    unless: nn.Module | None = None


def exported_part(session: Session, model: nn.Module) -> Part:
    """What `export.scope` means for `model`. Raises ConfigError for a scope that this task's models do not have.

    `auto` is the whole model if it takes a batch of images and gives tensors of fixed number and shape. Else it is
    backbone and neck, as the task names them; of a task that names none it is the Swin.
    """
    task, asked = session.task, session.config.export.scope
    inputs = task.example(session.img_size, 1, seed=session.config.seed)
    takes_images = isinstance(inputs, Tensor) and inputs.ndim == 4
    if asked == "model" and not takes_images:
        got = f"the model of task {task.name} takes a {type(inputs).__name__}, and files take one tensor of images"
        raise ConfigError("export.scope", got, "Set export.scope: features.")
    named = task.features(model)
    features = task.exported_features(model)
    if asked == "features" and features is model:
        got = f"the model of task {task.name} is its Swin: there is no smaller part"
        raise ConfigError("export.scope", got, "Set export.scope: model.")
    one_image = takes_images and asked != "features" and answers_each_image(session, model)
    if asked == "model" or (asked == "auto" and takes_images and not one_image):
        return Part("model", model, one_image, None if asked == "model" or features is model else features)
    if named is model:
        session.reporter.say(f"export: task {task.name} names no `features`: its Swin is exported")
    return Part("features", features)


def answers_each_image(session: Session, model: nn.Module, size: Size | None = None) -> bool:
    """True if the model gives a dict of its own for each image of a batch; `size` is that of its images."""
    size = size or session.img_size

    def images(batch: int) -> Tensor:
        found: Tensor = session.task.example(size, batch, seed=session.config.seed)
        return found.to(model_device(model))

    with evaluating(model), runs_on(size):
        return isinstance(with_fixed_outputs(model, images, (1, 2)), OneImage)
