"""Configuration files of training: JSON sections read strictly into dataclasses, with overrides."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from runtimes.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"


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
        values = json.loads(file.read_text(encoding="utf-8"))
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
        allowed = [alternative.partition("[")[0] for alternative in known[name].split(" | ")]
        good = any(isinstance(value, kinds[kind]) or (kind == "tuple" and isinstance(value, tuple)) for kind in allowed)
        if not good or (isinstance(value, bool) and "bool" not in allowed):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be of type {known[name]}")
    try:
        return cls(**given)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
