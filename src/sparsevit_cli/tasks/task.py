"""The task contract: what a model is trained for. Training, evaluation and all commands know this, and no task."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from sparsevit_cli.backbones import LEVELS, SwinBackbone, build_backbone
from sparsevit_cli.config.experiment import ExperimentConfig, LoopSection, ModelSection, Scope
from sparsevit_cli.config.kind import Kind
from sparsevit_cli.config.paths import as_path
from sparsevit_cli.config.tasks import add_task, task_class
from sparsevit_cli.data.preprocessing import Preprocessing
from sparsevit_cli.data.shrunk import Scale
from sparsevit_cli.data.source import Batch, Categories, Data, Source
from sparsevit_cli.errors import ConfigError, in_one_line, pass_on
from sparsevit_cli.models import build_model, tell_partition
from sparsevit_cli.seeding import derive_seed, seeded
from sparsevit_cli.sizes import ImageSize, Size, as_pair, size_text
from sparsevit_cli.swin.geometry import trunk
from sparsevit_cli.weights import WeightsFile, fitted, load_state, read_file

M = TypeVar("M", bound=nn.Module)

POSTPROCESSING = "post-processing"
"""Name of the part in which a model makes answers of what its heads gave: overlapping boxes are suppressed there."""


@dataclass(frozen=True)
class Metric:
    """The number by which models are compared; higher is better.

    `key` names it in files, `label` and `unit` on the terminal, where it has `digits` behind the point.
    `mean_over_images` is true if it is the mean of what each image alone would get, as an accuracy is and an AP is not.
    """

    key: str
    label: str
    unit: str = "%"
    digits: int = 2
    mean_over_images: bool = False

    @property
    def column(self) -> str:
        """Head of a column: `top-1 %`."""
        return f"{self.label} {self.unit}".rstrip()

    def text(self, value: float) -> str:
        """`94.29`"""
        return f"{value:.{self.digits}f}"

    def told(self, value: float) -> str:
        """`top-1 94.29 %`"""
        return f"{self.label} {self.text(value)} {self.unit}".rstrip()


@dataclass(frozen=True)
class Score:
    """What a model reached over `count` samples, each counted once: the metric's `value`, and all `values` by name.

    `predictions` is JSON for other people's tools, if it was asked for and the task's scorer has any.
    """

    value: float
    values: Mapping[str, float]
    count: int
    predictions: Any = None


class Scorer(Protocol):
    """Adds up batches; timm's evaluators have this shape.

    One with a method `predictions()` gives JSON in the form that tools of its field read; `evaluate` writes it. One
    with a method `add(other)` takes in all that another one of its class took in: a metric that is no mean over images
    gets a standard error by it.
    """

    def update(self, outputs: Any, batch: Batch) -> None:
        """Take in what the model gave for a batch, both on the model's device."""

    def compute(self) -> Mapping[str, float]:
        """The numbers by name, the task's metric among them. Raises NothingToScoreError where images hold no truth."""


@dataclass(frozen=True)
class BuildOptions:
    """How a model is built, whatever the task.

    Parameters that are drawn are a function of `seed`. `img_size` replaces the configuration's. Weights `like` these
    will be loaded: their shapes tell what categories do not. Without `initial_weights` those that the configuration
    names are left out. `say` is told what was taken from a file.
    """

    seed: int = 0
    img_size: Size | None = None
    like: Mapping[str, Tensor] | None = None
    initial_weights: bool = True
    say: Callable[[str], None] = lambda text: None


