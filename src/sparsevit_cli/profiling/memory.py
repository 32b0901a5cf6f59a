"""Peak memory of a forward pass, and running out of it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsevit_cli.errors import ResourceError, is_out_of_memory
from sparsevit_cli.swin import remembered_tensors

from .device import synchronize
from .inputs import evaluating, uncompiled
from .workload import Workload

BYTES_PER_MB = 10**6
_MALLOC_SETTINGS = ((-1, 2**31 - 1), (-2, 2**28), (-4, 0))
"""M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX (glibc's malloc.h) for `reuse_freed_memory`."""


def reuse_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensors of this process; False where that is not possible.

    By default it gives large blocks back, and every forward of a dense Swin then waits for tens of thousands of pages
    to be mapped and zeroed anew. Without this a latency would depend on what the process did before, and dense models,
    whose maps are larger, would look slower than they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    return all(mallopt(number, value) == 1 for number, value in _MALLOC_SETTINGS)


def peak_memory_mb(workload: Workload) -> float:
    """Largest memory of one forward pass in megabytes (10^6 bytes), weights and inputs included.

    On CUDA what torch's allocator held at most (`max_memory_allocated`), less what others held before. Elsewhere
    the peak of the bytes of all live tensors, seen operator by operator: the same at every run, but blind to scratch
    space inside an operator, and a compiled model is taken as it was before torch.compile. Raises ResourceError.
    """
    model = workload.model
    with evaluating(model), memory_errors(str(workload)):
        own = (*model.parameters(), *model.buffers(), *workload.tensors)
        if workload.device.type == "cuda":
            workload.run()  # the first pass also allocates workspaces that stay
            before = torch.cuda.memory_allocated(workload.device)
            torch.cuda.reset_peak_memory_stats(workload.device)
            workload.run()
            synchronize(workload.device)
            grown = torch.cuda.max_memory_allocated(workload.device) - before
            return float(grown + _bytes((*own, *remembered_tensors(model)))) / BYTES_PER_MB
        model = uncompiled(model)
        workload = workload.of(model)
        workload.run()  # the first pass also makes what the model remembers
        with _LiveBytes() as live:
            for tensor in (*own, *remembered_tensors(model)):
                live.add(tensor)
            workload.run()
        peak: int = live.peak
        return peak / BYTES_PER_MB


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators returned and nobody has let go of yet: `now` and `peak`.

    `sees_kernels` tells a sparse Swin that it may run as it does unwatched.
    """

    sees_kernels = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        weakref.finalize(storage, self._free, storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _free(self, nbytes: int) -> None:
        self.now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn torch's and Python's out-of-memory errors into a ResourceError about `what`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        do = "Choose a smaller batch or image, or another device; a measurement never changes the batch by itself."
        raise ResourceError(what, reason, do) from error
