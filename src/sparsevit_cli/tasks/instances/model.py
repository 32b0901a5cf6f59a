"""Mask R-CNN and Faster R-CNN of torchvision's parts on a Swin with a feature pyramid."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from sparsevit_cli.backbones import SwinBackbone, SwinFPN
from sparsevit_cli.config.instances import InstancesModel
from sparsevit_cli.errors import ConfigError

Maps = OrderedDict[str, Tensor]
Targets = Sequence[Mapping[str, Any]]
"""Per image `boxes` (n, 4) x0 y0 x1 y1 in pixels, `labels` (n,) from 1 on, `masks` (n, H, W) uint8 if there are any,
and `draw`, the seed by which its anchors and regions are drawn."""
Padded = Mapping[str, Any]
"""`images` (B, 3, H, W), padded at the bottom and right, and `sizes`, (height, width) of each without its padding."""
Detections = list[dict[str, Tensor]]
"""Per image `boxes` (n, 4), `labels` (n,) from 1 on, `scores` (n,), best first, and `masks` (n, 1, M, M)."""
ANCHOR_STRIDES = 8
"""Side of an anchor over the stride of its level, as in torchvision: 32 pixels at stride 4."""


class Proposals(RegionProposalNetwork):
    """torchvision's, with anchors drawn by the seed of their image.

    torchvision draws from the global generator for the whole batch, so that a split of the batch would move the draws.
    """

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: Targets) -> tuple[list[Tensor], list[Tensor]]:
        """Labels 1 and 0 for the drawn anchors alone, -1 for all others; and the box of every anchor."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        return [self._drawn(of_image, target) for of_image, target in zip(labels, targets, strict=True)], boxes

    def _drawn(self, labels: Tensor, target: Mapping[str, Any]) -> Tensor:
        with _drawing_for(target, labels.device):
            (positive,), (negative,) = self.fg_bg_sampler([labels])
        return torch.where((positive | negative).bool(), labels, -1.0)


class Suppression(nn.Module):
    """torchvision's choice of detections, as a module: a profile sees what runs inside modules.

    At full load the thresholds of score and overlap do not count, and every proposal stands for its best category: as
    many boxes are compared, and as many kept, as an image can give. All categories of all proposals would be far more.
    """

    is_at_full_load = False

    def forward(
        self, heads: RoIHeads, scores: Tensor, moves: Tensor, proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Any:
        """Boxes, scores and labels of each image, from the answers of the box head; see `RoIHeads`."""
        if self.is_at_full_load:
            per_image = scores.split([len(of_image) for of_image in proposals])
            scores = torch.cat([_best_only(of_image, heads.detections_per_img) for of_image in per_image])
        return RoIHeads.postprocess_detections(heads, scores, moves, proposals, sizes)

    @contextmanager
    def at_full_load(self, heads: RoIHeads) -> Iterator[None]:
        """At full load inside the block."""
        before = heads.score_thresh, heads.nms_thresh
        self.is_at_full_load, heads.score_thresh, heads.nms_thresh = True, 0.0, 1.0
        try:
            yield
        finally:
            self.is_at_full_load = False
            heads.score_thresh, heads.nms_thresh = before


def _best_only(scores: Tensor, least: int) -> Tensor:
    """Scores (n, 1 + categories), before softmax, of one image without those that are not a proposal's best.

    A proposal keeps its best category, or more of them if `least` detections need more. Background stays.
    """
    proposals, categories = len(scores), scores.shape[1] - 1
    several = min(categories, -(-least // max(1, proposals)))
    best = scores[:, 1:].topk(several).indices + 1
    kept = torch.cat([torch.zeros_like(best[:, :1]), best], dim=1)
    return torch.full_like(scores, -torch.inf).scatter(1, kept, scores.gather(1, kept))


class Regions(RoIHeads):
    """torchvision's, with regions drawn by the seed of their image, and losses that are means over images.

    torchvision's loss of masks is a mean over regions with an object, of which images have different numbers.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.suppression = Suppression()

    def forward(
        self, features: Maps, proposals: list[Tensor], sizes: list[tuple[int, int]], own: list[tuple[int, int]]
    ) -> Detections:
        """torchvision's detections in inference. Differs: they are cut at the image's `own` size."""
        found = self.box_head(self.box_roi_pool(features, proposals, sizes))
        boxes, scores, labels = self.suppression(self, *self.box_predictor(found), proposals, own)
        detections = [
            {"boxes": box, "labels": label, "scores": score}
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]
        if self.has_mask():
            drawn = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, sizes)))
            for detection, masks in zip(detections, maskrcnn_inference(drawn, labels), strict=True):
                detection["masks"] = masks
        return detections

    def select_training_samples(self, proposals: list[Tensor], targets: Targets) -> tuple[list[Tensor], ...]:
        """Regions, numbers of their objects, labels and what to regress, a tensor per image each."""
        drawn = []
        for of_image, target in zip(proposals, targets, strict=True):
            with _drawing_for(target, of_image.device):
                drawn.append([part[0] for part in super().select_training_samples([of_image], [target])])
        regions, objects, labels, regressed = (list(parts) for parts in zip(*drawn, strict=True))
        return regions, objects, labels, regressed

    def losses(
        self, features: Maps, proposals: list[Tensor], sizes: list[tuple[int, int]], targets: Targets
    ) -> dict[str, Tensor]:
        """torchvision's losses by its names."""
        regions, objects, labels, regressed = self.select_training_samples(proposals, targets)
        found = self.box_head(self.box_roi_pool(features, regions, sizes))
        classified, boxed = fastrcnn_loss(*self.box_predictor(found), labels, regressed)
        losses = {"loss_classifier": classified, "loss_box_reg": boxed}
        if self.has_mask():
            has_object = [of_image > 0 for of_image in labels]
            regions, objects = (
                [of_image[chosen] for of_image, chosen in zip(part, has_object, strict=True)]
                for part in (regions, objects)
            )
            drawn = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, regions, sizes)))
            per_image = drawn.split([len(of_image) for of_image in regions])
            masks = [
                maskrcnn_loss(mask, [region], [target["masks"]], [target["labels"]], [number])
                for mask, region, number, target in zip(per_image, regions, objects, targets, strict=True)
            ]
            losses["loss_mask"] = torch.stack(masks).mean()
        return losses


