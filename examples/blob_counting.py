"""A task of your own: how many bright blobs does an image show? One number per image, learned by regression.

usage: sparsevit run --task examples/blob_counting.py:BlobCounting --config examples/blob_counting.yaml
"""

import torch

from sparsevit_cli.data import Data, Source
from sparsevit_cli.sizes import as_pair
from sparsevit_cli.tasks.task import Metric, Task


class Blobs(Source):
    """Images (3, H, W) of weak noise with 0 to 9 blobs, and their number; a function of (split, index) alone."""

    def __init__(self, count, first, size):
        self.count, self.first, self._size = count, first, as_pair(size)

    image_size = property(lambda self: self._size)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        drawn = torch.Generator().manual_seed(self.first + index)
        image, blobs = 0.1 * torch.randn(3, *self._size, generator=drawn), (self.first + index) % 10
        for _ in range(blobs):
            top, left = (int(torch.randint(side - 6, (), generator=drawn)) for side in self._size)
            image[:, top : top + 6, left : left + 6] = 2.0
        return image, torch.tensor(float(blobs))

    def resized(self, size):
        return Blobs(self.count, self.first, size)

    def fingerprint(self):
        return f"blobs {self.count} from {self.first} at {self._size}"


def counted(outputs):
    return 10 * outputs.squeeze(1)  # networks start with outputs near 0


class Right:
    """Share of images whose number is right once it is rounded, and the mean distance from it."""

    def __init__(self):
        self.right, self.distance, self.count = 0, 0.0, 0

    def update(self, outputs, batch):
        distance = (counted(outputs) - batch.targets).abs()
        self.right += int((distance < 0.5).sum())
        self.distance += float(distance.sum())
        self.count += len(batch)

    def compute(self):
        return {"right": 100 * self.right / self.count, "distance": self.distance / self.count}


class BlobCounting(Task):
    name = "blob_counting"
    metric = Metric("right", "counted right")

    def data(self, *, seed, categories):
        return Data(*(Blobs(count, first, self.image_size) for count, first in ((640, 0), (160, 1000), (200, 2000))))

    def build(self, categories, options):
        return self.swin(1, options)

    def loss(self, model, batch, section, teacher):
        return {"distance": torch.nn.functional.smooth_l1_loss(counted(model(batch.inputs)), batch.targets)}

    def scorer(self, source, device):
        return Right()
