"""Configuration files of training: JSON sections read strictly into dataclasses, with overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dvq_rt.files import parse_json, read_dataclass, read_json
from runtimes.errors import ConfigError, short

CONFIGS = Path(__file__).parent / "configs"


def read_config(path: str | Path, sections: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Configuration dataclasses from a JSON file of sections, with ``section.field=value`` overrides, of which
    ``section.field.key=value`` changes one key of a field that is an object.

    Args:
        path: a JSON file, or the name of one in ``training/configs`` without its suffix.
        sections: section name -> dataclass; fields left out keep their defaults. A section mapped to ``dict`` is
            passed on as it is.
        overrides: values are JSON, or plain strings.

    Raises:
        ConfigError: the file or an override is wrong; names the key.
    """
    file = Path(path) if Path(path).suffix == ".json" else CONFIGS / f"{path}.json"
    names = sorted(p.stem for p in CONFIGS.glob("*.json"))
    values = read_json(file, mend=f"give a JSON file or one of {names}")
    if not isinstance(values, dict) or not all(isinstance(section, dict) for section in values.values()):
        raise ConfigError(f"{file} must be one JSON object of sections, each an object of fields")
    if unknown := sorted(set(values) - set(sections)):
        raise ConfigError(f"{file}: unknown sections {short(unknown)}; there are {sorted(sections)}")
    for text in overrides:
        key, equals, value = text.partition("=")
        section, *within = key.split(".")
        if not equals or not within or section not in sections:
            raise ConfigError(f"override {short(text)} is not SECTION.FIELD=VALUE with a section of {sorted(sections)}")
        *outer, name = within
        place = values.setdefault(section, {})
        for field in outer:
            place = place.setdefault(field, {})
            if not isinstance(place, dict):
                raise ConfigError(f"override {short(text)}: {field} is {short(place)}, which has no keys; set it whole")
        try:
            place[name] = parse_json(value)
        except (ValueError, RecursionError):
            place[name] = value
    made = {}
    for name, cls in sections.items():
        fields, where = values.get(name, {}), f"{file}: section {name!r}"
        made[name] = fields if cls is dict else read_dataclass(cls, fields, where, defaults=True)
    return made
