"""ImageFolder trees: what is listed, in which order, and what is refused."""

import io
import os
import shutil
import socket
import tempfile
import unicodedata
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from timm.data.readers.reader_image_folder import find_images_and_targets

from sparsevit_cli.config.classification import AugmentSection, FolderData, TimmData
from sparsevit_cli.console import ConsoleReporter
from sparsevit_cli.data import eval_batches, train_batches
from sparsevit_cli.errors import ConfigError, DataError
from sparsevit_cli.tasks.classification.data import build_data
from sparsevit_cli.tasks.classification.folder import _natural_key, read_folder
from sparsevit_cli.tasks.classification.transforms import TransformSpec, _trim_strip
from tiny import data_section


def make_example_tree(root: Path, classes=("cat", "dog", "owl"), train=10, val=4, suffix=".png") -> Path:
    """root/train/<class>/<n>.png and root/val/...: noise, brighter for later classes. Returns root."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (24, 20 + number % 5, 3), dtype=np.uint8) + np.uint8(20 * label)
                Image.fromarray(pixels).save(folder / f"{number:03d}{suffix}")
    return root


def section(root: Path, **changes) -> FolderData:
    return FolderData(root=str(root), **changes)


def build(root: Path, *, img_size=32, class_names=None, seed=0, in_chans=3, **changes):
    return build_data(
        section(root, **changes), img_size=img_size, in_chans=in_chans, seed=seed, class_names=class_names
    )


@pytest.fixture
def tree(tmp_path):
    return make_example_tree(tmp_path / "pets")


@contextmanager
def without_root_rights():
    """As root, file modes do not bind; act as nobody for a moment."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_splits_are_disjoint_stratified_and_named(tree):
    bundle = build(tree, search_fraction=0.2)
    assert bundle.categories.names == ("cat", "dog", "owl")
    names = {
        split: {source.sample_name(i) for i in range(len(source))}
        for split, source in (("train", bundle.train), ("search", bundle.search), ("val", bundle.val))
    }
    assert {split: len(files) for split, files in names.items()} == {"train": 24, "search": 6, "val": 12}
    assert not names["train"] & names["search"]
    on_disk = {path.relative_to(tree).as_posix() for path in tree.glob("*/*/*.png")}
    assert names["train"] | names["search"] | names["val"] == on_disk
    assert [source[i][1] for source in (bundle.search,) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    for source in (bundle.train, bundle.search, bundle.val):
        for i in range(len(source)):
            image, label = source[i]
            assert image.shape == (3, 32, 32)
            assert str(image.dtype) == "torch.float32"
            assert source.sample_name(i).split("/")[1] == bundle.categories.names[label]


def test_the_search_split_does_not_depend_on_the_seed(tree):
    first, second = build(tree, seed=0), build(tree, seed=1)
    assert first.search.fingerprint() == second.search.fingerprint()
    assert not np.array_equal(first.train[0][0], second.train[0][0])


def test_evaluation_sees_no_augmentation_and_training_does(tree):
    bundle = build(tree)
    for source, moves in ((bundle.train, True), (bundle.search, False), (bundle.val, False)):
        source.set_epoch(0)
        before = source[0][0]
        source.set_epoch(1)
        assert np.array_equal(before, source[0][0]) != moves


def test_image_size_and_channels(tree):
    bundle = build(tree, img_size=(32, 48))
    assert bundle.val[0][0].shape == bundle.train[0][0].shape == (3, 32, 48)
    assert bundle.train.resized(64)[0][0].shape == (3, 64, 64)
    assert build(tree, in_chans=1, mean=(0.5,), std=(0.2,)).train[0][0].shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"in_chans": 1}, "data.mean"),
        ({"in_chans": 4}, "model.in_chans"),
        ({"augment": AugmentSection(scale_min=0.0)}, "data.augment.scale_min"),
    ],
)
def test_settings_that_do_not_fit(tree, changes, field):
    with pytest.raises(ConfigError) as caught:
        build(tree, **changes)
    assert caught.value.what == field


