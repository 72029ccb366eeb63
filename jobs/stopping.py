"""SIGTERM: work ends in order, within ten seconds, whatever is at work just then."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from rollsight.inspect.errors import LOCKED

WITHIN_S = 8.0  # systemd and Kubernetes kill after 10 s and more; two are left for the last writes


class StoppedError(BaseException):
    """The process was told to stop. No Exception: what catches faults of a roll must not catch it."""


def is_stop(fault: BaseException | None) -> bool:
    """Whether this was raised because the process was told to stop: a StoppedError stands behind it."""
    while fault is not None and not isinstance(fault, StoppedError):
        fault = fault.__context__
    return fault is not None


@contextlib.contextmanager
def stopping(at_last: Callable[[], None], within_s: float = WITHIN_S) -> Iterator[None]:
    """Raise StoppedError in the main thread at SIGTERM; the process ends after `within_s` at the latest.

    A band at work in a thread cannot be interrupted: where it takes longer, `at_last` is called (it gives
    leases back) and the process ends without it, which costs that band alone. Outside the main thread
    nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end() -> None:
        with contextlib.suppress(Exception):  # a lease that is not given back runs out by itself
            at_last()
        sys.stderr.flush()
        os._exit(LOCKED)

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        timer = threading.Timer(within_s, end)
        timer.daemon = True
        timer.start()
        raise StoppedError

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
