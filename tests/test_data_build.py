"""The embedded digits through build_data, and what holds for every source."""

import pytest
import torch

from sparsevit_cli.config.classification import DigitsData
from sparsevit_cli.data import Source, eval_batches, train_batches
from sparsevit_cli.errors import ConfigError, DataError
from sparsevit_cli.tasks.classification.data import build_data
from test_data_folder import make_example_tree
from tiny import data_section

pytest.importorskip("sklearn")


def digits(*, img_size=48, in_chans=3, seed=0, class_names=None):
    return build_data(DigitsData(), img_size=img_size, in_chans=in_chans, seed=seed, class_names=class_names)


@pytest.fixture(scope="module")
def bundle():
    return digits()


def test_digits(bundle):
    assert bundle.categories.names == tuple("0123456789")
    rows = dict(bundle.describe())
    assert rows["training images"] == str(len(bundle.train))
    assert rows["validation images"] == str(len(bundle.val))
    batch = next(train_batches(bundle.train, batch_size=4, seed=0, epoch=3))
    assert batch.inputs.shape == (4, 3, 48, 48)
    bundle.train.set_epoch(3)
    for image, label, index in zip(batch.inputs, batch.targets, batch.indices, strict=True):
        expected, expected_label = bundle.train[int(index)]
        assert torch.equal(image, expected)
        assert label == expected_label


def test_digits_at_another_size(bundle):
    larger = bundle.val.resized(64)
    assert larger[0][0].shape == (3, 64, 64)
    assert larger[0][1] == bundle.val[0][1]
    assert larger.fingerprint() != bundle.val.fingerprint()
    assert digits(img_size=(48, 48)).fingerprint == bundle.fingerprint
    assert digits(seed=1).fingerprint != bundle.fingerprint


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"in_chans": 1}, ConfigError, "model.in_chans"),
        ({"img_size": (48, 64)}, ConfigError, "model.img_size"),
        ({"class_names": ["cat", "dog"]}, DataError, "data.source digits"),
    ],
)
def test_digits_that_do_not_fit(changes, error, field):
    with pytest.raises(error) as caught:
        digits(**changes)
    assert caught.value.what == field


@pytest.mark.parametrize("kind", ["digits", "folder", "timm"])
def test_every_source_keeps_the_protocol(kind, tmp_path, bundle):
    if kind != "digits":
        section = {
            "source": kind,
            "root": str(make_example_tree(tmp_path)),
            **({"dataset": "folder"} if kind == "timm" else {}),
        }
        bundle = build_data(data_section(**section), img_size=48, in_chans=3, seed=0)
    sources: list[Source] = [bundle.train, bundle.search, bundle.val]
    assert len({source.fingerprint() for source in sources}) == 3
    for source in sources:
        image, label = source[len(source) - 1]
        assert image.dtype == torch.float32
        assert image.shape == (3, 48, 48)
        assert type(label) is int
        assert source.image_size == (48, 48)
        assert source.sample_name(0) != source.sample_name(1)
        assert source.resized((32, 32))[0][0].shape == (3, 32, 32)
        with pytest.raises(IndexError):
            source[len(source)]
    assert (bundle.train.bad_images is None) == (kind == "digits")
    assert bundle.search.bad_images is None
    assert sum(len(batch) for batch in eval_batches(bundle.search, 7)) == len(bundle.search)
