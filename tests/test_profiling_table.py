"""Latency table and time per stage, on a clock that the model's own parts move: exact numbers, no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from sparsevit_cli import kernels, windows
from sparsevit_cli.errors import ConfigError, UnsteadyError
from sparsevit_cli.kernels.portable import PORTABLE
from sparsevit_cli.profiling.latency_table import measure_configs, measure_latency_table, table_identity
from sparsevit_cli.profiling.neighbours import Moment, Patience
from sparsevit_cli.profiling.stages import time_stages
from sparsevit_cli.profiling.workload import Workload, image_workload
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.swin import SparseBlock, get_sparsity, set_sparsity, sparsify_, without_kernels
from tiny import tiny_swin

SIZE, DEPTHS = 112, (1, 2, 3, 1)
SPACE = SearchSpace(DEPTHS)
"""Maps of 28, 14, 7 and 4 tokens a side: 16, 4, 1 and 1 windows."""


def sparse_swin(size: int = SIZE) -> nn.Module:
    return sparsify_(tiny_swin(img_size=size, depths=DEPTHS, num_classes=10))


class FakeTime:
    """A clock in nanoseconds moved by the model: a block costs its kept windows, a ranking and a move a fixed time."""

    BLOCK_MS, WINDOW_MS, RANK_MS, MOVE_MS, STEM_MS, MERGE_MS = 1.0, 0.5, 0.25, 0.125, 3.0, 2.0

    def __init__(self, noise: float = 0.0) -> None:
        self.now_ns, self.noise, self.rng = 0, noise, Random(0)

    def clock(self) -> int:
        return self.now_ns

    def spend(self, ms: float) -> None:
        self.now_ns += round(ms * 1e6 * (1 + self.noise * self.rng.expovariate(1)))


@pytest.fixture(autouse=True)
def _modules_one_by_one() -> Iterator[None]:
    """The fake clock is moved by modules and by the moves of `windows`, as training calls them."""
    with without_kernels():
        yield


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return patched(FakeTime(), monkeypatch)


def patched(fake: FakeTime, monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    def spends(owner: Any, name: str, ms: float) -> None:
        real = getattr(owner, name)

        def spending(*args: Any, **kwargs: Any) -> Any:
            fake.spend(ms)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spending)

    real_forward = SparseBlock.forward

    def forward(self: Any, x: Tensor, kept: windows.Kept | None = None, **more: Any) -> Tensor:
        high, wide = windows.window_grid(x.shape[1], x.shape[2], self.window_size)
        count = high * wide if kept is None else kept.indices.shape[1]
        fake.spend(fake.BLOCK_MS + fake.WINDOW_MS * count)
        return real_forward(self, x, kept, **more)

    monkeypatch.setattr(SparseBlock, "forward", forward)
    spends(windows, "token_magnitude", fake.RANK_MS)
    spends(windows, "gather_rows", fake.MOVE_MS)
    spends(windows, "scatter_rows", fake.MOVE_MS)
    spends(timm.models.swin_transformer.PatchMerging, "forward", fake.MERGE_MS)
    spends(timm.layers.PatchEmbed, "forward", fake.STEM_MS)
    return fake


def test_a_table_of_additive_times_predicts_every_configuration_exactly(fake: FakeTime) -> None:
    model = sparse_swin()
    table = measure_latency_table(image_workload(model, SIZE), seconds=0.001, rounds=2, clock=fake.clock)
    assert [len(stage) for stage in table.pair_ms] == [1, 1, 2, 1]
    assert table.overhead_ms == pytest.approx((fake.RANK_MS, fake.RANK_MS, 0, 0))
    assert table.base_ms == pytest.approx(fake.STEM_MS + 3 * fake.MERGE_MS)
    assert table.pair_ms[0][0][0] == pytest.approx(fake.BLOCK_MS + 16 * fake.WINDOW_MS)
    assert table.pair_ms[0][0][5] == pytest.approx(fake.BLOCK_MS + 8 * fake.WINDOW_MS + 2 * fake.MOVE_MS)
    configs = [SPACE.dense, SPACE.sparsest, *(SPACE.sample(Random(n)) for n in range(20))]
    measured = measure_configs(image_workload(model, SIZE), configs, seconds=0.001, rounds=6, clock=fake.clock)
    assert list(measured) == list(dict.fromkeys(configs))
    for config, latency in measured.items():
        assert table.predict(config) == pytest.approx(latency.median_ms)
    sparsest = measured[SPACE.sparsest]
    assert sparsest.speedup == pytest.approx(measured[SPACE.dense].median_ms / sparsest.median_ms)
    assert sparsest.speedup > 1.3


def test_the_scale_comes_from_unmarked_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that only ever adds leaves a sum of medians too small; held-out configurations still fit."""
    fake = patched(FakeTime(noise=0.1), monkeypatch)
    model = sparse_swin()
    table = measure_latency_table(image_workload(model, SIZE), seconds=0.001, rounds=15, clock=fake.clock)
    configs = [SPACE.sample(Random(n)) for n in range(6)]
    measured = measure_configs(
        image_workload(model, SIZE), configs, seconds=0.001, rounds=15, max_spread=1, clock=fake.clock
    )
    error = table.fit_error([(config, latency.median_ms) for config, latency in measured.items()])
    assert error.mean < 0.02
    assert error.largest < 0.04


