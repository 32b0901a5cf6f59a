"""Weights of other libraries: their names and ours, in both directions, exact to the bit, or a refusal."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsevit_cli.atomic import sha256_file
from sparsevit_cli.backbones import SwinBackbone, SwinFPN, swin_backbone, swin_fpn
from sparsevit_cli.checkpoints import save_checkpoint
from sparsevit_cli.config import tasks as kinds
from sparsevit_cli.config.experiment import LoopSection
from sparsevit_cli.config.loading import load_config
from sparsevit_cli.data.source import Batch, Categories, Data, Source
from sparsevit_cli.errors import CheckpointError
from sparsevit_cli.models import build_model
from sparsevit_cli.reporting import Reporter
from sparsevit_cli.tasks.task import BuildOptions, Metric, Scorer, Task
from sparsevit_cli.weights import FAMILIES, fitted, load_weights, read_weights, to_family
from sparsevit_cli.workflows.session import Session
from sparsevit_cli.workflows.training import has_own_weights
from sparsevit_cli.workflows.weights import file_weights
from tiny import SWIN, tiny_config, tiny_swin

DIM, DEPTHS, HEADS, WINDOW = 8, (1, 2, 1, 1), (1, 2, 2, 4), 2
SIZES: dict[str, Any] = {"embed_dim": DIM, "depths": DEPTHS, "num_heads": HEADS, "window_size": WINDOW}
V2 = "swinv2_tiny_window8_256"
State = dict[str, Tensor]


def random_(model: nn.Module, seed: int = 1) -> nn.Module:
    """`model` with every parameter drawn: no bias or table is left at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter == 1))
    return model.eval()


def classifier(name: str = SWIN, **arguments: Any) -> nn.Module:
    sizes = SIZES | {"img_size": 64, "always_partition": True, "strict_img_size": False} | arguments
    return random_(tiny_swin(name, **sizes))


def backbone(name: str = SWIN, seed: int = 1, **settings: Any) -> SwinBackbone:
    made = random_(swin_backbone(name, img_size=64, **SIZES | settings), seed)
    assert isinstance(made, SwinBackbone)
    return made


def image(height: int = 64, width: int = 128) -> Tensor:
    """A size that is a multiple of 32 windows: timm's partition and transformers' agree there."""
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def saved(tensors: State, path: Path) -> Path:
    safetensors.torch.save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
    return path


# -- what the libraries name their tensors, written down from their sources -----------------------------------------


