"""Mask R-CNN and Faster R-CNN of torchvision's parts on a Swin with a feature pyramid."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from sparsevit_cli.backbones import SwinBackbone, SwinFPN
from sparsevit_cli.config.instances import InstancesModel
from sparsevit_cli.errors import ConfigError

Targets = Sequence[Mapping[str, Tensor]]
"""Per image `boxes` (n, 4) x0 y0 x1 y1 in pixels, `labels` (n,) from 1 on, `masks` (n, H, W) uint8 if there are any."""
Detections = list[dict[str, Tensor]]
"""Per image `boxes` (n, 4), `labels` (n,) from 1 on, `scores` (n,), best first, and `masks` (n, 1, M, M)."""
ANCHOR_STRIDES = 8
"""Side of an anchor over the stride of its level, as in torchvision: 32 pixels at stride 4."""


class Detector(nn.Module):
    """torchvision's GeneralizedRCNN without its transform; parameters keep the names that they have there.

    That transform resizes and normalises once more, in evaluation whatever it is told (`_skip_resize`). Here the
    data give what the backbone gets. Boxes are of the images given. A predicted mask stays as its head made it, M x M
    probabilities inside its box moved by `MASK_SHIFT`: pasted masks of all detections would fill the memory.

    The backbone and its neck run in the type of an autocast or of their weights, all that handles boxes in float32:
    bfloat16 counts pixels up to 256 only.
    """

    def __init__(self, backbone: SwinFPN, rpn: RegionProposalNetwork, roi_heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads

    def forward(self, images: Tensor, targets: Targets | None = None) -> Detections | dict[str, Tensor]:
        """Images (B, 3, H, W) to detections in evaluation mode, images and targets to losses in training mode."""
        sizes = [(int(images.shape[2]), int(images.shape[3]))] * len(images)
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            features = OrderedDict((name, level.float()) for name, level in features.items())
            proposals, losses = self.rpn(ImageList(images.float(), sizes), features, targets)
            detections, head_losses = self.roi_heads(features, proposals, sizes, targets)
        return {**losses, **head_losses} if self.training else detections

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Detector:
        """As torch's, for `to`, `half` and the like; proposals and heads never leave float32 for a smaller type."""
        super()._apply(fn, recurse)
        for part in (self.rpn, self.roi_heads):
            for parameter in part.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
        return self


MASK_SHIFT = 0.5
"""Pixels by which a mask lies right of and below its box.

torchvision cuts masks for training with RoIAlign's old convention, where pixel centres are whole numbers. So cell (0, 0)
of the mask learns from what lies half a pixel further on (torchvision.models.detection.roi_heads.project_masks_on_boxes).
"""


def build_detector(body: SwinBackbone, section: InstancesModel, categories: int, *, masks: bool) -> Detector:
    """A detector of so many `categories`; initial weights are drawn from torch's generator. Raises ConfigError."""
    outputs = categories + 1  # background is 0
    strides = (*body.strides, body.strides[-1] * 2)
    sizes = section.anchor_sizes or tuple(float(stride * ANCHOR_STRIDES) for stride in strides)
    if len(sizes) != len(strides):
        got = f"{len(sizes)} sizes for {len(strides)} levels, of strides {', '.join(map(str, strides))}"
        raise ConfigError("model.anchor_sizes", got, "Give one side in pixels per level, or null.")
    pyramid = SwinFPN(body, section.fpn_channels)
    channels, levels = section.fpn_channels, [str(level) for level in body.levels]
    anchors = AnchorGenerator(tuple((size,) for size in sizes), (section.anchor_ratios,) * len(sizes))
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=section.anchors_per_image,
        positive_fraction=0.5,
        pre_nms_top_n={"training": section.candidates_train, "testing": section.candidates_test},
        post_nms_top_n={"training": section.proposals_train, "testing": section.proposals_test},
        nms_thresh=0.7,
    )
    of_masks: dict[str, nn.Module] = {}
    if masks:
        of_masks = {
            "mask_roi_pool": MultiScaleRoIAlign(levels, section.mask_resolution, section.roi_samples),
            "mask_head": MaskRCNNHeads(channels, [section.mask_channels] * section.mask_convs, 1),
            "mask_predictor": MaskRCNNPredictor(section.mask_channels, section.mask_channels, outputs),
        }
    heads = RoIHeads(
        box_roi_pool=MultiScaleRoIAlign(levels, section.box_resolution, section.roi_samples),
        box_head=TwoMLPHead(channels * section.box_resolution**2, section.box_channels),
        box_predictor=FastRCNNPredictor(section.box_channels, outputs),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=section.rois_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=section.score_threshold,
        nms_thresh=section.nms_threshold,
        detections_per_img=section.detections_per_image,
        **of_masks,
    )
    return Detector(pyramid, rpn, heads)


def categories_of(weights: Mapping[str, Tensor]) -> int | None:
    """Categories that a detector of these weights tells apart; None if they are of no detector."""
    scores = weights.get("roi_heads.box_predictor.cls_score.weight")
    return None if scores is None else len(scores) - 1
