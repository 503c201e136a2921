"""The house: imports go down its floors, never in a circle, and nobody reaches into another module's privates."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("runtimes", "dvq_rt", "training", "export")
"""From the ground up."""
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for floor in FLOORS
    for path in sorted((ROOT / floor).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(name: str) -> Iterator[tuple[str, list[str]]]:
    """Every import of our own modules anywhere in a module, also inside functions: (module, names taken from it)."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, []) if whole in FILES else (node.module, [alias.name])


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str) -> None:
    """No module imports from a floor above its own; the runtime knows no PyTorch."""
    floor = FLOORS.index(name.split(".")[0])
    for module, _ in imports(name):
        top = module.split(".")[0]
        assert top not in FLOORS[floor + 1 :], f"{name} imports {module}"
        assert floor > 1 or top not in ("torch", "onnx", "safetensors"), f"{name} imports {module}"


def test_no_circles() -> None:
    """No module imports itself by way of others, not even inside a function."""
    below = {name: {module for module, _ in imports(name) if module in FILES} for name in FILES}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "a circle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for module in sorted(below[name]):
                visit(module, (*path, name))
            finished.add(name)

    for name in FILES:
        visit(name, ())


def private(word: str) -> bool:
    return word.startswith("_") and not word.endswith("__")


PUBLIC_ALL_THE_SAME = {"_asdict", "_fields", "_replace", "_forward_hooks", "_reset_state", "_dynamo"}
"""Names that libraries underscore though users need them."""
TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path.name != Path(__file__).name]


@pytest.mark.parametrize("path", [*FILES.values(), *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_privates_stay_private(path: Path) -> None:
    """No underscored name is imported from our modules, and none is read of an object unless the same file makes it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FLOORS:
            names = [alias.name for alias in node.names if private(alias.name)]
            assert not names, f"line {node.lineno}: {names} of {node.module}"
        if isinstance(node, ast.Attribute) and private(node.attr):
            allowed = node.attr in own | PUBLIC_ALL_THE_SAME
            assert allowed, f"line {node.lineno}: {ast.unparse(node.value)}.{node.attr}"
