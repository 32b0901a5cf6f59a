"""The sparse Swin against timm: bit for bit at ratio 0, close when every window is gathered, exact where skipped."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from sparsevit_cli import windows
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.models import supported_models
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import (
    SparseBlock,
    SparseStage,
    get_sparsity,
    model_depths,
    set_sparsity,
    shared_prefixes,
    sparse_stages,
    sparsify_,
    without_kernels,
)
from tiny import tiny_swin

SWIN_NAMES = supported_models()
OF_EACH = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224")
"""One name of each generation; the last has a third norm at the end of every stage."""
RATIOS = [[0.6], [0.3], [0.2, 0.4, 0.5], [0]]


def small_swin(name: str = "swin_tiny_patch4_window7_224", **kwargs: object) -> nn.Module:
    """timm's `name` at reduced width, with weights that make every branch matter."""
    model = tiny_swin(name, **{"embed_dim": 8, "depths": (2, 2, 6, 2), "drop_path_rate": 0.0} | kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for module in model.modules():  # V2 and V2-CR start these at zero, so that a block would do nothing
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(1 + 0.05 * torch.randn_like(module.weight))
    return model.eval()


def window_of(name: str) -> int:
    """The largest window of `name`, in tokens; that of V2-CR is an eighth of the patch grid, here 7."""
    found = re.findall(r"window(?:\d+to)?(\d+)", name)
    return int(found[0]) if found else 7


def sizes_of(window: int) -> list[tuple[int, int]]:
    """Dividing, padded, not square, last map no larger than a window; in pixels at patch 4."""
    return [(window * 16, window * 16), (window * 16 + 12, window * 16 + 20), (window * 16, window * 40), (64, 96)]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name in SWIN_NAMES
        for case in (range(4) if not name.startswith("swinv2") or name in OF_EACH else [1])
    ],
)
def test_ratio_zero_is_timm_to_the_bit(name: str, case: int) -> None:
    window = window_of(name)
    size = sizes_of(window)[case]
    options = {"window_size": 7} if "_cr_" in name else {}
    model = small_swin(name, img_size=size, depths=(2, 2, 2, 2), **options)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected, features = model(x), model.forward_features(x)
        keys = list(model.state_dict())
        sparsify_(model)
        assert torch.equal(model(x), expected)
        assert torch.equal(model.forward_features(x), features)
    assert list(model.state_dict()) == keys
    assert get_sparsity(model).is_dense


