"""The autoregressive loop: slots, state buffers, refills, and when an image is done.

The loop only calls the step graph, whose contract is in ``export.steps.Step``: state goes in and comes out in two sets
of buffers that swap roles every step, caches stay in place, controls are written only when a slot gets a new image.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dvq_rt.layout import TokenLayout
from dvq_rt.manifest import Manifest
from dvq_rt.sampling import SamplingParams
from runtimes.errors import EngineError, InputError
from runtimes.protocol import Backend, Buffer, Program


@dataclass(slots=True)
class Job:
    """One image to draw.

    Attributes:
        index: the caller's number of the image.
        label: start label; with guidance a second slot starts with the null label.
        uniforms: float32 [Tmax, 2], the image's random numbers.
        params: sampling parameters.
        forced: joint positions and contents of tokens 1, 2, ... that are taken instead of drawn (int64, -1 draws).
        steps: tokens taken so far.
    """

    index: int
    label: int
    uniforms: NDArray[np.float32]
    params: SamplingParams
    forced: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    steps: int = 0


class Event(NamedTuple):
    """State of an image: ``cells`` int32 [cells] (-1 where no code stands yet, else segment * K + code)."""

    job: Job
    cells: NDArray[np.int32]
    finished: bool


class Loop:
    """The step graph bound to buffers for a fixed number of slots.

    Args:
        backend, program: the step graph on its device.
        manifest: its interface.
        slots: B.
    """

    def __init__(self, backend: Backend, program: Program, manifest: Manifest, slots: int) -> None:
        self.layout, self.slots, self._poll = manifest.layout, slots, backend.poll
        interface = manifest.step
        caches = dict(interface["caches"])

        def allocate(spec: dict[str, Any]) -> Buffer:
            shape = tuple(slots if size == "B" else size for size in spec["shape"])
            return backend.allocate(shape, spec["dtype"])

        inputs = {spec["name"]: spec for spec in interface["inputs"]}
        outputs = {spec["name"]: spec for spec in interface["outputs"]}
        state = [name for name in inputs if f"{name}_out" in outputs and name not in caches]
        controls = [name for name in inputs if name not in state and name not in caches]
        self._state = [{name: allocate(inputs[name]) for name in state} for _ in range(2)]
        self._controls = {name: allocate(inputs[name]) for name in controls}
        self._host = {name: buffer.read().copy() for name, buffer in self._controls.items()}
        self._reports = {
            name: allocate(spec)
            for name, spec in outputs.items()
            if not (name.endswith("_out") and name[:-4] in inputs) and name not in caches.values()
        }
        kept = {name: allocate(inputs[name]) for name in caches}
        self._bindings = []
        for side in range(2):
            into = {f"{name}_out": buffer for name, buffer in self._state[1 - side].items()}
            self._bindings.append(
                program.bind(
                    {**self._state[side], **self._controls, **kept},
                    {**into, **self._reports, **{caches[name]: buffer for name, buffer in kept.items()}},
                )
            )
        self._side = 0
        self._asked: dict[str, Buffer] = {}
        self._idle()

    def _idle(self) -> None:
        """Every slot done, neutral controls."""
        self._asked.clear()
        for state in self._state:
            state["done"].write(np.ones(self.slots, dtype=bool))
        host = self._host
        for name in ("temperature", "top_p", "top_p_position", "partner_weight", "top_k", "top_k_position"):
            host[name][:] = 1
        host["partner"][:] = np.arange(self.slots)
        host["forced_position"][:] = host["forced_content"][:] = -1
        host["reset"][:] = False
        for name, buffer in self._controls.items():
            buffer.write(host[name])

    def report(self, name: str) -> NDArray[Any]:
        """A report of the last step, see ``export.steps.Step``."""
        return self._reports[name].read()

    def step(self) -> None:
        """One token of every slot that is not done."""
        self._bindings[self._side].run()
        self._side = 1 - self._side

    def request(self, name: str) -> None:
        """Start copying a state tensor; the next ``read`` of it gives it as it is now."""
        self._asked[name] = self._state[self._side][name]
        self._asked[name].request()

    def read(self, name: str) -> NDArray[Any]:
        """A state tensor as it was at ``request``, or else after the last step."""
        return (self._asked.pop(name, None) or self._state[self._side][name]).read()

    def set_state(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite state tensors that the next step reads, as a benchmark does to repeat one step."""
        for name, array in values.items():
            self._state[self._side][name].write(array)

    def run(
        self, jobs: Iterable[Job], every: int = 0, watch: Callable[[dict[int, Job]], None] | None = None
    ) -> Iterator[Event]:
        """Draw all jobs; images that wait take over the slots of those that are done.

        Args:
            jobs: any number of them. If one is guided all take two slots.
            every: also report unfinished images every so many steps; 0 for finished ones only.
            watch: called after every step with the job of each busy slot; may read ``report``. A device that is
                polled rarely may call it a few times more after an image is done.

        Yields:
            events of images in the order in which they finish.
        """
        waiting = deque(jobs)
        width = 2 if any(job.params.guidance != 1 for job in waiting) else 1
        if self.slots < width:
            raise InputError(
                f"guidance takes two slots an image, but the generator has {self.slots}; use slots=2 or more"
            )
        active: dict[int, Job] = {}
        free = list(range(0, self.slots - width + 1, width))[::-1]
        self._idle()
        count = told = 0
        while waiting or active:
            started = False
            while waiting and free:
                slot = free.pop()
                active[slot] = waiting.popleft()
                self._start(slot, width, active[slot])
                started = True
            if started:
                for name in self._host:
                    self._controls[name].write(self._host[name])
            if any(job.forced for job in active.values()):
                self._force(active, width)
            self.step()
            if started:
                self._host["reset"][:] = False
                self._controls["reset"].write(self._host["reset"])
            count += 1
            for job in active.values():
                job.steps += 1
            if watch:
                watch(active)
            if self._poll == 1 or (count + 1) % self._poll == 0:
                self.request("done")  # copied while the device goes on with the next step
            if count % self._poll:
                continue
            done = self.read("done")
            finished = [slot for slot in active if done[slot]]
            due = every > 0 and count - told >= every
            if finished or due:
                cells, told = self.read("cells").copy(), count if due else told
                for slot in list(active):
                    if slot in finished:
                        free.append(slot)
                        yield Event(active.pop(slot), cells[slot], True)
                    elif due:
                        yield Event(active[slot], cells[slot], False)
            for job in active.values():
                if job.steps > self.layout.max_length + self._poll:
                    raise EngineError(f"image {job.index} did not end after {job.steps} tokens; the engine is broken")

    def _start(self, slot: int, width: int, job: Job) -> None:
        """Fill the controls of the one or two slots of a job."""
        params, host = job.params, self._host
        for place in range(slot, slot + width):
            host["reset"][place] = True
            host["label"][place] = job.label if place == slot else self.layout.classes
            host["uniforms"][place] = job.uniforms
            host["temperature"][place] = params.temperature
            host["top_k"][place] = params.top_k or self.layout.content_vocabulary
            host["top_p"][place] = params.top_p
            host["top_k_position"][place] = params.top_k_position or self.layout.position_head
            host["top_p_position"][place] = params.top_p_position
            host["ordered"][place] = params.positions == "ordered"
            host["partner"][place] = 2 * slot + width - 1 - place  # of a pair, the other one
            host["partner_weight"][place] = params.guidance
            host["forced_position"][place] = host["forced_content"][place] = -1

    def _force(self, active: dict[int, Job], width: int) -> None:
        """Write this step's forced tokens, the same into both slots of a pair."""
        for i, name in enumerate(("forced_position", "forced_content")):
            for slot, job in active.items():
                forced = job.forced[i] if job.forced else ()
                self._host[name][slot : slot + width] = forced[job.steps] if job.steps < len(forced) else -1
            self._controls[name].write(self._host[name])


