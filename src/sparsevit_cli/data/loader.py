"""Batches in a known order, from any number of processes, the same to the last bit."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from multiprocessing import queues, util
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from sparsevit_cli.errors import DataError, SparseViTError, in_one_line, pass_on
from sparsevit_cli.seeding import derive_seed
from sparsevit_cli.stopping import HANG_UP

from .images import UnreadableImageError
from .source import Batch, Source, shorten, with_reasons
from .splits import shuffled

MAX_WAIT_SECONDS = 600.0
"""Longest wait for one batch, where nothing else is asked for."""

_LOOK_EVERY_SECONDS = 0.5
_TELL_AFTER_SECONDS = 30.0
_FEWER = "Lower data.workers (0 needs no such process); memory or shared memory may have run out."
_LONGEST_TEMPORARY_FOLDER = 70  # bytes; with the name of a socket in it at most 104 (macOS), 108 (Linux)
_log = logging.getLogger(__name__)

Check = Callable[[], object]
"""Called while a batch is awaited: something true ends the batches, and it may raise."""


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Order of `n` samples in an epoch: a permutation, a function of the arguments alone."""
    return shuffled(n, derive_seed(seed, "order", epoch)).tolist()  # type: ignore[no-any-return]


def num_batches(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Batches of an epoch over `n` samples."""
    return n // batch_size if drop_last else -(-n // batch_size)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start: int = 0,
    workers: int = 0,
    drop_last: bool = True,
    max_wait_seconds: float = MAX_WAIT_SECONDS,
    check: Check = lambda: False,
    part: int = 0,
    parts: int = 1,
) -> Iterator[Batch]:
    """Batches `start`, `start + 1` ... of an epoch, none before `start` decoded.

    Batch k starts at position k * batch_size of `epoch_order` and takes the next `batch_size` readable samples,
    wrapping around: a place left by an unreadable image goes to the sample that would open the next batch (and
    still does). So every batch is full, and is a function of (seed, epoch, k) whatever was read before it.
    Of `parts` processes that share each batch, number `part` gets its part as if that were a batch of its own.
    Unreadable images are counted in `source.bad_images`. Raises DataError: too many of them, fewer samples than
    one batch, a loader process that died or delivers nothing.
    """
    total = num_batches(len(source), batch_size, drop_last)
    if total == 0:
        got = f"{len(source)} images, fewer than one batch of {batch_size}"
        raise DataError("data: training images", got, "Lower batch_size or add images.")
    assert 0 <= start <= total, f"batch {start} of {total}"
    order = epoch_order(len(source), seed, epoch)
    fetch = _TrainFetch(source, order, batch_size // parts, seed, epoch)
    numbers = range(start * parts + part, total * parts, parts)
    return _train_batches(fetch, numbers, workers, max_wait_seconds, check)


def eval_batches(
    source: Source,
    batch_size: int,
    workers: int = 0,
    subset: Sequence[int] | None = None,
    max_wait_seconds: float = MAX_WAIT_SECONDS,
    check: Check = lambda: False,
) -> Iterator[Batch]:
    """Every sample of `subset` (default: all) exactly once, in order.

    Raises DataError at an unreadable image, which is never left out or replaced, or where a loader process died or
    delivers nothing.
    """
    for fetched in _in_order(_Fetch, source, batch_size, workers, subset, max_wait_seconds, check):
        if fetched.bad:
            got = f"cannot be read: {with_reasons(fetched.bad)}"
            raise DataError("data: evaluation images", got, "Repair or remove them; evaluation leaves no image out.")
        assert fetched.batch is not None
        yield fetched.batch


class Checked(NamedTuple):
    """The samples of a batch that can be read (None if none can), and (name, reason) of those that cannot."""

    batch: Batch | None
    bad: tuple[tuple[str, str], ...]


def checked_batches(
    source: Source,
    batch_size: int,
    workers: int = 0,
    subset: Sequence[int] | None = None,
    max_wait_seconds: float = MAX_WAIT_SECONDS,
    check: Check = lambda: False,
) -> Iterator[Checked]:
    """As `eval_batches`, but what cannot be read is told, whatever is wrong with it, and nothing else is left out.

    Raises DataError if a loader process died or delivers nothing.
    """
    for fetched in _in_order(_CheckFetch, source, batch_size, workers, subset, max_wait_seconds, check):
        yield Checked(fetched.batch, fetched.bad)


def _in_order(
    fetch: type[_Fetch],
    source: Source,
    batch_size: int,
    workers: int,
    subset: Sequence[int] | None,
    max_wait_seconds: float,
    check: Check,
) -> Iterator[_Fetched]:
    """Every sample of `subset` (None: all) exactly once, in batches that `fetch` makes."""
    order = list(range(len(source)) if subset is None else subset)
    assert len(set(order)) == len(order), "a sample is in the subset twice"
    total = num_batches(len(order), batch_size, drop_last=False)
    return _run(fetch(source, order, batch_size), range(total), workers, max_wait_seconds, check)


class _Fetched(NamedTuple):
    """What a loader process sends: failures travel as values, since an exception would arrive as text."""

    batch: Batch | None
    bad: tuple[tuple[str, str], ...]
    error: SparseViTError | None = None


class _Fetch(Dataset[_Fetched]):
    """Batches by number, of the samples in `order`."""

    def __init__(self, source: Source, order: list[int], batch_size: int) -> None:
        self.source, self.order, self.batch_size = source, order, batch_size

    def samples(self, number: int) -> list[int]:
        """The samples of a batch, where all can be read."""
        return self.order[number * self.batch_size : (number + 1) * self.batch_size]

    def __getitem__(self, number: int) -> _Fetched:
        samples = self.samples(number)
        return _take(self.source, samples, len(samples))


class _CheckFetch(_Fetch):
    """Every sample is tried, however many cannot be read."""

    def __getitem__(self, number: int) -> _Fetched:
        indices, samples, bad = [], [], []
        for index in self.samples(number):
            try:
                sample = self.source[index]
            except DataError as error:
                bad.append((error.what, error.got))
            except Exception as error:  # a source of the user's may raise anything
                pass_on(error)
                bad.append((self.source.sample_name(index), in_one_line(error)))
            else:
                indices.append(index)
                samples.append(sample)
        if not indices:
            return _Fetched(None, tuple(bad))
        try:
            return _Fetched(Batch(*self.source.collate(samples, None), torch.tensor(indices)), tuple(bad))
        except Exception as error:
            pass_on(error)
            reason = f"makes no batch with its neighbours ({in_one_line(error)})"
            return _Fetched(None, (*bad, *((self.source.sample_name(index), reason) for index in indices)))


class _TrainFetch(_Fetch):
    def __init__(self, source: Source, order: list[int], batch_size: int, seed: int, epoch: int) -> None:
        super().__init__(source, order, batch_size)
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, number: int) -> _Fetched:
        self.source.set_epoch(self.epoch)  # here, so that two iterators over one source do not disturb each other
        n, first = len(self.order), number * self.batch_size
        candidates = (self.order[position % n] for position in range(first, first + n))
        drawn = derive_seed(self.seed, "collate", self.epoch, number)
        return _take(self.source, candidates, len(self.samples(number)), drawn)


def _take(source: Source, candidates: Iterable[int], wanted: int, seed: int | None = None) -> _Fetched:
    """The first `wanted` readable candidates as a batch, and the unreadable ones met on the way."""
    indices: list[int] = []
    samples: list[Any] = []
    bad: list[tuple[str, str]] = []
    for index in candidates:
        try:
            sample = source[index]
        except UnreadableImageError as error:
            bad.append((error.what, error.got))
            if source.bad_images is not None and source.bad_images.too_many(len(bad)):
                break  # the whole disk may be gone: do not try every image
            continue
        except SparseViTError as error:
            return _Fetched(None, tuple(bad), error)
        indices.append(index)
        samples.append(sample)
        if len(indices) == wanted:
            break
    if not indices:
        return _Fetched(None, tuple(bad))
    return _Fetched(Batch(*source.collate(samples, seed), torch.tensor(indices)), tuple(bad))


def _train_batches(
    fetch: _TrainFetch, numbers: range, workers: int, max_wait_seconds: float, check: Check
) -> Iterator[Batch]:
    for fetched in _run(fetch, numbers, workers, max_wait_seconds, check):
        if fetched.bad:
            if fetch.source.bad_images is None:
                raise UnreadableImageError(*fetched.bad[0], "Repair or remove it.")
            fetch.source.bad_images.note(fetched.bad)
        if fetched.batch is None:
            got = f"none of {len(fetched.bad)} tried can be read"
            raise DataError("data: training images", got, "Check that the folder can still be read.")
        yield fetched.batch


def _run(fetch: _Fetch, numbers: range, workers: int, max_wait_seconds: float, check: Check) -> Iterator[_Fetched]:
    """`fetch[number]` for every number, in order, from `workers` processes; fewer where `check` ends it."""
    # No name for the generator: a traceback would keep it, and its processes, alive.
    for fetched in (
        _run_in_processes(fetch, numbers, workers, max_wait_seconds, check)
        if workers
        else (fetch[number] for number in numbers)
    ):
        if fetched.error is not None:
            raise fetched.error
        yield fetched


def _run_in_processes(
    fetch: _Fetch, numbers: range, workers: int, max_wait_seconds: float, check: Check
) -> Iterator[_Fetched]:
    """A thread takes the batches from the processes, since nothing interrupts the taking: not even a signal."""
    iterator = _started(fetch, numbers, workers)
    processes: list[BaseProcess] = iterator._workers
    taker = futures.ThreadPoolExecutor(1, "batches")
    arriving: futures.Future[_Fetched] | None = None
    is_over = threading.Event()
    try:
        for number in numbers:
            arriving = taker.submit(_next, iterator, is_over)
            if not _arrived(arriving, processes, fetch, number, max_wait_seconds, check):
                return
            yield _arrived_whole(arriving)
    finally:
        is_over.set()
        taker.shutdown(wait=False)
        if arriving is not None and not arriving.done():  # a stopped process takes no other signal
            _kill(processes)
        # torch would end the processes with the last reference, which an exception's traceback may hold.
        iterator._shutdown_workers()
        _kill(processes)  # Python waits for them without limit when it exits


def _next(iterator: Iterator[_Fetched], is_over: threading.Event) -> _Fetched:
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if is_over.is_set() or not str(error).startswith("DataLoader timed out"):
                raise


def _started(fetch: _Fetch, numbers: range, workers: int) -> Any:
    """torch's iterator. A dead process is noticed while waiting, not by a signal in the middle of a step."""
    _choose_short_temporary_folder()
    loader = DataLoader(
        fetch,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # one item, not a list: batch_size is None
        worker_init_fn=_prepare_process,
        timeout=1,  # after which `_next` looks whether anybody still waits
        generator=torch.Generator(),  # DataLoader draws a number; not from the global generator
    )
    previous = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        iterator = iter(loader)
    except (OSError, RuntimeError) as error:
        pass_on(error)
        got = f"{workers} loader processes cannot be started ({in_one_line(error)})"
        raise DataError("data.workers", got, _FEWER) from error
    if previous is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, previous)
    return iterator


