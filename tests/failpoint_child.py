"""Child program of test_checkpoints: saves checkpoints in processes that are killed or run out of disk.

Imports torch once and forks for every case. Usage: failpoint_child.py kill|storm|full ROOT COUNT
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from sparsevit_cli.atomic import write_atomic
from sparsevit_cli.checkpoints import FAILPOINTS, save_checkpoint
from sparsevit_cli.errors import ResourceError


def save(root: Path, step: int, mark: float | None = None, values: int = 500) -> None:
    """A checkpoint whose every number is `mark`, the step where not given."""
    value = torch.full((values,), step if mark is None else mark)
    files = {"model": {"w": value}, "optimizer": {"m": value, "v": value}}
    save_checkpoint(root, step, files, {"mark": value[0].item()}, best=step == 10)


def kill_at(root: Path, name: str) -> None:
    """Whole saves of steps 10, 20, 30; killed at `name` while saving 40 (30 again where a step is replaced)."""
    for step in (10, 20, 30):
        save(root, step)
    os.environ["SPARSEVIT_FAILPOINT"] = f"{name}:kill"
    if name == "ckpt.mid_replace":
        save(root, 30, mark=31.0)
    else:
        save(root, 40)


def save_on_a_full_disk(root: Path, limit_bytes: int) -> None:
    """Save step 10, then step 20 and a file with no file allowed to grow past the limit; print the errors."""
    save(root, 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    found: dict[str, object] = {"limit": limit_bytes}
    for what, work in (
        ("checkpoint", lambda: save(root, 20)),
        ("file", lambda: write_atomic(root / "table.csv", b"x" * 4000)),
    ):
        try:
            work()
        except ResourceError as error:
            found[what] = [error.exit_code, str(error)]
    print(json.dumps(found), flush=True)


def forked(work: object, *args: object) -> int:
    """Process id of a fork that runs `work(*args)` and exits."""
    child = os.fork()
    if child == 0:
        try:
            work(*args)  # type: ignore[operator]
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return child


def main(mode: str, root: Path, count: int) -> None:
    """Run `count` cases, per failpoint in mode `kill`; fails where a child ends otherwise than intended."""
    if mode == "kill":
        for name in FAILPOINTS:
            for number in range(count):
                _, status = os.waitpid(forked(kill_at, root / f"{name}-{number}", name), 0)
                assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (name, status)
    elif mode == "storm":
        for number in range(count):

            def save_for_ever(start: int = number * 1000) -> None:
                for step in range(start + 1, start + 1000):
                    save(root, step)

            child = forked(save_for_ever)
            time.sleep(0.05 + 0.0037 * number)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    elif mode == "full":
        for number in range(count):
            _, status = os.waitpid(forked(save_on_a_full_disk, root / str(number), number * 270), 0)
            assert status == 0, status


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
