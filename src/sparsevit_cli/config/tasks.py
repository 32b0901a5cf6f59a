"""What each task adds to the sections of an experiment. No torch: a task's code is named here and loaded elsewhere.

A configuration is validated against one concrete type, made for the task and the data source that it names. So every
error, override and line of the reference page speaks of settings that this experiment really has.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from sparsevit_cli.errors import ConfigError, in_one_line, pass_on

from .experiment import (
    AdaptSection,
    Count,
    DataSection,
    ExperimentConfig,
    FinetuneSection,
    Fraction,
    LoopSection,
    ModelSection,
    PathText,
    Positive,
    Section,
    TaskSection,
    Text,
    TrainSection,
)
from .fields import Fields, one_of
from .yaml_loader import Document, Value

ENTRY_POINTS = "sparsevit_cli.tasks"
"""Group under which an installed package offers tasks: name -> class."""
DEFAULT_TASK = "classification"


@dataclass(frozen=True)
class Kind:
    """The sections of one task; `sources` are those of its data by the name of the source, the default one first.

    `home` is where its class is (`module:name`), None if the class was handed in.
    """

    home: str | None = None
    task: type[TaskSection] = TaskSection
    model: type[ModelSection] = ModelSection
    train: type[TrainSection] = TrainSection
    adapt: type[AdaptSection] = AdaptSection
    finetune: type[FinetuneSection] = FinetuneSection
    sources: Mapping[str, type[DataSection]] = field(default_factory=lambda: {"own": DataSection})


# -- classification ---------------------------------------------------------------------------------------------


class ClassificationTask(TaskSection):
    """What the model is trained for."""

    name: Literal["classification"] = Field("classification", description="Name of the task.")


class ClassificationModel(ModelSection):
    """Which timm Swin, and its weights."""

    num_classes: Count | None = Field(None, description="Number of classes; null takes it from the training data.")


class ClassificationLoop(LoopSection):
    """What the loss of a classifier takes, in training, adaptation and finetuning."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Label smoothing.")
    mixup: Annotated[float, Field(ge=0)] = Field(0.0, description="Mixup alpha; 0 is off.")
    cutmix: Annotated[float, Field(ge=0)] = Field(0.0, description="CutMix alpha; 0 is off.")

    @model_validator(mode="after")
    def _mixes_pairs(self) -> Self:
        if (self.mixup or self.cutmix) and self.batch_size < 2:
            raise ValueError("mixup and cutmix need a batch_size of at least 2")
        return self


class ClassificationDistil(ClassificationLoop):
    """A loop that may learn from the dense model."""

    distill: Fraction = Field(0.0, description="Weight of the distillation loss from the dense model; 0 is off.")
    temperature: Positive = Field(2.0, description="Softmax temperature of distillation.")


class ClassificationTrain(TrainSection, ClassificationLoop):
    """Dense training from scratch or from given weights (`sparsevit pretrain`)."""


class ClassificationAdapt(AdaptSection, ClassificationDistil):
    """Sparsity-aware adaptation: a new random configuration at every step (`sparsevit adapt`)."""


class ClassificationFinetune(FinetuneSection, ClassificationDistil):
    """Training with the found configuration fixed (`sparsevit finetune`)."""


class DigitsSection(Section):
    """The embedded data set: scikit-learn's handwritten digits on large cluttered canvases."""

    digit_min: Annotated[int, Field(ge=4)] = Field(16, description="Smallest drawn digit, side in pixels.")
    digit_max: Annotated[int, Field(ge=4)] = Field(24, description="Largest drawn digit, side in pixels.")
    clutter: Fraction = Field(0.5, description="Strength of the background clutter, 0 to 1.")

    @model_validator(mode="after")
    def _ordered(self) -> DigitsSection:
        if self.digit_min > self.digit_max:
            raise ValueError(f"digit_min {self.digit_min} is above digit_max {self.digit_max}")
        return self


