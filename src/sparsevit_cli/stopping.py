"""SIGTERM and Ctrl-C: the first asks the loop to save and stop, the second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import StoppedError


class StopRequest:
    """Set by a signal, looked at by loops between two steps."""

    def __init__(self, to_go_on: str = "Type the same command to go on.") -> None:
        self.signal_number: int | None = None
        self.to_go_on = to_go_on

    @property
    def requested(self) -> bool:
        """True once a signal arrived."""
        return self.signal_number is not None

    def error(self, what: str, done: str) -> StoppedError:
        """The error to end with, once `done` (what was saved) is true."""
        name = signal.Signals(self.signal_number or signal.SIGTERM).name
        interrupted = self.signal_number == signal.SIGINT
        return StoppedError(what, f"{name} arrived; {done}", self.to_go_on, interrupted=interrupted)

    def check(self, what: str, done: str) -> None:
        """Raise StoppedError where a signal arrived."""
        if self.requested:
            raise self.error(what, done)


@contextmanager
def stop_on_signals(**told: str) -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a StopRequest while the block runs; a second signal raises at once.

    `told` goes to StopRequest. Outside the main thread signals cannot be caught, and the request stays unset.
    """
    request = StopRequest(**told)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request.requested:
            raise request.error("stopped", "a second signal ended the work at once; the last checkpoint is whole")
        request.signal_number = number

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