class _Abandoned(Exception):
    """Nobody reads the events any more."""


class _Drawing(threading.Thread):
    """``Loop.run`` in a thread of its own, and its events that are not read yet."""

    def __init__(self, loop: Loop, jobs: Iterable[Job], every: int) -> None:
        super().__init__(name="dvq_rt loop", daemon=True)
        self._loop, self._jobs, self._every = loop, jobs, every
        self._changed = threading.Condition()
        self._unread: dict[int, Event] = {}
        self._ended = self._abandoned = False
        self.failure: BaseException | None = None
        atexit.register(self.end)  # no thread may be inside a graph when the interpreter ends

    def run(self) -> None:
        try:
            for event in self._loop.run(self._jobs, self._every, self._go_on):
                self._put(event)
        except _Abandoned:
            pass
        except BaseException as error:
            self.failure = error
        finally:
            atexit.unregister(self.end)
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _go_on(self, _: dict[int, Job]) -> None:
        if self._abandoned:
            raise _Abandoned

    def _room(self) -> bool:
        return self._abandoned or sum(event.finished for event in self._unread.values()) < self._loop.slots

    def _put(self, event: Event) -> None:
        # a newer preview takes the older one's place; finished images queue in the order in which they end
        with self._changed:
            self._changed.wait_for(self._room)
            if event.finished:
                self._unread.pop(event.job.index, None)
            self._unread[event.job.index] = event
            self._changed.notify_all()

    def next(self) -> Event | None:
        """The next event; None after the last one."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._unread or self._ended, 0.5):
                pass  # a wait without a limit cannot be interrupted on Windows
            if not self._unread:
                return None
            event = self._unread.pop(next(iter(self._unread)))
            self._changed.notify_all()
            return event

    def leave(self) -> None:
        """Let the thread end after the step that it is in."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def end(self) -> None:
        """Leave, and wait for the thread."""
        self.leave()
        self.join()