class AugmentSection(Section):
    """Augmentation of training images from folders and timm data sets (timm.data.create_transform)."""

    scale_min: Fraction = Field(0.35, description="Smallest share of the image area that a random crop keeps.")
    hflip: Fraction = Field(0.5, description="Probability of a horizontal flip.")
    color_jitter: Fraction = Field(0.0, description="Strength of colour jitter.")
    auto_augment: str | None = Field(
        None,
        pattern=r"^(rand|augmix|original|originalr|v0|v0r|3a)(-[a-z0-9.]+)*$",
        description="timm policy: rand, augmix, original, originalr, v0, v0r or 3a, and its settings, "
        "e.g. `rand-m9-mstd0.5`; null for none.",
    )
    random_erasing: Fraction = Field(0.0, description="Probability of erasing a random box.")


class DigitsData(DataSection):
    """The embedded digits."""

    source: Literal["digits"] = Field("digits", description="Embedded digits.")
    digits: DigitsSection = Field(DigitsSection(), description="What is drawn.")


class LabelledData(DataSection):
    """Image files with one label each."""

    train_split: PathText = Field("train", description="Name of the training split or sub-folder.")
    val_split: PathText = Field("val", description="Name of the validation split or sub-folder.")
    search_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of the training images held out for search: never trained on, never validated on."
    )
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="Per-channel mean of normalised images, 0-1.")
    std: tuple[Positive, ...] = Field((0.229, 0.224, 0.225), description="Per-channel deviation of images, 0-1.")
    interpolation: Literal["bilinear", "bicubic"] = Field("bicubic", description="Resampling of images.")
    crop_pct: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Centre crop share in evaluation.")
    max_bad_fraction: Fraction = Field(
        0.01, description="Share of unreadable training images tolerated; above it training ends with exit 3."
    )
    max_megapixels: Positive = Field(64.0, description="Largest image accepted, in megapixels, before decoding.")
    augment: AugmentSection = Field(AugmentSection(), description="Training augmentation.")

    @model_validator(mode="after")
    def _mean_and_std_agree(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std has {len(self.std)}")
        return self


class FolderData(LabelledData):
    """An ImageFolder tree."""

    source: Literal["folder"] = Field("folder", description="An ImageFolder tree.")
    root: PathText = Field(description="Folder that holds the train and val folders.")


class TimmData(LabelledData):
    """Whatever timm.data.create_dataset reads at random."""

    source: Literal["timm"] = Field("timm", description="Anything timm.data.create_dataset reads by number.")
    dataset: Annotated[Text, Field(min_length=1)] = Field(
        description="timm data set name, e.g. `torch/cifar10` or `hfds/...`."
    )
    root: PathText | None = Field(None, description="Folder with the data set; null for Hugging Face.")


KINDS: dict[str, Kind] = {
    "classification": Kind(
        home="sparsevit_cli.tasks.classification:Classification",
        task=ClassificationTask,
        model=ClassificationModel,
        train=ClassificationTrain,
        adapt=ClassificationAdapt,
        finetune=ClassificationFinetune,
        sources={"digits": DigitsData, "folder": FolderData, "timm": TimmData},
    )
}
"""The tasks that come with the package, and those that this process was told of (`add_task`)."""

_classes: dict[str, Any] = {}


def add_task(task: Any) -> None:
    """Make a class with `name` and `kind` known to this process. Raises ConfigError for a name that is taken."""
    name = task.name
    if name in KINDS and _classes.get(name) is not task and KINDS[name].home is not None:
        raise ConfigError("task", f"the name {name!r} is taken", "Give your task another name.")
    KINDS[name] = task.kind
    _classes[name] = task
    _TYPES.clear()


def task_class(name: str) -> Any:
    """The class of a task, loaded now. Raises ConfigError for an unknown name."""
    kind = kind_of(name)
    if kind.home is not None:
        module, _, attribute = kind.home.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return _classes[name]


def kind_of(name: str) -> Kind:
    """The sections of a task. One that an installed package offers is loaded for it. Raises ConfigError."""
    if name not in KINDS:
        offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
        if name not in offered:
            known = ", ".join(sorted({*KINDS, *offered}))
            do = "Give a known one, or type --task path/file.py:Class on the command line."
            raise ConfigError("task.name", f"there is no task {name!r}; there are: {known}", do)
        try:
            offered_task = offered[name].load()
        except Exception as error:  # an installed package may raise anything
            pass_on(error)
            got = f"the package that offers {name!r} cannot be loaded ({in_one_line(error)})"
            raise ConfigError("task.name", got, "Install it again, or ask who wrote it.") from error
        if getattr(offered_task, "name", None) != name or not isinstance(getattr(offered_task, "kind", None), Kind):
            got = f"the package that offers {name!r} gives no task of that name"
            raise ConfigError("task.name", got, "Ask who wrote it: the entry point's name is the task's.")
        add_task(offered_task)
    return KINDS[name]


def experiment_type(task: str = DEFAULT_TASK, source: str | None = None) -> type[ExperimentConfig]:
    """The type of an experiment of `task` whose data come from `source` (None, or an unknown one: the default source).

    Raises ConfigError for an unknown task.
    """
    kind = kind_of(task)
    chosen = source if source is not None and source in kind.sources else next(iter(kind.sources))
    if (task, chosen) not in _TYPES:
        _TYPES[task, chosen] = _made(task, kind, kind.sources[chosen])
    return _TYPES[task, chosen]


_TYPES: dict[tuple[str, str], type[ExperimentConfig]] = {}


def _made(name: str, kind: Kind, data: type[DataSection]) -> type[ExperimentConfig]:
    """ExperimentConfig with the sections of one task and one source."""
    sections: dict[str, type[Section]] = {
        "task": kind.task, "model": kind.model, "train": kind.train, "adapt": kind.adapt, "finetune": kind.finetune,
        "data": data,
    }  # fmt: skip
    fields: dict[str, Any] = {}
    for section, made_of in sections.items():
        shared = ExperimentConfig.model_fields[section]
        needs = any(each.is_required() for each in made_of.model_fields.values())
        default = ... if needs else made_of(**({"name": name} if section == "task" else {}))
        fields[section] = (made_of, Field(default, description=shared.description))
    return create_model("ExperimentConfig", __base__=ExperimentConfig, __doc__=ExperimentConfig.__doc__, **fields)


def all_types(task: str | None = None) -> dict[str, type[ExperimentConfig]]:
    """The types of `task` (None: the default one) by the name of the source."""
    name = task or DEFAULT_TASK
    return {source: experiment_type(name, source) for source in kind_of(name).sources}


def fields_by_source(task: str | None) -> dict[str, Fields]:
    """The fields of `all_types`: made for messages and the reference page, not for a configuration without faults."""
    return {source: Fields.of(kind) for source, kind in all_types(task).items()}


def own_value(document: Mapping[str, Any], section: str, name: str) -> str | None:
    """A text in a section of a document that nobody has validated yet; None if there is none."""
    found = document.get(section)
    value = found.get(name) if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def type_of(document: Document) -> type[ExperimentConfig]:
    """The type that a document asks for by `task.name` and `data.source`. Raises ConfigError for unknown ones."""
    assert isinstance(document.data, dict)
    task, data = own_value(document.data, "task", "name") or DEFAULT_TASK, document.data.get("data")
    written: Value = data.get("source") if isinstance(data, dict) else None

    def place(*path: str) -> str:
        return f" ({document.places[path]})" if path in document.places else ""

    try:
        known = list(kind_of(task).sources)
    except ConfigError as fault:
        raise ConfigError(fault.what, f"{fault.got}{place('task', 'name')}", fault.do) from fault
    if written is not None and written not in known:
        got = f"{written!r:.80} is not allowed{place('data', 'source')}; allowed: {one_of(known)}"
        raise ConfigError("data.source", got, "Change it. Meaning: Where samples come from.")
    return experiment_type(task, own_value(document.data, "data", "source"))
