"""The embedded digits: a sample is a pure function of (seed, split, index, epoch), and splits share no digit."""

import sys

import numpy as np
import pytest
import torch

from sparsevit_cli.data import digits
from sparsevit_cli.data.digits import DigitsDataset, DigitsSpec, split_indices
from sparsevit_cli.errors import DataError

SPLITS = ("train", "search", "val")
SPEC = DigitsSpec(canvas=64, digit_min=20, digit_max=28, clutter=0.5)


@pytest.fixture(autouse=True)
def _scikit_learn():
    pytest.importorskip("sklearn")


@pytest.mark.parametrize("split", SPLITS)
def test_a_sample_is_the_same_in_every_instance_and_order(split):
    first, second = DigitsDataset(SPEC, split, seed=3), DigitsDataset(SPEC, split, seed=3)
    wanted = [first[index] for index in (0, 7, 11)]
    torch.manual_seed(99)
    np.random.seed(99)
    for index, (image, label) in reversed(list(zip((0, 7, 11), wanted, strict=True))):
        again, label_again = second[index]
        assert torch.equal(image, again)
        assert label == label_again


def test_a_sample_leaves_the_global_generators_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    DigitsDataset(SPEC, "train")[0]
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


def test_an_image_is_float32_three_channels_and_about_normalised():
    dataset = DigitsDataset(DigitsSpec(canvas=96, digit_min=20, digit_max=28, clutter=0.5), "train")
    images = torch.stack([dataset[index][0] for index in range(64)])
    assert images.shape == (64, 3, 96, 96)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert torch.equal(images[:, 0], images[:, 2])
    assert abs(images.mean()) < 0.3
    assert 0.5 < images.std() < 1.5


def test_items_do_not_share_memory():
    dataset = DigitsDataset(SPEC, "val")
    image = dataset[0][0]
    image.zero_()
    assert dataset[0][0].abs().sum() > 0


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_splits_are_disjoint_and_cover_all_digits(seed):
    parts = [split_indices(split, seed) for split in SPLITS]
    assert [len(part) for part in parts] == [1197, 250, 350]
    assert sorted(index for part in parts for index in part) == list(range(1797))


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_stratified(split):
    dataset = DigitsDataset(SPEC, split)
    counts = np.bincount([dataset[index][1] for index in range(len(dataset))][:350], minlength=10)
    share = counts / counts.sum()
    assert share.min() > 0.085
    assert share.max() < 0.115


def test_another_seed_splits_and_draws_otherwise():
    assert split_indices("val", 0) != split_indices("val", 1)
    assert not torch.equal(DigitsDataset(SPEC, "val", 0)[0][0], DigitsDataset(SPEC, "val", 1)[0][0])


def test_the_epoch_moves_training_only():
    train = DigitsDataset(SPEC, "train")
    before, label = train[5]
    train.set_epoch(1)
    after, label_after = train[5]
    assert label == label_after
    assert not torch.equal(before, after)
    train.set_epoch(0)
    assert torch.equal(before, train[5][0])
    for split in ("search", "val"):
        held_out = DigitsDataset(SPEC, split)
        before = held_out[5][0]
        held_out.set_epoch(4)
        assert torch.equal(before, held_out[5][0])


@pytest.mark.parametrize("canvas", [28, 64, 100])
def test_digits_lie_inside_the_canvas_at_sizes_of_the_spec(canvas):
    dataset = DigitsDataset(DigitsSpec(canvas, 20, 28, 0.5), "train")
    boxes = np.array([dataset.digit_box(index) for index in range(200)])
    top, left, side = boxes.T
    assert min(top.min(), left.min()) >= 0
    assert max((top + side).max(), (left + side).max()) <= canvas
    assert set(side) == set(range(20, 29))
    if canvas == 100:  # spread over the canvas, not huddled in a corner
        assert max(top.min(), left.min()) < 10
        assert min(top.max(), left.max()) > 62


def test_the_digit_is_where_its_box_says_and_is_the_brightest_thing():
    dataset = DigitsDataset(DigitsSpec(canvas=96, digit_min=20, digit_max=28, clutter=0.0), "val")
    for index in range(20):
        image, _ = dataset[index]
        top, left, side = dataset.digit_box(index)
        background = image.clone()
        background[:, top : top + side, left : left + side] = background.min()
        assert background.max() - background.min() < 1e-5  # no clutter: flat outside of the box
        assert image.max() - image.min() > 2.0


