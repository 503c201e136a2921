"""What an installation brings: dependencies, typed packages, and which package may import which."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from runtimes.onnxruntime import FLOOR

ROOT = Path(__file__).parents[1]
PACKAGES = ("dvq_rt", "runtimes", "export", "training")
UNIX = ("fcntl", "grp", "posix", "pwd", "resource", "termios")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", requirement)[0] for requirement in requirements}


def test_dependencies() -> None:
    """A plain installation stays small; each extra brings what its part needs and no more, and never both builds of
    ONNX Runtime."""
    assert names(PROJECT["project"]["dependencies"]) == {"numpy", "pillow", "tqdm"}
    extras = {name: names(given) for name, given in PROJECT["project"]["optional-dependencies"].items()}
    assert extras["cpu"] == {"onnxruntime"} and extras["gpu"] == {"onnxruntime-gpu"}
    least = ".".join(map(str, FLOOR))
    assert PROJECT["project"]["optional-dependencies"]["cpu"] == [f"onnxruntime>={least}"]
    assert PROJECT["project"]["optional-dependencies"]["gpu"] == [f"onnxruntime-gpu[cuda,cudnn]>={least}"]
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
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            given = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            given += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path.name}: {name}" for name in given if name.split(".")[0] in forbidden]
    assert not wrong


def start(folder: Path, place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder, with our packages from a place that comes after what the folder holds."""
    environment = {**os.environ, "PYTHONPATH": str(place)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def stranger(folder: Path, name: str, kind: str) -> Path:
    """A package, module or bare folder of a name; were its code to run it would be seen."""
    path = folder.resolve() / (f"{name}.py" if kind == "module" else name)
    if kind != "module":
        path.mkdir()
    if kind != "folder":
        (path / "__init__.py" if kind == "package" else path).write_text("print('it ran')", encoding="utf-8")
    return path


HIDDEN = (
    "the package {name} of dvq-rt, in {home}, is hidden by {path}: rename that, or start Python from another folder"
)


@pytest.mark.parametrize("kind", ["package", "module"])
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("dvq_rt", "runtimes"),
        ("training.presets", "runtimes"),
        ("export.to_onnx", "runtimes"),
        ("export.to_onnx", "training"),
    ],
)
def test_commands_name_a_stranger(command: str, name: str, kind: str, tmp_path: Path) -> None:
    """``python -m`` puts the working directory first; what hides a package of ours there is named in one line, and its
    code does not run."""
    path = stranger(tmp_path, name, kind)
    done = start(tmp_path, ROOT, "-m", command, "--help")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {HIDDEN.format(name=name, home=ROOT, path=path)}\n"


@pytest.mark.parametrize("code", ["import dvq_rt", "import runtimes, dvq_rt"])
def test_importing_names_a_stranger(code: str, tmp_path: Path) -> None:
    """In a program it is an ImportError with the path, also if the stranger was imported before."""
    path = stranger(tmp_path, "runtimes", "package")
    done = start(tmp_path, ROOT, "-c", code)
    assert done.returncode == 1 and ("it ran" in done.stdout) == ("runtimes," in code)
    assert done.stderr.splitlines()[-1] == f"ImportError: {HIDDEN.format(name='runtimes', home=ROOT, path=path)}"


def test_folders_that_hide_nothing(tmp_path: Path) -> None:
    """Folders of the names that are no packages, such as one of training images, do no harm."""
    for name in ("runtimes", "training", "export"):
        stranger(tmp_path, name, "folder")
    done = start(tmp_path, ROOT, "-m", "dvq_rt", "inspect")
    assert (done.returncode, done.stderr) == (0, "")


EDITABLE = """
import importlib.util, os, sys

class Finder:  # as an editable installation has one, which is asked last
    def find_spec(name, path=None, target=None):
        file = os.path.join(sys.argv[1], name, "__init__.py")
        if os.path.exists(file):
            return importlib.util.spec_from_file_location(name, file)

sys.meta_path.append(Finder)
import dvq_rt
"""


def test_a_folder_before_an_editable_installation(tmp_path: Path) -> None:
    """Where a bare folder does hide our package, which its missing contents would be blamed for, it is named too."""
    path = stranger(tmp_path, "runtimes", "folder")
    done = start(tmp_path, tmp_path, "-S", "-c", EDITABLE, str(ROOT))
    assert done.stderr.splitlines()[-1] == f"ImportError: {HIDDEN.format(name='runtimes', home=ROOT, path=path)}"


def test_archives(tmp_path: Path) -> None:
    """The packages are also ours inside an archive, and a stranger is named there."""
    archive = tmp_path.resolve() / "app.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in [p for name in ("dvq_rt", "runtimes") for p in (ROOT / name).rglob("*.py")]:
            file.write(path, path.relative_to(ROOT))
    (tmp_path / "elsewhere").mkdir()
    code = "import dvq_rt, runtimes; print(dvq_rt.__file__, runtimes.__file__, sep='\\n')"
    done = start(tmp_path / "elsewhere", archive, "-c", code)
    assert done.stdout.split() == [str(archive / name / "__init__.py") for name in ("dvq_rt", "runtimes")], done.stderr
    path = stranger(tmp_path / "elsewhere", "runtimes", "package")
    done = start(tmp_path / "elsewhere", archive, "-c", code)
    assert done.stderr.splitlines()[-1] == f"ImportError: {HIDDEN.format(name='runtimes', home=archive, path=path)}"


def opens_text(call: ast.Call) -> bool:
    """Whether a call is ``open(path)``, ``path.open()`` with a mode of text or none, or reads or writes a text."""
    if ast.unparse(call.func) == "tarfile.open":
        return False
    if isinstance(call.func, ast.Name):
        rest = call.args[1:] if call.func.id == "open" else None
    else:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        rest = [] if name in ("read_text", "write_text") else call.args if name == "open" else None
    return rest is not None and all(isinstance(mode, ast.Constant) and "b" not in str(mode.value) for mode in rest[:1])


@pytest.mark.parametrize("package", PACKAGES)
def test_other_systems(package: str) -> None:
    """No module needs a module that only Unix has, and no text file is read or written in the system's own encoding."""
    wrong = []
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Import):
                wrong += [f"{path.name}: {alias.name}" for alias in node.names if alias.name in UNIX]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and opens_text(node)):
            if "encoding" not in [keyword.arg for keyword in call.keywords]:
                wrong.append(f"{path.name}: {ast.unparse(call)}")
    assert not wrong


def test_a_run_from_an_archive(tmp_path: Path) -> None:
    """From a zip of the packages an engine in a folder runs, and the bundled one says that it cannot be reached."""
    with zipfile.ZipFile(tmp_path / "packages.zip", "w") as archive:
        for package in ("dvq_rt", "runtimes"):
            for path in (ROOT / package).rglob("*"):
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, path.relative_to(ROOT))
    shutil.copytree(ROOT / "dvq_rt" / "demo", tmp_path / "engine")
    code = "import dvq_rt; print(dvq_rt.__file__); print(dvq_rt.Generator('engine').sample(1)); dvq_rt.Generator()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "packages.zip")},
        capture_output=True,
        text=True,
    )
    assert "packages.zip" in done.stdout and "Samples(1 images" in done.stdout
    assert "demo lies inside an archive; engines are read from folders: unpack it" in done.stderr
