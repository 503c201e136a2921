"""Captions in the training of a transformer that reads prompts: settings, what is held out, token ids by batch."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dvq_rt.files import write_file
from dvq_rt.prompts import BYTES, TextTokenizer
from runtimes.errors import ConfigError, DataError, short
from training.checkpoint import Model
from training.data.captions import choose_caption, holds, train_bpe
from training.data.folder import ImageFolder
from training.data.listing import some
from training.data.tokens import collate_prompts
from training.frozen_text import FrozenText, frozen_of
from training.models.text import TextConfig


@dataclass(frozen=True, slots=True)
class TextSettings:
    """How a transformer that reads prompts is made (section ``text``).

    Args:
        length: most tokens of a prompt.
        vocabulary: most tokens of the BPE that is trained on the training captions.
        blocks: bidirectional blocks over the prompt.
        tokenizer: ``bpe``, or ``bytes``, which needs no package and about four times as many tokens.
        encoder: folder of a frozen text encoder (``training.frozen_text``), whose tokenizer is taken; empty for none.
        dropout: share of the sequences trained with the empty prompt; 0 makes a model that needs a prompt.
        templates: texts with ``{name}`` that captions are put into, one drawn at a time; none for captions as they are.

    Raises:
        ConfigError: a value is out of range.
    """

    length: int = 32
    vocabulary: int = 4096
    blocks: int = 2
    tokenizer: str = "bpe"
    encoder: str = ""
    dropout: float = 0.1
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokenizer not in ("bpe", BYTES):
            raise ConfigError(f"text.tokenizer is {short(self.tokenizer)}; it must be 'bpe' or {BYTES!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"text.dropout is {self.dropout}; it must be in [0, 1)")
        if not 256 <= self.vocabulary <= 1 << 20:
            raise ConfigError(f"text.vocabulary is {short(self.vocabulary)}; it must be in 256..{1 << 20}")
        for template in self.templates:
            if not isinstance(template, str) or "{name}" not in template:
                raise ConfigError(f"text.templates: {short(template)} must be a text with {{name}} in it")


def hold_out(folder: ImageFolder, phrases: Sequence[str]) -> None:
    """Move the images whose captions have all words of a phrase to those held out.

    Raises:
        DataError: a phrase is in no caption.
    """
    captions = [folder.captions(i) for i in range(len(folder))] if phrases else []
    for phrase in phrases:
        if not any(holds(text, [phrase]) for texts in captions for text in texts):
            raise DataError(
                f"stage.hold_out names {short(phrase)}, which no caption of {folder.root} has; mend the phrase"
            )
    out = {i for i, texts in enumerate(captions) if any(holds(text, phrases) for text in texts)}
    folder.val = np.array(sorted({*folder.val.tolist(), *out}), dtype=np.int64)
    folder.train = np.array(sorted(set(folder.train.tolist()) - out), dtype=np.int64)


def read_captions(
    folder: ImageFolder, text: TextSettings, frozen: FrozenText | None = None, known: str = ""
) -> tuple[str, TextConfig]:
    """A text tokenizer of the training captions, or that of a frozen encoder, and the sizes that follow from it.

    Args:
        known: a text tokenizer that is taken instead, whose tokens a model knows already.

    Raises:
        DataError: an image has no caption.
        BackendError: the package tokenizers is missing.
    """
    captions = [folder.captions(i) for i in range(len(folder))]
    if lacking := [folder.relative(i) for i, texts in enumerate(captions) if not texts]:
        raise DataError(
            f"{len(lacking)} images have no caption: {some(lacking)}; see docs/prompts.md for where they go"
        )
    if frozen is not None:
        return frozen.tokenizer, TextConfig(text.length, 0, text.blocks, frozen.features, text.dropout > 0)
    source = known or BYTES
    if not known and text.tokenizer != BYTES:
        source = train_bpe({name for i in folder.train for name in captions[i]}, text.vocabulary)
    vocabulary = TextTokenizer(source, text.length).vocabulary
    return source, TextConfig(text.length, vocabulary, text.blocks, empty=text.dropout > 0)


def directed_images(folder: ImageFolder, phrases: Sequence[str]) -> frozenset[int]:
    """The images whose captions have all words of a phrase."""
    if not phrases:
        return frozenset()
    return frozenset(i for i in range(len(folder)) if any(holds(text, phrases) for text in folder.captions(i)))


class Prompts:
    """The captions of images as token ids, or as a frozen encoder's features.

    Args:
        model: whose text tokenizer; folder: of the images; text: settings.
        kept: folder in which features are kept, one file for each text.
    """

    def __init__(self, model: Model, folder: ImageFolder, text: TextSettings, kept: Path) -> None:
        self._tokenizer, self._folder, self.text = model.prompts(), folder, text
        self._frozen, self._kept = frozen_of(model), kept / model.text_encoder.get("sha256", "")[:16]
        self._known: dict[str, NDArray[np.int64]] = {}

    def caption(self, image: int, number: float = 0.0) -> str:
        """The caption that a number in [0, 1) chooses."""
        return choose_caption(self._folder.captions(image), self.text.templates, number)

    def read(self, text: str) -> NDArray[Any]:
        """A text as ``TextEncoder.forward`` takes it: ids int64 [l], or features float32 [l, d]."""
        if text not in self._known:
            ids = self._tokenizer.encode(text, truncate=True)
            if self._frozen is not None:
                return self._features(self._frozen, ids)
            self._known[text] = ids
        return self._known[text]

    def _features(self, frozen: FrozenText, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Features from their file, which is made where it is not there."""
        path = self._kept / f"{hashlib.sha256(ids.tobytes()).hexdigest()}.npy"
        if path.exists():
            kept: NDArray[np.float32] = np.load(path, allow_pickle=False)
            return kept
        self._kept.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        np.save(data, features := frozen.of(ids))
        write_file(path, data.getvalue())
        return features

    def collate(self, images: NDArray[np.int64], numbers: NDArray[Any], dropped: NDArray[Any]) -> dict[str, Tensor]:
        """Prompts of a batch, see ``collate_prompts``; the empty one where ``dropped``."""
        given = zip(images, numbers, dropped, strict=True)
        return collate_prompts([self.read("" if drop else self.caption(i, number)) for i, number, drop in given])
