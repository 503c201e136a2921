"""examples/deploy: what a container or a service is told exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "deploy"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_dockerfiles(name: str) -> None:
    """Protects builds, which no test runs: every file that is copied is there, and all that the wheel is made of is
    copied."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.M) for word in line.split()}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "dvq_rt", "runtimes", "training", "export"}
    assert all((ROOT / word).exists() for word in copied)
    assert "\nUSER dvq\n" in text


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_unit(tmp_path: Path) -> None:
    """Protects the unit: systemd knows every directive and value in it."""
    text = (FOLDER / "dvq-rt.service").read_text(encoding="utf-8")
    unit = tmp_path / "dvq-rt.service"
    unit.write_text(text.replace("/opt/dvq-rt/bin/dvq-rt", "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
