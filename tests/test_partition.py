"""pad_first against the library that its weights come from, and in every way that a model is computed."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsevit_cli import windows
from sparsevit_cli.backbones import SwinBackbone, swin_backbone
from sparsevit_cli.checkpoints import save_checkpoint
from sparsevit_cli.config.experiment import ModelSection
from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.errors import CheckpointError, ConfigError
from sparsevit_cli.exporting import export_model, load_exported, load_sparsity
from sparsevit_cli.exporting.checks import runner
from sparsevit_cli.exporting.folder import ModelInfo
from sparsevit_cli.kernels import held
from sparsevit_cli.models import build_model
from sparsevit_cli.profiling.latency_table import table_identity
from sparsevit_cli.profiling.macs import analytic_macs, traced_macs
from sparsevit_cli.profiling.rivals import foreseen, oracle
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.swin import set_sparsity, sparse_stages, sparsify_, without_kernels
from sparsevit_cli.swin.authors_flow import authors_flow
from sparsevit_cli.workflows.profile import profile_model
from sparsevit_cli.workflows.session import Session
from tiny import shaken_, tiny_config, tiny_swin

NAMES = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224")
"""One of each generation."""
RATIOS = [[0.4], [0.3], [0.5]]
SMALL: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 4}
DIVIDES, PADDED = (64, 128), (72, 176)
"""Pixels. Maps of the first are 16 x 32, 8 x 16 and 4 x 8 tokens; of the second 18 x 44, 9 x 22 and 5 x 11.

Where the padding is as wide as the shift (18 tokens, windows of 4), both partitions give the same numbers.
"""
SEVEN: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 7}


def small(name: str = NAMES[0], **arguments: Any) -> nn.Module:
    """A dense Swin in evaluation mode with weights that make every branch matter."""
    options = {"img_size": PADDED, "strict_img_size": False, "always_partition": True, "drop_path_rate": 0.0}
    model = tiny_swin(name, **SMALL | options | arguments)
    shaken_(model)
    return model.eval()


# -- against transformers -----------------------------------------------------------------------------------------

_V1 = (
    (r"^swin\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^swin\.embeddings\.norm", "patch_embed.norm"),
    (r"^swin\.encoder\.", ""),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.relative_position_bias\.", "attn."),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
)
_V2 = (
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.norm", "patch_embed.norm"),
    (r"^encoder\.", ""),
    (r"attention\.output\.dense", "attn.proj"),
    (r"attention\.self\.continuous_position_bias_mlp", "attn.cpb_mlp"),
    (r"attention\.self\.logit_scale", "attn.logit_scale"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
)


def to_timm(state: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """The Swin of a backbone of transformers in timm's names."""
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if part := re.search(r"attention\.(?:self\.)?(query|key|value|[qkv]_proj)\.(weight|bias)$", key):
            block = re.sub(r"^(swin\.)?encoder\.", "", key[: part.start()])
            joined.setdefault(f"{block}attn.qkv.{part[2]}", {})[part[1][0]] = tensor
        elif not key.startswith(("hidden_states_norms", "swin.layernorm", "layernorm")):
            name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
            for pattern, new in names:
                name = re.sub(pattern, new, name)
            found[name] = tensor
    for key, parts in joined.items():
        if len(parts) == 3:
            found[key] = torch.cat([parts[name] for name in "qkv"])
        else:  # V2 has no bias of keys, and timm keeps the two others apart
            found |= {key.replace("qkv.bias", f"{name}_bias"): parts[name] for name in parts}
    return found


def theirs_and_ours(size: tuple[int, int]) -> tuple[nn.Module, SwinBackbone]:
    """transformers' SwinBackbone of random weights, and our backbone with the same ones."""
    from transformers import SwinBackbone as Theirs
    from transformers import SwinConfig

    torch.manual_seed(1)
    levels = [f"stage{number}" for number in (1, 2, 3, 4)]
    config = SwinConfig(image_size=size, out_features=levels, **_renamed(SEVEN))
    theirs = Theirs(config).eval()
    shaken_(theirs)
    ours = swin_backbone(img_size=size, drop_path_rate=0.0, **SEVEN).eval()
    weights = theirs.state_dict()
    ours.swin.load_state_dict(to_timm(weights, _V1))
    for number in range(4):
        norm = {key: weights[f"hidden_states_norms.stage{number + 1}.{key}"] for key in ("weight", "bias")}
        ours.norms[str(number)].load_state_dict(norm)
    return theirs, ours


def _renamed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}


def differences(ours: nn.Module, x: Tensor, expected: list[Tensor]) -> list[float]:
    """The largest difference of every level, over the largest value."""
    return [
        float((found - one).abs().max() / one.abs().max())
        for found, one in zip(ours(x).values(), expected, strict=True)
    ]


