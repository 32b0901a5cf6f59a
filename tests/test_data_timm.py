"""Source timm: what create_dataset reads, without its silent replacements."""

import importlib.util
import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader

from sparsevit_cli.config.classification import FolderData, TimmData
from sparsevit_cli.data import eval_batches, train_batches
from sparsevit_cli.errors import DataError
from sparsevit_cli.tasks.classification import timm_source as module
from sparsevit_cli.tasks.classification.data import build_data
from sparsevit_cli.tasks.classification.records import check_classes
from sparsevit_cli.tasks.classification.timm_source import TimmRecords, read_timm
from test_data_folder import make_example_tree, spoil


def build(root, dataset="folder", *, class_names=None, **changes):
    section = TimmData(root=str(root), dataset=dataset, **changes)
    return build_data(section, img_size=32, in_chans=3, seed=0, class_names=class_names)


def write_tars(root, tree):
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(tree / split, arcname=".")


def write_mnist(root, train_labels, test_labels):
    """The raw files that torchvision's MNIST reads: image i is filled with the grey value i."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, labels in (("train", train_labels), ("t10k", test_labels)):
        images = np.repeat(np.arange(len(labels), dtype=np.uint8), 28 * 28)
        header = np.array([2051, len(labels), 28, 28], dtype=">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([2049, len(labels)], dtype=">i4").tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + np.array(labels, dtype=np.uint8).tobytes())


@pytest.mark.parametrize("dataset", ["folder", "torch/image_folder"])
def test_folders_agree_with_source_folder(tmp_path, dataset):
    tree = make_example_tree(tmp_path)
    bundle = build(tree, dataset)
    section = FolderData(root=str(tree))
    folder = build_data(section, img_size=32, in_chans=3, seed=0)
    assert bundle.categories.names == folder.categories.names
    assert len(bundle.train) == 27
    assert len(bundle.search) == 3
    assert bundle.train.fingerprint() == build(tree, dataset).train.fingerprint()
    mine, theirs = eval_batches(bundle.val, 100), eval_batches(folder.val, 100)
    for batch, expected in zip(mine, theirs, strict=True):
        assert torch.equal(batch.inputs, expected.inputs)
        assert torch.equal(batch.targets, expected.targets)


@pytest.mark.parametrize("dataset", ["folder", "torch/image_folder"])
def test_evaluation_replaces_no_image(tmp_path, dataset):
    tree = make_example_tree(tmp_path)
    spoil(tree / "val/dog/002.png")
    with pytest.raises(DataError, match=r"dog/002.png \(.*truncated"):
        list(eval_batches(build(tree, dataset).val, 5))
    (tree / "val/dog/002.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 unreadable: dog/002.png \(is an empty file\)"):
        build(tree, dataset)


def test_bad_training_files_are_counted(tmp_path):
    tree = make_example_tree(tmp_path)
    bundle = build(tree, max_bad_fraction=0.05)
    spoil(tree / "train" / bundle.train.sample_name(0))
    assert [len(batch) for batch in train_batches(bundle.train, batch_size=9, seed=0, epoch=0)] == [9, 9, 9]
    assert len(bundle.train.bad_images) == 1


def test_tars_read_the_same_from_several_processes(tmp_path):
    tree = make_example_tree(tmp_path / "tree")
    write_tars(tmp_path, tree)
    bundle = build(tmp_path, train_split="train.tar", val_split="val.tar")
    reference = build(tree)
    assert bundle.categories.names == reference.categories.names
    assert bundle.val.sample_name(0).endswith("cat/000.png")
    expected = list(eval_batches(reference.val, 4))
    for workers in (0, 2):
        for batch, wanted in zip(eval_batches(bundle.val, 4, workers), expected, strict=True):
            assert torch.equal(batch.inputs, wanted.inputs)
            assert torch.equal(batch.targets, wanted.targets)


def test_torchvision_mnist(tmp_path):
    write_mnist(tmp_path, list(range(10)) * 3, list(range(10)))
    bundle = build(tmp_path, "torch/mnist", mean=(0.0,) * 3, std=(1.0,) * 3)
    assert bundle.categories.names[7] == "7 - seven"
    assert (len(bundle.train), len(bundle.search), len(bundle.val)) == (20, 10, 10)
    assert bundle.val.sample_name(4) == "torch/mnist split val [4]"
    image, label = bundle.val[4]
    assert label == 4
    assert torch.allclose(image, torch.full((3, 32, 32), 4 / 255))
    with pytest.raises(DataError, match="read the same images"):
        build(tmp_path, "torch/mnist", train_split="tain")  # timm takes any other name for the test split


def test_classes_without_images(tmp_path):
    write_mnist(tmp_path, list(range(10)) * 3, list(range(9)))
    with pytest.raises(DataError, match="no images of 1 classes: 9 - nine"):
        build(tmp_path, "torch/mnist")


def test_validation_lacks_a_class(tmp_path):
    tree = make_example_tree(tmp_path)
    shutil.rmtree(tree / "val/cat")  # timm would number dog 0
    with pytest.raises(DataError, match="1 classes of folder split train are missing here: cat"):
        build(tree)


def test_class_numbers_follow_the_checkpoint(tmp_path):
    bundle = build(make_example_tree(tmp_path), class_names=["owl", "dog", "cat"])
    assert [bundle.val[i][1] for i in (0, 4, 8)] == [2, 1, 0]


def test_a_missing_split_folder_is_not_replaced_by_its_parent(tmp_path):
    tree = make_example_tree(tmp_path)
    with pytest.raises(DataError, match="read the same images"):
        build(tree, val_split="holdout")


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("tfds/mnist", "read as a stream"),
        ("wds/shards", "read as a stream"),
        ("cifar10", "known are folder"),
        ("torhc/cifar10", "known are folder"),
        ("torch/cifar10", "cannot be opened"),
        ("torch/nothing", "cannot be opened"),
    ],
)
def test_data_sets_that_cannot_be_used(tmp_path, dataset, expected, capsys):
    with pytest.raises(DataError, match=expected):
        build(tmp_path, dataset)
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="Hugging Face datasets is installed")
def test_a_missing_package_is_named_on_stderr_only(tmp_path, capsys):
    with pytest.raises(DataError, match="No module named 'datasets'"):
        build(tmp_path, "hfds/mnist")
    assert capsys.readouterr().out == ""


def test_root_is_needed():
    with pytest.raises(DataError, match=r"Set data\.root"):
        read_timm("torch/mnist", None, "train", 1.0)


class Remote(Reader):
    """Like timm's Hugging Face reader: bytes by number, labels without decoding, no file names."""

    def __init__(self, labels, class_to_idx):
        super().__init__()
        self.labels, self.class_to_idx = labels, class_to_idx

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        file = io.BytesIO()
        Image.new("L", (8, 8), index).save(file, "PNG")
        return io.BytesIO(file.getvalue()[: -40 if index == 3 else None]), self.labels[index]

    def iter_targets(self):
        return iter(self.labels)


