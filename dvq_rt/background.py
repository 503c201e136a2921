"""One batch for all callers: a thread that feeds their requests to a scheduler and hands its events back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from dvq_rt.decoding import DecodeLoop, Event, Handle, Request, Scheduler
from runtimes.errors import ClosedError

KEPT_LOOPS = 2
"""Decode loops, with their caches, that are kept for later."""
Watch = Callable[[Request, int], None]


class Load(NamedTuple):
    """How busy a batch was after its last step: its ``slots`` and those of them that are ``busy``, ``waiting`` requests
    without a slot, and the ``tokens`` drawn since it was made (with guidance, those of one of the two slots)."""

    slots: int
    busy: int
    waiting: int
    tokens: int


class Call:
    """One caller's requests, and its events that are not read yet. ``SharedBatch`` makes it."""

    def __init__(self, requests: Iterator[Request], watch: Watch | None, wake: Callable[[], None] | None) -> None:
        self.requests, self.watch, self.wake = requests, watch, wake
        self.handles: dict[Handle, None] = {}  # submitted and not finished, oldest first
        self.unread: dict[Handle, Event] = {}
        self.exhausted = self.left = False
        self.failure: BaseException | None = None

    @property
    def outstanding(self) -> int:
        """Requests that were taken and whose last event is not read."""
        return len(self.handles) + sum(event.finished for event in self.unread.values())

    @property
    def over(self) -> bool:
        return self.failure is not None or (self.exhausted and not self.outstanding)

    def put(self, event: Event) -> None:
        """A newer preview takes the older one's place; finished images queue in the order in which they end."""
        if event.finished:
            self.unread.pop(event.handle, None)
            self.handles.pop(event.handle, None)
        self.unread[event.handle] = event


