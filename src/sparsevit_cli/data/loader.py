"""Batches in a known order, from any number of processes, the same to the last bit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsevit_cli.errors import DataError
from sparsevit_cli.stopping import HANG_UP

from .images import UnreadableImageError
from .seeding import derive_seed
from .source import ImageSource, shorten
from .splits import shuffled


class Batch(NamedTuple):
    """Images (B, C, H, W) float32, labels (B,) int64, and the samples' numbers in their source (B,) int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Order of `n` samples in an epoch: a permutation, a function of the arguments alone."""
    return shuffled(n, derive_seed(seed, "order", epoch)).tolist()  # type: ignore[no-any-return]


def num_batches(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Batches of an epoch over `n` samples."""
    return n // batch_size if drop_last else -(-n // batch_size)


def train_batches(
    source: ImageSource,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    workers: int = 0,
    drop_last: bool = True,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches `start`, `start + 1` ... of an epoch, none before `start` decoded.

    Batch k starts at position k * batch_size of `epoch_order` and takes the next `batch_size` readable samples,
    wrapping around: a place left by an unreadable image goes to the sample that would open the next batch (and
    still does). So every batch is full, and is a function of (seed, epoch, k) whatever was read before it.
    Unreadable images are counted in `source.bad_images`. Raises DataError: too many of them, fewer samples than
    one batch, a loader process that died.
    """
    total = num_batches(len(source), batch_size, drop_last)
    if total == 0:
        got = f"{len(source)} images, fewer than one batch of {batch_size}"
        raise DataError("data: training images", got, "Lower batch_size or add images.")
    assert 0 <= start <= total, f"batch {start} of {total}"
    order = epoch_order(len(source), seed, epoch)
    return _train_batches(_TrainFetch(source, order, batch_size, epoch), range(start, total), workers, pin_memory)


def eval_batches(
    source: ImageSource,
    batch_size: int,
    workers: int = 0,
    subset: Sequence[int] | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Every sample of `subset` (default: all) exactly once, in order.

    Raises DataError at an unreadable image, which is never left out or replaced, or where a loader process died.
    """
    order = list(range(len(source)) if subset is None else subset)
    assert len(set(order)) == len(order), "a sample is in the subset twice"
    total = num_batches(len(order), batch_size, drop_last=False)
    for fetched in _run(_EvalFetch(source, order, batch_size), range(total), workers, pin_memory):
        if fetched.bad:
            listed = shorten([f"{name} ({reason})" for name, reason in fetched.bad])
            got = f"cannot be read: {listed}"
            raise DataError("data: evaluation images", got, "Repair or remove them; evaluation leaves no image out.")
        assert fetched.batch is not None
        yield fetched.batch


class _Fetched(NamedTuple):
    """What a loader process sends: failures travel as values, since an exception would arrive as text."""

    batch: Batch | None
    bad: tuple[tuple[str, str], ...]


class _TrainFetch(Dataset[_Fetched]):
    def __init__(self, source: ImageSource, order: list[int], batch_size: int, epoch: int) -> None:
        self.source, self.order, self.batch_size, self.epoch = source, order, batch_size, epoch

    def __getitem__(self, number: int) -> _Fetched:
        self.source.set_epoch(self.epoch)  # here, so that two iterators over one source do not disturb each other
        n, first = len(self.order), number * self.batch_size
        candidates = (self.order[position % n] for position in range(first, first + n))
        return _take(self.source, candidates, min(self.batch_size, n - first))


class _EvalFetch(Dataset[_Fetched]):
    def __init__(self, source: ImageSource, order: list[int], batch_size: int) -> None:
        self.source, self.order, self.batch_size = source, order, batch_size

    def __getitem__(self, number: int) -> _Fetched:
        first = number * self.batch_size
        samples = self.order[first : first + self.batch_size]
        return _take(self.source, samples, len(samples))


def _take(source: ImageSource, candidates: Iterable[int], wanted: int) -> _Fetched:
    """The first `wanted` readable candidates as a batch, and the unreadable ones met on the way."""
    indices: list[int] = []
    images: list[Tensor] = []
    labels: list[int] = []
    bad: list[tuple[str, str]] = []
    for index in candidates:
        try:
            image, label = source[index]
        except UnreadableImageError as error:
            bad.append((error.what, error.got))
            if source.bad_images is not None and source.bad_images.too_many(len(bad)):
                break  # the whole disk may be gone: do not try every image
            continue
        indices.append(index)
        images.append(image)
        labels.append(label)
        if len(indices) == wanted:
            break
    batch = Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices)) if indices else None
    return _Fetched(batch, tuple(bad))


def _train_batches(fetch: _TrainFetch, numbers: range, workers: int, pin_memory: bool) -> Iterator[Batch]:
    for fetched in _run(fetch, numbers, workers, pin_memory):
        if fetched.bad:
            if fetch.source.bad_images is None:
                raise UnreadableImageError(*fetched.bad[0], "Repair or remove it.")
            fetch.source.bad_images.note(fetched.bad)
        if fetched.batch is None:
            got = f"none of {len(fetched.bad)} tried can be read"
            raise DataError("data: training images", got, "Check that the folder can still be read.")
        yield fetched.batch


def _run(fetch: Dataset[_Fetched], numbers: range, workers: int, pin_memory: bool) -> Iterator[_Fetched]:
    """`fetch[number]` for every number, in order, from `workers` processes."""
    loader = DataLoader(
        fetch,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # one item, not a list: batch_size is None
        worker_init_fn=_outlive_signals,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # DataLoader draws a number; not from the global generator
    )
    iterator = _started(loader)
    try:
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:
        if workers == 0 or not _is_worker_crash(error):
            raise
        got = f"a loader process died ({error})"
        do = "Lower data.workers (0 needs no such process); memory or shared memory may have run out."
        raise DataError("data.workers", got, do) from error
    finally:
        # torch would end the processes with the last reference, which an exception's traceback may hold.
        if workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _started(loader: DataLoader[_Fetched]) -> Iterator[_Fetched]:
    """The loader's iterator. A dead process is noticed in its next(), not by a signal in the middle of a step."""
    previous = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    iterator = iter(loader)
    if previous is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, previous)
    return iterator


def _is_worker_crash(error: Exception) -> bool:
    """True for what torch raises where a process is gone, False for what a source raised (`Caught ... in`)."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return text.startswith(("DataLoader worker", "Pin memory thread"))
    return not text.startswith("Caught") and isinstance(error, (ConnectionError, EOFError, FileNotFoundError))


def _as_it_is(fetched: _Fetched) -> _Fetched:
    return fetched


def _outlive_signals(worker: int) -> None:
    """Ctrl-C, SIGHUP and SIGTERM reach the whole process group; the training process decides when to stop and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if HANG_UP is not None:
        signal.signal(HANG_UP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Take SIGTERM only from the training process, which ends its loader processes by it when it exits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
