"""Instance segmentation: Mask R-CNN (or Faster R-CNN) on a Swin, COCO's average precision."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from sparsevit_cli.config.experiment import LoopSection
from sparsevit_cli.config.images import DigitScenesData
from sparsevit_cli.config.instances import CocoData, InstancesModel, InstancesTask
from sparsevit_cli.data.digits import MEAN, STD
from sparsevit_cli.data.preprocessing import Preprocessing
from sparsevit_cli.data.source import Batch, Categories, Data, Source
from sparsevit_cli.errors import DataError
from sparsevit_cli.sizes import Size
from sparsevit_cli.tasks.task import POSTPROCESSING, BuildOptions, Metric, Scorer, Task

from .data import build_data
from .masks import Pixels, mask_api, pasted
from .model import MASK_SHIFT, Detections, Detector, build_detector, categories_of
from .placing import PlacingSpec
from .scorer import AveragePrecision
from .source import InstanceSource

COCO_CATEGORIES = 80
"""Categories of a model without data."""
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe")
"""Of categories in pictures, in turn."""


class Instances(Task):
    """Boxes, categories and masks of the objects in an image."""

    name = "instances"
    metric = Metric("mask_ap", "mask AP")
    counted = "objects"
    finishing = "masks pasted"
    around = ("rpn.", "roi_heads.")
    classifiers = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not self.masks:
            self.metric = Metric("box_ap", "box AP")
            self.finishing = ""

    def data(self, *, seed: int, categories: Categories | None) -> Data:
        """Images with objects; see `build_data`. Raises ConfigError if the extra `detect` is not installed."""
        mask_api()
        in_chans, size = self.config.model.in_chans, self.config.model.img_size
        found = build_data(self._data, img_size=size, in_chans=in_chans, seed=seed, masks=self.masks)
        self.__dict__["_examples"] = found.val, found.categories  # read once
        return found

    def build(self, categories: Categories | None, options: BuildOptions) -> nn.Module:
        """A `Detector`: `model(images)` gives boxes, labels from 1 on, scores and masks inside their boxes.

        Without categories there are as many as in the weights that will be loaded, or as in the data.
        """
        known = len(categories) if categories is not None and categories.names else None
        outputs = known or categories_of(options.like or {}) or self._categories_in_data
        make = functools.partial(build_detector, section=self._model, categories=outputs, masks=self.masks)
        model = self.on_backbone(options, make)
        self.check_sizes(model.backbone.body.divisor)
        return model

    def loss(
        self, model: nn.Module, batch: Batch, section: LoopSection, teacher: nn.Module | None
    ) -> Mapping[str, Tensor]:
        """torchvision's losses of proposals, boxes and masks.

        They are means over anchors and regions, of which every image has as many (`anchors_per_image`,
        `rois_per_image`), and so means over images. What is drawn of an image does not depend on its neighbours.
        """
        losses: dict[str, Tensor] = model(batch.inputs, batch.targets)
        return losses

    def scorer(self, source: Source, device: torch.device) -> Scorer:
        """Box and mask AP; see `AveragePrecision`."""
        return AveragePrecision(self._examples[1], masks=self.masks)

    def example(self, size: Size, batch_size: int, *, seed: int = 0) -> Any:
        """Validation images at that size, from the first on: how much heads cost depends on what they find.

        There is nothing to be found in noise, which is taken if there are no data.
        """
        try:
            val = self._examples[0].resized(max(size) if isinstance(self._data, DigitScenesData) else size)
        except DataError:
            return super().example(size, batch_size, seed=seed)
        images = torch.stack([val[number % len(val)][0].as_subclass(Tensor) for number in range(batch_size)])
        return images[:, :, : size[0], : size[1]].contiguous()

    def backbone(self, model: nn.Module) -> nn.Module:
        """The Swin with a norm per level."""
        assert isinstance(model, Detector)
        return model.backbone.body

    def features(self, model: nn.Module) -> nn.Module:
        """Swin and feature pyramid."""
        assert isinstance(model, Detector)
        return model.backbone

    def images_in(self, inputs: Any) -> Tensor | None:
        """The canvases, where images come with their sizes."""
        return super().images_in(inputs["images"] if isinstance(inputs, Mapping) else inputs)

    def parts(self, model: nn.Module) -> Mapping[str, Sequence[nn.Module]]:
        """Overlapping proposals are suppressed in `proposals`, overlapping detections in `post-processing`."""
        assert isinstance(model, Detector)
        heads = model.roi_heads
        found: dict[str, Sequence[nn.Module]] = {
            "backbone": [model.backbone.body],
            "neck": [model.backbone.fpn],
            "proposals": [model.rpn],
            "box head": [heads.box_roi_pool, heads.box_head, heads.box_predictor],
            POSTPROCESSING: [heads.suppression],
        }
        if self.masks:
            found["mask head"] = [heads.mask_roi_pool, heads.mask_head, heads.mask_predictor]
        return found

    def finish(self, outputs: Detections, size: Size) -> list[list[Pixels]]:
        """The masks of each image's detections, pasted into an image of `size`."""
        if not self.masks:
            return []
        return [
            [
                pasted(mask[0], box, size)
                for mask, box in zip(found["masks"].float().cpu(), (found["boxes"] + MASK_SHIFT).tolist(), strict=True)
            ]
            for found in outputs
        ]

    def at_full_load(self, model: nn.Module) -> AbstractContextManager[None]:
        """Boxes and masks are computed up to `detections_per_image`, found or not; see `Suppression`."""
        assert isinstance(model, Detector)
        return model.roi_heads.suppression.at_full_load(model.roi_heads)

    def category_counts(self, batch: Batch, categories: Categories) -> Tensor:
        """Objects of each category (categories,), crowds left out: those on the canvas, or all of a held-out image."""
        labels = [label for target in batch.targets for label in _labels(target)]
        return torch.tensor(labels, dtype=torch.int64).bincount(minlength=len(categories))

    def picture(self, source: Source, index: int) -> Image.Image:
        """A sample as the model gets it, with boxes, masks and names of categories. Raises UnreadableImageError."""
        assert isinstance(source, InstanceSource)
        image, target = source.objects(index)
        names = self._examples[1].names
        mean, std = self.normalisation() or ((MEAN,) * 3, (STD,) * 3)
        shown = image.as_subclass(Tensor) * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        shown = F.to_dtype(shown.clamp(0, 1), torch.uint8, scale=True)
        boxes, masks, labels = (target.get(name) for name in ("boxes", "masks", "labels"))
        assert isinstance(boxes, Tensor)
        assert isinstance(labels, Tensor)
        numbers = [int(label) - 1 for label in labels]
        colours: list[Any] = [COLOURS[number % len(COLOURS)] for number in numbers]
        if isinstance(masks, Tensor) and len(masks):
            shown = draw_segmentation_masks(shown, masks.as_subclass(Tensor).bool(), alpha=0.4, colors=colours)
        if len(boxes):
            told = [names[number] for number in numbers]
            shown = draw_bounding_boxes(shown, boxes.as_subclass(Tensor), labels=told, colors=colours)
        picture: Image.Image = F.to_pil_image(shown)
        return picture

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Those of image files; the digits are drawn as they are."""
        return (self._data.mean, self._data.std) if isinstance(self._data, CocoData) else None

    def preprocessing(self) -> Preprocessing:
        """That of held-out image files; scenes of digits are pictures of 0 to 1 as they are."""
        data, size = self._data, self.image_size
        if isinstance(data, CocoData):
            return PlacingSpec.from_config(data, size, self.config.model.in_chans).preprocessing()
        return Preprocessing(size, (MEAN,) * 3, (STD,) * 3)

    @functools.cached_property
    def _examples(self) -> tuple[Source, Categories]:
        """The validation images and the categories."""
        found = self.data(seed=self.config.seed, categories=None)
        return found.val, found.categories

    @property
    def _categories_in_data(self) -> int:
        """How many categories the data have; COCO's 80 if the data are not there."""
        try:
            return len(self._examples[1])
        except DataError:
            return COCO_CATEGORIES

    @property
    def masks(self) -> bool:
        """True if objects have masks, and not only boxes."""
        assert isinstance(self.config.task, InstancesTask)
        return self.config.task.masks

    @property
    def _model(self) -> InstancesModel:
        assert isinstance(self.config.model, InstancesModel)
        return self.config.model

    @property
    def _data(self) -> DigitScenesData | CocoData:
        assert isinstance(self.config.data, (DigitScenesData, CocoData))
        return self.config.data


def _labels(target: Mapping[str, Any]) -> list[int]:
    """The categories of the objects in a target, from 0 on; one of a held-out sample holds the whole `truth`."""
    if "truth" in target:
        return [instance.label for instance in target["truth"].instances if not instance.crowd]
    return [int(label) - 1 for label in target["labels"]]