def _choose_short_temporary_folder() -> None:
    """Loader processes answer on sockets in a temporary folder, and the system limits the length of such a path.

    multiprocessing remembers its folder when it is first asked for, and loader processes inherit it.
    """
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMPORARY_FOLDER and os.path.isdir("/tmp"):
        chosen, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            util.get_temp_dir()
        finally:
            tempfile.tempdir = chosen


def _arrived(
    arriving: futures.Future[_Fetched],
    processes: Sequence[BaseProcess],
    fetch: _Fetch,
    number: int,
    max_wait_seconds: float,
    check: Check,
) -> bool:
    """Wait for batch `number`. False where `check` ends the waiting. Raises DataError where it cannot arrive."""
    began, is_told = time.monotonic(), False
    while not futures.wait([arriving], _LOOK_EVERY_SECONDS).done:
        if check():
            return False
        if dead := [process for process in processes if not process.is_alive()]:
            ends = ", ".join(f"process {process.pid} ended with {_ending(process)}" for process in dead)
            raise DataError("data.workers", f"a loader process died ({ends})", _FEWER)
        waited = time.monotonic() - began
        if waited < min(_TELL_AFTER_SECONDS, max_wait_seconds) or (is_told and waited < max_wait_seconds):
            continue
        names = shorten([fetch.source.sample_name(sample) for sample in fetch.samples(number)], 3)
        got = f"no batch for {waited:.0f} s, and the {len(processes)} loader processes live; awaited are {names}"
        if waited >= max_wait_seconds:
            do = "Look whether these files can be read; else lower data.workers, or raise data.max_wait_seconds."
            raise DataError("data.workers", got, do)
        is_told = True
        _log.warning("%s. The longest wait is data.max_wait_seconds, %g s.", got, max_wait_seconds)
    return True


