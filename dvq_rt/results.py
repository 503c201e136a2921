"""What ``Generator`` gives: drawn images, previews, scores."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvq_rt.codes import Codes
from dvq_rt.files import write_file
from dvq_rt.images import grid
from dvq_rt.sampling import SamplingParams
from runtimes.errors import InputError


@dataclass(frozen=True, slots=True, repr=False)
class Samples:
    """Drawn images: ``images`` (PIL, RGB), their ``codes``, label indices and ``prompts`` (None: no label, no prompt),
    and how they were drawn: image i is number ``first + i`` of ``seed``. Iterating gives the images.

    Of edits ``law`` says what was drawn from: ``prefix``, the model's own law given a beginning of the sequence;
    ``given``, the law of a model that was trained to see what is kept first; ``pins``, step by step among what the kept
    cells allow, which is not the model's law given them. ``log_weights`` float64 [N] are the logarithms of what
    corrects the last (``dvq_rt.editing``), and ``effective`` float64 [N] says of how many candidates
    each was really chosen.
    """

    images: list[Image.Image]
    codes: list[Codes]
    labels: list[int | None]
    seed: int
    params: SamplingParams
    first: int = 0
    prompts: list[str | None] = field(default_factory=list)
    law: str | None = None
    log_weights: NDArray[np.float64] | None = None
    effective: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    def __getitem__(self, index: int) -> Image.Image:
        return self.images[index]

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images[0].size)) if self.images else "0"
        return f"Samples({len(self)} images of {size}, seed={self.seed}, first={self.first})"

    def to_numpy(self) -> NDArray[np.uint8]:
        """uint8 [N, H, W, 3]."""
        return np.stack([np.asarray(image) for image in self.images])

    def grid(self, columns: int | None = None) -> Image.Image:
        """All images in one picture."""
        return grid(self.to_numpy(), columns)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``00000.png``, ``00001.png``, ..., by the number of each image, into a folder, made if it is not there;
        returns the paths. An older picture of that name is replaced when the new one is complete.

        Raises:
            InputError: a file cannot be written.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot make folder {folder}: {getattr(error, 'strerror', None) or error}") from error
        paths = [Path(folder) / f"{self.first + i:05d}.png" for i in range(len(self))]
        for image, path in zip(self.images, paths, strict=True):
            data = io.BytesIO()
            image.save(data, "PNG")
            write_file(path, data.getvalue())
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
