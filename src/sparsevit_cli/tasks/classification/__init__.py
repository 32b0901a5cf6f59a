"""Image classification, the first task: data readers, losses and score. Nothing outside of it imports it by name."""

from .task import Classification

__all__ = ["Classification"]
