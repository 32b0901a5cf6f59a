"""The Triton kernels against the portable ones, in Triton's interpreter on a CPU (conftest.py turns it on)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernel_cases import DEVICE, arranged, assert_equal_to_portable, block, case, random
from sparsevit_cli import windows
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.kernels import Affine, Kernels, Norm, choice, fallback
from sparsevit_cli.kernels.portable import PORTABLE
from sparsevit_cli.kernels.portable import run_windows_ as portable_run_windows_
from sparsevit_cli.models import support_table
from sparsevit_cli.swin import set_sparsity, sparsify_
from tiny import tiny_swin

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
compute_bfloat16_as_a_gpu = pytest.importorskip("interpreted").compute_bfloat16_as_a_gpu
triton_code = pytest.importorskip("sparsevit_cli.kernels.triton.code")
triton_tuning = pytest.importorskip("sparsevit_cli.kernels.triton.tuning")
triton_engine = pytest.importorskip("sparsevit_cli.kernels.triton.engine")
TRITON = triton_engine.TritonEngine()


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        compute_bfloat16_as_a_gpu(monkeypatch)


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """What a kernel should have written and did not is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


class Window(NamedTuple):
    """What the blocks of a timm Swin differ in: norms first in V1, after in V2 and V2-CR; tokens a side; a head."""

    norm_first: bool
    side: int
    head_dim: int