def in_background(loop: Loop, jobs: Iterable[Job], every: int = 0) -> Generator[Event, None, None]:
    """``Loop.run`` in a thread of its own, so that what is done with an event does not hold up the images that are
    still being drawn.

    An unfinished image's event is left out if a newer one of the same image (``job.index``) overtakes it. The loop
    waits while as many finished images are unread as it has slots. Who stops reading must not use the loop again.

    Raises:
        what ``Loop.run`` raises, after the events before it.
    """
    drawing = _Drawing(loop, jobs, every)
    try:
        drawing.start()
        while (event := drawing.next()) is not None:
            yield event
        if drawing.failure:
            failure, drawing.failure = drawing.failure, None  # its traceback holds the thread, and that the loop
            raise failure
    finally:
        drawing.leave()


def cells_to_maps(layout: TokenLayout, cells: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Code map [side, side] and grain map [sides[0], sides[0]] of an image's cells, -1 where there is no code."""
    side, block = layout.sides[-1], layout.sides[-1] // layout.sides[0]
    square = cells.astype(np.int64).reshape(side, side)
    codes = np.where(square < 0, -1, square % layout.codebook_size)
    return codes, (square // layout.codebook_size)[::block, ::block]


def preview_map(layout: TokenLayout, cells: NDArray[np.int32]) -> NDArray[np.int64]:
    """Code map [side, side] that an unfinished image can be decoded from: where every cell must have a code, empty
    ones take that of the nearest filled one (code 0 if there is none)."""
    codes = cells_to_maps(layout, cells)[0]
    filled = np.flatnonzero(codes >= 0)
    if not layout.covering:
        return codes
    if not filled.size:
        return np.zeros_like(codes)
    side = layout.sides[-1]
    row, column = np.divmod(np.arange(side * side), side)
    distance = (row[:, None] - row[filled]) ** 2 + (column[:, None] - column[filled]) ** 2
    return codes.reshape(-1)[filled[distance.argmin(1)]].reshape(side, side)
