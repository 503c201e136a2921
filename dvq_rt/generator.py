"""``Generator``: open an engine folder and make, encode, decode and score images."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dvq_rt.codes import Codes
from dvq_rt.decoding import Event, Job, Loop, cells_to_maps, in_background, preview_map
from dvq_rt.images import ImageLike, grid, to_array, to_uint8
from dvq_rt.layout import UNORDERED
from dvq_rt.manifest import Manifest, engine_folder, read_engine
from dvq_rt.sampling import SamplingParams, uniforms
from runtimes.errors import InputError
from runtimes.onnxruntime import OnnxRuntimeBackend
from runtimes.protocol import Backend, Program
from runtimes.registry import open_backend

Label = int | str | None
Progress = bool | Callable[[int, int], None] | None
KEPT_LOOPS = 2
"""Decode loops, with their caches, that are kept for the next call."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Drawn images: ``images`` (PIL, RGB), their ``codes``, label indices (None: no label), and how they were drawn."""

    images: list[Image.Image]
    codes: list[Codes]
    labels: list[int | None]
    seed: int
    params: SamplingParams

    def __len__(self) -> int:
        return len(self.images)

    def to_numpy(self) -> NDArray[np.uint8]:
        """uint8 [N, H, W, 3]."""
        return np.stack([np.asarray(image) for image in self.images])

    def grid(self, columns: int | None = None) -> Image.Image:
        """All images in one picture."""
        return grid(self.to_numpy(), columns)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``00000.png``, ``00001.png``, ... into a folder, made if it is not there; returns the paths.

        Raises:
            InputError: a file cannot be written.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            paths = [Path(folder) / f"{i:05d}.png" for i in range(len(self))]
            for image, path in zip(self.images, paths, strict=True):
                image.save(path)
        except OSError as error:
            raise InputError(f"cannot write images into {folder}: {error.strerror or error}") from error
        return paths


