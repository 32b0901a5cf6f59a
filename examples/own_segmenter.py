"""A segmenter of your own: a timm Swin with features_only=True, and a head. It paints each digit of a scene.

usage: sparsevit run --task examples/own_segmenter.py:OwnSegmenter --config examples/own_segmenter.yaml
"""

import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.tv_tensors import Mask

from sparsevit_cli.data import Categories, Data, Source
from sparsevit_cli.data.digit_scenes import DigitScenes
from sparsevit_cli.data.digits import DigitsSpec
from sparsevit_cli.seeding import seeded
from sparsevit_cli.sizes import as_pair
from sparsevit_cli.tasks.task import Metric, Task


class Segmenter(nn.Module):  # as its author wrote it: nothing of sparsevit_cli is in it
    def __init__(self, size, classes):
        super().__init__()
        small = {"embed_dim": 48, "depths": (2, 2, 4), "num_heads": (2, 4, 8), "window_size": 4, "img_size": size}
        free = {"features_only": True, "out_indices": (0, 1, 2), "strict_img_size": False, "always_partition": True}
        self.swin = timm.create_model("swin_tiny_patch4_window7_224", **small, **free)
        channels = self.swin.feature_info.channels()
        self.levels = nn.ModuleList(nn.Sequential(nn.LayerNorm(each), nn.Linear(each, 48)) for each in channels)
        head = nn.Conv2d(48, 48, 3, padding=1), nn.GroupNorm(8, 48), nn.ReLU(), nn.Conv2d(48, classes, 1)
        self.head = nn.Sequential(*head)

    def forward(self, images):
        maps = zip(self.levels, self.swin(images), strict=True)  # timm's maps are (B, H, W, C)
        maps = [level(x).permute(0, 3, 1, 2) for level, x in maps]
        summed = sum(F.interpolate(x, maps[0].shape[2:], mode="bilinear") for x in maps)
        return F.interpolate(self.head(summed), images.shape[2:], mode="bilinear")


class Scenes(DigitScenes, Source):
    image_size = property(lambda self: as_pair(self.spec.canvas))

    def __getitem__(self, index):
        scene = super().__getitem__(index)  # a smaller rival learns from smaller masks, and is judged at full size
        return scene.image, Mask(scene.class_map) if self.split == "train" else scene.class_map

    def resized(self, size):
        return Scenes(DigitsSpec(as_pair(size)[0]), self.split, self.seed)


class Overlap:
    def __init__(self, classes, device):
        self.pairs = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def update(self, outputs, batch):
        outputs = F.interpolate(outputs, batch.targets.shape[1:], mode="bilinear")  # as it is, but for a smaller rival
        pairs = batch.targets * len(self.pairs) + outputs.argmax(1)
        self.pairs += pairs.flatten().bincount(minlength=self.pairs.numel()).view_as(self.pairs)

    def compute(self):
        right = self.pairs.diag()
        return {"miou": 100 * float((right / (self.pairs.sum(0) + self.pairs.sum(1) - right).clamp(min=1)).mean())}


class OwnSegmenter(Task):
    name, metric, counted = "own_segmenter", Metric("miou", "mIoU"), "pixels"

    def data(self, *, seed, categories):
        splits = (Scenes(DigitsSpec(self.image_size[0]), split, seed) for split in ("train", "search", "val"))
        return Data(*splits, Categories(("background", *Scenes.names)), split_seed=seed)

    def build(self, categories, options):
        with seeded(options.seed):
            return Segmenter(options.img_size or self.image_size, 11)

    def loss(self, model, batch, section, teacher):
        each = F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
        return {"loss": (each * torch.where(batch.targets > 0, 1.0, 0.25)).mean()}  # most of a scene is background

    def scorer(self, source, device):
        return Overlap(11, device)

    def backbone(self, model):
        return model.swin
