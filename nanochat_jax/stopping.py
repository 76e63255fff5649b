"""SIGTERM and SIGINT: a training loop finishes its step and saves; what cannot be saved in the middle ends at once.

Python runs signal handlers on the main thread between two bytecodes, so not while it is inside a compiler or a kernel,
and several signals become one. A thread that is told of each signal through a pipe does what cannot wait for that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from nanochat_jax.distributed import fail, is_shared, should_stop

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _BrokenOff(BaseException):
    """Leaves a measurement that a signal ended."""


class Stop:
    """What a training loop asks at the end of each step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that this process was sent."""
        self.agreed = False
        self._measuring = False

    def now(self, step: int) -> bool:
        """Whether the loop ends after `step` steps: a signal came to any of the processes, which all ask this."""
        self.agreed = self.agreed or should_stop(step, self.signal is not None)
        return self.agreed

    def measure(self, action: Callable[[], None]) -> None:
        """Runs what a signal may break off or leave out, because the next start makes it good: a validation.

        With several processes, which take part in it together, it runs to its end.
        """
        if is_shared():
            action()
            return
        with suppress(_BrokenOff):
            self._measuring = True
            if self.signal is None:
                action()
            self._measuring = False

    def _on_main(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)
        if self._measuring:
            self._measuring = False
            raise _BrokenOff


@contextmanager
def stoppable(name: str, log: Callable[[str], None]) -> Iterator[Stop]:
    """Inside, a signal only asks the loop of the stage `name` to stop; SIGINT after any other exits at once, 130.

    A signal that the loop did not come to ask about acts after it, as it would have without.
    """
    stop, seen = Stop(), []

    def at_once(number: int) -> None:
        if seen and number == signal.SIGINT:
            os._exit(128 + number)
        if not seen:
            log(f"{name}: {signal.Signals(number).name}: saving after this step; Ctrl-C ends at once, without saving")
        seen.append(number)

    with _handled(stop._on_main, at_once):
        yield stop
    if stop.signal is not None and not stop.agreed:
        signal.raise_signal(stop.signal)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Inside, a signal ends the process with one line and the signal's status, whatever the main thread is in."""

    def exit_now(number: int) -> None:
        print(said(number), file=sys.stderr, flush=True)
        fail(said(number), 128 + number)
        os._exit(128 + number)

    with _handled(lambda *_: None, exit_now):
        yield


def said(number: int) -> str:
    """The one line about a command that a signal ended."""
    return f"stopped by {signal.Signals(number).name}: what was finished stays; the same command goes on from there"


@contextmanager
def _handled(on_main: Callable[[int, FrameType | None], None], at_once: Callable[[int], None]) -> Iterator[None]:
    """SIGNALS go to `on_main` as Python's handlers do, and to `at_once` on a thread of its own; restored after."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's business
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while received := os.read(reader, 1):
            if received[0] in SIGNALS:
                at_once(received[0])

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    before = {number: signal.signal(number, on_main) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)
