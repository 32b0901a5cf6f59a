"""Semantic segmentation: a class for every pixel. Nothing outside of it imports it by name."""

from .task import SemanticSegmentation

__all__ = ["SemanticSegmentation"]