def _arrived_whole(arriving: futures.Future[_Fetched]) -> _Fetched:
    try:
        return arriving.result()
    except Exception as error:
        pass_on(error)
        if str(error).startswith("Caught"):  # torch's word for what a source raised; all else went wrong on the way
            raise
        got = f"a loader process died, or its batch cannot be taken ({in_one_line(error)})"
        raise DataError("data.workers", got, _FEWER) from error


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    try:
        return signal.Signals(-(code or 0)).name
    except ValueError:
        return f"exit code {code}"


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _as_it_is(fetched: _Fetched) -> _Fetched:
    return fetched


def _prepare_process(worker: int) -> None:
    """Ctrl-C, SIGTERM and SIGHUP reach the whole process group; the training process decides when to stop and save."""
    queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if HANG_UP is not None:
        signal.signal(HANG_UP, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _send_error(queue: Any, error: Exception, item: tuple[int, _Fetched]) -> None:
    """In place of multiprocessing's hook, which prints a batch that cannot be sent, and forgets it."""
    got = f"a loader process cannot send its batch ({in_one_line(error)})"
    queue.put((item[0], _Fetched(None, (), DataError("data.workers", got, _FEWER))))


def _end_with_parent() -> None:
    """Take SIGTERM only from the training process, which ends its loader processes by it when it exits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
