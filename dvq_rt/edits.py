"""The calls of ``Generator`` that keep a part of an image and draw the rest."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvq_rt.codes import Codes, codes_of
from dvq_rt.decoding import Event, Request
from dvq_rt.editing import (
    Edit,
    between,
    cell_mask,
    choose,
    effective,
    forced_beginning,
    region_mask,
    stack_weights,
    thinned,
    weights,
)
from dvq_rt.engine import LOGMASSES, LOGPROBS, Engine
from dvq_rt.images import ImageLike, open_rgb, to_array
from dvq_rt.labels import Label, whole
from dvq_rt.outpainting import Canvas
from dvq_rt.progress import Progress, check_progress, told
from dvq_rt.rates import by_shares
from dvq_rt.results import Samples
from dvq_rt.sampling import SamplingParams, uniforms
from runtimes.errors import InputError, short

CANDIDATES = 1 << 20
"""Candidate m of image i has the random numbers of image ``i * CANDIDATES + m``."""
SELECTIONS = ("weight", "likelihood", "consistent")
MIXES = ("sphere", "tail")
Labels = Label | Iterable[Label]


class Edits:
    """What ``Generator`` inherits. All calls draw through the one batch that all threads share."""

    if TYPE_CHECKING:

        @property
        def engine(self) -> Engine: ...

        def sample(self, n: Any, labels: Any, seed: Any, params: Any, *, prompts: Any) -> Samples: ...

        def _requests(
            self,
            n: Any,
            labels: Any,
            seed: Any,
            params: SamplingParams | None,
            first: Any,
            every: int = 0,
            texts: Any = (None, None, False),
        ) -> tuple[list[int | None], SamplingParams, list[Request]]: ...

        def _codes(self, event: Event) -> Codes: ...

    # --- regions -----------------------------------------------------------------------------------------------
    def edit(
        self,
        image: ImageLike | Codes,
        mask: Any = None,
        *,
        region: Any = None,
        labels: Labels = None,
        prompts: Any = None,
        n: int | None = None,
        grain: str = "free",
        exact: bool | None = None,
        candidates: int = 1,
        select: str = "weight",
        dilate: int = 0,
        density: float | None = None,
        blend: bool = True,
        seed: int = 0,
        first: int = 0,
        params: SamplingParams | None = None,
        progress: Progress = None,
    ) -> Samples:
        """Redraw a region of an image and keep the rest: the codes outside come back as they were.

        Image i depends on (seed, first + i, its label, params, the edit) alone.

        Args:
            image: of the model's size, or codes. Give the original, also where it is to be redrawn.
            mask, region, dilate: what is redrawn, one of the first two; see ``dvq_rt.editing.cell_mask`` and
                ``region_mask``. A coarsest cell is redrawn if any pixel of it is.
            density: of models that keep some cells, how many of an image's codes what is kept may have, in proportion
                to its share of the cells; the most important stay. None keeps all, so the hole gets as many as it had.
            labels: as for ``sample``; None takes the codes' own, or none.
            prompts: as for ``sample``; None takes the codes' own, if the model reads any.
            n: number of results; None takes one per label, or one.
            grain: ``free`` or ``keep``, see ``dvq_rt.editing.Edit``.
            exact: None draws as well as the model can, True refuses what is not drawn from the model's law given what
                is kept, False draws by pins. ``Samples.law`` says what was done.
            candidates: images drawn for each result.
            select: which of them it is: ``weight`` one at random, by the weights that correct the law; ``likelihood``
                the most probable, which is no draw from any law; ``consistent`` the one that looks most like the image,
                by the mean colours of the redrawn cells.
            blend: whether pixels outside are those of the image; else everything is what the codes decode to.
            seed, first, params, progress: as for ``sample``.

        Raises:
            InputError: an argument is out of range or unknown, the image or mask has another size, nothing or
                everything is redrawn, or the engine was exported before there was editing.
        """
        edit = self.edit_of(image, mask, region=region, grain=grain, dilate=dilate, density=density, blend=blend)
        return self._edited(edit, labels, n, exact, candidates, select, seed, first, params, progress, prompts)

    def edit_of(
        self,
        image: ImageLike | Codes,
        mask: Any = None,
        *,
        region: Any = None,
        grain: str = "free",
        dilate: int = 0,
        density: float | None = None,
        blend: bool = True,
    ) -> Edit:
        """What ``edit`` keeps and redraws, for ``stream(edit=...)``; arguments and errors as there."""
        if (mask is None) == (region is None):
            raise InputError("give a mask or a region, and not both")
        codes, pixels = self._opened(image)
        size = self.engine.manifest.image_size
        cells = cell_mask(region_mask(region, size) if mask is None else mask, self.engine.layout, size, dilate)
        if density is not None:
            codes = self._thinned(pixels, cells, density)
        return Edit(codes, cells, grain, pixels if blend else None)

    def complete(
        self, image: ImageLike | Codes, *, keep: float = 0.5, rows: int | None = None, **options: Any
    ) -> Samples:
        """Keep the upper part of an image and draw what is below: ``edit`` with the lower rows of cells.

        Args:
            keep: share of the rows of coarsest cells that is kept, to the nearest row, in (0, 1).
            rows: their number, in place of ``keep``.
            options: as for ``edit``.
        """
        side = self.engine.layout.sides[0]
        count = whole("rows", round(_share("keep", keep) * side) if rows is None else rows, 1, side - 1)
        mask = np.zeros((side, side), dtype=bool)
        mask[count:] = True
        return self.edit(image, mask, **options)

    def outpaint(
        self,
        image: ImageLike | Codes,
        *,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        labels: Label = None,
        prompts: Any = None,
        exact: bool | None = None,
        candidates: int = 1,
        seed: int = 0,
        params: SamplingParams | None = None,
        progress: Progress = None,
    ) -> tuple[Image.Image, list[Codes]]:
        """Draw what lies around an image. Windows of the model's size, half a window apart, go row by row away from the
        image; each keeps the codes that earlier ones drew and draws the rest.

        Args:
            image: of the model's size, or codes.
            left, top, right, bottom: pixels to add, multiples of a coarsest cell, 16 windows at most in a row.
            labels, prompts: one for all windows; None takes the codes' own, or none.
            exact, candidates, seed, params, progress: as for ``edit``; each window is an image of the seed.

        Returns:
            the whole picture, and the codes of every window in the order of drawing, the image's own first.

        Raises:
            InputError: as for ``edit``, or a border is no such multiple.
        """
        layout, size = self.engine.layout, self.engine.manifest.image_size
        cell = size // layout.sides[0]
        border = []
        for name, value in {"left": left, "top": top, "right": right, "bottom": bottom}.items():
            pixels = whole(name, value, 0, 16 * size)
            if pixels % cell:
                raise InputError(f"{name} is {pixels}; it must be a multiple of {cell} pixels, a coarsest cell")
            border.append(pixels // cell)
        if not any(border):
            raise InputError("nothing is to be added; give left, top, right or bottom")
        check_progress(progress)
        codes, original = self._opened(image)
        labels, prompts = self._own(codes, labels, prompts)
        canvas = Canvas.around(codes, size, (border[0], border[1], border[2], border[3]))
        places = list(dict.fromkeys(canvas.windows(border[1], border[0])))
        drawn = [codes]
        canvas.paint(self.engine.decode(codes.codes[None])[0], border[1], border[0])
        with told(progress, len(places)) as tell:
            for i, (y, x) in enumerate(places):
                edit = canvas.edit(y, x, seed)
                if edit is not None:
                    made = self._edited(edit, labels, 1, exact, candidates, "weight", seed, i, params, None, prompts)
                    canvas.put(made.codes[0], y, x)
                    canvas.paint(np.asarray(made[0]), y, x)
                    drawn += made.codes
                tell(i + 1)
        return Image.fromarray(canvas.picture(original, border[1], border[0])), drawn

    def refine(
        self,
        codes: Codes,
        *,
        cells: Any = None,
        ratio: float | None = None,
        candidates: int | None = None,
        select: str | None = None,
        **options: Any,
    ) -> Samples:
        """Give coarse cells the codes of the finest grain. A model that was trained with what is kept first is told the
        coarse codes, and draws from its law given these too. To others a cell's coarse code is lost, so of several
        candidates the one is taken that looks most like the image, which is no law of the model's.

        Args:
            cells: bool [sides[0], sides[0]], which cells; those of the finest grain already are left as they are.
            ratio: in place of ``cells`` the share of all cells that are of the finest grain afterwards; the encoder
                chooses them by the decoded image.
            candidates, select, options: as for ``edit``; None takes 1 and ``weight`` if the model is told, else 8 and
                ``consistent``.

        Raises:
            InputError: also if the model has one grain, or no cell is to be refined.
        """
        layout, engine = self.engine.layout, self.engine
        codes, _ = self._opened(_only_codes(codes))
        finest = layout.segments - 1
        if not finest:
            raise InputError("refine is for models with several grains; this one has one")
        if (cells is None) == (ratio is None):
            raise InputError("give cells or ratio, and not both")
        if cells is None:
            picture = to_array(engine.decode(codes.codes[None])[0], engine.manifest.image_size)
            scores = engine.by_row("encoder", "images", picture[None]).get("scores")
            if scores is None:
                raise InputError(f"engine {engine.path} was exported before rates could be chosen; export it again")
            wanted = np.where(codes.grain[..., None] == finest, [0.0] * finest + [1e9], scores[0].astype(np.float64))
            cells = by_shares(wanted, [0.0] * (finest - 1) + [_share("ratio", ratio)]) == finest
        cells = np.asarray(cells)
        if cells.shape != codes.grain.shape or cells.dtype != bool:
            raise InputError(f"cells are {cells.dtype} {cells.shape}; they must be bool {codes.grain.shape}")
        cells = cells & (codes.grain != finest)
        if not cells.any():
            raise InputError("no cell is to be refined: all of them are of the finest grain")
        given = self.engine.table.has("given") and options.get("exact") is not False
        coarsest = codes.codes[:: len(codes.codes) // len(cells), :: len(codes.codes) // len(cells)]
        hints = np.where(cells & (codes.grain == 0), coarsest, -1) if given else None
        edit = Edit(codes, cells, "finest", hints=hints)
        values = {"labels": None, "prompts": None, "n": None, "exact": None, "seed": 0, "first": 0}
        values |= {"params": None, "progress": None}
        if unknown := sorted(set(options) - set(values)):
            raise InputError(f"unknown arguments {unknown}; there are {sorted(values)}")
        candidates = (1 if given else 8) if candidates is None else candidates
        select = ("weight" if given else "consistent") if select is None else select
        return self._edited(edit, candidates=candidates, select=select, **{**values, **options})

    # --- beginnings --------------------------------------------------------------------------------------------
    def vary(
        self,
        image: ImageLike | Codes,
        keep: str | float = "coarse",
        n: int | None = 4,
        *,
        labels: Labels = None,
        prompts: Any = None,
        seed: int = 0,
        first: int = 0,
        params: SamplingParams | None = None,
        progress: Progress = None,
    ) -> Samples:
        """Draw images that begin as a given one does; from the model's own law given that beginning. With the seed and
        number that the codes were drawn with, the codes come back.

        Args:
            image: of any size, or codes.
            keep: ``coarse`` keeps which cells are of the coarsest grain, and their codes; a number in [0, 1] that share
                of the tokens.
            labels, prompts, n, seed, first, params, progress: as for ``sample``; labels and prompts None take the
                codes' own.

        Raises:
            InputError: as for ``sample``; or the model has one grain, and ``keep`` is ``coarse``.
        """
        layout = self.engine.layout
        codes = self._opened(image, sized=False)[0]
        tokens = codes.tokens(0)
        if isinstance(keep, str):
            if keep != "coarse":
                raise InputError(f"keep is {short(keep)}; it must be 'coarse', or a share of the tokens")
            if layout.segments == 1:
                raise InputError("keep is 'coarse', but this model has one grain; give a share of the tokens")
            count = int((tokens.segment == 0).sum()) - 1
        else:
            count = round(_share("keep", keep) * layout.steps_of(tokens))
        check_progress(progress)
        labels, prompts = self._own(codes, labels, prompts)
        indices, params, requests = self._requests(n, labels, seed, params, first, texts=(prompts, None, False))
        requests = [replace(r, forced=forced_beginning(codes, r.label, count)) for r in requests]
        return self._finished(indices, params, requests, progress, law="prefix")

    def interpolate(
        self,
        seed_a: int,
        seed_b: int,
        frames: int,
        *,
        labels: Label = None,
        prompts: Any = None,
        mix: str = "sphere",
        params: SamplingParams | None = None,
        progress: Progress = None,
    ) -> Samples:
        """Images between the first ones of two seeds, ends included. Every frame is a sample of the model like any
        other; what moves are its random numbers. Tokens are discrete, so frames move in jumps, and part ways after the
        first token that differs.

        Args:
            frames: 2 or more.
            labels, prompts: one for all.
            mix: ``sphere`` turns all random numbers at once, ``tail`` exchanges them from the end of the first image,
                token by token, so that beginnings stay.
            params, progress: as for ``sample``.

        Raises:
            InputError: as for ``sample``, or ``mix`` is unknown.
        """
        frames = whole("frames", frames, 2, 1_000_000)
        if mix not in MIXES:
            raise InputError(f"mix is {short(mix)}; it must be one of {MIXES}")
        check_progress(progress)
        whole("seed_b", seed_b, 0, 2**64 - 1)
        texts = (prompts, None, False)
        indices, params, requests = self._requests(frames, [labels] * frames, seed_a, params, 0, texts=texts)
        length = self.engine.layout.max_length
        a, b = (uniforms(seed, 0, length) for seed in (seed_a, seed_b))
        shares = np.linspace(0, 1, frames)
        if mix == "sphere":
            tables = [between(a, b, share) for share in shares]
        else:
            (start,) = self.sample(1, labels, seed_a, params, prompts=prompts).codes
            steps = self.engine.layout.steps_of(start.tokens())
            tables = [np.where(np.arange(length)[:, None] < round((1 - s) * steps), a, b) for s in shares]
        requests = [replace(r, image=0, uniforms=table) for r, table in zip(requests, tables, strict=True)]
        return self._finished(indices, params, requests, progress)

    # --- inside ------------------------------------------------------------------------------------------------
    def _own(self, codes: Codes, labels: Any, prompts: Any) -> tuple[Any, Any]:
        """Labels and prompts; those of the codes where none are given."""
        own = codes.prompt if self.engine.manifest.conditioning else None
        return codes.label if labels is None else labels, own if prompts is None else prompts

    def _opened(self, image: Any, sized: bool = True) -> tuple[Codes, NDArray[np.uint8] | None]:
        """Codes in this model's own ids, and the pixels if an image is given."""
        engine, size = self.engine, self.engine.manifest.image_size
        if isinstance(image, Codes):
            (codes,) = codes_of(engine.layout, image)
            return Codes(codes.codes, codes.grain, engine.layout, codes.label, codes.prompt), None
        picture = open_rgb(image)
        if sized and picture.size != (size, size):
            raise InputError(
                f"the image is {picture.width} x {picture.height}; edits need {size} x {size}, the model's size: cut "
                "and resize it, and the mask with it"
            )
        maps, grains = engine.encode(to_array(picture, size)[None])
        return Codes(maps[0], grains[0], engine.layout), np.asarray(picture)

    def _thinned(self, pixels: NDArray[np.uint8] | None, redraw: NDArray[np.bool_], density: Any) -> Codes:
        """Codes of an image, of which what is kept has a share by ``density``."""
        engine = self.engine
        if engine.layout.kept is None or pixels is None:
            raise InputError("density is for models that keep some cells, and for images; leave it out")
        outputs = engine.by_row("encoder", "images", to_array(pixels, engine.manifest.image_size)[None])
        if "scores" not in outputs:
            raise InputError(f"engine {engine.path} was exported before rates could be chosen; export it again")
        return thinned(engine.layout, redraw, outputs["scores"][0, ..., 0], outputs["grain_codes"][0, 0], density)

    def constrained(self, requests: list[Request], edit: Edit, exact: bool | None = None) -> tuple[list[Request], str]:
        """Requests that keep what an edit keeps, and the law that they draw from (``Samples.law``)."""
        if not self.engine.table.has("pinned"):
            raise InputError(
                f"engine {self.engine.path} was exported before there was editing; export it again "
                "(python -m export.to_onnx)"
            )
        beginning = edit.beginning and edit.hints is None
        given = self.engine.table.has("given") and exact is not False and not beginning
        law = "given" if given else "prefix" if beginning else "pins"
        if exact and law == "pins":
            raise InputError(
                "this edit is not exact: tokens that are kept come after some that are drawn; use exact=None, or a "
                "model trained with stage.given"
            )
        fields = edit.constraint(given)
        return [replace(request, **fields) for request in requests], law

    def _edited(
        self,
        edit: Edit,
        labels: Any,
        n: Any,
        exact: bool | None,
        candidates: Any,
        select: str,
        seed: Any,
        first: Any,
        params: SamplingParams | None,
        progress: Progress,
        prompts: Any = None,
    ) -> Samples:
        candidates = whole("candidates", candidates, 1, CANDIDATES)
        if select not in SELECTIONS:
            raise InputError(f"select is {short(select)}; it must be one of {SELECTIONS}")
        if exact not in (None, True, False):
            raise InputError(f"exact is {short(exact)}; it must be True, False or None")
        check_progress(progress)
        labels, prompts = self._own(edit.codes, labels, prompts)
        indices, params, requests = self._requests(n, labels, seed, params, first, texts=(prompts, None, False))
        constrained, law = self.constrained(requests, edit, exact)
        record = (*LOGMASSES, *(LOGPROBS if select == "likelihood" else ()))
        several = [
            replace(r, image=r.image * CANDIDATES + m if candidates > 1 else r.image, record=record, key=(i, m))
            for i, r in enumerate(constrained)
            for m in range(candidates)
        ]
        groups = self._drawn(several, len(requests), candidates, progress)
        chosen, log_weights, counts = [], [], []
        for request, group in zip(requests, groups, strict=True):
            logs = stack_weights([{name: event.records[name] for name in LOGMASSES} for event in group])
            shares = weights(logs)
            if select == "weight":
                u = uniforms(request.seed, request.image, self.engine.layout.max_length + 1)[-1, 0]
                best = choose(shares, float(u))
            elif select == "likelihood":
                best = int(np.argmax(stack_weights([{k: event.records[k] for k in LOGPROBS} for event in group])))
            else:
                best = self._nearest(edit, group)
            chosen.append(group[best])
            log_weights.append(logs[best])
            counts.append(effective(shares))
        if select == "weight" and law == "pins" and candidates > 1 and min(counts) < 2:
            warnings.warn(
                f"of {candidates} candidates only {min(counts):.1f} count: for what is redrawn here weights do not "
                "help; draw more candidates or redraw less",
                stacklevel=3,
            )
        samples = self._samples(indices, params, requests, chosen, edit, law=law)
        return replace(samples, log_weights=np.array(log_weights), effective=np.array(counts))

    def _nearest(self, edit: Edit, group: list[Event]) -> int:
        """The candidate whose redrawn cells have the most similar mean colours to the image's."""
        side = len(edit.redraw)
        images = self.engine.decode(np.stack([edit.codes.codes, *(self._codes(event).codes for event in group)]))
        size = images.shape[1] // side
        means = images.reshape(len(images), side, size, side, size, 3).mean((2, 4))[:, edit.redraw]
        return int(np.square(means[1:] - means[0]).sum((1, 2)).argmin())

    def _drawn(self, requests: list[Request], results: int, candidates: int, progress: Progress) -> list[list[Event]]:
        """Last events of requests whose keys are (result, candidate)."""
        found: dict[Any, Event] = {}
        with closing(self.engine.draw(requests)) as events, told(progress, results) as tell:
            for event in events:
                found[event.request.key] = event
                tell(len(found) // candidates)
        return [[found[i, m] for m in range(candidates)] for i in range(results)]

    def _finished(
        self,
        indices: list[int | None],
        params: SamplingParams,
        requests: list[Request],
        progress: Progress,
        law: str | None = None,
    ) -> Samples:
        keyed = [replace(request, key=(i, 0)) for i, request in enumerate(requests)]
        events = [group[0] for group in self._drawn(keyed, len(keyed), 1, progress)]
        return self._samples(indices, params, requests, events, law=law)

    def _samples(
        self,
        indices: list[int | None],
        params: SamplingParams,
        requests: list[Request],
        events: list[Event],
        edit: Edit | None = None,
        law: str | None = None,
    ) -> Samples:
        codes = [self._codes(event) for event in events]
        pixels = self.engine.decode(np.stack([c.codes for c in codes]))
        images = [Image.fromarray(image if edit is None else edit.shown(image)) for image in pixels]
        prompts = [request.text for request in requests]
        return Samples(images, codes, indices, requests[0].seed, params, requests[0].image, prompts, law)


def _share(name: str, value: Any) -> float:
    number = float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else -1.0
    if not 0 <= number <= 1:
        raise InputError(f"{name} is {short(value)}; it must be a number from 0 to 1")
    return number


def _only_codes(codes: Any) -> Codes:
    if not isinstance(codes, Codes):
        raise InputError(f"got a {type(codes).__name__}; refine takes the codes of one image")
    return codes
