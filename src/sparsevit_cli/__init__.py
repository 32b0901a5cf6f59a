"""Window-sparse Swin Transformers: adapt, search, finetune, profile and export (SparseViT, CVPR 2023).

    import timm, sparsevit_cli as sv
    model = sv.sparsify_(timm.create_model("swin_tiny_patch4_window7_224", img_size=672).eval())
    sv.set_sparsity(model, [[0.6], [0], [0.2, 0.4, 0.5], [0]])

Everything public is imported on first use, so that `import sparsevit_cli` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .acceleration import accelerate_
    from .backbones import swin_backbone, swin_fpn
    from .exporting import export_model, load_exported
    from .profiling.latency import measure_latency
    from .profiling.macs import count_macs
    from .search.budget import Budget
    from .search.engine import search_sparsity
    from .sparsity import SearchSpace, SparsityConfig
    from .swin import get_sparsity, set_sparsity, sparsify_

_HOME = {
    "Budget": ".search.budget",
    "SearchSpace": ".sparsity",
    "SparsityConfig": ".sparsity",
    "accelerate_": ".acceleration",
    "count_macs": ".profiling.macs",
    "export_model": ".exporting",
    "get_sparsity": ".swin",
    "load_exported": ".exporting",
    "measure_latency": ".profiling.latency",
    "search_sparsity": ".search.engine",
    "set_sparsity": ".swin",
    "sparsify_": ".swin",
    "swin_backbone": ".backbones",
    "swin_fpn": ".backbones",
}

__all__ = [
    "Budget",
    "SearchSpace",
    "SparsityConfig",
    "accelerate_",
    "count_macs",
    "export_model",
    "get_sparsity",
    "load_exported",
    "measure_latency",
    "search_sparsity",
    "set_sparsity",
    "sparsify_",
    "swin_backbone",
    "swin_fpn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
