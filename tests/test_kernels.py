"""The way at inference against the way of training: same numbers to 1e-5, and nothing of the caller's is changed."""

from __future__ import annotations

import copy
import gc
import itertools
import re
import runpy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernel_cases
from sparsevit_cli import kernels as kernels_module
from sparsevit_cli import windows
from sparsevit_cli.kernels import Affine, EngineAround, Kernels, Moves, TorchLinear, held, linear_ops, portable
from sparsevit_cli.kernels.cpp.native import NativeEngine
from sparsevit_cli.models import supported_models
from sparsevit_cli.profiling.macs import analytic_macs
from sparsevit_cli.profiling.stages import time_stages
from sparsevit_cli.profiling.workload import image_workload
from sparsevit_cli.sparsity import SearchSpace
from sparsevit_cli.swin import bias, remembered_tensors, set_sparsity, sparse_stages, sparsify_, without_kernels
from sparsevit_cli.windows import shift_mask
from tiny import tiny_swin

TOLERANCE = 1e-5
IS_ASYNCHRONOUS = (held, "is_asynchronous", lambda device: True)
"""For monkeypatch.setattr: the CPU is treated as a device that the host must not wait for."""
OF_EACH = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")


def swin(name: str = "swin_tiny_patch4_window7_224", *, kernels: Kernels = "auto", **options: object) -> nn.Module:
    model = tiny_swin(name, **options)
    with torch.no_grad():  # timm starts biases at zero, and norms of V2 and V2-CR too, so that a block would do nothing
        for key, tensor in model.state_dict(keep_vars=True).items():
            if "norm" in key and key.endswith("weight"):
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
            elif key.endswith("bias"):
                tensor.copy_(0.2 * torch.randn_like(tensor))
            elif key.endswith("logit_scale"):  # some heads above the limit of 100
                tensor.copy_(torch.linspace(6.0, 2.0, len(tensor)).view(tensor.shape))
    return sparsify_(model, kernels=kernels).eval()


def both_ways(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        fast = model(x)
        with without_kernels():
            slow = model(x)
    return fast, slow


def assert_same(model: nn.Module, x: Tensor, tolerance: float = TOLERANCE) -> None:
    fast, slow = both_ways(model, x)
    assert (fast - slow).abs().max() <= tolerance * slow.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", supported_models())
@pytest.mark.parametrize("ratios", [0.0, 0.5])
def test_both_ways_agree_for_every_name(name: str, ratios: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swin(name, img_size=(136, 200), kernels="auto" if ratios else "portable")
    set_sparsity(model, ratios, exact=False)
    counts = calls_of(model, monkeypatch)
    assert_same(model, torch.randn(2, 3, 136, 200))
    assert counts  # the fast way was taken


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), height=st.integers(4, 60), width=st.integers(4, 60), window=st.sampled_from([4, 7, 8]),
    batch=st.integers(1, 3), name=st.sampled_from(OF_EACH),
    kernels=st.sampled_from(["auto", "portable"]), asynchronous=st.booleans(),
)  # fmt: skip
def test_both_ways_agree_at_any_size_and_sparsity(
    seed: int, height: int, width: int, window: int, batch: int, name: str, kernels: Kernels, asynchronous: bool
) -> None:
    from random import Random

    size = (4 * height, 4 * width)
    options = {"window_size": window, "depths": (2, 3, 2, 1), "always_partition": bool(seed % 2)}
    model = swin(name, img_size=size, kernels=kernels, **options)
    set_sparsity(model, SearchSpace((2, 3, 2, 1)).sample(Random(seed)), exact=False)
    with pytest.MonkeyPatch.context() as patch:
        if asynchronous:
            patch.setattr(*IS_ASYNCHRONOUS)
        assert_same(model, torch.randn(batch, 3, *size))


