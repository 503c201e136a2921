"""Engines on the Hugging Face Hub, by names such as ``hf:owner/name@revision``.

A repository holds an engine folder as it is. The hub's own library keeps what was fetched in its cache and serves it
without a network (``HF_HUB_OFFLINE=1``). What was fetched is compared with the manifest's hashes like any engine; that
shows that it is intact, not whose it is, so name a revision that you trust by its commit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runtimes.errors import DvqError, EngineError, InputError, guard, short

PREFIX = "hf:"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,254}", re.ASCII)


def fetch(name: str) -> Path:
    """The folder in the local cache of an engine ``hf:owner/name`` or ``hf:owner/name@revision``, after fetching what
    is missing of it. The revision is a commit, a tag or a branch; ``main`` if left out.

    Raises:
        EngineError: the name is malformed, the library is not installed, or the engine is neither in the cache nor to
            be had.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not REPOSITORY.fullmatch(repository) or not ("@" not in name or REVISION.fullmatch(revision)):
        raise EngineError(f"the engine is {short(name)}; write hf:owner/name or hf:owner/name@revision")
    library = load_library(EngineError)
    mend = "check name, revision and network, or log in with `hf auth login` if it is private"
    with guard(EngineError, f"engine {name} cannot be fetched", mend):
        return Path(library.snapshot_download(repository, revision=revision or None))


def load_library(error: type[DvqError] = InputError) -> Any:
    """The module ``huggingface_hub``.

    Raises:
        error: it is not installed.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError as missing:
        raise error("the hub needs the package huggingface_hub; pip install 'dvq-rt[cpu,hub]'") from missing
    return huggingface_hub
