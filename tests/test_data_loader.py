"""Batches: order, resume, workers, unreadable samples, dead processes."""

import contextlib
import errno
import hashlib
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsevit_cli.config.classification import AugmentSection
from sparsevit_cli.data import epoch_order, eval_batches, fixed_subset, loader, num_batches, train_batches
from sparsevit_cli.data.images import UnreadableImageError
from sparsevit_cli.data.source import BadImages, Source
from sparsevit_cli.data.splits import carve
from sparsevit_cli.errors import DataError, StoppedError
from test_data_folder import build, make_example_tree


class Numbers(Source):
    """Sample i of epoch e is the image [[[i, e]]] with label i; some cannot be read."""

    bad_images = None
    image_size = (1, 2)

    def __init__(self, length, unreadable=(), max_bad_fraction=1.0):
        self.length, self.unreadable, self.epoch = length, frozenset(unreadable), 0
        self.bad_images = BadImages(length, max_bad_fraction)
        self.read = []

    def resized(self, size):
        return self

    def fingerprint(self):
        return "numbers"

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.unreadable:
            raise UnreadableImageError(f"sample {index}", "torn", "Mend it.")
        return torch.tensor([[[index, self.epoch]]], dtype=torch.float32), index

    def set_epoch(self, epoch):
        self.epoch = epoch

    def sample_name(self, index):
        return f"sample {index}"


def indices(batches):
    return [batch.indices.tolist() for batch in batches]


def flat(lists):
    return [item for items in lists for item in items]


