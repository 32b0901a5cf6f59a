"""Multiply-adds per image (MACs; FLOPs = 2 MACs), counted three ways.

`flopcounter_macs` is torch's own counter: it watches one forward pass of any model, detectors included, tells its parts
apart, and is what reports show. `count_macs` traces the model with fvcore, which needs a forward pass that its inputs
do not steer. `analytic_macs` reckons from the Swin's sizes and its ratios, and runs nothing. `macs_cost` serves the
search: it counts everything that a workload runs, at any configuration.

All of them count the matrix products and convolutions of timm's modules. Attention runs on whole windows, with their
padding. The MLP of a dense block runs on the tokens of the map; the MLP of a sparse block runs on all tokens of the
kept windows. Our kernels compute less of the padding: `padding_macs` counts that difference.

V2 and V2-CR make their position bias with a small network, once per forward. In a batch of several images the two
counters that trace share its multiply-adds among the images; `analytic_macs` counts them for one image.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.search.additive import AdditiveCost
from sparsevit_cli.sparsity import MAX_TENTHS
from sparsevit_cli.swin import StockBlock
from sparsevit_cli.swin.geometry import (
    BlockShape,
    StageShape,
    has_only_a_swin,
    images_seen,
    named_stages,
    sparsity_or_dense,
    stem_name,
    swin_shape,
    weights_in,
)
from sparsevit_cli.windows import num_keep, window_grid

from .inputs import InputSize, Measured, evaluating, uncompiled
from .memory import memory_errors
from .parts import REST, Parts, calls_told, labelled
from .workload import Workload, dense_meanwhile, image_workload

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MacsReport(Measured):
    """Multiply-adds per image: `total`, and its split into `parts` (stem, stage 0 ..., head).

    `uncounted` tells operators met that may hold matrix products and have no count: operator -> occurrences.
    """

    total: float
    parts: Mapping[str, float]
    counter: str
    uncounted: Mapping[str, int]

    @property
    def gmacs(self) -> float:
        """Total in 10^9."""
        return self.total / 1e9

    def __float__(self) -> float:
        return float(self.total)

    def __int__(self) -> int:
        return round(self.total)

    def __str__(self) -> str:
        return f"{self.gmacs:.4g} GMACs"


def count_macs(model: nn.Module, input_size: InputSize = 224, *, batch_size: int = 1) -> MacsReport:
    """Multiply-adds per image of `model`, at the sparsity it is set to, from a trace by fvcore.

    `input_size` is a side, (H, W), (C, H, W) or an example batch. Any module is accepted; parts other than `head`
    are told for timm Swins only. Normalisation, activations and other elementwise work are not counted, by anyone.
    Runs one forward pass. Raises ConfigError, ResourceError.
    """
    return traced_macs(image_workload(uncompiled(model), input_size, batch_size))


def traced_macs(workload: Workload) -> MacsReport:
    """`count_macs` of a workload, per sample; whatever runs beside the Swin's stem and stages is part of `head`."""
    model = uncompiled(workload.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore stands on torch.jit, which is deprecated
        from fvcore.nn import FlopCountAnalysis

        traceable = _OfTensors(workload.of(model))
        analysis = FlopCountAnalysis(traceable, workload.tensors).set_op_handle(**_HANDLES)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        with evaluating(model), memory_errors(str(workload)), _quiet_fvcore():
            by_module = analysis.by_module()
            unsupported = analysis.unsupported_ops()
    parts = {label: by_module[f"model.{name}"] / workload.batch for label, name in _part_names(model).items()}
    total = by_module[""] / workload.batch
    parts["head"] = total - sum(parts.values())
    uncounted = {op: count for op, count in sorted(unsupported.items()) if op not in _ELEMENTWISE}
    return MacsReport(total, parts, "fvcore", uncounted)


class _OfTensors(nn.Module):
    """A workload's model from tensors to tensors, as torch.jit traces it; everything else in its inputs is fixed."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.model = workload.model
        self._leaves, self._structure = tree_flatten(workload.inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors among the model's outputs; the inputs where it returns none."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        outputs = tree_leaves(self.model(tree_unflatten(leaves, self._structure)))
        return tuple(output for output in outputs if isinstance(output, Tensor)) or tensors


def padding_macs(workload: Workload) -> float:
    """Multiply-adds per image that `count_macs` counts and `kernels` leave out: those of padding, for these inputs.

    Left out are linear layers; attention, a few percent of a block, is counted for whole windows. Which windows are
    kept decides how much that is, so one forward pass runs. Zero where maps need no padding, where timm's own modules
    run, and where padding is masked instead.
    """
    left_out = 0

    def count(block: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        nonlocal left_out
        stock: StockBlock | None = kwargs.get("stock")
        if stock is None:
            return
        rows, (batch, height, width, _) = kwargs["kept"].rows, args[0].shape
        skips = rows.shape[1] < math.prod(window_grid(height, width, block.window_size))
        if skips and not stock.engine.leaves_out_padding(args[0].flatten(0, 2), stock.weights):
            return
        layers = (block.attn.qkv, block.attn.proj, *((block.mlp,) if skips else ()))
        left_out += int((rows == batch * height * width).sum()) * sum(map(weights_in, layers))

    count.keeps_nothing = True  # type: ignore[attr-defined]
    blocks = [block for _, stage in named_stages(workload.model) for block in stage.blocks]
    hooks = [block.register_forward_pre_hook(count, with_kwargs=True) for block in blocks]
    try:
        with evaluating(workload.model), memory_errors(str(workload)):
            workload.run()
    finally:
        for hook in hooks:
            hook.remove()
    return left_out / workload.batch


def flopcounter_macs(workload: Workload, parts: Parts | None = None) -> MacsReport:
    """Multiply-adds per sample by torch.utils.flop_counter (its FLOPs halved); runs one forward pass.

    Without `parts` all of them are in the part `rest`. Where the work depends on the inputs, as that of a detector's
    heads does, this pass's is counted. `uncounted` names operators that multiply two tensors of real numbers, as far as
    anybody knows, and have no count. Raises ConfigError, ResourceError.
    """
    workload = workload.of(uncompiled(workload.model))
    parts = parts or {}
    counter, unknown = FlopCounterMode(display=False), _Uncounted()
    began: dict[str, int] = {}
    flops = dict.fromkeys(parts, 0)

    def enter(name: str) -> None:
        began[name] = counter.get_total_flops()

    def leave(name: str) -> None:
        flops[name] += counter.get_total_flops() - began[name]

    with (
        evaluating(workload.model),
        memory_errors(str(workload)),
        calls_told(labelled(parts), enter, leave),
        _attention_in_pieces(),
        unknown,
        counter,  # the innermost: it takes composite operators to pieces, which `unknown` then sees
    ):
        workload.run()
    counted = {name: count / 2 / workload.batch for name, count in flops.items()}
    total = counter.get_total_flops() / 2 / workload.batch
    return MacsReport(
        total, {**counted, REST: total - sum(counted.values())}, "torch", dict(sorted(unknown.met.items()))
    )


@contextmanager
def _attention_in_pieces() -> Iterator[None]:
    """torch's attention layers without their fast path, which is one operator that nobody has a formula for."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Uncounted(TorchDispatchMode):
    """Counts in `met` the operators that may hold a matrix product and that FlopCounterMode has no formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.met: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        name = str(packet).replace(".", "::")
        known = packet in flop_registry or func.is_view or torch.Tag.pointwise in func.tags
        if not known and name not in _ELEMENTWISE and name not in _ELEMENTWISE_INSIDE:
            tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
            if sum(tensor.is_floating_point() for tensor in tensors) > 1:
                self.met[name] += 1
        return func(*args, **(kwargs or {}))


def analytic_macs(workload: Workload) -> MacsReport:
    """Multiply-adds per image from the shapes of a timm Swin and the ratios it is set to; nothing runs.

    Counts the Swin inside the model and its classifier, on images of the workload's size; modules around the Swin are
    left out. Works on the meta device. Raises ConfigError.
    """
    model = workload.model
    shapes = _swin_macs(model, workload.image_size)
    parts: dict[str, float] = {"stem": shapes.stem}
    stages = zip(sparsity_or_dense(model).tenths, shapes.merging, shapes.pairs, strict=True)
    for number, (tenths, merging, pairs) in enumerate(stages):
        parts[f"stage {number}"] = merging + sum(pair[t] for pair, t in zip(pairs, tenths, strict=True))
    parts["head"] = shapes.head
    return MacsReport(sum(parts.values()), parts, "analytic", {})


def macs_cost(workload: Workload) -> AdditiveCost:
    """From configuration to multiply-adds per sample of all that the workload runs. Calls are fast.

    For a Swin alone it equals `analytic_macs`, and nothing runs. With modules around the Swin, such as a neck, one
    forward pass of the dense model is counted here (`flopcounter_macs`): the stages follow the configuration, all else
    stays as it was counted. Raises ConfigError and ResourceError here; the cost itself raises ConfigError for a
    configuration of another model.
    """
    model = uncompiled(workload.model)
    found = _alone(model, workload.image_size) if has_only_a_swin(model) else _with_surroundings(workload)
    return AdditiveCost(found.fixed, found.pairs, (0.0,) * len(found.pairs))


_Pairs = tuple[tuple[tuple[float, ...], ...], ...]
"""Multiply-adds by stage, block pair and tenths."""


@dataclass(frozen=True)
class _Split:
    """Multiply-adds per sample that no ratio changes, and those of the block pairs."""

    fixed: float
    pairs: _Pairs


def _alone(model: nn.Module, image: tuple[int, int]) -> _Split:
    macs = _swin_macs(model, image)
    return _Split(macs.stem + sum(macs.merging) + macs.head, macs.pairs)


def _with_surroundings(workload: Workload) -> _Split:
    """From one forward pass of the dense model; the Swin may see several images per sample, of any size."""
    model = uncompiled(workload.model)
    with dense_meanwhile(model), images_seen(model) as seen:
        report = flopcounter_macs(workload)
    if not seen:
        got = f"{type(model).__name__} does not call the Swin inside it"
        raise ConfigError("model", got, "Give a model whose forward runs its Swin.")
    if report.uncounted:
        log.warning("multiply-adds leave out operators without a count: %s", dict(report.uncounted))
    shares = [(images / workload.batch, _swin_macs(model, image).pairs) for images, _, *image in seen]
    first = shares[0][1]
    pairs = tuple(
        tuple(
            tuple(sum(share * macs[stage][pair][t] for share, macs in shares) for t in range(MAX_TENTHS + 1))
            for pair in range(len(first[stage]))
        )
        for stage in range(len(first))
    )
    return _Split(report.total - sum(pair[0] for stage in pairs for pair in stage), pairs)


@dataclass(frozen=True)
class _SwinMacs:
    """Multiply-adds of a Swin and one image: fixed ones, and `pairs[stage][pair][tenths]`."""

    stem: int
    merging: tuple[int, ...]
    pairs: tuple[tuple[tuple[int, ...], ...], ...]
    head: int


def _swin_macs(model: nn.Module, image: Sequence[int]) -> _SwinMacs:
    shape = swin_shape(model, image)
    return _SwinMacs(
        stem=shape.patches * shape.stem_weights,
        merging=tuple(stage.tokens * stage.merging_weights for stage in shape.stages),
        pairs=tuple(map(_pairs_macs, shape.stages)),
        head=shape.head_weights,
    )


def _pairs_macs(stage: StageShape) -> tuple[tuple[int, ...], ...]:
    """Multiply-adds of every block pair of a stage, at 0 ... MAX_TENTHS tenths."""
    pairs = [stage.blocks[first : first + 2] for first in range(0, len(stage.blocks), 2)]
    return tuple(
        tuple(sum(block_macs(block, stage.height, stage.width, t) for block in pair) for t in range(MAX_TENTHS + 1))
        for pair in pairs
    )


def block_macs(block: BlockShape, height: int, width: int, tenths: int) -> int:
    """Multiply-adds of one block on a map of `height` x `width` tokens."""
    rows, cols = window_grid(height, width, block.window)
    num_windows, area = rows * cols, block.window_area
    kept = num_keep(num_windows, tenths)
    mlp_rows = kept * area if kept < num_windows else height * width
    attention = 2 * area * block.attention_channels  # per token: q @ k and attn @ v over all heads
    projections = block.qkv_weights + block.proj_weights
    return kept * area * (projections + attention) + mlp_rows * block.mlp_weights + block.position_macs


def _part_names(model: nn.Module) -> dict[str, str]:
    """Label of a part -> name of its module."""
    stem = stem_name(model)
    stages = {f"stage {number}": name for number, (name, _) in enumerate(named_stages(model))}
    return stages if stem is None else {"stem": stem} | stages


@contextmanager
def _quiet_fvcore() -> Iterator[None]:
    """Uncalled modules and the tracer are of no interest; what was not counted is reported by us."""
    logger = logging.getLogger("fvcore")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _attention_handle(inputs: list[Any], outputs: list[Any]) -> int:
    """Fused attention: q (..., L, E), k (..., S, E), v (..., S, Ev)."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return int(math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]))


def _baddbmm_handle(inputs: list[Any], outputs: list[Any]) -> int:
    a, b = (value.type().sizes() for value in inputs[1:3])
    return int(math.prod(a) * b[-1])


def _no_macs(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


_HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    **dict.fromkeys(
        (
            "aten::scaled_dot_product_attention",
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
        ),
        _attention_handle,
    ),
    "aten::baddbmm": _baddbmm_handle,
    # fvcore counts these with guessed factors; they hold no matrix product
    **dict.fromkeys(
        (
            "aten::layer_norm",
            "aten::batch_norm",
            "aten::group_norm",
            "aten::instance_norm",
            "aten::adaptive_avg_pool2d",
            "aten::upsample_nearest2d",
            "aten::upsample_bilinear2d",
            "aten::grid_sampler",
        ),
        _no_macs,
    ),
}

_ELEMENTWISE = frozenset(
    f"aten::{name}"
    for name in """
        abs add add_ amax amin argmax argsort avg_pool2d bitwise_and bitwise_or bitwise_xor ceil clamp clamp_min copy_
        cumsum div elu eq exp expand_as fill_ flip floor floor_divide gather ge gelu gt index index_add index_copy
        index_put index_put_ index_select le leaky_relu linalg_vector_norm log log_softmax logical_and logical_or lt
        masked_fill masked_fill_ max max_pool2d maximum mean min minimum mT mul mul_ ne neg norm pad pow relu
        remainder repeat_interleave roll round rsub scatter scatter_ sigmoid silu sin softmax sort sqrt square sub sum
        tanh topk where zero_ __and__ __lshift__ __or__ __rshift__ __xor__
    """.split()  # noqa: SIM905 - a paragraph reads better than seventy quoted lines
)
"""Operators without a matrix product that fvcore would call unsupported."""

_ELEMENTWISE_INSIDE = frozenset(
    """
        aten::_batch_norm_with_update aten::_native_batch_norm_legit aten::_native_batch_norm_legit_no_training
        aten::_unique2 aten::as_strided_ aten::cat aten::cudnn_batch_norm aten::empty_like aten::equal
        aten::grid_sampler_2d aten::grid_sampler_3d aten::index_copy_ aten::index_reduce aten::is_same_size
        aten::lift_fresh aten::native_batch_norm aten::native_group_norm aten::native_layer_norm aten::scatter_add
        aten::scatter_add_ aten::scatter_reduce aten::searchsorted aten::set_ aten::stack
        torchvision::nms torchvision::ps_roi_align torchvision::ps_roi_pool torchvision::roi_align torchvision::roi_pool
    """.split()  # noqa: SIM905
)
"""More of them: what torch runs inside those, or in place of them, on several tensors."""
