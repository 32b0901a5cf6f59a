"""Models by name, weights from anywhere, and files that want to run code (reliability.md, T10, T18, T20)."""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import dataclasses
import datetime
import enum
import functools
import io
import math
import os
import pathlib
import pickle
import random
import re
import runpy
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import Tensor, nn

import sparsevit_cli
from sparsevit_cli.checkpoints import save_checkpoint
from sparsevit_cli.config.experiment import ModelSection
from sparsevit_cli.errors import CheckpointError, ConfigError
from sparsevit_cli.models import build_model, model_arguments, model_depths, support_table, supported_models
from sparsevit_cli.weights import load_weights, read_weights

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 4),
    "window_size": 4,
    "img_size": 64,
}


def tiny(num_classes: int = 5, **changes: object) -> nn.Module:
    return build_model(ModelSection(**(TINY | changes)), num_classes)  # type: ignore[arg-type]


def windows(model: nn.Module) -> list[tuple[int, int]]:
    return [block.window_size for stage in model.layers for block in stage.blocks]  # type: ignore[union-attr,operator]


def image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))


# -- building -----------------------------------------------------------------------------------------------------


def test_every_setting_reaches_timm() -> None:
    section = ModelSection(
        embed_dim=24, depths=(2, 1), num_heads=(2, 3), window_size=5, patch_size=2, mlp_ratio=2.0, global_pool="max",
        drop_path_rate=0.3, in_chans=1, img_size=(60, 40), always_partition=True, weight_init="jax",
    )  # fmt: skip
    model: Any = build_model(section, 7)
    assert model_depths(model) == (2, 1)
    assert model.patch_embed.proj.weight.shape == (24, 1, 2, 2)
    assert [stage.blocks[0].attn.num_heads for stage in model.layers] == [2, 3]
    assert windows(model) == [(5, 5)] * 3
    assert model.layers[0].blocks[0].mlp.fc1.weight.shape == (48, 24)
    assert model.layers[1].blocks[0].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.global_pool == "max"
    assert all(block.always_partition for stage in model.layers for block in stage.blocks)
    assert model.layers[0].blocks[0].attn.qkv.weight.abs().max() > 0.15  # Xavier; timm's default has deviation 0.02
    assert model.patch_embed.img_size == (60, 40)
    assert model(torch.randn(2, 1, 60, 40)).shape == (2, 7)


def test_the_support_table_has_every_swin_of_timm() -> None:
    names = {name for module in ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")
             for name in timm.list_models(module=module)}  # fmt: skip
    table = support_table()
    assert {row.name for row in table} == names == set(supported_models())
    assert {row.generation for row in table if "v2" not in row.name} == {"V1"}


@pytest.mark.parametrize("name", supported_models())
def test_unset_settings_keep_the_architecture(name: str) -> None:
    with torch.device("meta"):
        ours = build_model(ModelSection(name=name, img_size=224), 1000)
        theirs = timm.create_model(name, img_size=224, num_classes=1000)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


def test_initial_weights_are_a_function_of_the_seed() -> None:
    section = ModelSection(**TINY)
    state = torch.get_rng_state()
    first, again, other = (build_model(section, 5, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.fc.weight"], other["head.fc.weight"])


def test_the_arguments_rebuild_the_model() -> None:
    section = ModelSection(**TINY, always_partition=True)
    arguments = model_arguments(section, 5)
    assert arguments["embed_dim"] == 16
    assert "patch_size" not in arguments
    again = timm.create_model(section.name, img_size=64, **arguments).eval()
    model = build_model(section, 5).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(image(64, 64)), model(image(64, 64)))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("swin_tiny_patch4_window8_224", "swin_tiny_patch4_window7_224"),
        ("swin_s3_tyni_224", "swin_s3_tiny_224"),
        ("swin_tiny_patch4_window7_224.ms_in3k", "swin_tiny_patch4_window7_224.ms_in1k"),
        ("swinv2_tiny_window9_256", "swinv2_tiny_window8_256"),
        ("resnet18", "swin_"),
        ("hf-hub:timm/swin_tiny_patch4_window7_224.ms_in1k", "swin_tiny"),
        ("hf_hub:a/b", "swin_"),
        ("local-dir:.", "swin_"),
        ("./swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224"),
        ("swin_tiny_patch4_window7_224/../x", "swin_tiny_patch4_window7_224"),
        ("*", "swin_"),
    ],
)
def test_other_names_are_refused_with_the_nearest(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object, **kwargs: object) -> None:
        pytest.fail("timm.create_model was reached")

    monkeypatch.setattr(timm, "create_model", reached)
    with pytest.raises(ConfigError, match=re.escape(hint)) as caught:
        build_model(ModelSection.model_construct(name=name, pretrained=True), 5)
    assert caught.value.exit_code == 2
    assert caught.value.what == "model.name"


