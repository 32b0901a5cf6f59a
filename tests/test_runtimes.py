"""The contract of runtimes: a file gives what eager gives, on the threads asked for, or it is refused."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from noise import beside
from sparsevit_cli import runtimes
from sparsevit_cli.errors import CheckpointError, ConfigError, DataError, NonFiniteError, ResourceError, StoppedError
from sparsevit_cli.exporting import export_model, structured_images
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.runtimes import (
    RUNTIMES,
    Program,
    ProgramModule,
    precision_label,
    runtime,
    runtime_for,
    slow_in_int8,
)
from sparsevit_cli.runtimes.openvino import SignalStack, same_signal_stack
from sparsevit_cli.runtimes.runtime import Runtime
from sparsevit_cli.swin import set_sparsity, sparsify_
from sparsevit_cli.workflows import doctor
from sparsevit_cli.workflows.doctor import _told as told_of_runtime
from sparsevit_cli.workflows.doctor import examine, measured_twice, told_of_clock
from test_exporting import needs_onnx
from tiny import tiny_swin

SHAPE = (3, 64, 64)
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs sparsevit-cli[openvino]"
)
EACH = [
    pytest.param("torch", "model.pt2", id="torch"),
    pytest.param("onnxruntime", "model.onnx", id="onnxruntime", marks=needs_onnx),
    pytest.param("openvino", "model.onnx", id="openvino of onnx", marks=[needs_onnx, needs_openvino]),
    pytest.param("openvino", "model.xml", id="openvino", marks=[needs_onnx, needs_openvino]),
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    swin = tiny_swin(img_size=64, depths=(1, 2), window_size=4, always_partition=True)
    set_sparsity(sparsify_(swin), 0.5)
    return swin.eval()


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of `model` for each runtime that is installed."""
    folder = tmp_path_factory.mktemp("export")
    formats = ["pt2", *(["onnx"] if RUNTIMES["onnxruntime"].is_installed() else [])]
    export_model(model, folder, input_size=64, formats=formats, measure_ms=False)
    if "onnx" in formats and RUNTIMES["openvino"].is_installed():
        import openvino

        openvino.save_model(openvino.convert_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
    return folder


def images(batch: int) -> Tensor:
    return structured_images(SHAPE, batch, seed=7)


def eager(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch)
    return found


# -- outputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), EACH)
def test_outputs_are_eagers_at_any_batch_and_compiled_for_one(
    name: str, file: str, model: nn.Module, folder: Path
) -> None:
    program = runtime(name).load(folder / file)
    for batch in (1, 3, 2):
        (found,) = program.run(images(batch))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, eager(model, images(batch)), atol=1e-4, rtol=1e-4)
    fixed = runtime(name).load(folder / file, shape=(2, *SHAPE))
    torch.testing.assert_close(fixed.run(images(2))[0], eager(model, images(2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "file"), EACH)
def test_outputs_stay_as_they_are_when_the_next_batch_runs(name: str, file: str, folder: Path) -> None:
    """Runtimes reuse their memory; what was handed out must not be in it."""
    program = runtime(name).load(folder / file)
    (first,) = program.run(images(2))
    kept = first.clone()
    program.run(images(2).flip(0))
    assert torch.equal(first, kept)


@pytest.mark.parametrize(("name", "file"), EACH)
def test_a_program_tells_its_version_and_threads(name: str, file: str, folder: Path) -> None:
    program = runtime(name).load(folder / file)
    package = RUNTIMES[name].packages[0]
    assert (program.runtime, program.version) == (name, importlib.metadata.version(package))
    assert program.threads == torch.get_num_threads()
    assert program.activations == "fp32"


@pytest.mark.parametrize(("name", "file"), EACH)
def test_a_program_runs_on_the_threads_that_were_asked_for(name: str, file: str, folder: Path) -> None:
    """One thread takes no more CPU time than wall time."""
    if name == "torch":
        with pytest.raises(ConfigError, match=r"torch.*threads"):
            runtime(name).load(folder / file, threads=torch.get_num_threads() + 1)
    program = runtime(name).load(folder / file, threads=torch.get_num_threads() if name == "torch" else 1)
    batch = images(8)
    program.run(batch)
    before_cpu, before = time.process_time(), time.perf_counter()
    for _ in range(5):
        program.run(batch)
    spent, passed = time.process_time() - before_cpu, time.perf_counter() - before
    assert spent <= 1.2 * program.threads * passed + 0.05


SPINS = 0.01
"""CPU seconds that this process may take in 0.2 s after a run. onnxruntime's threads spin 0.03 unless told not to."""


@pytest.mark.parametrize(("name", "file"), EACH[1:])
def test_threads_do_not_spin_once_a_run_has_ended(name: str, file: str, folder: Path) -> None:
    """What is measured next, in another runtime, has all cores to itself."""
    program = runtime(name).load(folder / file, threads=2)
    spent = []
    for _ in range(5):
        program.run(images(8))
        before = time.process_time()
        time.sleep(0.2)
        spent.append(time.process_time() - before)
    assert statistics.median(spent) < SPINS


# -- precisions ---------------------------------------------------------------------------------------------------


def test_labels() -> None:
    assert precision_label("fp32", "fp32") == "fp32"
    assert precision_label("bf16", "bf16") == "bf16"
    assert precision_label("int8", "bf16") == "int8+bf16"


@needs_onnx
@needs_openvino
def test_bfloat16_is_computed_where_the_cpu_has_it(model: nn.Module, folder: Path) -> None:
    chosen = RUNTIMES["openvino"]
    if "bf16" not in chosen.activations():
        with pytest.raises(ConfigError, match="bf16: openvino on this CPU computes in fp32"):
            chosen.load(folder / "model.onnx", activations="bf16")
        return
    (found,) = chosen.load(folder / "model.onnx", activations="bf16").run(images(2))
    expected = eager(model, images(2))
    error = float((found - expected).abs().max() / expected.abs().max())
    assert 1e-5 < error < 0.2  # rounded, and not another model


@pytest.mark.parametrize("name", ["torch", pytest.param("onnxruntime", marks=needs_onnx)])
def test_bfloat16_is_refused_by_runtimes_that_do_not_compute_in_it(name: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"bf16: {name} on this CPU computes in fp32"):
        runtime(name).load(folder / "model.onnx", activations="bf16")


@needs_openvino
def test_a_cpu_without_bfloat16_is_not_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.openvino.OpenVino, "activations", lambda self: ("fp32",))
    assert RUNTIMES["openvino"].precisions() == ("fp32", "int8+fp32")
    with pytest.raises(ConfigError, match="bf16"):
        RUNTIMES["openvino"].check_activations("bf16")


