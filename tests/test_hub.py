"""The hub: an engine goes up with its card, comes down whole or not at all, and opens without a network afterwards.

The hub's own library runs here, in processes of its own, against a stand-in for the hub on this machine.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dvq_rt.hub import fetch
from dvq_rt.manifest import DEMOS, read_engine
from dvq_rt.publish import model_card
from runtimes.errors import EngineError, InputError

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "somebody/emoji"
DEMO = DEMOS["demo:mq"]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as one commit and its download take; ``files`` is the repository."""

    files: dict[str, bytes]

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body, here = self.rfile.read(int(self.headers["Content-Length"])), f"http://{self.headers['Host']}/{NAME}"
        answer: dict[str, object] = {"errors": [], "warnings": []}  # to whoever asks whether the card is well formed
        if self.path == "/api/repos/create":
            answer = {"url": here}
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{here}/commit/{COMMIT}"}
        self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/{NAME}/resolve/") and path.split("/")[-1] in self.files:
            data = self.files[path.split("/")[-1]]
            self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            answer = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        else:
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def hub() -> Iterator[ThreadingHTTPServer]:
    pytest.importorskip("huggingface_hub")
    with ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"files": {}})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the hub's library keeps its cache."""
    return tmp_path_factory.mktemp("hub")


def run(home: Path, port: int, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A command of ours, whose hub is on this machine."""
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_TOKEN": "hf_" + "x" * 34}
    environment = {**os.environ, **own, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    command = [sys.executable, "-m", "dvq_rt", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_up_and_down(hub: ThreadingHTTPServer, home: Path) -> None:
    """Protects the way through the hub: all files of the engine and its card go up, and the name that is printed opens
    the same engine elsewhere, from the cache that the hub's library lays out."""
    port = hub.server_address[1]
    pushed = run(home, port, "push", "demo:mq", NAME, "--license", "mit")
    assert (pushed.returncode, pushed.stdout) == (0, f"hf:{NAME}@{COMMIT}\n"), pushed.stderr
    files = hub.RequestHandlerClass.files  # type: ignore[attr-defined]
    assert {name: data for name, data in files.items() if name != "README.md"} == {
        path.name: path.read_bytes() for path in DEMO.iterdir()
    }
    assert files["README.md"].decode() == model_card(read_engine(DEMO), NAME, "mit")
    shown = run(home, port, "inspect", f"hf:{NAME}", "--json")
    assert shown.returncode == 0, shown.stderr
    folder = Path(json.loads(shown.stdout)["path"])
    assert home in folder.parents and folder.name == COMMIT
    assert (folder / "step.onnx").is_symlink() and read_engine(folder) == read_engine(DEMO)


def test_without_a_network(hub: ThreadingHTTPServer, home: Path, tmp_path: Path) -> None:
    """Protects machines that are offline: what was fetched opens by branch and by commit, and draws; what was not is
    told in one line."""
    offline = {"HF_HUB_OFFLINE": "1"}
    shown = run(home, 9, "inspect", f"hf:{NAME}", **offline)
    assert shown.returncode == 0 and shown.stdout.startswith("engine   "), shown.stderr
    picture = tmp_path / "a.png"
    drawn = run(home, 9, "sample", "--engine", f"hf:{NAME}@{COMMIT}", "--n", "1", "--out", str(picture), **offline)
    assert drawn.returncode == 0 and picture.is_file(), drawn.stderr
    other = run(home, 9, "inspect", f"hf:{NAME}@v2", **offline)
    assert other.returncode == 2 and other.stderr.startswith(f"error: engine hf:{NAME}@v2 cannot be fetched: ")


def test_altered_files_are_refused(hub: ThreadingHTTPServer, home: Path) -> None:
    """Protects from a cache or a hub that gives other bytes than the manifest lists."""
    (graph,) = (home / "hub").rglob("snapshots/*/step.onnx")
    whole = graph.read_bytes()
    graph.resolve().write_bytes(whole[:-1] + b"\0")
    shown = run(home, 9, "inspect", f"hf:{NAME}", HF_HUB_OFFLINE="1")
    assert shown.returncode == 2 and "step.onnx is corrupted (its SHA-256 is not the manifest's)" in shown.stderr
    graph.resolve().write_bytes(whole)


@pytest.mark.parametrize("name", ["hf:", "hf:emoji", "hf:a/b/c", "hf:a/b@", "hf:../b", "hf:a/b@-x", "hf:a b/c"])
def test_malformed_names(name: str) -> None:
    """Protects from a name that reaches the network or the disk as something else."""
    with pytest.raises(EngineError, match="write hf:owner/name or hf:owner/name@revision"):
        fetch(name)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a plain installation: the error says which extra brings the hub."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EngineError, match=r"pip install 'dvq-rt\[cpu,hub\]'"):
        fetch("hf:a/b")


def test_card() -> None:
    """Protects the card: its numbers are the manifest's, and it says by which licence and commands one uses it."""
    manifest = read_engine(DEMO)
    card = model_card(manifest, NAME, "mit")
    assert card.startswith("---\nlicense: mit\nlibrary_name: dvq-rt\n")
    assert f"dvq-rt sample --engine hf:{NAME} " in card and f'Generator("hf:{NAME}")' in card
    for name, count in manifest.parameters.items():
        assert f"| parameters of the {name} | {count:,} |" in card
    for name, value in manifest.tolerances.items():
        assert f"| {name} | {value:.3g} |" in card
    for name, entry in manifest.files.items():
        assert f"| {name} | {entry['bytes']:,} | `{entry['sha256']}` |" in card
    for name, licence in (("emoji", "mit"), (NAME, "My own\nlicence")):
        with pytest.raises(InputError):
            model_card(manifest, name, licence)
