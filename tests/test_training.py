"""The training loop: plan, bitwise resume, bad numbers, memory, and what a schedule may change."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsevit_cli.checkpoints import latest_checkpoint, load_checkpoint
from sparsevit_cli.config.experiment import LoopSection, Phase
from sparsevit_cli.data.source import WrappedSource
from sparsevit_cli.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    ResourceError,
    SparseViTError,
    StoppedError,
)
from sparsevit_cli.models import build_model
from sparsevit_cli.profiling.inputs import trained_in
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.schedule import FixedSchedule, RandomSchedule
from sparsevit_cli.sizes import ImageSize, Size
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.stopping import StopRequest, stop_on_signals
from sparsevit_cli.swin import get_sparsity, sparsify_
from sparsevit_cli.tasks.classification.data import build_data
from sparsevit_cli.tasks.task import Score, task_of
from sparsevit_cli.training import TrainingJob, _Run, plan_training, train
from tiny import tiny_config

DEPTHS = (2, 2)


def job(
    folder: Path, *, seed: int = 0, workers: int = 0, drop_path_rate: float = 0.2, **train_fields: Any
) -> TrainingJob:
    """A training of a dozen steps with everything that could break a resume: EMA, mixup, stochastic depth."""
    section = {"mixup": 0.2, "label_smoothing": 0.1, "clip_grad": 0.5} | train_fields
    config = tiny_config(train=section, data={"workers": workers}, model={"drop_path_rate": drop_path_rate})
    data = build_data(config.data, img_size=32, in_chans=3, seed=seed)
    torch.manual_seed(seed)
    model = sparsify_(build_model(config.model, 10))
    validated: list[SparsityConfig] = []

    def validate(model: nn.Module, img_size: Size, before_batch: Callable[[], None]) -> Score:
        before_batch()
        validated.append(get_sparsity(model))
        value = float(sum(p.detach().sum() for p in model.parameters()))
        return Score(value, {"top1": value}, 1)

    task = task_of(config)
    return TrainingJob(
        kind="train", task=task, model=model, section=config.train, schedule=RandomSchedule(SearchSpace(DEPTHS), seed),
        plan=plan_training(config.train, len(data.train), (32, 32)), source=task.training_source(data, config.train),
        validate=validate, checkpoints=folder / "checkpoints", device=torch.device("cpu"), seed=seed,
        workers=workers, identity={"data": data.fingerprint, "start": "scratch"},
    )  # fmt: skip


def run(job: TrainingJob, stop: StopRequest | None = None) -> Any:
    return train(job, SilentReporter(), stop or StopRequest())


class StopAt(StopRequest):
    """A signal that arrives while the given step runs."""

    def __init__(self, job: TrainingJob, step: int) -> None:
        super().__init__()
        self.job = replace(job, schedule=self)
        self.schedule, self.step = job.schedule, step

    def at(self, number: int) -> SparsityConfig:
        if number == self.step:
            self.signal_number = 15
        return self.schedule.at(number)


def saved(folder: Path) -> tuple[dict[str, dict[str, Tensor]], list[Mapping[str, float]]]:
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    checkpoint = load_checkpoint(newest)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint.state["history"]]
    return checkpoint.tensors, rows


def rates(training: TrainingJob) -> list[list[float]]:
    """The learning rate of each step, by phase."""
    state, plan = _Run(training, SilentReporter()), training.plan
    found = []
    for phase in plan.phases:
        found.append([])
        for step in range(phase.steps):
            state.lr_of_phase[phase].step_update(step)
            found[-1].append(state.optimizer.param_groups[0]["lr"])
    return found


def test_the_rate_warms_up_where_it_rises_and_nowhere_else(tmp_path: Path) -> None:
    """Constant phases are a schedule in steps: the authors' drops to a tenth began at the bottom once more."""
    curriculum = [{"img_size": 32, "epochs": 0.3, "lr": lr} for lr in (1e-3, 1e-4, 1e-4, 5e-4)]
    fields: dict[str, Any] = {"curriculum": curriculum, "warmup_epochs": 0.1, "min_lr": 1e-6, "lr": 1e-3}
    first, dropped, same, risen = rates(job(tmp_path, schedule="constant", **fields))
    assert first == pytest.approx([1e-6 + (1e-3 - 1e-6) * min(step / 4, 1) for step in range(len(first))])
    assert set(dropped) == set(same) == {1e-4}
    assert risen == pytest.approx([1e-4 + 4e-4 * min(step / 4, 1) for step in range(len(risen))])
    for schedule in ("cosine", "linear"):  # ends at the bottom, so every phase rises
        assert [phase[0] for phase in rates(job(tmp_path, schedule=schedule, **fields))] == pytest.approx([1e-6] * 4)


