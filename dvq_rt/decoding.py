"""The autoregressive loop: the step graph bound to its buffers, and a scheduler that gives slots to requests.

``DecodeLoop`` only calls the graph: state goes in and comes out in two sets of buffers that swap sides every step,
caches stay in place, controls are written when they change. ``Scheduler`` takes requests at any time and says what
came of them after each step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dvq_rt.layout import TokenLayout, Tokens
from dvq_rt.sampling import SamplingParams, uniforms
from dvq_rt.step import CACHE, CONTROL, REPORT, STATE, StepTable
from runtimes.errors import EngineError, InputError
from runtimes.protocol import Bindable, Buffer, Device


class DecodeLoop:
    """The step graph bound to buffers for a fixed number of slots.

    Args:
        device, program: the step and where its buffers lie.
        table: its interface.
        slots: B.

    Attributes:
        seconds, calls: time spent in the graph, and how often it ran.
    """

    def __init__(self, device: Device, program: Bindable, table: StepTable, slots: int) -> None:
        self.table, self.layout, self.slots, self.poll = table, table.layout, slots, device.poll
        self.seconds, self.calls = 0.0, 0

        def allocate(*roles: str) -> dict[str, Buffer]:
            return {port.name: device.allocate(port.sized(slots), port.dtype) for port in table.role(*roles)}

        self._state = [allocate(STATE) for _ in range(2)]
        self._controls, self._reports, self._caches = allocate(CONTROL), allocate(REPORT), allocate(CACHE)
        self._bindings = []
        for side in range(2):
            inputs = {**self._state[side], **self._controls, **self._caches}
            outputs = {**self._state[1 - side], **self._reports, **self._caches}
            self._bindings.append(program.bind(inputs, {port.output: outputs[port.name] for port in table.outputs}))
        self._side = 0
        self._asked: dict[str, Buffer] = {}
        self._host: dict[str, NDArray[Any]] = {}
        self._changed: set[str] = set()
        self._resetting = False
        self.idle()

    def idle(self) -> None:
        """Make every slot idle, with neutral controls."""
        self._asked.clear()
        for port in self.table.role(STATE):
            for state in self._state:
                state[port.name].write(port.idle_values(self.slots))
        self._host = {port.name: port.idle_values(self.slots) for port in self.table.role(CONTROL)}
        self._changed = set(self._host)

    def control(self, name: str, slot: int, value: Any) -> None:
        """Set a control of one slot for the steps to come, ``reset`` for the next one."""
        self._host[name][slot] = value
        self._changed.add(name)
        self._resetting |= name == "reset"

    def step(self) -> None:
        """One token of every slot that is not done."""
        if self._changed:
            for name in self._changed:
                self._controls[name].write(self._host[name])
            self._changed.clear()
        began = time.perf_counter()
        self._bindings[self._side].run()
        self.seconds += time.perf_counter() - began
        self.calls += 1
        self._side = 1 - self._side
        if self._resetting:  # for one step
            self._resetting = False
            self._host["reset"][:] = False
            self._changed.add("reset")

    @property
    def prefix_shape(self) -> tuple[int, ...]:
        """Shape [L, C] of a slot's prompt."""
        return self._host["prefix"].shape[1:]

    def request(self, name: str) -> None:
        """Start copying a state tensor; the next ``read`` of it gives it as it is now."""
        self._asked[name] = self._state[self._side][name]
        self._asked[name].request()

    def read(self, name: str) -> NDArray[Any]:
        """A report of the last step, or a state tensor as it was at ``request`` or else after the last step."""
        if name in self._reports:
            return self._reports[name].read()
        return (self._asked.pop(name, None) or self._state[self._side][name]).read()

    def set_state(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite state tensors that the next step reads."""
        for name, array in values.items():
            self._state[self._side][name].write(array)

    def adopt(self, other: DecodeLoop) -> None:
        """Go on with what a loop of fewer slots does, in the same slots; the others are idle."""
        self.idle()
        mine, theirs = ({**loop._state[loop._side], **loop._caches} for loop in (self, other))
        for name, buffer in mine.items():
            values = buffer.read().copy()
            values[: other.slots] = theirs[name].read()
            buffer.write(values)
        for name, values in other._host.items():
            self._host[name][: other.slots] = values


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One image to draw. Its tokens depend on these values alone.

    Attributes:
        label: start label; with guidance a second slot starts with ``TokenLayout.partner_label``.
        params: sampling parameters.
        seed, image: key of its random numbers.
        forced: tokens 1, 2, ... that are taken instead of drawn: joint positions and contents, int64, -1 draws.
        every: tokens between two events of the unfinished image; 0 for the finished one only.
        record: reports and state tensors whose values after each token the last event has.
        limit: tokens after which the image ends, finished or not; None for no limit.
        key: anything that tells the caller which image this is.
        prompt, negative: rows float32 [l, C] in front of the image and, with guidance, in front of its partner; None
            for the empty prompt.
        text: what the prompt says.
        pinned: int32 [cells], how cells must end (``dvq_rt.editing.pins``), or [steps, cells] for each token; None
            leaves them free. The step must have the control.
        given: int64, the kinds of tokens 1, 2, ..., which ``forced`` has (``dvq_rt.editing.given_first``); None or 0
            for tokens of the image's own sequence. The step must have the control.
        uniforms: float32 [longest sequence, 2], random numbers in place of those of the seed.
    """

    label: int
    params: SamplingParams
    seed: int = 0
    image: int = 0
    forced: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    every: int = 0
    record: tuple[str, ...] = ()
    limit: int | None = None
    key: Any = None
    prompt: NDArray[np.float32] | None = None
    negative: NDArray[np.float32] | None = None
    text: str | None = None
    pinned: NDArray[np.int32] | None = None
    given: NDArray[np.int64] | None = None
    uniforms: NDArray[np.float32] | None = None

    @classmethod
    def along(
        cls, layout: TokenLayout, tokens: Tokens, kind: NDArray[np.int64] | None = None, **values: Any
    ) -> Request:
        """A request that is forced along a whole sequence, whose first token gives the label; ``kind`` as
        ``dvq_rt.editing.given_first`` gives it."""
        forced = (tokens.position[1:], tokens.content[1:])
        label = int(tokens.content[0]) - layout.content_sos
        given = None if kind is None else kind[1:]
        return cls(label, SamplingParams(positions="drawn"), forced=forced, given=given, **values)

    @property
    def width(self) -> int:
        """Slots that it takes: guidance takes two."""
        return 1 if self.params.guidance == 1 else 2


@dataclass(slots=True, eq=False)
class Handle:
    """A request that was submitted.

    Attributes:
        request, owner: as submitted.
        slots: those that it has or had.
        steps: tokens taken so far. A device that is polled rarely may take a few more after the image is complete.
        unread: tokens of the prompt, of a pair the longer one, that are still to be read before the first one is taken.
        starting: by slot, the tokens of its own prompt and the controls it starts with. Of a pair the shorter prompt
            starts later, so that both come to the image in the same step.
    """

    request: Request
    owner: Hashable
    slots: tuple[int, ...] = ()
    steps: int = 0
    unread: int = 0
    starting: dict[int, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    rows: dict[str, list[NDArray[Any]]] = field(default_factory=dict)


class Event(NamedTuple):
    """State of an image: ``cells`` int32 [cells] (-1 where no code stands yet, else segment * K + code), and of a
    finished one what it was asked to ``record``, [steps, ...] each."""

    handle: Handle
    cells: NDArray[np.int32]
    finished: bool
    records: dict[str, NDArray[Any]]

    @property
    def request(self) -> Request:
        return self.handle.request


class Scheduler:
    """Gives the slots of a loop to requests, which may come at any time. For one thread.

    A free slot goes to the owner with the fewest images in slots, among equals to the one that has waited longest;
    the requests of one owner go in order. So a large caller never keeps a small one waiting for more than the slots
    that free next. Where two slots are needed and one is free, it waits for the second.
    """

    def __init__(self, loop: DecodeLoop) -> None:
        self.loop = loop
        self._waiting: dict[Hashable, deque[Handle]] = {}
        self._active: list[Handle] = []
        self._free = list(range(loop.slots))
        loop.idle()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return sum(map(len, self._waiting.values()))

    @property
    def active(self) -> tuple[Handle, ...]:
        """Requests in slots, oldest first."""
        return tuple(self._active)

    @property
    def busy(self) -> bool:
        return bool(self._active or self._waiting)

    @property
    def wanted(self) -> int:
        """Slots that all requests, with and without slots, would take."""
        waiting = [handle for queue in self._waiting.values() for handle in queue]
        return sum(handle.request.width for handle in [*self._active, *waiting])

    def submit(self, request: Request, owner: Hashable = None) -> Handle:
        """Queue a request; requests of one ``owner`` take turns with those of others.

        Raises:
            InputError: it needs more slots than there are.
        """
        if request.width > self.loop.slots:
            raise InputError("guidance takes two slots an image, but there is one; use slots=2 or more")
        handle = Handle(request, owner)
        self._waiting.setdefault(owner, deque()).append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Forget a request; its slots are free for the next step. Nothing happens if it is finished."""
        if handle in self._active:
            self._leave(handle)
        elif handle in (queue := self._waiting.get(handle.owner, deque())):
            queue.remove(handle)
            if not queue:
                del self._waiting[handle.owner]

    def move(self, loop: DecodeLoop) -> None:
        """Go on in a loop of more slots, between two steps."""
        loop.adopt(self.loop)
        self._free += range(self.loop.slots, loop.slots)
        self.loop = loop

    def step(self) -> list[Event]:
        """Fill free slots, take one token of every image in a slot, and say which images are finished or due."""
        self._fill()
        if not self._active:
            return []
        loop = self.loop
        self._begin()
        self._force()
        loop.step()
        for handle in self._active:
            if handle.unread:
                handle.unread -= 1
                continue
            handle.steps += 1
            for name in handle.request.record:
                handle.rows.setdefault(name, []).append(loop.read(name)[handle.slots[0]].copy())
        if loop.poll == 1 or (loop.calls + 1) % loop.poll == 0:
            loop.request("done")  # copied while the device goes on with the next step
        if loop.calls % loop.poll:
            return []
        return self._events()

    def _events(self) -> list[Event]:
        done = self.loop.read("done")
        ended, due = [], []
        for handle in self._active:
            request, steps = handle.request, handle.steps
            if not steps:  # it reads its prompt
                continue
            asked = steps > 1 or self.loop.poll == 1  # else it took the slot after ``done`` was asked for
            if (asked and done[handle.slots[0]]) or (request.limit is not None and steps >= request.limit):
                ended.append(handle)
            elif request.every and steps // request.every > (steps - self.loop.poll) // request.every:
                due.append(handle)
            if steps > self.loop.layout.max_length + self.loop.poll:
                raise EngineError(
                    f"image {request.image} did not end after {steps} tokens; the engine is broken: verify it"
                )
        if not ended and not due:
            return []
        cells = self.loop.read("cells").copy()
        events = []
        for handle in [h for h in self._active if h in ended or h in due]:
            finished, row = handle in ended, cells[handle.slots[0]]
            records = {name: np.stack(rows)[: handle.request.limit] for name, rows in handle.rows.items()}
            events.append(Event(handle, row, finished, records if finished else {}))
            if finished:
                self._leave(handle)
        return events

    def _fill(self) -> None:
        """Start requests in free slots, lowest numbers first."""
        while self._waiting:
            held = [handle.owner for handle in self._active]
            owner = min(self._waiting, key=held.count)  # of equals the first, which has waited longest
            handle = self._waiting[owner][0]
            width = handle.request.width
            if width > len(self._free):
                return
            self._free.sort()
            handle.slots, self._free = tuple(self._free[:width]), self._free[width:]
            queue = self._waiting.pop(owner)
            queue.popleft()
            if queue:
                self._waiting[owner] = queue  # behind the others
            self._active.append(handle)
            self._start(handle)

    def _start(self, handle: Handle) -> None:
        """Make the controls of a request's slots; of two the first is conditional, the second unconditional."""
        request, loop = handle.request, self.loop
        values: dict[str, Any] = dict(loop.table.settings(request.params))
        values |= {"reset": True, "forced_position": -1, "forced_content": -1}
        numbers = request.uniforms
        values["uniforms"] = (
            uniforms(request.seed, request.image, loop.layout.max_length) if numbers is None else numbers
        )
        if loop.table.has("pinned"):
            values["pinned"] = -1 if request.pinned is None else pins_at(request.pinned, 0)
        labels = (request.label, loop.layout.partner_label(request.label))
        rows = zip(handle.slots, handle.slots[::-1], labels, (request.prompt, request.negative), strict=False)
        for slot, partner, label, prompt in rows:
            own = {**values, "label": label, "partner": partner}
            length = 0 if prompt is None else len(prompt)
            if loop.table.prompt:
                own |= {"prefix_length": length, "prefix": np.zeros(loop.prefix_shape, np.float32)}
            if prompt is not None:
                own["prefix"][:length] = prompt
            handle.starting[slot] = length, own
        handle.unread = max(length for length, _ in handle.starting.values())

    def _begin(self) -> None:
        """Write the controls of the slots that start with this step."""
        for handle in self._active:
            for slot, (length, values) in list(handle.starting.items()):
                if length == handle.unread:
                    del handle.starting[slot]
                    for name, value in values.items():
                        self.loop.control(name, slot, value)

    def _force(self) -> None:
        """Write this step's forced tokens, the same into both slots of a pair."""
        for handle in self._active:
            for name, forced in zip(("forced_position", "forced_content"), handle.request.forced or (), strict=False):
                value = forced[handle.steps] if handle.steps < len(forced) else -1
                for slot in handle.slots:
                    self.loop.control(name, slot, value)
            pinned, given = handle.request.pinned, handle.request.given
            if self.loop.table.has("given"):
                kind = 0 if given is None or handle.steps >= len(given) else given[handle.steps]
                for slot in handle.slots:
                    self.loop.control("given", slot, kind)
            if pinned is not None and pinned.ndim == 2:
                for slot in handle.slots:
                    self.loop.control("pinned", slot, pins_at(pinned, handle.steps))

    def _leave(self, handle: Handle) -> None:
        self._active.remove(handle)
        self._free += handle.slots


def pins_at(pinned: NDArray[np.int32], step: int) -> NDArray[np.int32]:
    """A request's pins [cells] for the token after so many."""
    return pinned if pinned.ndim == 1 else pinned[min(step, len(pinned) - 1)]


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