def test_fingerprint_moves_with_files_and_transform_but_not_with_place(tree, tmp_path):
    original = build(tree)
    twin = make_example_tree(tmp_path / "elsewhere")
    assert build(twin).fingerprint == original.fingerprint
    assert build(tree, crop_pct=0.8).val.fingerprint() != original.val.fingerprint()
    assert original.val.resized(64).fingerprint() != original.val.fingerprint()
    Image.new("RGB", (9, 9)).save(twin / "val/cat/new.png")
    changed = build(twin)
    assert changed.train.fingerprint() == original.train.fingerprint()
    assert changed.val.fingerprint() != original.val.fingerprint()
    assert changed.fingerprint == original.fingerprint  # nothing learned or searched from has changed
    assert changed.val_fingerprint != original.val_fingerprint
    Image.new("RGB", (9, 9)).save(twin / "train/cat/new.png")
    assert build(twin).fingerprint != original.fingerprint


def test_describe(tree, caplog):
    (tree / "train/notes.txt").write_text("x")
    (tree / "train/cat/.DS_Store").write_text("x")
    (tree / "train/cat/._000.png").write_text("x")
    (tree / "train/.ipynb_checkpoints").mkdir()
    Image.new("RGB", (9, 9)).save(tree / "train/stray.png")
    rows = dict(build(tree).describe())
    assert rows["classes"] == "3: cat, dog, owl"
    assert rows["training images"] == "27 (9 per class)"
    assert rows["search images"] == "3 (1 per class), held out of train"
    assert rows["ignored files"] == "5"
    assert rows["unreadable training images so far"] == "0 of 27"
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "5 files" in warnings[0]
    assert "stray.png" in warnings[0]


# Classes


def test_class_numbers_follow_the_given_names(tree):
    bundle = build(tree, class_names=["owl", "cat", "dog"])
    assert bundle.categories.names == ("owl", "cat", "dog")
    for source in (bundle.train, bundle.search, bundle.val):
        for i in range(len(source)):
            assert source.sample_name(i).split("/")[1] == bundle.categories.names[source[i][1]]


def test_other_classes_than_the_checkpoint(tree):
    with pytest.raises(DataError, match=r"1 classes of the checkpoint are missing here: emu; 1 classes here .* dog"):
        build(tree, class_names=["cat", "emu", "owl"])


