"""The C++ kernels against the portable ones, and what happens where they cannot be had."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import PatchEmbed
from torch import Tensor, nn

import kernel_cases
from kernel_cases import arranged, assert_equal_to_portable, block, case
from sparsevit_cli import windows
from sparsevit_cli.kernels import (
    Affine,
    BlockWeights,
    Kernels,
    MergingWeights,
    Norm,
    choice,
    fallback,
    portable,
)
from sparsevit_cli.kernels.cpp import compiled, native
from sparsevit_cli.kernels.portable import PORTABLE
from sparsevit_cli.swin import set_sparsity, sparsify_
from sparsevit_cli.swin.embedding import SparsePatchEmbed
from sparsevit_cli.swin.inference import stock_embedding
from tiny import tiny_swin

CPU = torch.device("cpu")
NATIVE = native.NativeEngine()


def _cannot_compile() -> str:
    if sys.platform != "linux":
        return "for Linux"
    return "" if shutil.which(os.environ.get("CXX") or "g++") else "no C++ compiler"


pytestmark = pytest.mark.skipif(bool(_cannot_compile()), reason=_cannot_compile())


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")


def in_type(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(*(in_type(one, dtype) for one in value)) if isinstance(value, tuple) else value


ANY = {
    "seed": st.integers(0, 10**6), "height": st.integers(3, 40), "width": st.integers(3, 40),
    "side": st.sampled_from([3, 4, 7, 8, 12, 16]), "ratio": st.sampled_from([1, 2, 4]), "batch": st.integers(1, 3),
    "of_heads": st.sampled_from([(32, 1), (64, 2), (96, 3), (48, 2), (16, 2), (80, 4), (112, 4)]),
    "threads": st.integers(1, 3), "biases": st.sampled_from(["qkv", "proj", "fc1", "fc2", "none"]),
    "norm_first": st.booleans(), "narrow": st.booleans(),
}  # fmt: skip


def check_any(
    seed: int, height: int, width: int, side: int, ratio: int, of_heads: tuple[int, int], batch: int, threads: int,
    biases: str, norm_first: bool, narrow: bool,
) -> None:  # fmt: skip
    """Against the portable kernels in float32, at tight tolerance, or with bfloat16 inputs at a loose one."""
    torch.manual_seed(seed)
    channels, heads = of_heads
    tokens, rows, bias, bias_class = case(channels, heads, side, (height, width), batch=batch, shifted=seed % 2 == 1)
    weights = block(channels, heads, ratio, norm_first=norm_first)
    if biases != "none":
        layer: Affine = getattr(weights, biases)
        weights = weights._replace(**{biases: layer._replace(bias=None)})
    assert native.supports(weights)
    with threads_of(threads):
        if narrow and native.load().has_bfloat() and channels % 32 == 0:
            assert_near_in_bfloat16(tokens, rows, weights, bias, bias_class)
        else:
            assert_equal_to_portable(NATIVE.run_windows_, tokens, rows, weights, bias, bias_class, 2e-6)


@contextmanager
def threads_of(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_near_in_bfloat16(
    tokens: Tensor, rows: Tensor, weights: BlockWeights, bias: Tensor, bias_class: Tensor | None
) -> None:
    exact, found, narrow = tokens.clone(), tokens.bfloat16(), in_type(weights, torch.bfloat16)
    assert isinstance(narrow, BlockWeights)
    assert native.supports(narrow)
    portable.run_windows_(exact, rows, weights, bias, bias_class, padded=bool((rows == len(tokens)).any()))
    NATIVE.run_windows_(found, rows, narrow, bias.bfloat16(), bias_class, padded=True)
    assert (found.float() - exact).abs().max() <= 0.04 * exact.abs().max()


@pytest.fixture
def _poisoned_workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is read before it was written is NaN, and nothing is written past the end of a workspace."""
    real, guards = native._workspace, []

    def guarded(nbytes: int) -> Tensor:
        whole = real(nbytes + 4096).fill_(0xFF)
        guards.append(whole[nbytes:])
        return whole[:nbytes]

    monkeypatch.setattr(native, "_workspace", guarded)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    assert guards
    assert all((guard == 0xFF).all() for guard in guards)


