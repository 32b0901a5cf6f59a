"""Child program of test_ranks: trainings that several processes share, each case a line of JSON on stdin.

Imports torch once and forks the processes of every case. A case is {"folder", "size", "fields"} and what goes wrong:
"kill" or "stop": [rank, step], "out_of_memory" or "poison": rank. What its processes ended with is printed. With a case
as its argument it is one process, started by torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from failpoint_child import forked
from sparsevit_cli.errors import ThreePartError
from sparsevit_cli.ranks import Ranks, joined
from sparsevit_cli.reporting import SilentReporter
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.stopping import stop_on_signals
from sparsevit_cli.training import TrainingJob, train
from test_training import job


class At:
    """The schedule of a training, in which a signal arrives at one step."""

    def __init__(self, training: TrainingJob, step: int, number: int) -> None:
        self.inner, self.step, self.number = training.schedule, step, number

    def at(self, step: int) -> SparsityConfig:
        if step == self.step:
            os.kill(os.getpid(), self.number)
        return self.inner.at(step)


def broken(training: TrainingJob, ranks: Ranks, case: Mapping[str, Any]) -> TrainingJob:
    """The training with what goes wrong in this process."""
    forward = training.model.forward

    def limited(images: Tensor) -> Tensor:
        if len(images) > 4:
            raise torch.OutOfMemoryError("simulated")
        return forward(images)  # type: ignore[no-any-return]

    def poisoned(images: Tensor) -> Tensor:
        return forward(images) * float("nan")  # type: ignore[no-any-return]

    for word, number in (("kill", signal.SIGKILL), ("stop", signal.SIGTERM)):
        if word in case and case[word][0] == ranks.rank:
            training = replace(training, schedule=At(training, case[word][1], number))
    if case.get("out_of_memory") == ranks.rank:
        training.model.forward = limited  # type: ignore[method-assign]
    if case.get("poison") == ranks.rank:
        training.model.forward = poisoned  # type: ignore[method-assign]
    return training


def started(rank: int, port: int, case: Mapping[str, Any]) -> None:
    """One of the processes, with the variables that torchrun would set."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case["size"]), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    trained(case)


def trained(case: Mapping[str, Any]) -> None:
    """Train as one of the processes; it ends with the exit code that a command would have."""
    torch.set_num_threads(1)
    folder, reporter, rank = Path(case["folder"]), SilentReporter(), os.environ["RANK"]
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        (folder / f"restarted-{rank}").touch()
        case = {name: value for name, value in case.items() if name != "kill"}
    try:
        with stop_on_signals() as stop, joined(lambda: torch.device("cpu")) as ranks:
            training = replace(job(folder, **case["fields"]), ranks=ranks)
            train(broken(training, ranks, case), reporter, stop)
            torch.save(training.model.state_dict(), folder / f"rank-{rank}.pth")
    except ThreePartError as error:
        (folder / f"rank-{rank}.txt").write_text(f"{error}\n{reporter.warnings}")
        os._exit(error.exit_code)
    (folder / f"rank-{rank}.txt").write_text(str(reporter.warnings))


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(*arguments: str) -> None:
    """One process of torchrun's, or all of every case."""
    if arguments:
        trained(json.loads(arguments[0]))
        return
    torch.set_num_threads(1)
    job(Path())  # all that is imported, and the digits, once for all cases
    for line in sys.stdin:
        case = json.loads(line)
        Path(case["folder"]).mkdir(exist_ok=True)
        port = free_port()
        pids = [forked(started, rank, port, case) for rank in range(case["size"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
