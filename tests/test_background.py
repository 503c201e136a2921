"""Drawing in the background: a slow reader does not hold up the loop, loses no image, and ends the loop by leaving."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from dvq_rt.bench import given_jobs
from dvq_rt.decoding import Job, Loop, in_background
from dvq_rt.generator import Generator
from dvq_rt.sampling import SamplingParams
from runtimes.errors import BackendError, InputError

NAME = "dvq_rt loop"


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something comes true within ten seconds."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def drawing() -> bool:
    return any(thread.name == NAME for thread in threading.enumerate())


def jobs(generator: Generator, count: int) -> list[Job]:
    return given_jobs(generator.layout, [40 + i for i in range(count)])


def count_steps(loop: Loop) -> list[int]:
    """A list that grows by one with every step of the loop."""
    steps: list[int] = []
    step = loop.step

    def counted() -> None:
        steps.append(0)
        step()

    loop.step = counted  # type: ignore[method-assign]
    return steps


def hold(loop: Loop, after: int) -> threading.Event:
    """Let the loop take so many steps, and the others once the returned event is set."""
    steps, go = count_steps(loop), threading.Event()
    step = loop.step

    def held() -> None:
        if len(steps) >= after:
            assert go.wait(10)
        step()

    loop.step = held  # type: ignore[method-assign]
    return go


def test_a_preview_does_not_hold_up_the_loop(generator: Generator) -> None:
    """While the reader looks at the first preview the loop draws to the end. Then all images are there, each once, as
    a plain loop makes them, and the previews that they overtook are not."""
    loop = generator._new_loop(4)
    plain = {e.job.index: e.cells for e in loop.run(jobs(generator, 4))}
    go = hold(loop, after=6)
    events = in_background(loop, jobs(generator, 4), every=4)
    assert not next(events).finished
    go.set()
    assert eventually(lambda: not drawing())
    rest = list(events)
    assert [e.finished for e in rest] == [True] * 4
    assert {e.job.index: e.cells.tolist() for e in rest} == {i: c.tolist() for i, c in plain.items()}


def test_unread_images_are_bounded(generator: Generator) -> None:
    """The loop waits for a reader that is behind by as many images as it has slots, and loses none."""
    loop = generator._new_loop(2)
    steps = count_steps(loop)
    assert len(list(loop.run(jobs(generator, 12)))) == 12
    whole = len(steps)
    steps.clear()
    events = in_background(loop, jobs(generator, 12))
    next(events)
    assert still(steps) < whole / 2 and drawing()
    assert len(list(events)) == 11 and len(steps) == whole


def still(steps: list[int]) -> int:
    """Number of steps once no more are taken for a while."""
    count = -1
    while count != len(steps):
        count = len(steps)
        time.sleep(0.3)
    return count


@pytest.mark.parametrize("waiting", [False, True])
def test_leaving_ends_the_loop(waiting: bool, generator: Generator) -> None:
    """Whoever stops reading, in the middle of an image or while the loop waits for its reader, leaves no thread and
    no loop behind, without help of the garbage collector."""
    loop = generator._new_loop(2)
    steps = count_steps(loop)
    events = in_background(loop, jobs(generator, 50), every=3)
    next(events)
    if waiting:
        still(steps)
    gc.disable()
    try:
        watched = weakref.ref(loop)
        events.close()
        taken = len(steps)
        assert eventually(lambda: not drawing()) and len(steps) <= taken + 1
        del loop.step, loop, events
        assert eventually(lambda: watched() is None)
    finally:
        gc.enable()
    again = generator._new_loop(2)
    assert len(list(in_background(again, jobs(generator, 2)))) == 2


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
    loop = generator._new_loop(1)
    step, left = loop.step, [60]

    def fails() -> None:
        left[0] -= 1
        if not left[0]:
            raise error
        step()

    loop.step = fails  # type: ignore[method-assign]
    events = in_background(loop, jobs(generator, 3))
    assert next(events).finished
    with pytest.raises(type(error), match="the device is gone"):
        next(events)
    assert not drawing()
    guided = jobs(generator, 1)
    guided[0].params = SamplingParams(guidance=2.0)
    with pytest.raises(InputError, match="guidance takes two slots an image"):
        list(in_background(loop, guided))
