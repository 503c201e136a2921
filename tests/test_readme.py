"""The README's code and commands are what a newcomer copies: they must be the package's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    {
        (module, line.strip())
        for block in re.findall(r"```sh\n(.*?)```", README, re.S)
        for line in block.splitlines()
        for module in re.findall(r"python -m ((?:training|export|dvq_rt)[\w.]*(?: (?:sample|verify))?)", line)
    }
)


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the six lines of Python at the top: they run as they stand, on the bundled demo, and write a picture."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "faces.png").stat().st_size > 1000


@pytest.mark.parametrize(("module", "line"), COMMANDS, ids=[module for module, _ in COMMANDS])
def test_commands_exist_with_their_options(module: str, line: str) -> None:
    """Protects the commands: each module runs and knows every option that the README gives it."""
    done = subprocess.run([sys.executable, "-m", *module.split(), "--help"], capture_output=True, text=True, check=True)
    for option in re.findall(r"--[\w-]+", line.split(module)[1]):
        assert option in done.stdout, f"{module} has no {option}"


def test_files_exist() -> None:
    """Protects pictures and paths: every file that the README shows or names is in the repository."""
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"`((?:tests|training|export|dvq_rt)/[\w./]+)`", README
    )
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
