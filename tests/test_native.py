"""The C++ kernels against the portable ones, and what happens where they cannot be had."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsevit_cli.kernels import Affine, BlockWeights, Kernels, Norm, choice, native, windowed
from sparsevit_cli.swin import set_sparsity, sparsify_

CPU = torch.device("cpu")

if choice._engine("native", "cpu")[0] is None:
    pytest.skip(choice._engine("native", "cpu")[1], allow_module_level=True)

from kernel_cases import arranged, assert_equal_to_portable, block, case  # noqa: E402


def in_type(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(*(in_type(one, dtype) for one in value)) if isinstance(value, tuple) else value


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), height=st.integers(3, 40), width=st.integers(3, 40),
    side=st.sampled_from([3, 4, 7, 8, 12, 16]), heads=st.sampled_from([1, 2, 3]), ratio=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 3), threads=st.integers(1, 3), with_bias=st.booleans(), norm_first=st.booleans(),
)  # fmt: skip
def test_any_shape(
    seed: int, height: int, width: int, side: int, heads: int, ratio: int, batch: int, threads: int, with_bias: bool,
    norm_first: bool,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    tokens, rows, bias, bias_class = case(32 * heads, heads, side, (height, width), batch=batch, shifted=seed % 2 == 1)
    weights = block(32 * heads, heads, ratio, with_bias=with_bias, norm_first=norm_first)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal_to_portable(native.run_windows_, tokens, rows, weights, bias, bias_class, 2e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("channels", "side", "norm_first"), [(384, 7, True), (768, 7, True), (1024, 12, True), (768, 8, False),
                                         (64, 24, False)]
)  # fmt: skip
def test_every_width(channels: int, side: int, norm_first: bool) -> None:
    torch.manual_seed(channels)
    arguments = arranged(channels, channels // 32, side, (25, 30), True, 1, norm_first=norm_first)
    assert_equal_to_portable(native.run_windows_, *arguments, 2e-6)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("channels", [64, 192])
def test_bfloat16_accumulates_in_float32(channels: int, norm_first: bool) -> None:
    if not native.load().has_bfloat():
        pytest.skip("this CPU has no bfloat16")
    torch.manual_seed(0)
    tokens, rows, weights, bias, bias_class = arranged(
        channels, channels // 32, 7, (24, 17), True, norm_first=norm_first
    )
    exact, found = tokens.clone(), tokens.bfloat16()
    windowed.run_windows_(exact, rows, weights, bias, bias_class, padded=True)
    narrow = in_type(weights, torch.bfloat16)
    assert isinstance(narrow, BlockWeights)
    assert native.supports(narrow)
    native.run_windows_(found, rows, narrow, bias.bfloat16(), bias_class, padded=True)
    assert (found.float() - exact).abs().max() <= 0.03 * exact.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    tokens, rows, weights, bias, bias_class = arranged(64, 2, 7, (14, 14), True, 1)
    tokens[int(rows[0, 10])] = value
    native.run_windows_(tokens, rows, weights, bias, bias_class, padded=False)
    assert not tokens[rows[0]].isfinite().any()  # all tokens of a window look at each other
    assert tokens[rows[1:].flatten()].isfinite().all()


def test_large_scores_overflow_nowhere() -> None:
    tokens, rows, weights, bias, bias_class = arranged(64, 2, 7, (14, 14), True, 1)
    weights = weights._replace(scale=1000.0)
    assert_equal_to_portable(native.run_windows_, tokens, rows, weights, bias * 1e4, bias_class, 1e-4)


def test_the_same_bits_every_time() -> None:
    tokens, rows, weights, bias, bias_class = arranged(96, 3, 7, (50, 50), True)
    results = []
    for _ in range(3):
        found = tokens.clone()
        native.run_windows_(found, rows, weights, bias, bias_class, padded=True)
        results.append(found)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_windows_change_nothing() -> None:
    tokens, rows, weights, bias, bias_class = arranged(32, 1, 7, (14, 14), False, 1)
    found = tokens.clone()
    native.run_windows_(found, rows[:0], weights, bias, bias_class, padded=False)
    assert torch.equal(found, tokens)


def test_what_they_take() -> None:
    weights = block(64, 2)
    assert native.supports(weights)
    assert not native.supports(block(48, 2))
    assert not native.supports(weights._replace(norm1=Norm(None, None, 1e-5)))
    assert not native.supports(weights._replace(fc1=Affine(weights.fc1.weight.t().contiguous().t(), weights.fc1.bias)))
    doubled = in_type(weights, torch.float64)
    assert isinstance(doubled, BlockWeights)
    assert not native.supports(doubled)


def tiny(name: str, kernels: Kernels) -> nn.Module:
    options = {"img_size": 72, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 5}
    torch.manual_seed(0)
    model = sparsify_(timm.create_model(name, **options).eval(), kernels=kernels)
    set_sparsity(model, 0.5)
    return model


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"])
def test_models_run_on_them_by_themselves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = native.run_windows_
    monkeypatch.setattr(native, "run_windows_", lambda *args, **more: calls.append(1) or real(*args, **more))
    x = torch.randn(2, 3, 72, 72)
    with torch.inference_mode():
        expected = tiny(name, "portable")(x)
        assert not calls
        torch.testing.assert_close(tiny(name, "auto")(x), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 4


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """Nothing is known of engines before the test, nor after it of what it pretended."""
    memories = (choice._engine, choice._warn_once, native.load, native._key)
    for memory in memories:
        memory.cache_clear()
    yield
    for memory in memories:
        memory.cache_clear()


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("", "there is no C\\+\\+ compiler"), ("exit 1", "does not run"),
     ("case $* in *-dM*) ;; *) exit 1; esac", "did not compile")],
)  # fmt: skip
def test_without_a_compiler_the_portable_ones_run(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    if compiler:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{compiler}\n", encoding="utf-8")
        path.chmod(0o700)
        monkeypatch.setenv("CXX", str(path))
    else:
        monkeypatch.setenv("PATH", "")
    weights = block(32, 1)
    with pytest.warns(RuntimeWarning, match=reason):
        assert choice.chosen("native", weights, CPU) is windowed.run_windows_
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.chosen("auto", weights, CPU) is windowed.run_windows_
        assert choice.chosen("native", weights, CPU) is windowed.run_windows_  # told once
    assert choice.running("auto", CPU) == "portable"


@pytest.mark.usefixtures("_forgotten")
def test_compiled_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "from sparsevit_cli.kernels import native; native.load(); print(native.version())"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert len({process.communicate(timeout=200)[0] for process in both}) == 1
    (library,) = (tmp_path / "sparsevit-cli").iterdir()
    changed = library.stat().st_mtime_ns
    native.load()
    assert library.stat().st_mtime_ns == changed


@pytest.mark.usefixtures("_forgotten")
def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    native.load()
    assert choice.running("native", CPU).startswith("native ")
