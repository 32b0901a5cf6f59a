"""What classification adds to the sections of an experiment. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .experiment import (
    AdaptSection,
    Count,
    DataSection,
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
from .images import DigitsSection, ImageFiles
from .kind import Kind


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


class LabelledData(ImageFiles):
    """Image files with one label each."""

    train_split: PathText = Field("train", description="Name of the training split or sub-folder.")
    val_split: PathText = Field("val", description="Name of the validation split or sub-folder.")
    interpolation: Literal["bilinear", "bicubic"] = Field("bicubic", description="Resampling of images.")
    crop_pct: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="Centre crop share in evaluation.")
    augment: AugmentSection = Field(AugmentSection(), description="Training augmentation.")


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


KIND = Kind(
    home="sparsevit_cli.tasks.classification:Classification",
    task=ClassificationTask,
    model=ClassificationModel,
    train=ClassificationTrain,
    adapt=ClassificationAdapt,
    finetune=ClassificationFinetune,
    sources={"digits": DigitsData, "folder": FolderData, "timm": TimmData},
)
