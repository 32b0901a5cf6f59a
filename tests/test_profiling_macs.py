"""Multiply-adds: three counters against one another, against the published figures, and against reckoning by hand."""

from __future__ import annotations

import logging
from random import Random
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.kernels import held
from sparsevit_cli.profiling.macs import (
    analytic_macs,
    count_macs,
    flopcounter_macs,
    macs_cost,
    padding_macs,
    traced_macs,
)
from sparsevit_cli.profiling.workload import Workload, image_workload
from sparsevit_cli.sparsity import Ratios, SearchSpace, SparsityConfig
from sparsevit_cli.swin import get_sparsity, set_sparsity, sparse_stages, sparsify_
from tiny import SWIN, tiny_swin

DEPTHS = (1, 1, 3, 2)
COUNTERS = (traced_macs, analytic_macs, flopcounter_macs)


def sparse_swin(img_size: int | tuple[int, int] = 64, name: str = SWIN, **options: object) -> nn.Module:
    """Block pairs (1, 1, 2, 1), the second pair of stage 2 with one block; 16 channels, 10 classes."""
    return sparsify_(tiny_swin(name, img_size=img_size, **{"depths": DEPTHS, "num_classes": 10} | options))


def fused(model: nn.Module, is_fused: bool) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = is_fused
    return model


@pytest.mark.parametrize(
    ("ratios", "published_batch4_gmacs"),
    [
        (0, 161.63),
        ([[0.3], [0], [0.1, 0.2, 0.2], [0]], 139.33),
        ([[0.6], [0], [0.2, 0.4, 0.5], [0]], 116.31),
        ([[0.7], [0], [0.2, 0.4, 0.5], [0]], 113.58),
        (0.6, 66.05),
    ],
)
def test_swin_t_at_672_has_the_published_multiply_adds(ratios: Ratios, published_batch4_gmacs: float) -> None:
    with torch.device("meta"):
        model = sparsify_(timm.create_model("swin_tiny_patch4_window7_224", img_size=672, num_classes=0))
    set_sparsity(model, ratios)
    report = analytic_macs(image_workload(model, 672))
    assert report.gmacs == pytest.approx(published_batch4_gmacs / 4, rel=1e-4)
    config = get_sparsity(model)
    assert macs_cost(image_workload(model, 672))(config) == report.total


@pytest.mark.parametrize(
    ("img_size", "options"),
    [
        (112, {}),
        (128, {}),  # padded windows in every stage
        ((100, 180), {}),  # odd maps before merging
        ((92, 60), {"strict_img_size": False}),
        (64, {"global_pool": "max", "window_size": 4, "mlp_ratio": 2.0, "head_dim": 8}),
    ],
    ids=["divides", "padded", "odd", "dynamic", "other"],
)
def test_the_three_counters_agree(img_size: int | tuple[int, int], options: dict[str, object]) -> None:
    model = sparse_swin(img_size, **options)
    for ratios, is_fused in [(0, False), (0, True), (0.5, False), ([[0.8], [0], [0.1, 0.7], [0.3]], True)]:
        set_sparsity(fused(model, is_fused), ratios)
        traced, own, torch_count = (count(image_workload(model, img_size)) for count in COUNTERS)
        assert traced.total == own.total == torch_count.total
        assert traced.parts == own.parts
        assert sum(own.parts.values()) == own.total
        assert traced.uncounted == {}
        assert int(traced) == traced.total == float(traced)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"])
@pytest.mark.parametrize("img_size", [128, (100, 180)])
def test_later_generations_are_counted_with_their_position_networks(name: str, img_size: int | tuple[int, int]) -> None:
    model = sparse_swin(img_size, name, window_size=4)
    for ratios in (0, 0.5):
        set_sparsity(model, ratios)
        traced, own, torch_count = (count(image_workload(model, img_size)) for count in COUNTERS)
        assert traced.total == own.total == torch_count.total
        assert traced.parts == own.parts
        assert traced.uncounted == {}