@contextmanager
def _drawing_for(target: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of `device` start at the target's `draw` inside the block."""
    seed = int(target["draw"])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


class Detector(nn.Module):
    """torchvision's GeneralizedRCNN without its transform; parameters keep the names that they have there.

    That transform resizes and normalises once more, in evaluation whatever it is told (`_skip_resize`). Here the
    data give what the backbone gets. Boxes are of the images given. A predicted mask stays as its head made it, M x M
    probabilities inside its box moved by `MASK_SHIFT`: pasted masks of all detections would fill the memory.

    The backbone and its neck run in the type of an autocast or of their weights, all that handles boxes in float32:
    bfloat16 counts pixels up to 256 only.
    """

    def __init__(self, backbone: SwinFPN, rpn: Proposals, roi_heads: Regions) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = backbone, rpn, roi_heads

    def forward(self, inputs: Tensor | Padded, targets: Targets | None = None) -> Detections | dict[str, Tensor]:
        """Images (B, 3, H, W) to detections in evaluation mode, images and targets to losses in training mode.

        Of images that are padded the padding is neither ranked nor counted, and no proposal or detection lies in it.
        """
        images, own = (inputs, None) if isinstance(inputs, Tensor) else (inputs["images"], list(inputs["sizes"]))
        sizes = [(int(images.shape[2]), int(images.shape[3]))] * len(images)  # what torchvision scales regions by
        features: Maps = self.backbone(images, own)
        dtype = next(self.rpn.parameters()).dtype
        with torch.autocast(images.device.type, enabled=False):
            features = OrderedDict((name, level.to(dtype)) for name, level in features.items())
            proposals, losses = self.rpn(ImageList(images.to(dtype), own or sizes), features, targets)
            if self.training:
                assert targets is not None, "training needs targets"
                return {**losses, **self.roi_heads.losses(features, proposals, sizes, targets)}
            detections: Detections = self.roi_heads(features, proposals, sizes, own or sizes)
            return detections

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Detector:
        """As torch's, for `to`, `half` and the like; proposals and heads never leave float32 for a smaller type."""

        def unrounded(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return tensor.to(moved.device, torch.float32) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        self.backbone._apply(fn, recurse)
        for part in (self.rpn, self.roi_heads):
            part._apply(unrounded, recurse)
        return self


MASK_SHIFT = 0.5
"""Pixels by which a mask lies right of and below its box.

torchvision cuts the masks that it teaches with RoIAlign's old convention, where pixel centres are whole numbers
(`project_masks_on_boxes` in torchvision.models.detection.roi_heads). So each cell learns what lies half a pixel
further on.
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
    rpn = Proposals(
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
    heads = Regions(
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
