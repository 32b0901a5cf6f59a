"""Samples in, batches out. Nothing here knows a task; the embedded digits are drawn here, for all tasks."""

from .loader import epoch_order, eval_batches, num_batches, train_batches
from .shrunk import Shrunk
from .source import Batch, Categories, Data, Source, WrappedSource
from .splits import fixed_subset

__all__ = [
    "Batch",
    "Categories",
    "Data",
    "Shrunk",
    "Source",
    "WrappedSource",
    "epoch_order",
    "eval_batches",
    "fixed_subset",
    "num_batches",
    "train_batches",
]
