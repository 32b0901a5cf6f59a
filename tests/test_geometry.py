"""What is read off a Swin, as the model itself and inside a detector, for all three generations."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsevit_cli.config.experiment import ModelSection
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.models import build_model
from sparsevit_cli.swin import model_depths, set_sparsity, sparsify_
from sparsevit_cli.swin.geometry import (
    check_image_size,
    fixed_image_size,
    has_only_a_swin,
    image_size,
    images_seen,
    input_channels,
    map_sizes,
    named_stages,
    patch_size,
    set_image_size,
    set_image_size_in_training,
    sparsity_or_dense,
    stage_channels,
    stem_name,
    swin_shape,
    trunk,
    weights_in,
    window_sizes,
)
from tiny import tiny_swin

SMALL: dict[str, Any] = {
    "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4, "img_size": 64,
}  # fmt: skip
NAMES = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224")


def tiny(**changes: object) -> nn.Module:
    return build_model(ModelSection(**(SMALL | changes)), 5)  # type: ignore[arg-type]


def windows(model: nn.Module) -> list[tuple[int, int]]:
    return [block.window_size for stage in model.layers for block in stage.blocks]  # type: ignore[union-attr,operator]


def image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))


class Detector(nn.Module):
    """A Swin with a neck and a head around it; images are padded to a multiple of 32 first."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, nn.Conv2d(128, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, -x.shape[3] % 32, 0, -x.shape[2] % 32))
        feature: Any = self.backbone
        last = feature.forward_intermediates(x, intermediates_only=True)[-1]
        return self.head(self.neck(last).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_a_swin_inside_a_detector_has_the_same_sizes(name: str) -> None:
    swin = tiny_swin(name, **SMALL)
    detector = nn.ModuleDict({"model": Detector(swin)})
    assert trunk(swin) is trunk(detector) is swin
    for model in (swin, detector):
        assert patch_size(model) == (4, 4)
        assert image_size(model) == (64, 64)
        assert map_sizes(model, (64, 96)) == ((16, 24), (8, 12), (4, 6), (2, 3))
        assert stage_channels(model) == (16, 32, 64, 128)
        assert window_sizes(model)[:2] == ((4, 4), (4, 4))
        assert model_depths(model) == (1, 1, 2, 1)
        assert input_channels(model) == 3
        assert swin_shape(model, (64, 64)) == swin_shape(swin, (64, 64))
    assert (stem_name(swin), stem_name(detector)) == ("patch_embed", "model.backbone.patch_embed")
    assert fixed_image_size(swin) == (64, 64)
    assert fixed_image_size(detector) is None  # it pads what it gets
    assert has_only_a_swin(swin)
    assert not has_only_a_swin(detector)


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_those_of_a_forward(name: str) -> None:
    model = tiny_swin(name, **SMALL | {"img_size": (52, 92)}).eval()
    maps: list[tuple[int, ...]] = []
    for _, stage in named_stages(model):
        stage.blocks[0].register_forward_pre_hook(lambda module, inputs: maps.append(tuple(inputs[0].shape)))
    with images_seen(model) as seen:
        model(image(52, 92))
    assert seen == [(2, 3, 52, 92)]
    expected = zip(map_sizes(model, (52, 92)), stage_channels(model), strict=True)
    assert maps == [(2, height, width, channels) for (height, width), channels in expected]
    model(image(52, 92))
    assert len(seen) == 1


def test_every_weight_of_a_swin_has_a_place() -> None:
    for name in NAMES:
        model = tiny_swin(name, **SMALL)
        shape = swin_shape(model, (64, 64))
        stages = sum(stage.merging_weights + sum(b.weights for b in stage.blocks) for stage in shape.stages)
        assert shape.stem_weights + stages + shape.head_weights == weights_in(model)
        assert (shape.in_channels, shape.grid, shape.stem_channels) == (3, (16, 16), 16)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(3, 4, 1), "Conv2d contains no timm Swin Transformer"),
        (nn.ModuleList([tiny(), tiny()]), "ModuleList contains 2 timm Swin Transformers"),
    ],
)
def test_a_model_without_the_one_swin_is_refused(model: nn.Module, message: str) -> None:
    for read in (trunk, patch_size, image_size):
        with pytest.raises(ConfigError, match=message):
            read(model)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message):
        set_image_size(model, 64)


def test_ratios_are_read_of_sparse_and_dense_models() -> None:
    model = tiny()
    assert sparsity_or_dense(model).is_dense
    set_sparsity(sparsify_(model), [[0.5], [0], [0.2], [0]])
    assert sparsity_or_dense(nn.Sequential(model)).ratios == ((0.5,), (0.0,), (0.2,), (0.0,))


# -- image sizes --------------------------------------------------------------------------------------------------


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
    for model in (tiny(), nn.Sequential(tiny())):
        with pytest.raises(ConfigError, match=re.escape(nearest)):
            set_image_size(model, size)


def test_a_size_may_stand_elsewhere_and_patches_differ() -> None:
    check_image_size((70, 98), 14)
    with pytest.raises(ConfigError, match=r"profile\.image_sizes.*70 and 84"):
        check_image_size(72, 14, "profile.image_sizes")
    check_image_size((64, 60), (4, 6))
    with pytest.raises(ConfigError, match=r"patch size \[4, 6\].*\[64, 60\] and \[64, 66\]"):
        check_image_size(64, (4, 6))


def test_another_size_keeps_the_windows() -> None:
    model = tiny().eval()
    set_image_size(model, (96, 128))
    other = tiny(img_size=(96, 128)).eval()
    assert windows(model) == windows(other)
    weights = {key: value for key, value in model.state_dict().items() if "layers.3" not in key}
    other.load_state_dict(weights, strict=False)
    set_image_size(model, 256)
    set_image_size(nn.Sequential(other), 256)
    assert windows(model) == windows(other) == [(4, 4)] * 5  # never scaled with the grid
    small = build_model(ModelSection(**SMALL), 5, img_size=32)
    assert windows(small) == [(4, 4), (4, 4), (2, 2), (2, 2), (1, 1)]
    padded = tiny(img_size=256, always_partition=True)
    before = list(padded.parameters())
    for side in (32, 64):
        set_image_size(padded, side)
        assert windows(padded) == [(4, 4)] * 5
        assert padded(image(side, side)).shape == (2, 5)
    assert all(a is b for a, b in zip(padded.parameters(), before, strict=True))


def test_another_size_computes_what_a_model_of_that_size_computes() -> None:
    model, other = tiny(img_size=128).eval(), tiny(img_size=192).eval()
    other.load_state_dict(model.state_dict())
    set_image_size(model, 192)
    assert torch.equal(model(image(192, 192)), other(image(192, 192)))


def test_training_refuses_a_size_that_exchanges_parameters() -> None:
    set_image_size_in_training(tiny(img_size=128), (192, 128), "train.curriculum")
    unchanged = tiny()
    set_image_size_in_training(unchanged, (64, 64), "train.curriculum")
    with pytest.raises(ConfigError, match=r"train\.curriculum: at 32x32 pixels a map is smaller than its window"):
        set_image_size_in_training(nn.Sequential(unchanged), (32, 32), "train.curriculum")