def test_validation_lacks_and_adds_classes(tree):
    (tree / "val/dog").rename(tree / "val/wolf")
    with pytest.raises(DataError) as caught:
        build(tree)
    assert caught.value.exit_code == 3
    assert "1 classes of train are missing here: dog; 1 classes here are not in train: wolf" in str(caught.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_class_folder_without_images(tree, split):
    for name in ("ant", "bee"):
        (tree / split / name / "deep").mkdir(parents=True)
    (tree / split / "ant/readme.txt").write_text("x")
    with pytest.raises(DataError, match="2 class folders without images: ant, bee") as caught:
        build(tree)
    assert split in caught.value.what


def test_same_leaf_names_stay_apart(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            make = tmp_path / split / name / "black" / "2024"
            make.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (8, 8)).save(make / f"{number}.png")
    bundle = build(tmp_path)
    assert bundle.categories.names == ("cat", "dog")
    assert dict(bundle.describe())["validation images"] == "6 (3 per class)"


NAMES = st.text(st.sampled_from("aB01 _é/²"), min_size=1, max_size=6).map(lambda name: name.replace("/", "-"))


@given(st.lists(NAMES, min_size=1, unique=True))
def test_class_order_does_not_depend_on_the_listing(names):
    listed_backwards = names[::-1]
    assert sorted(names, key=_natural_key) == sorted(listed_backwards, key=_natural_key)


def test_class_order_is_timms(tmp_path):
    make_example_tree(tmp_path, classes=("class10", "class2", "Zebra", "ant", "7", "30"), train=1, val=0)
    _, timm_classes = find_images_and_targets(str(tmp_path / "train"))
    assert list(read_folder(tmp_path, "train", 1.0).class_names) == list(timm_classes)


def test_names_may_hold_anything(tmp_path):
    names = ["[red]", "<b>&", "a\nb", "{x}", "ünï", "\u202eevil"]
    bundle = build(make_example_tree(tmp_path, classes=names, train=2, val=1))
    assert set(bundle.categories.names) == set(names)
    assert len(bundle.fingerprint) == 64
    assert sum(len(batch) for batch in eval_batches(bundle.val, 3)) == len(names)


NOT_UTF8 = [os.fsdecode(name) for name in ("café".encode("latin-1"), b"\xff", "猫".encode("shift-jis"), b"a\xc3")]


@pytest.mark.parametrize("name", NOT_UTF8)
@pytest.mark.parametrize("source", ["folder", "timm"])
def test_class_names_that_are_not_utf8_are_refused_before_training(tmp_path, name, source):
    make_example_tree(tmp_path, classes=("cat", name), train=2, val=1)
    section = data_section(source, root=str(tmp_path))
    with pytest.raises(DataError, match="1 class names are not UTF-8: ") as caught:
        build_data(section, img_size=32, in_chans=3, seed=0)
    str(caught.value).encode()
    assert caught.value.exit_code == 3


def test_file_names_that_are_not_utf8_are_carried_through(tmp_path, caplog):
    tree = make_example_tree(tmp_path, classes=("cat", "dog"), train=60, val=1)
    for number, name in enumerate([*NOT_UTF8, "a\nb", "c\r\x1b[2Jd", "e\u2028f"]):
        (tree / f"train/cat/{number:03d}.png").rename(tree / f"train/cat/{name}.png")
        spoil(tree / f"train/cat/{name}.png")
    bundle = build(tree, img_size=16, max_bad_fraction=0.5)
    list(train_batches(bundle.train, batch_size=10, seed=0, epoch=0))
    assert len(bundle.train.bad_images) > 4
    stream = io.StringIO()
    reporter = ConsoleReporter(stream=stream)
    reporter.log_to(tmp_path / "log.txt")
    reporter.say(dict(bundle.describe())["unreadable training images so far"])
    reporter.warn(caplog.records[0].getMessage())
    for told in (stream.getvalue(), (tmp_path / "log.txt").read_text(encoding="utf-8")):
        told.encode()
        assert len(told.splitlines()) == 2
        assert "\x1b" not in told


LOOK_ALIKE = [
    ("caf\u00e9", "cafe\u0301"),
    ("\u00c5", "\u212b"),
    ("cat", "cat "),
    ("cat", "c\u0430t"),
    ("ab", "a\u200bb"),
]


@pytest.mark.parametrize(("here", "there"), LOOK_ALIKE)
def test_names_that_look_the_same_are_shown_with_their_difference(tmp_path, here, there):
    tree = make_example_tree(tmp_path, classes=("owl", here))
    with pytest.raises(DataError) as caught:
        build(tree, class_names=["owl", there])
    assert all(ascii(name) in caught.value.got for name in (here, there) if name not in ("cat", "ab"))
    is_one_text = unicodedata.normalize("NFC", here) == unicodedata.normalize("NFC", there)
    assert ("Unicode form" in caught.value.do) == is_one_text
    (tree / "val" / here).rename(tree / "val" / there)
    with pytest.raises(DataError, match="are missing here"):
        build(tree)


def test_one_split_with_both_forms_of_a_name_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"two Unicode forms: 'cafe\\u0301' and 'caf\\xe9'"):
        build(make_example_tree(tmp_path, classes=("cafe\u0301", "caf\u00e9"), train=2, val=1))