def opened(monkeypatch, labels, class_to_idx) -> TimmRecords:
    monkeypatch.setattr(module, "_open", lambda *_: ImageDataset(None, reader=Remote(labels, class_to_idx)))
    return read_timm("hfds/remote", None, "train", 1.0)


def test_readers_without_files(monkeypatch):
    records = opened(monkeypatch, [0, 1, 1, 0], {"cat": 0, "dog": 1})
    check_classes(records)
    assert records.class_names == ("cat", "dog")
    assert records.labels.tolist() == [0, 1, 1, 0]
    assert records.read(2).getpixel((0, 0)) == (2, 2, 2)
    with pytest.raises(DataError, match=r"hfds/remote split train \[3\]"):
        records.read(3)
    assert opened(monkeypatch, [0, 1, 1, 0], {}).class_names == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "class_to_idx", "expected"),
    [
        ([0, 1, -1], {"cat": 0, "dog": 1}, "labels from -1 to 1 for 2 classes"),
        ([0, 1, 2], {"cat": 0, "dog": 1}, "labels from 0 to 2 for 2 classes"),
        ([0, 1], {"cat": 0, "dog": 2}, "gaps: 0, 2"),
        ([[0, 1], [1, 0]], {"cat": 0, "dog": 1}, "one whole number"),
        ([0.5, 1.0], {"cat": 0, "dog": 1}, "one whole number"),
        ([None, None], {}, "one whole number"),
        ([0, 2], {}, "no images of 1 classes: 1"),
    ],
)
def test_labels_that_are_no_classes(monkeypatch, labels, class_to_idx, expected):
    with pytest.raises(DataError, match=expected):
        opened(monkeypatch, labels, class_to_idx)
