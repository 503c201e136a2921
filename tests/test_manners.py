"""How the command line behaves among other programs: JSON, quiet and verbose, pipes that close, completion."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dvq_rt.__main__ import main
from dvq_rt.describe import plain
from dvq_rt.manifest import DEMOS

ROOT = Path(__file__).parents[1]


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects programs that read an engine's facts: the JSON is the manifest, with the folder's path."""
    assert main(["inspect", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    manifest = json.loads((DEMOS["demo:dq"] / "manifest.json").read_text(encoding="utf-8"))
    assert values.pop("path") == str(DEMOS["demo:dq"])
    del manifest["sha256"]
    assert values == {"conditioning": {}, **manifest}


def test_verify_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the checks of a deployment script: names, numbers, bounds, verdicts, and the list of what failed."""
    assert main(["verify", "demo:mq", "--json", "--threads", "1"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["failed"] == [] and len(values["checks"]) > 3
    assert all(set(c) == {"name", "measured", "bound", "ok"} and c["ok"] is True for c in values["checks"])


def test_json_has_no_nan() -> None:
    """Protects readers in other languages: what JSON cannot say is null."""
    assert json.loads(plain({"a": float("nan"), "b": [float("inf"), 1.5, ("x",)]})) == {
        "a": None,
        "b": [None, 1.5, ["x"]],
    }


def test_verbose_and_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects logs: nothing but the result by default and with -q, what is done with -v, and on standard error."""
    run = ["sample", "--n", "1", "--out", str(tmp_path / "a.png"), "--threads", "1"]
    for options, lines in (([], 0), (["-q"], 0), (["-v"], 3)):
        assert main([*run, *options]) == 0
        told = capsys.readouterr()
        assert told.out == f"{tmp_path / 'a.png'}\n"
        assert len(told.err.splitlines()) == lines
    assert "INFO: loaded step.onnx in " in told.err


def test_readers_who_leave() -> None:
    """Protects pipes such as ``dvq-rt inspect | head``: a closed one is no traceback."""
    command = [sys.executable, "-m", "dvq_rt", "inspect"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects completion as bash runs it: commands, the options of one, and else nothing, for which bash takes names
    of files."""
    assert main(["completion"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out, encoding="utf-8")

    def complete(*words: str) -> list[str]:
        line = f"source '{script}'; COMP_WORDS=(dvq-rt {' '.join(words)}); COMP_CWORD={len(words)}; _dvq_rt"
        done = subprocess.run(["bash", "-c", f'{line}; echo "${{COMPREPLY[@]}}"'], capture_output=True, text=True)
        assert not done.stderr
        return done.stdout.split()

    assert complete("ver") == ["verify"] and complete("train-t") == ["train-tokenizer", "train-transformer"]
    assert complete("inspect", "--j") == ["--json"] and complete("sample", "--top-p") == ["--top-p", "--top-p-position"]
    assert complete("inspect", "dem") == []
    assert "complete -o bashdefault -o default -F _dvq_rt dvq-rt" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["dvq_rt", "runtimes"])
def test_the_library_prints_nothing(package: str) -> None:
    """Protects programs that use the library: only commands print, everything else logs. A progress bar
    writes its lines to standard error."""
    speaking = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    commands = {f"dvq_rt/{name}.py" for name in ("__main__", "serve/load", "serve/abuse")}
    assert speaking <= commands | {"dvq_rt/progress.py"}
