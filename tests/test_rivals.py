"""The benchmark's contestants compute what they claim to, and its table says who won."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsevit_cli.errors import MeasurementError
from sparsevit_cli.kernels import Kernels, choice, held, portable
from sparsevit_cli.kernels.fallback import LimitedEngine
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.rivals import dense_variants, foreseen, oracle
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.swin import set_sparsity, sparsify_, without_kernels
from sparsevit_cli.swin.authors_flow import authors_flow
from sparsevit_cli.swin.fused import with_fused_attention
from sparsevit_cli.workflows import rivals
from sparsevit_cli.workflows.contestants import Contestant
from sparsevit_cli.workflows.rivals import _compared, measure_rivals
from sparsevit_cli.workflows.rows import Place
from sparsevit_cli.workflows.session import Session
from tiny import tiny_config, tiny_swin


@pytest.mark.parametrize("size", [(112, 112), (224, 224), (120, 152)])
@pytest.mark.parametrize("ratios", [0.0, 0.5, [[0.6], [0], [0.2, 0.4], [0]]])
def test_the_authors_flow_gives_our_numbers(size: tuple[int, int], ratios: object) -> None:
    model = sparsify_(tiny_swin(img_size=size)).eval()
    set_sparsity(model, ratios)  # type: ignore[arg-type]
    x = torch.randn(2, 3, *size)
    with torch.inference_mode(), without_kernels():
        assert torch.allclose(authors_flow(model)(x), model(x), atol=1e-5)


def test_the_variants_give_timms_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    model, x = tiny_swin(img_size=112).eval(), torch.randn(1, 3, 112, 112)
    variants = dense_variants(model, max_autotune=True)
    assert len(variants) == 6
    with torch.inference_mode():
        for variant in variants:
            assert torch.allclose(variant.run(x), model(x), atol=1e-5)
    for fused in (False, True):
        blocks = [module for module in with_fused_attention(model, fused).modules() if hasattr(module, "qkv")]
        assert [module.fused_attn for module in blocks] == [fused] * 10


@pytest.mark.parametrize(
    ("kernels", "img_size"), [("auto", 224), ("auto", 248), ("portable", 224), ("portable", 248), ("triton", 64)]
)
def test_the_oracle_skips_moves_and_ranking_and_leaves_all_as_it_was(
    kernels: Kernels, img_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparsify_(tiny_swin(img_size=img_size), kernels=kernels).eval()
    set_sparsity(model, 0.5)
    x = torch.randn(1, 3, img_size, img_size)
    memory = foreseen(model, x)
    for owner, name in ((torch, "topk"), *((engine, "_score_and_rank") for engine in LimitedEngine.__subclasses__())):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("the oracle scores or ranks"))
    for _ in range(2):
        with torch.inference_mode(), oracle(memory):
            assert model(x).isfinite().all()
    with torch.inference_mode(), pytest.raises(pytest.fail.Exception, match="scores or ranks"):
        model(x)  # without the oracle it does
    assert choice.beside_modules() is portable.PORTABLE


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("ratios", [0.2, [[0.5], [0], [0.2, 0.4], [0]]])
def test_the_oracle_computes_as_much_as_ours_and_leaves_nothing_behind(
    ratios: object, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "is_asynchronous", lambda device: asynchronous)
    model, x = sparsify_(tiny_swin(img_size=248), kernels="portable").eval(), torch.randn(2, 3, 248, 248)
    set_sparsity(model, ratios)  # type: ignore[arg-type]
    held._remembered_batch.cache_clear()
    rows = list[int]()
    linear = portable.layer_norm
    monkeypatch.setattr(portable, "layer_norm", lambda y, norm: rows.append(len(y)) or linear(y, norm))
    memory = foreseen(model, x)
    expected, rows[:] = list(rows), []
    assert expected
    with torch.inference_mode(), oracle(memory):
        model(x)
    assert rows == expected
    with torch.inference_mode():
        first = model(x)
    with torch.inference_mode(), oracle(memory):
        model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), first)
    held._remembered_batch.cache_clear()


MADE_UP_MS = {
    "timm eager": 12.0, "timm eager, fused": 10.0, "timm compile": 9.0, "timm compile, fused": 8.0,
    "timm compile, frozen": 1.0, "ours, ratio 0": 10.0, "ours, 60% everywhere": 4.0, "oracle, 60% everywhere": 2.0,
    "ours, [[0.2], [0.4]]": 5.0, "oracle, [[0.2], [0.4]]": 5.0, "authors' flow, 60% everywhere": 20.0,
}  # fmt: skip
"""Milliseconds by contestant, so that who wins is known beforehand; a frozen model is not among those who can."""


def made_up(candidates: Mapping[str, Callable[[], object]], **settings: object) -> dict[str, Latency]:
    """Stands for `measure_interleaved`: everybody runs once, and takes as long as `MADE_UP_MS` says."""
    inspect.signature(measure_interleaved).bind(candidates, **settings)
    with torch.inference_mode():
        for run in candidates.values():
            run()
    rounds = (0.9, 0.95, 1.0, 1.0, 1.05, 1.1)
    return {name: Latency.from_samples([MADE_UP_MS.get(name, 6.0) * r for r in rounds]) for name in candidates}


def test_a_benchmark_names_the_best_dense_and_compares_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: copy.deepcopy(model))
    monkeypatch.setattr(rivals, "measure_interleaved", made_up)
    config = tiny_config(output=str(tmp_path), profile={"batch_sizes": [1], "runtimes": ["torch"]})
    report = measure_rivals(Session(config, SilentReporter()), img_size="64", ratios="[[.2],[.4]]")
    (cell,) = report.cells
    rows = {row.label: row for row in cell.rows}
    assert cell.best_dense == "timm compile, fused"
    assert {row.kind for row in cell.rows} == {"B0", "B1", "B2", "B2f", "B3", "ours", "O"}
    for label, milliseconds in MADE_UP_MS.items():
        row = rows[label]
        assert (row.latency_ms, row.speedup) == pytest.approx((milliseconds, 8.0 / milliseconds))
    assert rows["ours, [[0.2], [0.4]]"].gmacs < rows["ours, ratio 0"].gmacs == rows["timm eager"].gmacs
    sparse = rows["ours, 60% everywhere"]
    saved = 1 - sparse.gmacs / rows["ours, ratio 0"].gmacs
    assert (sparse.realised_low, sparse.realised, sparse.realised_high) == pytest.approx([(1 - 4 / 10) / saved] * 3)
    assert (sparse.tax_low, sparse.tax, sparse.tax_high) == pytest.approx([4 / 2 - 1] * 3)
    shaky, steady = replace(rows["ours, ratio 0"], stable=False), Latency.from_samples([1.0])
    ours = Contestant(
        "ours", Place("torch", "2", "fp32", 1), lambda: None, torch.nn.Identity(), None, (64, 64), dense=shaky.label,
        oracle="oracle",
    )  # fmt: skip
    latencies = {sparse.label: steady, "oracle": replace(steady, unsteady="spread"), shaky.label: steady}
    told = _compared(ours, replace(sparse, realised=None, tax=None), {shaky.label: shaky}, latencies)
    assert told.realised is told.tax is None
    unsteady = replace(
        report, cells=(replace(cell, rows=(replace(cell.rows[0], stable=False, unsteady="spread"), *cell.rows[1:])),)
    )
    with pytest.raises(MeasurementError, match=f"1 of {len(rows)} rows are not steady"):
        unsteady.refuse_unsteady()
    folder = tmp_path / "tiny" / "rivals"
    assert (folder / "rivals.json").exists()
    assert (folder / "rivals.png").read_bytes()[:4] == b"\x89PNG"
