"""Code, commands, names and numbers of the documents are what a newcomer copies: they must be the project's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvq_rt import Generator, SamplingParams
from dvq_rt.manifest import DEMOS, Manifest
from dvq_rt.step import PORTS

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
}
README = PAGES["README.md"]
FLOORS = ("runtimes", "dvq_rt", "training", "export")
SOURCES = [path for top in (*FLOORS, "tests") for path in sorted((ROOT / top).rglob("*.py"))]
MODULE = re.compile(
    r"python -m ((?:training|export|dvq_rt)[\w.]*(?: (?:sample|reconstruct|inspect|verify|bench|serve)\b)?)"
)


def commands(page: str) -> list[tuple[str, str]]:
    """(module, command line) of a page: of its shell blocks, and of code in its sentences and tables."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page, flags=re.S))]
    return [(module, line.strip()) for line in lines for module in MODULE.findall(line)]


COMMANDS = sorted({command for page in PAGES.values() for command in commands(page)})


@cache
def usage(module: str) -> str:
    """What a command says of itself."""
    run = [sys.executable, "-m", *module.split(), "--help"]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


def blocks(page: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.S)


def test_readme_is_short_and_has_the_two_commands() -> None:
    """Protects the first page: it stays a page, and the line that .ci/run takes from it is the first of its kind."""
    assert len(README.splitlines()) <= 160
    first = next(line for line in README.splitlines() if "python -m pytest" in line)
    assert first == "pip install torch==2.13.0 -e '.[cpu,train,export,dev]' && python -m pytest -n 2 --dist loadfile"
    assert "pip install '.[cpu]' && python -m dvq_rt sample --out samples.png" in README.splitlines()


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the six lines of Python at the top: they run as they stand, on the bundled demo, and write a picture."""
    (code,) = blocks("README.md")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "faces.png").stat().st_size > 1000


@pytest.mark.parametrize("demo", DEMOS)
def test_engine_runs_without_this_package(demo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the description of the format: its code, on numpy and ONNX Runtime, draws the generator's image."""
    (code,) = blocks("docs/engine-format.md")
    assert not re.search(r"import (dvq_rt|runtimes)|from (dvq_rt|runtimes)", code)
    shutil.copytree(DEMOS[demo], tmp_path / "my-engine")
    monkeypatch.chdir(tmp_path)
    names: dict[str, np.ndarray] = {}
    exec(compile(code, "docs/engine-format.md", "exec"), names)
    expected = Generator("my-engine").sample(1, labels=0, seed=1, params=SamplingParams()).to_numpy()
    assert np.array_equal(names["picture"], expected)