def test_ratios_that_keep_equally_many_windows_share_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = patched(FakeTime(noise=0.5), monkeypatch)
    table = measure_latency_table(image_workload(sparse_swin(), SIZE), seconds=0.001, rounds=3, clock=fake.clock)
    four_windows = [4, 3, 3, 2, 2, 2, 1, 1, 1]
    for tenths, kept in enumerate(four_windows):
        assert (table.pair_ms[1][0][tenths] == table.pair_ms[1][0][four_windows.index(kept)]) is True
    assert len(set(table.pair_ms[1][0])) == 4
    assert len(set(table.pair_ms[2][0])) == 1  # a single window is always computed
    assert table.overhead_ms[2:] == (0, 0)


def test_a_smaller_table_and_its_progress(fake: FakeTime) -> None:
    shares: list[float] = []
    table = measure_latency_table(
        image_workload(sparse_swin(), SIZE),
        max_tenths=3,
        seconds=0.01,
        rounds=4,
        clock=fake.clock,
        on_round=shares.append,
    )
    assert table.max_tenths == 3
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) >= 4


def test_measuring_leaves_the_model_as_it_was(fake: FakeTime) -> None:
    model = sparse_swin().train()
    config = SparsityConfig(((1,), (2,), (3, 4), (5,)))
    set_sparsity(model, config)
    measure_latency_table(image_workload(model, SIZE), seconds=0.001, rounds=1, clock=fake.clock)
    measure_configs(image_workload(model, SIZE), [SPACE.dense], seconds=0.001, rounds=1, clock=fake.clock)
    assert get_sparsity(model) == config
    assert model.training
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_dense_timm_model_has_no_table() -> None:
    with pytest.raises(ConfigError, match=r"sparsify_\(model\) first"):
        measure_latency_table(image_workload(tiny_swin(depths=DEPTHS)))


def test_identity_tells_what_a_table_holds_for() -> None:
    model = sparse_swin()
    identity = table_identity(image_workload(model, SIZE, 2))
    assert identity == table_identity(image_workload(model, SIZE, 2, seed=1))
    others = [
        table_identity(image_workload(model, SIZE, 3)),
        table_identity(image_workload(model, SIZE, 2, dtype=torch.bfloat16)),
        table_identity(image_workload(sparsify_(model, importance="l2"), SIZE, 2)),
        table_identity(image_workload(sparse_swin(64), torch.zeros(2, 3, 64, 64))),
        table_identity(image_workload(model, SIZE, 2, scope="backbone")),
    ]
    assert identity not in others


def test_real_passes_fill_a_table() -> None:
    table = measure_latency_table(image_workload(sparse_swin(), SIZE, 2), seconds=0.001, rounds=2, max_spread=1000.0)
    assert all(ms > 0 for stage in table.pair_ms for pair in stage for ms in pair)
    assert table.identity["batch"] == 2
    assert table.predict(SPACE.dense) > 0


@pytest.fixture
def pruned() -> Iterator[nn.Module]:
    model = sparse_swin()
    set_sparsity(model, [[0.5], [0], [0, 0], [0]])
    yield model
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_time_per_stage_is_charged_to_its_part(fake: FakeTime, pruned: nn.Module) -> None:
    times = time_stages(image_workload(pruned, torch.zeros(1, 3, SIZE, SIZE)), passes=3, clock=fake.clock)
    rows = {row.name: row for row in times.rows}
    assert list(rows) == ["stem", "stage 0", "stage 1", "stage 2", "stage 3", "head"]
    assert rows["stem"].other_ms == fake.STEM_MS
    first, second = rows["stage 0"], rows["stage 1"]
    assert (first.blocks_ms, first.scoring_ms) == (fake.BLOCK_MS + 8 * fake.WINDOW_MS, fake.RANK_MS)
    assert (first.moves_ms, first.merging_ms) == (2 * fake.MOVE_MS, 0)
    assert (second.blocks_ms, second.merging_ms) == (2 * (fake.BLOCK_MS + 4 * fake.WINDOW_MS), fake.MERGE_MS)
    assert second.scoring_ms == second.moves_ms == 0
    assert sum(row.total_ms for row in times.rows) == times.total_ms == times.marked_ms
    assert times.share("moves_ms") == pytest.approx(2 * fake.MOVE_MS / times.total_ms)