class Operators(TorchDispatchMode):
    """Names of the operators that a model calls, which takes the way that it takes unwatched."""

    sees_kernels = True

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OF_EACH)
@pytest.mark.parametrize("ratios", [0.0, 0.5])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_device_is_not_waited_for(name: str, ratios: float, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"window_size": 7, "depths": (2, 2, 2, 2), "always_partition": True}  # the last map is 5 x 7
    model = swin(name, img_size=(136, 200), kernels="portable", **options)
    set_sparsity(model, ratios, exact=False)
    monkeypatch.setattr(*IS_ASYNCHRONOUS)
    x = torch.randn(batch, 3, 136, 200)
    assert_same(model, x)
    with torch.inference_mode(), Operators() as operators:
        model(x)
    waiting = {"nonzero", "item", "_local_scalar_dense", "is_nonzero", "masked_select", "equal", "_to_copy", "unique"}
    assert "index_copy_" in operators.names
    assert not operators.names & waiting
    if ratios == 0.0:
        assert not operators.names & {"arange", "sort", "where", "masked_fill"}, "rows are made once, padding left out"


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize(("size", "batch"), [((15, 30), 1), ((9, 20), 3), ((5, 4), 2)])
def test_padding_that_is_masked_equals_padding_that_is_left_out(
    size: tuple[int, int], batch: int, shifted: bool, norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def masked(*args: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(*IS_ASYNCHRONOUS)
            portable.run_windows_(*args, **kwargs)

    tokens, rows, bias, bias_class = kernel_cases.case(16, 2, 7, size, batch=batch, shifted=shifted)
    for with_bias in (True, False):
        weights = kernel_cases.block(16, 2, with_bias=with_bias, norm_first=norm_first)
        kernel_cases.assert_equal_to_portable(masked, tokens, rows, weights, bias, bias_class, TOLERANCE)


@pytest.mark.parametrize("norm_first", [True, False])
def test_of_all_windows_true_tokens_alone_are_computed(norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*IS_ASYNCHRONOUS)
        every = held.all_windows(9, 20, (7, 7), (3, 3), "roll_first", 2, torch.device("cpu"))
    tokens, rows, bias = torch.randn(2 * 9 * 20, 16), every.rows.flatten(0, 1), torch.randn(1, 2, 49, 49)
    weights, expected = kernel_cases.block(16, 2, norm_first=norm_first), tokens.clone()
    portable.run_windows_(expected, rows, weights, bias, None, padded=True)
    computed = []

    class Counted(TorchLinear):
        def linear(self, x: Tensor, layer: Affine) -> Tensor:
            computed.append(len(x))
            return super().linear(x, layer)

    monkeypatch.setattr(*IS_ASYNCHRONOUS)
    monkeypatch.setattr(portable, "linear_ops", lambda x: Counted())
    portable.run_windows_(tokens, rows, weights, bias, None, padded=True, places=every.places)
    assert computed == [len(tokens)] * 4
    assert (tokens - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("area", [49, 64, 144])
def test_masks_of_a_gpu_start_their_rows_where_no_kernel_copies_them(area: int) -> None:
    bias = torch.randn(4, 3, area, area)
    chosen = portable.in_steps_of_8(bias).index_select(0, torch.tensor([3, 0, 0]))[..., :area]
    assert torch.equal(chosen, bias[[3, 0, 0]])
    assert all(stride % 8 == 0 for stride in chosen.stride()[:-1])


@pytest.mark.parametrize(("kernels", "moves"), [("portable", 2 * 2), ("native", 0)])
def test_gather_and_scatter_are_timed_apart_unless_a_kernel_does_them(kernels: Kernels, moves: int) -> None:
    """A clock that ticks when it is read: a move costs a millisecond, and so does all between two of them."""
    if not kernels_module.running(kernels, torch.device("cpu")).startswith(kernels):
        pytest.skip("no C++ compiler")
    model, ticks = swin(img_size=224, kernels=kernels), itertools.count(0, 10**6)
    set_sparsity(model, [[0.5], [0], [0, 0], [0]])
    times = time_stages(image_workload(model), passes=2, clock=ticks.__next__)
    (row,) = [row for row in times.rows if row.name == "stage 0"]
    rows_of_both_partitions = 2 * (kernels == "portable")
    assert row.moves_ms == moves + rows_of_both_partitions
    assert kernels_module.beside_modules() is portable.PORTABLE, "nothing is left of it"


def test_what_an_engine_does_not_take_runs_portable_with_the_moves_of_its_wrapper() -> None:
    class Noted(Moves):
        def gather_rows(self, tokens: Tensor, rows: Tensor) -> Tensor:
            seen.append(len(rows))
            return super().gather_rows(tokens, rows)

    seen, device = list[int](), torch.device("cpu")
    tokens, rows, bias, bias_class = kernel_cases.case(40, 2, 7, (14, 14))  # of widths that no C++ takes
    weights, expected = kernel_cases.block(40, 2), tokens.clone()
    portable.run_windows_(expected, rows, weights, bias, bias_class, padded=False)
    with kernels_module.using(lambda inner: EngineAround(inner.with_moves(Noted())).with_moves(Noted())):
        engine = kernels_module.chosen("native", device)
    if engine.name != "native":
        pytest.skip("no C++ compiler")
    assert not engine.takes(tokens, weights)
    assert engine.leaves_out_padding(tokens, weights)
    engine.run_windows_(tokens, rows, weights, bias, bias_class, padded=False)
    assert torch.equal(tokens, expected)
    assert sum(seen) == rows.numel()


@pytest.mark.parametrize("part", ["run_windows_", "merge_patches", "embed_patches", "score_and_rank"])
def test_one_kernel_can_be_timed(part: str) -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "time_kernel.py"))
    small = ["--channels", "32", "--size", "9", "14", "--seconds", "0.001", "--device", "cpu"]
    assert re.fullmatch(rf"{part}: portable .* ms, portable .* ms, .*x; largest difference 0.0e\+00",
                        script["main"](["portable", part, *small]))  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 60, 10**9])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swin(img_size=224, kernels="portable")
    set_sparsity(model, 0.3)
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        whole = model(x)
        monkeypatch.setattr(portable, "CHUNK_TOKENS", chunk)
        assert (model(x) - whole).abs().max() < TOLERANCE


