"""Captions: which words they hold, the tokenizer that is trained on them, and which one an image is shown with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from dvq_rt.prompts import import_tokenizers

WORD = re.compile(r"[\w'’-]+")


def words(text: str) -> frozenset[str]:
    """The words of a text in lower case; ``medium-dark`` is one."""
    return frozenset(WORD.findall(text.lower()))


def holds(text: str, phrases: Iterable[str]) -> bool:
    """Whether a text has all words of at least one phrase."""
    own = words(text)
    return any(words(phrase) <= own for phrase in phrases)


def train_bpe(captions: Iterable[str], vocabulary: int) -> str:
    """A byte-level BPE of at most ``vocabulary`` tokens, as the content of a ``tokenizer.json``. Any text has tokens.

    Raises:
        BackendError: the package tokenizers is missing.
    """
    package: Any = import_tokenizers()
    tokenizer = package.Tokenizer(package.models.BPE())
    normalizers, bytes_of = package.normalizers, package.pre_tokenizers.ByteLevel
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(package.Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = bytes_of(add_prefix_space=True)
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, initial_alphabet=sorted(bytes_of.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(sorted(captions), trainer)
    return str(tokenizer.to_str(pretty=True))


def choose_caption(captions: Sequence[str], templates: Sequence[str], number: float) -> str:
    """One of an image's captions in one of the templates, by a number in [0, 1)."""
    templates = templates or ("{name}",)
    caption, template = divmod(int(number * len(captions) * len(templates)), len(templates))
    return templates[template].replace("{name}", captions[caption])