def test_engine_format_is_complete() -> None:
    """Protects the tables of the format: every key of the manifest, every tensor of the step with dtype and role."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## )", PAGES["docs/engine-format.md"], re.M | re.S))
    rows = {title: re.findall(r"^\| (`.+?) \| (.+) \|$", text, re.M) for title, text in sections.items()}
    keys = {key for first, _ in rows["Manifest"] for key in re.findall(r"`(\w+)`", first)}
    assert keys == {field.name for field in fields(Manifest)} | {"sha256"}
    for port in PORTS:
        (row,) = [rest.split(" | ") for first, rest in rows["Step"] if f"`{port.name}`" in first]
        assert [row[0], row[2]] == [port.dtype, port.role], port.name


@pytest.mark.parametrize(("module", "line"), COMMANDS, ids=[module for module, _ in COMMANDS])
def test_commands_exist_with_their_options(module: str, line: str) -> None:
    """Protects the commands: each module runs and knows every option and configuration that a page gives it."""
    arguments = line.split(module, 1)[1]
    for option in re.findall(r"--[\w-]+", arguments):
        assert option in usage(module), f"{module} has no {option}"
    for name in re.findall(r"config (\w+)(?!\S)", arguments):
        assert (ROOT / "training" / "configs" / f"{name}.json").is_file() or name.isupper()
    assert usage(module)


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    """Protects pictures, links and paths: every file that a page shows or names is in the repository."""
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGES[page])
    assert not [name for name in links if not ((ROOT / page).parent / name).exists()]
    tops = "|".join((*FLOORS, "tests", "docs", "examples"))
    paths = re.findall(rf"`((?:{tops})/[\w./]+)`", PAGES[page])
    assert not [name for name in paths if not (ROOT / name).exists()]


def test_architecture_names_every_module() -> None:
    """Protects the plan of the house: every module of the four floors has its place in the table, and no other."""
    named: dict[str, set[str]] = {floor: set() for floor in FLOORS}
    floor = ""
    for first, second in re.findall(r"^\| (`\w+`)? ?\| ([^|]+) \|", PAGES["docs/architecture.md"], re.M):
        floor = first.strip("`") or floor
        named[floor] |= {name.rstrip("/") for name in re.findall(r"`([\w/]+)`", second)}
    for floor, names in named.items():
        parts = {path.relative_to(ROOT / floor).parts[0] for path in (ROOT / floor).rglob("*.py")}
        assert names == {part.removesuffix(".py") for part in parts} - {"__init__"}, floor


def test_cited_mathematics_exists() -> None:
    """Protects citations: what the code cites of docs/spec is there, sections by number and oddities by name."""
    sections, oddities = (
        {family: set(re.findall(pattern, PAGES[f"docs/spec/{family}.md"], re.M)) for family in ("dq", "mq")}
        for pattern in (r"^##+ (\d+(?:\.\d+)?)\.? ", r"^\| (Q\d+) ")
    )
    count = 0
    for path in SOURCES:
        text = " ".join(path.read_text(encoding="utf-8").split())
        cited = re.findall(r"spec/([dm]q)\.md (?:sections? )?((?:\d[\d.]*(?:, | and | to )?)+)", text)
        for family, numbers in cited:
            wanted = {number.rstrip(".") for number in re.findall(r"\d[\d.]*", numbers)}
            assert wanted <= sections[family], f"{path} cites {wanted} of spec/{family}.md"
            count += len(wanted)
        about = {family for family in ("dq", "mq") if f"spec/{family}.md" in text or family.upper() in text} or {"dq"}
        for family, name in re.findall(r"(?:\b([DM]Q) spec )?\b(Q\d+)\b(?!_)", text):
            known = oddities[family.lower()] if family else set().union(*(oddities[one] for one in about))
            assert name in known, f"{path} cites {name} of {family or about}"
            count += 1
    assert count > 60  # nothing is checked if the citations are written in another way


def test_numbers_of_the_demos() -> None:
    """Protects the tables of the demos: their numbers are those that the commands of the page wrote."""
    page = PAGES["docs/demos.md"]
    judged = json.loads((ROOT / "docs/compared/compare.json").read_text(encoding="utf-8"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    first = next(i for i, cells in enumerate(table) if cells[0] == "label")
    models = [name.strip("`") for name in table[first][3:]]
    assert set(models) == set(judged["labels"]["samples"]) >= set(DEMOS)
    rows = {cells[0]: cells[1:] for cells in table[first + 2 : first + 9]}
    samples, images = judged["labels"]["samples"], judged["labels"]["held_out"]["labels"]
    made = {name: {label: row for label, row in samples[name]["labels"].items() if row["count"]} for name in models}
    labels = [label for label in images if any(label in made[demo] for demo in DEMOS)]
    assert list(rows) == [*labels, "all"]
    for label in labels:
        held, count = images[label], judged["labels"]["training_images"][label]
        assert rows[label][:2] == [str(count), f"{round(held['share'] * held['count'])} of {held['count']}"]
        shown = [f"{100 * made[name][label]['share']:.1f} %" if label in made[name] else "–" for name in models]
        assert rows[label][2:] == shown

    def over(results: dict[str, Any]) -> str:
        counted = [results[label] for label in labels if label in results]
        right = sum(result["share"] * result["count"] for result in counted)
        return f"{100 * right / sum(result['count'] for result in counted):.1f} %"

    shares = [over(images), *(over(made[name]) for name in models)]
    assert rows["all"][1:] == shares
    ours = [share for name, share in zip(models, shares[1:], strict=True) if name in DEMOS]
    assert f"| {', '.join(ours)} ({shares[0]}) |" in README
    for demo, folder in (("demo:dq", "docs"), ("demo:dq3", "docs/dq3"), ("demo:mq", "docs/mq")):
        values = json.loads((ROOT / folder / "evaluation.json").read_text(encoding="utf-8"))
        assert values["settings"]["model"] == demo
        quality = values["reconstruction"]
        assert f"PSNR {quality['psnr']:.2f} dB, SSIM {quality['ssim']:.3f}" in page
        assert f"{quality['psnr']:.2f} dB at {values['cost']['held_out']['bits_per_pixel']:.3f}" in README
