"""Files for other runtimes: fixed ratios, fixed height and width, any batch size; checked before they are called good.

    model.onnx         torch.onnx (dynamo), opset as asked; weights inside, or beside it where they are large
    model.pt2          torch.export
    model.safetensors  all weights under the model's names; sparsity.json: ratios and what builds the model
    manifest.json      shapes, hashes, differences to eager, latency; written last: without it a folder is not whole

`features.onnx`, `.pt2` and `.safetensors` are backbone and neck of a detector or segmenter (scope "features"). A whole
model that answers each image by boxes and masks is written for one image at a time, as ONNX alone.

Everything is made and checked in a hidden folder and moved into place at the end.
"""

from .checks import Difference, Lowered, runs_on
from .export import check_answers, export_model
from .folder import (
    DEFAULT_FORMATS,
    FEATURE_WEIGHTS,
    FORMATS,
    MANIFEST,
    SERVING,
    SPARSITY,
    WEIGHTS,
    ExportScope,
    ModelInfo,
    SparsityFile,
    load_exported,
    load_sparsity,
)
from .images import structured_images
from .precision import resolved_activations
from .programs import OneImage, UntraceableError, check_packages, named_tensors, with_fixed_outputs
from .reading import ExportFolder, is_export, open_export
from .report import SIZE_NOTE, ExportedFile, ExportReport, RuntimeLatency

__all__ = [
    "DEFAULT_FORMATS",
    "FEATURE_WEIGHTS",
    "FORMATS",
    "MANIFEST",
    "SERVING",
    "SIZE_NOTE",
    "SPARSITY",
    "WEIGHTS",
    "Difference",
    "ExportFolder",
    "ExportReport",
    "ExportScope",
    "ExportedFile",
    "Lowered",
    "ModelInfo",
    "OneImage",
    "RuntimeLatency",
    "SparsityFile",
    "UntraceableError",
    "check_answers",
    "check_packages",
    "export_model",
    "is_export",
    "load_exported",
    "load_sparsity",
    "named_tensors",
    "open_export",
    "resolved_activations",
    "runs_on",
    "structured_images",
    "with_fixed_outputs",
]
