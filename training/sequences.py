"""The batches of stage 2: which images a step learns from, and their token sequences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq_rt.layout import TokenLayout
from training import processes
from training.data.codes import Codes
from training.data.folder import Indices
from training.data.holes import Hole, drawn_hole
from training.data.tokens import collate, padded_to
from training.loop import TrainConfig
from training.losses import target_counts
from training.prompts import Prompts

BUCKET = 16
"""Batches that share a draw of images, sorted by length so that little is padded."""
Shares = NDArray[np.float64]


class Sequences:
    """Batches by number, each a function of the seed and its number alone.

    Args:
        codes: of the training images, N.
        layout: of their tokens.
        training: seed, size and parts of the batches.
        device: where batches are to be.
        weights: float [N], how often each image is drawn, in any unit.
        label_dropout: share of the sequences with the null label, if the layout has one.
        given: share of the sequences that begin with what a random edit keeps.
        prompts: what the images are shown with; None for a model without prompts.
    """

    def __init__(
        self,
        codes: Codes,
        layout: TokenLayout,
        training: TrainConfig,
        device: torch.device,
        *,
        weights: Shares,
        label_dropout: float,
        given: float,
        prompts: Prompts | None = None,
    ) -> None:
        self.codes, self.layout, self.training, self.device = codes, layout, training, device
        self.label_dropout, self.given, self.prompts = label_dropout, given, prompts
        self._weights, self._counts = weights / weights.sum(), codes.lengths(layout)

    def stream(self, step: int) -> Iterator[list[dict[str, Tensor]]]:
        """From a step number, this process's rows of that step's batch, in parts (see ``Stage.batches``), and of the
        next ones'. Each part is as long as its longest sequence in any process."""
        size, classes = self.training.batch_size, self.layout.classes
        while True:
            bucket, place = divmod(step, BUCKET)
            rng = self._rng(bucket)
            drawn = rng.choice(len(self._weights), BUCKET * size, p=self._weights)
            drawn = drawn[np.argsort(self._counts[drawn], kind="stable")].reshape(BUCKET, size)
            drawn = drawn[rng.permutation(BUCKET)]
            dropped = rng.random((BUCKET, size)) < self.label_dropout
            numbers, silence = rng.random((2, BUCKET, size))  # which caption, and whether any
            for row in range(place, BUCKET):
                labels = self.codes.labels[drawn[row]]
                labels = np.where(dropped[row], classes, labels) if self.layout.null_label else labels
                holes = self._holes(step, drawn[row]) if self.given else None
                yield self._parts(drawn[row], labels, numbers[row], silence[row], holes)
                step += 1

    def _rng(self, number: int, jump: int = 0) -> np.random.Generator:
        key = np.array([self.training.seed, number], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key).jumped(jump))

    def _holes(self, step: int, images: Indices) -> list[Hole | None]:
        """What is redrawn of each image of a step, None for one that is drawn whole."""
        size = len(images)
        return [
            drawn_hole(self.layout, self.codes.grain[image], (self.training.seed, step * size + i))
            if share < self.given
            else None
            for i, (image, share) in enumerate(zip(images, self._rng(step, jump=1).random(size), strict=True))
        ]

    def _parts(
        self, images: Indices, labels: Indices, numbers: Shares, silence: Shares, holes: list[Hole | None] | None
    ) -> list[dict[str, Tensor]]:
        layout, made = self.layout, []
        lengths = self._counts[images] + layout.max_length - layout.filled_cells
        lengths += [0 if hole is None else hole.told.sum() for hole in holes or [None] * len(images)]
        for rows in np.split(np.arange(len(images)), self.training.accumulate):
            own = np.split(rows, processes.count())[processes.number()]
            edits = None if holes is None else [holes[i] for i in own]
            part = collate(layout, self.codes, images[own], labels[own], edits, self.codes.coarse)
            part = padded_to(part, int(lengths[rows].max()))
            if self.prompts is not None:
                silent = silence[rows] < self.prompts.text.dropout
                told = self.prompts.collate(self.codes.images[images[rows]], numbers[rows], silent)
                part |= {name: values[own - rows[0]] for name, values in told.items()}
            made.append({name: processes.moved(values, self.device) for name, values in part.items()})
        targets = ((p["target_position"], p["target_content"], p["target_segment"]) for p in made)
        counted = torch.stack([target_counts(*each, layout.segments) for each in targets]).sum(0)
        counts = processes.total(counted) / (len(made) * processes.count())
        return [{**part, "counts": counts} for part in made]