@pytest.mark.parametrize("size", [(256, 704), (256, 512), (320, 416), (64, 32)])
def test_pad_first_is_transformers_swin(size: tuple[int, int]) -> None:
    theirs, ours = theirs_and_ours((224, 224))
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = list(theirs(x).feature_maps)
        stock = differences(ours, x, expected)
        assert max(stock) > 0.01  # timm rolls first
        for kernels in ("portable", "native"):
            sparsify_(ours, kernels=kernels, partition="pad_first")  # type: ignore[arg-type]
            for exact in (True, False):
                set_sparsity(ours, 0.0, exact=exact)
                assert max(differences(ours, x, expected)) < 1e-5
        with without_kernels():
            assert max(differences(ours, x, expected)) < 1e-5
        sparsify_(ours, partition="roll_first")
        set_sparsity(ours, 0.0)
        assert differences(ours, x, expected) == stock


def test_where_windows_divide_both_are_transformers_swin() -> None:
    theirs, ours = theirs_and_ours((224, 224))
    x = torch.randn(1, 3, 224, 448)
    with torch.no_grad():
        expected = list(theirs(x).feature_maps)
        for partition in windows.PARTITIONS:
            sparsify_(ours, partition=partition)  # type: ignore[arg-type]
            for exact in (True, False):
                set_sparsity(ours, 0.0, exact=exact)
                assert max(differences(ours, x, expected)) < 1e-5


def test_pad_first_is_transformers_swin_v2() -> None:
    from transformers import Swinv2Backbone, Swinv2Config

    levels = [f"stage{number}" for number in (1, 2, 3)]
    theirs = Swinv2Backbone(Swinv2Config(image_size=224, out_features=levels, **_renamed(SMALL))).eval()
    shaken_(theirs)
    ours = small(NAMES[1], num_classes=0)
    missing, unexpected = ours.load_state_dict(to_timm(theirs.state_dict(), _V2), strict=False)
    assert (set(missing), unexpected) == ({"norm.weight", "norm.bias"}, [])
    x = torch.randn(2, 3, *PADDED)

    def furthest() -> float:
        maps = ours.forward_intermediates(x, intermediates_only=True)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(maps, expected, strict=True))

    with torch.no_grad():
        expected = theirs(x).feature_maps
        assert furthest() > 0.01
        sparsify_(ours, partition="pad_first")
        for exact in (True, False):
            set_sparsity(ours, 0.0, exact=exact)
            assert furthest() < 1e-5


