"""The Triton kernels against the portable ones, in Triton's interpreter on a CPU (conftest.py turns it on)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernel_cases import DEVICE, arranged, assert_equal_to_portable, block, case, random
from sparsevit_cli import windows
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.kernels import Affine, Kernels, Norm, choice, windowed
from sparsevit_cli.swin import set_sparsity, sparsify_

triton = pytest.importorskip("triton")
triton_windows = pytest.importorskip("sparsevit_cli.kernels.triton_windows")


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """What a kernel should have written and did not is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("side", [7, 8, 12])
@pytest.mark.parametrize("size", [(24, 24), (13, 20)])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_block_equals_the_portable_one(side: int, size: tuple[int, int], shifted: bool) -> None:
    torch.manual_seed(side)
    assert_equal_to_portable(triton_windows.run_windows_, *arranged(96, 3, side, size, shifted), 2e-6)


@pytest.mark.parametrize(
    ("channels", "heads", "side", "size", "norm_first"),
    [(96, 3, 8, (13, 20), False), (384, 12, 7, (9, 14), False), (32, 1, 16, (20, 16), False),
     (32, 1, 24, (24, 30), False), (32, 1, 14, (20, 28), True)],
)  # fmt: skip
def test_blocks_of_every_generation_equal_the_portable_ones(
    channels: int, heads: int, side: int, size: tuple[int, int], norm_first: bool
) -> None:
    """With those above, windows of all timm Swins: 7, 8, 12, 14, 16 and 24."""
    torch.manual_seed(side)
    arguments = arranged(channels, heads, side, size, True, 1, norm_first=norm_first)
    assert_equal_to_portable(triton_windows.run_windows_, *arguments, 2e-6)


@pytest.mark.parametrize(("channels", "heads"), [(128, 4), (192, 6), (256, 8), (384, 12)])
def test_every_width_takes_its_way(channels: int, heads: int) -> None:
    """In float32 a width of 128 fuses the MLP, more does not."""
    torch.manual_seed(channels)
    assert_equal_to_portable(triton_windows.run_windows_, *arranged(channels, heads, 7, (14, 9), True, batch=1), 2e-6)


IN_INTERPRETER = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 as integers")


