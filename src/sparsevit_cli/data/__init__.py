"""Images in, batches out: the embedded digits, ImageFolder trees, and what timm.data.create_dataset reads."""

from .build import DataBundle, build_data
from .loader import Batch, epoch_order, eval_batches, num_batches, train_batches
from .source import ImageSource
from .splits import fixed_subset

__all__ = [
    "Batch",
    "DataBundle",
    "ImageSource",
    "build_data",
    "epoch_order",
    "eval_batches",
    "fixed_subset",
    "num_batches",
    "train_batches",
]