@pytest.mark.parametrize(
    ("workers", "fields"),
    [(0, {}), (2, {}), (0, {"precision": "bf16", "accumulation": 2}), (0, {"precision": "fp16", "cutmix": 0.5})],
    ids=["plain", "workers", "bf16", "fp16"],
)
def test_a_resumed_training_equals_the_straight_one_to_the_bit(
    tmp_path: Path, workers: int, fields: dict[str, Any]
) -> None:
    """One run is stopped and resumed again and again; every step of it is taken once, as by the straight one."""
    straight = job(tmp_path / "straight", workers=workers, **fields)
    run(straight)
    total = straight.plan.total_steps
    assert total > 8
    stops = (3,) if workers or fields else (0, 4, total // 2, total - 1)
    for step in stops:
        stop = StopAt(job(tmp_path / "stopped", workers=workers, **fields), step)
        with pytest.raises(StoppedError) as stopped:
            run(stop.job, stop)
        assert stopped.value.exit_code == 75
        torch.manual_seed(99)  # the global generator must not matter
        assert load_checkpoint(tmp_path / "stopped" / "checkpoints").step == step + 1
    result = run(job(tmp_path / "stopped", workers=workers, **fields))
    assert result.resumed_from == stops[-1] + 1
    tensors, rows = saved(tmp_path / "stopped")
    expected, expected_rows = saved(tmp_path / "straight")
    assert rows == expected_rows
    assert tensors.keys() == expected.keys() == {"model", "optimizer", "ema"}
    for name, group in expected.items():
        for key, tensor in group.items():
            assert torch.equal(tensor, tensors[name][key]), (name, key)


def test_accumulation_changes_memory_and_not_the_training(tmp_path: Path) -> None:
    for micro_batches in (1, 2, 4):
        fields = {"optimizer": "sgd", "epochs": 0.1, "accumulation": micro_batches}
        run(job(tmp_path / str(micro_batches), drop_path_rate=0.0, **fields))
    whole, *others = (saved(tmp_path / str(n))[0]["model"] for n in (1, 2, 4))
    for other in others:
        for key, tensor in whole.items():
            torch.testing.assert_close(other[key], tensor, atol=1e-6, rtol=1e-5)


def test_other_seeds_train_differently(tmp_path: Path) -> None:
    run(job(tmp_path / "a", seed=0, epochs=0.05))
    run(job(tmp_path / "b", seed=1, epochs=0.05))
    first, second = saved(tmp_path / "a")[0]["model"], saved(tmp_path / "b")[0]["model"]
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(job(tmp_path, epochs=0.05))
    other = replace(job(tmp_path, epochs=0.05), identity={"data": "else", "start": "scratch"})
    with pytest.raises(CheckpointError, match="another data") as refused:
        run(other)
    assert refused.value.exit_code == 4


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first = run(job(tmp_path, epochs=0.05))
    finished = job(tmp_path, epochs=0.05)
    again = run(finished)
    assert first.resumed_from is None
    assert again.resumed_from == finished.plan.total_steps == load_checkpoint(again.checkpoint).step
    assert again.checkpoint == first.checkpoint


def test_non_finite_loss_leaves_the_weights_and_names_the_step(tmp_path: Path) -> None:
    bad = job(tmp_path, mixup=0.0)
    poisoned = 3

    class Poisoned(WrappedSource):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image, label = self.inner[index]
            return image * (math.nan if index == poisoned else 1), label

        def resized(self, size: ImageSize) -> Poisoned:
            return self

    bad = replace(bad, source=Poisoned(bad.source), plan=plan_training(bad.section, len(bad.source) * 8, (32, 32)))
    steps: list[dict[str, Tensor]] = []
    hook = bad.model.register_forward_pre_hook(
        lambda module, args: steps.append({k: v.clone() for k, v in module.state_dict().items()})
    )
    with pytest.raises(NonFiniteError, match=r"step \d+, lr .*sparsity \[\[.*files") as error:
        run(bad)
    hook.remove()
    assert error.value.exit_code == 6
    for key, tensor in bad.model.state_dict().items():
        assert torch.equal(tensor, steps[-1][key])
    assert f"files {bad.source.sample_name(poisoned)}." in str(error.value)  # it, and no other one of its batch


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(tmp_path: Path) -> None:
    fields = {"mixup": 0.0, "epochs": 0.05, "ema_decay": None, "drop_path_rate": 0.0}  # the two runs must agree
    expected = run(job(tmp_path / "whole", **fields))
    small = job(tmp_path / "small", **fields)
    forward, seen = small.model.forward, []

    def limited(x: Tensor) -> Tensor:
        seen.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError("simulated")
        return forward(x)

    small.model.forward = limited  # type: ignore[method-assign]
    reporter = SilentReporter()
    result = train(small, reporter, StopRequest())
    assert seen[:4] == [32, 16, 8, 4]
    assert set(seen[3:]) == {4}
    assert any("out of memory" in warning for warning in reporter.warnings)
    for ours, theirs in zip(result.history, expected.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)

    hopeless = job(tmp_path / "hopeless", **fields)

    def never(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("simulated")

    hopeless.model.forward = never  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match="micro-batch 1") as error:
        run(hopeless)
    assert error.value.exit_code == 7


def test_a_curriculum_grows_the_images_and_keeps_the_parameters(tmp_path: Path) -> None:
    phases = [{"img_size": 16, "epochs": 0.1}, {"img_size": 32, "epochs": 0.05, "lr": 1e-4}]
    growing = job(tmp_path, mixup=0.0, curriculum=phases, eval_every=0.03)
    sizes: list[int] = []
    growing.model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    result = run(growing)
    assert sizes == [16] * growing.plan.phases[0].steps + [32] * growing.plan.phases[1].steps
    assert [row["height"] for row in result.history][-1] == 32
    rates = {row["width"]: row["lr"] for row in result.history}
    assert rates[32] <= 1e-4
    assert rates.keys() == {16, 32}


def test_a_curriculum_that_would_change_weights_is_refused(tmp_path: Path) -> None:
    config = tiny_config(model={"always_partition": None, "window_size": 8, "depths": [2, 2], "img_size": 64})
    wrong = job(tmp_path, curriculum=[{"img_size": 16, "epochs": 0.1}, {"img_size": 32, "epochs": 0.1}])
    wrong = replace(wrong, model=sparsify_(build_model(config.model, 10)))
    with pytest.raises(ConfigError, match="always_partition"):
        run(wrong)


def test_the_plan_is_a_pure_function_of_the_section() -> None:
    section = LoopSection(epochs=2.5, batch_size=10)
    plan = plan_training(section, 105, (64, 64))
    assert (plan.steps_per_epoch, plan.total_steps) == (10, 25)
    assert [step for step in range(1, 26) if plan.is_due(step, 1.0)] == [10, 20, 25]
    phases = (Phase(img_size=16, epochs=1.0), Phase(img_size=32, epochs=0.5, lr=1e-5))
    section = section.model_copy(update={"curriculum": phases})
    plan = plan_training(section, 105, (64, 64))
    assert [(p.first_step, p.steps, p.lr, p.img_size) for p in plan.phases] == [
        (0, 10, 1e-3, (16, 16)),
        (10, 5, 1e-5, (32, 32)),
    ]
    assert plan.phase(9).img_size == (16, 16)
    assert plan.phase(10).img_size == (32, 32)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_warm_up_and_end_where_told(tmp_path: Path, schedule: str) -> None:
    watched = job(tmp_path, schedule=schedule, epochs=0.5, warmup_epochs=0.15, lr=1e-2, min_lr=1e-5, eval_every=0.03)
    rates = [row["lr"] for row in run(watched).history]
    assert max(rates) == pytest.approx(1e-2, rel=0.2)
    assert rates[0] < max(rates)
    assert rates[-1] == pytest.approx(1e-2 if schedule == "constant" else 1e-5, abs=2e-3)


def test_random_schedule_is_a_function_of_seed_and_step() -> None:
    space = SearchSpace((2, 2, 6, 2))
    schedule = RandomSchedule(space, 7)
    assert [schedule.at(n) for n in range(50)] == [RandomSchedule(space, 7).at(n) for n in range(50)]
    assert schedule.at(1000) == RandomSchedule(space, 7).at(1000)
    assert len({schedule.at(n) for n in range(50)}) > 40
    assert schedule.at(3) != RandomSchedule(space, 8).at(3)
    genes = [t for n in range(2000) for t in schedule.at(n).tenths[0]]
    assert all(150 < genes.count(t) < 300 for t in range(9))  # uniform on the grid
    fixed = FixedSchedule(space.dense)
    assert fixed.at(0) is fixed.at(9) is fixed.config
    assert json.dumps(schedule.at(0).ratios)


def test_a_validation_that_failed_is_made_up_for_before_anything_else(tmp_path: Path) -> None:
    straight = job(tmp_path / "straight")
    run(straight)
    for failing in (1, 2):  # in the middle, and at the very end
        folder = tmp_path / f"failing-{failing}"
        broken, numbers = job(folder), count(1)

        def fails(
            *arguments: Any, at: int = failing, numbers: Iterator[int] = numbers, job: TrainingJob = broken
        ) -> Mapping[str, float]:
            if next(numbers) == at:
                raise RuntimeError("the disk with the validation images is gone")
            return job.validate(*arguments)

        with pytest.raises(RuntimeError, match="is gone"):
            run(replace(broken, validate=fails))
        result = run(job(folder))
        assert result.history[-1]["step"] == straight.plan.total_steps
        (ours, our_rows), (theirs, their_rows) = saved(folder), saved(tmp_path / "straight")
        assert our_rows == their_rows
        assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())