@pytest.mark.parametrize(
    ("channels", "heads", "norm_first"), [(96, 3, True), (192, 6, True), (96, 3, False)]
)  # the first two fuse the MLP, the second in wide blocks
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=IN_INTERPRETER), torch.float16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, channels: int, heads: int, norm_first: bool) -> None:
    torch.manual_seed(0)
    tokens, rows, weights, bias, bias_class = arranged(channels, heads, 7, (14, 20), True, norm_first=norm_first)

    def half(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(dtype)
        return type(value)(*map(half, value)) if isinstance(value, tuple) else value

    exact = tokens.clone()
    windowed.run_windows_(exact, rows, weights, bias, bias_class, padded=True)
    found = tokens.to(dtype)
    triton_windows.run_windows_(found, rows, half(weights), bias.to(dtype), bias_class, padded=True)
    assert found.dtype == dtype
    assert (found.float() - exact).abs().max() <= (0.03 if dtype == torch.bfloat16 else 0.004) * exact.abs().max()


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6), height=st.integers(3, 20), width=st.integers(3, 20), side=st.sampled_from([4, 7]),
    heads=st.sampled_from([1, 2, 3]), head_dim=st.sampled_from([8, 16, 24, 32]), with_bias=st.booleans(),
    norm_first=st.booleans(),
)  # fmt: skip
def test_any_shape(
    seed: int, height: int, width: int, side: int, heads: int, head_dim: int, with_bias: bool, norm_first: bool
) -> None:
    torch.manual_seed(seed)
    channels = heads * head_dim
    tokens, rows, bias, bias_class = case(channels, heads, side, (height, width), shifted=bool(seed % 2))
    weights = block(channels, heads, 2, with_bias=with_bias, norm_first=norm_first)
    assert_equal_to_portable(triton_windows.run_windows_, tokens, rows, weights, bias, bias_class, 5e-6)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6), height=st.integers(3, 24), width=st.integers(3, 24), side=st.sampled_from([4, 7, 12]),
    tenths=st.integers(1, 8), importance=st.sampled_from(["mean_abs_l2", "l2"]),
)  # fmt: skip
def test_scores_ranking_and_rows_are_those_of_torch(
    seed: int, height: int, width: int, side: int, tenths: int, importance: windows.Importance
) -> None:
    torch.manual_seed(seed)
    x = random(2, height, width, 20)
    window, shift = (side, side), (side // 2, 0) if seed % 2 else (0, 0)
    index = windows.window_token_index(height, width, window, shift, x.device)
    count = windows.num_keep(len(index), tenths)
    scores = windows.window_scores(windows.token_magnitude(x, importance), index)
    expected = windows.rank_windows(scores, count)
    ((keep, rows),) = triton_windows.score_and_rank(x, [index], count, importance)
    torch.testing.assert_close(scores.gather(1, keep), scores.gather(1, expected))  # rounding may swap equal ones
    assert all(len(set(image.tolist())) == count for image in keep)
    padded = windows.has_padding(height, width, window)
    assert torch.equal(rows, windows.flat_rows(index, keep, height * width, scratch_row=padded))


def test_both_partitions_are_ranked_at_once() -> None:
    x = random(3, 15, 20, 24)
    indices = [windows.window_token_index(15, 20, (7, 7), shift, x.device) for shift in ((0, 0), (3, 3))]
    both = triton_windows.score_and_rank(x, indices, 4, "mean_abs_l2")
    for index, (keep, rows) in zip(indices, both, strict=True):
        ((alone, its_rows),) = triton_windows.score_and_rank(x, [index], 4, "mean_abs_l2")
        assert torch.equal(keep, alone)
        assert torch.equal(rows, its_rows)
    assert not torch.equal(both[0][1], both[1][1])


def test_equal_scores_and_nan_fill_every_place() -> None:
    x = torch.ones(1, 28, 28, 16, device=DEVICE)
    index = windows.window_token_index(28, 28, (7, 7), (0, 0), x.device)
    ((keep, _),) = triton_windows.score_and_rank(x, [index], 8, "l2")
    assert keep.tolist() == [list(range(8))]
    x[0, :14] = float("nan")
    ((keep, _),) = triton_windows.score_and_rank(x, [index], 12, "l2")
    assert sorted(keep[0].tolist()) == list(range(12))


def test_what_the_kernels_do_not_take_is_told() -> None:
    weights = block(32, 1)
    assert triton_windows.supports(weights)
    assert not triton_windows.supports(weights._replace(norm1=Norm(None, None, 1e-5)))


def tiny(name: str, kernels: Kernels) -> nn.Module:
    options = {"img_size": 72, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 5}
    torch.manual_seed(0)
    model = sparsify_(timm.create_model(name, **options).eval().to(DEVICE), kernels=kernels)
    set_sparsity(model, 0.5)
    return model


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"])
def test_a_model_runs_on_them_where_it_is_asked_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(2, 3, 72, 72)
    launched: list[str] = []
    for function in ("run_windows_", "score_and_rank"):
        real = getattr(triton_windows, function)

        def counting(*args: Any, of: Any = real, label: str = function, **more: Any) -> Any:
            launched.append(label)
            return of(*args, **more)

        monkeypatch.setattr(triton_windows, function, counting)
    with torch.inference_mode():
        expected = tiny(name, "portable")(x)
        assert not launched
        found = tiny(name, "triton")(x)
    assert sorted(launched) == ["run_windows_"] * 4 + ["score_and_rank"] * 2  # two stages of two blocks
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_they_do_not_take_falls_back_with_one_warning() -> None:
    name, x = "swin_tiny_patch4_window7_224", random(1, 3, 72, 72).double()
    choice._warn_once.cache_clear()
    with torch.inference_mode():
        expected = tiny(name, "portable").double()(x)
        model = tiny(name, "triton").double()
        with pytest.warns(RuntimeWarning, match="float32, float16 or bfloat16"):
            torch.testing.assert_close(model(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(model(x), expected)


def test_without_a_gpu_or_triton_the_portable_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = block(32, 1)
    for package, reason in ((None, "cannot be used"), (triton, "no cpu backend")):
        monkeypatch.setitem(sys.modules, "triton", package)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        choice._engine.cache_clear()
        choice._warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match=reason):
            assert choice.chosen("triton", weights, torch.device("cpu")) is windowed.run_windows_
    choice._engine.cache_clear()


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto, portable, native, triton"):
        tiny("swin_tiny_patch4_window7_224", "cuda")  # type: ignore[arg-type]


def test_every_kernel_compiles_for_a_gpu_within_its_shared_memory() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_compile.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({one["kernel"] for one in compiled}) == 6
    assert {kind for one in compiled for kind in one["types"]} == {"*fp32", "*fp16", "*bf16"}
    assert max(one["shared"] for one in compiled) <= 99 * 1024  # what the smallest GPUs of today allow


def test_only_contiguous_weights_of_known_types_are_taken() -> None:
    weights = block(32, 1)
    turned = Affine(weights.fc1.weight.t().contiguous().t(), weights.fc1.bias)
    assert not triton_windows.supports(weights._replace(fc1=turned))
    doubled = Affine(weights.fc1.weight.double(), weights.fc1.bias)
    assert not triton_windows.supports(weights._replace(fc1=doubled))
