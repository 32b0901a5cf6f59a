"""What semantic segmentation adds to the sections of an experiment. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .experiment import (
    BackboneModel,
    Count,
    Fraction,
    PathText,
    Positive,
    Section,
    Side,
    TaskSection,
    Text,
)
from .images import DigitScenesData, ImageFiles
from .kind import Kind

BACKGROUND = "background"
"""Name of the class that `task.background_weight` is about."""


class SemanticTask(TaskSection):
    """What the model is trained for."""

    name: Literal["semantic"] = Field("semantic", description="Name of the task.")
    background_weight: Positive | None = Field(
        None, description="Weight of the class `background` in the cross-entropy; null is 1, that of the others."
    )
    class_weights: tuple[Positive, ...] = Field(
        (), description="Weight of every class in the cross-entropy, in the order of the classes; empty is 1 for all."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.class_weights and self.background_weight is not None:
            raise ValueError("class_weights and background_weight are both set, and only one can give the weights")
        return self


class FpnSection(Section):
    """The feature pyramid and its head (`model.head: fpn`)."""

    channels: Count = Field(128, description="Channels of the pyramid and of the head's convolutions.")


class Mask2FormerSection(Section):
    """Pixel decoder, transformer decoder and loss of transformers' Mask2Former (`model.head: mask2former`)."""

    queries: Count = Field(100, description="Masks that an image is made of at most.")
    channels: Annotated[int, Field(ge=32, multiple_of=32)] = Field(
        256, description="Channels of pixel decoder, masks and transformer decoder."
    )
    heads: Count = Field(8, description="Attention heads of both decoders.")
    encoder_layers: Count = Field(6, description="Layers of the pixel decoder.")
    encoder_feedforward: Count = Field(1024, description="Hidden channels of the pixel decoder's MLPs.")
    decoder_layers: Annotated[int, Field(ge=2)] = Field(
        10, description="Layers of the transformer decoder and one, as transformers counts them."
    )
    feedforward: Count = Field(2048, description="Hidden channels of the transformer decoder's MLPs.")
    points: Count = Field(12544, description="Points of a mask that the loss is computed at.")
    class_loss: Positive = Field(2.0, description="Weight of the loss of the masks' classes.")
    mask_loss: Positive = Field(5.0, description="Weight of the masks' cross-entropy.")
    dice_loss: Positive = Field(5.0, description="Weight of the masks' dice loss.")
    no_object: Positive = Field(0.1, description="Weight of masks without an object in the loss of the classes.")


class SemanticModel(BackboneModel):
    """Which timm Swin, its weights, and what stands on it."""

    head: Literal["fpn", "mask2former"] = Field(
        "fpn", description="A feature pyramid with a light head, or transformers' Mask2Former (extra `segment`)."
    )
    fpn: FpnSection = Field(FpnSection(), description="The feature pyramid and its head.")
    mask2former: Mask2FormerSection = Field(Mask2FormerSection(), description="Mask2Former.")


class CropSection(Section):
    """Augmentation of training images: scale, crop, flip, colour."""

    scale_min: Annotated[float, Field(ge=0.05, le=20)] = Field(0.5, description="Smallest factor of the random scale.")
    scale_max: Annotated[float, Field(ge=0.05, le=20)] = Field(2.0, description="Largest factor of the random scale.")
    hflip: Fraction = Field(0.5, description="Probability of a horizontal flip.")
    color_jitter: Fraction = Field(0.0, description="Strength of the change of brightness, contrast and saturation.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min {self.scale_min:g} is above scale_max {self.scale_max:g}")
        return self


class MaskFiles(ImageFiles):
    """Images, and a file with the class of every pixel for each."""

    train_split: PathText = Field("train", description="Folder of the training split, below those of images and masks.")
    val_split: PathText = Field("val", description="Folder of the validation split, below those of images and masks.")
    short_side: Side | None = Field(
        None,
        description="Pixels of the short side that images get, aspect kept, before crops and windows are taken; null "
        "leaves images as large as they are.",
    )
    crop: Side | tuple[Side, Side] | None = Field(
        None, description="Largest training crop in pixels, number or [height, width]; null is model.img_size."
    )
    evaluation: Literal["whole", "sliding"] = Field(
        "whole",
        description="`whole`: every image resized to model.img_size. `sliding`: windows of model.img_size over the "
        "image, their scores averaged. Both are scored at the size of the truth.",
    )
    overlap: Annotated[float, Field(ge=0, le=0.9)] = Field(
        1 / 3, description="Share of a sliding window that the next one overlaps."
    )
    augment: CropSection = Field(CropSection(), description="Training augmentation.")

    @model_validator(mode="after")
    def _windows_are_crops(self) -> Self:
        if self.crop is not None and self.evaluation == "sliding":
            raise ValueError("crop is set, but sliding windows are trained for by crops of model.img_size")
        return self


class CityscapesData(MaskFiles):
    """Cityscapes as downloaded: leftImg8bit and gtFine, with their labelIds."""

    source: Literal["cityscapes"] = Field("cityscapes", description="Cityscapes as downloaded.")
    root: PathText = Field(description="Folder that holds leftImg8bit and gtFine.")


class PairedFolders(MaskFiles):
    """A folder of images and one of masks for each split, as ADE20K has them."""

    source: Literal["folders"] = Field("folders", description="Folders of images and of masks, as ADE20K has them.")
    root: PathText = Field(description="Folder that holds those of images and masks.")
    images: PathText = Field("images", description="Folder of all images, below root, or of those of a `{split}`.")
    masks: PathText = Field(
        "annotations",
        description="Folder of all masks, below root, or of those of a `{split}`: PNG files of class numbers.",
    )
    train_split: PathText = Field("training", description="Training split: a folder below both, or their `{split}`.")
    val_split: PathText = Field("validation", description="Validation split: a folder below both, or their `{split}`.")
    image_suffix: Text = Field("", description="What the name of an image has after that of its sample (`_rgb`).")
    mask_suffix: Text = Field("", description="What the name of a mask has after that of its sample (`_mask`).")
    classes: tuple[Text, ...] = Field((), description="Names of the classes, in the order of their numbers.")
    classes_file: PathText | None = Field(
        None, description="Text file with the name of a class in each line; instead of `classes`."
    )
    numbers: tuple[Annotated[int, Field(ge=0, le=65535)], ...] = Field(
        (),
        description="Number in masks of each class, in the order of the classes; empty is 0, 1, 2 and so on. Masks of "
        "0 and 255 have [0, 255], and ignore: null.",
    )
    ignore: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        255, description="Number in masks of pixels without a class; null if every pixel has one."
    )
    reduce_zero_label: bool = Field(
        False, description="Classes are numbered from 1, and 0 stands for pixels without one (ADE20K)."
    )

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if bool(self.classes) == (self.classes_file is not None):
            raise ValueError("give the names of the classes either in classes or in classes_file")
        if self.numbers and self.reduce_zero_label:
            raise ValueError("numbers and reduce_zero_label are both set, and each says which number is which class")
        return self


KIND = Kind(
    home="sparsevit_cli.tasks.semantic:SemanticSegmentation",
    task=SemanticTask,
    model=SemanticModel,
    sources={"digits": DigitScenesData, "cityscapes": CityscapesData, "folders": PairedFolders},
)