def test_a_dense_model_runs_as_timm_unless_told_otherwise() -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=112, depths=(2, 2)).eval()
    x = torch.randn(1, 3, 112, 112)
    with torch.inference_mode():
        expected = model(x)
        sparsify_(model)
        assert torch.equal(model(x), expected)
        set_sparsity(model, 0.5)
        set_sparsity(model, 0)
        assert torch.equal(model(x), expected)
        set_sparsity(model, 0, exact=False)
        found = model(x)
        assert not torch.equal(found, expected)  # otherwise this would test nothing
        assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", OF_EACH)
def test_what_the_caller_handed_in_keeps_its_bits(name: str) -> None:
    model = swin(name, img_size=112, window_size=7)
    set_sparsity(model, 0.5)
    stage = sparse_stages(model)[0]
    x = torch.randn(2, 16, 28, 28) if "_cr_" in name else torch.randn(2, 28, 28, 16)
    before = x.clone()
    with torch.inference_mode():
        output = stage(x)
    assert torch.equal(x, before)
    assert output.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", OF_EACH)
def test_features_of_every_stage_stay_as_they_were_returned(name: str) -> None:
    model = swin(name, img_size=112, window_size=4, features_only=True)
    set_sparsity(model, 0.5)
    x = torch.randn(1, 3, 112, 112)
    with torch.inference_mode():
        fast = model(x)
        with without_kernels():
            slow = model(x)
    for ours, theirs in zip(fast, slow, strict=True):  # cosines times 100 multiply the rounding of both
        assert (ours - theirs).abs().max() <= 5 * TOLERANCE * theirs.abs().max()