@pytest.mark.parametrize(
    "changes",
    [{"depths": (1, 1, 1, 1, 1)}, {"embed_dim": 2}, {"num_heads": (1, 2)}, {"num_heads": (3, 6, 12, 9999)}],
)
def test_settings_that_contradict_the_architecture(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="timm cannot build") as caught:
        build_model(ModelSection(**changes), 5)
    assert str(next(iter(changes.values()))) in str(caught.value)


def test_pretrained_weights_need_the_architecture_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"model\.pretrained.*its own embed_dim, depths"):
        build_model(ModelSection(pretrained=True, embed_dim=16, depths=(2, 2, 2, 2)), 5)


def test_pretrained_weights_get_a_new_classifier_at_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "swin_tiny_patch4_window7_224"
    hub = timm.create_model(name).state_dict()
    asked: list[object] = []
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda *args, **_: asked.append(args) or dict(hub)
    )
    model = build_model(ModelSection(name=name, pretrained=True, img_size=448), 2)
    assert asked
    own = model.state_dict()
    assert own["head.fc.weight"].shape == (2, 768)
    assert all(torch.equal(own[key], tensor) for key, tensor in hub.items() if not key.startswith("head."))
    with torch.no_grad():
        assert model.eval()(image(448, 448)).shape[1] == 2


def test_pretrained_weights_without_a_network(tmp_path: Path) -> None:
    program = (
        "from sparsevit_cli.models import build_model; from sparsevit_cli.config.experiment import ModelSection\n"
        "from sparsevit_cli.errors import CheckpointError\n"
        "try: build_model(ModelSection(pretrained=True), 5)\n"
        "except CheckpointError as error: print(error.exit_code, error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True, timeout=200
    )
    assert done.stdout.startswith("4 model.pretrained: timm cannot build swin_tiny_patch4_window7_224")
    assert "model.checkpoint" in done.stdout


# -- image sizes (T18) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, (128, 96), 68, 100, (52, 76), 16, 8, 4])
def test_sizes_that_fit_the_patch_are_taken_whole(size: int | tuple[int, int]) -> None:
    model: Any = tiny(img_size=size).eval()
    height, width = size if isinstance(size, tuple) else (size, size)
    assert model.patch_embed.grid_size == (height // 4, width // 4)
    assert max(max(window) for window in windows(model)) <= 4
    corner = image(height, width)
    changed = corner.clone()
    changed[:, :, -1, -1] += 1
    assert not torch.equal(model(corner), model(changed))  # the last row and column count


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        (65, "64 and 68"),
        (90, "88 and 92"),
        (97, "96 and 100"),
        (225, "224 and 228"),
        ((230, 198), "[228, 196] and [232, 200]"),
        ((64, 66), "[64, 64] and [64, 68]"),
        (3, "4 and 8"),
        (1, "4 and 8"),
    ],
)
def test_sizes_that_timm_would_crop_are_refused(size: int | tuple[int, int], nearest: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(nearest)) as caught:
        tiny(img_size=size)
    assert caught.value.what == "model.img_size"


# -- reading weights ----------------------------------------------------------------------------------------------


