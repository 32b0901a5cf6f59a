"""transformers' Mask2Former on a Swin of ours: its pixel-level encoder is exchanged, all else is its own.

transformers is loaded when a model is built (extra `segment`). Nothing is downloaded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsevit_cli.backbones import SwinBackbone
from sparsevit_cli.config.semantic import Mask2FormerSection
from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.errors import CheckpointError, ConfigError, from_extra
from sparsevit_cli.sizes import Size

from .labels import IGNORED
from .segmenter import Segmenter

_LEAST_LEVELS = 3
_GROUPS = 32
"""Of the pixel decoder's group norms, in transformers."""
_NO_MASK = -20.0
"""Score of a mask where the truth is ignored: its sigmoid is 0 to eight digits, and so is its gradient."""


class Encoder(nn.Module):
    """A SwinBackbone as transformers calls its own: `channels`, and feature maps in an output."""

    def __init__(self, backbone: SwinBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = list(backbone.channels)

    def forward(self, pixel_values: Tensor) -> Any:
        """Images (B, 3, H, W) to BackboneOutput, with a map (B, C, H/stride, W/stride) per level."""
        from transformers.modeling_outputs import BackboneOutput

        return BackboneOutput(feature_maps=tuple(self.backbone(pixel_values).values()))


class PixelFeatures(nn.Module):
    """Backbone and pixel decoder: images to the map of the masks (B, C, H/4, W/4) and three coarser ones."""

    def __init__(self, level_module: nn.Module) -> None:
        super().__init__()
        self.level_module = level_module

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        found = self.level_module(images)
        return (found.decoder_last_hidden_state, *found.decoder_hidden_states)


class MaskWeighing(nn.Module):
    """Masks and their classes as scores of pixels: a module, since a profile sees what runs inside modules."""

    def forward(self, classes: Tensor, masks: Tensor, size: Size) -> Tensor:
        """Classes (B, queries, classes + 1) and masks (B, queries, h, w) to scores (B, classes, *size).

        Each class's share of all masks at a pixel. Masks are brought to `size` before their sigmoid, as in
        Mask2Former's own code; transformers' `post_process_semantic_segmentation` brings them to 384 x 384 pixels,
        which is the same for such images.
        """
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        shares = classes.softmax(-1)[..., :-1]  # the last one is "no object"
        return torch.einsum("bqc,bqhw->bchw", shares, masks.sigmoid())


class Mask2FormerSegmenter(Segmenter):
    """Masks and their classes, found by queries (Cheng et al. 2022), as semantic segmentation.

    Parameters around the Swin have the names of transformers' Mask2FormerForUniversalSegmentation.
    """

    def __init__(self, backbone: SwinBackbone, classes: int, section: Mask2FormerSection, overlap: float) -> None:
        super().__init__(overlap)
        net = _network(backbone, classes, section)
        self.model: Any = net.model
        self.class_predictor: nn.Module = net.class_predictor
        self.criterion: nn.Module = net.criterion
        self.loss_weights: dict[str, float] = net.weight_dict
        self.weighing = MaskWeighing()

    @property
    def swin(self) -> SwinBackbone:
        backbone: SwinBackbone = self.model.pixel_level_module.encoder.backbone
        return backbone

    def replace_pixel_features_(self, run: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        """Let `run` compute what `PixelFeatures` does; the transformer decoder stays as it is."""
        from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelLevelModuleOutput

        def forward(pixel_values: Tensor, **_: Any) -> Any:
            masks, *coarser = run(pixel_values)
            maps: Any = tuple(coarser)
            return Mask2FormerPixelLevelModuleOutput(decoder_last_hidden_state=masks, decoder_hidden_states=maps)

        self.model.pixel_level_module.forward = forward

    def takes(self, size: Size) -> bool:
        """False if a group of a norm of the pixel decoder is one number, for images of `size`: torch refuses that."""
        coarsest: int = math.prod(-(-side // self.swin.strides[-1]) for side in size)
        channels: int = self.model.config.feature_size
        return coarsest * channels // _GROUPS > 1

    def queries(self, images: Tensor, *, last: bool = True) -> list[tuple[Tensor, Tensor]]:
        """Classes (B, queries, classes + 1) and masks (B, queries, H/4, W/4), both before any sigmoid, of each layer.

        With `last` those of the last layer alone; else the last one comes first, then the others, as the loss has them.
        """
        found = self.model(images, output_hidden_states=True, return_dict=True)
        states, masks = found.transformer_decoder_intermediate_states, found.masks_queries_logits
        order = [len(masks) - 1, *([] if last else range(len(masks) - 1))]
        return [(self.class_predictor(states[layer].transpose(0, 1)), masks[layer]) for layer in order]

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to scores (B, classes, H, W), weighed as in `MaskWeighing`."""
        classes, masks = self.queries(images)[0]
        found: Tensor = self.weighing(classes, masks, images.shape[2:])
        return found

    def losses(self, images: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Mask2Former's own losses by name, each a mean over the images that have a class anywhere.

        Differs from transformers in two things. Each image has its own normaliser (theirs is one for the batch), so
        that micro-batches change nothing. Masks count for nothing where the truth (B, H, W) is IGNORED, but for a
        margin of some pixels. Points are drawn from the global generator, image by image.
        """
        layers = [(classes.float(), masks.float()) for classes, masks in self.queries(images, last=False)]
        each = [image for image in range(len(truth)) if bool((truth[image] != IGNORED).any())]
        if not each:
            return {"mask": layers[0][1].sum() * 0}
        with torch.autocast(images.device.type, enabled=False):
            found = [self._loss([(a[image], b[image]) for a, b in layers], truth[image]) for image in each]
        return {name: torch.stack([loss[name] for loss in found]).mean() for name in found[0]}

    def _loss(self, layers: list[tuple[Tensor, Tensor]], truth: Tensor) -> dict[str, Tensor]:
        """The losses of one image: classes (queries, classes + 1) and masks (queries, h, w) of each layer."""
        present = truth.unique()
        present = present[present != IGNORED]
        ignored = _far_from_labels(truth, layers[0][1].shape[1:])
        outputs = [
            {"class_queries_logits": classes[None], "masks_queries_logits": masks.masked_fill(ignored, _NO_MASK)[None]}
            for classes, masks in layers
        ]
        found = self.criterion(
            **outputs[0],
            mask_labels=[(truth == present[:, None, None]).float()],
            class_labels=[present.long()],
            auxiliary_predictions=outputs[1:],
        )
        return {
            name.removeprefix("loss_"): weight * torch.stack([v for key, v in found.items() if name in key]).sum()
            for name, weight in self.loss_weights.items()
        }


def _far_from_labels(truth: Tensor, size: torch.Size) -> Tensor:
    """(h, w) bool, coarser than the truth (H, W): positions that lie two positions or more from any class.

    Points of the loss are interpolated between neighbours: next to a class the mask has to stay as it is.
    """
    labelled = F.adaptive_max_pool2d((truth != IGNORED).float()[None, None], tuple(size))
    near = F.max_pool2d(labelled, 3, stride=1, padding=1)
    return near[0, 0] == 0


def _network(backbone: SwinBackbone, classes: int, section: Mask2FormerSection) -> Any:
    """Mask2FormerForUniversalSegmentation with new weights, drawn from the global generator, around `backbone`."""
    levels = len(backbone.channels)
    if levels < _LEAST_LEVELS:
        got = f"{levels} stages; the pixel decoder reads {_LEAST_LEVELS}"
        raise ConfigError("model.depths", got, "Give more stages, or set model.head: fpn.")
    from_extra("scipy", "model.head", "segment")  # its matching is called in training
    library = from_extra("transformers", "model.head", "segment")
    stand_in: dict[str, Any] = {  # a Swin of the same channels, with as few weights as possible: it is exchanged below
        "embed_dim": backbone.channels[0], "depths": [1] * levels, "num_heads": [1] * levels, "window_size": 1,
        "mlp_ratio": 1.0, "out_features": [f"stage{level + 1}" for level in range(levels)],
    }  # fmt: skip
    own: dict[str, Any] = {"num_labels": classes, "feature_strides": list(backbone.strides), **settings(section)}
    config = library.Mask2FormerConfig(backbone_config=library.SwinConfig(**stand_in), **own)
    net: Any = library.Mask2FormerForUniversalSegmentation(config)
    net.model.pixel_level_module.encoder = Encoder(backbone)
    return net


def settings(section: Mask2FormerSection) -> dict[str, Any]:
    """The section under transformers' names."""
    return {
        "num_queries": section.queries,
        **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), section.channels),
        "num_attention_heads": section.heads,
        "encoder_layers": section.encoder_layers,
        "encoder_feedforward_dim": section.encoder_feedforward,
        "decoder_layers": section.decoder_layers,
        "dim_feedforward": section.feedforward,
        "train_num_points": section.points,
        "class_weight": section.class_loss,
        "mask_weight": section.mask_loss,
        "dice_weight": section.dice_loss,
        "no_object_weight": section.no_object,
    }


# -- checkpoints of transformers ----------------------------------------------------------------------------------

_OF_THE_LOSS = {"train_num_points", "class_weight", "mask_weight", "dice_weight", "no_object_weight"}
"""Settings that may differ: they change nothing in the weights, nor in what is predicted."""


def check_settings(weights: Path, section: Mask2FormerSection) -> None:
    """Raises CheckpointError where the config.json beside `weights` says what their shapes do not tell."""
    file = weights.with_name("config.json")
    if not os.path.isfile(file):
        return
    with understood(file, "Save the model again with transformers."):
        theirs: Any = read_json(file)
        wanted = {**settings(section), "pre_norm": False}
        differ = {key: theirs[key] for key in wanted if key in theirs and theirs[key] != wanted[key]}
    told = [f"{key} {value}, here {wanted[key]}" for key, value in differ.items() if key not in _OF_THE_LOSS]
    if told:
        got = f"it was made with other settings: {'; '.join(told)}"
        raise CheckpointError(str(file), got, "Set model.mask2former to those.")
