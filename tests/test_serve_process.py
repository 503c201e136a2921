"""The server as a process: it takes its port, finishes what it has when it is told to end, and shares a port."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of Unix")
@pytest.mark.parametrize("workers", [1, 2])
def test_ending(workers: int, tmp_path: Path) -> None:
    """SIGTERM in the middle of a request: it is answered, the process ends with status 0 and refuses what comes later;
    the log is lines of JSON without a word of failure."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "dvq_rt", "serve", "demo:mq", "--port", "0", "--threads", "1", "--timeout", "300"]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--workers", str(workers)], stderr=file)
    answers: list[Any] = []
    try:
        url = wait(lambda: next((w for w in log.read_text("utf-8").split() if w.startswith("http://")), "")).rstrip(
            '"}'
        )
        wait(lambda: works(url))
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
        assert 'dvq_slots{model="demo:mq"}' in metrics
        thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/images/generations", **DRAW)))
        thread.start()
        wait(lambda: busy(httpx.get(f"{url}/metrics", timeout=60).text))
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
        thread.join()
    finally:
        process.kill()
    assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 4
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert not [line for line in lines if line["level"] in ("error", "critical") or "exception" in line]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


DRAW = {"json": {"n": 4, "guidance": 2.0}, "timeout": 300}


def wait(value: Any) -> Any:
    end = time.monotonic() + 120
    while not (found := value()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def works(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/readyz", timeout=60).status_code == 200)
    except httpx.TransportError:
        return False


def busy(text: str) -> bool:
    rows = [row for row in text.splitlines() if row.startswith("dvq_images_held")]
    return any(float(row.rsplit(" ", 1)[1]) > 0 for row in rows)
