"""Image classification: a timm Swin with its own classifier, cross-entropy, top-1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data.mixup import Mixup, mixup_target
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit_cli.config.classification import (
    ClassificationDistil,
    ClassificationLoop,
    ClassificationModel,
    DigitsData,
    LabelledData,
)
from sparsevit_cli.config.experiment import LoopSection
from sparsevit_cli.data.digits import MEAN, STD
from sparsevit_cli.data.pictures import as_picture, captioned
from sparsevit_cli.data.preprocessing import Preprocessing
from sparsevit_cli.data.source import Batch, Categories, Data, Source, WrappedSource
from sparsevit_cli.errors import CheckpointError, ConfigError
from sparsevit_cli.models import model_arguments
from sparsevit_cli.seeding import seeded
from sparsevit_cli.sizes import ImageSize
from sparsevit_cli.tasks.task import BuildOptions, Metric, Scorer, Task

from .data import DigitsSource, build_data
from .records import RecordSource
from .transforms import TransformSpec

IMAGENET_CLASSES = 1000
"""Outputs of a model of which nothing but its name is known."""
HEAD = "head.fc.weight"
"""The classifier of every timm Swin."""


class Classification(Task):
    """One label an image."""

    name = "classification"
    metric = Metric("top1", "top-1", mean_over_images=True)

    def data(self, *, seed: int, categories: Categories | None) -> Data:
        """Sources of (image (C, H, W), label); see `build_data`."""
        names = categories.names if categories is not None and categories.names else None
        in_chans, size = self.config.model.in_chans, self.config.model.img_size
        return build_data(self._data, img_size=size, in_chans=in_chans, seed=seed, class_names=names)

    def build(self, categories: Categories | None, options: BuildOptions) -> nn.Module:
        """The timm Swin with an output per class, or `model.num_classes` of them."""
        known = len(categories) if categories is not None else IMAGENET_CLASSES
        outputs = self._model.num_classes or known or (_num_outputs(options.like) if options.like is not None else 0)
        if categories is not None and outputs < known:
            got = f"{outputs} outputs for {known} classes of the data"
            raise ConfigError("model.num_classes", got, "Set it to null, or to the number of classes at least.")
        return self.swin(outputs, options)

    def loss(
        self, model: nn.Module, batch: Batch, section: LoopSection, teacher: nn.Module | None
    ) -> Mapping[str, Tensor]:
        """Cross-entropy, and what the teacher's logits teach."""
        assert isinstance(section, ClassificationLoop)
        logits = model(batch.inputs)
        loss = classification_loss(logits, batch.targets, section.label_smoothing)
        if teacher is None:
            return {"loss": loss}
        assert isinstance(section, ClassificationDistil)
        with torch.no_grad():
            teacher_logits = teacher(batch.inputs)
        distilled = distillation_loss(logits, teacher_logits, section.temperature)
        return {"loss": (1 - section.distill) * loss, "distillation": section.distill * distilled}

    def scorer(self, source: Source, device: torch.device) -> Scorer:
        """Top-1 and mean cross-entropy, by timm's evaluator."""
        return _Top1(device)

    def training_source(self, data: Data, section: LoopSection) -> Source:
        """With mixup and CutMix, if `section` asks for them."""
        assert isinstance(section, ClassificationLoop)
        if not (section.mixup or section.cutmix):
            return data.train
        outputs = self._model.num_classes or len(data.categories)
        mixup = Mixup(section.mixup, section.cutmix, label_smoothing=section.label_smoothing, num_classes=outputs)
        return MixedSource(data.train, mixup)

    def wants_teacher(self, section: LoopSection) -> bool:
        """True with `distill`."""
        return bool(getattr(section, "distill", 0.0))

    def category_counts(self, batch: Batch, categories: Categories) -> Tensor:
        """Images of each class (classes,)."""
        return batch.targets.bincount(minlength=len(categories))  # type: ignore[no-any-return]

    def picture(self, source: Source, index: int) -> Image.Image:
        """The image, with the name of its class below it."""
        image, label = source[index]
        while isinstance(source, WrappedSource):
            source = source.inner
        assert isinstance(source, (DigitsSource, RecordSource))
        mean, std = self.normalisation() or ((MEAN,), (STD,))
        return captioned(as_picture(image, mean, std), source.class_names[int(label)])

    def timm_model(self, like: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
        """timm builds the whole of it."""
        return self.config.model.name.partition(".")[0], model_arguments(self.config.model, _num_outputs(like))

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Those of image files; the digits are drawn as they are."""
        data = self.config.data
        return (data.mean, data.std) if isinstance(data, LabelledData) else None

    def preprocessing(self) -> Preprocessing:
        """That of held-out image files; canvases of digits are pictures of 0 to 1 as they are."""
        data, in_chans = self._data, self.config.model.in_chans
        if isinstance(data, DigitsData):
            return Preprocessing(self.image_size, (MEAN,) * in_chans, (STD,) * in_chans)
        return TransformSpec.from_config(data, self.image_size, in_chans).preprocessing()

    @property
    def _model(self) -> ClassificationModel:
        assert isinstance(self.config.model, ClassificationModel)
        return self.config.model

    @property
    def _data(self) -> DigitsData | LabelledData:
        assert isinstance(self.config.data, (DigitsData, LabelledData))
        return self.config.data


class MixedSource(WrappedSource):
    """Samples whose batches are mixed by timm's mixup or CutMix: labels (B,) become class probabilities (B, classes).

    timm mixes an even number of images. The last one of an odd batch keeps its image, and gets its own label's target.
    """

    def __init__(self, inner: Source, mixup: Mixup) -> None:
        super().__init__(inner)
        self.mixup = mixup

    def resized(self, size: ImageSize) -> MixedSource:
        return MixedSource(self.inner.resized(size), self.mixup)

    def collate(self, samples: Sequence[Any], seed: int | None) -> tuple[Any, Any]:
        """Images (B, C, H, W) and targets (B, classes), drawn by `seed`."""
        images, labels = self.inner.collate(samples, seed)
        assert seed is not None, "only training batches are mixed"
        targets = mixup_target(labels, self.mixup.num_classes, 1.0, self.mixup.label_smoothing)
        even = len(images) // 2 * 2
        if even:
            with seeded(seed):
                images[:even], targets[:even] = self.mixup(images[:even], labels[:even])
        return images, targets


class _Top1:
    """timm's evaluator under our names."""

    def __init__(self, device: torch.device) -> None:
        self.evaluator = ClassificationEvaluator(device)

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Logits (B, classes) of a batch."""
        self.evaluator.update(outputs, batch.targets)

    def compute(self) -> Mapping[str, float]:
        """Top-1 in percent, and the mean cross-entropy."""
        found = self.evaluator.compute()
        return {name: found[name] for name in ("top1", "loss")}


def classification_loss(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy against class indices (B,) or mixed-up class probabilities (B, classes)."""
    smoothing = label_smoothing if target.ndim == 1 else 0.0  # mixup smooths its own targets
    return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL divergence from the teacher at `temperature`, scaled by its square (Hinton et al. 2015, section 2)."""
    student = F.log_softmax(logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


def _num_outputs(weights: Mapping[str, Tensor]) -> int:
    """Outputs of the classifier in `weights`. Raises CheckpointError if there is none."""
    if HEAD not in weights:
        raise CheckpointError("weights", f"no classifier ({HEAD})", "Give the weights of a whole classifier.")
    return weights[HEAD].shape[0]
