"""Child program of test_search_front: searches whose leader is killed, each case a line of JSON on stdin.

Imports torch once and forks for every case, {"runs", "kill_at"}: killed at this event, or never for 0. Prints the exit
code and how many events there were. Events are scores, commits and files, each before and after it is on disk.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from failpoint_child import forked
from sparsevit_cli.search.ledger import Ledger
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.workflows import search as search_workflow
from sparsevit_cli.workflows.front import search_front
from sparsevit_cli.workflows.latencies import MeasuredLatencies
from sparsevit_cli.workflows.scores import Images, Scores, ledger_settings
from test_search_front import RACE, ImageByImage, session_in


def searched(runs: Path, kill_at: int) -> None:
    """Search for four budgets by a surrogate, with races; the log of the folder tells what was scored and committed."""
    fake, events = ImageByImage(), 0
    put = Ledger.put

    def event(*lines: str) -> None:
        nonlocal events
        with (runs / "log").open("a") as log:
            log.writelines(f"{line}\n" for line in lines)
        events += 1
        if events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def score(self: Scores, configs: Sequence[SparsityConfig], images: Images) -> dict[SparsityConfig, float]:
        event(*(f"scored {config} {ledger_settings(self.session, images)}" for config in configs))
        return fake.score(configs, images)

    def put_and_told(self: Ledger, config: SparsityConfig, metric: float, seconds: float) -> float:
        standing = put(self, config, metric, seconds)
        event(f"committed {config} {self.scope.settings}")
        return standing

    def around(work: Callable[..., None]) -> Callable[..., None]:
        def done(*arguments: Any) -> None:
            event()
            work(*arguments)
            event()

        return done

    Scores.score = score  # type: ignore[method-assign]
    Ledger.put = put_and_told  # type: ignore[method-assign]
    for name in ("write_json", "write_winner", "write_atomic"):
        setattr(search_workflow, name, around(getattr(search_workflow, name)))
    MeasuredLatencies.look = lambda *_: {}  # type: ignore[method-assign]
    search_front(session_in(runs, search={**RACE, "strategy": "surrogate"}), budgets="90%,80%,70%,60%")
    (runs / "events").write_text(str(events))


def main() -> None:
    """Run the cases."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        runs = Path(case["runs"])
        _, status = os.waitpid(forked(searched, runs, case["kill_at"]), 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps([code, int((runs / "events").read_text()) if code == 0 else 0]), flush=True)


if __name__ == "__main__":
    main()
