"""The shared batch: a slow reader holds up nobody and loses no image, leaving ends the work, callers share slots."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from dvq_rt.background import SharedBatch
from dvq_rt.bench import given_requests
from dvq_rt.decoding import DecodeLoop, Event, Request, Scheduler
from dvq_rt.engine import Engine, run_alone
from dvq_rt.generator import Generator
from dvq_rt.sampling import SamplingParams
from runtimes.errors import BackendError, InputError

NAME = "dvq_rt loop"


class Watched(DecodeLoop):
    """A loop that may wait for a gate before a step, or fail in it."""

    gate_after, gate, fail_at = 10**9, threading.Event(), 0
    failure: BaseException = BackendError("the device is gone")

    def step(self) -> None:
        if self.calls >= self.gate_after:
            assert self.gate.wait(10)
        if self.calls + 1 == self.fail_at:
            raise self.failure
        super().step()


class Batch(SharedBatch):
    """A shared batch of so many slots whose loops are kept for a look."""

    def __init__(self, engine: Engine, slots: int, fixed: bool = True, **settings: Any) -> None:
        made: list[Watched] = []  # and not the batch itself, which would be a circle

        def open_loop(count: int) -> DecodeLoop:
            loop = Watched(engine.backend, engine.program("step"), engine.table, count)
            for name, value in settings.items():
                setattr(loop, name, value)
            made.append(loop)
            return loop

        super().__init__(open_loop, slots, fixed)
        self.made = made

    @property
    def steps(self) -> int:
        return sum(loop.calls for loop in self.made)


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something comes true within ten seconds."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def drawing() -> bool:
    return any(thread.name == NAME for thread in threading.enumerate())


def images(engine: Engine, count: int, **values: Any) -> list[Request]:
    """Requests of images of growing length."""
    lengths = [40 + i for i in range(count)]
    return [
        Request(r.label, r.params, r.seed, r.image, r.forced, key=r.key, **values)
        for r in given_requests(engine.layout, lengths)
    ]


def cells(events: list[Event]) -> dict[Any, list[int]]:
    return {event.request.key: event.cells.tolist() for event in events if event.finished}


def test_a_preview_does_not_hold_up_the_loop(generator: Generator) -> None:
    """While the reader looks at the first preview the loop draws to the end. Then all images are there, each once, as
    a loop of their own makes them, and the previews that they overtook are not."""
    engine = generator.engine
    alone = cells(list(run_alone(engine.loop(4), images(engine, 4))))
    gate = threading.Event()
    batch = Batch(engine, 4, gate_after=6, gate=gate)
    events = batch.draw(images(engine, 4, every=4))
    assert not next(events).finished
    gate.set()
    assert eventually(lambda: batch.steps > 40 and still(batch) == batch.steps)
    rest = list(events)
    assert [e.finished for e in rest] == [True] * 4
    assert cells(rest) == alone


def test_unread_images_are_bounded(generator: Generator) -> None:
    """The loop waits for a reader that is behind by twice as many images as there are slots, and loses none."""
    engine = generator.engine
    loop = engine.loop(2)
    alone = cells(list(run_alone(loop, images(engine, 16))))
    batch = Batch(engine, 2)
    asked: list[Request] = []
    events = batch.draw(asked.append(request) or request for request in images(engine, 16))  # type: ignore[func-returns-value]
    first = next(events)
    assert still(batch) < loop.calls / 2 and drawing()
    assert len(asked) == 5, "requests are taken when there is room for them"
    assert cells([first, *events]) == alone


def still(batch: Batch) -> int:
    """Number of steps once no more are taken for a while."""
    count = -1
    while count != batch.steps:
        count = batch.steps
        time.sleep(0.3)
    return count


@pytest.mark.parametrize("waiting", [False, True])
def test_leaving_ends_the_loop(waiting: bool, generator: Generator) -> None:
    """Whoever stops reading, in the middle of an image or while the loop waits for its reader, leaves no thread and
    no loop behind, without help of the garbage collector."""
    batch = Batch(generator.engine, 2)
    events = batch.draw(images(generator.engine, 50, every=3))
    next(events)
    if waiting:
        still(batch)
    gc.disable()
    try:
        watched = weakref.ref(batch.made[0])
        steps = batch.steps
        events.close()
        assert eventually(lambda: not drawing()) and batch.steps <= steps + 2
        assert len(list(batch.draw(images(generator.engine, 2)))) == 2
        assert eventually(lambda: not drawing())
        del batch, events
        assert eventually(lambda: watched() is None)
    finally:
        gc.enable()


def test_a_slow_reader_holds_up_nobody(generator: Generator) -> None:
    """A caller who does not read keeps the slots of at most a batch; another one's images are drawn meanwhile."""
    engine = generator.engine
    batch = Batch(engine, 2)
    slow = batch.draw(images(engine, 30))
    first = next(slow)
    assert cells(list(batch.draw(images(engine, 3)))) == cells(list(run_alone(engine.loop(2), images(engine, 3))))
    assert len(cells([first, *slow])) == 30