def save_pickle(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "safetensors": lambda w, p: safetensors.torch.save_file(w, p / "w.safetensors") or p / "w.safetensors",
    "pth": lambda w, p: save_pickle(w, p / "w.pth"),
    "model": lambda w, p: save_pickle({"model": w, "epoch": 3}, p / "w.pt"),
    "state_dict": lambda w, p: save_pickle({"state_dict": w, "optimizer": {}}, p / "w.bin"),
    "ema": lambda w, p: save_pickle({"state_dict": {"old": w["norm.bias"]}, "state_dict_ema": w}, p / "w.pth"),
    "no ema": lambda w, p: save_pickle({"model": w, "model_ema": None}, p / "w.pth"),
    "checkpoint": lambda w, p: save_pickle(
        {"checkpoint": w, "optimizer": {"state": {"0": {"exp": torch.ones(1)}}}}, p / "w.pth"
    ),
    "deep": lambda w, p: save_pickle({"state": {"model": w}, "best": {"x": torch.ones(1)}}, p / "w.pth"),
    "list": lambda w, p: save_pickle([3, w], p / "w.pth"),
    "tuple": lambda w, p: save_pickle((w, 1), p / "w.pth"),
    "teacher": lambda w, p: save_pickle({"student": {k: v + 1 for k, v in w.items()}, "teacher": w}, p / "w.pth"),
    "twice": lambda w, p: save_pickle({"model": {"state_dict": w}}, p / "w.pth"),
    "module.": lambda w, p: save_pickle({f"module.{k}": v for k, v in w.items()}, p / "w.pth"),
    "_orig_mod.": lambda w, p: save_pickle({f"_orig_mod.module.{k}": v for k, v in w.items()}, p / "w.pth"),
    "half": lambda w, p: save_pickle({("module." * (i % 2)) + k: v for i, (k, v) in enumerate(w.items())}, p / "w.pth"),
    "stage": lambda w, p: save_pickle({k.replace(".0.", ".0._orig_mod.", 1): v for k, v in w.items()}, p / "w.pth"),
    "folder": lambda w, p: save_checkpoint(p, 1, {"model": w}, {}),
    "root": lambda w, p: (
        save_checkpoint(p, 1, {"model": {}, "ema": {f"module.{k}": v for k, v in w.items()}}, {}).parent
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_weights_come_back_from_every_wrapping(writer: str, tmp_path: Path) -> None:
    source, model = tiny().eval(), tiny().eval()
    path = WRITERS[writer](dict(source.state_dict()), tmp_path)
    assert load_weights(model, path) == ()
    assert torch.equal(model(image(64, 64)), source(image(64, 64)))
    built = tiny(checkpoint=str(path)).eval()
    assert torch.equal(built(image(64, 64)), source(image(64, 64)))


def official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Microsoft's layout: merging at the end of a stage, a bare head, buffers stored."""

    def name(key: str) -> str:
        key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        return key.replace("head.fc.", "head.")

    buffers = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long),
        "layers.2.blocks.1.attn_mask": torch.zeros(4, 16, 16),
    }
    return {name(key): value for key, value in weights.items()} | buffers


def test_official_layout(tmp_path: Path) -> None:
    source, model = tiny().eval(), tiny().eval()
    weights = official(source.state_dict())
    converted = checkpoint_filter_fn(dict(weights), model)
    assert converted.keys() == source.state_dict().keys()  # the test's idea of the layout is timm's
    load_weights(model, save_pickle({"model": weights}, tmp_path / "swin.pth"))
    assert torch.equal(model(image(64, 64)), source(image(64, 64)))
    assert all(torch.equal(value, converted[key]) for key, value in model.state_dict().items())


# -- weights that do not fit (T20) --------------------------------------------------------------------------------


