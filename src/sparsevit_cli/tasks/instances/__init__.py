"""Instance segmentation and detection: torchvision's heads on a Swin, scenes of digits or data in COCO's form, AP."""

from .task import Instances

__all__ = ["Instances"]