WINDOWS = [
    Window(True, 7, 32), Window(True, 12, 32), Window(True, 14, 32),
    Window(False, 6, 32), Window(False, 7, 32), Window(False, 7, 44), Window(False, 8, 32), Window(False, 12, 32),
    Window(False, 16, 32), Window(False, 24, 32),
]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shifted", [False, True])
def test_blocks_of_every_timm_swin_equal_the_portable_ones(window: Window, shifted: bool) -> None:
    """Unshifted on a map of whole windows; shifted on one whose last windows hold one row and half of the columns."""
    norm_first, side, head_dim = window
    torch.manual_seed(side)
    heads, size = (1 if side > 12 else 2), ((side + 1, side + side // 2) if shifted else (side, 2 * side))
    arguments = arranged(heads * head_dim, heads, side, size, shifted, norm_first=norm_first)
    assert_equal_to_portable(TRITON.run_windows_, *arguments, 2e-6)


def test_these_are_the_windows_of_every_timm_swin() -> None:
    found = set()
    for model in support_table():
        with torch.device("meta"):
            swin = timm.create_model(model.name, depths=(1, 1, 1, 1))
        blocks = [module for module in swin.modules() if hasattr(module, "window_size") and hasattr(module, "attn")]
        assert len(blocks) == 4
        for one in blocks:
            side, width = one.window_size
            assert side == width
            found.add(Window(model.generation == "V1", side, one.norm1.weight.numel() // one.attn.num_heads))
    assert found == set(WINDOWS)


@pytest.mark.parametrize(
    ("channels", "norm_first"), [(96, True), (128, True), (192, True), (192, False)]
)  # in float32 a width of 128 fuses the MLP, more does not
def test_every_width_takes_its_way(channels: int, norm_first: bool) -> None:
    torch.manual_seed(channels)
    arguments = arranged(channels, channels // 32, 7, (9, 14), True, 1, norm_first=norm_first)
    assert_equal_to_portable(TRITON.run_windows_, *arguments, 2e-6)


@pytest.mark.parametrize(
    ("dtype", "channels", "side", "size", "norm_first"),
    [(torch.bfloat16, 64, 7, (14, 14), True), (torch.bfloat16, 64, 7, (8, 10), False),
     (torch.bfloat16, 64, 8, (16, 16), False), (torch.bfloat16, 64, 12, (13, 15), True),
     (torch.bfloat16, 160, 7, (7, 14), True), (torch.bfloat16, 288, 7, (8, 10), True),
     (torch.float16, 288, 7, (7, 14), True),
     (torch.float16, 96, 7, (8, 14), True), (torch.float16, 64, 7, (8, 14), False)],
)  # fmt: skip
def test_half_precision_accumulates_in_float32(
    dtype: torch.dtype, channels: int, side: int, size: tuple[int, int], norm_first: bool
) -> None:
    """The width of 160 fuses the MLP in wide blocks, 288 in none. A few of the results that a block keeps are rounded
    on the way, each by half a unit in the last place at most.
    """
    torch.manual_seed(0)
    arguments = arranged(channels, channels // 32, side, size, True, norm_first=norm_first)
    tokens, rows, weights, bias, bias_class = _of_type(dtype, arguments)
    exact, *_ = _of_type(torch.float32, (tokens,))
    padded = windows.has_padding(*size, (side, side))
    portable_run_windows_(exact, rows, *_of_type(torch.float32, (weights, bias)), bias_class, padded=padded)
    TRITON.run_windows_(tokens, rows, weights, bias, bias_class, padded=padded)
    assert tokens.dtype == dtype
    assert (tokens.float() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def _of_type(dtype: torch.dtype, value: Any) -> Any:
    """Every tensor of floating point in `value`, which may be tuples of tuples."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        made = [_of_type(dtype, part) for part in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value


@triton.jit
def _multiply(a, b, product, half, SIZE: tl.constexpr):  # noqa: N803
    i = tl.arange(0, SIZE)
    place = i[:, None] * SIZE + i[None, :]
    total = tl.dot(tl.load(a + place), tl.load(b + place), input_precision="ieee")
    tl.store(product + place, total)
    tl.store(half + place, total.to(tl.bfloat16))


def test_bfloat16_is_multiplied_and_rounded_as_torch_does() -> None:
    a, b = random(16, 16).bfloat16(), random(16, 16).bfloat16()
    a[0, 0] = float("nan")
    product, half = torch.empty(16, 16, device=DEVICE), torch.empty(16, 16, device=DEVICE, dtype=torch.bfloat16)
    _multiply[(1,)](a, b, product, half, SIZE=16)
    torch.testing.assert_close(product, a.float() @ b.float(), equal_nan=True)
    torch.testing.assert_close(half, product.bfloat16(), rtol=0, atol=0, equal_nan=True)


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
    assert_equal_to_portable(TRITON.run_windows_, tokens, rows, weights, bias, bias_class, 5e-6)


@pytest.mark.parametrize("block_slots", [16, 256, 4096])
def test_padding_is_never_computed(block_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_engine, "BLOCK_SLOTS", block_slots)
    tokens, rows, *_ = case(32, 1, 7, (8, 15), batch=3)
    rows, layer = rows.flatten(), block(32, 1).qkv
    kept = triton_engine._true_slots(rows, len(tokens))
    is_token = rows < len(tokens)
    count = int(is_token.sum())
    assert 0 < count < len(rows) - 64  # whole programs have nothing to do
    assert kept.true_count.tolist() == [count]
    assert torch.equal(kept.rows[:count], rows[is_token])
    assert kept.places[is_token].tolist() == list(range(count))
    assert kept.places[~is_token].eq(-1).all()
    qkv = triton_engine._project(tokens, layer, kept, gather=True)
    torch.testing.assert_close(qkv[:count], nn.functional.linear(tokens[rows[is_token]], *layer))
    assert qkv[count:].isnan().all()


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
    index = windows.window_token_index(height, width, window, shift, "roll_first", x.device)
    count = windows.num_keep(len(index), tenths)
    scores = windows.window_scores(windows.token_magnitude(x, importance), index)
    expected = windows.rank_windows(scores, count)
    ((keep, rows, _),) = TRITON.score_and_rank(x, [index], count, importance)
    torch.testing.assert_close(scores.gather(1, keep), scores.gather(1, expected))  # rounding may swap equal ones
    assert all(len(set(image.tolist())) == count for image in keep)
    padded = windows.has_padding(height, width, window)
    assert torch.equal(rows, windows.flat_rows(index, keep, height * width, scratch_row=padded))


def test_both_partitions_are_ranked_at_once() -> None:
    x = random(3, 15, 20, 24)
    indices = [windows.window_token_index(15, 20, (7, 7), shift, "roll_first", x.device) for shift in ((0, 0), (3, 3))]
    both = TRITON.score_and_rank(x, indices, 4, "mean_abs_l2")
    for index, (keep, rows, _) in zip(indices, both, strict=True):
        ((alone, its_rows, _),) = TRITON.score_and_rank(x, [index], 4, "mean_abs_l2")
        assert torch.equal(keep, alone)
        assert torch.equal(rows, its_rows)
    assert not torch.equal(both[0][1], both[1][1])


def test_equal_scores_and_nan_fill_every_place() -> None:
    x = torch.ones(1, 28, 28, 16, device=DEVICE)
    index = windows.window_token_index(28, 28, (7, 7), (0, 0), "roll_first", x.device)
    ((keep, *_),) = TRITON.score_and_rank(x, [index], 8, "l2")
    assert keep.tolist() == [list(range(8))]
    x[0, :14] = float("nan")
    ((keep, *_),) = TRITON.score_and_rank(x, [index], 12, "l2")
    assert sorted(keep[0].tolist()) == list(range(12))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_launch_may_be_repeated(norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning does it: no kernel reads what it writes."""
    arguments = arranged(32, 1, 7, (8, 9), True, 1, norm_first=norm_first)
    launch, launched = triton_engine._launch, []

    def thrice(name: str, *rest: Any, **more: Any) -> None:
        launched.append(name)
        for _ in range(3):
            launch(name, *rest, **more)

    monkeypatch.setattr(triton_engine, "_launch", thrice)
    assert_equal_to_portable(TRITON.run_windows_, *arguments, 2e-6)
    assert launched[:2] == ["project_kernel", "attention_kernel"]


def test_the_fastest_candidate_is_found_once_per_class_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate of every kernel computes the same; a timer that prefers the last one decides."""
    runs = []

    def measure(run: Any, quantiles: tuple[float, ...]) -> list[float]:
        run()
        runs.append(run)
        return [1 / len(runs)] * len(quantiles)

    tuners = {
        name: triton_tuning.tuned(getattr(triton_code, name), tunable, measure)
        for name, tunable in triton_tuning.TUNABLE.items()
    }
    monkeypatch.setattr(triton_tuning, "is_on", lambda: True)
    monkeypatch.setattr(triton_engine, "_tuned", lambda name, _: tuners[name])
    assert TRITON.version() == f"{triton.__version__}, tuned"
    arguments = arranged(32, 1, 7, (8, 9), True, 1)
    for _ in range(2):
        assert_equal_to_portable(TRITON.run_windows_, *arguments, 2e-6)
    sizes = {name: len(tunable.candidates) for name, tunable in triton_tuning.TUNABLE.items()}
    assert len(runs) == 2 * sizes["project_kernel"] + sizes["attention_kernel"] + sizes["mlp_kernel"]
    for name, tuner in tuners.items():
        last = triton_tuning.TUNABLE[name].candidates[-1]
        assert all(last.items() <= chosen.all_kwargs().items() for chosen in tuner.cache.values())


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [object(), object()]
    assert triton_tuning._first_in_capture(candidates, {}) == candidates
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton_tuning._first_in_capture(candidates, {}) == candidates[:1]


def test_tuning_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(triton_tuning.VARIABLE, raising=False)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert not triton_tuning.is_on()
    monkeypatch.setenv(triton_tuning.VARIABLE, "1")
    assert triton_tuning.is_on()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert not triton_tuning.is_on()


def test_what_the_kernels_do_not_take_is_told() -> None:
    weights = block(32, 1)
    assert triton_engine.supports(weights)
    assert not triton_engine.supports(weights._replace(norm1=Norm(None, None, 1e-5)))


def tiny(name: str, kernels: Kernels) -> nn.Module:
    model = sparsify_(tiny_swin(name, img_size=72, embed_dim=32, depths=(2, 2)).eval().to(DEVICE), kernels=kernels)
    set_sparsity(model, 0.5)
    return model


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"])
def test_a_model_runs_on_them_where_it_is_asked_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(2, 3, 72, 72)
    launched: list[str] = []
    for function in ("_run_windows_", "_score_and_rank"):
        real = getattr(triton_engine.TritonEngine, function)

        def counting(*args: Any, of: Any = real, label: str = function, **more: Any) -> Any:
            launched.append(label)
            return of(*args, **more)

        monkeypatch.setattr(triton_engine.TritonEngine, function, counting)
    with torch.inference_mode():
        expected = tiny(name, "portable")(x)
        assert not launched
        found = tiny(name, "triton")(x)
    assert sorted(launched) == ["_run_windows_"] * 4 + ["_score_and_rank"] * 2  # two stages of two blocks
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_they_do_not_take_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    name, x = "swin_tiny_patch4_window7_224", random(1, 3, 72, 72).double()
    fallback.warn_once.cache_clear()
    with torch.inference_mode():
        expected = tiny(name, "portable").double()(x)
        model = tiny(name, "triton").double()
        for _ in range(2):
            torch.testing.assert_close(model(x), expected)
    assert caplog.text.count("float32, float16 or bfloat16") == 1


def test_without_a_gpu_or_triton_the_portable_kernels_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for package, reason in ((None, "cannot be used"), (triton, "no cpu backend")):
        monkeypatch.setitem(sys.modules, "triton", package)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        choice._engine.cache_clear()
        fallback.warn_once.cache_clear()
        assert choice.chosen("triton", torch.device("cpu")) is PORTABLE
        assert caplog.text.count(reason) == 1
    choice._engine.cache_clear()


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto, portable, native, triton"):
        tiny("swin_tiny_patch4_window7_224", "cuda")  # type: ignore[arg-type]


MINUTES = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("capability", "extent"),
    [(80, "few"), pytest.param(80, "all", marks=MINUTES), pytest.param(90, "all", marks=MINUTES)],
)
def test_every_kernel_compiles_for_a_gpu_within_its_shared_memory(capability: int, extent: str) -> None:
    """A100 and H100; 99 KB is what the smallest GPUs of today allow, A100 163 and H100 227."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("triton_compile.py"), str(capability)]
    command += ["few"] if extent == "few" else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    written = {name for name in vars(triton_code) if name.endswith("_kernel")}
    assert {one["kernel"] for one in compiled} == written
    types = {kind for one in compiled for kind in one["types"]}
    assert types == {"*fp32", "*bf16"} | ({"*fp16"} if extent == "all" else set())
    assert max(one["shared"] for one in compiled) <= 99 * 1024


def test_only_contiguous_weights_of_known_types_are_taken() -> None:
    weights = block(32, 1)
    turned = Affine(weights.fc1.weight.t().contiguous().t(), weights.fc1.bias)
    assert not triton_engine.supports(weights._replace(fc1=turned))
    doubled = Affine(weights.fc1.weight.double(), weights.fc1.bias)
    assert not triton_engine.supports(weights._replace(fc1=doubled))
