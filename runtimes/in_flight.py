"""Runs of graphs that are under way: the interpreter does not end while a thread is inside native code."""

from __future__ import annotations

import atexit
import threading
import time

POLL = 0.01
"""Seconds between two looks at the runs that the end waits for."""


class InFlight:
    """Context manager around every call that may leave Python for native code for long.

    A daemon thread that comes back from such a call after the interpreter has ended aborts the process. So the end
    waits for the calls under way, and a thread that starts one after that ends as by ``SystemExit``, without a word.
    The main thread is never refused: it runs the end itself, and functions given to ``atexit`` may use graphs.
    """

    def __init__(self) -> None:
        # no lock: what a thread holds when it is forked or killed would stay locked
        self._threads: list[threading.Thread] = []
        self._ending = False
        atexit.register(self._end)

    def __enter__(self) -> None:
        thread = threading.current_thread()
        self._threads.append(thread)  # before the look, as _end looks after it has set _ending
        if self._ending and thread is not threading.main_thread():
            self._threads.remove(thread)
            raise SystemExit("the interpreter is ending, so no graph is run any more")

    def __exit__(self, *_: object) -> None:
        self._threads.remove(threading.current_thread())

    def _end(self) -> None:
        self._ending = True
        ours = threading.current_thread()
        while any(thread is not ours and thread.is_alive() for thread in self._threads.copy()):
            time.sleep(POLL)


IN_FLIGHT = InFlight()