# Folders


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: [path.unlink() for path in root.rglob("*.png")], "no class folder with images"),
        (lambda root: (root / "val").rename(root / "valid"), "no folder val in .*; there are: train, valid"),
        (lambda root: root.rename(root.with_name("gone")), "is not a folder"),
        (lambda root: [(root / split / "dog").rename(root / f"{split}_dog") for split in ("train", "val")], None),
    ],
)
def test_folders_missing(tree, change, expected):
    change(tree)
    if expected is None:
        assert build(tree).categories.names == ("cat", "owl")
        return
    with pytest.raises(DataError, match=expected):
        build(tree)


def test_one_class_is_too_few(tmp_path):
    with pytest.raises(DataError, match="only one class folder: cat"):
        build(make_example_tree(tmp_path, classes=("cat",)))


@pytest.mark.parametrize("splits", [{"val_split": "train"}, {"train_split": "."}, {"val_split": "train/../train"}])
def test_validation_on_training_images_is_refused(tree, splits):
    with pytest.raises(DataError, match="read the same images"):
        build(tree, **splits)


def test_symlinks(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (tree / "train/owl").rename(elsewhere)
    (tree / "train/owl").symlink_to(elsewhere)
    assert dict(build(tree).describe())["training images"] == "27 (9 per class)"
    (elsewhere / "again").symlink_to(elsewhere)
    with pytest.raises(DataError, match="a link to a folder that contains it"):
        build(tree)


@pytest.mark.parametrize("target", ["nowhere", "emu"])
def test_a_broken_link_to_a_class_folder_is_not_skipped(tree, target):
    (tree / "train/emu").symlink_to(target)  # the second points at itself
    with pytest.raises(DataError, match="leads nowhere"):
        build(tree)


SYSTEM = [
    ".#notes.txt", "._000.png", ".DS_Store", ".Trash", ".Trash-1000", ".ipynb_checkpoints", ".@__thumb", "@eaDir",
    "@Recycle", "#recycle", "#snapshot", "lost+found", "$RECYCLE.BIN", "System Volume Information", "__MACOSX",
    "Thumbs.db", "desktop.ini",
]  # fmt: skip


def a_folder_of_thumbnails(path):
    path.mkdir()
    Image.new("RGB", (9, 9)).save(path / "SYNOFILE_THUMB_M.png")


def a_closed_folder(path):
    path.mkdir(mode=0)


KINDS = {
    "broken link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to what holds it": lambda path: path.symlink_to(".."),
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
    "thumbnails": a_folder_of_thumbnails,
    "closed": a_closed_folder,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_systems_leave_behind_is_ignored_and_told_in_one_line(tree, kind, caplog, monkeypatch):
    monkeypatch.chdir(tree)
    for name in SYSTEM:
        for place in ("train", "train/cat", "val/dog"):
            KINDS[kind](tree / place / name)
    bundle = build(tree)
    assert bundle.categories.names == ("cat", "dog", "owl")
    assert dict(bundle.describe())["training images"] == "27 (9 per class)"
    assert dict(bundle.describe())["ignored files"] == str(3 * len(SYSTEM))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert f"{2 * len(SYSTEM)} files or folders" in told[0]


@pytest.mark.parametrize("kind", ["broken link", "link to itself", "pipe", "socket"])
def test_other_files_in_a_class_folder_are_ignored_whatever_they_are(tree, kind, caplog, monkeypatch):
    monkeypatch.chdir(tree)
    KINDS[kind](tree / "train/cat/notes.txt")
    assert dict(build(tree).describe())["ignored files"] == "1"
    assert "cat/notes.txt" in caplog.records[0].getMessage()


@pytest.mark.parametrize("name", ["@eaDir/cat.png", "._000.png", "deep/__MACOSX/a.png"])
def test_timm_folders_with_files_of_a_system_are_refused(tree, name):
    (tree / "train/cat" / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(tree / "train/cat" / name)
    section = TimmData(root=str(tree), dataset="folder")
    with pytest.raises(DataError, match=f"1 hidden files or files of a system .*cat/{name}"):
        build_data(section, img_size=32, in_chans=3, seed=0)


@pytest.mark.parametrize("kind", ["folder", "other class", "nested", "file", "hard link", "whole split"])
@pytest.mark.parametrize("source", ["folder", "timm"])
def test_validation_images_that_are_training_images_by_a_link_are_refused(tree, kind, source):
    val, train = tree / "val/dog", tree / "train/dog"
    if kind in ("folder", "other class"):
        shutil.rmtree(val)
        val.symlink_to(train if kind == "folder" else tree / "train/cat")
    elif kind == "nested":
        (val / "more").symlink_to(train)
    elif kind == "file":
        (val / "new.png").symlink_to(train / "003.png")
    elif kind == "hard link":
        os.link(train / "003.png", val / "new.png")
    else:
        shutil.rmtree(tree / "val")
        (tree / "val").symlink_to(tree / "train")
    section = data_section(source, root=str(tree))
    with pytest.raises(DataError, match=r"by a link: .*dog/\S+ is |read the same images") as caught:
        build_data(section, img_size=32, in_chans=3, seed=0)
    assert caught.value.exit_code == 3


def test_folder_that_cannot_be_listed():
    with tempfile.TemporaryDirectory() as name:
        root = make_example_tree(Path(name), train=2, val=1)
        Path(name).chmod(0o755)
        closed = root / "train/dog"
        closed.chmod(0)
        try:
            with without_root_rights(), pytest.raises(DataError, match="cannot be listed") as caught:
                build(root)
            assert caught.value.what == str(closed)
        finally:
            closed.chmod(0o755)


def test_other_image_extensions_in_any_case(tmp_path):
    tree = make_example_tree(tmp_path, suffix=".JPEG", train=2, val=1)
    assert len(build(tree).val) == 3


# Unreadable images


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def test_one_percent_of_bad_training_images_is_forgiven_and_more_is_not(tmp_path, caplog):
    tree = make_example_tree(tmp_path, classes=("cat", "dog"), train=56, val=1)
    bundle = build(tree, search_fraction=0.1, img_size=16)
    assert len(bundle.train) == 100
    numbers = [i for i in range(100) if bundle.train.sample_name(i).startswith("train/cat")]
    spoil(tree / bundle.train.sample_name(numbers[0]))
    for epoch in (0, 1):
        batches = list(train_batches(bundle.train, batch_size=10, seed=0, epoch=epoch))
        assert [len(batch) for batch in batches] == [10] * 10
        assert numbers[0] not in {int(i) for batch in batches for i in batch.indices}
    bad_name = bundle.train.sample_name(numbers[0])
    assert dict(bundle.describe())["unreadable training images so far"] == f"1 of 100: {bad_name}"
    assert [bad_name in record.getMessage() for record in caplog.records] == [True]

    (tree / bundle.train.sample_name(numbers[1])).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        list(train_batches(bundle.train, batch_size=10, seed=0, epoch=2, workers=2))
    assert caught.value.exit_code == 3
    assert "2 of 100" in caught.value.got
    assert bundle.train.sample_name(numbers[1]) in caught.value.got


def test_empty_training_files_count_before_training_and_never_reach_search(tmp_path):
    tree = make_example_tree(tmp_path, train=20, val=1)
    held_out = {build(tree).search.sample_name(i) for i in range(6)}
    for name in held_out:
        (tree / name).write_bytes(b"")
    bundle = build(tree, max_bad_fraction=0.5)
    assert len(bundle.train.bad_images) == 6
    assert not held_out & {bundle.search.sample_name(i) for i in range(len(bundle.search))}
    with pytest.raises(DataError, match="6 of 54, above"):
        build(tree)


def test_pipes_and_broken_links_named_like_images_do_not_hang(tree):
    os.mkfifo(tree / "train/cat/pipe.png")
    (tree / "train/cat/link.png").symlink_to("nowhere")
    bundle = build(tree, max_bad_fraction=0.5)
    assert len(bundle.train.bad_images) == 2
    reasons = {bundle.train.records.known_fault(i) for i in range(len(bundle.train.records.keys))}
    assert reasons == {None, "cannot be opened as a file"}
    assert sum(len(batch) for batch in train_batches(bundle.train, batch_size=7, seed=0, epoch=0)) == 28


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_never_leaves_an_image_out(tree, workers):
    bundle = build(tree)
    assert sum(len(batch) for batch in eval_batches(bundle.val, 5, workers)) == 12
    spoil(tree / "val/dog/002.png")
    with pytest.raises(DataError, match=r"val/dog/002.png \(.*truncated") as caught:
        list(eval_batches(bundle.val, 5, workers))
    assert caught.value.exit_code == 3


def test_empty_validation_file_is_found_before_training(tree):
    (tree / "val/dog/002.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 unreadable: val/dog/002.png \(is an empty file\)"):
        build(tree)


def test_too_large_image(tree):
    Image.new("RGB", (400, 300)).save(tree / "val/dog/big.png")
    with pytest.raises(DataError, match=r"val/dog/big.png \(more than 0.1 megapixels\)"):
        list(eval_batches(build(tree, max_megapixels=0.1).val, 5))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 20_000), (20_000, 1)])
