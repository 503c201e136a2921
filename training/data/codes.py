"""Codes on the disk: what the tokenizer makes of a data set, in parts that any number of processes write.

A folder of codes holds ``codes.json``, which says what they were made of, and the parts ``train-00000.safetensors``,
``val-00000.safetensors``, ... A part follows from its number alone and appears whole, so whoever finds it there leaves
it out. Its tensors, of n images:

- ``codes`` int32 [n, h, w] and ``grain`` int8 [n, hc, wc], see ``Tokenizer.encode_maps``;
- where it is asked for ``coarse`` int32 [n, hc, wc], the codes that the cells would have in the coarsest grain;
- ``labels`` int64 [n], ``images`` int64 [n], the indices in the ``ImageFolder``;
- ``captions`` uint8 and ``caption_ends`` int64 [n]: a JSON list of texts for each, see ``Texts``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from dvq_rt.files import read_json, write_file, write_tensors
from dvq_rt.layout import TokenLayout
from runtimes.errors import DataError, guard, short
from training.checkpoint import digest
from training.data.folder import ImageFolder, Indices
from training.data.pixels import Pixels, to_float
from training.data.stream import Augment, batches
from training.data.texts import Texts
from training.models.tokenizer import Tokenizer

BATCH = 32
"""Training images that are encoded at once. Held-out ones are encoded one by one."""
MANIFEST = "codes.json"
AGAIN = "remove the folder, or choose another"


@dataclass(frozen=True, slots=True)
class Part:
    """Images ``first`` .. ``first + count - 1`` of one side, ``train`` or ``val``."""

    side: str
    number: int
    first: int
    count: int

    @property
    def file(self) -> str:
        return f"{self.side}-{self.number:05}.safetensors"


@dataclass(frozen=True)
class Tokenization:
    """How a data set is tokenized. It may be sent to other processes.

    Args:
        tokenizer: in eval mode, on the device that encodes.
        folder: the images; its held-out ones can all be decoded (``ImageFolder.check_held_out``).
        copies: how often each training image is encoded, with other augmentation each time.
        seed: of order and augmentation, see ``batches``.
        augment: of the training images.
        shard_size: images in a part, a multiple of ``BATCH``.
        coarse: whether the codes in the coarsest grain are written too.

    Raises:
        DataError: ``shard_size`` is none.
    """

    tokenizer: Tokenizer
    folder: ImageFolder
    copies: int
    seed: int
    augment: Augment
    shard_size: int = 4096
    coarse: bool = False

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.shard_size % BATCH:
            raise DataError(f"the shard size is {self.shard_size}; it must be a multiple of {BATCH}")

    def manifest(self) -> dict[str, Any]:
        """What the codes depend on, as JSON gives it back."""
        folder = self.folder
        split = hashlib.sha256(folder.train.tobytes() + b"/" + folder.val.tobytes()).hexdigest()
        augment = {**asdict(self.augment), "flip_exclude": sorted(self.augment.flip_exclude)}
        augment["flip_exclude_images"] = sorted(self.augment.flip_exclude_images)
        made = {"tokenizer": digest(self.tokenizer), "images": folder.digest(), "split": split}
        made["bytes"] = hashlib.sha256(folder.sizes.tobytes()).hexdigest()
        made["classes"] = hashlib.sha256(json.dumps(folder.classes).encode()).hexdigest()
        sizes = {"copies": self.copies, "seed": self.seed, "shard_size": self.shard_size, "coarse": self.coarse}
        return json.loads(json.dumps({**made, **sizes, "size": folder.size, "augment": augment}))

    def parts(self) -> list[Part]:
        """All parts, in the order of their images."""
        sides = {"train": len(self.folder.train) * self.copies, "val": len(self.folder.val)}
        return [
            Part(side, number, first, min(self.shard_size, count - first))
            for side, count in sides.items()
            for number, first in enumerate(range(0, count, self.shard_size))
        ]

    def write(self, out: Path, part: Part, done: Callable[[int], Any] = lambda count: None) -> None:
        """Write a part, unless it is there; ``done`` is called with the number of images after every few.

        Raises:
            DataError: an image cannot be decoded, or the disk refuses.
        """
        if (out / part.file).exists():
            done(part.count)
            return
        codes: list[NDArray[np.int32]] = []
        grains: list[NDArray[np.int8]] = []
        coarsest: list[NDArray[np.int32]] = []
        indices: list[Indices] = []
        device = next(self.tokenizer.parameters()).device
        with closing(self._images(part)) as images, torch.no_grad():
            for pixels, index in images:
                if self.coarse:
                    code, grain, _, every = self.tokenizer.encode_grains(to_float(pixels).to(device))
                    block = code.shape[1] // grain.shape[1]
                    coarsest.append(every[:, 0, ::block, ::block].cpu().numpy().astype(np.int32))
                else:
                    code, grain = self.tokenizer.encode_maps(to_float(pixels).to(device))
                codes.append(code.cpu().numpy().astype(np.int32))
                grains.append(grain.cpu().numpy().astype(np.int8))
                indices.append(index)
                done(len(index))
        rows = np.concatenate(indices)[: part.count]
        captions = Texts(json.dumps(self.folder.captions(index), ensure_ascii=False) for index in rows)
        tensors: dict[str, NDArray[Any]] = {
            "codes": np.concatenate(codes)[: part.count],
            "grain": np.concatenate(grains)[: part.count],
            "labels": self.folder.labels[rows],
            "images": rows,
            "captions": captions.data,
            "caption_ends": captions.ends,
        }
        if self.coarse:
            tensors["coarse"] = np.concatenate(coarsest)[: part.count]
        with guard(DataError, f"cannot write {out / part.file}"):
            write_tensors(out / part.file, tensors)

    def _images(self, part: Part) -> Generator[tuple[Pixels, Indices], None, None]:
        """Pixels and indices of a part, and of what belongs to its last batch beside."""
        folder, end = self.folder, part.first + part.count
        if part.side == "val":
            for index in folder.val[part.first : end]:
                yield folder.pixels(index)[None], np.array([index])
            return
        first, last = part.first // BATCH, math.ceil(end / BATCH)
        stream = batches(folder, folder.train, BATCH, seed=self.seed, step=first, augment=self.augment, indexed=True)
        with closing(stream):  # type: ignore[type-var]
            for _, batch in zip(range(first, last), stream, strict=False):
                yield batch


def begin(out: Path, work: Tokenization) -> None:
    """Make the folder of codes, or go on with one of the same work.

    Raises:
        DataError: it holds codes of something else, or the disk refuses.
    """
    with guard(DataError, f"cannot make the folder {out}", "choose another"):
        out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST).exists():
        write_file(out / MANIFEST, json.dumps(work.manifest(), indent=1).encode(), error=DataError)
    check(out, work)


def check(out: Path, work: Tokenization) -> None:
    """
    Raises:
        DataError: there are no codes in the folder, or those of another tokenizer, data set or augmentation.
    """
    told = read_json(out / MANIFEST, error=DataError, what=f"{out} holds no codes", mend=AGAIN)
    wanted = work.manifest()
    older = {"coarse": False, "bytes": wanted["bytes"]}  # what older folders lack
    told = {**older, **told} if isinstance(told, dict) else told
    if not isinstance(told, dict) or set(told) != set(wanted):
        raise DataError(f"{out / MANIFEST} is damaged or of another version; {AGAIN}")
    root = work.folder.root
    names = {"images": f"images of {root}", "split": "held-out images", "bytes": f"sizes of the image files of {root}"}
    if other := [name for name in wanted if told[name] != wanted[name]]:
        both = "; ".join(f"{names.get(n, n)} {_brief(told[n])} there and {_brief(wanted[n])} now" for n in other)
        raise DataError(f"{out} holds the codes of something else ({both}); give the same, or {AGAIN}")


def _brief(value: Any) -> str:
    return value[:12] if isinstance(value, str) else short(value)


def open_codes(out: Path, work: Tokenization) -> tuple[Codes, Codes]:
    """The training and the held-out side of a folder of codes, whose parts may have another size than ``work`` has.

    Raises:
        DataError: see ``check`` and ``Codes``.
    """
    told = read_json(out / MANIFEST, error=DataError, what=f"{out} holds no codes", mend=AGAIN)
    size = told.get("shard_size") if isinstance(told, dict) else None
    work = replace(work, shard_size=size if type(size) is int else work.shard_size)
    check(out, work)
    return Codes(out, work, "train"), Codes(out, work, "val")


class Codes:
    """The codes of one side, of which rows are read from the disk when they are asked for.

    Attributes:
        codes, grain: rows int32 [h, w] and int8 [hc, wc] by number.
        coarse: rows int32 [hc, wc] by number, None if they were not asked for.
        labels: int64 [N], in memory.
        images: int64 [N], indices in the ``ImageFolder``, in memory.

    Raises:
        DataError: a part is missing or damaged.
    """

    def __init__(self, out: Path, work: Tokenization, side: str) -> None:
        parts = [part for part in work.parts() if part.side == side]
        if lacking := [part.file for part in parts if not (out / part.file).exists()]:
            raise DataError(
                f"{out} lacks {len(lacking)} of {len(parts)} parts ({lacking[0]}); run training.tokenize again"
            )
        self._files: list[Any] = []
        labels, images = [], []
        for part in parts:
            with guard(DataError, f"cannot read {out / part.file}", "remove it and run training.tokenize again"):
                file = safe_open(out / part.file, "np")
                labels.append(file.get_tensor("labels"))
                images.append(file.get_tensor("images"))
                if len(labels[-1]) != part.count:
                    raise ValueError(f"it holds {len(labels[-1])} images instead of {part.count}")
                self._files.append(file)
        self._size = work.shard_size
        self.labels: Indices = np.concatenate(labels)
        self.images: Indices = np.concatenate(images)
        self.codes, self.grain = _Rows(self._files, "codes", self._size), _Rows(self._files, "grain", self._size)
        self.coarse = _Rows(self._files, "coarse", self._size) if work.coarse else None

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self, layout: TokenLayout) -> Indices:
        """Number of codes of each image, int64 [N]."""
        return np.concatenate([layout.count_codes(file.get_tensor("grain")) for file in self._files])

    def captions(self, row: int) -> tuple[str, ...]:
        """The texts that describe the image of a row."""
        file, place = self._files[row // self._size], row % self._size
        texts = Texts.of_arrays(file.get_tensor("captions"), file.get_tensor("caption_ends"))
        return tuple(json.loads(texts[place]))


class _Rows(Sequence[NDArray[Any]]):
    """The rows of one tensor of all parts."""

    def __init__(self, files: list[Any], name: str, size: int) -> None:
        self._slices = [file.get_slice(name) for file in files]
        self._size = size

    def __len__(self) -> int:
        return sum(each.get_shape()[0] for each in self._slices)

    def __getitem__(self, row: Any) -> Any:
        part, place = divmod(int(row), self._size)
        return self._slices[part][place]
