"""Files for other runtimes: fixed ratios, fixed height and width, any batch size; checked before they are called good.

    model.onnx         torch.onnx (dynamo), opset as asked; weights inside, or beside it where they are large
    model.pt2          torch.export
    model.safetensors  the weights under timm's names; sparsity.json: ratios and what builds the model
    manifest.json      shapes, hashes, differences to eager, latency; written last: without it a folder is not whole

Everything is made and checked in a hidden folder and moved into place at the end.
"""

from .checks import Difference
from .export import FORMATS, SIZE_NOTE, ExportedFile, ExportReport, export_model
from .folder import MANIFEST, SPARSITY, WEIGHTS, ModelInfo, SparsityFile, load_exported, load_sparsity
from .images import structured_images
from .programs import check_packages

__all__ = [
    "FORMATS",
    "MANIFEST",
    "SIZE_NOTE",
    "SPARSITY",
    "WEIGHTS",
    "Difference",
    "ExportReport",
    "ExportedFile",
    "ModelInfo",
    "SparsityFile",
    "check_packages",
    "export_model",
    "load_exported",
    "load_sparsity",
    "structured_images",
]