def test_a_signal_during_validation_saves_and_the_row_is_not_lost(tmp_path: Path) -> None:
    run(job(tmp_path / "straight"))
    stopping, stop = job(tmp_path / "stopped"), StopRequest()

    def stopped_in(model: nn.Module, img_size: Size, before_batch: Callable[[], None]) -> Score:
        stop.signal_number = 15
        return stopping.validate(model, img_size, before_batch)

    with pytest.raises(StoppedError, match="is saved"):
        run(replace(stopping, validate=stopped_in), stop)
    run(job(tmp_path / "stopped"))
    assert saved(tmp_path / "stopped")[1] == saved(tmp_path / "straight")[1]


def test_a_bad_loss_ends_with_the_weights_before_it_saved(tmp_path: Path) -> None:
    bad = job(tmp_path, mixup=0.0, lr=1e30)
    with pytest.raises(NonFiniteError, match="are saved"):
        run(bad)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    kept = load_checkpoint(newest).tensors["model"]
    assert all(torch.equal(kept[name], tensor) for name, tensor in bad.model.state_dict().items())


def test_other_validation_images_are_told_and_the_training_goes_on(tmp_path: Path) -> None:
    stop = StopAt(job(tmp_path), 3)
    with pytest.raises(StoppedError):
        run(stop.job, stop)
    reporter = SilentReporter()
    train(replace(job(tmp_path), validation_fingerprint="others"), reporter, StopRequest())
    assert any("validation data changed" in warning for warning in reporter.warnings)


