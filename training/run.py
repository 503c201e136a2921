"""The folder of a training run: its settings and its log."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from dvq_rt.files import write_file
from runtimes.errors import ConfigError


def open_run(
    run: str | Path, resume: bool, settings: dict[str, Any], inputs: dict[str, tuple[str | Path, str]]
) -> tuple[Path, bool]:
    """Create a run folder with its settings, or check that a resumed one has the same.

    Args:
        run: the folder.
        resume: go on from its checkpoint; a run that was killed before it had one starts again.
        settings: of the run, as JSON values.
        inputs: what it reads, such as its images: name -> (path, digest of the content).

    Returns:
        the folder, and whether it holds a checkpoint to go on from.

    Raises:
        ConfigError: the folder holds another run.
    """
    folder = Path(run)
    file = folder / "settings.json"
    settings = {**settings, "inputs": {name: digest for name, (_, digest) in inputs.items()}}
    begun = any((folder / name).exists() for name in ("checkpoint", "checkpoint.old"))
    if begun and not resume:
        raise ConfigError(f"{folder} already holds a run; add --resume to go on with it, or choose another --out")
    if resume and (begun or file.exists()):
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            read = dict(before["inputs"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{file} is missing or damaged, so the run cannot go on; choose another --out") from None
        for name, (path, digest) in inputs.items():
            if read.get(name) != digest:
                raise ConfigError(
                    f"{folder} was not started with the {name} that {path} holds now; resume with the same"
                )
        if before != json.loads(json.dumps(settings)):
            raise ConfigError(f"{folder} was started with other settings ({file}); resume with the same ones")
    if not begun:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.jsonl").unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write the run folder {folder}: {error.strerror}; choose another --out") from None
        write_file(file, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())
    return folder, begun


def cut_log(run: Path, step: int) -> None:
    """Drop the log's rows beyond a step, which a resumed run writes again, and a row that a crash left half."""
    path = run / "log.jsonl"
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            kept += [line] if json.loads(line)["step"] <= step else []
    write_file(path, "".join(f"{line}\n" for line in kept).encode())


def log(run: Path, row: dict[str, Any]) -> None:
    with (run / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
