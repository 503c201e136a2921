"""What the training and export commands share: errors without tracebacks, configuration files, run folders."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dvq_rt.files import write_file
from runtimes.errors import ConfigError, DvqError

CONFIGS = Path(__file__).parent / "configs"


def guarded(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """Turn a DvqError, or what the disk refuses, into ``error: ...`` on stderr and exit status 2; Ctrl-C into 130."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except (DvqError, OSError, SafetensorError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run


def read_config(path: str | Path, sections: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Configuration dataclasses from a JSON file of sections, with ``section.field=value`` overrides.

    Args:
        path: a JSON file, or the name of one in ``training/configs`` without its suffix.
        sections: section name -> dataclass; fields left out keep their defaults. A section mapped to ``dict`` is
            passed on as it is.
        overrides: values are JSON, or plain strings.

    Raises:
        ConfigError: the file or an override is wrong; names the key.
    """
    file = Path(path) if Path(path).suffix == ".json" else CONFIGS / f"{path}.json"
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        names = sorted(p.stem for p in CONFIGS.glob("*.json"))
        raise ConfigError(f"{file} cannot be read: {error}; give a JSON file or one of {names}") from None
    if not isinstance(values, dict) or not all(isinstance(section, dict) for section in values.values()):
        raise ConfigError(f"{file} must be one JSON object of sections, each an object of fields")
    if unknown := sorted(set(values) - set(sections)):
        raise ConfigError(f"{file}: unknown sections {unknown}; there are {sorted(sections)}")
    for text in overrides:
        key, equals, value = text.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot or section not in sections:
            raise ConfigError(f"override {text!r} is not SECTION.FIELD=VALUE with a section of {sorted(sections)}")
        try:
            values.setdefault(section, {})[name] = json.loads(value)
        except ValueError:
            values[section][name] = value
    out: dict[str, Any] = {}
    for section, cls in sections.items():
        given = values.get(section, {})
        if cls is dict:
            out[section] = given
            continue
        out[section] = build(cls, given, f"{file}: section {section!r}")
    return out


def build(cls: Any, given: dict[str, Any], where: str) -> Any:
    """A configuration dataclass from some of its fields, whose values are checked against the declared plain types.

    Raises:
        ConfigError: a field is unknown, or a value of the wrong type or out of range.
    """
    known = {f.name: str(f.type) for f in fields(cls)}
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"{where}: unknown fields {unknown}; there are {sorted(known)}")
    kinds: dict[str, Any] = {"int": int, "float": int | float, "bool": bool, "str": str, "dict": dict, "tuple": list}
    for name, value in given.items():
        kind = known[name].partition("[")[0]
        good = isinstance(value, kinds[kind]) or (kind == "tuple" and isinstance(value, tuple))
        if not good or (isinstance(value, bool) and kind != "bool"):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be of type {known[name]}")
    try:
        return cls(**given)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


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
            before = json.loads(file.read_text())
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
