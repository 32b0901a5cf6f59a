"""Augmentation: every policy that the schema allows works for every draw, or is refused before training."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparsevit_cli.config.classification import AugmentSection, FolderData
from sparsevit_cli.data import train_batches
from sparsevit_cli.errors import ConfigError, DataError, StoppedError
from sparsevit_cli.seeding import seeded
from sparsevit_cli.tasks.classification.transforms import TransformSpec
from test_data_folder import build, make_example_tree

PIXELS = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)


def spec_of(policy, in_chans=3):
    grey = {} if in_chans == 3 else {"mean": (0.5,), "std": (0.2,)}
    section = FolderData(root="x", augment=AugmentSection(auto_augment=policy), **grey)
    return TransformSpec.from_config(section, 16, in_chans)


def operations(transform):
    for step in transform.transform.transforms:
        yield from (*getattr(step, "ops", ()), *(op for part in getattr(step, "policy", ()) for op in part))


USUAL = (
    "rand", "rand-m9-mstd0.5", "rand-m9-mstd0.5-inc1", "rand-m15-mmax30-inc1", "rand-t3aw-n3-inc1", "rand-tweights-n9",
    "augmix", "augmix-m5-w4-d2-b1", "original-mstd3", "originalr", "originalr-mstd0.5", "v0", "v0r", "3a",
)  # fmt: skip


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("policy", USUAL)
def test_every_operation_of_a_policy_works_at_every_magnitude(policy, in_chans):
    transform = spec_of(policy, in_chans).build()
    image = Image.fromarray(PIXELS).convert("RGB" if in_chans == 3 else "L")
    for op in operations(transform):
        always = copy.copy(op)
        always.prob, always.magnitude_std = 1.0, 0
        for magnitude in np.linspace(0, op.magnitude_max or 10, 11).tolist():
            always.magnitude = magnitude
            assert always(image).size == image.size


def test_posterize_keeps_a_bit_of_the_image():
    """timm draws 0 bits: Pillow 13 refuses that, older ones make the image black."""
    transform = spec_of("rand-m10-inc1-p1").build()
    posterize = next(op for op in operations(transform) if op.name == "PosterizeIncreasing")
    assert set(np.unique(posterize(Image.fromarray(PIXELS)))) == {0, 128}


NAMES = ["m", "n", "p", "mstd", "mmax", "inc", "w", "d", "a", "b"]
SETTINGS = st.one_of(
    st.builds(
        "{}{}".format,
        st.sampled_from(["m", "n", "p", "mstd", "mmax", "inc", "w", "d", "a", "b"]),
        st.integers(0, 10**6),
    ),
    st.builds("{}{:.2f}".format, st.sampled_from(["p", "mstd", "a"]), st.floats(0, 1e3)),
    st.sampled_from(["tweights", "t3a", "t3aw", "n0", "w0", "a0", "mmax" + "9" * 400, "m" + "9" * 400, "mstd1e300"]),
)


@given(st.sampled_from(["rand", "augmix", "original", "originalr", "v0", "v0r", "3a"]), st.lists(SETTINGS, max_size=4))
@pytest.mark.filterwarnings("ignore")
def test_a_policy_works_or_is_refused_before_training(name, settings):
    try:
        transform = spec_of("-".join([name, *settings])).build()
    except ConfigError as error:
        assert error.what == "data.augment.auto_augment"  # noqa: PT017
        return
    for seed in range(3):
        with seeded(seed):
            assert transform(Image.fromarray(PIXELS)).isfinite().all()


@pytest.mark.parametrize("policy", ["rand-n1000000000", "augmix-w1000000000", "augmix-d1000000000"])
def test_a_policy_that_would_never_end_is_refused(policy):
    with pytest.raises(ConfigError, match="at most 100"):
        spec_of(policy)


# A failure that no check foresaw


def break_operation(source, fails):
    """Make the first operation of the source's policy raise where `fails()` says so, and always be drawn."""
    augment = next(step for step in source._transform.transform.transforms if hasattr(step, "ops"))
    op = copy.copy(augment.ops[0])
    op.prob = 1.0

    def raises(image, *_, **__):
        if fails():
            raise ValueError("no such bits\nat all")
        return image

    op.aug_fn = raises
    augment.ops = [op]


@pytest.fixture
def source(tmp_path):
    tree = make_example_tree(tmp_path, train=3, val=1)
    return build(tree, img_size=16, augment=AugmentSection(auto_augment="rand-m9-n1")).train


def test_a_draw_that_fails_is_told_and_drawn_again(source, caplog):
    whole = list(train_batches(source, batch_size=2, seed=0, epoch=0))
    failing = iter([True, False, *[False] * 100])
    break_operation(source, lambda: next(failing))
    batches = list(train_batches(source, batch_size=2, seed=0, epoch=0))
    assert [batch.indices.tolist() for batch in batches] == [batch.indices.tolist() for batch in whole]
    (told,) = [record.getMessage() for record in caplog.records]
    first = source.sample_name(int(batches[0].indices[0]))
    assert first in told
    assert "AugmentOp(name=AutoContrast" in told
    assert f"seed 0, epoch 0, sample {int(batches[0].indices[0])}" in told
    assert "ValueError: no such bits" in told
    assert len(source.bad_images) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_whose_every_draw_fails_counts_as_unreadable(source, workers):
    break_operation(source, lambda: True)
    with pytest.raises(
        DataError, match=r"AugmentOp\(name=AutoContrast.*no such bits.*seed 0, epoch 3, sample"
    ) as caught:
        list(train_batches(source, batch_size=2, seed=0, epoch=3, workers=workers))
    assert caught.value.exit_code == 3
    assert "train/" in caught.value.got


def test_a_signal_inside_a_transform_is_no_bad_image(source):
    def signalled():
        raise StoppedError("stopped", "a second signal", "Type it again.", interrupted=True)

    break_operation(source, signalled)
    with pytest.raises(StoppedError):
        list(train_batches(source, batch_size=2, seed=0, epoch=0))


def test_a_second_draw_is_the_same_after_a_resume(source):
    def run(start):
        seen = set()

        def fails():  # the first draw of every image
            index = drawn[-1]
            return index not in seen and seen.add(index) is None

        drawn = []
        read = source.records.read
        object.__setattr__(source.records, "read", lambda record: drawn.append(record) or read(record))
        break_operation(source, fails)
        return list(train_batches(source, batch_size=2, seed=0, epoch=0, start=start))

    for one, other in zip(run(0)[1:], run(1), strict=True):
        assert one.inputs.equal(other.inputs)