def test_callers_share_a_batch(generator: Generator) -> None:
    """Two callers of eight images each take no more steps than one caller of sixteen, and get the same images; guided
    and plain ones lie in one batch."""
    engine, guided = generator.engine, SamplingParams(guidance=2.0)
    requests = [Request(i % 3, guided if i % 4 == 0 else SamplingParams(), seed=4, image=i, key=i) for i in range(16)]
    loop = engine.loop(4)
    alone = cells(list(run_alone(loop, requests)))
    gate = threading.Event()
    batch = Batch(engine, 4, gate_after=1, gate=gate)
    drawn: list[Event] = []
    threads = [
        threading.Thread(target=lambda part=part: drawn.extend(batch.draw(part)))
        for part in (requests[:8], requests[8:])
    ]
    for thread in threads:
        thread.start()
    assert eventually(lambda: batch.steps == 1)
    time.sleep(0.2)  # for the other call to come
    gate.set()
    for thread in threads:
        thread.join()
    assert cells(drawn) == alone and len(batch.made) == 1
    assert batch.steps <= loop.calls * 1.1


def test_the_batch_grows_with_what_comes(generator: Generator) -> None:
    """A second caller's images join the first one's, already half drawn, in a loop of more slots; both get the images
    that they get alone."""
    engine = generator.engine
    requests = [Request(i % 3, SamplingParams(), seed=7, image=i, key=i) for i in range(4)]
    alone = cells(list(run_alone(engine.loop(1), requests)))
    gate = threading.Event()
    batch = Batch(engine, 4, fixed=False, gate_after=9, gate=gate)
    first, second = batch.draw(requests[:1]), batch.draw(requests[1:])
    events = [first, second]
    results: list[Event] = []
    threads = [threading.Thread(target=lambda e=e: results.extend(e)) for e in events]
    threads[0].start()
    assert eventually(lambda: batch.steps == 9)
    threads[1].start()
    time.sleep(0.2)
    gate.set()
    for thread in threads:
        thread.join()
    assert cells(results) == alone
    assert [loop.slots for loop in batch.made] == [1, 4]


def test_a_watcher_may_cancel(generator: Generator) -> None:
    """What a caller's per-token function raises ends that caller's images alone, at once."""
    engine = generator.engine
    batch = Batch(engine, 2)
    seen: list[int] = []

    def watch(request: Request, steps: int) -> None:
        seen.append(steps)
        if steps == 5:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        list(batch.draw(images(engine, 1), watch))
    assert seen == [1, 2, 3, 4, 5]
    assert len(list(batch.draw(images(engine, 3)))) == 3


def test_an_engine_is_freed_with_its_last_user(generator: Generator) -> None:
    """Dropping a generator frees graphs and caches at once, without help of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        one = Generator(generator.path, slots=2, threads=1)
        one.sample(2)
        watched = weakref.ref(one.engine)
        previews = one.stream(3, every=2)
        next(previews)
        del one
        assert watched() is not None, "whoever streams keeps the engine"
        previews.close()  # type: ignore[attr-defined]
        del previews
        assert eventually(lambda: watched() is None)
    finally:
        gc.enable()


def test_the_end_of_the_process(generator: Generator) -> None:
    """A program that ends with a stream half read ends well, and at once."""
    code = f"""
from dvq_rt.generator import Generator
stream = Generator({str(generator.path)!r}, threads=1).stream(400, labels="ant", every=2)
print(next(stream).index)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.mark.parametrize("error", [BackendError("the device is gone"), KeyboardInterrupt("the device is gone")])
def test_failures_reach_the_reader(error: BaseException, generator: Generator) -> None:
    """An error of the loop, of whatever kind, is raised where its events are read, after those before it."""
    engine = generator.engine
    batch = Batch(engine, 1, fail_at=60, failure=error)
    events = batch.draw(images(engine, 3))
    assert next(events).finished
    with pytest.raises(type(error), match="the device is gone"):
        next(events)
    assert eventually(lambda: not drawing())
    scheduler = Scheduler(engine.loop(1))
    with pytest.raises(InputError, match="guidance takes two slots an image"):
        scheduler.submit(Request(0, SamplingParams(guidance=2.0)))


def test_closing_ends_what_is_drawn(generator: Generator) -> None:
    """A generator that is closed while another thread draws raises there, and draws no more."""
    with Generator(generator.path, slots=2, threads=1) as closing:
        previews = closing.stream(200, labels="ant", every=1)
        next(previews)
    with pytest.raises(InputError, match="closed"):
        list(previews)
    with pytest.raises(InputError, match="this generator is closed"):
        closing.sample(1)
    assert eventually(lambda: not drawing())