@needs_openvino
def test_a_cpu_without_eight_bits_is_not_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.openvino, "_capabilities", lambda: ("FP32", "BF16"))
    assert RUNTIMES["openvino"].precisions() == ("fp32", "bf16")
    with pytest.raises(ConfigError, match=r"int8: openvino on this CPU computes in fp32 and bf16. Set here"):
        RUNTIMES["openvino"].check_int8("here")
    monkeypatch.setattr(runtimes.openvino, "_capabilities", lambda: ("FP32", "INT8"))
    assert RUNTIMES["openvino"].precisions() == ("fp32", "int8+fp32")
    with pytest.raises(ConfigError, match="it would emulate bf16, slower than fp32"):
        RUNTIMES["openvino"].check_activations("bf16")


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        ({"avx2", "avx512_vnni"}, False),
        ({"avx2", "avx_vnni"}, False),
        ({"amx_int8"}, False),
        ({"avx2"}, True),
        ((), False),
    ],
)
def test_eight_bits_without_instructions_for_them_are_told_to_be_slow(
    flags: Any, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is known of the CPU, nothing is said."""
    monkeypatch.setattr(sys.modules["sparsevit_cli.runtimes.runtime"], "cpu_flags", lambda: frozenset(flags))
    assert ("without VNNI or AMX" in slow_in_int8()) is slow
    if RUNTIMES["openvino"].is_installed():
        assert ("without VNNI or AMX" in told_of_runtime(RUNTIMES["openvino"])) is slow


@pytest.mark.parametrize("system", ["win32", "linux"])
def test_on_windows_no_file_of_weights_is_mapped(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mapped can be neither replaced nor removed there."""
    asked: list[dict[str, bool]] = []
    made = SimpleNamespace(set_property=asked.append)
    properties = SimpleNamespace(enable_mmap="ENABLE_MMAP")
    monkeypatch.setattr(
        runtimes.openvino, "load_openvino", lambda: SimpleNamespace(Core=lambda: made, properties=properties)
    )
    monkeypatch.setattr(runtimes.openvino.sys, "platform", system)  # type: ignore[attr-defined]
    assert runtimes.openvino.core.__wrapped__() is made
    assert asked == ([{"ENABLE_MMAP": False}] if system == "win32" else [])


def test_a_file_has_a_runtime() -> None:
    names = {name: runtime_for(Path(f"model{name}")).name for name in (".pt2", ".onnx", ".xml")}
    assert names == {".pt2": "torch", ".onnx": "onnxruntime", ".xml": "openvino"}
    with pytest.raises(ConfigError, match=r"none runs model.safetensors.*\.pt2, \.onnx, \.xml"):
        runtime_for(Path("model.safetensors"))


# -- refusals -----------------------------------------------------------------------------------------------------


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'tensorrt' is not known.*torch, onnxruntime, openvino"):
        runtime("tensorrt")


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "export"), ("openvino", "openvino")])
def test_a_runtime_that_is_not_installed_names_its_extra(
    name: str, extra: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *a: None if module == name else found(module, *a))
    with pytest.raises(ConfigError, match=rf"{name} not installed.*sparsevit-cli\[{extra}\]"):
        runtime(name).load(folder / "model.onnx")
    assert examine()[f"runtime {name}"] == "not installed"


