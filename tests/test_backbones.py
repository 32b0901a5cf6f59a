"""A Swin under detectors and segmenters: maps, levels, batches of several sizes, training, export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sparsevit_cli
from sparsevit_cli.acceleration import accelerate_
from sparsevit_cli.backbones import SwinBackbone, SwinFPN, swin_backbone, swin_fpn
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.exporting import export_model
from sparsevit_cli.exporting.checks import runner
from sparsevit_cli.profiling.macs import macs_cost, traced_macs
from sparsevit_cli.profiling.workload import image_workload
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity, sparse_stages, sparsify_
from sparsevit_cli.swin.geometry import image_size, set_image_size, set_image_size_in_training
from tiny import shaken_, tiny_config

NAMES = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224")
"""One of each generation."""
SMALL: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 3}
RATIOS = [[0.4], [0.3], [0.5], [0.2]]


def small(name: str = NAMES[0], **settings: Any) -> SwinBackbone:
    """A dense backbone in evaluation mode with weights that make every branch matter."""
    model = swin_backbone(name, **SMALL | {"img_size": 64, "drop_path_rate": 0.0} | settings)
    torch.manual_seed(4)
    shaken_(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # V2-CR has one in its position bias
    return model.eval()


def images(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- what it is ---------------------------------------------------------------------------------------------------


def test_it_is_public() -> None:
    assert sparsevit_cli.swin_backbone is swin_backbone
    assert sparsevit_cli.swin_fpn is swin_fpn


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_normed_maps_of_timms_stages(name: str) -> None:
    model = small(name)
    assert (model.channels, model.strides, model.divisor) == ((8, 16, 32, 64), (4, 8, 16, 32), 32)
    for size in ((64, 64), (96, 160), (32, 224)):
        x = images(2, 3, *size)
        with torch.no_grad():
            found = model(x)
            stages = model.swin.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
        assert list(found) == ["0", "1", "2", "3"]
        for level, channels, stride, stage in zip(found, model.channels, model.strides, stages, strict=True):
            assert found[level].shape == (2, channels, size[0] // stride, size[1] // stride)
            normed = model.norms[level](stage.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            assert torch.equal(found[level], normed)


@pytest.mark.parametrize("name", NAMES)
def test_at_ratio_zero_it_stays_timm_to_the_bit_and_sparse_kernels_agree_with_modules(name: str) -> None:
    dense = small(name)
    model = sparsify_(copy.deepcopy(dense))
    x = images(2, 3, 96, 160)
    with torch.no_grad():
        assert all(map(torch.equal, model(x).values(), dense(x).values()))
        set_sparsity(model, RATIOS)
        found = model(x)
    modules = model(x)  # gradients take timm's modules
    torch.testing.assert_close(dict(found), dict(modules), atol=3e-5, rtol=1e-4)  # after a norm
    assert any((found[level] - other).abs().max() > 1e-3 for level, other in dense(x).items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratios", [0.0, RATIOS])
def test_no_later_stage_writes_into_a_map(name: str, ratios: Any) -> None:
    model = sparsify_(small(name))
    set_sparsity(model, ratios, exact=False)
    left: list[tuple[Tensor, Tensor]] = []

    def keep(stage: nn.Module, args: object, output: Tensor) -> None:
        left.append((output, output.clone()))

    keep.keeps_nothing = True  # type: ignore[attr-defined]  # the kernels must run, and are watched
    for stage in sparse_stages(model):
        stage.register_forward_hook(keep)
    with torch.no_grad():
        found = model(images(2, 3, 64, 96))
    assert len(left) == 4
    assert all(torch.equal(output, copied) for output, copied in left)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 4


def test_keys_below_swin_are_timms_and_its_weights_load(tmp_path: Path) -> None:
    import timm

    theirs = timm.create_model(NAMES[0], img_size=192, num_classes=7, **SMALL)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    model = swin_backbone(checkpoint=str(tmp_path / "timm.safetensors"), img_size=64, **SMALL)
    weights = theirs.state_dict()
    own = {key.removeprefix("swin."): value for key, value in model.state_dict().items() if key.startswith("swin.")}
    assert set(weights) - set(own) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert all(torch.equal(value, weights[key]) for key, value in own.items())
    others = [key for key in model.state_dict() if not key.startswith("swin.")]
    assert others == [f"norms.{level}.{part}" for level in range(4) for part in ("weight", "bias")]


@pytest.mark.parametrize("name", NAMES)
def test_windows_keep_size_and_shift_when_images_grow(name: str) -> None:
    settings = SMALL | {"window_size": 7}
    model, large = (swin_backbone(name, img_size=size, drop_path_rate=0.0, **settings).eval() for size in (224, 672))
    large.load_state_dict(model.state_dict())
    for stage in model.swin.layers if hasattr(model.swin, "layers") else model.swin.stages:  # type: ignore[union-attr]
        assert [tuple(block.window_size) for block in stage.blocks] == [(7, 7)] * 2
        assert [tuple(block.shift_size) for block in stage.blocks] == [(0, 0), (3, 3)]
    x = images(1, 3, 288, 320)
    with torch.no_grad():
        found = model(x)
        assert all(map(torch.equal, found.values(), large(x).values()))
        set_image_size(model, (288, 320))
        assert image_size(model) == (288, 320)
        assert all(map(torch.equal, found.values(), model(x).values()))


def test_a_tasks_backbone_keeps_its_shift_too() -> None:
    config = tiny_config(model={"img_size": 32, "window_size": 8, "always_partition": None})
    from sparsevit_cli.tasks.task import BuildOptions, task_of

    backbone = task_of(config).swin_backbone(BuildOptions(), levels=(0, 1))
    assert [tuple(stage.blocks[1].shift_size) for stage in backbone.swin.layers] == [(4, 4), (4, 4)]  # type: ignore[union-attr,operator]
    before = dict(backbone.named_parameters())
    set_image_size_in_training(backbone, (64, 64), "train.curriculum")
    assert all(before[key] is parameter for key, parameter in backbone.named_parameters())


@pytest.mark.parametrize("levels", [(), (1, 0), (0, 0, 3), (0, 1), (3, 4)])
def test_levels_that_make_no_sense_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="levels"):
        swin_backbone(img_size=64, levels=levels, **SMALL)


@pytest.mark.parametrize(
    ("size", "sizes", "message"),
    [
        ((64, 80), None, "multiple of 32"),
        ((64, 64), [(64, 64)], "height and width of every image"),
        ((64, 64), [(64, 64), (65, 64)], "none above"),
        ((64, 64), [(64, 64), (0, 64)], "none above"),
    ],
)
def test_images_that_do_not_fit_are_refused(size: tuple[int, int], sizes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small()(images(2, 3, *size), sizes)


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("levels", [(0, 1, 2, 3), (2, 3)])
def test_every_parameter_learns(name: str, levels: tuple[int, ...]) -> None:
    model = SwinFPN(small(name, levels=levels), 8).train()
    sparsify_(model)
    set_sparsity(model, RATIOS)
    x = images(2, 3, 96, 64)
    found = model(x)
    assert list(found) == [*map(str, levels), "pool"]
    sum(level.square().sum() for level in found.values()).backward()  # type: ignore[union-attr]
    unmoved = [key for key, parameter in model.named_parameters() if not parameter.grad.any()]  # type: ignore[union-attr]
    # softmax takes no notice of a bias that is the same for all of a head's scores
    assert [key for key in unmoved if not key.endswith("meta_mlp.fc2.bias")] == []
    assert sorted(model.body.norms) == [str(level) for level in levels]
    assert model.body.channels == tuple(8 * 2**level for level in levels)


# -- batches of images of several sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("ratios", [0.0, RATIOS])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_computed_as_if_it_were_alone(name: str, ratios: Any, training: bool, pyramid: bool) -> None:
    body = small(name)
    model = sparsify_(SwinFPN(body, 8) if pyramid else body).train(training)
    if pyramid:
        with torch.no_grad():
            for bias in (part for key, part in model.fpn.named_parameters() if key.endswith("bias")):
                bias.normal_()  # new ones are zero
    set_sparsity(model, ratios)
    own = [(60, 90), (128, 160), (64, 96), (33, 160)]
    alone = [nn.functional.pad(images(1, 3, *size, seed=n), (0, -size[1] % 32, 0, -size[0] % 32))
             for n, size in enumerate(own)]  # fmt: skip
    batch = torch.cat([nn.functional.pad(x, (0, 160 - x.shape[3], 0, 128 - x.shape[2])) for x in alone])
    batch[0, :, 64:] = 9.0  # what lies outside does not matter
    with torch.set_grad_enabled(training):
        together = model(batch, own)
        for number, image in enumerate(alone):
            for level, found in model(image).items():
                height, width = found.shape[2:]
                torch.testing.assert_close(together[level][number : number + 1, :, :height, :width], found,
                                           atol=3e-5, rtol=1e-4)  # fmt: skip
                assert not together[level][number, :, height:].any()
                assert not together[level][number, :, :, width:].any()
        if training:
            together["3"][1].sum().backward()  # another image's loss reaches no pixel's parameters twice
            assert all(p.grad is not None for p in body.swin.parameters())


def test_windows_of_padding_are_neither_ranked_nor_counted() -> None:
    model = sparsify_(small())
    set_sparsity(model, 0.5)
    seen: list[tuple[int, int, int]] = []

    def count(block: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        kept = kwargs["kept"].indices
        seen.append((args[0].shape[1], args[0].shape[2], kept.shape[1]))

    count.keeps_nothing = True  # type: ignore[attr-defined]
    sparse_stages(model)[0].blocks[0].register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        model(images(2, 3, 96, 192), [(96, 192), (40, 60)])
    assert seen == [(24, 48, 8 * 16 // 2), (16, 16, 6 * 6 // 2)]


def test_sizes_that_are_all_the_batchs_change_nothing() -> None:
    model = small()
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        assert all(map(torch.equal, model(x, [(64, 96), (60, 70)]).values(), model(x).values()))


# -- in company ---------------------------------------------------------------------------------------------------


def test_multiply_adds_and_graphs_take_a_backbone() -> None:
    for model in (small(), SwinFPN(small(levels=(2, 3)), 8)):
        sparsify_(model)
        workload = image_workload(model, (64, 96), 2)
        config = SparsityConfig.from_ratios(RATIOS, model_depths(model))
        cost = macs_cost(workload)
        for each in (config, SparsityConfig.dense(model_depths(model))):
            set_sparsity(model, each)
            assert cost(each) == pytest.approx(traced_macs(workload).total, rel=1e-6)
        set_sparsity(model, config)
        x = images(2, 3, 64, 96)
        with torch.no_grad():
            expected = model(x)
            found = accelerate_(copy.deepcopy(model))(x)
        assert type(found) is type(expected)
        assert all(map(torch.equal, found.values(), expected.values()))


def test_it_is_the_backbone_of_torchvisions_mask_rcnn() -> None:
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    backbone = swin_fpn(out_channels=8, img_size=64, **SMALL)
    assert backbone.out_channels == 8
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
    model = MaskRCNN(backbone, 3, min_size=64, max_size=96, rpn_anchor_generator=anchors, box_detections_per_img=3,
                     rpn_pre_nms_top_n_test=20, rpn_post_nms_top_n_test=8, rpn_batch_size_per_image=8,
                     box_batch_size_per_image=8)  # fmt: skip
    sparsify_(model)
    set_sparsity(model, RATIOS)
    pictures = [images(3, 64, 80).sigmoid(), images(3, 70, 64).sigmoid()]
    target = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1]),
              "masks": torch.ones(1, 64, 80, dtype=torch.uint8)}  # fmt: skip
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
             "masks": torch.zeros(0, 70, 64, dtype=torch.uint8)}  # fmt: skip
    losses = model(pictures, [target, empty])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in backbone.body.swin.parameters())
    with torch.no_grad():
        found = model.eval()(pictures)
    assert [set(one) for one in found] == [{"boxes", "labels", "scores", "masks"}] * 2


@pytest.mark.parametrize("formats", [("pt2",), ("onnx", "pt2")])
def test_export_with_sparse_ratios(formats: tuple[str, ...], tmp_path: Path) -> None:
    body = small(depths=(2, 1), num_heads=(1, 2), levels=(0, 1), img_size=(64, 96))
    model = sparsify_(SwinFPN(body, 8).eval() if "onnx" in formats else body)
    set_sparsity(model, [[0.4], [0.5]])
    export_model(
        model, tmp_path, input_size=(64, 96), formats=formats, check_batch_sizes=(2, 3), tolerance=1e-4,
        measure_ms=False,
    )  # fmt: skip
    for name in formats:
        run = runner(tmp_path / f"model.{name}")
        for batch in (1, 4):
            x = images(batch, 3, 64, 96)
            with torch.no_grad():
                torch.testing.assert_close(run(x), list(model(x).values()), atol=1e-5, rtol=1e-4)