def calls_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each time that windows are written in place, by the portable kernels or in C++."""
    counts: list[int] = []
    count = lambda function: lambda *arguments, **more: counts.append(1) or function(*arguments, **more)  # noqa: E731
    monkeypatch.setattr(windows, "scatter_rows_", count(windows.scatter_rows_))
    monkeypatch.setattr(NativeEngine, "_run_windows_", count(NativeEngine._run_windows_))
    return counts


def test_gradients_training_autocast_and_hooks_take_timms_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swin(img_size=112)
    set_sparsity(model, 0.5)
    counts = calls_of(model, monkeypatch)
    x = torch.randn(1, 3, 112, 112)
    model(x).sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()
    assert not counts
    seen: list[int] = []
    handle = sparse_stages(model)[0].blocks[0].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        model(x)
    assert seen == [1]
    handle.remove()
    counts.clear()
    with torch.inference_mode():
        model(x)
    assert counts
    assert seen == [1]


def changes_nothing(_: nn.Module) -> None:
    """The control: the faster way is taken."""


def dropout_for_uncertainty(model: nn.Module) -> None:
    sparse_stages(model)[0].blocks[0].mlp.drop1.train()


def replaced_forward(model: nn.Module) -> None:
    layer = sparse_stages(model)[0].blocks[0].mlp.fc1
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)


def adapter(model: nn.Module) -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    sparse_stages(model)[0].blocks[0].attn.qkv.__class__ = Adapted


def path_replaced(model: nn.Module) -> None:
    sparse_stages(model)[0].blocks[0].drop_path1 = nn.Tanh()


def block_hooked(model: nn.Module) -> None:
    sparse_stages(model)[0].blocks[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "is_fast"),
    [(changes_nothing, True), (dropout_for_uncertainty, False), (replaced_forward, False), (adapter, False),
     (path_replaced, False), (block_hooked, False)],
)  # fmt: skip
def test_a_changed_block_is_run_as_it_is(change: Any, is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swin(img_size=112, depths=(2,), num_heads=(1,))
    set_sparsity(model, 0.5)
    change(model)
    counts = calls_of(model, monkeypatch)
    assert_same(model, torch.randn(1, 3, 112, 112))
    assert bool(counts) == is_fast


def exchanged_weight(model: nn.Module) -> None:
    layer = sparse_stages(model)[0].blocks[1].mlp.fc1
    layer.weight = nn.Parameter(layer.weight * 2)


def data_elsewhere(model: nn.Module) -> None:
    weight = sparse_stages(model)[0].blocks[1].attn.qkv.weight
    weight.data = weight.data.mul(2).t().contiguous().t()


def exchanged_layer(model: nn.Module) -> None:
    attn = sparse_stages(model)[0].blocks[0].attn
    attn.proj = nn.Linear(attn.proj.in_features, attn.proj.out_features).eval()


def no_bias(model: nn.Module) -> None:
    sparse_stages(model)[0].blocks[0].attn.proj.bias = None


def another_scale(model: nn.Module) -> None:
    sparse_stages(model)[0].blocks[0].attn.scale *= 1e4


def another_eps(model: nn.Module) -> None:
    sparse_stages(model)[0].blocks[0].norm2.eps = 0.5


def another_gelu(model: nn.Module) -> None:
    sparse_stages(model)[0].blocks[0].mlp.act = nn.GELU(approximate="tanh")


def scale_to_learn(model: nn.Module) -> None:
    attn = sparse_stages(model)[0].blocks[0].attn
    del attn.scale
    attn.scale = nn.Parameter(torch.tensor(1e4))


def hooked_late(model: nn.Module) -> None:
    sparse_stages(model)[0].blocks[0].mlp.fc1.register_forward_hook(lambda _module, _inputs, output: 2 * output)


def merging_exchanged(model: nn.Module) -> None:
    merging = sparse_stages(model)[1].downsample
    merging.reduction = nn.Linear(merging.reduction.in_features, merging.reduction.out_features).eval()


def merging_normalised_otherwise(model: nn.Module) -> None:
    sparse_stages(model)[1].downsample.norm.weight = nn.Parameter(sparse_stages(model)[1].downsample.norm.weight * 2)


@pytest.mark.parametrize(
    ("change", "is_fast"),
    [(dropout_for_uncertainty, False), (replaced_forward, False), (adapter, False), (path_replaced, False),
     (block_hooked, False), (exchanged_weight, True), (data_elsewhere, True), (exchanged_layer, True),
     (no_bias, True), (another_scale, True), (scale_to_learn, True), (hooked_late, False), (another_eps, True),
     (another_gelu, False), (merging_exchanged, True), (merging_normalised_otherwise, True)],
)  # fmt: skip
def test_a_change_between_two_forwards_counts_at_once(
    change: Any, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = swin(img_size=112, depths=(2, 2), num_heads=(1, 2)), torch.randn(1, 3, 112, 112)
    set_sparsity(model, 0.5)
    counts = calls_of(model, monkeypatch)
    assert_same(model, x)
    each = len(counts)
    with torch.inference_mode():
        before = model(x)
    change(model)
    counts.clear()
    assert_same(model, x)
    assert (len(counts) == each) == is_fast
    with torch.inference_mode():
        changed = model(x)
    if change not in (dropout_for_uncertainty, block_hooked, another_gelu):  # these may change little or nothing
        assert (changed - before).abs().max() > 1e-4 * before.abs().max()


def test_a_merging_of_another_class_is_called_as_timm_calls_it() -> None:
    class Other(PatchMerging):
        pass

    model = swin(img_size=112, depths=(2, 2), num_heads=(1, 2))
    set_sparsity(model, 0.5)
    sparse_stages(model)[1].downsample.__class__ = Other
    assert_same(model, torch.randn(1, 3, 112, 112))


@pytest.mark.parametrize(("name", "part"), [(OF_EACH[0], ""), (OF_EACH[1], ""), (OF_EACH[2], "norm3")])
def test_maps_seen_by_hooks_are_not_overwritten(name: str, part: str) -> None:
    model = swin(name, img_size=112, window_size=4)
    set_sparsity(model, 0.5)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in sparse_stages(model)[0].blocks:
        watched = block.get_submodule(part)
        watched.register_forward_hook(lambda _module, _inputs, output: seen.append((output, output.clone())))
    with torch.inference_mode():
        model(torch.randn(1, 3, 112, 112))
    assert len(seen) == 2
    assert all(torch.equal(output, as_it_was) for output, as_it_was in seen)


def test_counters_and_meta_tensors_see_timms_operators() -> None:
    model = swin(img_size=112)
    set_sparsity(model, 0.5)
    x = torch.randn(1, 3, 112, 112)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(x)
    assert counter.get_total_flops() / 2 == pytest.approx(analytic_macs(image_workload(model, 112)).total, rel=0.01)
    with torch.no_grad():
        assert model.to("meta")(x.to("meta")).shape == (1, 5)


@pytest.mark.parametrize("name", OF_EACH)
def test_changed_weights_count_at_once(name: str) -> None:
    model = swin(name, img_size=128)
    set_sparsity(model, 0.5)
    x = torch.randn(1, 3, 128, 128)
    for parameters in (dict(model.named_parameters()).values(), _of_position_bias(model)):
        with torch.inference_mode():
            before = model(x)
        for parameter in parameters:
            parameter.data.mul_(1.1)  # past the version counter
        assert_same(model, x)
        with torch.inference_mode():
            assert not torch.equal(model(x), before)


def _of_position_bias(model: nn.Module) -> list[nn.Parameter]:
    nets = ("relative_position_bias_table", "cpb_mlp", "meta_mlp")
    return [parameter for name, parameter in model.named_parameters() if any(net in name for net in nets)]


@pytest.mark.parametrize("name", OF_EACH)
def test_bias_is_made_once_and_again_for_what_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swin(name, img_size=128)
    set_sparsity(model, 0.5)
    blocks, blocks_made = _makers_of_bias(model, monkeypatch)
    x = torch.randn(1, 3, 128, 128)
    assert blocks_made(model, x) == blocks
    assert blocks_made(model, x) == []
    assert blocks_made(model, torch.cat((x, x))) == []
    _of_position_bias(model)[0].data.add_(1.0)
    assert blocks_made(model, x) == blocks[:1]
    copied = copy.deepcopy(model)  # remembers nothing of the model that it was made of
    assert len(blocks_made(copied, x)) == len(blocks)
    model.to(torch.bfloat16)
    assert blocks_made(model, x.to(torch.bfloat16)) == blocks


def _makers_of_bias(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[nn.Module], Callable[[nn.Module, Tensor], list[nn.Module]]]:
    """The blocks of `model`, and which blocks of such a model make their bias in a forward."""
    blocks = [block for stage in sparse_stages(model) for block in stage.blocks]
    made: list[nn.Module] = []
    for kind in {type(block) for block in blocks}:
        make = kind._position_bias
        monkeypatch.setattr(kind, "_position_bias", lambda self, make=make: made.append(self) or make(self))

    def blocks_made(model: nn.Module, x: Tensor) -> list[nn.Module]:
        made.clear()
        with torch.inference_mode():
            model(x)
        return made.copy()

    return blocks, blocks_made


@pytest.mark.parametrize("name", OF_EACH)
def test_a_device_remembers_bias_by_torchs_count_of_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*IS_ASYNCHRONOUS)
    model, x = swin(name, img_size=64, depths=(2, 2), num_heads=(1, 2), window_size=4), torch.randn(1, 3, 64, 64)
    set_sparsity(model, 0.5)
    blocks, blocks_made = _makers_of_bias(model, monkeypatch)
    assert blocks_made(model, x) == blocks
    assert blocks_made(model, x) == []
    assert len(list(remembered_tensors(model))) == len(blocks), "sources are not copied"
    weights = _of_position_bias(model)
    with torch.no_grad():
        weights[0].add_(1.0)
    assert blocks_made(model, x) == blocks[:1]
    assert_same(model, x)
    weights[0].data = weights[0] + 1.0  # moved
    assert blocks_made(model, x) == blocks[:1]
    model.load_state_dict(model.state_dict())
    assert blocks_made(model, x) == blocks
    optimizer = torch.optim.AdamW(weights, lr=1.0, fused=True)  # which torch does not count
    model(x).sum().backward()
    optimizer.step()
    assert blocks_made(model.eval(), x) == []
    assert blocks_made(model.train().eval(), x) == blocks
    assert_same(model, x)
    with torch.inference_mode():
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    assert blocks_made(model, x) == blocks_made(model, x) == blocks, "tensors of inference mode have no count"


def test_bias_is_forgotten_with_its_block() -> None:
    model = swin(img_size=112)
    set_sparsity(model, 0.5)
    with torch.inference_mode():
        model(torch.randn(1, 3, 112, 112))
    assert len({t.data_ptr() for t in remembered_tensors(model)}) >= len(list(remembered_tensors(model))) > 0
    blocks = [weakref.ref(block) for stage in sparse_stages(model) for block in stage.blocks]
    del model
    gc.collect()
    assert all(block() is None for block in blocks), "what is remembered keeps no block alive"


def test_a_large_bias_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bias, "MAX_BYTES", 4 * 49 * 49)  # one head, no classes
    model = swin(img_size=112)
    set_sparsity(model, 0.5)
    with torch.inference_mode():
        model(torch.randn(1, 3, 112, 112))
    held = list(remembered_tensors(model))
    assert len(held) == 3 * 3  # two sources and the bias: of the first block, and of two whose windows are 4 x 4
    assert max(tensor.nbytes for tensor in held if tensor.is_floating_point()) == bias.MAX_BYTES


@pytest.mark.parametrize(("name", "net"), [(OF_EACH[1], "cpb_mlp.1"), (OF_EACH[2], "meta_mlp.act")])
def test_another_net_of_the_bias_counts_at_once(name: str, net: str) -> None:
    model = swin(name, img_size=128)
    set_sparsity(model, 0.5)
    x = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        before = model(x)
    for stage in sparse_stages(model):
        for block in stage.blocks:
            block.attn.set_submodule(net, nn.Tanh())
    assert_same(model, x)
    with torch.inference_mode():
        assert not torch.equal(model(x), before)


@pytest.mark.parametrize("name", OF_EACH[1:])
def test_hooks_on_the_net_of_the_bias_are_called(name: str) -> None:
    model = swin(name, img_size=128)
    set_sparsity(model, 0.5)
    attn = sparse_stages(model)[0].blocks[0].attn
    calls = []
    (attn.cpb_mlp if hasattr(attn, "cpb_mlp") else attn.meta_mlp).register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        for _ in range(2):
            model(torch.randn(1, 3, 128, 128))
    assert len(calls) == 2


@pytest.mark.parametrize("classes", [1, 6])
def test_two_products_are_attention(classes: int) -> None:
    q, k, v = torch.randn(3, 6, 2, 49, 8).unbind(0)  # windows, heads, tokens, channels
    added = torch.randn(classes, 2, 49, 49)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=0.3)
    assert torch.allclose(portable._two_products(q, k, v, added, 0.3), expected, atol=1e-5)


@pytest.mark.parametrize("name", OF_EACH)
@pytest.mark.parametrize("size", [128, 124])
def test_bfloat16_is_as_near_to_float32_as_timm_is(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swin(name, img_size=size)
    set_sparsity(model, 0.0, exact=False)  # without a ranking, in which rounding could swap windows
    x = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        exact = model(x)
    calls = []
    products = portable._two_products
    monkeypatch.setattr(portable, "_two_products", lambda *args: calls.append(1) or products(*args))
    fast, slow = both_ways(model.to(torch.bfloat16), x.to(torch.bfloat16))
    assert fast.dtype == torch.bfloat16
    assert (fast - exact).abs().mean() <= 2 * (slow - exact).abs().mean()
    assert bool(calls) == portable.onednn_takes(torch.bfloat16)


def test_a_sparse_bfloat16_model_runs() -> None:
    model = swin(img_size=112).to(torch.bfloat16)
    set_sparsity(model, 0.5)
    fast, slow = both_ways(model, torch.randn(2, 3, 112, 112, dtype=torch.bfloat16))
    assert (fast - slow).abs().max() <= 0.05 * slow.abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_onednn_equals_torch(bias: bool) -> None:
    layer = Affine(torch.randn(24, 16), torch.randn(24) if bias else None)
    x, residual = torch.randn(10, 16), torch.randn(10, 24)
    torch_ops, ops = TorchLinear(), linear_ops(x)
    with torch.inference_mode():
        assert torch.allclose(ops.linear(x, layer), torch_ops.linear(x, layer), atol=1e-5)
        assert torch.allclose(ops.linear_gelu(x, layer), torch_ops.linear_gelu(x, layer), atol=1e-5)
        expected = torch_ops.linear(x, layer) + residual
        kept = residual.clone()
        assert torch.allclose(ops.linear_add(x, layer, residual), expected, atol=1e-5)
        assert torch.equal(residual, kept)


@pytest.mark.parametrize(("height", "width"), [(14, 21), (15, 30), (9, 9), (8, 40)])
@pytest.mark.parametrize("shift", [(3, 3), (0, 3), (3, 0)])
def test_mask_classes_are_timms_masks(height: int, width: int, shift: tuple[int, int]) -> None:
    block = SwinTransformerBlock(8, (height, width), 2, window_size=7, shift_size=3)
    block.window_size, block.shift_size = (7, 7), shift
    rows, cols = windows.window_grid(height, width, (7, 7))
    expected = block.get_attn_mask(torch.zeros(1, 7 * rows, 7 * cols, 1))
    masks, class_of = shift_mask(height, width, (7, 7), shift, torch.device("cpu"))
    assert torch.equal(masks[class_of], expected)
