"""Drawing in the background: a slow reader does not hold up the loop, loses no image, and ends the loop by leaving."""

import threading
import time
from collections.abc import Callable

import pytest

from dvq_rt.bench import given_jobs
from dvq_rt.decoding import Job, Loop, in_background
from dvq_rt.generator import Generator
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


def test_a_preview_does_not_hold_up_the_loop(generator: Generator) -> None:
    """While the reader looks at the first preview the loop draws to the end. Then all images are there, each once, as
    a plain loop makes them, and the previews that they overtook are not."""
    loop = generator._new_loop(4)
    plain = {e.job.index: e.cells for e in loop.run(jobs(generator, 4))}
    events = in_background(loop, jobs(generator, 4), every=4)
    first = next(events)
    assert not first.finished and eventually(lambda: not drawing())
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
    time.sleep(0.5)
    assert len(steps) < whole / 2
    assert len(list(events)) == 11 and len(steps) == whole


@pytest.mark.parametrize("read", [1, 3])
def test_leaving_ends_the_loop(generator: Generator, read: int) -> None:
    """Whoever stops reading, in the middle of images or with images waiting, leaves no thread behind."""
    loop = generator._new_loop(2)
    steps = count_steps(loop)
    events = in_background(loop, jobs(generator, 50), every=3)
    for _ in range(read):
        next(events)
    events.close()  # type: ignore[attr-defined]
    assert not drawing() and len(steps) < 1000
    again = generator._new_loop(2)
    assert len(list(in_background(again, jobs(generator, 2)))) == 2


def test_failures_reach_the_reader(generator: Generator) -> None:
    """An error of the loop is raised where its events are read, after those before it."""
    loop = generator._new_loop(1)
    step, left = loop.step, [60]

    def fails() -> None:
        left[0] -= 1
        if not left[0]:
            raise BackendError("the device is gone")
        step()

    loop.step = fails  # type: ignore[method-assign]
    events = in_background(loop, jobs(generator, 3))
    assert next(events).finished
    with pytest.raises(BackendError, match="the device is gone"):
        next(events)
    assert not drawing()
    guided = jobs(generator, 1)
    guided[0].params = type(guided[0].params)(guidance=2.0)
    with pytest.raises(InputError, match="guidance takes two slots an image"):
        list(in_background(loop, guided))