@pytest.mark.parametrize(("name", "file"), EACH)
def test_files_that_are_none_are_refused(name: str, file: str, folder: Path, tmp_path: Path) -> None:
    chosen = runtime(name)
    with pytest.raises(CheckpointError, match="is missing"):
        chosen.load(tmp_path / file)
    with pytest.raises(ConfigError, match=r"does not read model\.safetensors"):
        chosen.load(folder / "model.safetensors")
    damaged = tmp_path / file
    damaged.write_bytes((folder / file).read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"{name} .* cannot load it"):
        chosen.load(damaged)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "file"), EACH)
def test_signals_have_a_stack_once_programs_are_dropped(name: str, file: str, folder: Path) -> None:
    """OpenVINO's CPU plug-in left a freed one behind, and Ctrl-C was a segmentation fault."""
    programs = [runtime(name).load(folder / file) for _ in range(2)]
    while programs:
        programs.pop(0)
        gc.collect()
    with same_signal_stack() as stack:
        assert has_memory(stack)
    lost = SignalStack(16, 0, 1 << 16)
    with same_signal_stack() as before:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(lost), None)
        with same_signal_stack() as within:
            assert not has_memory(within)
    with same_signal_stack() as after:
        assert (after.base, after.size) == (before.base, before.size)


def has_memory(stack: SignalStack) -> bool:
    """True if no stack is set too: then signals take the thread's own."""
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return stack.base is None or any(int(low, 16) <= stack.base < int(high, 16) for low, high in ranges)


def test_a_signal_inside_a_runtime_is_no_damaged_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise StoppedError("stopped", "twice", "Type it again.", interrupted=True)

    monkeypatch.setattr(type(RUNTIMES["torch"]), "_run", stopped)
    with pytest.raises(StoppedError):
        RUNTIMES["torch"].load(folder / "model.pt2")


def test_the_package_of_runtimes_loads_none_of_them() -> None:
    code = "import sparsevit_cli.runtimes, sys; assert not {'openvino', 'onnx', 'onnxruntime'} & set(sys.modules)"
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code], check=True)


# -- a program as a module ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Own(OrderedDict):  # type: ignore[type-arg]
    """A dict that torch's pytrees do not know."""


X, Y = torch.tensor([1.0]), torch.tensor([2.0])


def program(*outputs: Tensor) -> Program:
    return Program("fake", "1.0", "fp32", 1, lambda images: [output * len(images) for output in outputs])


def module(*outputs: Tensor, like: object, **arguments: Any) -> ProgramModule:
    return ProgramModule(program(*outputs), like, name="model.onnx", shape=(3, 4, 6), **arguments)


@pytest.mark.parametrize(
    "like",
    [
        pytest.param(X, id="tensor"),
        pytest.param([X, (Y, X)], id="lists"),
        pytest.param(OrderedDict(b=X, a=Y), id="dict in its own order"),
        pytest.param({"maps": [X, Y]}, id="nested"),
        pytest.param(Pair(X, Y), id="named tuple"),
    ],
)
def test_outputs_come_in_the_structure_of_the_model(like: Any) -> None:
    leaves = torch.utils._pytree.tree_leaves(like)
    found = module(*leaves, like=like)(torch.zeros(1, 3, 4, 6))
    assert type(found) is type(like)
    assert str(found) == str(like)


def test_a_dict_of_a_class_of_its_own_becomes_a_plain_one() -> None:
    found = module(X, Y, like=Own(scores=X, maps=Own(fine=Y)))(torch.zeros(1, 3, 4, 6))
    assert found == {"scores": X, "maps": {"fine": Y}}
    assert type(found) is dict