class _ForceGather:
    """Every block computes all its windows, in a shuffled order, through gather and scatter."""

    def __init__(self, model: nn.Module) -> None:
        for block in model.modules():
            if isinstance(block, SparseBlock):
                block.register_forward_pre_hook(self._all_windows, with_kwargs=True)

    def _all_windows(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        (x,) = args
        index = token_index_of(block, x)
        order = torch.stack([torch.randperm(index.shape[0]) for _ in range(x.shape[0])])
        return args, {"kept": windows.Kept(order, windows.rows_of(order, index, x.shape[1] * x.shape[2]))}


def token_index_of(block: Any, x: torch.Tensor) -> torch.Tensor:
    sizes = (x.shape[1], x.shape[2], block.window_size, block.shift_size)
    return windows.window_token_index(*sizes, "roll_first", x.device)


@pytest.mark.parametrize("name", OF_EACH)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("size", [(112, 112), (124, 132), (112, 280), (64, 96)])
def test_all_windows_gathered_is_close_forward_and_gradients(size: tuple[int, int], dynamic: bool, name: str) -> None:
    dense = small_swin(name, img_size=size, strict_img_size=not dynamic, window_size=7)
    forced = sparsify_(copy.deepcopy(dense))
    _ForceGather(forced)
    x = torch.randn(2, 3, *size)
    expected, actual = dense(x), forced(x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    actual.square().sum().backward()
    gradients = dict(forced.named_parameters())
    for key, parameter in dense.named_parameters():
        scale = parameter.grad.abs().max()
        assert (gradients[key].grad - parameter.grad).abs().max() <= 1e-5 * max(1.0, scale), key


@pytest.mark.parametrize("way", [nullcontext, without_kernels])
@pytest.mark.parametrize("importance", windows.IMPORTANCES)
@pytest.mark.parametrize("size", [(112, 112), (124, 132)])
@pytest.mark.parametrize("name", [*OF_EACH[:2], "swinv2_cr_tiny_224"])  # a third norm changes every window
def test_skipped_windows_keep_their_bits(
    name: str, size: tuple[int, int], importance: windows.Importance, way: Callable[[], AbstractContextManager[None]]
) -> None:
    model = sparsify_(small_swin(name, img_size=size, window_size=7), importance=importance)
    set_sparsity(model, RATIOS)
    touched: list[str] = []
    entered: list[torch.Tensor] = []

    def remember(block: SparseBlock, args: tuple, kwargs: dict) -> None:
        entered.append(args[0].clone())  # the kernels change the map itself

    def check(block: SparseBlock, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        x = entered.pop()
        if "kept" not in kwargs or not isinstance(getattr(block, "norm3", nn.Identity()), nn.Identity):
            return
        keep, index = kwargs["kept"].indices, token_index_of(block, x)
        for image in range(x.shape[0]):
            kept = torch.zeros(x.shape[1] * x.shape[2] + 1, dtype=torch.bool)
            kept[index[keep[image]].flatten()] = True
            before, after = x[image].flatten(0, 1), output[image].flatten(0, 1)
            assert torch.equal(before[~kept[:-1]], after[~kept[:-1]])
            assert not torch.equal(before[kept[:-1]], after[kept[:-1]])
        touched.append("block")

    remember.keeps_nothing = check.keeps_nothing = True  # type: ignore[attr-defined]
    for block in model.modules():
        if isinstance(block, SparseBlock):
            block.register_forward_pre_hook(remember, with_kwargs=True)
            block.register_forward_hook(check, with_kwargs=True)
    with torch.no_grad(), way():
        model(torch.randn(2, 3, *size))
    assert len(touched) >= 3  # stages of one or few windows keep all of them and stay dense


def test_one_ranking_per_partition_and_prefixes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparsify_(small_swin(img_size=448, depths=(2, 2, 6, 2)))
    set_sparsity(model, [[0], [0], [0, 0.4, 0.5], [0]])
    counts: list[int] = []
    rank = windows.rank_windows
    monkeypatch.setattr(windows, "rank_windows", lambda s, k: counts.append(k) or rank(s, k))
    kept: list[Any] = []
    for block in sparse_stages(model)[2].blocks:
        block.register_forward_pre_hook(lambda _m, _a, kw: kept.append(kw.get("kept")), with_kwargs=True)
    with torch.no_grad():
        model(torch.randn(1, 3, 448, 448))
    windows_of_stage = 16
    assert counts == [windows.num_keep(windows_of_stage, 4)] * 2  # unshifted and shifted, once each
    assert kept[0] is None
    assert kept[1] is None
    assert torch.equal(kept[4].indices, kept[2].indices[:, : windows.num_keep(windows_of_stage, 5)])
    assert torch.equal(kept[5].indices, kept[3].indices[:, : windows.num_keep(windows_of_stage, 5)])


def test_each_image_of_a_batch_has_its_own_ranking() -> None:
    model = sparsify_(small_swin(img_size=112))
    set_sparsity(model, RATIOS)
    x = torch.randn(3, 3, 112, 112) * torch.rand(3, 1, 112, 112)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_every_entrance_runs_sparse() -> None:
    dense = small_swin(img_size=112)
    model = sparsify_(copy.deepcopy(dense))
    set_sparsity(model, RATIOS)
    listed = tiny_swin(features_only=True, img_size=112, embed_dim=8, depths=(2, 2, 6, 2)).eval()
    weights = {name.replace("layers.", "layers_", 1): w for name, w in dense.state_dict().items()}
    listed.load_state_dict({name: weights[name] for name in listed.state_dict()})
    sparsify_(listed)
    set_sparsity(listed, RATIOS)
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        features = model.forward_features(x)
        final, intermediates = model.forward_intermediates(x)
        assert torch.equal(features, final)
        assert torch.equal(model.forward_head(features), model(x))
        assert not torch.allclose(features, dense.forward_features(x))
        for ours, wrapped in zip(intermediates, listed(x), strict=True):
            assert torch.equal(ours.permute(0, 2, 3, 1), wrapped)

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = copy.deepcopy(dense)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.backbone.forward_features(x)

    detector = sparsify_(Detector())
    set_sparsity(detector, RATIOS)
    with torch.no_grad():
        assert torch.equal(detector(x), features)


def test_set_sparsity_validates_before_it_changes() -> None:
    model = sparsify_(small_swin())
    set_sparsity(model, RATIOS)
    before = get_sparsity(model)
    wrong: list[object] = [
        [[0.6], [0], [0.5, 0.4, 0.2], [0]], [[0.6], [0], [0.2, 0.4], [0]], [[0.6], [0]], [[0.9], [0], [0, 0, 0], [0]],
        [[0.65], [0], [0, 0, 0], [0]], [[float("nan")], [0], [0, 0, 0], [0]], "0.6", [[True], [0], [0, 0, 0], [0]],
        [["a"], [0], [0, 0, 0], [0]], 0.95, None,
    ]  # fmt: skip
    for ratios in wrong:
        with pytest.raises(ConfigError):
            set_sparsity(model, ratios)
        assert get_sparsity(model) == before
    set_sparsity(model, 0.5)
    assert get_sparsity(model) == SparsityConfig.from_ratios(0.5, (2, 2, 6, 2))


def test_sparsify_refuses_what_it_cannot_patch() -> None:
    with pytest.raises(ConfigError, match="contains no timm Swin"):
        sparsify_(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="is not sparse"):
        set_sparsity(small_swin(), 0.5)
    with pytest.raises(ConfigError, match="importance"):
        sparsify_(small_swin(), importance="magic")

    class Custom(type(small_swin().layers[0])):  # type: ignore[misc]
        pass

    model = small_swin()
    model.layers[1].__class__ = Custom
    with pytest.raises(ConfigError, match="timm's own class"):
        sparsify_(model)
    assert not isinstance(model.layers[0].blocks[0], SparseBlock)
    assert model_depths(model) == (2, 2, 6, 2)


def test_pickle_deepcopy_and_second_call() -> None:
    model = sparsify_(small_swin(img_size=112))
    set_sparsity(model, RATIOS)
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        assert sparsify_(model) is model
        assert torch.equal(model(x), expected)
        sparsify_(model, importance="random")
        assert get_sparsity(model).ratios[0] == (0.6,)
        assert not torch.equal(model(x), expected)


def test_gradient_checkpointing_and_autocast() -> None:
    model = sparsify_(small_swin(img_size=112)).train()
    set_sparsity(model, RATIOS)
    x = torch.randn(2, 3, 112, 112)
    gradients, forwards, seen = [], [], list[nn.Module]()
    for block in (block for stage in sparse_stages(model) for block in stage.blocks):
        block.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        seen.clear()
        model(x).square().sum().backward()
        forwards.append(len(seen))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert forwards == [12, 2 * 12]
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
    model.eval()
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert half.dtype == torch.bfloat16
    assert (half - full).abs().max() < 0.1 * full.abs().max()


def test_whole_model_in_bfloat16() -> None:
    model = sparsify_(small_swin(img_size=124)).to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    x = torch.randn(1, 3, 124, 124, dtype=torch.bfloat16)
    with torch.no_grad():
        dense = exact(x.float())
        set_sparsity(model, RATIOS)
        set_sparsity(exact, RATIOS)
        half, full = model(x), exact(x.float())
    assert half.dtype == torch.bfloat16
    assert (half - full).abs().max() < 0.1 * (half - dense).abs().max() < full.abs().max()


def test_compiles_without_a_graph_break() -> None:
    model = sparsify_(small_swin(img_size=112, depths=(2, 2, 2, 2)))
    set_sparsity(model, [[0.6], [0.3], [0.2], [0]])
    x = torch.randn(2, 3, 112, 112)
    explanation = torch._dynamo.explain(model)(x)
    assert explanation.graph_break_count == 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("importance", windows.IMPORTANCES)
def test_exports_with_a_dynamic_batch(importance: windows.Importance) -> None:
    model = sparsify_(small_swin(img_size=124, depths=(2, 2, 2, 2)), importance=importance)
    set_sparsity(model, [[0.6], [0.3], [0.2], [0]])
    exported = torch.export.export(
        model, (torch.randn(2, 3, 124, 124),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    for batch in (1, 3):
        x = torch.randn(batch, 3, 124, 124)
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OF_EACH[1:])
def test_later_generations_pickle_compile_export_and_give_features(name: str) -> None:
    options = {"img_size": 112, "window_size": 4, "depths": (2, 2, 2, 2)}
    model = sparsify_(small_swin(name, **options))
    set_sparsity(model, [[0.6], [0.3], [0.2], [0]])
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad(), without_kernels():
        expected = model(x)
        features = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(model.forward_head(model.forward_features(x)), expected)
        assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(model)))(x), expected)
        listed = sparsify_(tiny_swin(name, features_only=True, embed_dim=8, **options))
        found = listed.eval()(x)
        assert len(features) == len(found) == 4
        assert get_sparsity(listed).is_dense
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(exported.module()(x[:1]), model(x[:1]), atol=1e-5, rtol=1e-5)


def test_blocks_of_one_stage_may_have_other_windows() -> None:
    torch.manual_seed(0)
    model = sparsify_(small_swin("swin_tiny_patch4_window7_224", img_size=112, window_size=7))
    block: Any = model.layers[0].blocks[1]
    block.set_input_size((28, 28), (4, 4))
    set_sparsity(model, 0.5)
    counts = []

    def record(block: Any, args: tuple, kwargs: dict) -> None:
        kept = kwargs["kept"]
        counts.append((block.window_size, kept.indices.shape[1], kept.rows.shape[2]))

    record.keeps_nothing = True  # type: ignore[attr-defined]
    for block in model.layers[0].blocks[:2]:
        block.register_forward_pre_hook(record, with_kwargs=True)
    for way in (nullcontext, without_kernels):
        with torch.no_grad(), way():
            model(torch.randn(1, 3, 112, 112))
    assert counts == [((7, 7), 8, 49), ((4, 4), 24, 16)] * 2


# -- first stages that configurations have in common ------------------------------------------------------------


@pytest.mark.parametrize("name", OF_EACH)
def test_common_first_stages_are_computed_once_and_equal_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparsify_(small_swin(name, img_size=(size := window_of(name) * 16)))
    batches = [torch.randn(2, 3, size, size) for _ in range(2)]
    configs = [[[0], [0], [0, 0, 0], [0]], [[0.2], [0], [0, 0, 0.3], [0]], [[0.2], [0], [0, 0, 0.3], [0.5]],
               [[0.2], [0.4], [0.1, 0.1, 0.3], [0.5]]]  # fmt: skip
    computed: list[int] = []
    forward = SparseStage.forward

    def counted(self: SparseStage, x: torch.Tensor) -> torch.Tensor:
        computed.append(self.stage_number)
        return forward(self, x)

    monkeypatch.setattr(SparseStage, "forward", counted)
    with torch.inference_mode():
        wanted = []
        for images in batches:
            for ratios in configs:
                set_sparsity(model, ratios)
                wanted.append(model(images))
        computed.clear()
        with shared_prefixes(model):
            for images in batches:
                for ratios in configs:
                    set_sparsity(model, ratios)
                    assert torch.equal(model(images), wanted.pop(0))
    assert computed == [*range(4), *range(4), 3, 1, 2, 3] * 2
    computed.clear()
    model(batches[0])
    assert computed == [*range(4)]  # nothing is held any more
