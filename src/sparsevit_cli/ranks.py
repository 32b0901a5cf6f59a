"""Processes that train one model together, as torchrun and Slurm start them: what they agree on, what one does for all.

Gradients are summed after the backward pass, and not by DistributedDataParallel, which sums them in the middle of it.
So memory that runs out on one rank is noticed by all of them before anything was sent, and every rank halves its
micro-batch. A parameter without a gradient on some ranks (a detector's head that saw no box) needs no flag. The price
is that sending does not overlap with computing.

What decides goes over gloo on the CPU, in a few numbers; gradients go over NCCL on GPUs. One process alone sends
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .errors import ConfigError, PeerError, ThreePartError, in_one_line, pass_on
from .stopping import StopRequest

T = TypeVar("T")
E = TypeVar("E", bound=ThreePartError)

JOIN_WAIT = timedelta(minutes=10)
"""Longest wait for all processes to appear."""
WAIT = timedelta(days=1)
"""Longest wait for another process that lives: the others wait while the first one validates. One that has ended is
noticed at once, by its closed connection."""
BUCKET_BYTES = 32 * 2**20
"""Gradients that are sent in one piece."""


@dataclass(frozen=True)
class Ranks:
    """This process among `size` ones, on the device that is its own; `data` is the group that gradients go over.

    Every method but `share` and `shared` is called by all of them at the same place. They raise PeerError if another
    process has ended.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    data: Any = None

    @property
    def is_first(self) -> bool:
        """True of the one that writes, prints, holds locks and validates."""
        return self.rank == 0

    def share(self, batch_size: int, setting: str) -> int:
        """Images of a batch that are this rank's. Raises ConfigError if the batch cannot be divided."""
        if batch_size % self.size:
            nearest = max(1, round(batch_size / self.size)) * self.size
            got = f"{batch_size} images, which {self.size} processes cannot share"
            raise ConfigError(setting, got, f"Set it to a multiple of {self.size}, such as {nearest}.")
        return batch_size // self.size

    def shared(self, error: E) -> E:
        """An error that all ranks raise, so that the first one tells it."""
        error.is_told = not self.is_first
        return error

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, which alone does it; what ends it there ends all of them."""
        if self.size == 1:
            return work()
        if self.is_first:
            try:
                found = work()
            except BaseException as error:
                told = error if isinstance(error, ThreePartError) else _ended(in_one_line(error))
                with suppress(PeerError):
                    self._from_first((None, told))
                raise
            self._from_first((found, None))
            return found
        result, ended = self._from_first(None)
        if ended is not None:
            raise self.shared(ended)
        return result  # type: ignore[no-any-return]

    def _from_first(self, value: Any) -> Any:
        """The value of the first rank."""
        values = [value]
        with _peers():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gathered(self, *values: float) -> list[list[float]]:
        """The values of every rank, by rank."""
        if self.size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        with _peers():
            dist.all_gather(rows, own)
        return [row.tolist() for row in rows]

    def listed(self, value: T) -> list[T]:
        """A value of every rank, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with _peers():
                dist.all_gather_object(values, value)
        return values

    def stops(self, stop: StopRequest) -> bool:
        """True on all ranks if a signal arrived at one of them."""
        if self.size > 1:
            number = max(int(row[0]) for row in self.gathered(stop.number if stop.requested else 0))
            stop.elsewhere = number or None
        return stop.requested

    def sum_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every gradient becomes the sum of those of all ranks, to the same bits on each; one that none has stays."""
        if self.size == 1:
            return
        rows = self.gathered(*(parameter.grad is not None for parameter in parameters))
        gradients = []
        for parameter, there in zip(parameters, map(any, zip(*rows, strict=True)), strict=True):
            if there and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        with _peers():
            sent = [(bucket, *self._sum(bucket)) for bucket in _buckets(gradients)]
            for bucket, summed, arriving in sent:
                arriving.wait()
                for gradient, part in zip(bucket, summed.split([each.numel() for each in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))

    def _sum(self, bucket: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The sum that will be there once the second value was waited for."""
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        return flat, dist.all_reduce(flat, group=self.data, async_op=True)

    def refuse_differing(self, what: str, values: Mapping[str, object]) -> None:
        """Raise ConfigError on all ranks if one of the `values` is not the same on each."""
        first, *others = self.listed(dict(values))
        differing = sorted(name for name in values if any(each[name] != first[name] for each in others))
        if differing:
            got = f"its {self.size} processes differ in {', '.join(differing).replace('_', ' ')}"
            do = "Give all machines the same configuration, versions, data and run folder."
            raise self.shared(ConfigError(what, got, do))


def started_together() -> int:
    """How many processes the environment says work together. Raises ConfigError."""
    number = os.environ.get("WORLD_SIZE", "1")
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError("WORLD_SIZE", f"{number!r} is no number of processes", "Unset it, or start with torchrun.")
    return int(number)


@contextmanager
def joined(resolve: Callable[[], torch.device]) -> Iterator[Ranks]:
    """This process among those of torchrun's variables while the block runs; alone where there are none.

    `resolve` gives the configuration's device. Each process of a machine takes the GPU of its LOCAL_RANK. Raises
    ConfigError, PeerError.
    """
    size = started_together()
    if size == 1:
        yield Ranks()
        return
    device = resolve()
    here = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if here >= torch.cuda.device_count():
            got = f"process {here} of this machine has no GPU of its own; there are {torch.cuda.device_count()}"
            raise ConfigError("device", got, "Start as many processes as there are GPUs.")
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ConfigError("device", f"{device} cannot be shared by {size} processes", "Start one, or take cpu or cuda.")
    with _peers("the other processes did not appear"):
        _start()
        data = dist.new_group(backend="nccl", timeout=WAIT) if device.type == "cuda" else None
    try:
        yield Ranks(dist.get_rank(), size, device, data)
    finally:
        dist.destroy_process_group()


def _start() -> None:
    """Join the processes. After a restart by torchrun under names of its own: those of the dead are still there."""
    store, rank, size = next(rendezvous("env://", timeout=JOIN_WAIT))
    store = PrefixStore(f"sparsevit-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=WAIT)


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gradients of one type in pieces of BUCKET_BYTES."""
    buckets: list[list[Tensor]] = []
    filled: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for gradient in gradients:
        bucket, used = filled.get(gradient.dtype, ([], BUCKET_BYTES))
        if used >= BUCKET_BYTES:
            bucket, used = [], 0
            buckets.append(bucket)
        bucket.append(gradient)
        filled[gradient.dtype] = bucket, used + gradient.numel() * gradient.element_size()
    return buckets


@contextmanager
def _peers(got: str = "another process of it has ended, or cannot be reached") -> Iterator[None]:
    """Errors of torch.distributed as ours."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        pass_on(error)
        raise _ended(f"{got} ({in_one_line(error)})") from error


def _ended(got: str) -> PeerError:
    do = "Look for what that process tells. Start all of them again: they go on from the last checkpoint."
    return PeerError("the training", got, do)
