"""Prompts: what callers give, checked, and their tokens.

A text tokenizer is the JSON text of a HuggingFace ``tokenizers`` file, or ``bytes``: the UTF-8 bytes of the text, after
NFKC, in lower case, with single spaces. The empty prompt, or one of white space, has no tokens and stands for anything.
"""

from __future__ import annotations

import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.files import open_regular
from runtimes.errors import BackendError, DvqError, EngineError, InputError, guard, short

BYTES = "bytes"
"""The text tokenizer that needs no package."""
MOST_CHARACTERS = 10_000
"""Of a prompt; far above what any model reads."""
KEPT_PROMPTS = 256
"""Prompts whose rows are kept for later."""
Prompt = str | None
Rows = NDArray[np.float32]


class TextTokenizer:
    """Texts to token ids.

    Args:
        source: ``bytes``, or the content of a ``tokenizer.json``.
        length: L, the most tokens of a prompt.

    Raises:
        BackendError: the package tokenizers is missing.
        InputError: ``source`` is no tokenizer.
    """

    def __init__(self, source: str, length: int) -> None:
        self.source, self.length = source, length
        self._whole: Any = None
        if source != BYTES:
            package = import_tokenizers()
            with guard(InputError, "the text tokenizer cannot be read", "take the folder's own tokenizer.json"):
                self._whole, self._cut = (package.Tokenizer.from_str(source) for _ in range(2))
                for tokenizer in (self._whole, self._cut):
                    tokenizer.no_padding()
                self._whole.no_truncation()
                self._cut.enable_truncation(length)  # keeps a closing special token, where there is one

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return 256 if self._whole is None else int(self._whole.get_vocab_size())

    def encode(self, text: str, truncate: bool = False) -> NDArray[np.int64]:
        """Token ids int64 [l] of a text, l at most L.

        Args:
            truncate: keep the first L tokens of a longer text.

        Raises:
            InputError: it is no text, holds a NUL or a lone surrogate, or is too long.
        """
        if not check_prompt(text).strip():
            return np.zeros(0, np.int64)
        if self._whole is None:
            plain = " ".join(unicodedata.normalize("NFKC", text).lower().split())
            ids = list(plain.encode())
        else:
            ids = self._whole.encode(text).ids
        if len(ids) > self.length:
            if not truncate:
                raise InputError(
                    f"the prompt {short(text)} has {len(ids)} tokens; this model reads at most {self.length}: shorten "
                    "it, or say truncate=True to leave out the end"
                )
            ids = ids[: self.length] if self._whole is None else self._cut.encode(text).ids
        return np.array(ids, dtype=np.int64)


class PromptReader:
    """Prompts to the rows that a step reads; those of the last prompts are kept. Safe to use from several threads.

    Args:
        tokenizer: texts to token ids.
        embed: token ids int64 [l] to rows float32 [l, C].
    """

    def __init__(self, tokenizer: TextTokenizer, embed: Callable[[NDArray[np.int64]], Rows]) -> None:
        self.tokenizer, self._embed = tokenizer, embed
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, Rows] = OrderedDict()

    def rows(self, text: Prompt, truncate: bool = False) -> Rows | None:
        """Rows float32 [l, C] of a prompt; None of the empty one.

        Args:
            truncate: leave out the end of a text that is too long.

        Raises:
            InputError: see ``TextTokenizer.encode``.
        """
        ids = self.tokenizer.encode("" if text is None else text, truncate)
        if not len(ids):
            return None
        key = ids.tobytes()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._embed(ids)
                if len(self._kept) > KEPT_PROMPTS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


def read_tokenizer(folder: Path, name: str, length: int) -> TextTokenizer:
    """The text tokenizer of an engine folder: a file of that name, or ``bytes``.

    Raises:
        EngineError: the file cannot be read.
        BackendError: the package tokenizers is missing.
    """
    if name == BYTES:
        return TextTokenizer(BYTES, length)
    with guard(EngineError, f"{folder / name} cannot be read"), open_regular(folder / name) as file:
        source = file.read().decode()
    return TextTokenizer(source, length)


def import_tokenizers() -> Any:
    """The package tokenizers.

    Raises:
        BackendError: it is missing.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise BackendError("prompts need the package tokenizers; pip install 'dvq-rt[text]'") from error
    return tokenizers


def check_prompt(text: Any) -> str:
    """A prompt that can be tokenized.

    Raises:
        InputError: it is no text, too long, or holds a NUL or a lone surrogate.
    """
    if not isinstance(text, str):
        raise InputError(f"a prompt is {short(text)}; it must be a text")
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"a prompt has {len(text)} characters; at most {MOST_CHARACTERS} are read")
    if "\0" in text or any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise InputError(f"the prompt {short(text)} holds a NUL or half of a surrogate pair; leave that out")
    return text


def choose_prompts(name: str, prompts: Any, n: int | None) -> list[Prompt]:
    """One prompt per image; None stands for none.

    Args:
        name: of the argument, for errors.
        prompts: a text for all images, or one for each.
        n: number of images; None takes one per prompt, or one.

    Raises:
        InputError: one is no prompt, or their number is another one than ``n``.
    """
    if prompts is None or isinstance(prompts, str):
        return [None if prompts is None else check_prompt(prompts)] * (1 if n is None else n)
    try:
        several = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, bytes) else None
    except DvqError:
        raise
    except Exception:
        several = None
    if several is None:
        raise InputError(f"{name} is {short(prompts)}; it must be a text, or one per image")
    if not several or n not in (None, len(several)):
        raise InputError(f"there are {len(several)} {name} for {n or 'no'} images; give one text, or one per image")
    return [None if text is None else check_prompt(text) for text in several]
