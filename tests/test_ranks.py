"""Several processes train one model: the weights of one process, whatever ends one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsevit_cli.checkpoints import latest_checkpoint, load_checkpoint
from sparsevit_cli.cli import _tell
from sparsevit_cli.console import ConsoleReporter
from sparsevit_cli.errors import ConfigError, DataError, PeerError, StoppedError
from sparsevit_cli.ranks import BUCKET_BYTES, Ranks, _buckets, started_together
from sparsevit_cli.stopping import StopRequest
from test_cli import refused
from tiny import write_tiny

CHILD = Path(__file__).with_name("ranks_child.py")
Play = Callable[..., list[int]]
EXACT: dict[str, Any] = {"mixup": 0.0, "drop_path_rate": 0.0}
"""What is drawn per rank: partners of mixup and stochastic depth. Without them two processes train as one does."""
FIRST_SAVE = 6
"""Steps of an interval between two saves of `test_training.job`, whose trainings have eleven."""


def environment() -> dict[str, str]:
    alone = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    return alone | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Run a case in processes of its own; gives their exit codes, a negative number for a signal."""
    root = tmp_path_factory.mktemp("ranks")
    child = subprocess.Popen(
        [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert child.stdin is not None
    assert child.stdout is not None

    def run(name: str, size: int = 2, fields: dict[str, Any] | None = None, **wrong: Any) -> list[int]:
        case = {"folder": str(root / name), "size": size, "fields": fields or {}, **wrong}
        print(json.dumps(case), file=child.stdin, flush=True)
        codes: list[int] = json.loads(child.stdout.readline())  # type: ignore[union-attr]
        return codes

    run.root = root  # type: ignore[attr-defined]
    yield run
    child.stdin.close()
    assert child.wait(60) == 0


def weights(play: Play, name: str, rank: int = 0) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(play.root / name / f"rank-{rank}.pth")  # type: ignore[attr-defined]
    return found


def told(play: Play, name: str, rank: int) -> str:
    return (play.root / name / f"rank-{rank}.txt").read_text()  # type: ignore[attr-defined,no-any-return]


def saved_step(play: Play, name: str) -> int:
    newest = latest_checkpoint(play.root / name / "checkpoints")  # type: ignore[attr-defined]
    return 0 if newest is None else load_checkpoint(newest).step


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def straight(play: Play) -> dict[str, Tensor]:
    """What two processes end with when nothing stops them, with all that is drawn."""
    assert play("straight") == [0, 0]
    assert_equal(weights(play, "straight", 1), weights(play, "straight", 0))
    return weights(play, "straight")


def test_two_processes_train_as_one_does_also_where_memory_runs_out_on_one(play: Play) -> None:
    assert play("one", 1, EXACT) == [0]
    assert play("two", 2, EXACT, out_of_memory=1) == [0, 0]
    assert_equal(weights(play, "two"), weights(play, "one"), atol=1e-5)
    assert_equal(weights(play, "two", 1), weights(play, "two", 0))
    for rank in (0, 1):  # both halve it, though one had room
        assert "out of memory at micro-batch 16: going on with 8" in told(play, "two", rank)


def test_a_killed_and_stopped_training_of_two_ends_with_the_same_bits(play: Play, straight: dict[str, Tensor]) -> None:
    assert play("broken", stop=[1, 2]) == [75, 75]
    assert saved_step(play, "broken") == 3
    assert "SIGTERM arrived; step 3 of 11 is saved" in told(play, "broken", 0)
    assert play("broken", kill=[0, 7]) == [-9, PeerError.exit_code]
    assert saved_step(play, "broken") == FIRST_SAVE
    assert "Connection" in told(play, "broken", 1)
    assert play("broken") == [0, 0]
    assert_equal(weights(play, "broken"), straight)


def test_a_loss_that_is_no_number_on_one_rank_is_refused_by_all(play: Play) -> None:
    assert play("poisoned", poison=1) == [6, 6]
    assert "loss nan" in told(play, "poisoned", 0)
    assert "at step 0" in told(play, "poisoned", 1)


def test_a_batch_that_cannot_be_shared_is_refused(play: Play) -> None:
    assert play("odd", fields={"batch_size": 33}) == [2, 2]
    assert "33 images, which 2 processes cannot share. Set it to a multiple of 2, such as 32" in told(play, "odd", 0)


EPOCHS: dict[str, Any] = {"batch_size": 128, "epochs": 1.5, "save_every": 0.1, "eval_every": 0.5}
"""Nine steps per epoch, thirteen in all, each of them saved."""


@pytest.mark.parametrize("steps", [(1, 5, 9), pytest.param(range(1, 13), marks=pytest.mark.slow)])
def test_a_killed_training_of_one_process_leaves_the_same_bytes(play: Play, steps: Sequence[int]) -> None:
    """SIGKILL at the first step, inside an epoch and at its end; the same run goes on each time."""
    name = f"killed-{len(steps)}"
    assert play(f"straight-{name}", 1, EPOCHS) == [0]
    for step in steps:
        assert play(name, 1, EPOCHS, kill=[0, step]) == [-9]
        assert saved_step(play, name) == step
    assert play(name, 1, EPOCHS) == [0]
    ours, theirs = (play.root / each / "checkpoints" / "step-00000013" for each in (name, f"straight-{name}"))  # type: ignore[attr-defined]
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_killed_processes_again_ten_times_of_ten(
    rank: int, play: Play, straight: dict[str, Tensor], tmp_path: Path
) -> None:
    rng = Random(rank)
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = {"folder": str(folder), "fields": {}, "kill": [rank, rng.randrange(11)]}
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", str(CHILD),
             json.dumps(case)],
            env=environment(), capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for each in (0, 1):  # torchrun tells one that failed, be it the killed one or the other, which then ends
            assert (folder / f"restarted-{each}").exists()
            assert_equal(torch.load(folder / f"rank-{each}.pth"), straight)


@pytest.mark.slow
def test_a_command_under_torchrun_writes_and_prints_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "sparsevit_cli.cli", "pretrain",
         "--config", str(write_tiny(tmp_path))],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pretrain: top-1") == 1
    assert done.stderr.count("pretrain: 11/11") == 1
    assert (tmp_path / "runs" / "tiny" / "pretrain" / "metrics.json").exists()


