"""SIGTERM, SIGHUP and Ctrl-C: the first asks the loop to save and stop, the second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import StoppedError

HANG_UP = getattr(signal, "SIGHUP", None)
"""The terminal was closed; None on systems that have no such signal."""


class StopRequest:
    """Set by a signal, looked at by loops between two steps."""

    def __init__(self, to_go_on: str = "Type the same command to go on.") -> None:
        self.signal_number: int | None = None
        self.elsewhere: int | None = None
        """The signal that another process of the same training got; one that arrives here is still the first one."""
        self.ends_at_once = False
        self.to_go_on = to_go_on

    @property
    def requested(self) -> bool:
        """True once a signal arrived.

        Raises StoppedError once a second one did: its own StoppedError may have been lost inside a library, and then
        nothing may be saved of the step that it broke.
        """
        if self.ends_at_once:
            raise self._at_once()
        return self.number != 0

    @property
    def number(self) -> int:
        """Of the signal that arrived here or elsewhere; 0 while there is none."""
        return self.signal_number or self.elsewhere or 0

    def error(self, what: str, done: str) -> StoppedError:
        """The error to end with, once `done` (what was saved) is true."""
        name = signal.Signals(self.number or signal.SIGTERM).name
        interrupted = self.number == signal.SIGINT
        return StoppedError(what, f"{name} arrived; {done}", self.to_go_on, interrupted=interrupted)

    def check(self, what: str, done: str) -> None:
        """Raise StoppedError where a signal arrived."""
        if self.requested:
            raise self.error(what, done)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """The handler. A closed terminal often sends SIGHUP twice, so that one never counts as the second signal."""
        if self.signal_number is None:
            self.signal_number = number
        elif number != HANG_UP:
            self.ends_at_once = True
            raise self._at_once()

    def _at_once(self) -> StoppedError:
        return self.error("stopped", "a second signal ended the work at once; the last checkpoint is whole")


@contextmanager
def stop_on_signals(**told: str) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGHUP and SIGINT into a StopRequest while the block runs; a second signal raises at once.

    SIGHUP stays ignored under nohup. `told` goes to StopRequest. Outside the main thread signals cannot be caught, and
    the request stays unset.
    """
    request = StopRequest(**told)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = [signal.SIGTERM, signal.SIGINT]
    if HANG_UP is not None and signal.getsignal(HANG_UP) is not signal.SIG_IGN:
        caught.append(HANG_UP)
    previous = {number: signal.signal(number, request.on_signal) for number in caught}
    try:
        yield request
    finally:
        for number, handler in previous.items():  # None: a handler that is not Python's
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