class Task(ABC):
    """One experiment's task. A subclass says what its data, model, loss and score are; the rest has defaults.

    `name` stands in `task.name` of configurations. `per` is what costs and latencies are told per: image, sample, or a
    window of an image (see `per_image`).
    """

    name: ClassVar[str]
    metric: Metric
    per: str = "image"
    counted: ClassVar[str] = "images"
    """What `category_counts` counts: images, objects or pixels."""
    around: ClassVar[tuple[str, ...]] = ()
    """Starts of the names of parameters around the Swin, for a model that has such: weights with one are of a whole."""
    finishing: str = ""
    """What `finish` does, in two or three words; empty if it does nothing."""
    classifiers: ClassVar[tuple[str, ...]] = ()
    """Starts of the names of those whose shape depends on the categories: `model.reset_head` leaves them new."""
    kind: ClassVar[Kind] = Kind()
    """The sections of its experiments; a task adds settings by types of its own."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config

    @property
    def image_size(self) -> Size:
        """Height and width in pixels of what the model is built for."""
        return as_pair(self.config.model.img_size)

    # -- what a task must say -----------------------------------------------------------------------------------

    @abstractmethod
    def data(self, *, seed: int, categories: Categories | None) -> Data:
        """The three splits, categories in the order of `categories` if given. Raises DataError, ConfigError."""

    @abstractmethod
    def build(self, categories: Categories | None, options: BuildOptions) -> nn.Module:
        """The dense model; `model(batch.inputs)` in evaluation mode is inference.

        `categories` are None if only the architecture matters. Raises ConfigError, CheckpointError.
        """

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Batch, section: LoopSection, teacher: nn.Module | None
    ) -> Mapping[str, Tensor]:
        """Losses by name, whose sum is minimised, each a mean over what `weight` counts in the batch."""

    @abstractmethod
    def scorer(self, source: Source, device: torch.device) -> Scorer:
        """A fresh scorer for samples of `source`."""

    # -- what most tasks leave as it is -------------------------------------------------------------------------

    def weight(self, batch: Batch) -> float:
        """How much a batch counts: its images, unless losses are means over boxes or pixels.

        A step that is split into parts weighs each part by its share, so that the split cannot change the training.
        """
        return len(batch)

    def training_source(self, data: Data, section: LoopSection) -> Source:
        """The training samples, with what `section` says of their batches (mixup)."""
        return data.train

    @functools.cached_property
    def checkpoint_is_whole(self) -> bool:
        """True if `model.checkpoint` gives every weight, so that nothing must be pretrained; a backbone's does not."""
        return not self.around or self._holds_whole

    def check_checkpoint(self, file: WeightsFile) -> None:  # noqa: B027 - shapes tell most
        """Raises CheckpointError if the weights of a whole model do not go with the configuration, though they fit."""

    def wants_teacher(self, section: LoopSection) -> bool:
        """True if `loss` learns from the dense model too."""
        return False

    def example(self, size: Size, batch_size: int, *, seed: int = 0) -> Any:
        """Inputs to measure on: noise (B, C, H, W) of `seed`."""
        shape = (batch_size, self.config.model.in_chans, *size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def backbone(self, model: nn.Module) -> nn.Module:
        """The part that scope `backbone` means: the Swin with the norms of its levels. It takes images (B, C, H, W)."""
        return model

    def features(self, model: nn.Module) -> nn.Module:
        """Backbone and neck: what is exported if the whole model cannot be. It takes images (B, C, H, W)."""
        return self.backbone(model)

    def parts(self, model: nn.Module) -> Mapping[str, Sequence[nn.Module]]:
        """What a profile tells times and multiply-adds of, in the order of the forward pass; no module in two parts.

        What runs in none of them is told as `rest`. Empty if the backbone is everything.
        """
        return {}

    def per_image(self, size: Size, scale: Scale | None = None) -> float:
        """How many of what costs are `per`, of `size` pixels, an image of the validation split takes on average.

        1 if costs are per image. `scale` shrinks the images, as it does for a smaller rival. Raises DataError if that
        hangs on data that are not there.
        """
        return 1.0

    def finish(self, outputs: Any, size: Size) -> Any:
        """What follows the model for those who use it, at images of `size` (height, width) pixels: masks pasted.

        A profile tells its time beside the model's, under the words of `finishing`. Nothing follows by default.
        """
        return outputs

    def takes(self, model: nn.Module, size: Size) -> bool:
        """False if what stands around the Swin cannot take images of `size`: no smaller rival gets them."""
        return True

    def at_full_load(self, model: nn.Module) -> AbstractContextManager[object]:
        """Let `model` do as much inside the block as an image may ask of it: costs are measured so.

        By default nothing is changed. A detector takes its threshold of scores away, and puts it back: else its heads
        would have nothing to do with weights that find nothing.
        """
        return nullcontext()

    def category_counts(self, batch: Batch, categories: Categories) -> Tensor | None:
        """(categories,) int64: how many examples of each a batch holds, in what `counted` names; None if none told."""
        return None

    def picture(self, source: Source, index: int) -> Image.Image:
        """A sample as the model gets it, with its truth drawn on it, for people.

        Raises UnreadableImageError, ConfigError for a task that draws none.
        """
        raise ConfigError(f"task {self.name}", "it draws no samples", "Write its method picture(source, index).")

    def timm_model(self, like: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
        """Name and arguments for timm.create_model of a model of weights `like`; None if timm cannot build it alone."""
        return None

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation per channel with which images of 0 to 1 are normalised; None if there are no files."""
        return None

    def preprocessing(self) -> Preprocessing | None:
        """What evaluation makes of an image file, for programs that serve an export; None if there are no files."""
        return None

    def images_in(self, inputs: Any) -> Tensor | None:
        """Of the inputs of a batch what an exported whole model takes: images (B, C, H, W); None if they have none."""
        return inputs if isinstance(inputs, Tensor) and inputs.ndim == 4 else None

    def replace_features_(self, model: nn.Module, run: Callable[[Tensor], Any]) -> None:
        """Let `run` compute what `exported_features` of `model` does; everything around it stays as it is.

        `run` takes images (B, C, H, W). Raises ConfigError for features that are no module inside the model.
        """
        features = self.exported_features(model)
        if not any(module is features for module in model.modules()):
            got = f"its features are no module inside {type(model).__name__}"
            raise ConfigError(f"task {self.name}", got, "Write its method replace_features_(model, run).")
        features.forward = lambda images, *_, **__: run(images)

    # -- said once, for all of them -----------------------------------------------------------------------------

    def exported_features(self, model: nn.Module) -> nn.Module:
        """What export scope `features` means: `features(model)`; of a task that names none, the Swin."""
        named = self.features(model)
        return trunk(model) if named is model else named

    def replace_model_(self, model: nn.Module, run: Callable[[Tensor], Any]) -> None:
        """Let `run` compute what `model` gives for images (B, C, H, W); other inputs find the model's own way to it."""
        own = model.forward

        def forward(inputs: Any, *others: Any, **named: Any) -> Any:
            images = self.images_in(inputs)
            return own(inputs, *others, **named) if images is None else run(images)

        model.forward = forward

    def swin(self, outputs: int, options: BuildOptions, *, any_size: bool = False) -> nn.Module:
        """The configuration's timm Swin with `outputs` outputs; 0 gives its pooled features, without a head."""
        return build_model(
            self._section(options), outputs, img_size=options.img_size, seed=options.seed, any_size=any_size,
            say=options.say,
        )  # fmt: skip

    def swin_backbone(
        self, options: BuildOptions, levels: Sequence[int] | None = None, file: WeightsFile | None = None
    ) -> SwinBackbone:
        """The configuration's timm Swin as a backbone that gives the maps of `levels`, by default of all stages.

        `file` is what `model.checkpoint` holds, if it was read already. See `build_backbone`.
        """
        levels = range(len(self.config.model.depths or LEVELS)) if levels is None else levels
        return build_backbone(
            self._section(options), levels, img_size=options.img_size, seed=options.seed, say=options.say, file=file
        )

    def on_backbone(self, options: BuildOptions, make: Callable[[SwinBackbone], M]) -> M:
        """The model that `make` puts around `swin_backbone`. What it draws is a function of the seed.

        `model.checkpoint` may be that of a backbone, or of a whole model, which has a tensor of `around`: a file, a
        checkpoint folder of ours, a folder of transformers. Raises ConfigError, CheckpointError.
        """
        file = self._checkpoint if options.initial_weights else None
        whole = file if file is not None and self._holds_whole else None
        if whole is None:
            backbone = self.swin_backbone(options, file=file)
        else:
            backbone = self.swin_backbone(replace(options, initial_weights=False))
        self.__dict__.pop("_checkpoint", None)  # used: a second copy of all weights would stay in memory
        with seeded(derive_seed(options.seed, "heads")):
            model = make(backbone)
        if whole is not None:
            section, own = self.config.model, model.state_dict()
            tensors = fitted(whole.tensors, model, whole.path, options.say, partition=section.partition)
            if section.reset_head:  # categories of its own where their number differs
                new = {key for key in tensors if key.startswith(self.classifiers) and key in own}
                tensors |= {key: own[key] for key in new if own[key].shape != tensors[key].shape}
            load_state(model, tensors, whole.path)
            tell_partition(Path(whole.path), section.partition, options.say)
            options.say(f"{whole.path}: all weights are taken from it")
        return model

    @functools.cached_property
    def _checkpoint(self) -> WeightsFile | None:
        """The weights in `model.checkpoint`, read once and kept until a model is built. Raises CheckpointError."""
        if self.config.model.checkpoint is None:
            return None
        return read_file(as_path(self.config.model.checkpoint, "model.checkpoint"))

    @functools.cached_property
    def _holds_whole(self) -> bool:
        """True if the weights in `model.checkpoint` are of a whole model. Raises CheckpointError."""
        file = self._checkpoint
        if file is None or not any(key.startswith(self.around) for key in file.tensors):
            return False
        self.check_checkpoint(file)
        return True

    def check_sizes(self, divisor: int, others: Mapping[str, ImageSize] = MappingProxyType({})) -> None:
        """Raises ConfigError for image sizes that a backbone's `divisor` does not divide; see `image_sizes`."""
        for what, size in self.image_sizes(others).items():
            if any(side % divisor for side in size):
                got = f"{size_text(size)} pixels; the stages need multiples of {divisor}"
                raise ConfigError(what, got, "Round it.")

    def image_sizes(self, others: Mapping[str, ImageSize] = MappingProxyType({})) -> dict[str, Size]:
        """Height and width of images by the name of the setting: of the model, all phases of training, and `others`."""
        config = self.config
        sections = {"train": config.train, "adapt": config.adapt, "finetune": config.finetune}
        phases = {
            f"{name}.curriculum.{number}.img_size": phase.img_size
            for name, section in sections.items()
            for number, phase in enumerate(section.curriculum)
        }
        found = {"model.img_size": config.model.img_size} | phases | dict(others)
        return {what: as_pair(size) for what, size in found.items()}

    def _section(self, options: BuildOptions) -> ModelSection:
        section = self.config.model
        named = {} if options.initial_weights else {"pretrained": False, "checkpoint": None}
        return section.model_copy(update=named)

    def scopes(self, model: nn.Module) -> tuple[Scope, ...]:
        """What costs of `model` are told of: the backbone and the whole, or the whole alone if it is the backbone."""
        return ("model",) if self.backbone(model) is model else ("backbone", "model")

    def about(self, scope: Scope = "model") -> dict[str, str]:
        """What every record carries: task, metric, and what costs stand for."""
        return {"task": self.name, "metric": self.metric.key, "scope": scope, "per": self.per}


def task_of(config: ExperimentConfig) -> Task:
    """The task that a configuration names. Raises ConfigError."""
    found: Task = task_class(config.task.name)(config)
    return found


def load_task(text: str) -> str:
    """Run a user's file, `path/file.py:Class`, make its task known, and return its name. Raises ConfigError.

    Only what is typed on the command line comes here: no configuration names code.
    """
    path_text, colon, name = text.rpartition(":")
    path = as_path(path_text, "--task") if colon else None
    if path is None or path.suffix != ".py" or not name.isidentifier():
        raise ConfigError("--task", f"{text!r} is no task", "Write path/file.py:Class.")
    if not path.is_file():
        raise ConfigError("--task", f"there is no file {path}", "Check the path.")
    task = getattr(_run_file(path.resolve()), name, None)
    if not (isinstance(task, type) and issubclass(task, Task)):
        got = f"{path} has no class {name} that is a sparsevit_cli.tasks.task.Task"
        raise ConfigError("--task", got, "Name one.")
    missing = [each for each in ("name", "metric") if not hasattr(task, each)]
    missing += sorted(getattr(task, "__abstractmethods__", ()))
    if missing or not re.fullmatch(r"[a-z][a-z0-9_]*", str(task.name)):
        got = f"{name} lacks {', '.join(missing)}" if missing else f"{name}.name is {task.name!r}"
        raise ConfigError("--task", got, "See docs/extending.md; a name is lower-case letters, digits and `_`.")
    add_task(task)
    return task.name


def typed_task(kind: type[Task]) -> str | None:
    """What `load_task` takes to find a task again that came out of a user's file; None for others."""
    path = _files.get(kind.__module__)
    return None if path is None else f"{path}:{kind.__name__}"


_files: dict[str, Path] = {}
"""Files that `load_task` ran, by the name of their module."""


def _run_file(path: Path) -> ModuleType:
    """The module of a user's file, under the file's own name: loader processes import it. Raises ConfigError."""
    name = path.stem
    there = None if name in _files or not name.isidentifier() else importlib.util.find_spec(name)
    if not name.isidentifier() or (there is not None and there.origin != str(path)):
        got = f"{path.name} has the name of another module, or none that Python can import"
        raise ConfigError("--task", got, "Rename the file.")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: it must hide nothing
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _files[name] = module, path
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        pass_on(error)
        raise ConfigError("--task", f"{path} cannot be run ({in_one_line(error)})", "Correct the file.") from error
    return module