def test_counts_are_per_image() -> None:
    model = sparse_swin()
    set_sparsity(model, 0.4)
    assert count_macs(model, 64).total == count_macs(model, 64, batch_size=3).total
    assert count_macs(model, torch.zeros(2, 3, 64, 64)).total == flopcounter_macs(image_workload(model, 64, 4)).total


def test_one_sparse_block_by_hand() -> None:
    """Stage 0 at 112 pixels: 28 x 28 tokens, 16 windows of 49, 16 channels, 1 block; 0.6 keeps 6 windows."""
    model = sparse_swin(112)
    set_sparsity(model, [[0.6], [0], [0, 0], [0]])
    weights = 16 * 48 + 16 * 16 + 2 * 16 * 64
    assert analytic_macs(image_workload(model, 112)).parts["stage 0"] == 6 * 49 * (weights + 2 * 49 * 16)
    set_sparsity(model, 0)
    assert analytic_macs(image_workload(model, 112)).parts["stage 0"] == 16 * 49 * (weights + 2 * 49 * 16)


def test_padding_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 128 pixels maps of 32, 16 and 8 tokens a side are padded to 35, 21 and 14; that of 4 is one window."""
    model, x = sparse_swin(128).eval(), torch.randn(2, 3, 128, 128)
    rows = {16: 35**2 - 32**2, 32: 21**2 - 16**2, 64: 3 * (14**2 - 8**2)}  # of all blocks, by their width
    set_sparsity(model, 0, exact=False)
    assert padding_macs(image_workload(model, x)) == sum(count * 4 * c * c for c, count in rows.items())
    set_sparsity(model, 0)
    assert padding_macs(image_workload(model, x)) == 0  # timm's own forward
    for stage in sparse_stages(model):
        stage.importance = "random"
    set_sparsity(model, [[0.6], [0], [0, 0], [0]])
    dense_stages = sum(rows[c] * 4 * c * c for c in (32, 64))
    kept_padding, rest = divmod(2 * (padding_macs(image_workload(model, x)) - dense_stages), 12 * 16 * 16)
    assert rest == 0
    assert 0 < kept_padding < 2 * rows[16]
    for stage in sparse_stages(model):
        stage.kernels = "portable"
    monkeypatch.setattr(held, "is_asynchronous", lambda device: True)
    assert padding_macs(image_workload(model, x)) == dense_stages  # in stage 0 it is masked


def test_only_pruned_stages_change() -> None:
    model = sparse_swin(128)
    dense = count_macs(model, 128).parts
    set_sparsity(model, [[0], [0.5], [0, 0], [0]])
    sparse = count_macs(model, 128).parts
    assert {name for name in dense if dense[name] != sparse[name]} == {"stage 1"}
    assert list(dense) == ["stem", "stage 0", "stage 1", "stage 2", "stage 3", "head"]


@given(st.integers(0, 10**6), st.sampled_from([64, 128, (96, 160)]))
def test_cost_of_any_configuration_equals_the_count_of_a_model_set_to_it(
    seed: int, size: int | tuple[int, int]
) -> None:
    model = MODELS.setdefault(size, sparse_swin(size))
    config = SearchSpace(DEPTHS).sample(Random(seed))
    set_sparsity(model, config)
    assert macs_cost(image_workload(model, size))(config) == analytic_macs(image_workload(model, size)).total


MODELS: dict[int | tuple[int, int], nn.Module] = {}


def test_cost_falls_with_every_ratio() -> None:
    cost = macs_cost(image_workload(sparse_swin(224), 224))
    space = SearchSpace(DEPTHS)
    costs = [cost(space.uniform(tenths / 10)) for tenths in range(9)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 2 * costs[-1]


def test_a_configuration_of_another_model_is_refused() -> None:
    cost = macs_cost(image_workload(sparse_swin(), 64))
    with pytest.raises(ConfigError, match=r"block pairs \[1, 1, 3, 1\], the model \[1, 1, 2, 1\]"):
        cost(SparsityConfig(((0,), (0,), (0, 0, 0), (0,))))


def test_a_single_window_is_never_pruned() -> None:
    model = sparse_swin(64)  # stage 3: a map of 2 x 2, the window shrunk to it
    set_sparsity(model, [[0], [0], [0, 0], [0.8]])
    dense = sparse_swin(64)
    assert count_macs(model, 64).total == count_macs(dense, 64).total == analytic_macs(image_workload(model, 64)).total


def test_dense_timm_models_and_feature_wrappers() -> None:
    dense = tiny_swin("swin_s3_tiny_224", depths=(1, 1, 1, 1))
    assert count_macs(dense).total == analytic_macs(image_workload(dense)).total
    features = sparsify_(tiny_swin(features_only=True, depths=(1, 1, 1, 1), img_size=96))
    set_sparsity(features, 0.5)
    assert count_macs(features, 96).total == analytic_macs(image_workload(features, 96)).total
    assert analytic_macs(image_workload(features, 96)).parts["head"] == 0


def test_any_other_model_can_be_counted_but_not_reckoned() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 5))
    report = count_macs(model, 4)
    assert report.total == report.parts["head"] == 4 * 4 * 9 * 2 + 32 * 5
    assert flopcounter_macs(image_workload(model, (1, 4, 4))).total == report.total
    with pytest.raises(ConfigError, match="contains no timm Swin"):
        analytic_macs(image_workload(model, 4))


class Distances(nn.Module):
    """Hides a matrix product in an operator that nobody counts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x.flatten(2), x.flatten(2))