def test_shift_masks_are_transformers() -> None:
    from transformers.models.swin.modeling_swin import SwinConfig, SwinLayer

    for (height, width), window in (((18, 44), 4), ((5, 11), 4), ((3, 9), 7), ((10, 10), 5)):
        rows, cols = windows.window_grid(height, width, (window, window))
        layer = SwinLayer(SwinConfig(window_size=window), 8, (height, width), 1, shift_size=window // 2)
        expected = layer.get_attn_mask(rows * window, cols * window, torch.float32, torch.device("cpu"))
        masks, class_of = windows.shift_mask(height, width, (window,) * 2, (window // 2,) * 2, torch.device("cpu"))
        assert torch.equal(masks[class_of], expected)


# -- every way of computing it --------------------------------------------------------------------------------------


def padded_first(block: Any, x: Tensor) -> Tensor:
    """What a block makes of a map, by a naive pad_first: pad, roll, attend to each window, roll back, crop."""
    (height, width), (wh, ww), (sh, sw) = x.shape[1:3], block.window_size, block.shift_size
    entering = block.norm1(x) if "V2" not in type(block).__name__ else x
    grid = nn.functional.pad(entering, (0, 0, 0, -width % ww, 0, -height % wh)).roll((-sh, -sw), (1, 2))
    mask = block.get_attn_mask(grid)
    corners = product(range(0, grid.shape[1], wh), range(0, grid.shape[2], ww))
    for number, (top, left) in enumerate(corners):
        window = grid[:, top : top + wh, left : left + ww].reshape(len(x), wh * ww, -1)
        attended = block.attn(window, mask=None if mask is None else mask[number : number + 1])
        grid = grid.clone()
        grid[:, top : top + wh, left : left + ww] = attended.view(len(x), wh, ww, -1)
    attended = grid.roll((sh, sw), (1, 2))[:, :height, :width]
    if "V2" not in type(block).__name__:
        x = x + attended
        return x + block.mlp(block.norm2(x))
    x = x + block.norm1(attended)
    x = x + block.norm2(block.mlp(x))
    return block.norm3(x) if hasattr(block, "norm3") else x


@pytest.mark.parametrize("name", NAMES)
def test_a_dense_block_pads_first_in_training_and_at_inference(name: str) -> None:
    model = sparsify_(small(name), partition="pad_first")
    _, shifted = sparse_stages(model)[1].blocks
    assert any(shifted.shift_size)
    x = torch.randn(2, 9, 22, 32)
    torch.testing.assert_close(shifted(x), padded_first(shifted, x), atol=1e-5, rtol=1e-5)
    sparsify_(model, partition="roll_first")
    assert (shifted(x) - padded_first(shifted, x)).abs().max() > 1e-3


@pytest.mark.parametrize("ratios", [0.0, RATIOS])
@pytest.mark.parametrize("name", NAMES)
def test_all_ways_agree(name: str, ratios: Any) -> None:
    model = sparsify_(small(name), partition="pad_first")
    x = torch.randn(2, 3, *PADDED)
    set_sparsity(model, ratios)
    expected = model(x)
    expected.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        for kernels in ("portable", "native"):
            sparsify_(model, kernels=kernels)  # type: ignore[arg-type]
            assert {stage.partition for stage in sparse_stages(model)} == {"pad_first"}
            set_sparsity(model, ratios, exact=False)
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        rolled = sparsify_(copy.deepcopy(model), partition="roll_first")
        assert (rolled(x) - expected).abs().max() > 1e-3
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # V2-CR has one in its position bias
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    if ratios == 0.0:
        gathered = sparsify_(small(name), partition="pad_first")
        for stage in sparse_stages(gathered):
            stage.as_timm = False
        torch.testing.assert_close(gathered(x), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(
    height=st.integers(1, 20), width=st.integers(1, 20), window=st.integers(2, 7), tenths=st.sampled_from([0, 3, 6]),
    name=st.sampled_from(NAMES), seed=st.integers(0, 9),
)  # fmt: skip
def test_kernels_and_modules_agree_on_any_map(
    height: int, width: int, window: int, tenths: int, name: str, seed: int
) -> None:
    sizes = {"window_size": window, "img_size": (4 * height, 4 * width), "depths": (2,), "num_heads": (2,)}
    model = sparsify_(small(name, seed=seed, **sizes), partition="pad_first")
    set_sparsity(model, tenths / 10, exact=False)
    x = torch.randn(2, 3, 4 * height, 4 * width)
    with torch.no_grad():
        with without_kernels():
            expected = model(x)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        sparsify_(model, kernels="portable")
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        with pytest.MonkeyPatch.context() as patch:  # as on a GPU, where padding is masked
            patch.setattr(held, "is_asynchronous", lambda device: True)
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_triton_gets_rows_too() -> None:
    pytest.importorskip("triton")
    model = sparsify_(small(depths=(2,), num_heads=(1,), img_size=(36, 44)), partition="pad_first", kernels="triton")
    set_sparsity(model, 0.4)
    x = torch.randn(1, 3, 36, 44)  # a map of 9 x 11 tokens
    with torch.no_grad():
        with without_kernels():
            expected = model(x)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_it_compiles_without_a_graph_break() -> None:
    model = sparsify_(small(depths=(2,), num_heads=(1,)), partition="pad_first")
    x = torch.randn(2, 3, *PADDED)
    for ratio in (0.0, 0.4):
        set_sparsity(model, ratio)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


def test_where_nothing_is_padded_timm_computes_it_to_the_bit() -> None:
    dense = small(img_size=DIVIDES)
    model = sparsify_(copy.deepcopy(dense), partition="pad_first")
    x = torch.randn(1, 3, *DIVIDES)
    assert torch.equal(model(x), dense(x))


def test_the_setting_stays_with_the_model() -> None:
    model = small()
    with pytest.raises(ConfigError, match="allowed are roll_first, pad_first"):
        sparsify_(model, partition="pad")  # type: ignore[arg-type]
    sparsify_(model, partition="pad_first")
    assert sparse_stages(copy.deepcopy(sparsify_(model)))[0].partition == "pad_first"
    backbone = swin_backbone(partition="pad_first", levels=(0, 1, 2), **SMALL)
    assert sparse_stages(sparsify_(backbone))[2].partition == "pad_first"


def test_counts_rivals_and_oracle_follow() -> None:
    model = sparsify_(small(), partition="pad_first")
    x = torch.randn(2, 3, *PADDED)
    for ratios in (0.0, RATIOS):
        set_sparsity(model, ratios)
        workload = Workload(model, x, PADDED, 2)
        assert traced_macs(workload).total == pytest.approx(analytic_macs(workload).total, rel=1e-6)
    with torch.no_grad():
        theirs = authors_flow(model)
        assert theirs is not None
        torch.testing.assert_close(theirs(x), model(x), atol=1e-5, rtol=1e-5)
        memory = foreseen(model, x)
        with oracle(memory):
            assert model(x).isfinite().all()


@pytest.mark.parametrize(("ratio", "formats"), [(0.0, ("pt2",)), (0.4, ("onnx", "pt2"))])
def test_exported_files_pad_first(ratio: float, formats: tuple[str, ...], tmp_path: Path) -> None:
    sizes = SMALL | {"depths": (2,), "num_heads": (1,), "img_size": (68, 92), "always_partition": True}
    model = sparsify_(small(**sizes, strict_img_size=True), partition="pad_first")
    set_sparsity(model, ratio)
    report = export_model(
        model, tmp_path, input_size=(68, 92), formats=formats, check_batch_sizes=(2, 3), tolerance=1e-4,
        measure_ms=False, info=ModelInfo(NAMES[0], {"num_classes": 5, **sizes}),
    )  # fmt: skip
    assert (report.partition, load_sparsity(tmp_path).partition) == ("pad_first", "pad_first")
    x = torch.randn(4, 3, 68, 92)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(load_exported(tmp_path)(x), expected)
        for run in (runner(tmp_path / f"model.{name}") for name in formats):
            torch.testing.assert_close(run(x)[0], expected, atol=1e-5, rtol=1e-4)


# -- kept with the weights ------------------------------------------------------------------------------------------


def test_sparsity_files_of_before_are_roll_first(tmp_path: Path) -> None:
    model = sparsify_(small(depths=(2,), num_heads=(1,)))
    export_model(model, tmp_path, input_size=PADDED, formats=(), measure_ms=False)
    path = tmp_path / "sparsity.json"
    contents = json.loads(path.read_text())
    assert contents["partition"] == json.loads((tmp_path / "manifest.json").read_text())["partition"] == "roll_first"
    path.write_text(json.dumps(contents | {"partition": "roll_twice"}))
    with pytest.raises(CheckpointError, match="roll_twice"):
        load_sparsity(tmp_path)
    del contents["partition"]
    path.write_text(json.dumps(contents))
    with pytest.raises(CheckpointError, match="partition"):
        load_sparsity(tmp_path)
    path.write_text(json.dumps(contents | {"format": 2}))
    assert load_sparsity(tmp_path).partition == "roll_first"


def test_weights_of_another_partition_are_told(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": (2,), "num_heads": (1,), "window_size": 4, "img_size": 64}
    section = ModelSection(partition="pad_first", **sizes)
    model = sparsify_(build_model(section, 5), partition="pad_first")
    export_model(model, tmp_path / "export", input_size=64, formats=(), measure_ms=False)
    state = {"settings": {"model.partition": "pad_first"}}
    saved = save_checkpoint(tmp_path / "checkpoints", 1, {"model": model.state_dict()}, state)
    old = save_checkpoint(tmp_path / "old", 1, {"model": model.state_dict()}, {})
    features = tmp_path / "export" / "features.safetensors"  # backbone and neck, for tasks whose models have both
    features.write_bytes((tmp_path / "export" / "model.safetensors").read_bytes())
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes((tmp_path / "export" / "model.safetensors").read_bytes())
    told: list[str] = []
    for path in (tmp_path / "export" / "model.safetensors", tmp_path / "export", features, saved, old, plain):
        for partition in windows.PARTITIONS:
            build_model(ModelSection(checkpoint=str(path), partition=partition, **sizes), 5, say=told.append)
    kept = "trained with model.partition {}, the model has {}"
    other = kept.format("pad_first", "roll_first")
    assert [
        line.count(part)
        for line, part in zip(told, (*[other] * 4, kept.format("roll_first", "pad_first")), strict=True)
    ] == [1] * 5


def test_a_profile_says_that_timm_rolls_first(tmp_path: Path) -> None:
    class Listening(SilentReporter):
        def say(self, text: str) -> None:
            told.append(text)

    for partition, times in (("roll_first", 0), ("pad_first", 1)):
        told: list[str] = []
        config = tiny_config(model={"partition": partition}, profile={"batch_sizes": [1]}, output=str(tmp_path))
        report = profile_model(Session(config, Listening(), fresh=True), ratios="0.5")
        assert report.rows[0].label == "dense (timm)"
        assert sum("rolls before it pads" in text for text in told) == times


def test_results_of_another_partition_are_others() -> None:
    rolled, padded = tiny_config(), tiny_config(model={"partition": "pad_first"})
    assert section_hash(rolled, "model") != section_hash(padded, "model")
    assert section_hash(rolled, "model") == section_hash(tiny_config(model={"partition": "roll_first"}), "model")
    model = Session(padded, SilentReporter()).sparsified_(small())
    assert sparse_stages(model)[0].partition == "pad_first"
    assert table_identity(Workload(model, torch.randn(1, 3, *PADDED), PADDED, 1))["partition"] == "pad_first"