def test_clutter_is_weaker_than_digits():
    dataset = DigitsDataset(DigitsSpec(canvas=112, digit_min=20, digit_max=28, clutter=0.5), "val")
    wins = 0
    for index in range(50):
        image = dataset[index][0][0]
        top, left, side = dataset.digit_box(index)
        inside = image[top : top + side, left : left + side].flatten().topk(20).values.mean()
        outside = image.clone()
        outside[top : top + side, left : left + side] = image.min()
        wins += bool(inside > outside.flatten().topk(20).values.mean())
    assert wins >= 45


def test_labels_and_class_names():
    dataset = DigitsDataset(SPEC, "search")
    labels = [dataset[index][1] for index in range(len(dataset))]
    assert dataset.names == tuple("0123456789")
    assert set(labels) == set(range(10))
    assert all(type(label) is int for label in labels)


def test_with_canvas_keeps_digits_split_seed_and_epoch():
    small = DigitsDataset(SPEC, "train", seed=2)
    small.set_epoch(3)
    large = small.with_canvas(128)
    assert large[0][0].shape == (3, 128, 128)
    assert (large.split, large.seed, large.epoch) == ("train", 2, 3)
    assert small.spec == SPEC
    assert [large[i][1] for i in range(30)] == [small[i][1] for i in range(30)]
    assert large.sample_name(4) == small.sample_name(4)


def test_fingerprint_tells_apart_what_defines_the_data_and_not_the_epoch():
    dataset = DigitsDataset(SPEC, "train")
    same = DigitsDataset(SPEC, "train")
    same.set_epoch(9)
    assert dataset.fingerprint() == same.fingerprint()
    others = [
        DigitsDataset(SPEC, "val"),
        DigitsDataset(SPEC, "train", seed=1),
        dataset.with_canvas(65),
        DigitsDataset(DigitsSpec(64, 19, 28, 0.5), "train"),
        DigitsDataset(DigitsSpec(64, 20, 28, 0.4), "train"),
    ]
    prints = {dataset.fingerprint(), *(other.fingerprint() for other in others)}
    assert len(prints) == 6
    assert all(len(text) == 64 and set(text) <= set("0123456789abcdef") for text in prints)


def test_sample_names_are_unique_and_tell_the_source_digit():
    dataset = DigitsDataset(SPEC, "val")
    names = [dataset.sample_name(index) for index in range(len(dataset))]
    assert len(set(names)) == len(dataset)
    assert names[3] == f"val-0003-digit{split_indices('val', 0)[3]:04d}"


def test_iterating_ends_and_negative_indices_count_from_the_end():
    dataset = DigitsDataset(SPEC, "search")
    assert sum(1 for _ in dataset) == len(dataset) == 250
    assert torch.equal(dataset[-1][0], dataset[249][0])
    for index in (250, -251):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((20, 16, 24, 0.5), ("data.canvas", "20", "24")),
        ((64, 24, 16, 0.5), ("digit_min", "24", "16")),
        ((64, 2, 16, 0.5), ("digit_min", "2")),
        ((64, 16, 24, 1.5), ("data.clutter", "1.5")),
        ((64, 16, 24, float("nan")), ("data.clutter", "nan")),
    ],
)
def test_impossible_specs_are_refused_with_the_setting_and_the_value(arguments, words):
    with pytest.raises(DataError) as refused:
        DigitsSpec(*arguments)
    assert all(word in str(refused.value) for word in words)


def test_unknown_split_and_negative_seed_are_refused():
    with pytest.raises(DataError, match="train, search, val"):
        DigitsDataset(SPEC, "test")
    with pytest.raises(DataError, match="seed"):
        DigitsDataset(SPEC, "train", seed=-1)


def test_a_missing_scikit_learn_is_told_with_what_to_do(monkeypatch):
    digits.source_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        DigitsDataset(SPEC, "train")
    monkeypatch.undo()
    digits.source_digits.cache_clear()
    assert len(DigitsDataset(SPEC, "train")) == 1197
