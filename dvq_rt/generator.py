"""``Generator``: open an engine folder and make, encode, decode and score images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvq_rt.codes import Codes, codes_of
from dvq_rt.decoding import Event, Request, cells_to_maps, preview_map
from dvq_rt.editing import Edit
from dvq_rt.edits import Edits
from dvq_rt.engine import LOGPROBS, Engine
from dvq_rt.images import ImageLike, image_list, to_array
from dvq_rt.labels import MOST_IMAGES, Label, choose_labels, whole
from dvq_rt.layout import TokenLayout, Tokens
from dvq_rt.manifest import Manifest
from dvq_rt.progress import Progress, check_progress, told
from dvq_rt.prompts import Prompt, choose_prompts
from dvq_rt.rates import rate_of
from dvq_rt.results import Preview, Samples, Score
from dvq_rt.sampling import SamplingParams
from runtimes.errors import ClosedError, InputError
from runtimes.onnxruntime import Providers

OnToken = Callable[[int, int], None]
CodesLike = Codes | Samples | Iterable[Codes]
Prompts = Prompt | Iterable[Prompt]


class Generator(Edits):
    """A loaded engine. Safe to use from several threads, whose images share one batch; every call is independent of
    those before it. A context manager: ``close`` frees the engine. Pickling keeps the arguments and opens the folder
    anew.

    Args:
        engine_dir: engine folder, or ``demo:dq``, ``demo:dq3`` or ``demo:mq`` for a demo of the package; None
            opens the first of these.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None takes the CPU, or the first GPU for an engine of TensorRT plans.
        slots: images drawn side by side (guidance takes two slots an image); None takes as many as the calls can use,
            up to the manifest's number. Pin it where last-bit equality between calls matters. TensorRT plans have
            their own fixed number.
        threads: CPU threads of each graph; None for one per core. Images are decoded while others are drawn, so two
            graphs may run at once.
        providers, session_options: of ONNX Runtime, for those who know what they want; see
            ``runtimes.onnxruntime.OnnxRuntimeBackend``.

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
        providers: Providers | None = None,
        session_options: Mapping[str, Any] | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "slots": slots, "threads": threads}
        options |= {"providers": providers, "session_options": session_options}
        self._arguments: dict[str, Any] | None = {"engine_dir": engine_dir, **options}
        self._engine: Engine | None = Engine.open(engine_dir, **options)

    @classmethod
    def over(cls, engine: Engine) -> Generator:
        """A generator over an engine that is open already; it cannot be pickled."""
        generator = cls.__new__(cls)
        generator._engine, generator._arguments = engine, None
        return generator

    @property
    def engine(self) -> Engine:
        """
        Raises:
            ClosedError: the generator is closed.
        """
        if self._engine is None:
            raise ClosedError("this generator is closed; make a new one")
        return self._engine

    @property
    def path(self) -> Path:
        return self.engine.path

    @property
    def manifest(self) -> Manifest:
        return self.engine.manifest

    @property
    def layout(self) -> TokenLayout:
        return self.engine.layout

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label; empty if the model has no labels or no names for them."""
        return self.manifest.class_names

    @property
    def takes_prompts(self) -> bool:
        """Whether images can be drawn from a text."""
        return bool(self.manifest.conditioning)

    def close(self) -> None:
        """Cancel what is being drawn and free the engine; closing twice does no harm."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._arguments is None:
            raise InputError("a generator made with Generator.over cannot be pickled; open the folder by its name")
        return _reopen, (self._arguments,)

    @property
    def edits(self) -> bool:
        """Whether a part of an image can be drawn anew; engines that were exported before there was editing cannot."""
        return self.engine.table.has("pinned")

    # --- drawing -----------------------------------------------------------------------------------------------
    def sample(
        self,
        n: int | None = None,
        labels: Label | Iterable[Label] = None,
        seed: int = 0,
        params: SamplingParams | None = None,
        progress: Progress = None,
        *,
        first: int = 0,
        on_token: OnToken | None = None,
        prompts: Prompts = None,
        negative_prompts: Prompts = None,
        truncate: bool = False,
    ) -> Samples:
        """Draw images.

        Image i depends on (seed, first + i, its label, its prompts, params) alone, not on the other images of the call.

        Args:
            n: number of images; None takes one per label or prompt, or one.
            labels: a label (index or name) for all images, or one per image; None draws without a label.
            seed: 0 to 2**64 - 1.
            params: None takes the engine's recommended ones.
            progress: True shows a bar; a function is called with (images done, images in all).
            first: number of the first image among those of the seed: so a range can be drawn in parts, anywhere.
            prompts: what to draw, one text for all images or one per image; "" or None stands for anything.
            negative_prompts: what guidance leads away from, instead of from anything; likewise.
            truncate: leave out the end of prompts that are too long, which otherwise are refused.
            on_token: called with (index of the image in the call, its tokens so far) after each token, in the thread
                that draws for everybody, so be quick; what it raises ends the call and is raised here.

        Raises:
            InputError: an argument is out of range or unknown; nothing is drawn.
        """
        check_progress(progress)
        if on_token is not None and not callable(on_token):
            raise InputError(f"on_token is {on_token!r}; it must be a function or None")
        texts = prompts, negative_prompts, truncate
        indices, params, requests = self._requests(n, labels, seed, params, first, texts=texts)
        results: dict[int, tuple[Image.Image, Codes]] = {}
        watch = None if on_token is None else (lambda request, steps: on_token(request.key, steps))
        with closing(self.engine.draw(requests, watch)) as events, told(progress, len(requests)) as tell:
            for event in events:
                codes = self._codes(event)
                results[event.request.key] = (Image.fromarray(self.decode(codes)[0]), codes)
                tell(len(results))
        images, codes_list = zip(*(results[i] for i in range(len(requests))), strict=True)
        drawn = [request.text for request in requests]
        return Samples(list(images), list(codes_list), indices, requests[0].seed, params, requests[0].image, drawn)

    def stream(
        self,
        n: int | None = None,
        labels: Label | Iterable[Label] = None,
        seed: int = 0,
        params: SamplingParams | None = None,
        every: int = 16,
        *,
        first: int = 0,
        edit: Edit | None = None,
        prompts: Prompts = None,
        negative_prompts: Prompts = None,
        truncate: bool = False,
    ) -> Iterator[Preview]:
        """Draw images as ``sample`` does, with a preview of each every so many tokens, coarse to fine.

        Arguments are checked at once; drawing starts with the first preview asked for, and goes on while previews are
        decoded and looked at: one that is overtaken by a newer one of its image is left out. The last preview of an
        image has its codes and is never left out.

        Args:
            edit: of ``edit_of``; draws what ``edit`` draws, and labels and prompts are as there.

        Raises:
            InputError: an argument is out of range or unknown.
        """
        every = whole("every", every, 1, 2**31 - 1)
        texts: dict[str, Any] = {"prompts": prompts, "negative_prompts": negative_prompts, "truncate": truncate}
        requests = self.requests(n, labels, seed, params, first=first, every=every, edit=edit, **texts)
        engine = self.engine

        def previews() -> Iterator[Preview]:
            with closing(engine.draw(requests)) as events:
                for event in events:
                    yield self.preview(event, edit)

        return previews()

    def requests(
        self,
        n: int | None = None,
        labels: Label | Iterable[Label] = None,
        seed: int = 0,
        params: SamplingParams | None = None,
        *,
        prompts: Prompts = None,
        negative_prompts: Prompts = None,
        truncate: bool = False,
        first: int = 0,
        every: int = 0,
        edit: Edit | None = None,
    ) -> list[Request]:
        """The images of a call of ``sample`` (``every`` 0) or ``stream``, checked, for those who draw them otherwise;
        see ``dvq_rt.asynchronous``. ``preview``, with the same edit, turns their events into images.

        Raises:
            InputError: an argument is out of range or unknown.
        """
        if edit is not None:
            labels = edit.codes.label if labels is None else labels
            prompts = edit.codes.prompt if prompts is None and self.takes_prompts else prompts
        requests = self._requests(n, labels, seed, params, first, every, (prompts, negative_prompts, truncate))[2]
        return requests if edit is None else self.constrained(requests, edit)[0]

    def preview(self, event: Event, edit: Edit | None = None) -> Preview:
        """An event of such a request as ``stream`` gives it; the decoder runs in the caller's thread."""
        cells = event.cells if edit is None else np.maximum(event.cells, edit.pinned)  # what is kept and to come too
        pixels = self.engine.decode(preview_map(self.layout, cells)[None])[0]
        image = Image.fromarray(pixels if edit is None else edit.shown(pixels))
        progress = float((event.cells >= 0).sum() / self.layout.filled_cells)
        return Preview(event.request.key, image, progress, self._codes(event) if event.finished else None)

    # --- images and codes --------------------------------------------------------------------------------------
    def encode(self, images: ImageLike | Iterable[ImageLike], **rate: Any) -> list[Codes]:
        """Codes of an image or several, resized and cropped to the model's size; see ``dvq_rt.images.to_array`` for
        what is an image.

        Args:
            images: one or several.
            rate: ``fine_ratio``, ``bits_per_pixel`` or ``kept``, see ``dvq_rt.rates.Rate``; none for the model's own.

        Raises:
            InputError: an image cannot be read, is too large, or is no image; or the model has no such rate.
        """
        wanted = rate_of(rate)
        codes = []
        for image in image_list(images):
            maps, grains = self.engine.encode(to_array(image, self.manifest.image_size)[None], wanted)
            codes.append(Codes(maps[0], grains[0], self.layout))
        return codes

    def decode(self, codes: CodesLike) -> NDArray[np.uint8]:
        """Images uint8 [N, H, W, 3] of codes, also those of ``Samples``.

        Raises:
            InputError: the codes are of another layout.
        """
        several = codes_of(self.layout, codes)
        size = self.manifest.image_size
        if not several:
            return np.zeros((0, size, size, 3), dtype=np.uint8)
        return self.engine.decode(np.stack([c.codes for c in several]))

    def reconstruct(self, images: ImageLike | Iterable[ImageLike], **rate: Any) -> NDArray[np.uint8]:
        """Images through their codes and back, uint8 [N, H, W, 3]; arguments and errors as for ``encode``."""
        return self.decode(self.encode(images, **rate))

    def score(
        self,
        codes: CodesLike,
        labels: Label | Iterable[Label] = None,
        *,
        prompts: Prompts = None,
        truncate: bool = False,
    ) -> list[Score]:
        """Log-likelihood per token of codes in their canonical order, teacher-forced through the step graph.

        Args:
            codes: of this model's layout.
            labels: as for ``sample``; None takes each one's own label.
            prompts, truncate: as for ``sample``; None takes each one's own prompt, if the model reads any.

        Raises:
            InputError: the codes are of another layout, or a label or prompt is unknown or missing.
        """
        rows, before = self.rows(codes, labels, prompts=prompts, truncate=truncate)
        records = self.engine.force(rows, LOGPROBS, prompts=before)
        tables = [np.stack([record[name] for name in LOGPROBS]) for record in records]
        return [Score(*table.astype(np.float64)) for table in tables]

    def rows(
        self,
        codes: CodesLike,
        labels: Label | Iterable[Label] = None,
        *,
        prompts: Prompts = None,
        truncate: bool = False,
    ) -> tuple[list[Tokens], list[NDArray[np.float32] | None]]:
        """Codes as sequences in this model's own ids, and the rows of their prompts, as ``Engine.force`` takes both;
        arguments and errors as for ``score``."""
        several = codes_of(self.layout, codes)
        given: list[int | None] = [None] * len(several)
        if labels is not None:
            given = choose_labels(self.layout, self.class_names, labels, len(several))
        # in this model's own ids, which another order or other labels would change
        sequences = [
            Codes(c.codes, c.grain, self.layout, c.label if label is None else label).tokens()
            for c, label in zip(several, given, strict=True)
        ]
        texts: list[Prompt] = [c.prompt if self.takes_prompts else None for c in several]
        if prompts is not None:
            texts = choose_prompts("prompts", prompts, len(several))
        return sequences, [self._rows(text, truncate) for text in texts]

    def verify(self) -> list[Any]:
        """Check the engine on this machine against the golden values in its folder; see ``dvq_rt.verify``."""
        from dvq_rt.verify import verify

        return verify(self.engine)

    # --- inside ------------------------------------------------------------------------------------------------
    def _requests(
        self,
        n: Any,
        labels: Any,
        seed: Any,
        params: SamplingParams | None,
        first: Any,
        every: int = 0,
        texts: tuple[Prompts, Prompts, bool] = (None, None, False),
    ) -> tuple[list[int | None], SamplingParams, list[Request]]:
        """Checked arguments of a call: each image's label, the parameters, and a request for each image."""
        layout = self.layout
        n = None if n is None else whole("n", n, 1, MOST_IMAGES)
        seed, first = whole("seed", seed, 0, 2**64 - 1), whole("first", first, 0, 2**62)
        params = self.engine.sampling(params)
        given = choose_prompts("prompts", texts[0], n)
        others = choose_prompts("negative_prompts", texts[1], n)
        if texts[1] is not None and params.guidance == 1:
            raise InputError("negative_prompts need guidance above 1, as SamplingParams(guidance=2), and it is 1")
        n = max(len(given), len(others)) if n is None and max(len(given), len(others)) > 1 else n
        indices = choose_labels(layout, self.class_names, labels, n)
        given, others = (column * len(indices) if len(column) == 1 else column for column in (given, others))
        if not len(indices) == len(given) == len(others):
            raise InputError(f"there are {len(given)} prompts, {len(others)} negative ones and {len(indices)} labels")
        starts = (layout.classes if label is None else label for label in indices)
        requests = []
        for i, (start, text, other) in enumerate(zip(starts, given, others, strict=True)):
            prompt = self._rows(text, texts[2])
            # a model without the empty prompt compares labels, before the same prompt
            same = other is None and self.takes_prompts and not self.manifest.empty_prompt
            negative = prompt if same else self._rows(other, texts[2], "negative_prompts")
            values: dict[str, Any] = {"every": every, "key": i, "prompt": prompt, "negative": negative, "text": text}
            requests.append(Request(start, params, seed, first + i, **values))
        return indices, params, requests

    def _rows(self, text: Prompt, truncate: bool, name: str = "prompts") -> NDArray[np.float32] | None:
        """Rows of a prompt.

        Raises:
            InputError: the model reads none, or needs one.
        """
        rows = None if text is None else self.engine.prompts.rows(text, truncate)  # labels alone need no tokenizer
        if rows is None and self.takes_prompts and not self.manifest.empty_prompt:
            raise InputError(f"this model needs {name}: it was trained without the empty prompt")
        return rows

    def _codes(self, event: Event) -> Codes:
        codes, grain = cells_to_maps(self.layout, event.cells)
        label = event.request.label if event.request.label < self.layout.classes else None
        return Codes(codes, grain.astype(np.int8), self.layout, label, event.request.text)


def _reopen(arguments: dict[str, Any]) -> Generator:
    return Generator(**arguments)
