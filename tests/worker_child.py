"""What workers of test_search_workers do in the place of `score_candidate`; without torch, so that they start fast."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from sparsevit_cli.sparsity import SparsityConfig

MARK = "SPARSEVIT_TEST_MARK"
"""The folder of marks, by an environment variable."""


def misbehaving(scoring: None, config: SparsityConfig, numbers: tuple[int, ...] | None) -> tuple[float, float]:
    """The first one to come goes wrong as its mark says, all others score."""
    folder = Path(os.environ[MARK])
    with open(folder / "calls", "a") as calls:
        calls.write(f"{config}\n")
    for wrong in ("kill", "stop", "hang", "raise", "always"):
        try:
            (folder / wrong).rename(folder / f"{wrong}.done") if wrong != "always" else (folder / wrong).stat()
        except FileNotFoundError:
            continue
        if wrong == "raise":
            raise ValueError("poisoned")
        if wrong == "hang":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGSTOP if wrong == "stop" else signal.SIGKILL)
    return metric_of(config), 0.01


def metric_of(config: SparsityConfig) -> float:
    """What it gives."""
    return sum(map(sum, config.tenths)) / 7
