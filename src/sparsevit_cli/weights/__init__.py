"""Weights from anywhere: read as data, renamed to ours, and loaded exactly or not at all."""

from .families import FAMILIES, Family, to_family
from .files import WeightsFile, read_file, weights_in
from .loading import Say, fitted, load_state, load_weights, other_partition, read_weights, tell_log, with_our_names

__all__ = [
    "FAMILIES",
    "Family",
    "Say",
    "WeightsFile",
    "fitted",
    "load_state",
    "load_weights",
    "other_partition",
    "read_file",
    "read_weights",
    "tell_log",
    "to_family",
    "weights_in",
    "with_our_names",
]
