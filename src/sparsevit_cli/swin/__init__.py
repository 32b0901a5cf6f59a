"""Window sparsity for timm's Swin: the only package that knows timm's Swin.

`sparsify_` swaps the classes of stages, blocks, patch mergings and patch embeddings in place, so parameters keep their
names and a dense model runs timm's own code. What is stored on the model are settings: tenths per block pair,
importance, kernels, partition, and whether it must equal timm to the bit.

A sparse model is computed in one of two ways, which agree to about 1e-5. In training, tracing and export timm's own
modules run between gather and scatter. At inference an engine of `kernels` runs, on a map that is changed in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from sparsevit_cli import windows
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.kernels import KERNELS, Kernels
from sparsevit_cli.sparsity import Ratios, SparsityConfig

from .bias import RememberedBias, are_current, held_biases, remembered_tensors
from .blocks import SPARSE_BLOCKS, SPARSE_MERGINGS, SparseBlock, StockBlock
from .embedding import SparsePatchEmbed, embeddings_of
from .inference import is_unwatched, without_kernels
from .sharing import shared_prefixes
from .stages import SPARSE_STAGES, SparseStage, SparseSwinTransformerStage
from .timm_swin import GENERATIONS, STAGES, Block, Stage

__all__ = [
    "GENERATIONS",
    "STAGES",
    "Block",
    "RememberedBias",
    "SparseBlock",
    "SparseStage",
    "SparseSwinTransformerStage",
    "Stage",
    "StockBlock",
    "are_current",
    "get_sparsity",
    "held_biases",
    "is_unwatched",
    "keep_counts",
    "model_depths",
    "remembered_tensors",
    "set_sparsity",
    "shared_prefixes",
    "sparse_stages",
    "sparsify_",
    "without_kernels",
]

_SPARSE_CLASS: dict[type[nn.Module], type[nn.Module]] = {**SPARSE_STAGES, **SPARSE_BLOCKS, **SPARSE_MERGINGS}


def sparsify_(
    model: nn.Module,
    *,
    importance: windows.Importance = "mean_abs_l2",
    kernels: Kernels = "auto",
    partition: windows.Partition | None = None,
) -> nn.Module:
    """Make every timm Swin stage inside `model` window-sparse, in place; returns `model`, still at ratio 0.

    A second call changes the settings only. Parameters, buffers and state-dict keys stay timm's.
    `kernels` says what runs at inference: `portable` (any device), `native` (C++ on a CPU, compiled at first use) or
    `triton` (a GPU), which fall back with a warning; `auto` is native on x86-64 with AVX2 and a compiler.
    `partition` says what comes first where shifted windows do not divide a map: `roll_first`, as in timm, or
    `pad_first`, which weights of transformers, mmdet, detectron2 and Microsoft's code were trained with. None keeps
    what the model has; a timm model has `roll_first`.
    Raises ConfigError when `model` holds no timm Swin stage, a subclass of one, or for an unknown name.
    """
    if kernels not in KERNELS:
        raise ConfigError("kernels", f"{kernels!r}; allowed are {', '.join(KERNELS)}", "Take auto if in doubt.")
    if importance not in windows.IMPORTANCES:
        got = f"{importance!r}; allowed are {', '.join(windows.IMPORTANCES)}"
        raise ConfigError("importance", got, "Take mean_abs_l2 if in doubt.")
    if partition is not None and partition not in windows.PARTITIONS:
        got = f"{partition!r}; allowed are {', '.join(windows.PARTITIONS)}"
        raise ConfigError("partition", got, "Take the one that the weights were trained with.")
    stages = [module for module in model.modules() if isinstance(module, STAGES)]
    if not stages:
        got = f"{type(model).__name__} contains no timm Swin Transformer stage"
        raise ConfigError("model", got, "Give a timm Swin, V2 or V2-CR, or a module that holds one.")
    blocks = [block for stage in stages for block in stage.blocks]
    for module in (*stages, *blocks):
        if type(module) not in _SPARSE_CLASS and type(module) not in _SPARSE_CLASS.values():
            got = f"{type(module).__name__} is not timm's own class, its forward would be replaced"
            raise ConfigError("model", got, "Give an unmodified timm Swin.")
    for number, stage in enumerate(stages):
        if type(stage) in SPARSE_STAGES:
            stage.sparsity_tenths = (0,) * ((len(stage.blocks) + 1) // 2)
        stage.importance, stage.kernels, stage.stage_number = importance, kernels, number
    for module in (*stages, *blocks, *(stage.downsample for stage in stages)):
        module.__class__ = _SPARSE_CLASS.get(type(module), type(module))
    for block in blocks if partition is not None else ():
        block.partition = partition
    for embed in embeddings_of(model):
        embed.__class__ = SparsePatchEmbed
        embed.kernels = kernels
    return model


def sparse_stages(model: nn.Module) -> list[SparseStage]:
    """The sparse stages in order. Raises ConfigError when there are none."""
    stages = [module for module in model.modules() if isinstance(module, SparseStage)]
    if not stages:
        raise ConfigError("model", f"{type(model).__name__} is not sparse", "Call sparsify_(model) first.")
    return stages


def model_depths(model: nn.Module) -> tuple[int, ...]:
    """Blocks per stage of a dense or sparse model. Raises ConfigError when there is no timm Swin stage."""
    depths = tuple(len(module.blocks) for module in model.modules() if isinstance(module, STAGES))
    if not depths:
        raise ConfigError("model", f"{type(model).__name__} contains no timm Swin stage", "Give a timm `swin_*`.")
    return depths


def set_sparsity(model: nn.Module, ratios: Ratios, *, exact: bool = True) -> None:
    """Set the sparsity ratio of every block pair: a SparsityConfig, lists per stage and pair, or one number.

    A model that is dense everywhere runs timm's own code, equal to the bit; with `exact=False` an engine computes it
    too at inference, equal to about 1e-5. Everything is validated before anything changes. Raises ConfigError
    (a ValueError).
    """
    stages = sparse_stages(model)
    config = SparsityConfig.from_ratios(ratios, tuple(len(stage.blocks) for stage in stages))
    for stage, tenths in zip(stages, config.tenths, strict=True):
        stage.sparsity_tenths = tenths
        stage.as_timm = exact and config.is_dense
    for embed in embeddings_of(model):
        embed.as_timm = exact and config.is_dense


@contextmanager
def keep_counts(model: nn.Module, counts: Sequence[Sequence[int | None]]) -> Iterator[None]:
    """Inside the block, each block pair of each stage keeps so many windows, and all of them for None.

    For programs that are traced: symbolic numbers of torch.export may stand for counts, which `set_sparsity` does not
    take. They never rise within a stage. The model must not be dense everywhere: then it runs timm's own code.
    """
    stages = sparse_stages(model)
    try:
        for stage, of_stage in zip(stages, counts, strict=True):
            stage.counts_set = tuple(of_stage)
        yield
    finally:
        for stage in stages:
            stage.counts_set = None


def get_sparsity(model: nn.Module) -> SparsityConfig:
    """The sparsity configuration that `model` runs at. Raises ConfigError when it is not sparse."""
    return SparsityConfig(tuple(stage.sparsity_tenths for stage in sparse_stages(model)))
