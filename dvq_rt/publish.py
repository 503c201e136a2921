"""Push an engine to the Hugging Face Hub, with a model card that is written from its manifest."""

from __future__ import annotations

import re

from dvq_rt.files import FileName
from dvq_rt.hub import PREFIX, REPOSITORY, load_library
from dvq_rt.manifest import MANIFEST, Manifest, engine_folder, read_engine
from runtimes.errors import InputError, guard, short

LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
PAPERS = {
    "dq": "DQ-VAE and DQ-Transformer (arXiv 2305.11718)",
    "mq": "MQ-VAE and Stackformer (arXiv 2305.13607)",
}


def push(engine: FileName | None, repository: str, licence: str, *, private: bool = False) -> str:
    """Upload an engine, its hashes checked, and its model card, in one commit. Whoever uploads is told by the token of
    ``hf auth login`` or ``HF_TOKEN``.

    Args:
        engine: folder, or the name of a demo.
        repository: ``owner/name``; made if it is not there.
        licence: as the hub writes it, such as ``mit``.
        private: whether a repository that is made is private.

    Returns:
        the name by which exactly this engine is opened, ``hf:owner/name@commit``.

    Raises:
        EngineError: the engine is missing, incomplete or altered.
        InputError: a name is malformed, the library is not installed, or the hub refuses.
    """
    folder = engine_folder(engine)
    manifest = read_engine(folder)
    card = model_card(manifest, repository, licence)
    library = load_library()
    add = library.CommitOperationAdd
    operations = [add(name, str(folder / name)) for name in (*manifest.files, MANIFEST)]
    operations.append(add("README.md", card.encode()))
    mend = "log in with `hf auth login`, and push to an owner whose repositories you may write"
    with guard(InputError, f"{repository} cannot be pushed", mend):
        api = library.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Engine of dvq-rt")
    return f"{PREFIX}{repository}@{commit.oid}"


def model_card(manifest: Manifest, repository: str, licence: str) -> str:
    """The card of an engine: what it is, how to use it, and what its export measured, in Markdown with the hub's
    header.

    Raises:
        InputError: the repository or the licence is malformed.
    """
    if not REPOSITORY.fullmatch(repository):
        raise InputError(f"the repository is {short(repository)}; write owner/name")
    if not LICENCE.fullmatch(licence):
        raise InputError(f"--license is {short(licence)}; write it as the hub does, such as mit or apache-2.0")
    layout, name = manifest.layout, f"{PREFIX}{repository}"
    sides = " and ".join(f"{side} x {side}" for side in layout.sides)
    task = "text-to-image" if manifest.prompt else "unconditional-image-generation"
    extras, words, prompts = "cpu,hub", "", ""
    if manifest.prompt:
        extras, words, prompts = "cpu,hub,text", ' --prompt "..."', ', prompts="..."'
    number = f"{'at most ' if layout.covering else ''}{layout.filled_cells} codes an image"
    facts = {
        "family": PAPERS[manifest.family],
        "image": f"{manifest.image_size} x {manifest.image_size} pixels",
        "codes": f"a codebook of {layout.codebook_size}; grids {sides}; {number}",
        "labels": ", ".join(manifest.class_names).replace("|", "\\|") or str(layout.classes or "none"),
        "prompts": f"at most {manifest.prompt} tokens" if manifest.prompt else "none",
        "guidance": "yes" if manifest.guidable else "no: there is nothing to compare with",
        "runs on": f"{manifest.backend} for {manifest.target}, {manifest.precision}, weights {manifest.weights}",
        **{f"parameters of the {part}": f"{count:,}" for part, count in manifest.parameters.items()},
        **{f"recommended {key}": value for key, value in manifest.defaults.items()},
        "made with": ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items()),
        "licence": licence,
    }
    errors = {key: f"{value:.3g}" for key, value in manifest.tolerances.items()}
    files = {key: f"{entry['bytes']:,} | `{entry['sha256']}`" for key, entry in manifest.files.items()}
    return f"""---
license: {licence}
library_name: dvq-rt
pipeline_tag: {task}
tags: [dvq-rt, {manifest.family}, image-generation, onnx]
---

# {repository.split("/")[1]}

An engine of dvq-rt: it draws images without PyTorch. This card was written from its manifest.

```sh
pip install 'dvq-rt[{extras}]'
dvq-rt sample --engine {name}{words} --out samples.png
dvq-rt verify {name}
```

```python
import dvq_rt

generator = dvq_rt.Generator("{name}")  # add @ and a commit to get the same engine for ever
generator.sample(n=4, seed=1{prompts}).grid().save("samples.png")
```

| | |
|---|---|
{_rows(facts)}

## Measured at its export, against PyTorch

| | error |
|---|---|
{_rows(errors)}

`dvq-rt verify` measures on your machine.

## Files

| | bytes | SHA-256 |
|---|---|---|
{_rows(files)}
"""


def _rows(values: dict[str, str]) -> str:
    return "\n".join(f"| {key} | {value} |" for key, value in values.items())