def test_stage_times_are_scaled_to_the_measured_total_and_tell_the_residual(fake: FakeTime, pruned: nn.Module) -> None:
    x = torch.zeros(1, 3, SIZE, SIZE)
    marked_ms = time_stages(image_workload(pruned, x), passes=3, clock=fake.clock).marked_ms
    times = time_stages(image_workload(pruned, x), total_ms=0.8 * marked_ms, passes=3, clock=fake.clock)
    assert sum(row.total_ms for row in times.rows) == pytest.approx(0.8 * marked_ms)
    assert times.residual == pytest.approx(0.25)


def test_dense_models_spend_on_blocks_and_merging_only() -> None:
    times = time_stages(image_workload(tiny_swin(depths=DEPTHS, img_size=SIZE), SIZE))
    assert all(row.scoring_ms == row.moves_ms == 0 for row in times.rows)
    assert all(row.blocks_ms > 0 for row in times.rows if row.name.startswith("stage"))


def test_marked_passes_compute_the_same_and_leave_no_trace(pruned: nn.Module) -> None:
    pruned.eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    before = pruned(x)
    time_stages(image_workload(pruned, x), passes=2)
    assert torch.equal(pruned(x), before)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        time_stages(image_workload(pruned, torch.zeros(1, 4, SIZE, SIZE)))
    with pytest.raises(ConfigError, match="64 x 64 pixels"):
        time_stages(image_workload(pruned, torch.zeros(1, 3, 64, 64)))
    assert kernels.beside_modules() is PORTABLE


def test_compiled_models_have_no_parts(pruned: nn.Module) -> None:
    compiled = torch.compile(pruned, backend="eager")
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        time_stages(image_workload(compiled, torch.zeros(1, 3, SIZE, SIZE)))  # type: ignore[arg-type]


@pytest.mark.usefixtures("watched")
def test_a_stop_is_heard_while_a_table_waits_for_a_neighbour() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def check() -> None:
        if now[0] > 3:
            raise KeyboardInterrupt

    patience = Patience(3600, watch=lambda: Moment(now[0], now[0], 0.0, None, 0, 2), now=lambda: now[0], sleep=sleep)
    with pytest.raises(KeyboardInterrupt):
        measure_latency_table(image_workload(sparse_swin(), SIZE), patience=patience, check=check)
    assert now[0] < 4


def test_no_table_is_filled_beside_a_neighbour(fake: FakeTime) -> None:
    watch_time = [0.0]

    def busy() -> Moment:
        watch_time[0] += 1.0
        return Moment(watch_time[0], watch_time[0], 0.0, None, 0, 2)

    patience = Patience(5.0, watch=busy, now=lambda: watch_time[0], sleep=lambda seconds: None)
    with pytest.raises(UnsteadyError, match="latency table: other processes take"):
        measure_latency_table(image_workload(sparse_swin(), SIZE), seconds=0.001, clock=fake.clock, patience=patience)


def test_a_table_whose_times_change_is_measured_again_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = patched(FakeTime(), monkeypatch)
    real, rounds = fake.spend, [0]

    def slower(ms: float) -> None:
        rounds[0] += 1
        real(ms * (1 + rounds[0] / 2000))

    monkeypatch.setattr(fake, "spend", slower)
    with pytest.raises(UnsteadyError, match=r"latency table: times changed by \d+%.*after 1 repetitions"):
        measure_latency_table(image_workload(sparse_swin(), SIZE), seconds=0.001, rounds=4, retries=1, clock=fake.clock)


class Detector(nn.Module):
    """Takes a dict with a list of image batches; the Swin sees all of them, padded."""

    def __init__(self) -> None:
        super().__init__()
        self.swin, self.head = sparse_swin(), nn.Linear(10, 2)

    def forward(self, inputs: dict[str, list[Tensor]]) -> list[Tensor]:
        return [self.head(self.swin(nn.functional.pad(x, (0, 12, 0, 2)))) for x in inputs["images"]]


def test_a_detector_with_its_own_inputs_is_measured() -> None:
    inputs = {"images": [torch.randn(2, 3, 110, 100)] * 2, "sizes": torch.tensor([[110, 100]] * 2)}  # type: ignore[dict-item]
    workload = Workload(Detector().eval(), inputs, image_size=(110, 100), batch=2)
    table = measure_latency_table(workload, seconds=0.001, rounds=2, max_spread=1000.0)
    assert table.predict(SPACE.dense) > 0
    assert (table.identity["scope"], table.identity["batch"], table.identity["image_size"]) == ("model", 2, [110, 100])
    assert table.pair_ms[1][0][1] == table.pair_ms[1][0][2]  # 3 of the 4 windows of the padded images' map
    measured = measure_configs(workload, [SPACE.dense, SPACE.sparsest], seconds=0.001, rounds=6, max_spread=1000.0)
    assert all(latency.median_ms > 0 for latency in measured.values())
    assert [row.name for row in time_stages(workload, passes=2).rows][:2] == ["stem", "stage 0"]
