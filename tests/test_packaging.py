"""What an installation brings: dependencies, typed packages, and which package may import which."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dvq_rt", "runtimes", "export", "training")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", requirement)[0] for requirement in requirements}


def test_dependencies() -> None:
    """A plain installation stays small; each extra brings what its part needs and no more, and never both builds of
    ONNX Runtime."""
    assert names(PROJECT["project"]["dependencies"]) == {"numpy", "pillow", "tqdm"}
    extras = {name: names(given) for name, given in PROJECT["project"]["optional-dependencies"].items()}
    assert extras["cpu"] == {"onnxruntime"} and extras["gpu"] == {"onnxruntime-gpu"}
    assert {"torch", "safetensors"} <= extras["train"] and {"torch", "onnx", "onnxscript", "safetensors"} <= extras[
        "export"
    ]
    assert {"pytest", "ruff", "mypy"} <= extras["dev"]
    assert not {"onnxruntime", "onnxruntime-gpu"} & (extras["train"] | extras["export"] | extras["dev"])
    for extra in ("train", "export"):
        assert "torch>=2.13,<2.14" in PROJECT["project"]["optional-dependencies"][extra]


def test_every_package_and_data_file_is_listed() -> None:
    """The wheel has every folder of modules, the marker of types in each package, and the files they read."""
    found = {
        p.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for name in PACKAGES
        for p in (ROOT / name).rglob("*.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found
    assert all((ROOT / name / "py.typed").is_file() for name in PACKAGES)
    data = PROJECT["tool"]["setuptools"]["package-data"]
    assert data["*"] == ["py.typed"] and "demo/*" in data["dvq_rt"]
    listed = {p for name in PACKAGES for pattern in data.get(name, []) for p in (ROOT / name).glob(pattern)}
    read = {p for p in (ROOT / "training").rglob("*") if p.suffix in (".json", ".tsv", ".LICENSE")}
    read = {p for p in read if "demo" not in p.parts}  # the demos' checkpoints stay in the repository
    assert read <= listed and len(read) > 2


def test_command_is_installed() -> None:
    """The ``dvq-rt`` script points at a function that exists."""
    module, function = PROJECT["project"]["scripts"]["dvq-rt"].split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("runtimes", {"dvq_rt", "training", "export", "torch", "onnx", "safetensors"}),
        ("dvq_rt", {"training", "export", "torch", "onnx", "onnxscript", "safetensors", "onnxruntime"}),
        ("training", {"export"}),
    ],
)
def test_imports_only_go_down(package: str, forbidden: set[str]) -> None:
    """No file, not even inside a function, imports from a floor above its own, nor the runtime anything heavy."""
    wrong = []
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            given = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            given += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.name}: {name}" for name in given if name.split(".")[0] in forbidden]
    assert not wrong
