"""Ctrl-C and SIGTERM: what ends with a line in place of a traceback, and with everything written whole.

Standard library alone: every script begins with `in_one_line`, before its imports of seconds.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


def in_one_line() -> None:
    """From now on SIGINT and SIGTERM end the program with a line; for the time until `run_script` takes over."""

    def stop(number: int, frame) -> None:
        with contextlib.suppress(Exception):  # it may be closed
            os.write(sys.stderr.fileno(), b"stopped before it began\n")
        os._exit(128 + number)

    for number in _heeded():
        signal.signal(number, stop)


class Stopped(BaseException):
    """A signal ended the work early; the message says what is kept. No error: who handles those lets it pass."""

    def __init__(self, number: int, message: str):
        super().__init__(number, message)
        self.number, self.message = number, message

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def signals_kept() -> Iterator[Callable[[], int]]:
    """SIGINT and SIGTERM do not end the block: the function that it is given says which came, 0 for none.

    A second one does what it did before. One that is ignored stays so (a job in the background ignores Ctrl-C), and in
    a thread nothing changes: signals are the main thread's.
    """
    came, before = [0], {}

    def note(number: int, frame) -> None:
        came[0] = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, note) for number in _heeded()}
    try:
        yield lambda: came[0]
    finally:
        restore()


def _heeded() -> list[int]:
    """SIGINT and SIGTERM, but what is ignored."""
    return [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]


def run_script(main: Callable[[], object]) -> None:
    """`main()`; where SIGINT (Ctrl-C) or SIGTERM ends it, one line and the exit status 128 + the signal's number."""

    def stop(number: int, frame) -> None:
        if os.getpid() != own:  # a process that this one has forked, which tells nobody
            os._exit(128 + number)
        raise Stopped(number, "stopped; every file written so far is whole")

    own = os.getpid()
    for number in _heeded():
        signal.signal(number, stop)
    try:
        main()
    except Stopped as end:
        print(end, file=sys.stderr)
        sys.exit(128 + end.number)