def half_pruned(model: nn.Module) -> dict[str, Tensor]:
    return {key: value[: value.shape[0] // 2] for key, value in model.state_dict().items() if "mlp.fc1" in key}


MISFITS: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "classes": (lambda: tiny(9).state_dict(), r"head\.fc\.weight: 9x128 here, 5x128 in the model.*model\.reset_head"),
    "headless": (lambda: tiny_without("head"), r"head\.fc\.weight: missing here.*model\.reset_head"),
    "depth": (
        lambda: tiny(depths=(1, 1, 4, 1)).state_dict(),
        r"layers\.2\.blocks\.2\.\S+: \S+ here, missing in the mod",
    ),
    "width": (lambda: tiny(embed_dim=32).state_dict(), r"patch_embed\.proj\.weight: 32x3x4x4 here, 16x3x4x4"),
    "window": (lambda: tiny(window_size=3).state_dict(), r"windows are 3x3, the model's 4x4.*model\.window_size"),
    "official window": (lambda: official(tiny(window_size=3).state_dict()), r"windows are 3x3, the model's 4x4"),
    "image": (
        lambda: tiny(img_size=128).state_dict(),
        r"windows are 4x4, the model's 2x2 \(layers\.3\.\S+\).*always_partition",
    ),
    "channels": (lambda: tiny(in_chans=1).state_dict(), r"16x1x4x4 here, 16x3x4x4 in the model.*in_chans"),
    "patch": (lambda: tiny(patch_size=2, img_size=32).state_dict(), r"16x3x2x2 here"),
    "other network": (
        lambda: nn.Conv2d(3, 4, 3).state_dict(),
        r"model: \d\d .*; weight: 4x3x3x3 here, missing in the model.*and \d+ more",
    ),
    "pruned": (lambda: tiny().state_dict() | half_pruned(tiny()), r"mlp\.fc1\.weight: 32x16 here, 64x16 in the model"),
}


def tiny_without(prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in tiny().state_dict().items() if not key.startswith(prefix)}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_change_nothing(case: str, tmp_path: Path) -> None:
    weights, message = MISFITS[case]
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(weights(), path)
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(model, path)
    assert caught.value.exit_code == 4
    assert 1 <= str(caught.value).count(" here, ") <= 10
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", ["classes", "headless"])
def test_a_new_head_only_when_asked_for(case: str, tmp_path: Path) -> None:
    weights = MISFITS[case][0]()
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(weights, path)
    model: Any = tiny()
    head = model.head.fc.weight.clone()
    assert load_weights(model, path, reset_head=True) == ("head.fc.weight", "head.fc.bias")
    assert torch.equal(model.head.fc.weight, head)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items() if "head" not in key)
    fitting: Any = tiny()
    path = WRITERS["pth"](fitting.state_dict(), tmp_path)
    assert load_weights(model, path, reset_head=True) == ()
    assert torch.equal(model.head.fc.weight, fitting.head.fc.weight)


def test_reset_head_excuses_nothing_else(tmp_path: Path) -> None:
    path = WRITERS["pth"](tiny(9, embed_dim=32).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match="embed_dim"):
        load_weights(tiny(), path, reset_head=True)