def parameters(name: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def official_names(norms: bool) -> dict[str, tuple[int, ...]]:
    """microsoft/Swin-Transformer models/swin_transformer.py; with `norms` SwinTransformer/Swin-Transformer-Object-
    Detection mmdet/models/backbones/swin_transformer.py and facebookresearch/Mask2Former
    mask2former/modeling/backbone/swin.py, which agree in every name."""
    found = {**parameters("patch_embed.proj", DIM, 3, 4, 4), **parameters("patch_embed.norm", DIM)}
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = DIM * 2**stage
        for block in range(depth):
            here = f"layers.{stage}.blocks.{block}"
            found |= parameters(f"{here}.norm1", width) | parameters(f"{here}.norm2", width)
            found |= {f"{here}.attn.relative_position_bias_table": ((2 * WINDOW - 1) ** 2, heads)}
            found |= {f"{here}.attn.relative_position_index": (WINDOW**2, WINDOW**2)}
            found |= parameters(f"{here}.attn.qkv", 3 * width, width) | parameters(f"{here}.attn.proj", width, width)
            found |= parameters(f"{here}.mlp.fc1", 4 * width, width) | parameters(f"{here}.mlp.fc2", width, 4 * width)
            found |= {f"{here}.attn_mask": (4, WINDOW**2, WINDOW**2)} if block % 2 and not norms else {}
        if stage < 3:
            found |= parameters(f"layers.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
            found |= parameters(f"layers.{stage}.downsample.norm", 4 * width)
        found |= parameters(f"norm{stage}", width) if norms else {}
    return found if norms else found | parameters("norm", 8 * DIM) | parameters("head", 5, 8 * DIM)


def mmdet_names() -> dict[str, tuple[int, ...]]:
    """open-mmlab/mmdetection mmdet/models/backbones/swin.py; FFN is mmcv's, mmcv/cnn/bricks/transformer.py."""
    found = {**parameters("patch_embed.projection", DIM, 3, 4, 4), **parameters("patch_embed.norm", DIM)}
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = DIM * 2**stage
        for block in range(depth):
            here = f"stages.{stage}.blocks.{block}"
            found |= parameters(f"{here}.norm1", width) | parameters(f"{here}.norm2", width)
            found |= {f"{here}.attn.w_msa.relative_position_bias_table": ((2 * WINDOW - 1) ** 2, heads)}
            found |= {f"{here}.attn.w_msa.relative_position_index": (WINDOW**2, WINDOW**2)}
            found |= parameters(f"{here}.attn.w_msa.qkv", 3 * width, width)
            found |= parameters(f"{here}.attn.w_msa.proj", width, width)
            found |= parameters(f"{here}.ffn.layers.0.0", 4 * width, width)
            found |= parameters(f"{here}.ffn.layers.1", width, 4 * width)
        if stage < 3:
            found |= parameters(f"stages.{stage}.downsample.norm", 4 * width)
            found |= parameters(f"stages.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
        found |= parameters(f"norm{stage}", width)
    return found


LISTS: dict[str, tuple[Callable[[], dict[str, tuple[int, ...]]], Callable[[], nn.Module]]] = {
    "microsoft": (lambda: official_names(norms=False), classifier),
    "microsoft detection": (lambda: official_names(norms=True), backbone),
    "detectron2": (lambda: official_names(norms=True), backbone),
    "mmdet": (mmdet_names, backbone),
}
_COMPUTED = ("relative_position_index", "attn_mask")
BESIDE = {
    "microsoft": {},
    "microsoft detection": {"neck.lateral_convs.0.conv.weight": (4, 8, 1, 1), "rpn_head.rpn_cls.bias": (3,)},
    "detectron2": {"sem_seg_head.predictor.query_feat.weight": (4, 8), "criterion.empty_weight": (4,)},
    "mmdet": {"neck.lateral_convs.0.conv.weight": (4, 8, 1, 1), "roi_head.bbox_head.fc_cls.bias": (3,)},
}  # fmt: skip


def drawn(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> State:
    generator = torch.Generator().manual_seed(5)
    return {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def family_of(case: str) -> str:
    return case.partition(" ")[0]


@pytest.mark.parametrize("case", LISTS)
def test_the_names_that_a_library_has_are_read_and_written(case: str) -> None:
    names, build = LISTS[case]
    ours = build()
    written = to_family(ours.state_dict(), family_of(case))
    listed = {name: shape for name, shape in names().items() if not name.endswith(_COMPUTED)}
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == listed


@pytest.mark.parametrize("case", LISTS)
def test_a_whole_file_gives_its_swin_and_nothing_else(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names, build = LISTS[case]
    prefix = "backbone." if BESIDE[case] else ""
    theirs = drawn(names(), prefix)
    content = {"meta": {"epoch": 12}, "state_dict" if "mmdet" in case else "model": theirs | drawn(BESIDE[case])}
    torch.save(content, tmp_path / "theirs.pth")
    told: list[str] = []
    model = build()
    assert load_weights(model, tmp_path / "theirs.pth", say=told.append) == ()
    back = to_family(model.state_dict(), family_of(case), prefix)
    assert equal(back, {name: tensor for name, tensor in theirs.items() if not name.endswith(_COMPUTED)})
    assert len(told) == 1
    assert FAMILIES[family_of(case)].told in told[0]
    assert ("model.partition" in caplog.text) == (case != "microsoft")  # its classifiers never saw padding
    caplog.clear()
    load_weights(model, tmp_path / "theirs.pth", say=told.append, partition="pad_first")
    assert "model.partition" not in caplog.text
    assert "model.partition" not in told[1]
    assert ("left out are 2 tensors" in told[0]) == bool(BESIDE[case])
    assert all(name in told[0] for name in BESIDE[case])


# -- both directions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "dense"),
    [
        *((family, SWIN, True) for family in ("timm", "microsoft", "detectron2", "mmdet", "transformers")),
        *((family, SWIN, False) for family in ("timm", "microsoft", "transformers")),
        *((family, V2, dense) for family in ("timm", "microsoft", "transformers_v2") for dense in (True, False)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.encoder."])
def test_there_and_back(family: str, name: str, dense: bool, prefix: str, tmp_path: Path) -> None:
    source = backbone(name) if dense else classifier(name)
    theirs = to_family(source.state_dict(), family, prefix)
    if family != "timm":
        assert not set(theirs) & set(source.state_dict()) - {f"patch_embed.norm.{p}" for p in ("weight", "bias")} or (
            family == "microsoft"
        )
    path = saved(theirs, tmp_path / "theirs.safetensors")
    target = backbone(name, seed=2) if dense else random_(classifier(name), seed=2)
    assert not equal(dict(target.state_dict()), dict(source.state_dict()))
    assert load_weights(target, path, say=lambda text: None) == ()
    assert equal(dict(target.state_dict()), dict(source.state_dict()))
    again = read_weights(path, lambda text: None)
    assert {key.removeprefix("swin.") for key in source.state_dict()} == set(again)


def test_what_a_family_has_no_place_for_is_refused() -> None:
    for state, family, told in (
        (classifier().state_dict(), "mmdet", r"no place for 4 tensors \(norm\.weight, norm\.bias, head\.fc\.weight"),
        (backbone(V2).state_dict(), "mmdet", "no place"),
        (backbone(V2).state_dict(), "transformers", "logit_scale"),
        (backbone().state_dict(), "transformers_v2", "relative_position_bias_table"),
        (backbone().state_dict(), "timm_v2_cr", "no family of weights that can be written"),
        (backbone().state_dict(), "keras", "Take one of timm, microsoft"),
        (nn.Linear(2, 2).state_dict(), "mmdet", "there are 0 Swins"),
    ):
        with pytest.raises(CheckpointError, match=told):
            to_family(state, family)


class UnfoldMerging(nn.Module):
    """PatchMerging as mmdet has it (mmdet/models/layers/transformer/utils.py): nn.Unfold, norm, reduction."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sampler = nn.Unfold(kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1] // 2, x.shape[2] // 2
        patches = self.sampler(x.permute(0, 3, 1, 2)).transpose(1, 2)
        merged: Tensor = self.reduction(self.norm(patches))
        return merged.unflatten(1, (height, width))


def test_mmdets_order_of_a_mergings_inputs() -> None:
    ours: Any = backbone()
    theirs = UnfoldMerging(DIM)
    written = to_family(ours.state_dict(), "mmdet")
    start = "stages.0.downsample."
    theirs.load_state_dict({k.removeprefix(start): v for k, v in written.items() if k.startswith(start)})
    x = torch.randn(2, 6, 10, DIM)
    merged = ours.swin.layers[1].downsample(x)
    assert torch.allclose(merged, theirs(x), atol=1e-5)
    unsorted = UnfoldMerging(DIM)
    unsorted.load_state_dict(ours.swin.layers[1].downsample.state_dict())
    assert not torch.allclose(merged, unsorted(x), atol=1e-2)  # names alone are not enough


@given(channels=st.integers(1, 9), out=st.integers(1, 4))
def test_the_order_is_a_permutation_and_its_inverse(channels: int, out: int) -> None:
    family, name = FAMILIES["mmdet"], "layers.1.downsample.reduction.weight"
    ours = torch.arange(out * 4 * channels).view(out, 4 * channels)
    assert family.write is not None
    theirs = family.write(name, ours)
    assert torch.equal(family.read(name, theirs), ours)
    assert torch.equal(theirs.sort().values, ours)
    for w, h, c in ((1, 0, 0), (0, 1, channels - 1), (1, 1, channels // 2)):
        assert theirs[0, c * 4 + h * 2 + w] == ours[0, (w * 2 + h) * channels + c]


# -- transformers itself ------------------------------------------------------------------------------------------


def settings(**more: Any) -> dict[str, Any]:
    return {"image_size": 64, "embed_dim": DIM, "depths": list(DEPTHS), "num_heads": list(HEADS),
            "window_size": WINDOW, "drop_path_rate": 0.0} | more  # fmt: skip


LEVEL_NAMES = ["stage1", "stage2", "stage3", "stage4"]


def theirs_around(kind: str) -> tuple[nn.Module, nn.Module]:
    """A random model of transformers with a Swin in it, and its backbone."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(**settings(out_features=LEVEL_NAMES))
    if kind == "SwinBackbone":
        model: Any = transformers.SwinBackbone(config)
        return random_(model), model
    if kind == "UPerNet":
        sizes = {"hidden_size": 8, "pool_scales": [1], "use_auxiliary_head": False}
        model = transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=config, **sizes))
        return random_(model), model.backbone
    if kind == "MaskFormer":
        detr = transformers.DetrConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=8, decoder_ffn_dim=8, num_queries=2,
        )  # fmt: skip
        whole = transformers.MaskFormerConfig(
            backbone_config=config, decoder_config=detr, fpn_feature_size=32, mask_feature_size=32
        )
        model = transformers.MaskFormerForInstanceSegmentation(whole)
        return random_(model), model.model.pixel_level_module.encoder
    whole = transformers.Mask2FormerConfig(
        backbone_config=config, hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=2, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, encoder_feedforward_dim=8, dim_feedforward=8,
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(whole)
    return random_(model), model.model.pixel_level_module.encoder


@pytest.mark.parametrize("memory", [False, True], ids=["names in files", "names in memory"])
@pytest.mark.parametrize("kind", ["SwinBackbone", "Mask2Former", "MaskFormer", "UPerNet"])
def test_maps_of_transformers_are_ours_at_every_level(
    kind: str, memory: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, body = theirs_around(kind)
    path = tmp_path / "model.safetensors"
    if memory:
        torch.save(model.state_dict(), path := tmp_path / "model.pth")
    else:
        model.save_pretrained(tmp_path)  # type: ignore[operator]
        names = list(safetensors.torch.load_file(path))
        assert any("attention.self.query" in name for name in names)  # what version 4 wrote too
    told: list[str] = []
    ours = backbone()
    assert load_weights(ours, path, say=told.append) == ()
    with torch.no_grad():
        maps = list(ours(image()).values())
        wanted = body(image()).feature_maps
    assert len(maps) == len(wanted) == 4
    assert max(float((one - other).abs().max()) for one, other in zip(maps, wanted, strict=True)) < 1e-5
    assert len(told) == 1
    assert "transformers' names" in told[0]
    assert "trained with model.partition pad_first, the model has roll_first" in caplog.text
    outside = sum("relative_position_index" not in name for name in model.state_dict()) - sum(
        "relative_position_index" not in name for name in body.state_dict()
    )
    assert ("left out are" in told[0]) == (outside > 0)


@pytest.mark.parametrize("name", [SWIN, V2])
def test_a_classifier_of_transformers_answers_as_ours(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind = "Swin" if name == SWIN else "Swinv2"
    config = getattr(transformers, f"{kind}Config")(**settings(num_labels=5))
    theirs = random_(getattr(transformers, f"{kind}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = classifier(name)
    assert load_weights(ours, tmp_path / "model.safetensors", say=lambda text: None) == ()
    with torch.no_grad():
        assert torch.allclose(ours(image(64, 64)), theirs(image(64, 64)).logits, atol=1e-5)
    written = to_family(ours.state_dict(), "transformers" if name == SWIN else "transformers_v2")
    assert equal(written, safetensors.torch.load_file(tmp_path / "model.safetensors"))


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = backbone()
    transformers.SwinConfig(**settings(out_features=LEVEL_NAMES)).save_pretrained(tmp_path)
    safetensors.torch.save_file(
        to_family(ours.state_dict(), "transformers"), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    theirs, report = transformers.SwinBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not {key for key in report["missing_keys"] if "swin.layernorm" not in key}
    assert not report["unexpected_keys"]
    with torch.no_grad():
        for one, other in zip(ours(image()).values(), theirs.eval()(image()).feature_maps, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_a_classifier_gives_a_backbone_without_head_and_norms_of_levels(tmp_path: Path) -> None:
    source = classifier()
    told: list[str] = []
    files = {family: to_family(source.state_dict(), family) for family in ("timm", "microsoft", "transformers")}
    for name, theirs in files.items():
        path = saved(theirs, tmp_path / f"{name}.safetensors")
        ours = backbone(seed=2)
        drawn_norms = {key: value.clone() for key, value in ours.state_dict().items() if key.startswith("norms.")}
        assert set(load_weights(ours, path, say=told.append)) == drawn_norms.keys()
        found = ours.state_dict()
        assert all(torch.equal(found[key], value) for key, value in drawn_norms.items())
        assert all(torch.equal(v, source.state_dict()[k[5:]]) for k, v in found.items() if k.startswith("swin."))
        assert "the head (2 tensors) left out" in told[-1]
        assert "the final norm (2 tensors) left out" in told[-1]
        assert "norms of levels stay new (8 tensors)" in told[-1]
    bare = {key[5:]: tensor for key, tensor in files["transformers"].items() if key.startswith("swin.")}
    bare["embeddings.mask_token"] = torch.zeros(1, 1, DIM)  # of SwinForMaskedImageModeling, which alone uses it
    model = classifier()
    assert load_weights(model, saved(bare, path), reset_head=True, say=told.append)[0] == "head.fc.weight"
    assert "left out, as it is of no use: embeddings.mask_token" in told[-1]


# -- detectron2's pickles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays_and_of_tensors(protocol: int, tmp_path: Path) -> None:
    """Model zoo files hold numpy arrays; Mask2Former's tools/convert-pretrained-swin-model-to-d2.py pickles tensors."""
    theirs = to_family(backbone().state_dict(), "detectron2", "backbone.") | {"sem_seg_head.scale": torch.ones(())}
    arrays: dict[str, Any] = {key: tensor.numpy() for key, tensor in theirs.items()}
    first = next(key for key, array in arrays.items() if array.ndim == 2)
    arrays[first] = np.asfortranarray(arrays[first])
    for number, content in enumerate((arrays, theirs)):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps({"model": content, "__author__": "x", "matching_heuristics": True}, protocol))
        ours = backbone(seed=2)
        told: list[str] = []
        assert load_weights(ours, path, say=told.append) == ()
        assert equal(dict(ours.state_dict()), dict(backbone().state_dict()))
        assert "detectron2's names" in told[0]


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"])
def test_arrays_of_every_type_are_read_as_they_are(dtype: str, tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    same = {"a": array, "b": array, "view": array[:, ::2].T, "empty": array[:0], "scalar": array[1, 1, 1:2].reshape(())}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(same))
    found = read_weights(tmp_path / "w.pkl")
    assert found.keys() == same.keys()
    assert all(
        np.array_equal(found[key].numpy(), value) and found[key].numpy().dtype == dtype for key, value in same.items()
    )


def test_pickles_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pkl"
    damaged = pickle.dumps({"a": np.arange(4.0)}, 2).replace(b"K\x04\x85", b"K\x05\x85")
    swapped = pickle.dumps({"a": np.arange(4.0).astype(">f8"), "b": np.arange(2.0)})
    for content in (pickle.dumps({"a": 1}), damaged, pickle.dumps({"a": np.arange(4.0)})[:-9] + b"."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a readable weights file"):
            read_weights(path)
    path.write_bytes(swapped)
    told: list[str] = []
    assert set(read_weights(path, told.append)) == {"b"}
    assert "no tensors (a)" in told[0]


# -- exact or not at all ------------------------------------------------------------------------------------------


def changed(change: Callable[[State], Any], family: str = "transformers") -> State:
    theirs = to_family(backbone().state_dict(), family)
    change(theirs)
    return theirs


_KEY = "encoder.layers.1.blocks.0.attention.self.key.bias"
REFUSED: dict[str, tuple[Callable[[], State], str]] = {
    "part of qkv": (lambda: changed(lambda s: s.pop(_KEY)), rf"w\S*: {re.escape(_KEY)}: missing here, beside"),
    "shapes of qkv": (lambda: changed(lambda s: s.update({_KEY: torch.ones(3)})), "are of other shapes"),
    "scalar": (
        lambda: changed(lambda s: s.update({"stages.0.downsample.norm.bias": torch.ones(())}), "mmdet"),
        r"downsample\.norm\.bias: scalar here",
    ),
    "missing": (
        lambda: changed(lambda s: s.pop("stages.0.blocks.0.norm1.bias"), "mmdet"),
        r"norm1\.bias: missing here",
    ),
    "left over": (
        lambda: changed(lambda s: s.update(absolute_pos_embed=torch.ones(1, 4, 8)), "mmdet"),
        "absolute_pos_embed",
    ),
    "another block": (
        lambda: changed(lambda s: s.update({"stages.3.blocks.1.norm1.bias": torch.ones(64)}), "mmdet"),
        r"layers\.3\.blocks\.1\.norm1\.bias: 64 here, missing in the model",
    ),
    "shape": (
        lambda: changed(lambda s: s.update({"norm2.bias": torch.ones(3)}), "microsoft"),
        r"norms\.2\.bias: 3 here",
    ),
    "a level's norm": (
        lambda: changed(lambda s: (s.pop("norm0.bias"), s.pop("norm0.weight")), "mmdet"),
        r"norms\.0\.\w+: missing here",
    ),
    "windows": (lambda: to_family(backbone(window_size=3).state_dict(), "mmdet"), r"windows are 3x3, the model's 2x2"),
    "twice": (
        lambda: changed(lambda s: s.update({_KEY.replace("self.key", "k_proj"): torch.ones(16)})),
        "two tensors that are",
    ),
    "of V2": (lambda: to_family(backbone(V2).state_dict(), "microsoft"), r"cpb_mlp\.0\.bias: 512 here"),
    "a final norm": (
        lambda: changed(lambda s: s.update({"norm.weight": torch.ones(64)}), "mmdet"),
        r"no place \(norm\.weight\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_and_changes_nothing(case: str, tmp_path: Path) -> None:
    content, told = REFUSED[case]
    path = saved(content(), tmp_path / "theirs.safetensors")
    model = backbone(seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=told) as caught:
        load_weights(model, path)
    assert caught.value.exit_code == 4
    assert equal(dict(model.state_dict()), before)


def test_levels_that_a_backbone_does_not_give_are_left_out(tmp_path: Path) -> None:
    path = saved(to_family(backbone().state_dict(), "mmdet"), tmp_path / "w.safetensors")
    told: list[str] = []
    model = backbone(levels=(1, 3))
    assert load_weights(model, path, say=told.append) == ()
    assert torch.equal(model.state_dict()["norms.3.weight"], backbone().state_dict()["norms.3.weight"])
    assert "norms of levels (4 tensors) left out" in told[0]


# -- models of ours around a Swin ---------------------------------------------------------------------------------


class Detector(nn.Module):
    """A SwinFPN and a head, whose names stand beside the Swin's."""

    def __init__(self, body: SwinFPN, outputs: int = 3) -> None:
        super().__init__()
        self.backbone = body
        self.head = nn.Linear(8, outputs)


def detector(seed: int = 1, outputs: int = 3) -> nn.Module:
    return random_(Detector(swin_fpn(img_size=64, out_channels=8, **SIZES), outputs), seed)


OURS: dict[str, Callable[[], nn.Module]] = {
    "backbone": backbone,
    "pyramid": lambda: random_(swin_fpn(img_size=64, out_channels=8, **SIZES)),
    "detector": detector,
    "classifier": classifier,
}


@pytest.mark.parametrize("wrap", ["safetensors", "torch", "folder", "lightning", "compiled", "ema"])
@pytest.mark.parametrize("kind", OURS)
def test_a_model_of_ours_comes_back_from_a_file(kind: str, wrap: str, tmp_path: Path) -> None:
    source, target = OURS[kind](), random_(OURS[kind](), seed=2)
    state = dict(source.state_dict())
    assert not equal(state, dict(target.state_dict()))
    path = tmp_path / "w"
    if wrap == "safetensors":
        saved(state, path := tmp_path / "w.safetensors")
    elif wrap == "folder":
        path = save_checkpoint(tmp_path, 1, {"model": {k: v + 1 for k, v in state.items()}, "ema": state}, {})
    elif wrap == "lightning":
        torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()} | {"loss.w": torch.ones(1)}}, path)
    elif wrap == "ema":
        other = {f"model.{k}": v + 1 for k, v in state.items()}
        torch.save({"state_dict": other | {f"ema_model.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save({f"_orig_mod.module.{k}": v for k, v in state.items()} if wrap == "compiled" else state, path)
    told: list[str] = []
    assert load_weights(target, path, say=told.append) == ()
    assert equal(dict(target.state_dict()), state)
    if wrap in ("safetensors", "torch", "folder", "compiled"):
        assert not told
    tensors = file_weights(path).state_dict
    assert equal(fitted(tensors, target, "w", told.append), state)


@pytest.mark.parametrize("kind", ["pyramid", "detector"])
def test_a_detectors_file_gives_its_backbone(kind: str, tmp_path: Path) -> None:
    path = saved(dict(OURS[kind]().state_dict()), tmp_path / "w.safetensors")
    told: list[str] = []
    model, source = backbone(seed=2), OURS[kind]().state_dict()
    assert load_weights(model, path, say=told.append) == ()
    body = "backbone.body." if kind == "detector" else "body."
    assert all(torch.equal(value, source[body + key]) for key, value in model.state_dict().items())
    assert "tensors beside the model" in told[0]
    with pytest.raises(CheckpointError, match=r"backbone\.fpn\.\S+: missing here"):
        load_weights(detector(), saved(to_family(source, "mmdet"), tmp_path / "theirs.safetensors"))


def test_a_foreign_swin_amid_names_that_are_the_models_own(tmp_path: Path) -> None:
    """A file of transformers' Mask2Former, into a Mask2Former with our backbone: the Swin is renamed, nothing else."""
    source: Any = theirs_around("Mask2Former")[0]
    target: Any = random_(theirs_around("Mask2Former")[0], seed=2)
    target.model.pixel_level_module.encoder = backbone(seed=2)
    source.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    told: list[str] = []
    assert load_weights(target, path, say=told.append) == ()
    assert "transformers' names" in told[0]
    encoder = "model.pixel_level_module.encoder."
    found, wanted = target.state_dict(), source.state_dict()
    around = {key: tensor for key, tensor in found.items() if not key.startswith(encoder)}
    assert equal(around, {key: tensor for key, tensor in wanted.items() if not key.startswith(encoder)})
    written = to_family({key: found[key] for key in found if key.startswith(encoder)}, "transformers", encoder)
    theirs = safetensors.torch.load_file(path)
    assert equal(
        written, {key: theirs[key] for key in theirs if key.startswith(encoder) and ".swin.layernorm." not in key}
    )
    with pytest.raises(CheckpointError, match=r"head\.more: 1 here, missing in the model"):
        load_weights(target, saved(theirs | {"head.more": torch.ones(1)}, path))


# -- where configurations and commands name files -----------------------------------------------------------------


class Counting(Task):
    """A task whose model is a backbone and a head; its data are nobody's business here."""

    name, metric = "counting_of_weights", Metric("right", "right")
    checkpoint_is_whole = False

    def data(self, *, seed: int, categories: Categories | None) -> Data:
        raise NotImplementedError

    def build(self, categories: Categories | None, options: BuildOptions) -> nn.Module:
        head = (options.like or {}).get("head.weight")
        outputs = 3 if head is None else head.shape[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            return Detector(SwinFPN(self.swin_backbone(options), 8), outputs)

    def loss(self, model: nn.Module, batch: Batch, section: LoopSection, teacher: nn.Module | None) -> Any:
        raise NotImplementedError

    def scorer(self, source: Source, device: torch.device) -> Scorer:
        raise NotImplementedError


class Said(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Session]:
    for name in ("KINDS", "_classes", "_TYPES"):
        monkeypatch.setattr(kinds, name, dict(getattr(kinds, name)))
    kinds.add_task(Counting)

    def made(**model: Any) -> Session:
        section = {"img_size": 64, "always_partition": True} | SIZES | model
        content = {"task": {"name": Counting.name}, "model": section, "device": "cpu"}
        (tmp_path / "counting.yaml").write_text(json.dumps(content))
        return Session(load_config(tmp_path / "counting.yaml"), Said())

    return made


def test_commands_load_a_whole_model_from_a_file(session: Callable[..., Session], tmp_path: Path) -> None:
    source = detector(outputs=4)
    weights = file_weights(saved(dict(source.state_dict()), tmp_path / "w.safetensors"))
    assert equal(weights.state_dict, dict(source.state_dict()))
    here = session()
    model = here.model(Categories(), weights)  # with as many outputs as the file has
    assert equal(dict(model.state_dict()), dict(source.state_dict()))
    path = saved(to_family(source.state_dict(), "mmdet", "backbone."), tmp_path / "theirs.safetensors")
    with pytest.raises(CheckpointError, match=r"What is around the backbone does not fit.*model\.checkpoint"):
        session().model(Categories(), file_weights(path))


@pytest.mark.parametrize("file", ["mmdet", "classifier", "ours", "folder of transformers"])
def test_a_configurations_checkpoint_gives_the_backbone(
    file: str, session: Callable[..., Session], tmp_path: Path
) -> None:
    source = classifier() if file == "classifier" else detector()
    state = dict(source.state_dict())
    if file == "mmdet":
        state = to_family(state, "mmdet", "backbone.") | {"rpn_head.rpn_cls.bias": torch.ones(3)}
    path = saved(state, tmp_path / "w.safetensors")
    if file.startswith("folder"):
        path = tmp_path / "theirs"
        path.mkdir()
        whole = saved(to_family(source.backbone.body.state_dict(), "transformers"), path / "model.safetensors")
        assert file_weights(path).sha256 == sha256_file(whole)
    here, plain = session(checkpoint=str(path)), session()
    model, new = here.model(Categories()).state_dict(), plain.model(Categories()).state_dict()
    prefix = "" if file == "classifier" else "backbone.body.swin."
    assert all(
        torch.equal(value, source.state_dict()[prefix + key.removeprefix("backbone.body.swin.")])
        for key, value in model.items() if key.startswith("backbone.body.swin.")
    )  # fmt: skip
    norms = new if file == "classifier" else source.state_dict()
    assert all(torch.equal(model[key], norms[key]) for key in model if ".norms." in key)
    assert torch.equal(model["head.weight"], new["head.weight"])
    assert isinstance(here.reporter, Said)
    assert len(here.reporter.lines) == 1
    assert str(path) in here.reporter.lines[0]
    assert not has_own_weights(here)  # a head that nobody trained: pretrain is needed
    assert here.task.build(None, BuildOptions(initial_weights=False))  # reads no file: it may be gone by then


def test_an_unfinished_tensor_archive_is_no_weights(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    (tmp_path / "w.npz").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        read_weights(tmp_path / "w.npz")


def test_a_headless_swin_takes_a_classifiers_file(tmp_path: Path) -> None:
    path = saved(dict(classifier().state_dict()), tmp_path / "w.safetensors")
    told: list[str] = []
    section = tiny_config(model={"img_size": 64, "checkpoint": str(path), "always_partition": True} | {
        key: list(value) if isinstance(value, tuple) else value for key, value in SIZES.items()}).model  # fmt: skip
    model = build_model(section, 0, say=told.append)
    assert all(torch.equal(value, classifier().state_dict()[key]) for key, value in model.state_dict().items())
    assert "the head (2 tensors) left out" in told[0]
