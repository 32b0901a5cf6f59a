"""Peak memory against sums by hand, and out-of-memory errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from sparsevit_cli.errors import ResourceError
from sparsevit_cli.profiling import memory
from sparsevit_cli.profiling.memory import peak_memory_mb
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.swin import remembered_tensors, set_sparsity, sparsify_
from tiny import tiny_swin


def work(model: nn.Module, x: Tensor) -> Workload:
    return Workload(model, x, image_size=(0, 0), batch=len(x))


def test_peak_is_weights_input_and_the_two_largest_neighbours() -> None:
    model = nn.Sequential(*(nn.ReLU() for _ in range(10)), nn.Linear(1000, 10, bias=False))
    x = torch.ones(500, 1000)  # 2 MB; a chain of ReLUs holds two maps besides the input
    assert peak_memory_mb(work(model, x)) == pytest.approx(0.04 + 2 + 2 * 2)


class Keeps(nn.Module):
    """Holds on to what it computed for so many steps; views and in-place work need no memory."""

    def forward(self, x: Tensor) -> Tensor:
        kept = [x * n for n in range(3)]
        return sum(kept, start=x.view(-1).add_(0).view_as(x))


def test_kept_tensors_count_and_views_do_not() -> None:
    x = torch.ones(250_000)  # 1 MB
    assert peak_memory_mb(work(Keeps(), x)) == pytest.approx(1 + 3 + 2)  # input, kept, running sum and the next one


def test_pruning_lowers_the_peak_and_it_repeats_exactly() -> None:
    model = sparsify_(tiny_swin(img_size=224, depths=(2, 1, 1, 1), num_classes=1000)).train()
    x = torch.randn(2, 3, 224, 224)  # large maps: the kernels' packed weights and scratch weigh little
    dense = peak_memory_mb(work(model, x))
    assert dense == peak_memory_mb(work(model, x))
    set_sparsity(model, 0.8)
    sparse = peak_memory_mb(work(model, x))
    assert sparse < 0.8 * dense
    assert peak_memory_mb(work(model, x)) == sparse
    assert model.training


def test_what_blocks_remember_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparsify_(tiny_swin(img_size=112, depths=(2, 1, 1, 1), num_classes=1000))
    set_sparsity(model, 0.5)
    x = torch.randn(1, 3, 112, 112)
    peak = peak_memory_mb(work(model, x))
    held = sum(tensor.nbytes for tensor in remembered_tensors(model)) / 1e6
    monkeypatch.setattr(memory, "remembered_tensors", lambda model: ())
    assert held > 0
    assert peak_memory_mb(work(model, x)) == pytest.approx(peak - held)


class OfDict(nn.Module):
    def forward(self, inputs: dict[str, list[Tensor]]) -> list[Tensor]:
        return [x + 1 for x in inputs["views"]]


def test_all_tensors_of_the_inputs_count() -> None:
    views = [torch.ones(250_000), torch.ones(250_000)]  # 1 MB each
    workload = Workload(OfDict(), {"views": views}, image_size=(500, 500), batch=1)
    assert peak_memory_mb(workload) == pytest.approx(2 + 2)


class Huge(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_empty(10**15)


def test_running_out_of_memory_is_exit_7() -> None:
    with pytest.raises(ResourceError, match=r"forward of \(1, 3, 4, 4\)") as caught:
        peak_memory_mb(work(Huge(), torch.zeros(1, 3, 4, 4)))
    assert caught.value.exit_code == 7


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_mapped_once() -> None:
    code = (
        "import resource, sys, torch\n"
        "from sparsevit_cli.profiling.memory import reuse_freed_memory\n"
        "assert sys.argv[1] == 'no' or reuse_freed_memory()\n"
        "def work():\n    for _ in range(10): torch.ones(16_000_000)\n"
        "work()\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\nwork()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, told], capture_output=True, text=True, check=True).stdout)
        for told in ("yes", "no")
    )
    assert kept < given_back / 10  # fewer page faults than one of the ten tensors costs, whatever the size of a page