def test_rectangular_windows_load_as_they_are(tmp_path: Path) -> None:
    source, model = tiny(img_size=(64, 128)), tiny(img_size=(64, 128))
    assert (2, 4) in windows(source)
    load_weights(model, WRITERS["pth"](source.state_dict(), tmp_path))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list"),
        ({}, "not named tensors"),
        ({"model": {"b": 3}}, "not named tensors"),
        (nn.Linear(2, 2), r"holds torch\.nn\.modules\.linear\.Linear, not named tensors"),
        (pathlib.PurePosixPath("a/b"), r"holds pathlib\.PurePosixPath"),
        ({f"{name}.patch_embed.proj.weight": torch.ones(1) for name in ("student", "teacher")}, "several models: `stu"),
        ({"module.a": torch.ones(1), "a": torch.ones(1)}, "holds a twice"),
    ],
)
def test_files_that_hold_something_else(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_weights(save_pickle(content, tmp_path / "w.pth"))


def test_paths_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo.pth")
    for path, message in (
        (tmp_path / "no.pth", "does not exist"),
        (tmp_path / "w.onnx", r"'\.onnx'"),
        (tmp_path / "fifo.pth", "is no file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_weights(path)
    with pytest.raises(CheckpointError, match="neither"):
        read_weights(save_checkpoint(tmp_path / "c", 1, {"optimizer": {"m": torch.ones(1)}}, {}))


# -- checkpoints from elsewhere -----------------------------------------------------------------------------------


class Settings(dict[str, Any]):
    """A dict with attributes, as yacs, EasyDict and mmengine save beside the weights."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.frozen = True


class Layers(list[Any]):
    """A list of a class of its own, as OmegaConf has."""


class Colour(enum.Enum):
    """An enumeration."""

    RED = 1


@dataclasses.dataclass
class Record:
    """A dataclass with slots for all sorts."""

    values: Any


BESIDE: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1, 2])),
    "numpy scalars": [np.float64(77.5), np.float32(1), np.int64(3), np.bool_(True)],
    "numpy arrays": {"a": np.arange(6.0).reshape(2, 3), "names": np.array(["x"], dtype=object)},
    "settings": Settings(MODEL=Settings(DEPTHS=Layers([2, 2]))),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "counter": collections.Counter("abca"),
    "path": [pathlib.PurePosixPath("a/b"), pathlib.Path("/x")],
    "times": (datetime.datetime(2024, 1, 2), datetime.timedelta(1), datetime.UTC),
    "enum": Colour.RED,
    "dataclass": Record({1, 2}),
    "functions": [argparse.ArgumentParser, functools.partial(int, base=2), np.mean],
    "random states": [random.Random(0).getstate(), np.random.RandomState(0), torch.get_rng_state()],
    "torch": [torch.Size([1]), torch.device("cpu"), torch.float16, torch.Generator],
    "schedule": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1), 1).state_dict(),
    "numbers": [1 + 2j, 10**40, -1, 1e300, math.nan, b"bytes", bytearray(b"x"), frozenset([1]), slice(1, 2), ...],
    "module": nn.Linear(2, 2),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("beside", BESIDE)
def test_whatever_lies_beside_the_weights_they_are_read(beside: str, zipped: bool, tmp_path: Path) -> None:
    weights = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.ones(3, dtype=torch.bfloat16)[1:],
        "parameter": nn.Parameter(torch.randn(4)),
        "empty": torch.empty(0, 2),
        "scalar": torch.tensor(3),
        "expanded": torch.ones(1).expand(3),
    } | {"tied": (tied := torch.randn(2, 2)), "tied too": tied}
    path = tmp_path / "model_best.pth.tar"
    content = {"args": BESIDE[beside], "state_dict": collections.OrderedDict(weights), "metric": BESIDE[beside]}
    for protocol in (2, 3, 4, 5):
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        told: list[str] = []
        found = read_weights(path, told.append)
        assert found.keys() == weights.keys()
        assert all(found[key].dtype == tensor.dtype for key, tensor in weights.items())
        assert all(torch.equal(found[key], tensor) for key, tensor in weights.items())
        assert len(told) == 1
        assert "`state_dict`" in told[0]


def test_what_was_not_made_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    content = {"model": {"a": torch.ones(1), "b": 3}, "args": argparse.Namespace(x=np.float64(1))}
    assert set(read_weights(save_pickle(content, tmp_path / "w"), told.append)) == {"a"}
    assert "no tensors (b)" in told[0]
    assert "argparse.Namespace" in told[0]
    read_weights(save_pickle({"a": torch.ones(1)}, tmp_path / "w"), told.append)
    assert len(told) == 1  # nothing to tell of plain tensors


EMA_NAMES = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema")


@pytest.mark.parametrize(
    "wrap",
    [
        *(lambda w, key=key: {"optimizer": {"state": {}}, key: w} for key in
          ("state_dict", "model", "net", "module", "params", "weights", "model_state_dict", *EMA_NAMES)),
        *(lambda w, key=key: {"state_dict": {k: v + 1 for k, v in w.items()}, key: w} for key in EMA_NAMES),
        lambda w: {"ema": {"module": w, "decay": 0.99}, "model": {"x": torch.ones(1)}},
        lambda w: {"ema": {"decay": torch.ones(1)}, "state_dict": w},
        lambda w: {"model": nn.Linear(1, 1), "model_ema": None, "state_dict": Settings(**w)},
        *(lambda w, p=p: {"pytorch-lightning_version": "2", "state_dict": {p + k: v for k, v in w.items()} |
                          {"criterion.weight": torch.ones(3)}} for p in
          ("model.", "net.", "backbone.", "module.model.", "model._orig_mod.", "encoder.backbone.", "_orig_mod.m.")),
        lambda w: {"state_dict": {"model." + k: v + 1 for k, v in w.items()} |
                   {"ema_model." + k: v for k, v in w.items()}},
        lambda w: w | {"teacher." + k: v + 1 for k, v in w.items()},
    ],
)  # fmt: skip
def test_the_common_wrappings_are_taken_off_and_told(wrap: Callable[..., Any], tmp_path: Path) -> None:
    source = {key: value + 0.5 for key, value in tiny().state_dict().items()}
    told: list[str] = []
    found = read_weights(save_pickle(wrap(source), tmp_path / "last.ckpt"), told.append)
    assert found.keys() == source.keys()
    assert all(torch.equal(found[key], value) for key, value in source.items())
    assert len(told) == 1


def test_a_dict_that_holds_itself_is_read_to_its_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content["ema"] = content["net"] = content
    with pytest.raises(CheckpointError, match="not named tensors"):
        read_weights(save_pickle(content, tmp_path / "w.pth"))
    content["state_dict"] = {"a": torch.ones(2)}
    content["state_dict"]["module"] = [content]
    for zipped in (True, False):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        assert set(read_weights(tmp_path / "w.pth")) == {"a"}


# -- files that want to run code (T10) ----------------------------------------------------------------------------


class Trap:
    """Unpickles by calling `function(*args)`."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def legacy_tar(trap: object, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in (("storages", 0), ("tensors", 0), ("pickle", trap), ("sys_info", {})):
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(path))


def object_array(trap: object, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weights=np.array([trap], dtype=object))


def dcp_metadata(trap: object, folder: Path) -> Path:
    (folder / "dcp").mkdir()
    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(trap))
    return folder / "dcp"


def header(path: Path, text: str, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text.encode() + b"\0" * 16)


def trap_of(trap: Any, kind: str) -> object:
    return {
        "system": trap,
        "eval": Trap(eval, trap.python),
        "exec": Trap(exec, trap.python),
        "open": Trap(open, trap.script + ".made", "w"),
        "runpy": Trap(runpy.run_path, trap.script),
        "nested": Trap(pickle.loads, pickle.dumps(trap)),
        "import": Trap(__import__, "os"),
        "popen": Trap(subprocess.Popen, ["touch", trap.script + ".made"]),
    }[kind]


def legacy_pickle(code: bytes, path: Path) -> None:
    """A file of the old format whose structure is the pickle `code`."""
    head = [torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True}]
    parts = [pickle.dumps(part, protocol=2) for part in head]
    path.write_bytes(b"".join(parts) + b"\x80\x04" + code + b"." + pickle.dumps([], protocol=2))


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
RAW = (
    b"]" + b"2\x86" * 100_000,  # a tuple that doubles with every step
    b"(" * 100_000,
    b"]" * 100_000 + b"a" * 99_999,  # deep
    b")" + b"\x85" * 300_000 + b"}q\0X\x01\0\0\0ah\0s",  # a tuple too deep for C's stack
    b"}(" + b")" + b"\x85" * 300_000 + b"K\x01u",  # as a key
    b"\x8e" + struct.pack("<Q", 2**40) + b"x",  # claims a terabyte
    b"\x8d" + struct.pack("<Q", 2**62) + b"x",
    b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
    b"r\xff\xff\xff\x7f",  # a memo of two thousand million places
    b"K\x01r\xff\xff\xff\x7f",
    b"h\x07", b"0000", b"R", b"b", b"s", b"u", b"a", b"e", b"t", b"\x87", b"o", b"\x81", b"\x92", b"\x93",
    b"1", b"2", b"Q",
    b"K\x01K\x02Q", b"\x97", b"\x98", b"\x82\x01", b"\x84\xff\xff\xff\x7f", b"\x95" + b"\xff" * 8, b"\xff", b"P7\n",
    b"ccollections\nOrderedDict\n(]R", b"ccollections\nOrderedDict\n(](K\x01K\x02K\x03eetR",
    b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04K\x05K\x06tR",
    b"ctorch._utils\n_rebuild_parameter\n)R", b"ctorch._utils\n_rebuild_parameter\nK\x01R",
    b"ctorch._tensor\n_rebuild_from_type_v2\n(K\x01K\x02K\x03tR",
    b"ctorch._utils\n_rebuild_tensor_v3\n(K\x01K\x01))K\x00}cos\nsystem\ntR",
    b"ctorch._utils\n_rebuild_tensor_v3\n(K\x01K\x01))K\x00}ctorch\nload\ntR",
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"J\xff\xff\xff\xffNtQK\x00))\x89}tR",  # less than nothing
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x08NtQK\x00(\x8a\x08" + b"\xff" * 7
    + b"\x7ft(K\x00t\x89}tR",
    b"I" + b"9" * 100_000 + b"\n", b"F1e999\n", b"F...\n", b"V\\ud800\n", b"X\x01\0\0\0\xff", b"Sno quotes\n",
    b"(cos\nsystem\nX\x01\0\0\0xo", b"(X\x01\0\0\0xios\nsystem\n",
)  # fmt: skip


ENTRY = '{"dtype":"F32","shape":[4],"data_offsets":[%d,%d]}'
HOSTILE: dict[str, Callable[[Any, Path], object]] = {
    "raw.pth": lambda trap, p: p.write_bytes(pickle.dumps(trap)),
    "protocol0.pth": lambda trap, p: p.write_bytes(pickle.dumps({"model": trap}, protocol=0)),
    "zip.pt": lambda trap, p: torch.save({"model": {"w": trap}}, p),
    "legacy.bin": lambda trap, p: torch.save(trap, p, _use_new_zipfile_serialization=False),
    "eval.pth": lambda trap, p: torch.save(Trap(eval, trap.python), p),
    "exec.pth": lambda trap, p: torch.save(Trap(exec, trap.python), p),
    "runpy.pth": lambda trap, p: torch.save(Trap(__import__("runpy").run_path, trap.script), p),
    "nested.pth": lambda trap, p: torch.save(Trap(pickle.loads, pickle.dumps(trap)), p),
    "torch_load.pth": lambda trap, p: torch.save(Trap(torch.load, trap.script + ".pkl"), p),
    "tar.pth": legacy_tar,
    "script.pt": lambda trap, p: torchscript(p),
    "npz.pth": object_array,
    "array.npz": object_array,
    "rng.pth": lambda trap, p: torch.save({"rng": random.Random(0), "numpy": np.random.RandomState(0)}, p),
    "named.pkl": lambda trap, p: p.write_bytes(pickle.dumps(trap)),
    **{
        f"beside {name}.tar": lambda trap, p, t=name: torch.save(
            {"state_dict": tiny().state_dict(), "args": trap_of(trap, t)}, p
        )
        for name in ("system", "eval", "exec", "open", "runpy", "nested", "import", "popen")
    },
    **{
        f"protocol {n} {z}.pth": lambda trap, p, n=n, z=z: torch.save(
            {"model": trap}, p, pickle_protocol=n, _use_new_zipfile_serialization=z
        )
        for n in (3, 4, 5)
        for z in (0, 1)
    },
    "inside.pth": lambda trap, p: torch.save({"head.fc.weight": trap_of(trap, "open"), "x": torch.ones(1)}, p),
    **{f"raw {number}.ckpt": lambda trap, p, code=code: legacy_pickle(code, p) for number, code in enumerate(RAW)},
    "text.pth": lambda trap, p: p.write_text("not a checkpoint"),
    "empty.pth": lambda trap, p: p.write_bytes(b""),
    "pickled.safetensors": lambda trap, p: p.write_bytes(pickle.dumps(trap)),
    "huge_header.safetensors": lambda trap, p: header(p, "{}", 2**62),
    "large_header.safetensors": lambda trap, p: header(p, "{}", 99_000_000),
    "overlap.safetensors": lambda trap, p: header(p, f'{{"a":{ENTRY % (0, 16)},"b":{ENTRY % (8, 24)}}}'),
    "outside.safetensors": lambda trap, p: header(p, f'{{"a":{ENTRY % (4096, 4112)}}}'),
    "shape.safetensors": lambda trap, p: header(p, '{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,16]}}'),
    "empty.safetensors": lambda trap, p: p.write_bytes(b""),
}


def armed(canary: Path, folder: Path) -> Trap:
    trap = Trap(os.system, f"touch {canary}")
    trap.python = f"open({str(canary)!r}, 'w')"
    trap.script = str(folder / "trap.py")
    Path(trap.script).write_text(trap.python)
    Path(trap.script + ".pkl").write_bytes(pickle.dumps(trap))
    return trap


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_run_nothing(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / name
    HOSTILE[name](armed(canary, tmp_path), path)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert caught.value.exit_code == 4
    assert str(path) in str(caught.value)
    assert not canary.exists()
    assert not Path(str(tmp_path / "trap.py") + ".made").exists()


def test_a_hostile_folder_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(CheckpointError):
        read_weights(dcp_metadata(armed(canary, tmp_path), tmp_path))
    assert not canary.exists()


@pytest.mark.parametrize("name", ["raw.pth", "eval.pth", "runpy.pth", "nested.pth", "npz.pth"])
def test_the_traps_are_live(name: str, tmp_path: Path) -> None:
    """Without protection these files do run code, so the test above can fail."""
    canary = tmp_path / "canary"
    path = tmp_path / name
    HOSTILE[name](armed(canary, tmp_path), path)
    if name == "raw.pth":
        pickle.loads(path.read_bytes())
    elif name == "npz.pth":
        np.load(path, allow_pickle=True)["weights"]
    else:
        torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("good")
    content = {"state_dict": {"a": torch.arange(9.0), "b": torch.ones(2, 2)}, "args": argparse.Namespace(x=1)}
    files = []
    for number, protocol in enumerate((2, 2, 4)):
        torch.save(content, folder / "w", pickle_protocol=protocol, _use_new_zipfile_serialization=bool(number))
        files.append((folder / "w").read_bytes())
    return folder / "w", files


@given(data=st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_told_as_such(data: Any, good_files: tuple[Path, list[bytes]]) -> None:
    """Bytes changed, cut out or repeated anywhere: an error of ours, or tensors; never another error."""
    path, files = good_files
    content = bytearray(data.draw(st.sampled_from(files)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(max_size=6))
        content[place : place + data.draw(st.integers(0, 6))] = new
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert all(isinstance(tensor, Tensor) for tensor in read_weights(path).values())


def test_a_storage_that_is_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    path = save_pickle({"a": torch.zeros(500), "b": torch.zeros(500)}, tmp_path / "w.pth")
    content = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed, zipfile.ZipFile(path) as plain:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        read_weights(tmp_path / "packed.pth")
    path.write_bytes(
        content.replace(b"M\xf4\x01", b"M\xf5\x01")
    )  # 501 of 500 elements; the sum of the zip is wrong too
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        read_weights(path)


def test_what_was_blocked_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"args": Trap(os.system, "true")}, path)
    with pytest.raises(CheckpointError, match=r"would run code.*(posix|nt)\.system.*save_file"):
        read_weights(path)


def test_the_source_loads_no_code() -> None:
    """No unsafe reader anywhere in the package, now or later."""
    found = []
    for path in Path(sparsevit_cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if {name.partition(".")[0] for name in modules} & {"pickle", "dill", "joblib", "marshal", "shelve"}:
                    found.append(f"{where}: {ast.unparse(node)}")
            if isinstance(node, ast.Call):
                text = ast.unparse(node)
                safe = any(
                    keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
                )
                if re.match(r"torch\.load\(|torch\.jit\.load\(", text) and not safe:
                    found.append(f"{where}: {text}")
                if re.match(r"(eval|exec|yaml\.(unsafe_|full_)?load_all|yaml\.unsafe_load|yaml\.full_load)\(", text):
                    found.append(f"{where}: {text}")
                if "shell=True" in text or re.match(r"[\w.]*\.extractall\(", text):
                    found.append(f"{where}: {text}")
    assert not found


def test_a_quiet_background_scores_lowest_from_the_start() -> None:
    """From timm's own weights a textured window does not even score above flat ones; from these it does."""
    from sparsevit_cli import windows

    x = torch.zeros(1, 3, 64, 64)  # normalised images: zero is the mean brightness
    x[:, :, 16:32, 32:48] += torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    best = {}
    for scheme in ("timm", "quiet_background"):
        section = ModelSection(img_size=64, embed_dim=32, depths=(2, 2), num_heads=(1, 2), weight_init=scheme)
        model = build_model(section, 4, seed=3)
        with torch.no_grad():
            tokens = model.patch_embed(x)
        index = windows.window_token_index(16, 16, (4, 4), (0, 0), "roll_first", x.device)
        scores = windows.window_scores(windows.token_magnitude(tokens, "mean_abs_l2"), index)[0]
        best[scheme] = int(scores.argmax())
        if scheme == "quiet_background":
            assert scores[best[scheme]] > 100 * scores.median()
    assert best["quiet_background"] == 1 * 4 + 2
    assert best["timm"] != best["quiet_background"]
