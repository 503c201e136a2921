"""``Engine``: an opened engine folder. Programs, decode loops and the shared batch; arrays in, arrays out.

``Generator`` is the door for users; ``verify``, the benchmarks and the checks of an export use the engine itself.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Generator as Events
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from weakref import WeakMethod

import numpy as np
from numpy.typing import NDArray

from dvq_rt.background import SharedBatch, Watch
from dvq_rt.decoding import DecodeLoop, Event, Request, Scheduler
from dvq_rt.images import to_uint8
from dvq_rt.labels import whole
from dvq_rt.layout import UNORDERED, Tokens
from dvq_rt.manifest import Manifest, engine_folder, read_engine
from dvq_rt.prompts import PromptReader, read_tokenizer
from dvq_rt.rates import Rate, select_codes
from dvq_rt.sampling import SamplingParams
from dvq_rt.step import SLOTS, StepTable
from runtimes.errors import ConfigError, EngineError, InputError
from runtimes.graph_files import check_interface
from runtimes.onnxruntime import Providers
from runtimes.protocol import Backend, Program, TensorSpec
from runtimes.registry import open_backend

LOG = logging.getLogger(__name__)
MOST_SLOTS = 4096
"""Rows that exported graphs take at most."""
LOGITS = ("position_logits", "content_logits")
LOGPROBS = ("position_logprob", "content_logprob")
LOGMASSES = ("position_logmass", "content_logmass")


class Engine:
    """Graphs and what is needed to run them. Safe to use from several threads.

    Args:
        path: the folder.
        manifest: what it says of itself.
        backend: runs its graphs.
        slots: images drawn side by side at most; None takes the manifest's number.

    Raises:
        InputError: ``slots`` is not positive, or not the number of a plan.
    """

    def __init__(self, path: Path, manifest: Manifest, backend: Backend, slots: int | None = None) -> None:
        slots = None if slots is None else whole("slots", slots, 1, MOST_SLOTS)
        if manifest.fixed_slots and slots not in (None, manifest.slots):
            raise InputError(f"slots is {slots}; this engine has {manifest.slots}, fixed at its export; leave it out")
        self.path, self.manifest, self.layout = path, manifest, manifest.layout
        try:
            self.table = StepTable.from_dict(manifest.layout, manifest.step, manifest.prompt)
        except ConfigError as error:
            raise EngineError(f"engine {path}: its manifest contradicts itself: {error}; export it again") from error
        self.backend, self.slots = backend, slots or manifest.slots
        self._lock = threading.Lock()
        self._programs: dict[str, Program] = {}
        self._reader: PromptReader | None = None
        own_loop = WeakMethod(self.loop)  # no circle, so that the last user's leaving frees everything

        def open_loop(count: int) -> DecodeLoop:
            loop = own_loop()
            assert loop is not None, "who draws holds the engine"
            return loop(count)

        self.batch = SharedBatch(open_loop, self.slots, slots is not None or manifest.fixed_slots)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
        slots: int | None = None,
        threads: int | None = None,
        providers: Providers | None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> Engine:
        """An engine folder, its hashes checked; for the arguments see ``Generator``.

        Raises:
            EngineError: the folder is missing, incomplete, corrupted or of another version.
            BackendError: the device or its package is not there.
            InputError: as above.
        """
        folder = engine_folder(path)
        manifest = read_engine(folder)
        backend = open_backend(
            manifest.backend,
            engine=folder,
            target=manifest.target,
            weights=manifest.weights,
            tools=manifest.tools,
            device=device,
            threads=threads,
            providers=providers,
            session_options=session_options,
        )
        engine = cls(folder, manifest, backend, slots)
        kind = f"{manifest.family}, weights {manifest.weights}, on {manifest.backend}"
        LOG.info("engine %s: %s, at most %d slots", folder, kind, engine.slots)
        return engine

    # --- graphs ------------------------------------------------------------------------------------------------
    def program(self, name: str) -> Program:
        """The encoder, decoder, step or text encoder, loaded when it is first asked for."""
        with self._lock:
            if name not in self._programs:
                path, began = self.path / f"{name}{self.backend.suffix}", time.perf_counter()
                # an engine whose files were replaced since it was opened is refused; before the manifest is written
                # there is nothing to compare with
                program = self.backend.load(path, self.manifest.files or None, main=name == "step")
                check_interface(path, program, *self._interface(name, program))
                self._programs[name] = program
                LOG.info("loaded %s in %.2f s", path.name, time.perf_counter() - began)
            return self._programs[name]

    def _interface(self, name: str, program: Program) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """Inputs and outputs that a graph must have by the manifest."""
        if name == "step":
            slots = self.manifest.slots if self.manifest.fixed_slots else SLOTS
            shape = {port: (slots, *port.shape[1:]) for port in self.table.ports}
            return (
                {port.name: TensorSpec(port.dtype, shape[port]) for port in self.table.inputs},
                {port.output: TensorSpec(port.dtype, shape[port]) for port in self.table.outputs},
            )
        if name == "text":
            rows = next(port.shape for port in self.table.inputs if port.name == "prefix")[1:]
            ids = {"ids": TensorSpec("int64", (1, rows[0])), "length": TensorSpec("int64", (1,))}
            return ids, {"prefix": TensorSpec("float32", (1, *rows))}
        size, fine, coarse = self.manifest.image_size, self.layout.sides[-1], self.layout.sides[0]
        images, codes = TensorSpec("float32", (None, 3, size, size)), TensorSpec("int64", (None, fine, fine))
        if name == "encoder":
            outputs = {"codes": codes, "grain": TensorSpec("int64", (None, coarse, coarse))}
            if "scores" in program.outputs:  # engines of schema 1 have one rate
                grains = self.layout.segments
                outputs["scores"] = TensorSpec("float32", (None, coarse, coarse, grains))
                outputs["grain_codes"] = TensorSpec("int64", (None, grains, fine, fine))
            return {"images": images}, outputs
        pixels = {"pixels": TensorSpec("uint8", (None, size, size, 3))} if "pixels" in program.outputs else {}
        return {"codes": codes}, {"images": images, **pixels}

    def encode(
        self, images: NDArray[np.float32], rate: Rate | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Code maps [N, h, w] and grain maps [N, hc, wc] of images float32 [N, 3, S, S] in [-1, 1], each run alone.

        Raises:
            InputError: the model or its engine has no such rate.
        """
        outputs = self.by_row("encoder", "images", images)
        codes, grain = outputs["codes"], outputs["grain"]
        if rate is None or rate.own:
            return codes, grain
        if "scores" not in outputs:
            raise InputError(f"engine {self.path} was exported before rates could be chosen; export it again")
        size = self.manifest.image_size
        grain = np.stack([rate.grain(self.layout, size, *row) for row in zip(grain, outputs["scores"], strict=True)])
        rows = zip(grain, outputs["grain_codes"], strict=True)
        return np.stack([select_codes(self.layout, *row) for row in rows]), grain

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images uint8 [N, S, S, 3] of code maps int64 [N, h, w], each run alone."""
        outputs = self.by_row("decoder", "codes", codes)
        return outputs["pixels"] if "pixels" in outputs else to_uint8(outputs["images"])

    def by_row(self, name: str, key: str, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Outputs of a graph of one input ``key``, run on each row alone, so that its last bits depend on no other."""
        rows = [self.program(name).run({key: row[None]}) for row in values]
        return {output: np.concatenate([row[output] for row in rows]) for output in rows[0]}

    # --- prompts -----------------------------------------------------------------------------------------------
    @property
    def prompts(self) -> PromptReader:
        """Texts to the rows that requests take.

        Raises:
            InputError: the model reads no prompts.
            BackendError: the package tokenizers is missing.
        """
        if not self.manifest.conditioning:
            raise InputError(f"prompts were given, but the model of {self.path} reads none; leave them out")
        with self._lock:
            if self._reader is None:
                tokenizer = read_tokenizer(self.path, self.manifest.conditioning["tokenizer"], self.manifest.prompt)
                self._reader = PromptReader(tokenizer, self.embed)
            return self._reader

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows float32 [l, C] of a prompt's token ids int64 [l]; l at most the manifest's ``prompt``."""
        table = np.zeros((1, self.manifest.prompt), np.int64)
        table[0, : len(ids)] = ids
        rows = self.program("text").run({"ids": table, "length": np.array([len(ids)], np.int64)})["prefix"]
        return rows[0, : len(ids)].astype(np.float32)

    # --- tokens ------------------------------------------------------------------------------------------------
    def sampling(self, params: SamplingParams | None) -> SamplingParams:
        """Sampling parameters that this engine can draw with; None takes the recommended ones.

        Raises:
            InputError: it cannot; says why.
        """
        params = SamplingParams.from_dict(self.manifest.defaults) if params is None else params
        if not isinstance(params, SamplingParams):
            raise InputError(f"params is a {type(params).__name__}; it must be a SamplingParams")
        if params.guidance != 1 and not self.manifest.guidable:
            raise InputError(
                f"guidance is {params.guidance}, but this model was trained without a null label; use guidance=1"
            )
        if params.guidance != 1 and self.slots == 1:
            raise InputError("guidance takes two slots an image, but the engine was opened with slots=1; use 2 or more")
        if params.positions == "ordered" and self.layout.order == UNORDERED:
            raise InputError("this model was trained on no order of the cells; use positions='drawn'")
        return params

    def loop(self, slots: int) -> DecodeLoop:
        """A new decode loop of so many slots, or of as many as the step is fixed to."""
        slots = self.manifest.slots if self.manifest.fixed_slots else slots
        return DecodeLoop(self.backend, self.program("step"), self.table, slots)

    def draw(self, requests: Iterable[Request], watch: Watch | None = None) -> Events[Event, None, None]:
        """Events of requests that are drawn in the batch that all threads share; see ``SharedBatch.draw``."""
        yield from self.batch.draw(requests, watch)  # a generator of the engine's, which so stays open

    def force(
        self,
        rows: Sequence[Tokens],
        record: Sequence[str] = LOGITS,
        *,
        slots: int | None = None,
        limit: int | None = None,
        kinds: Sequence[NDArray[np.int64] | None] = (),
        prompts: Sequence[NDArray[np.float32] | None] = (),
    ) -> list[dict[str, NDArray[Any]]]:
        """Run along given sequences, each in its order.

        Args:
            rows: whole sequences with their start tokens, in this model's ids.
            record: reports or state tensors to keep.
            slots: draw in a loop of one's own with so many slots, row i in slot i as far as there are; None takes the
                shared batch.
            limit: stop each sequence after so many tokens.
            kinds: of each row's tokens, see ``dvq_rt.editing.given_first``; none for rows without given tokens.
            prompts: rows in front of each sequence; none at all for the empty prompt.

        Returns:
            for each row {name: [steps, ...]}; ``steps`` ends with the token that completes the image.
        """
        requests = [
            Request.along(self.layout, row, kind, record=tuple(record), limit=limit, key=i, prompt=prompt)
            for i, (row, kind, prompt) in enumerate(
                zip(rows, kinds or [None] * len(rows), prompts or [None] * len(rows), strict=True)
            )
        ]
        events = self.draw(requests) if slots is None else run_alone(self.loop(slots), requests)
        records: dict[int, dict[str, NDArray[Any]]] = {}
        with closing(events):
            for event in events:
                steps = self.layout.steps_of(rows[event.request.key])
                records[event.request.key] = {name: values[:steps] for name, values in event.records.items()}
        return [records[i] for i in range(len(rows))]

    def close(self) -> None:
        """Cancel what is being drawn, and free graphs and buffers."""
        self.batch.end()
        with self._lock:
            self._programs.clear()


def run_alone(loop: DecodeLoop, requests: Iterable[Request]) -> Events[Event, None, None]:
    """Events of requests that have a loop for themselves, drawn in the caller's thread."""
    scheduler = Scheduler(loop)
    for request in requests:
        scheduler.submit(request)
    while scheduler.busy:
        yield from scheduler.step()
