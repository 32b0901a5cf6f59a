"""Semantic segmentation: a class for every pixel, mean IoU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit_cli.backbones import SwinBackbone
from sparsevit_cli.config.experiment import ExperimentConfig, LoopSection
from sparsevit_cli.config.images import DigitScenesData
from sparsevit_cli.config.semantic import BACKGROUND, MaskFiles, SemanticModel, SemanticTask
from sparsevit_cli.data.digits import MEAN, STD
from sparsevit_cli.data.pictures import captioned
from sparsevit_cli.data.preprocessing import Preprocessing
from sparsevit_cli.data.shrunk import Scale
from sparsevit_cli.data.source import Batch, Categories, Data, Source
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.sizes import ImageSize, Size, size_text
from sparsevit_cli.tasks.task import POSTPROCESSING, BuildOptions, Metric, Scorer, Task
from sparsevit_cli.weights import WeightsFile

from .data import build_data, class_names
from .fpn_head import FpnSegmenter
from .labels import IGNORED
from .mask2former import Mask2FormerSegmenter, PixelFeatures, check_settings
from .picture import blended
from .records import PairSource
from .scenes import example_scenes
from .scorer import ConfusionScorer
from .segmenter import Segmenter, at_size, window_places
from .transforms import TransformSpec


class SemanticSegmentation(Task):
    """A class for every pixel. A target is a mask (H, W) uint8: classes from 0, and IGNORED (255)."""

    name = "semantic"
    metric = Metric("miou", "mIoU")
    counted = "pixels"
    finishing = "a class for every pixel"
    around = ("pyramid.neck.", "model.transformer_module.")
    classifiers = ("head.6.", "class_predictor.", "criterion.empty_weight")

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        if isinstance(self._data, MaskFiles) and self._data.evaluation == "sliding":
            self.per = "window"

    def data(self, *, seed: int, categories: Categories | None) -> Data:
        """Sources of (image, mask); see `build_data`. The order of the classes is the configuration's, or fixed."""
        model = self.config.model
        found = build_data(self._data, img_size=model.img_size, in_chans=model.in_chans, seed=seed)
        self.__dict__["_validation"] = found.val  # listed once
        return found

    def build(self, categories: Categories | None, options: BuildOptions) -> nn.Module:
        """A `Segmenter` with a score per class; see `on_backbone` for its weights."""
        names = self._names if categories is None or not len(categories) else categories.names
        if self._class_weights is not None and self._is_mask2former:
            do = "Remove task.class_weights and task.background_weight; see model.mask2former.no_object."
            raise ConfigError("task", "weights of classes, and Mask2Former's loss has none", do)
        model = self.on_backbone(options, functools.partial(self._standing_on, classes=len(names)))
        crop: dict[str, ImageSize] = {}
        if isinstance(self._data, MaskFiles) and self._data.crop:
            crop["data.crop"] = self._data.crop
        self.check_sizes(model.swin.divisor, crop)
        if options.img_size is not None:
            crop["image size"] = options.img_size
        for what, size in self.image_sizes(crop).items():
            if not self.takes(model, size):
                channels = self._model.mask2former.channels
                got = f"{size_text(size)} pixels, whose coarsest map is 1x1: a group of one number cannot be normalised"
                do = f"Set larger images, or model.mask2former.channels, now {channels}, to {2 * channels}."
                raise ConfigError(what, got, do)
        return model

    def _standing_on(self, backbone: SwinBackbone, classes: int) -> Segmenter:
        overlap = self._data.overlap if isinstance(self._data, MaskFiles) else 0.0
        if self._model.head == "mask2former":
            return Mask2FormerSegmenter(backbone, classes, self._model.mask2former, overlap)
        return FpnSegmenter(backbone, classes, self._model.fpn.channels, overlap)

    def check_checkpoint(self, file: WeightsFile) -> None:
        """See `check_settings`."""
        if self._is_mask2former:
            check_settings(Path(file.path), self._model.mask2former)

    # -- loss and score -----------------------------------------------------------------------------------------

    def loss(
        self, model: nn.Module, batch: Batch, section: LoopSection, teacher: nn.Module | None
    ) -> Mapping[str, Tensor]:
        """Mask2Former's own losses, or cross-entropy at the size of the masks, as a mean over what `weight` counts."""
        if isinstance(model, Mask2FormerSegmenter):
            return model.losses(batch.inputs, batch.targets)
        assert isinstance(model, Segmenter)
        scores = model.scores(batch.inputs).float()
        scores = F.interpolate(scores, tuple(batch.targets.shape[1:]), mode="bilinear", align_corners=False)
        weights = None if self._class_weights is None else self._class_weights.to(scores)
        total = F.cross_entropy(scores, batch.targets.long(), weights, ignore_index=IGNORED, reduction="sum")
        return {"loss": total / (self.weight(batch) or 1.0)}

    def weight(self, batch: Batch) -> float:
        """Images that have a class anywhere for Mask2Former; else the weights of all pixels with a class, summed up."""
        labelled = batch.targets != IGNORED
        if self._is_mask2former:
            return float(labelled.flatten(1).any(1).sum())
        if self._class_weights is None:
            return float(labelled.sum())
        counts = torch.bincount(batch.targets[labelled].long(), minlength=len(self._class_weights))
        return float(counts.cpu().double() @ self._class_weights)  # a Mac's GPU has no float64

    def scorer(self, source: Source, device: torch.device) -> Scorer:
        """mIoU, pixel accuracy, and the IoU of every class, from one confusion matrix."""
        return ConfusionScorer(self._names, device)

    @functools.cached_property
    def _class_weights(self) -> Tensor | None:
        """Weight of each class in the cross-entropy, (classes,); None if all are 1. Raises ConfigError."""
        section = self.config.task
        assert isinstance(section, SemanticTask)
        if section.class_weights:
            if len(section.class_weights) != len(self._names):
                got = f"{len(section.class_weights)} weights for {len(self._names)} classes"
                raise ConfigError("task.class_weights", got, "Give one for each class, in their order.")
            return torch.tensor(section.class_weights, dtype=torch.float64)
        if section.background_weight is None:
            return None
        if BACKGROUND not in self._names:
            got = f"{section.background_weight:g}, but no class is called {BACKGROUND}"
            raise ConfigError("task.background_weight", got, "Set task.class_weights, or leave it null.")
        weights = torch.ones(len(self._names), dtype=torch.float64)
        weights[self._names.index(BACKGROUND)] = section.background_weight
        return weights

    # -- parts --------------------------------------------------------------------------------------------------

    def backbone(self, model: nn.Module) -> nn.Module:
        """The Swin with the norms of its levels."""
        assert isinstance(model, Segmenter)
        return model.swin

    def features(self, model: nn.Module) -> nn.Module:
        """Backbone and top-down sum, one map; or backbone and pixel decoder, four maps."""
        if isinstance(model, Mask2FormerSegmenter):
            return PixelFeatures(model.model.pixel_level_module)
        assert isinstance(model, FpnSegmenter)
        return model.pyramid

    def replace_features_(self, model: nn.Module, run: Callable[[Tensor], Any]) -> None:
        """As of other tasks; Mask2Former's maps go where its pixel decoder's would."""
        if isinstance(model, Mask2FormerSegmenter):
            model.replace_pixel_features_(run)
        else:
            super().replace_features_(model, run)

    def parts(self, model: nn.Module) -> Mapping[str, Sequence[nn.Module]]:
        """Backbone, neck and head; or backbone, both decoders of Mask2Former, and what its masks become."""
        if isinstance(model, Mask2FormerSegmenter):
            return {
                "backbone": [model.swin],
                "pixel decoder": [model.model.pixel_level_module.decoder],
                "transformer decoder": [model.model.transformer_module, model.class_predictor],
                POSTPROCESSING: [model.weighing],
            }
        assert isinstance(model, FpnSegmenter)
        return {"backbone": [model.swin], "neck": [model.pyramid.neck], "head": [model.head]}

    def per_image(self, size: Size, scale: Scale | None = None) -> float:
        """Windows of `size` that cover a validation image, 1 unless they slide; sizes are those in the headers."""
        if not isinstance(self._data, MaskFiles) or self._data.evaluation != "sliding":
            return 1.0
        sizes = [own if scale is None else scale(own) for own in self._slid_sizes]
        return sum(len(window_places(each, size, self._data.overlap)) for each in sizes) / len(sizes)

    def takes(self, model: nn.Module, size: Size) -> bool:
        """See `Mask2FormerSegmenter.takes`."""
        return not isinstance(model, Mask2FormerSegmenter) or model.takes(size)

    def finish(self, outputs: Any, size: Size) -> list[Tensor]:
        """The class of every pixel of each image, (H, W): scores brought to `size`, the largest one taken."""
        return [at_size(scores, size).argmax(0) for scores in outputs]

    # -- images -------------------------------------------------------------------------------------------------

    def example(self, size: Size, batch_size: int, *, seed: int = 0) -> Any:
        """Scenes of the validation split (B, 3, H, W) if digits fit in; else noise: costs do not depend on it."""
        data = self._data
        if isinstance(data, DigitScenesData) and size[0] == size[1] and size[0] >= data.digits.digit_max:
            return example_scenes(data.digits, size[0], batch_size, seed)
        return super().example(size, batch_size, seed=seed)

    def category_counts(self, batch: Batch, categories: Categories) -> Tensor:
        """Pixels of each class (classes,); those without a class are left out."""
        counts = [mask.flatten().long().bincount(minlength=IGNORED + 1) for mask in batch.targets]
        return torch.stack(counts).sum(0)[: len(categories)]

    def picture(self, source: Source, index: int) -> Image.Image:
        """The image under the colours of its classes, whose names stand below, the largest first.

        The background and ignored pixels stay as they are.
        """
        image, mask = source[index]
        mean, std = self.normalisation() or ((MEAN,) * 3, (STD,) * 3)
        plain = self._names.index(BACKGROUND) if BACKGROUND in self._names else None
        counts = mask.as_subclass(Tensor).flatten().long().bincount(minlength=IGNORED + 1)[: len(self._names)]
        shown = [number for number in counts.argsort(descending=True).tolist() if counts[number] and number != plain]
        return captioned(blended(image, mask, mean, std, plain), ", ".join(self._names[number] for number in shown))

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Those of image files; the digits are drawn as they are."""
        return (self._data.mean, self._data.std) if isinstance(self._data, MaskFiles) else None

    def preprocessing(self) -> Preprocessing:
        """That of held-out image files; scenes of digits are pictures of 0 to 1 as they are."""
        data, size = self._data, self.image_size
        if not isinstance(data, MaskFiles):
            return Preprocessing(size, (MEAN,) * 3, (STD,) * 3)
        spec = TransformSpec.from_config(data, size, self.config.model.in_chans)
        return spec.evaluation().resized(size).preprocessing(data.overlap)

    @functools.cached_property
    def _validation(self) -> Source:
        return self.data(seed=self.config.seed, categories=None).val

    @functools.cached_property
    def _slid_sizes(self) -> list[Size]:
        """Height and width at which windows slide over each validation image."""
        source = self._validation
        assert isinstance(source, PairSource)
        return source.slid_sizes()

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        return class_names(self._data)

    @property
    def _is_mask2former(self) -> bool:
        return self._model.head == "mask2former"

    @property
    def _model(self) -> SemanticModel:
        assert isinstance(self.config.model, SemanticModel)
        return self.config.model

    @property
    def _data(self) -> DigitScenesData | MaskFiles:
        assert isinstance(self.config.data, (DigitScenesData, MaskFiles))
        return self.config.data