class HungAfter:
    """A source whose loader process is stopped, alive, once it has read `samples` images."""

    def __init__(self, source: Any, samples: int) -> None:
        self.source, self.left = source, samples

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.source[index]

    def resized(self, size: Any) -> HungAfter:
        return HungAfter(self.source.resized(size), self.left)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_signal_counts_while_a_batch_is_awaited(tmp_path: Path, steps: int) -> None:
    hung = job(tmp_path / "hung", workers=1)
    hung = replace(hung, source=HungAfter(hung.source, steps * hung.section.batch_size))
    with stop_on_signals() as stop:
        threading.Timer(0.5 + steps, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(StoppedError, match=r"SIGTERM arrived; step \d of") as stopped:
            run(hung, stop)
    assert stopped.value.exit_code == 75
    newest = latest_checkpoint(hung.checkpoints)
    assert newest is not None
    assert load_checkpoint(newest).step <= steps
    stop = StopAt(job(tmp_path / "hung"), 1)
    with pytest.raises(StoppedError):
        run(stop.job, stop)  # and a resumed run goes on from it


def finite(folder: Path) -> bool:
    """True where every saved checkpoint holds finite numbers alone."""
    roots = [load_checkpoint(path) for path in (folder / "checkpoints").glob("step-*")]
    assert roots
    files = [tensors for checkpoint in roots for tensors in checkpoint.tensors.values()]
    return all(tensor.isfinite().all() for tensors in files for tensor in tensors.values())


EXTREME = {
    "lr": {"lr": 3e38, "warmup_epochs": 0.0},
    "lr after warm-up": {"lr": 1e38, "warmup_epochs": 0.1},
    "sgd": {"lr": 1e38, "optimizer": "sgd"},
    "lion": {"lr": 3e38, "optimizer": "lion", "warmup_epochs": 0.0},
    "weight decay": {"weight_decay": 3e38, "lr": 1.0},
    "both": {"weight_decay": 1e30, "lr": 1e30, "precision": "bf16"},
    "constant": {"lr": 2e38, "schedule": "constant", "warmup_epochs": 0.0, "ema_decay": None},
    "fp16": {"lr": 3e38, "precision": "fp16", "warmup_epochs": 0.0},
    "lookahead": {"lr": 3e38, "optimizer": "lookahead_adamw", "warmup_epochs": 0.0},
    "no clipping": {"lr": 1e20, "clip_grad": None, "optimizer": "sgd", "warmup_epochs": 0.0},
}


@pytest.mark.parametrize("case", EXTREME)
def test_numbers_that_are_not_finite_are_never_saved(case: str, tmp_path: Path) -> None:
    bad = job(tmp_path, **({"mixup": 0.0, "epochs": 0.2, "min_lr": 0.0} | EXTREME[case]))
    with pytest.raises(NonFiniteError, match="before it are saved") as error:
        run(bad)
    assert error.value.exit_code == 6
    assert finite(tmp_path)
    with pytest.raises(NonFiniteError):  # typed again: the same step from the same weights
        run(job(tmp_path, **({"mixup": 0.0, "epochs": 0.2, "min_lr": 0.0} | EXTREME[case])))
    assert finite(tmp_path)


def test_a_step_that_spoils_the_weights_is_taken_back_to_the_bit(tmp_path: Path) -> None:
    good = StopAt(job(tmp_path / "good", mixup=0.0), 3)
    with pytest.raises(StoppedError):
        run(good.job, good)
    bad = job(tmp_path / "bad", mixup=0.0)
    steps = count()
    inner = torch.optim.AdamW.step

    def spoils(self: Any, *arguments: Any) -> Any:
        found = inner(self, *arguments)
        if next(steps) == 4:
            self.param_groups[0]["params"][0].data[0] = math.nan
            self.state[self.param_groups[1]["params"][0]]["exp_avg"].mul_(math.inf)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spoils)
        with pytest.raises(NonFiniteError, match=r"weights that are not finite.*at step 4"):
            run(bad)
    ours, theirs = saved(tmp_path / "bad")[0], saved(tmp_path / "good")[0]
    assert all(torch.equal(ours[name][key], tensor) for name in theirs for key, tensor in theirs[name].items())


def test_averaged_weights_and_buffers_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    spoiled = job(tmp_path)
    spoiled.model.register_buffer("extra", torch.tensor([math.inf]))
    with pytest.raises(NonFiniteError, match=r"`model` are not finite: extra.*Nothing is saved"):
        run(spoiled)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_save_that_fails_after_a_signal_is_not_told_as_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()

    def validate(model: nn.Module, img_size: Size, before_batch: Callable[[], None]) -> Score:
        stop.signal_number = signal.SIGTERM
        before_batch()
        return Score(0.0, {}, 1)

    def fsync(descriptor: int) -> None:
        if stop.requested:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    real = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises((OSError, SparseViTError), match="Input/output error"):
        run(replace(job(tmp_path), validate=validate), stop)


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_bfloat16_is_taken_where_the_cpu_has_it(
    machine: str, native: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    onednn_takes_it = native or machine == "x86_64"  # there it also takes CPUs with AVX-512 alone, and emulates it
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn_takes_it)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    reporter = SilentReporter()
    assert _Run(job(tmp_path, precision="bf16"), reporter).precision == precision
    assert len(reporter.warnings) == (not native)
    assert trained_in("bf16", torch.device("cuda")) == "bf16"