# -- without other processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["0", "-1", "two", "", "2.0"])
def test_a_number_of_processes_that_is_none_is_refused(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", number)
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        started_together()


def test_what_one_process_does_is_not_started_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = refused("search", "--config", write_tiny(tmp_path), cwd=tmp_path, code=2, monkeypatch=monkeypatch)
    assert "only pretrain, adapt, finetune share their work" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_signal_that_came_elsewhere_leaves_the_first_one_here_to_come() -> None:
    stop = StopRequest()
    stop.elsewhere = 15
    assert stop.requested
    stop.on_signal(15, None)  # torchrun sends it to one after the other
    assert stop.error("adapt", "it is saved").exit_code == 75
    with pytest.raises(StoppedError, match="at once"):
        stop.on_signal(15, None)


def test_an_error_of_all_is_told_by_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    for rank, lines in ((1, 0), (0, 1)):
        error = Ranks(rank, 2).shared(StoppedError("adapt", "SIGINT arrived", "Go on.", interrupted=True))
        assert _tell(error, ConsoleReporter(), verbose=False) == 130
        assert capsys.readouterr().err.count("SIGINT arrived") == lines
    reporter = ConsoleReporter()
    reporter.quiet = True
    reporter.say("said")
    reporter.warn("warned")
    reporter.table("table", ["a"], [["b"]])
    with reporter.progress("bar", 1) as bar:
        bar.advance()
    reporter.warn("met here", always=True)
    assert capsys.readouterr().err == "warning: met here\n"
    _tell(DataError("data", "gone", "Look."), reporter, verbose=False)
    assert "gone" in capsys.readouterr().err


def test_gradients_are_sent_in_pieces_of_one_type() -> None:
    big = [torch.empty(BUCKET_BYTES // 4 // 2, dtype=torch.float32) for _ in range(5)]
    small = [torch.empty(3, dtype=torch.bfloat16) for _ in range(2)]
    buckets = _buckets([big[0], small[0], *big[1:], small[1]])
    assert [len(bucket) for bucket in buckets] == [2, 2, 2, 1]
    assert {id(each) for bucket in buckets for each in bucket} == {id(each) for each in [*big, *small]}
    assert all(len({each.dtype for each in bucket}) == 1 for bucket in buckets)


def test_one_process_alone_sends_nothing() -> None:
    ranks, layer = Ranks(), nn.Linear(2, 2)
    assert ranks.gathered(1.0, 2.0) == [[1.0, 2.0]]
    assert ranks.listed("a") == ["a"]
    assert ranks.on_first(lambda: 3) == 3
    ranks.sum_gradients_(list(layer.parameters()))
    assert layer.weight.grad is None
    ranks.refuse_differing("train", {"data": "x"})