def test_uncounted_operators_are_told() -> None:
    assert count_macs(Distances(), 8).uncounted == {"aten::cdist": 1}


@pytest.mark.parametrize("importance", ["mean_abs_l2", "l2", "random"])
def test_scoring_counts_as_nothing_and_hides_nothing(importance: str) -> None:
    model = sparsify_(sparse_swin(128), importance=importance)  # type: ignore[arg-type]
    set_sparsity(model, 0.3)
    report = count_macs(model, 128)
    assert report.uncounted == {}
    assert report.total == analytic_macs(image_workload(model, 128)).total


def test_counting_leaves_the_model_alone(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    model = sparse_swin().train()
    model.head.eval()
    count_macs(model, 64)
    flopcounter_macs(image_workload(model, 64))
    assert (model.training, model.head.training, model.layers.training) == (True, False, True)
    assert not caplog.records
    assert not recwarn.list
    assert logging.getLogger("fvcore").level == logging.NOTSET


def test_a_size_that_the_model_is_not_built_for_is_refused() -> None:
    for count in (*COUNTERS, macs_cost):
        with pytest.raises(ConfigError, match="96 x 96 pixels, the model is built for 64 x 64"):
            count(image_workload(sparse_swin(64), 96))
    with pytest.raises(ConfigError, match="96 x 96 pixels, the model is built for 64 x 64"):
        count_macs(sparse_swin(64), 96)


# -- a Swin inside a larger model -----------------------------------------------------------------------------------


class Detector(nn.Module):
    """A Swin, a neck that adds a deeper map to the one above it, a linear head; takes and gives dicts and lists."""

    def __init__(self, swin: nn.Module) -> None:
        super().__init__()
        self.swin, self.norm = swin, nn.GroupNorm(3, 12)
        self.neck = nn.ModuleList(nn.Conv2d(16 * 2**stage, 12, 3, padding=1) for stage in range(4))
        self.head = nn.Linear(12, 7)
        self.traces = 0

    def forward(self, inputs: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        self.traces += 1
        outputs = []
        for images in inputs["images"]:
            padded = nn.functional.pad(images, (0, -images.shape[3] % 32, 0, -images.shape[2] % 32))
            swin: Any = self.swin
            maps = swin.forward_intermediates(padded, intermediates_only=True)
            levels = [self.norm(conv(m)) for conv, m in zip(self.neck, maps, strict=True)]
            for deeper in (3, 2, 1):
                above = nn.functional.interpolate(levels[deeper], size=levels[deeper - 1].shape[2:])
                levels[deeper - 1] = levels[deeper - 1] + above
            outputs += [self.head(level.flatten(2).mT) for level in levels]
        return {"outputs": outputs}


def detector(name: str = "swin_tiny_patch4_window7_224", sizes: tuple[tuple[int, int], ...] = ((90, 120),)) -> Workload:
    model = Detector(sparse_swin((96, 128), name, strict_img_size=False, window_size=4))
    inputs = {"images": [torch.randn(2, 3, *size) for size in sizes]}
    return Workload(model.eval(), inputs, image_size=sizes[0], batch=2)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("swin_tiny_patch4_window7_224", ((90, 120),)),
        ("swin_tiny_patch4_window7_224", ((90, 120), (64, 64), (90, 120))),  # several views of each sample
        ("swinv2_tiny_window8_256", ((96, 128),)),
    ],
)
def test_cost_of_a_detector_counts_its_neck_and_head(name: str, sizes: tuple[tuple[int, int], ...]) -> None:
    workload = detector(name, sizes)
    set_sparsity(workload.model, 0.3)
    cost = macs_cost(workload)
    assert workload.model.traces == 1
    assert get_sparsity(workload.model) == SparsityConfig.from_ratios(0.3, DEPTHS)
    space = SearchSpace(DEPTHS)
    for config in (space.dense, space.sparsest, space.sample(Random(1))):
        set_sparsity(workload.model, config)
        counted = traced_macs(workload)
        assert cost(config) == pytest.approx(counted.total, rel=1e-9)
        assert counted.total == flopcounter_macs(workload).total
        assert counted.uncounted == {}
    set_sparsity(workload.model, 0)
    alone = analytic_macs(image_workload(workload.model.swin, sizes[0]))
    assert cost(space.dense) > alone.total - alone.parts["head"]
    with pytest.raises(ConfigError, match="Give a configuration of this model"):
        cost(SparsityConfig(((0,),)))


