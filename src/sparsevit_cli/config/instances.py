"""What instance segmentation adds to the sections of an experiment. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .experiment import BackboneModel, Count, Fraction, PathText, Positive, Section, TaskSection
from .images import DigitScenesData, ImageFiles
from .kind import Kind


class InstancesTask(TaskSection):
    """What the model is trained for."""

    name: Literal["instances"] = Field("instances", description="Name of the task.")
    masks: bool = Field(True, description="Boxes and masks (Mask R-CNN); false gives boxes alone (Faster R-CNN).")


class InstancesModel(BackboneModel):
    """Which timm Swin, its weights, and torchvision's heads on it; the defaults of the heads are torchvision's."""

    fpn_channels: Count = Field(256, description="Channels of the feature pyramid.")
    anchor_sizes: Annotated[tuple[Positive, ...], Field(min_length=2)] | None = Field(
        None,
        description="Side of the anchors of every level of the pyramid in pixels; null is eight times its stride. "
        "There is a level per stage and one more.",
    )
    anchor_ratios: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (0.5, 1.0, 2.0), description="Heights of the anchors over their widths."
    )
    anchors_per_image: Count = Field(256, description="Anchors per image that teach the proposals.")
    candidates_train: Count = Field(2000, description="Proposals per level before suppression, in training.")
    candidates_test: Count = Field(1000, description="Proposals per level before suppression, at inference.")
    proposals_train: Count = Field(2000, description="Proposals per image after suppression, in training.")
    proposals_test: Count = Field(1000, description="Proposals per image after suppression, at inference.")
    rois_per_image: Count = Field(512, description="Regions per image that teach the heads; a quarter hold an object.")
    box_resolution: Count = Field(7, description="Side of a region as the box head gets it, in cells.")
    box_channels: Count = Field(1024, description="Channels of the two layers of the box head.")
    mask_resolution: Count = Field(14, description="Side of a region as the mask head gets it; masks are twice that.")
    mask_convs: Count = Field(4, description="Convolutions of the mask head.")
    mask_channels: Count = Field(256, description="Channels of the mask head.")
    roi_samples: Count = Field(2, description="Samples per cell of a region and axis.")
    detections_per_image: Annotated[int, Field(ge=1, le=1000)] = Field(
        100, description="Detections per image at most; only these get masks. COCO's AP counts 100."
    )
    score_threshold: Fraction = Field(0.05, description="Least score of a detection.")
    nms_threshold: Fraction = Field(0.5, description="Overlap (IoU) above which the lower score is suppressed.")


class InstancesAugment(Section):
    """Augmentation of training images from files."""

    hflip: Fraction = Field(0.5, description="Probability of a horizontal flip.")
    jitter: tuple[Positive, Positive] | None = Field(
        None,
        description="Large-scale jitter: smallest and largest scale, `[0.1, 2.0]` in its paper; larger images are "
        "cropped at random, smaller ones padded. null is off.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.jitter is not None and self.jitter[0] > self.jitter[1]:
            raise ValueError(f"jitter {self.jitter[0]:g} is above {self.jitter[1]:g}")
        return self


class CocoData(ImageFiles):
    """Image files with annotations in COCO's form."""

    source: Literal["coco"] = Field("coco", description="Images and annotation files in COCO's form.")
    root: PathText = Field(description="Folder of the data set; the paths below are relative to it.")
    train_images: PathText = Field("train2017", description="Folder of the training images.")
    train_annotations: PathText = Field(
        "annotations/instances_train2017.json", description="Annotations of the training images."
    )
    val_images: PathText = Field("val2017", description="Folder of the validation images.")
    val_annotations: PathText = Field(
        "annotations/instances_val2017.json", description="Annotations of the validation images."
    )
    keep_empty: bool = Field(False, description="Train on images without an object too; validation keeps them always.")
    letterbox: bool = Field(
        False,
        description="Keep the aspect and pad at the bottom and right; false stretches, as the authors do. Padding is "
        "neither ranked nor counted.",
    )
    augment: InstancesAugment = Field(InstancesAugment(), description="Training augmentation.")


KIND = Kind(
    home="sparsevit_cli.tasks.instances:Instances",
    task=InstancesTask,
    model=InstancesModel,
    sources={"digits": DigitScenesData, "coco": CocoData},
)