class SharedBatch:
    """Draws the requests of all threads side by side.

    A thread runs while there is work. The batch starts with as many slots as are asked for and grows with what comes
    while it runs, up to ``capacity``. Of one call at most twice that many images are being drawn, waiting or unread,
    so memory is bounded and a caller who reads slowly holds up no other. Which call gets a free slot is told by
    ``Scheduler``.

    Args:
        open_loop: makes a decode loop of so many slots.
        capacity: most slots; fixed: whether loops always have as many.
    """

    def __init__(self, open_loop: Callable[[int], DecodeLoop], capacity: int, fixed: bool) -> None:
        self._open_loop, self._capacity, self._fixed = open_loop, capacity, fixed
        self.load = Load(capacity, 0, 0, 0)
        self._changed = threading.Condition()
        self._calls: list[Call] = []
        self._thread: threading.Thread | None = None
        self._loops: list[DecodeLoop] = []  # only the thread uses it

    def draw(self, requests: Iterable[Request], watch: Watch | None = None) -> Generator[Event, None, None]:
        """Events of the requests, in the order in which they happen; while one is being looked at drawing goes on.

        The event of an unfinished image is left out if a newer one of it overtakes it. Closing the generator cancels
        what is not finished.

        Args:
            requests: taken one by one as slots become free.
            watch: called in the drawing thread with the request and its number of tokens after each token of an
                unfinished image; what it raises cancels the call and is raised here.

        Raises:
            what the backend or ``watch`` raises, after the events before it.
        """
        call = self.open(requests, watch)
        try:
            while (event := self._next(call)) is not None:
                yield event
            self.check(call)
        finally:
            self.leave(call)

    def open(
        self, requests: Iterable[Request], watch: Watch | None = None, wake: Callable[[], None] | None = None
    ) -> Call:
        """Begin a call whose events are taken by ``take``, for those who cannot wait in a thread; ``leave`` it after.

        Args:
            requests, watch: as for ``draw``.
            wake: called in the drawing thread when there is something to take or the call is over; must be quick, must
                not raise, and must not use the batch.
        """
        call = Call(iter(requests), watch, wake)
        with self._changed:
            self._calls.append(call)
            if self._thread is None or not self._thread.is_alive():  # it does not survive a fork
                self._thread = threading.Thread(target=self._run, name="dvq_rt loop", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return call

    def take(self, call: Call) -> tuple[list[Event], bool]:
        """The events of a call that are there, without waiting for more, and whether they were the last."""
        with self._changed:
            events = list(call.unread.values())
            call.unread.clear()
            self._changed.notify_all()
            return events, call.over

    def check(self, call: Call) -> None:
        """
        Raises:
            what ended the call, if it failed.
        """
        if call.failure is not None:
            failure, call.failure = call.failure, None  # its traceback holds the thread's objects
            raise failure

    def leave(self, call: Call) -> None:
        """Cancel what is not finished of a call; its slots are free in the next step."""
        with self._changed:
            call.left = True
            self._changed.notify_all()

    def end(self) -> None:
        """Cancel all work, which raises where it is waited for, and return once no thread is inside the graph."""
        with self._changed:
            thread = self._thread
            for call in self._calls:
                call.failure = ClosedError("the engine was closed while images were being drawn")
            self._notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _next(self, call: Call) -> Event | None:
        """The next event of a call; None after its last one."""
        with self._changed:
            while not self._changed.wait_for(lambda: call.unread or call.over or call.left, 0.5):
                pass  # a wait without a limit cannot be interrupted on Windows
            if not call.unread:
                return None
            event = call.unread.pop(next(iter(call.unread)))
            self._changed.notify_all()
            return event

    # --- the thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        scheduler: Scheduler | None = None
        try:
            while True:
                with self._changed:
                    try:
                        scheduler = self._prepare(scheduler)
                    except BaseException as error:  # before a reader sees its request taken and nothing outstanding
                        self._fail(error)
                        return
                    if not self._calls:
                        self._stop()
                        return
                    if not scheduler or not scheduler.busy:
                        self._changed.wait()  # for a reader
                        continue
                self._tell(scheduler, scheduler.step())
        except BaseException as error:
            with self._changed:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        for call in self._calls:
            call.failure = error
        self._notify()
        self._calls.clear()
        self._loops.clear()
        self._stop()

    def _stop(self) -> None:
        self._thread = None
        self.load = self.load._replace(busy=0, waiting=0)
        self._changed.notify_all()

    def _notify(self) -> None:
        """Tell those who wait that something has changed."""
        self._changed.notify_all()
        for call in self._calls:
            if call.wake is not None and (call.unread or call.over):
                call.wake()

    def _prepare(self, scheduler: Scheduler | None) -> Scheduler | None:
        """Forget calls that were left, take requests, and see to a loop that is large enough."""
        for call in [call for call in self._calls if call.left or call.over]:
            self._calls.remove(call)
            for handle in call.handles:
                assert scheduler is not None
                scheduler.cancel(handle)
        idle = scheduler is None or not (scheduler.busy or any(call.outstanding for call in self._calls))
        new = [(call, request) for call in self._calls for request in self._take(call)]
        if not new:
            return scheduler
        wanted = sum(request.width for _, request in new) + (scheduler.wanted if scheduler else 0)
        wanted = self._capacity if self._fixed else min(wanted, self._capacity)
        if scheduler is None or idle:
            scheduler = Scheduler(self._loop(wanted))
        elif wanted > scheduler.loop.slots:
            scheduler.move(self._loop(wanted))
        for call, request in new:
            call.handles[scheduler.submit(request, call)] = None
        return scheduler

    def _take(self, call: Call) -> list[Request]:
        """As many of a call's requests as it may have outstanding."""
        room = 0 if call.exhausted else max(0, 2 * self._capacity - call.outstanding)
        try:
            requests = list(islice(call.requests, room))
        except Exception as error:
            call.failure, requests = error, []
        if len(requests) < room:
            call.exhausted = True
            self._notify()
        return requests

    def _loop(self, slots: int) -> DecodeLoop:
        """A loop of so many slots, one of those kept if there is one; it is the last of those kept."""
        fitting = [loop for loop in self._loops if loop.slots == slots]
        loop = fitting[0] if fitting else self._open_loop(slots)
        self._loops = [*(kept for kept in self._loops if kept is not loop), loop][-KEPT_LOOPS:]
        return loop

    def _tell(self, scheduler: Scheduler, events: list[Event]) -> None:
        """Hand events to their calls, let those watch that want to, and say how busy the batch is."""
        drawn = len(scheduler.active) + sum(event.finished for event in events)
        for handle in scheduler.active:
            call = handle.owner
            assert isinstance(call, Call)
            if call.watch is not None and call.failure is None:
                try:
                    call.watch(handle.request, handle.steps)
                except BaseException as error:
                    call.failure = error
        with self._changed:
            for event in events:
                call = event.handle.owner
                assert isinstance(call, Call)
                call.put(event)
            if events or any(call.failure for call in self._calls):
                self._notify()
            busy = sum(handle.request.width for handle in scheduler.active)
            tokens = self.load.tokens + drawn
            self.load = Load(self._capacity, busy, scheduler.waiting, tokens)