def test_tiny_images_and_strips(tree, size):
    Image.new("RGB", size, (255, 0, 0)).save(tree / "val/dog/odd.png")
    for number in range(3):
        Image.new("RGB", size, (255, 0, 0)).save(tree / f"train/dog/odd{number}.png")
    bundle = build(tree, augment=AugmentSection(scale_min=0.01))
    assert next(eval_batches(bundle.val, 100)).inputs.shape == (13, 3, 32, 32)
    for epoch in range(5):
        list(train_batches(bundle.train, batch_size=9, seed=0, epoch=epoch))
    assert len(bundle.train.bad_images) == 0


def test_a_crop_of_a_tiny_image_is_never_empty():
    """timm gives black where the crop rounds to no pixel."""
    augment = AugmentSection(scale_min=0.01)
    transform = TransformSpec((8, 8), (0.0,) * 3, (1.0,) * 3, 3, "bilinear", 0.9, augment=augment).build()
    for width, height in [(1, 1), (2, 1), (1, 9)]:
        for _ in range(50):
            image = transform(Image.new("RGB", (width, height), (255, 0, 0)))
            assert image[0].min() == 1
            assert image[1:].max() == 0


@given(st.integers(1, 60), st.integers(60, 3000), st.booleans(), st.sampled_from([(8, 8), (8, 16), (24, 8)]))
def test_only_the_centre_of_a_strip_is_resized(short, long, is_wide, size):
    ramp = Image.fromarray(np.linspace(0, 255, long).astype(np.uint8)[None, :].repeat(short, 0)).convert("RGB")
    image = ramp if is_wide else ramp.transpose(Image.Transpose.ROTATE_270)
    trimmed = _trim_strip(image, size)
    assert max(trimmed.size) <= 8 * 3 * min(image.size) + 1
    spec = TransformSpec(size, (0.0,) * 3, (1.0,) * 3, 3, "bilinear", 0.9, augment=None)
    whole = create_transform(input_size=(3, *size), crop_pct=0.9, mean=spec.mean, std=spec.std)(image)
    assert replace(spec.build(), transform=lambda image: image)(image).size == trimmed.size
    # Half a pixel of the source may be lost in rounding the centre.
    assert (spec.build()(image) - whole).abs().max() <= 2 / 255 + 1 / long


def test_transform_is_timms_own(tree):
    bundle = build(tree, img_size=(32, 48))
    expected = create_transform(input_size=(3, 32, 48), crop_pct=0.9, interpolation="bicubic")
    with Image.open(tree / bundle.val.sample_name(5)) as image:
        assert np.array_equal(bundle.val[5][0], expected(image.convert("RGB")))
