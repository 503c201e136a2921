"""What the command line says of an engine and of checks: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvq_rt.manifest import Manifest


def plain(values: Any) -> str:
    """Indented JSON; numbers that JSON lacks (NaN, infinities) become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(values), indent=1, ensure_ascii=False, allow_nan=False)


def describe(manifest: Manifest, folder: Path) -> str:
    """A readable summary of an engine."""
    layout = manifest.layout
    sides = ", ".join(f"{side} x {side}" for side in layout.sides)
    labels = f"{layout.classes}" if layout.classes else "none"
    if layout.classes:
        labels += " and a null label (guidance works)" if layout.null_label else ", no null label (no guidance)"
    prompts = "none"
    if manifest.prompt:
        empty = "the empty one stands for anything (guidance works)" if manifest.empty_prompt else "never empty"
        prompts = f"at most {manifest.prompt} tokens of {manifest.conditioning['tokenizer']}; {empty}"
    most = "at most " if layout.covering else ""
    kind = f"{manifest.precision}, weights {manifest.weights}"
    rows = [
        ("engine", str(folder)),
        ("family", f"{manifest.family}, schema {manifest.schema}"),
        ("runs on", f"{manifest.backend} for {manifest.target}, {kind}, {manifest.slots} slots"),
        ("image", f"{manifest.image_size} x {manifest.image_size} pixels"),
        ("codes", f"{layout.codebook_size} codes; grids {sides}; {layout.order}; {most}{layout.filled_cells} an image"),
        ("labels", labels),
        ("prompts", prompts),
    ]
    sections = [table(rows)]
    if manifest.class_names:
        sections.append("\n".join(["label names", *(f"  {i:3d} {n}" for i, n in enumerate(manifest.class_names))]))
    files = {name: f"{entry['bytes']:,} bytes" for name, entry in manifest.files.items()}
    parts: list[tuple[str, dict[str, Any]]] = [
        ("recommended sampling", manifest.defaults),
        ("tokenizer", manifest.tokenizer),
        ("parameters", {name: f"{count:,}" for name, count in manifest.parameters.items()}),
        ("errors measured at export", {name: f"{value:.3g}" for name, value in manifest.tolerances.items()}),
        ("made with", manifest.tools),
        ("files (sizes and SHA-256 checked)", files),
    ]
    for title, values in parts:
        if values:
            sections.append(f"{title}\n{table([(f'  {name}', str(value)) for name, value in values.items()])}")
    return "\n\n".join(sections)


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)