def test_a_file_of_one_image_answers_each_image_of_a_batch() -> None:
    each = module(X, like={"boxes": X}, one_image=True)
    assert each(torch.zeros(3, 3, 4, 6)) == [{"boxes": X}] * 3
    assert each.runs == 3
    whole = module(X, like=X)
    assert whole(torch.zeros(3, 3, 4, 6)) == 3 * X
    assert whole.runs == 1


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 channels and 6x4 pixels; model\.onnx takes 3 channels and 4x6 pixels"):
        module(X, like=X)(torch.zeros(1, 3, 6, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_told_as_the_runtimes(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"model\.onnx: fake gives NaN"):
        module(X, Y * value, like=[X, Y])(torch.zeros(1, 3, 4, 6))
    assert module(torch.tensor([1]), like=X)(torch.zeros(1, 3, 4, 6)) == 1  # whole numbers have no NaN


def test_what_a_runtime_raises_is_told_with_the_file() -> None:
    def breaks(_: Tensor) -> list[Tensor]:
        raise RuntimeError("no kernel")

    def ends(_: Tensor) -> list[Tensor]:
        raise KeyboardInterrupt

    good = module(X, like=X)
    good.program = replace(program(X), run=breaks)
    with pytest.raises(CheckpointError, match=r"model\.onnx: does not run in fake 1\.0 \(RuntimeError: no kernel\)"):
        good(torch.zeros(1, 3, 4, 6))
    good.program = replace(program(X), run=ends)
    with pytest.raises(KeyboardInterrupt):
        good(torch.zeros(1, 3, 4, 6))
    with pytest.raises(CheckpointError, match="gives 2 outputs, the model gives 1"):
        module(X, Y, like=X)(torch.zeros(1, 3, 4, 6))


# -- doctor -------------------------------------------------------------------------------------------------------


def test_doctor_lists_every_runtime_and_what_it_computes_in() -> None:
    found = examine()
    assert {f"runtime {name}" for name in RUNTIMES} <= set(found)
    assert found["runtime torch"] == f"{importlib.metadata.version('torch')}, runs .pt2 files in fp32"
    assert str(found["clock"]).startswith(("steady, the same model twice: ", "not steady, the same model twice: "))
    for name, chosen in RUNTIMES.items():
        if chosen.is_installed():
            assert chosen.version() in str(found[f"runtime {name}"])
            assert ", ".join(chosen.precisions()) in str(found[f"runtime {name}"])


def test_doctor_tells_whether_a_model_is_as_fast_as_itself() -> None:
    first = Latency.from_samples([10.0, 10.1, 9.9, 10.0, 10.0, 10.1])
    same = Latency.from_samples([10.1, 10.2, 10.0, 10.1, 10.1, 10.2], first.samples_ms)
    other = Latency.from_samples([11.0, 11.1, 10.9, 11.0, 11.0, 11.1], first.samples_ms)
    assert told_of_clock(first, same) == "steady, the same model twice: 10 and 10.1 ms, 1.0% apart"
    assert told_of_clock(first, other) == (
        "not steady, the same model twice: 10 and 11 ms, 9.1% apart: they should be equal"
    )
    beside = replace(same, unsteady="other processes take 1.00 of 2 cores")
    assert told_of_clock(first, beside).endswith("1.0% apart: other processes take 1.00 of 2 cores")


@pytest.mark.usefixtures("watched")
def test_doctor_does_not_wait_for_a_neighbour() -> None:
    with beside("all cores"):
        first, second = measured_twice(torch.device("cpu"))
    assert first.unsteady
    assert told_of_clock(first, second).startswith("not steady")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error"), ResourceError("GPU", "it is full", "x")],
)
def test_a_device_that_cannot_be_measured_does_not_end_doctor(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(device: torch.device) -> Any:
        raise error

    monkeypatch.setattr(doctor, "measured_twice", breaks)
    monkeypatch.setattr(doctor, "RUNTIMES", {})
    told = str(examine()["clock"])
    assert told.startswith(f"could not be measured ({type(error).__name__}: ")


def test_a_runtime_that_is_broken_does_not_end_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: Runtime) -> Any:
        raise ImportError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr(type(RUNTIMES["torch"]), "activations", breaks)
    assert "cannot be loaded (ImportError: libtbb.so.12" in str(examine()["runtime torch"])
    with pytest.raises(ConfigError, match="it cannot be loaded"):
        RUNTIMES["torch"].check_activations("fp32")
