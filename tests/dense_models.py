"""Dense models that are small enough to be exported in a test: a segmenter, a detector, and tasks around them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from sparsevit_cli.backbones import SwinFPN
from sparsevit_cli.data import Categories, Data, Source
from sparsevit_cli.swin import set_sparsity, sparsify_
from sparsevit_cli.tasks.task import BuildOptions, Metric, Task

SIZE = (32, 48)
"""Maps of 8 x 12 and 4 x 6 tokens: windows of 3 do not divide them, and are padded."""
SETTINGS = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 3}


def pyramid(*, size: tuple[int, int] = SIZE, **settings: Any) -> SwinFPN:
    """A dense feature pyramid of two levels, 8 channels."""
    from sparsevit_cli.backbones import swin_fpn

    return swin_fpn(img_size=size, levels=(0, 1), out_channels=8, **{**SETTINGS, **settings})


def sparse(model: nn.Module, ratio: float = 0.5) -> nn.Module:
    """The same model, sparse and in evaluation mode."""
    set_sparsity(sparsify_(model), ratio)
    return model.eval()


class Segmenter(nn.Module):
    """A pyramid, its levels added up, a class per pixel."""

    def __init__(self, pyramid: SwinFPN) -> None:
        super().__init__()
        self.pyramid, self.answer = pyramid, nn.Conv2d(pyramid.out_channels, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = list(self.pyramid(images).values())
        summed = sum(F.interpolate(each, maps[0].shape[2:]) for each in maps)
        return F.interpolate(self.answer(summed), images.shape[2:])


class Output(OrderedDict):  # type: ignore[type-arg]
    """As transformers' ModelOutput: a dict of a class that no .pt2 file may ask for."""


class Wrapped(Segmenter):
    """A segmenter with an output of its own class."""

    def forward(self, images: Tensor) -> Output:  # type: ignore[override]
        return Output(classes=super().forward(images))


class Undecided(Segmenter):
    """A segmenter that no tracer can follow: what it does depends on its numbers."""

    def forward(self, images: Tensor) -> Tensor:
        found = super().forward(images)
        return found if found.sum() > 0 else -found


class _Boxes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Linear(width, 4), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(x), self.boxes(x)


def detector(pyramid: SwinFPN, *, threshold: float = 0.4) -> MaskRCNN:
    """torchvision's Mask R-CNN with light heads; it does not resize or normalise."""
    torch.manual_seed(0)

    def pool(side: int) -> MultiScaleRoIAlign:
        return MultiScaleRoIAlign(["0", "1"], side, 1)

    return MaskRCNN(
        pyramid, min_size=min(SIZE), max_size=max(SIZE), image_mean=[0] * 3, image_std=[1] * 3,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3), rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20, box_roi_pool=pool(3), box_head=nn.Sequential(nn.Flatten(), nn.Linear(72, 16)),
        box_predictor=_Boxes(16), box_score_thresh=threshold, box_detections_per_img=10, mask_roi_pool=pool(4),
        mask_head=nn.Conv2d(8, 8, 3, padding=1), mask_predictor=nn.Conv2d(8, 4, 1),
    )  # fmt: skip


class Noise(Source):
    """Images of noise without truth."""

    image_size = SIZE

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(index)), 0

    def resized(self, size: Any) -> Noise:
        return self

    def fingerprint(self) -> str:
        return "noise"


class Dense(Task):
    """A task whose models are exported, not trained."""

    name = "dense"
    metric = Metric("none", "none")

    def data(self, *, seed: int, categories: Categories | None) -> Data:
        return Data(Noise(), Noise(), Noise(), Categories())

    def build(self, categories: Categories | None, options: BuildOptions) -> nn.Module:
        return Segmenter(SwinFPN(self.swin_backbone(options, (0, 1)), 8))

    def features(self, model: nn.Module) -> nn.Module:
        return model.pyramid  # type: ignore[return-value]

    def loss(self, *_: Any) -> Any:
        raise NotImplementedError

    def scorer(self, *_: Any) -> Any:
        raise NotImplementedError


class Undecidable(Dense):
    """Its models cannot be traced."""

    name = "undecidable"

    def build(self, categories: Categories | None, options: BuildOptions) -> nn.Module:
        return Undecided(SwinFPN(self.swin_backbone(options, (0, 1)), 8))


class Detection(Dense):
    """Its models answer each image."""

    name = "detection"

    def build(self, categories: Categories | None, options: BuildOptions) -> nn.Module:
        return detector(SwinFPN(self.swin_backbone(options, (0, 1)), 8))

    def features(self, model: nn.Module) -> nn.Module:
        return model.backbone  # type: ignore[return-value]