def test_neck_and_head_of_a_detector_by_hand() -> None:
    """At 96 x 128 pixels maps of 24 x 32, 12 x 16, 6 x 8 and 3 x 4 tokens."""
    workload = detector(sizes=((96, 128),))
    alone = analytic_macs(image_workload(workload.model.swin, (96, 128)))
    tokens = [24 * 32, 12 * 16, 6 * 8, 3 * 4]
    neck = sum(n * 9 * 16 * 2**stage * 12 for stage, n in enumerate(tokens))
    expected = alone.total - alone.parts["head"] + neck + sum(tokens) * 12 * 7
    assert macs_cost(workload)(SearchSpace(DEPTHS).dense) == expected


def test_a_classifier_is_not_run_for_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_swin(64)
    monkeypatch.setattr(type(model), "forward", lambda *_: pytest.fail("the model runs"))
    macs_cost(image_workload(model, 64))
    analytic_macs(image_workload(model, 64))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.swin, self.conv = sparse_swin(64), nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


def test_a_model_that_does_not_run_its_swin_has_no_cost() -> None:
    with pytest.raises(ConfigError, match="Unused does not call the Swin inside it"):
        macs_cost(image_workload(Unused(), 64))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.swin, self.distances = sparse_swin(64), Distances()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.swin(x) + self.distances(x).mean()  # type: ignore[no-any-return]


def test_operators_left_out_of_a_cost_are_told(caplog: pytest.LogCaptureFixture) -> None:
    macs_cost(image_workload(Wrapped(), 64))
    assert "{'aten::_cdist_forward': 1}" in caplog.text