@dataclass(frozen=True, slots=True)
class Preview:
    """An image on its way: ``index`` in the call, ``image`` (PIL; not yet coded regions are filled from their
    neighbours or, where cells can lack codes, as such), ``progress`` (share of the codes to come that are there, 0 to
    1); ``codes`` once it is finished."""

    index: int
    image: Image.Image
    progress: float
    codes: Codes | None


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of an image's tokens, in nats: ``position`` and ``content`` float64 [T], from the first token
    after the start to the one that completes the image. What the grammar forces counts 0."""

    position: NDArray[np.float64]
    content: NDArray[np.float64]

    @property
    def total(self) -> float:
        return float(self.position.sum() + self.content.sum())


class Generator:
    """A loaded engine. Safe to use from several threads; every call is independent of those before it.

    Args:
        engine_dir: engine folder, or ``demo:dq`` or ``demo:mq`` for a demo that ships with the package; None opens
            the first of these.
        device: ``cpu`` or ``cuda``; None takes the CPU, or the GPU for an engine of TensorRT plans.
        slots: images drawn side by side (guidance takes two slots an image); None takes as many as the call can use,
            up to the manifest's number. Pin it where last-bit equality between calls matters. TensorRT plans have
            their own fixed number.
        threads: CPU threads of each graph; None for one per core. Images are decoded while others are drawn, so two
            graphs may run at once.

    Raises:
        EngineError: the folder is missing, incomplete, corrupted or of another version (dvq_rt.manifest).
        BackendError: the device or its package is not there.
        InputError: ``slots`` is not positive, or not the number of the plan.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
        slots: int | None = None,
        threads: int | None = None,
    ) -> None:
        if slots is not None and (isinstance(slots, bool) or not isinstance(slots, int) or slots < 1):
            raise InputError(f"slots is {slots!r}; it must be a positive integer or None")
        path = engine_folder(engine_dir)
        manifest = read_engine(path)
        backend = open_backend(
            manifest.backend,
            engine=path,
            target=manifest.target,
            weights=manifest.weights,
            tools=manifest.tools,
            device=device,
            threads=threads,
        )
        self._open(path, manifest, backend, slots)

    @classmethod
    def of_folder(cls, path: Path, manifest: Manifest) -> Generator:
        """A generator over graphs whose manifest is not written yet, on the CPU; for the check that ends an export."""
        generator = cls.__new__(cls)
        generator._open(path, manifest, OnnxRuntimeBackend(), None)
        return generator

    def _open(self, path: Path, manifest: Manifest, backend: Backend, slots: int | None) -> None:
        self.path, self.manifest, self.layout = path, manifest, manifest.layout
        self._backend = backend
        if manifest.fixed_slots:
            if slots not in (None, manifest.slots):
                raise InputError(
                    f"slots is {slots}; this engine has {manifest.slots}, fixed at its export; leave it out"
                )
            slots = manifest.slots
        self._slots = slots
        self._lock = threading.Lock()
        self._programs: dict[str, Program] = {}
        self._spare: list[Loop] = []

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label; empty if the model has no labels or no names for them."""
        return self.manifest.class_names

    # --- drawing -----------------------------------------------------------------------------------------------
    def sample(
        self,
        n: int | None = None,
        labels: Label | Sequence[Label] = None,
        seed: int = 0,
        params: SamplingParams | None = None,
        progress: Progress = None,
    ) -> Samples:
        """Draw images.

        Image i depends on (seed, i, its label, params) alone, not on the other images of the call.

        Args:
            n: number of images; None takes one per label, or one.
            labels: a label (index or name) for all images, or one per image; None draws without a label.
            seed: 0 to 2**64 - 1.
            params: None takes the engine's recommended ones.
            progress: True shows a bar; a function is called with (images done, images in all).

        Raises:
            InputError: an argument is out of range or unknown; nothing is drawn.
        """
        jobs, chosen, params = self._jobs(n, labels, seed, params)
        found: dict[int, tuple[Image.Image, Codes]] = {}
        with (
            self._loop(len(jobs), params) as loop,
            closing(in_background(loop, jobs)) as events,
            _bar(progress, len(jobs)) as tell,
        ):
            for event in events:
                codes = self._codes(event)
                found[event.job.index] = (Image.fromarray(self.decode([codes])[0]), codes)
                tell(len(found))
        images, codes_list = zip(*(found[i] for i in range(len(jobs))), strict=True)
        return Samples(list(images), list(codes_list), chosen, seed, params)

    def stream(
        self,
        n: int | None = None,
        labels: Label | Sequence[Label] = None,
        seed: int = 0,
        params: SamplingParams | None = None,
        every: int = 16,
    ) -> Iterator[Preview]:
        """Draw images as ``sample`` does, with a preview of each every so many tokens, coarse to fine.

        Arguments are checked at once; drawing starts with the first preview asked for, and goes on while previews are
        decoded and looked at: one that is overtaken by a newer one of its image is left out. The last preview of an
        image has its codes and is never left out.

        Raises:
            InputError: an argument is out of range or unknown.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every is {every!r}; it must be a positive number of tokens")
        jobs, _, params = self._jobs(n, labels, seed, params)

        def previews() -> Iterator[Preview]:
            with self._loop(len(jobs), params) as loop, closing(in_background(loop, jobs, every)) as events:
                for event in events:
                    image = Image.fromarray(self._decode(preview_map(self.layout, event.cells)[None])[0])
                    codes = self._codes(event) if event.finished else None
                    progress = float((event.cells >= 0).sum() / self.layout.filled_cells)
                    yield Preview(event.job.index, image, progress, codes)

        return previews()

    # --- images and codes --------------------------------------------------------------------------------------
    def encode(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> list[Codes]:
        """Codes of an image or a list of them (PIL, uint8 [H, W, 3] or paths), resized and cropped to the model's size.

        Raises:
            InputError: an image cannot be read, is too large, or has a mode that is not RGB, RGBA, L, LA, P or 1.
        """
        several: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        found = []
        for image in several:
            array = to_array(image, self.manifest.image_size)
            out = self._program("encoder").run({"images": array[None]})
            found.append(Codes(out["codes"][0], out["grain"][0], self.layout))
        return found

    def decode(self, codes: Codes | Sequence[Codes]) -> NDArray[np.uint8]:
        """Images uint8 [N, H, W, 3] of codes.

        Raises:
            InputError: the codes are of another layout.
        """
        several = [codes] if isinstance(codes, Codes) else list(codes)
        for c in several:
            self._check_layout(c)
        size = self.manifest.image_size
        if not several:
            return np.zeros((0, size, size, 3), dtype=np.uint8)
        return np.concatenate([self._decode(c.codes[None]) for c in several])

    def reconstruct(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> NDArray[np.uint8]:
        """Images through their codes and back, uint8 [N, H, W, 3]; raises as ``encode``."""
        return self.decode(self.encode(images))

    def score(self, codes: Codes | Sequence[Codes], labels: Label | Sequence[Label] = None) -> list[Score]:
        """Log-likelihood per token of codes in their canonical order, teacher-forced through the step graph.

        Args:
            codes: of this model's layout.
            labels: as for ``sample``; None takes each one's own label.

        Raises:
            InputError: the codes are of another layout, or a label is unknown or missing.
        """
        several = [codes] if isinstance(codes, Codes) else list(codes)
        if not several:
            return []
        given = [None] * len(several) if labels is None else self._labels(len(several), labels)
        params = SamplingParams(positions="drawn")
        jobs, lengths = [], []
        for i, (c, label) in enumerate(zip(several, given, strict=True)):
            self._check_layout(c)
            # in this model's own ids, which another order or other labels would change
            tokens = Codes(c.codes, c.grain, self.layout, c.label if label is None else label).tokens()
            start = int(tokens.content[0]) - self.layout.content_sos
            forced = (tokens.position[1:], tokens.content[1:])
            jobs.append(Job(i, start, uniforms(0, i, self.layout.max_length), params, forced))
            lengths.append(int(np.flatnonzero(forced[1] < self.layout.codebook_size)[-1]) + 1)
        taken: list[list[tuple[float, float]]] = [[] for _ in jobs]
        with self._loop(len(jobs), params) as loop:

            def watch(active: dict[int, Job]) -> None:
                position, content = loop.report("position_logprob"), loop.report("content_logprob")
                for slot, job in active.items():
                    taken[job.index].append((float(position[slot]), float(content[slot])))

            for _ in loop.run(jobs, watch=watch):
                pass
        tables = [np.array(rows, dtype=np.float64)[:length] for rows, length in zip(taken, lengths, strict=True)]
        return [Score(table[:, 0], table[:, 1]) for table in tables]

    def verify(self) -> list[Any]:
        """Check the engine on this machine against the golden values in its folder; see ``dvq_rt.verify``."""
        from dvq_rt.verify import verify

        return verify(self)

    # --- inside ------------------------------------------------------------------------------------------------
    def _jobs(
        self, n: int | None, labels: Label | Sequence[Label], seed: int, params: SamplingParams | None
    ) -> tuple[list[Job], list[int | None], SamplingParams]:
        if n is None:
            n = len(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else 1
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise InputError(f"n is {n!r}; it must be a positive integer")
        if params is None:
            params = SamplingParams.from_dict(self.manifest.defaults)
        elif not isinstance(params, SamplingParams):
            raise InputError(f"params is a {type(params).__name__}; it must be a SamplingParams")
        if params.guidance != 1 and not self.layout.null_label:
            raise InputError(
                f"guidance is {params.guidance}, but this model was trained without a null label; use guidance=1"
            )
        if params.positions == "ordered" and self.layout.order == UNORDERED:
            raise InputError("this model was trained on no order of the cells; use positions='drawn'")
        if params.guidance != 1 and self._slots == 1:
            raise InputError(
                "guidance takes two slots an image, but the generator was opened with slots=1; use 2 or more"
            )
        chosen = self._labels(int(n), labels)
        start = [self.layout.classes if label is None else label for label in chosen]
        jobs = [Job(i, start[i], uniforms(seed, i, self.layout.max_length), params) for i in range(int(n))]
        return jobs, chosen, params

    def _labels(self, n: int, labels: Label | Sequence[Label]) -> list[int | None]:
        """One label index per image; None stands for no label."""
        several = isinstance(labels, Sequence) and not isinstance(labels, str)
        given: list[Label] = list(labels) if several else [labels] * n  # type: ignore[arg-type, list-item]
        if len(given) != n:
            raise InputError(f"there are {len(given)} labels for {n} images; give one label, or one per image")
        return [self._label(label) for label in given]

    def _label(self, label: Label) -> int | None:
        layout, names = self.layout, self.class_names
        if label is None:
            if layout.classes and not layout.null_label:
                raise InputError(f"this model needs a label: {self._choices()}")
            return None
        if not layout.classes:
            raise InputError(f"label is {label!r}, but this model has no labels; leave it out")
        if isinstance(label, str) and label in names:
            return names.index(label)
        if isinstance(label, int | np.integer) and not isinstance(label, bool) and 0 <= label < layout.classes:
            return int(label)
        raise InputError(f"unknown label {label!r}; this model has {self._choices()}")

    def _choices(self) -> str:
        indices = f"0 to {self.layout.classes - 1}"
        return f"{', '.join(self.class_names[:50])} (or {indices})" if self.class_names else indices

    def _check_layout(self, codes: Codes) -> None:
        if not isinstance(codes, Codes):
            raise InputError(f"got a {type(codes).__name__}; codes come from encode, sample or load_codes")
        ours, theirs = (
            f"a codebook of {layout.codebook_size} and grids {layout.sides}, "
            + ("every cell coded" if layout.covering else "some cells kept")
            for layout in (self.layout, codes.layout)
        )
        if ours != theirs:
            raise InputError(f"the codes have {theirs}; this model has {ours}")

    def _codes(self, event: Event) -> Codes:
        codes, grain = cells_to_maps(self.layout, event.cells)
        label = event.job.label if event.job.label < self.layout.classes else None
        return Codes(codes, grain.astype(np.int8), self.layout, label)

    def _decode(self, maps: NDArray[np.int64]) -> NDArray[np.uint8]:
        out = self._program("decoder").run({"codes": maps})
        return out["pixels"] if "pixels" in out else to_uint8(out["images"])

    def _program(self, name: str) -> Program:
        with self._lock:
            if name not in self._programs:
                path = self.path / f"{name}{self._backend.suffix}"
                self._programs[name] = self._backend.load(path, self.manifest.files or None, main=name == "step")
            return self._programs[name]

    def _new_loop(self, slots: int) -> Loop:
        """A loop of so many slots, or of as many as the step is fixed to."""
        slots = self.manifest.slots if self.manifest.fixed_slots else slots
        return Loop(self._backend, self._program("step"), self.manifest, slots)

    @contextmanager
    def _loop(self, images: int, params: SamplingParams) -> Iterator[Loop]:
        """A decode loop of the right number of slots; it goes back to the pool unless the call fails."""
        width = 1 if params.guidance == 1 else 2
        slots = self._slots or min(images * width, max(self.manifest.slots, width))
        with self._lock:
            fitting = [i for i, idle in enumerate(self._spare) if idle.slots == slots]
            loop = self._spare.pop(fitting[-1]) if fitting else None
        if loop is None:
            loop = self._new_loop(slots)
        yield loop
        with self._lock:
            self._spare = [*self._spare, loop][-KEPT_LOOPS:]


@contextmanager
def _bar(progress: Progress, total: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many images are done."""
    if progress is True:
        with tqdm(total=total, unit="image", dynamic_ncols=True) as bar:
            yield lambda done: (bar.update(done - bar.n), None)[1]
    elif callable(progress):
        yield lambda done: progress(done, total)
    else:
        yield lambda done: None