ONE_FIXTURE = [HealthCheck.function_scoped_fixture]


@pytest.mark.usefixtures("_poisoned_workspace")
@settings(max_examples=40, suppress_health_check=ONE_FIXTURE)
@given(**ANY)
def test_any_shape(**drawn: Any) -> None:
    check_any(**drawn)


@pytest.fixture(params=["x86-64-v3", "x86-64"])
def _older_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registers of 8 and of 4 numbers instead of 16."""
    if platform.machine() != "x86_64":
        pytest.skip("for x86-64")
    flags = tuple(flag.replace("=native", f"={request.param}") for flag in compiled.FLAGS)
    monkeypatch.setattr(compiled, "FLAGS", flags)
    compiled.load.cache_clear()
    compiled._key.cache_clear()
    yield
    compiled.load.cache_clear()
    compiled._key.cache_clear()


@pytest.mark.usefixtures("_poisoned_workspace", "_older_cpu")
@settings(max_examples=12, suppress_health_check=ONE_FIXTURE)
@given(**ANY)
def test_any_shape_on_older_cpus(**drawn: Any) -> None:
    check_any(**drawn)


@pytest.mark.usefixtures("_older_cpu")
def test_tiles_of_older_cpus_fit_their_scratch() -> None:
    tokens, _, weights, bias, _ = arranged(64, 2, 7, (14, 14), True, 2)
    rows = windows.window_token_index(28, 14, (7, 7), (0, 0), "roll_first", CPU)
    # 392 rows in strips of 6: tiles of 100 and more
    for count in range(1, len(rows) + 1):
        assert_equal_to_portable(NATIVE.run_windows_, tokens, rows[:count], weights, bias[:1], None, 2e-6)


@pytest.mark.parametrize(
    ("channels", "side", "norm_first"), [(384, 7, True), (768, 7, True), (1024, 12, True), (768, 8, False),
                                         (64, 24, False)]
)  # fmt: skip
def test_every_width(channels: int, side: int, norm_first: bool) -> None:
    torch.manual_seed(channels)
    arguments = arranged(channels, channels // 32, side, (25, 30), True, 1, norm_first=norm_first)
    assert_equal_to_portable(NATIVE.run_windows_, *arguments, 2e-6)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("channels", [64, 192])
def test_bfloat16_accumulates_in_float32(channels: int, norm_first: bool) -> None:
    if not native.load().has_bfloat():
        pytest.skip("this CPU has no bfloat16")
    torch.manual_seed(0)
    tokens, rows, weights, bias, bias_class = arranged(
        channels, channels // 32, 7, (24, 17), True, norm_first=norm_first
    )
    assert_near_in_bfloat16(tokens, rows, weights, bias, bias_class)


def test_windows_of_padding_alone_and_maps_in_other_layouts() -> None:
    tokens, rows, weights, bias, bias_class = arranged(64, 2, 7, (14, 14), True, 1)
    rows = torch.cat((torch.full_like(rows[:1], len(tokens)), rows))
    classes = None if bias_class is None else torch.cat((bias_class[:1], bias_class))
    assert_equal_to_portable(NATIVE.run_windows_, tokens, rows, weights, bias, classes, 2e-6)
    spread_rows, spread_bias = rows.t().contiguous().t(), bias.transpose(2, 3).contiguous().transpose(2, 3)
    expected, found = tokens.clone(), tokens.t().contiguous().t()
    NATIVE.run_windows_(expected, rows, weights, bias, classes, padded=True)
    NATIVE.run_windows_(found, spread_rows, weights, spread_bias, classes, padded=True)
    torch.testing.assert_close(found, expected)


def reduction(channels: int, columns: int, norm_first: bool, with_bias: bool) -> MergingWeights:
    width = 4 * channels if norm_first else columns
    norm = Norm(1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width), 1e-5)
    weight = torch.randn(columns, 4 * channels) / (4 * channels) ** 0.5
    return MergingWeights(norm, Affine(weight, torch.randn(columns) if with_bias else None), norm_first)


MERGINGS = {
    "seed": st.integers(0, 10**6), "batch": st.integers(1, 3), "height": st.integers(1, 40),
    "width": st.integers(1, 40), "channels": st.sampled_from([16, 32, 48, 96, 128]),
    "columns": st.sampled_from([16, 64, 112, 192]), "norm_first": st.booleans(), "with_bias": st.booleans(),
    "threads": st.integers(1, 3), "narrow": st.booleans(),
}  # fmt: skip


def check_merging(
    seed: int, batch: int, height: int, width: int, channels: int, columns: int, norm_first: bool, with_bias: bool,
    threads: int, narrow: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x, weights = torch.randn(batch, height, width, channels), reduction(channels, columns, norm_first, with_bias)
    expected, tolerance = portable.merge_patches(x, weights), 2e-6
    assert native.supports_merging(weights)
    if narrow and native.load().has_bfloat() and channels % 32 == columns % 32 == 0:
        narrowed = in_type(weights, torch.bfloat16)
        assert isinstance(narrowed, MergingWeights)
        x, weights, tolerance = x.bfloat16(), narrowed, 0.04
    with threads_of(threads):
        found = NATIVE.merge_patches(x, weights)
    assert found.dtype == x.dtype
    assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.usefixtures("_poisoned_workspace")
@settings(max_examples=40, suppress_health_check=ONE_FIXTURE)
@given(**MERGINGS)
def test_any_merging(**drawn: Any) -> None:
    check_merging(**drawn)


@pytest.mark.usefixtures("_poisoned_workspace", "_older_cpu")
@settings(max_examples=12, suppress_health_check=ONE_FIXTURE)
@given(**MERGINGS)
def test_any_merging_on_older_cpus(**drawn: Any) -> None:
    check_merging(**drawn)


def test_mergings_they_do_not_take() -> None:
    weights = reduction(32, 64, True, False)
    x = torch.randn(1, 6, 10, 32)
    spread = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(NATIVE.merge_patches(spread, weights), NATIVE.merge_patches(x, weights))
    assert not native.supports_merging(weights._replace(norm=Norm(None, None, 1e-5)))
    assert not native.supports_merging(reduction(24, 64, True, False))
    assert not native.supports_merging(reduction(32, 72, True, False))
    assert choice.chosen("portable", CPU) is PORTABLE
    assert choice.chosen("native", CPU).takes(x, weights)
    assert not choice.chosen("native", CPU).takes(x[..., :24].contiguous(), reduction(24, 64, True, False))


EMBEDDINGS = {
    "seed": st.integers(0, 10**6), "batch": st.integers(1, 2), "rows": st.integers(1, 24), "cols": st.integers(1, 24),
    "of_patch": st.sampled_from([(3, 4), (4, 4), (8, 2), (2, 8), (3, 6)]), "columns": st.sampled_from([16, 96, 112]),
    "with_norm": st.booleans(), "with_bias": st.booleans(), "threads": st.integers(1, 3), "narrow": st.booleans(),
}  # fmt: skip


def check_embedding(
    seed: int, batch: int, rows: int, cols: int, of_patch: tuple[int, int], columns: int, with_norm: bool,
    with_bias: bool, threads: int, narrow: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    channels, side = of_patch
    dtype = torch.bfloat16 if narrow and native.load().has_bfloat() and columns % 32 == 0 else torch.float32
    norm = nn.LayerNorm if with_norm else None
    embed = PatchEmbed(None, side, channels, columns, norm, output_fmt="NHWC", bias=with_bias).eval()
    images = torch.randn(batch, channels, rows * side, cols * side)
    with torch.no_grad():
        expected = embed(images)
        embed.__class__ = SparsePatchEmbed
        embed.as_timm, embed.kernels = False, "native"
        embed.to(dtype)
        images = images.to(dtype)
        weights = stock_embedding(embed, images)
        assert weights is not None
        assert NATIVE.takes(images, weights)
        with threads_of(threads):
            found = embed(images)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 0.04
    assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.usefixtures("_poisoned_workspace")
@settings(max_examples=30, suppress_health_check=ONE_FIXTURE)
@given(**EMBEDDINGS)
def test_any_embedding(**drawn: Any) -> None:
    check_embedding(**drawn)


@pytest.mark.usefixtures("_poisoned_workspace", "_older_cpu")
@settings(max_examples=12, suppress_health_check=ONE_FIXTURE)
@given(**EMBEDDINGS)
def test_any_embedding_on_older_cpus(**drawn: Any) -> None:
    check_embedding(**drawn)


@torch.inference_mode()
def test_embeddings_that_somebody_changed_run_as_timm_has_them() -> None:
    model = tiny("swin_tiny_patch4_window7_224", "native")
    embed: Any = model.patch_embed
    x = torch.randn(1, 3, 72, 72)
    weights = stock_embedding(embed, x)
    assert weights is not None
    spread = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not NATIVE.takes(spread, weights)
    torch.testing.assert_close(embed(spread), embed(x), atol=1e-5, rtol=1e-5)
    assert not NATIVE.takes(x.bfloat16(), weights)
    with pytest.raises(RuntimeError):
        embed(x.bfloat16())
    for wrong in (torch.randn(1, 1, 72, 72), torch.randn(3, 72, 72)):
        with pytest.raises((RuntimeError, ValueError)):
            embed(wrong)
    with pytest.raises(AssertionError, match="doesn't match model"):
        embed(torch.randn(1, 3, 76, 76))
    assert not embed.as_timm
    set_sparsity(model, 0.0)
    assert embed.as_timm
    expected = embed(x)
    set_sparsity(model, 0.5)
    torch.testing.assert_close(embed(x), expected, atol=1e-5, rtol=1e-5)
    handle = embed.norm.register_forward_hook(lambda *_: torch.zeros(1, 18, 18, 32))
    assert not embed(x).any()
    handle.remove()
    embed.proj = nn.Conv2d(3, 32, 4, 4, padding=4).eval()
    assert stock_embedding(embed, x) is None
    embed.proj = nn.Conv2d(3, 32, 4, 4).eval()
    assert stock_embedding(embed, x) is not None
    embed.train()
    assert stock_embedding(embed, x) is None


@pytest.mark.usefixtures("_older_cpu")
@pytest.mark.parametrize("importance", ["mean_abs_l2", "l2"])
def test_scores_and_ranks_on_older_cpus(importance: windows.Importance) -> None:
    check_scores_and_ranks(importance, torch.float32, (25, 30))


@pytest.mark.parametrize("importance", ["mean_abs_l2", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(28, 28), (25, 30)])
def test_scores_and_ranks(importance: windows.Importance, dtype: torch.dtype, size: tuple[int, int]) -> None:
    check_scores_and_ranks(importance, dtype, size)


def check_scores_and_ranks(importance: windows.Importance, dtype: torch.dtype, size: tuple[int, int]) -> None:
    if dtype == torch.bfloat16 and not native.load().has_bfloat():
        pytest.skip("this CPU has no bfloat16")
    torch.manual_seed(0)
    x = torch.randn(3, *size, 64).mul(torch.rand(3, *size, 1)).to(dtype)
    indices = [windows.window_token_index(*size, (7, 7), (shift, shift), "roll_first", CPU) for shift in (0, 3)]
    for several in (indices, indices[1:]):
        expected = windows.score_and_rank(x, several, 9, importance)
        for found, kept in zip(NATIVE.score_and_rank(x, several, 9, importance), expected, strict=True):
            assert torch.equal(found.indices, kept.indices)
            assert torch.equal(found.rows, kept.rows)
    spread = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(NATIVE.score_and_rank(spread, indices, 9, importance)[0].indices,
                       windows.score_and_rank(x, indices, 9, importance)[0].indices)  # fmt: skip


def test_equal_scores_rank_in_order_and_nan_before_all() -> None:
    x = torch.ones(2, 21, 28, 64)
    x[:, :7, 14:21] = 2.0  # window 2 of 12
    x[1, 7:14, :7] = torch.nan  # window 4 of the second image
    index = windows.window_token_index(21, 28, (7, 7), (0, 0), "roll_first", CPU)
    (kept,) = NATIVE.score_and_rank(x, [index], 5, "l2")
    assert kept.indices.tolist() == [[2, 0, 1, 3, 4], [4, 2, 0, 1, 3]]
    (every,) = NATIVE.score_and_rank(x, [index], 12, "l2")
    assert every.indices[0].tolist() == [2, 0, 1, *range(3, 12)]
    assert torch.equal(every.rows, windows.rows_of(every.indices, index, 21 * 28))


def test_maps_of_other_widths_are_refused_as_torch_refuses_them() -> None:
    tokens, rows, weights, bias, _ = arranged(64, 2, 7, (14, 14), False, 1)
    with pytest.raises(RuntimeError):
        NATIVE.run_windows_(tokens[:, :32].contiguous(), rows, weights, bias, None, padded=False)
    with pytest.raises(RuntimeError):
        NATIVE.merge_patches(torch.randn(1, 4, 4, 16), reduction(32, 64, True, False))


def test_several_threads_at_once() -> None:
    cases = [arranged(96, 3, 7, (30, 40), True) for _ in range(4)]
    alone = [tokens.clone() for tokens, *_ in cases]
    for tokens, (_, rows, weights, bias, bias_class) in zip(alone, cases, strict=True):
        NATIVE.run_windows_(tokens, rows, weights, bias, bias_class, padded=True)

    def run(number: int) -> Tensor:
        tokens, rows, weights, bias, bias_class = cases[number]
        NATIVE.run_windows_(tokens, rows, weights, bias, bias_class, padded=True)
        return tokens

    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(run, range(4)), alone, strict=True):
            assert torch.equal(found, expected)


def test_gelu_and_softmax_at_their_ends() -> None:
    """A block that only does one of them: far from zero, where approximations go wrong."""
    tokens, rows, weights, bias, bias_class = arranged(32, 1, 7, (7, 7), False, 1)
    far = weights.fc1._replace(bias=torch.linspace(-3e4, 3e4, len(weights.fc1.weight)))
    assert_equal_to_portable(NATIVE.run_windows_, tokens, rows, weights._replace(fc1=far), bias, bias_class, 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    tokens, rows, weights, bias, bias_class = arranged(64, 2, 7, (14, 14), True, 1)
    tokens[int(rows[0, 10])] = value
    NATIVE.run_windows_(tokens, rows, weights, bias, bias_class, padded=False)
    assert not tokens[rows[0]].isfinite().any()  # all tokens of a window look at each other
    assert tokens[rows[1:].flatten()].isfinite().all()


def test_large_scores_overflow_nowhere() -> None:
    tokens, rows, weights, bias, bias_class = arranged(64, 2, 7, (14, 14), True, 1)
    weights = weights._replace(scale=1000.0)
    assert_equal_to_portable(NATIVE.run_windows_, tokens, rows, weights, bias * 1e4, bias_class, 1e-4)


def test_the_same_bits_every_time() -> None:
    tokens, rows, weights, bias, bias_class = arranged(96, 3, 7, (50, 50), True)
    results = []
    for _ in range(3):
        found = tokens.clone()
        NATIVE.run_windows_(found, rows, weights, bias, bias_class, padded=True)
        results.append(found)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_windows_change_nothing() -> None:
    tokens, rows, weights, bias, bias_class = arranged(32, 1, 7, (14, 14), False, 1)
    found = tokens.clone()
    NATIVE.run_windows_(found, rows[:0], weights, bias, bias_class, padded=False)
    assert torch.equal(found, tokens)


def test_what_they_take() -> None:
    weights = block(64, 2)
    assert native.supports(weights)
    assert not native.supports(block(40, 2))
    assert not native.supports(block(64, 1))
    assert not native.supports(weights._replace(norm1=Norm(None, None, 1e-5)))
    assert not native.supports(weights._replace(fc1=Affine(weights.fc1.weight.t().contiguous().t(), weights.fc1.bias)))
    doubled = in_type(weights, torch.float64)
    assert isinstance(doubled, BlockWeights)
    assert not native.supports(doubled)


def tiny(name: str, kernels: Kernels) -> nn.Module:
    model = sparsify_(tiny_swin(name, img_size=72, embed_dim=32, depths=(2, 2)).eval(), kernels=kernels)
    set_sparsity(model, 0.5)
    return model


@pytest.mark.parametrize(
    ("name", "embeddings"),
    [("swin_tiny_patch4_window7_224", 1), ("swinv2_tiny_window8_256", 1), ("swinv2_cr_tiny_ns_224", 0)],
)
def test_models_run_on_them(name: str, embeddings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for function in ("_run_windows_", "_merge_patches", "_embed_patches", "_score_and_rank"):
        real = getattr(native.NativeEngine, function)

        def counting(*args: Any, of: Any = real, label: str = function, **more: Any) -> Any:
            calls.append(label)
            return of(*args, **more)

        monkeypatch.setattr(native.NativeEngine, function, counting)
    x = torch.randn(2, 3, 72, 72)
    with torch.inference_mode():
        expected = tiny(name, "portable")(x)
        assert not calls
        torch.testing.assert_close(tiny(name, "native")(x), expected, atol=1e-5, rtol=1e-5)
    assert Counter(calls) == Counter(
        {"_run_windows_": 4, "_score_and_rank": 2, "_merge_patches": 1} | ({"_embed_patches": 1} if embeddings else {})
    )


@pytest.mark.parametrize("head_dim", [16, 64])
def test_heads_of_another_width_run_on_the_portable_kernels(head_dim: int, caplog: pytest.LogCaptureFixture) -> None:
    swin = tiny_swin(img_size=56, embed_dim=64, depths=(2,), num_heads=(2,), head_dim=head_dim)
    model = sparsify_(swin.eval(), kernels="native")
    set_sparsity(model, 0.5)
    x = torch.randn(1, 3, 56, 56)
    fallback.warn_once.cache_clear()
    with torch.inference_mode():
        found = model(x)
        assert caplog.text.count("kernels are for") == 1
        sparsify_(model, kernels="portable")
        torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-5)


def test_weights_of_wrong_shapes_are_not_theirs() -> None:
    weights = block(64, 2)
    for name in ("qkv", "proj", "fc1", "fc2"):
        layer: Affine = getattr(weights, name)
        shorter = layer._replace(weight=layer.weight[:-32].contiguous(), bias=None)
        assert name == "fc1" or not native.supports(weights._replace(**{name: shorter}))
        assert not native.supports(weights._replace(**{name: layer._replace(bias=torch.zeros(32))}))
    assert not native.supports(weights._replace(norm2=Norm(torch.ones(32), torch.ones(32), 1e-5)))


@pytest.mark.usefixtures("_older_cpu")
def test_auto_leaves_cpus_alone_that_were_not_measured() -> None:
    assert choice.chosen("native", CPU).name == "native"
    assert (choice.chosen("auto", CPU).name == "native") == (native.load().lanes() >= 8)
