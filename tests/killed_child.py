"""Child program of test_dense_trees_end_to_end: trainings that die while they save their second checkpoint.

Imports torch once and forks for every case. Usage: killed_child.py [OUTPUT ARGUMENT...] [-- OUTPUT ARGUMENT...]...
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from failpoint_child import forked
from sparsevit_cli.cli import app

FAILPOINT = "ckpt.mid_optimizer"


def train(output: Path, arguments: list[str]) -> None:
    """Run a command that trains; from its first whole checkpoint on, saving another one kills this process."""

    def arm() -> None:
        while not list(output.rglob("checkpoints/step-*")):
            time.sleep(0.001)
        os.environ["SPARSEVIT_FAILPOINT"] = f"{FAILPOINT}:kill"

    threading.Thread(target=arm, daemon=True).start()
    torch.set_num_threads(1)  # sums depend on their number, and a fork may have another than its parent
    app([*arguments, "--output", str(output)], standalone_mode=False)


def main(words: list[str]) -> None:
    """Run all cases; fails where one of them ends by itself."""
    cases = " ".join(words).split(" -- ")
    for output, *arguments in map(str.split, cases):
        _, status = os.waitpid(forked(train, Path(output), arguments), 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (output, status)


if __name__ == "__main__":
    main(sys.argv[1:])