@given(st.integers(0, 300), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_epoch_order_is_a_permutation_of_its_own(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert order == epoch_order(n, seed, epoch)
    if n > 20:
        assert order != epoch_order(n, seed, epoch + 1)
        assert order != epoch_order(n, seed + 1, epoch)


def test_epoch_order_is_pinned():
    """A resumed run must find the order that an older version wrote its checkpoint in."""
    assert epoch_order(8, seed=0, epoch=0) == [4, 7, 2, 3, 1, 5, 0, 6]


@given(st.integers(1, 60), st.integers(1, 10), st.sets(st.integers(0, 59)), st.booleans(), st.data())
def test_training_batches(n, batch_size, unreadable, drop_last, data):
    epoch = data.draw(st.integers(0, 5))
    source = Numbers(n, unreadable)
    readable = set(range(n)) - unreadable
    total = num_batches(n, batch_size, drop_last)
    arguments = {"batch_size": batch_size, "seed": 3, "epoch": epoch, "drop_last": drop_last}
    if total == 0:
        with pytest.raises(DataError, match="fewer than one batch"):
            train_batches(source, **arguments)
        return
    if not readable:
        with pytest.raises(DataError, match="can be read"):
            list(train_batches(source, **arguments))
        return
    batches = list(train_batches(source, **arguments))
    assert len(batches) == total
    for number, batch in enumerate(batches):
        wanted = min(batch_size, n - number * batch_size)
        assert len(set(batch.indices.tolist())) == min(wanted, len(readable))
        assert torch.equal(batch.targets, batch.indices)
        assert torch.equal(batch.inputs[:, 0, 0, 0].long(), batch.indices)
        assert set(batch.inputs[:, 0, 0, 1].tolist()) == {epoch}
    if not unreadable & set(range(n)):
        assert flat(indices(batches)) == epoch_order(n, 3, epoch)[: total * batch_size]
    if not drop_last:
        assert set(flat(indices(batches))) == readable

    start = data.draw(st.integers(0, total))
    resumed = Numbers(n, unreadable)
    assert indices(train_batches(resumed, start=start, **arguments)) == indices(batches)[start:]
    if not unreadable:
        assert resumed.read == epoch_order(n, 3, epoch)[start * batch_size : total * batch_size]


def test_epochs_do_not_disturb_each_other():
    source = Numbers(8)
    first = train_batches(source, batch_size=2, seed=0, epoch=1)
    second = train_batches(source, batch_size=2, seed=0, epoch=2)
    for one, two in zip(first, second, strict=True):
        assert set(one.inputs[..., 1].flatten().tolist()) == {1}
        assert set(two.inputs[..., 1].flatten().tolist()) == {2}


def test_too_many_unreadable_stops_early_and_lists_ten():
    source = Numbers(1000, unreadable=range(1000), max_bad_fraction=0.014)
    with pytest.raises(DataError, match=r"15 of 1000, above data.max_bad_fraction 0.014: .* and 5 more\."):
        list(train_batches(source, batch_size=10, seed=0, epoch=0))
    assert len(source.read) == 15


@given(st.integers(0, 25), st.integers(1, 9), st.data())
def test_evaluation_counts_every_sample_once_in_order(n, batch_size, data):
    subset = data.draw(st.none() | st.permutations(range(n)).map(lambda order: order[: n // 2]))
    batches = indices(eval_batches(Numbers(n), batch_size, subset=subset))
    assert flat(batches) == list(range(n) if subset is None else subset)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_evaluation_in_processes():
    assert indices(eval_batches(Numbers(7), 3, workers=2)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert indices(eval_batches(Numbers(7), 3, workers=2, subset=[5, 1, 2, 6])) == [[5, 1, 2], [6]]


def test_evaluation_names_unreadable_samples():
    with pytest.raises(DataError, match=r"sample 3 \(torn\), sample 4 \(torn\)"):
        list(eval_batches(Numbers(9, unreadable=(3, 4, 8)), 5))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    augment = AugmentSection(auto_augment="rand-m9-mstd0.5", random_erasing=0.5)
    return build(make_example_tree(tmp_path_factory.mktemp("data")), img_size=24, augment=augment)


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_workers_and_resume_change_no_bit_and_no_global_generator(bundle):
    before = global_states()
    runs = [
        list(train_batches(bundle.train, batch_size=6, seed=5, epoch=2, workers=workers, start=start))
        for workers, start in ((0, 0), (2, 0), (0, 2), (2, 2))
    ]
    assert global_states() == before
    assert len(runs[0]) == 4
    for run in runs[1:]:
        for batch, expected in zip(reversed(run), reversed(runs[0]), strict=False):
            assert torch.equal(batch.inputs, expected.inputs)
            assert torch.equal(batch.targets, expected.targets)
            assert torch.equal(batch.indices, expected.indices)
    assert [len(run) for run in runs] == [4, 4, 2, 2]


def test_augmentation_follows_the_sample_not_the_batch(bundle):
    drawn = {}
    for batch_size in (4, 9):
        for batch in train_batches(bundle.train, batch_size=batch_size, seed=5, epoch=1, drop_last=False):
            for index, image in zip(batch.indices.tolist(), batch.inputs, strict=True):
                assert torch.equal(drawn.setdefault(index, image), image)


def test_sources_travel_by_pickle(bundle):
    twin = pickle.loads(pickle.dumps(bundle.train))
    assert torch.equal(twin[3][0], bundle.train[3][0])
    assert twin.fingerprint() == bundle.train.fingerprint()


class Deadly(Numbers):
    def __getitem__(self, index):
        if index == 5:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_dead_loader_process_is_a_data_error():
    with pytest.raises(DataError, match="loader process died") as caught:
        list(eval_batches(Deadly(20), 2, workers=1))
    assert caught.value.what == "data.workers"


def test_a_dead_loader_process_is_noticed_between_batches_not_inside_a_step():
    batches = eval_batches(Deadly(20), 2, workers=2)
    next(batches)
    time.sleep(1.0)  # a step; the process of sample 5 dies meanwhile, and no exception may come here
    with pytest.raises(DataError, match="loader process died"):
        list(batches)


def test_errors_of_the_source_itself_pass_through():
    class Broken(Numbers):
        def __getitem__(self, index):
            raise FileNotFoundError("gone")

    for workers in (0, 1):
        with pytest.raises(FileNotFoundError, match="gone"):
            list(eval_batches(Broken(4), 2, workers))


def test_signals_to_the_group_do_not_kill_loader_processes():
    class Slow(Numbers):
        def __getitem__(self, index):
            if index == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    assert flat(indices(eval_batches(Slow(6), 2, workers=1))) == list(range(6))


def stopped_run(lines):
    os.setsid()
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    batches, left_open = eval_batches(Numbers(9), 2, workers=2), eval_batches(Numbers(9), 2, workers=1)
    next(batches), next(left_open)
    lines.send("ready")
    while not stop:
        time.sleep(0.01)
    lines.send(indices(batches))
    sys.exit(75)  # left_open is still open


def test_sigterm_to_the_group_leaves_loading_intact_and_the_process_can_exit():
    context = torch.multiprocessing.get_context("fork")
    lines, far_end = context.Pipe(duplex=False)
    run = context.Process(target=stopped_run, args=(far_end,))
    run.start()
    far_end.close()
    assert lines.recv() == "ready"
    os.killpg(run.pid, signal.SIGTERM)
    assert lines.recv() == [[2, 3], [4, 5], [6, 7], [8]]
    run.join(60)
    assert run.exitcode == 75


def test_leaving_early_ends_the_processes():
    batches = eval_batches(Numbers(100), 2, workers=2)
    next(batches)
    assert len(torch.multiprocessing.active_children()) == 2
    batches.close()
    assert not torch.multiprocessing.active_children()


def test_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(indices(eval_batches(Numbers(5), 2, workers=1))))
    thread.start()
    thread.join()
    assert found == [[0, 1], [2, 3], [4]]


# Processes that live and deliver nothing


class Stuck(Numbers):
    """From sample `first` on, each process does `how` before it reads a sample."""

    def __init__(self, length, how, first=0):
        super().__init__(length)
        self.how, self.first = how, first

    def __getitem__(self, index):
        if index >= self.first:
            self.how()
        return super().__getitem__(index)


def read_a_pipe(path):
    os.mkfifo(path)
    return path.read_bytes


def stop_myself():
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("kind", ["sleeps", "reads a pipe", "is stopped", "deaf to signals"])
def test_a_batch_is_awaited_with_a_limit(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loader, "_TELL_AFTER_SECONDS", 0.3)

    def deaf():
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        time.sleep(1000)

    how = {
        "sleeps": lambda: time.sleep(1000),
        "reads a pipe": read_a_pipe(tmp_path / "pipe"),
        "is stopped": stop_myself,
        "deaf to signals": deaf,
    }[kind]
    with pytest.raises(DataError, match=r"no batch for 1 s, .* processes live; awaited are sample \d, ") as caught:
        list(eval_batches(Stuck(6, how, first=2), 2, workers=2, max_wait_seconds=1.0))
    assert caught.value.what == "data.workers"
    assert "data.max_wait_seconds" in caught.value.do
    assert ["awaited are sample" in record.getMessage() for record in caplog.records] == [True]
    assert not torch.multiprocessing.active_children()


def test_a_process_stopped_while_its_batch_is_taken():
    """The batch is under way, and its memory is handed over by a process that no longer answers."""
    batches = eval_batches(Numbers(40), 2, workers=2, max_wait_seconds=1.0)
    next(batches)
    time.sleep(0.3)
    for process in torch.multiprocessing.active_children():
        os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="no batch for 1 s"):
        list(batches)
    assert not torch.multiprocessing.active_children()


def test_signals_count_while_a_batch_is_awaited():
    arrived = []
    previous = signal.signal(signal.SIGTERM, lambda *_: arrived.append(1))
    try:
        batches = train_batches(
            Stuck(6, stop_myself), batch_size=2, seed=0, epoch=0, workers=1, check=lambda: bool(arrived)
        )
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert list(batches) == []
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert arrived
    assert not torch.multiprocessing.active_children()


def test_what_check_raises_passes():
    def check():
        raise StoppedError("evaluate", "SIGTERM arrived", "Type it again.", interrupted=False)

    with pytest.raises(StoppedError):
        list(eval_batches(Stuck(6, stop_myself), 2, workers=1, check=check))
    assert not torch.multiprocessing.active_children()


def test_a_long_temporary_folder(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delitem(torch.multiprocessing.current_process()._config, "tempdir", raising=False)
    assert indices(eval_batches(Numbers(4), 2, workers=2, max_wait_seconds=5.0)) == [[0, 1], [2, 3]]
    assert tempfile.gettempdir() == str(long)


@pytest.mark.parametrize(
    "error",
    [
        OSError("AF_UNIX path too long"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
    ],
)
def test_a_batch_that_cannot_be_sent_is_told(error, monkeypatch):
    def refuse(descriptor):
        raise error

    monkeypatch.setattr("multiprocessing.reduction.DupFd", refuse)
    with pytest.raises(DataError, match="cannot send its batch") as caught:
        list(eval_batches(Numbers(4), 2, workers=1, max_wait_seconds=5.0))
    assert str(error).partition(" ")[0] in caught.value.got


def test_a_batch_that_cannot_be_taken_is_told(monkeypatch):
    batches = eval_batches(Numbers(40), 2, workers=1)
    next(batches)

    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_storage_fd", refuse)
    monkeypatch.setattr("multiprocessing.resource_sharer._resource_sharer.get_connection", refuse)
    with pytest.raises(DataError, match="Too many open files"):
        list(batches)


def test_processes_that_cannot_be_started_are_told(monkeypatch):
    def refuse(_):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    with pytest.raises(DataError, match=r"2 loader processes cannot be started .*Resource temporarily unavailable"):
        list(eval_batches(Numbers(4), 2, workers=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_our_own_errors_arrive_as_themselves(workers):
    class Failing(Numbers):
        def __getitem__(self, index):
            raise DataError("disk", "it is gone", "Mount it.")

    with pytest.raises(DataError, match=r"disk: it is gone\. Mount it\."):
        list(eval_batches(Failing(4), 2, workers))


# Splits


@given(st.lists(st.tuples(st.text(), st.integers(0, 4)), unique_by=lambda pair: pair[0]), st.floats(0.01, 0.99))
def test_carve(pairs, fraction):
    keys, labels = [key for key, _ in pairs], np.array([label for _, label in pairs], dtype=np.int64)
    usable = np.array([len(key) != 1 for key in keys], dtype=bool)
    counts = np.bincount(labels[usable], minlength=5)
    if counts.max(initial=0) < 2:
        with pytest.raises(DataError, match="two usable images"):
            carve(keys, labels, fraction, usable)
        return
    kept, held_out = carve(keys, labels, fraction, usable)
    assert sorted([*kept, *held_out]) == list(range(len(keys)))
    assert usable[held_out].all()
    for label in np.flatnonzero(counts):
        taken = int((labels[held_out] == label).sum())
        assert taken < counts[label]
        assert taken >= min(1, counts[label] - 1)
        assert abs(taken - fraction * counts[label]) <= 1


def carved_class_by_class(keys, labels, fraction, usable):
    """What is held out, by looking through all labels for each class."""
    held_out = []
    for label in np.unique(labels):
        members = [at for at in range(len(keys)) if labels[at] == label and usable[at]]
        members.sort(key=lambda at: hashlib.sha256(keys[at].encode("utf-8", "surrogatepass")).digest()[:8])
        wanted = max(1, int(len(members) * fraction + 0.5))
        held_out += members[: min(wanted, len(members) - 1)] if members else []
    return sorted(held_out)


class Compared(np.ndarray):
    """Labels that count how often all of them are compared."""

    times = 0

    def __eq__(self, other):
        Compared.times += 1
        return np.asarray(self) == other

    __hash__ = None


@given(
    st.lists(st.tuples(st.text(), st.integers(-3, 40)), min_size=1, unique_by=lambda pair: pair[0]),
    st.floats(0.01, 0.99),
)
def test_each_class_is_carved_as_if_alone_and_labels_are_not_looked_through_for_it(pairs, fraction):
    keys, labels = [key for key, _ in pairs], np.array([label for _, label in pairs], dtype=np.int64)
    usable = np.array([len(key) != 1 for key in keys], dtype=bool)
    Compared.times = 0
    held_out = []
    with contextlib.suppress(DataError):
        held_out = carve(keys, labels.view(Compared), fraction, usable)[1].tolist()
    assert held_out == carved_class_by_class(keys, labels, fraction, usable)
    assert Compared.times <= 1


def test_a_new_image_moves_few_others_between_splits():
    keys = [f"train/cat/{number}.jpg" for number in range(200)]
    labels, usable = np.zeros(200, dtype=np.int64), np.ones(200, dtype=bool)
    _, held_out = carve(keys, labels, 0.1, usable)
    _, later = carve([*keys, "train/cat/new.jpg"], np.zeros(201, dtype=np.int64), 0.1, np.ones(201, dtype=bool))
    assert len(set(held_out) ^ set(later)) <= 2


@given(st.integers(1, 200), st.integers(1, 300), st.integers(0, 9))
def test_fixed_subset(length, samples, seed):
    subset = fixed_subset(length, samples, seed)
    assert subset == sorted(set(subset))
    assert len(subset) == min(length, samples)
    assert set(subset) <= set(range(length))
    assert subset == fixed_subset(length, samples, seed)
