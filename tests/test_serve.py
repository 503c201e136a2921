"""The server: OpenAI's client works against it, images are those of the generator, and bad clients harm nobody."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
from serving import SETTINGS, Running  # noqa: E402

from dvq_rt.decoding import DecodeLoop  # noqa: E402
from dvq_rt.generator import Generator  # noqa: E402
from dvq_rt.serve import bodies, load, protocol  # noqa: E402
from dvq_rt.serve.answers import png  # noqa: E402
from dvq_rt.serve.command import listen, serve  # noqa: E402
from dvq_rt.serve.errors import ApiError  # noqa: E402
from dvq_rt.serve.gate import JsonLines  # noqa: E402
from dvq_rt.serve.settings import KEY_VARIABLE, Settings, named_engines, place  # noqa: E402
from runtimes.errors import BackendError, EngineError, InputError  # noqa: E402

DRAW = "/v1/images/generations"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    running = Running(SETTINGS)
    yield running
    running.end()


@pytest.fixture(scope="module")
def demo() -> Generator:
    return Generator("demo:dq", slots=4, threads=1)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Steps take 10 ms more; gives the list that a step adds to."""
    made, step = [], DecodeLoop.step

    def later(loop: DecodeLoop) -> None:
        time.sleep(0.01)
        made.append(time.monotonic())
        step(loop)

    monkeypatch.setattr(DecodeLoop, "step", later)
    return made


def pixels(item: Any) -> np.ndarray:
    """Of an item of an answer, a dictionary or the client's object."""
    text = item["b64_json"] if isinstance(item, dict) else item.b64_json
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def until(holds: Any) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_official_client(running: Running, demo: Generator) -> None:
    """OpenAI's client lists models, draws, and streams; images are bit for bit those of ``Generator.sample``; and
    errors are of the classes it has for them."""
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["dq", "mq"]
    expected = demo.sample(2, prompts="red heart", seed=7)
    options = {"seed": 7, "with_codes": True}
    answer = client.images.generate(prompt="red heart", n=2, size="128x128", extra_body=options)
    assert all((pixels(item) == image).all() for item, image in zip(answer.data, expected.to_numpy(), strict=True))
    assert answer.usage.output_tokens == sum(c.length for c in expected.codes)
    assert answer.data[1].codes["codes"] == [expected.codes[1].codes.tolist()]
    options = {"seed": 7, "first": 1}
    stream = client.images.generate(prompt="red heart", stream=True, partial_images=3, extra_body=options)
    events = list(stream)
    assert [e.type for e in events[-1:]] == ["image_generation.completed"]
    assert {e.type for e in events[:-1]} <= {"image_generation.partial_image"} and len(events) <= 5
    assert (pixels(events[-1]) == expected.to_numpy()[1]).all()
    with pytest.raises(openai.BadRequestError, match="unknown label 'nope'; this model has faces, portraits"):
        client.images.generate(prompt="nope", model="mq")
    with pytest.raises(openai.NotFoundError, match="there is no model 'x' here; the models are dq, mq"):
        client.images.generate(prompt="faces", model="x")


def test_png_and_seeds(running: Running, demo: Generator) -> None:
    """One image comes as a PNG file if asked for; without a seed the answer names the one that was taken."""
    hearts = demo.class_names.index("hearts")
    first = running.post(DRAW, json={"label": hearts, "response_format": "png", "temperature": 0.5})
    assert first.headers["content-type"] == "image/png"
    seed = int(first.headers["x-seed"])
    again = running.post(DRAW, json={"label": "hearts", "seed": seed, "temperature": 0.5}).json()
    assert (pixels(again["data"][0]) == np.asarray(Image.open(io.BytesIO(first.content)))).all()
    assert again["seed"] == seed and again["size"] == "128x128"


def test_codes(running: Running, demo: Generator) -> None:
    """Pictures to codes and back, and scores, are the generator's, at any rate; MQ's too."""
    picture = Path(__file__).parents[1] / "docs" / "grain.png"
    data = picture.read_bytes()
    answer = running.post("/encode", params={"bits_per_pixel": 0.3}, content=data).json()
    (codes,) = demo.encode(picture, bits_per_pixel=0.3)
    assert answer["codes"]["codes"] == [codes.codes.tolist()] and answer["length"] == codes.length
    back = running.post("/decode", params={"response_format": "png"}, json=answer["codes"])
    assert (np.asarray(Image.open(io.BytesIO(back.content))) == demo.decode(codes)[0]).all()
    scores = running.post("/score", params={"label": "faces"}, json=answer["codes"]).json()["scores"]
    assert scores[0]["total"] == demo.score(codes, "faces")[0].total
    whole = running.post("/reconstruct", params={"fine_ratio": 1.0}, content=data).json()
    assert (pixels(whole["data"][0]) == demo.reconstruct(picture, fine_ratio=1.0)[0]).all() and whole["psnr"] > 10
    assert running.post("/encode", params={"model": "mq", "kept": 9}, content=data).json()["length"] == 9


def test_edits(running: Running, demo: Generator) -> None:
    """The official client's edits are the generator's, streamed ones too; a form has texts alone, also for a label's
    index."""
    original, clear = demo.sample(1, "faces", seed=3)[0], np.zeros((128, 128), dtype=bool)
    clear[32:80, 48:128] = True
    alpha = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    image, mask = (("x.png", png(x), "image/png") for x in (original, Image.merge("LA", (alpha, alpha))))
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    options = {"extra_body": {"seed": 7, "label": str(demo.class_names.index("faces"))}, "n": 2, "prompt": ""}
    answer = client.images.edit(model="dq", image=image, mask=mask, **options)
    expected = demo.edit(original, clear, labels="faces", n=2, seed=7).to_numpy()
    for item, drawn in zip(answer.data, expected, strict=True):
        assert (pixels(item) == drawn).all()
    events = list(client.images.edit(image=image, mask=mask, stream=True, partial_images=3, **options))
    kinds = [event.type.removeprefix("image_edit.") for event in events]
    assert kinds.count("completed") == 2 and 0 < kinds.count("partial_image") <= 6
    last = {event.index: pixels(event) for event in events if event.type.endswith("completed")}
    assert all((last[i] == drawn).all() for i, drawn in enumerate(expected))
    with pytest.raises(openai.BadRequestError, match="the mask has no transparency"):
        client.images.edit(image=image, mask=image, stream=True, **options)


BIG = io.BytesIO()
Image.new("L", (2000, 600)).save(BIG, "PNG")
REFUSED = [
    (DRAW, {"content": b"{"}, 400, "the body is no JSON"),
    (DRAW, {"json": {"style": 1}}, 400, "style is no field of this request"),
    (DRAW, {"json": {"n": "2"}}, 400, "n is '2'"),
    (DRAW, {"json": {"n": 9}}, 400, "n is 9; this server draws at most 8"),
    (DRAW, {"json": {"size": "256x256"}}, 400, "size is '256x256'; dq draws 128x128 alone"),
    (DRAW, {"json": {"response_format": "url"}}, 400, "response_format is 'url'"),
    (DRAW, {"json": {"response_format": "png", "n": 2}}, 400, "png answers with one image"),
    (DRAW, {"json": {"temperature": -1}}, 400, "temperature is -1.0; it must be a number in"),
    (DRAW, {"json": {"seed": -1}}, 400, "seed is -1; it must be an integer from 0"),
    (DRAW, {"json": {"label": 99}}, 400, "unknown label 99"),
    (DRAW, {"json": {"label": 1, "prompt": "faces", "model": "mq"}}, 400, "give one of them"),
    (DRAW, {"json": {"negative_prompt": "x", "model": "mq"}}, 400, "this model takes no prompts"),
    (DRAW, {"content": b"x" * (1 << 21)}, 413, "the body has more than 1048576 bytes"),
    ("/v1/images/edits", {"content": b"x"}, 400, "the body must be multipart/form-data with the files image and mask"),
    ("/v1/images/edits", {"files": {"image": b"x"}}, 400, "the image is damaged or of another format"),
    ("/v1/images/edits", {"files": [("image", b"x")] * 65}, 400, "the form has more than 64 parts"),
    ("/encode", {"content": b""}, 400, "the body is empty; send the bytes of a picture"),
    ("/encode", {"content": b"GIF89a"}, 400, "the image is a damaged GIF file"),
    ("/encode", {"content": b"/etc/passwd"}, 400, "the image is damaged or of another format"),
    ("/encode", {"content": BIG.getvalue()}, 413, "the image is 2000 x 600 pixels; at most 1048576"),
    ("/encode", {"content": BIG.getvalue(), "params": {"kept": "a"}}, 400, "kept is 'a'"),
    ("/encode", {"content": b"x" * (1 << 21)}, 413, "the body has more than 1048576 bytes"),
    ("/encode", {"content": (b"x" * 65536 for _ in range(40))}, 413, "the body has more than 1048576 bytes"),
    ("/decode", {"json": {"format": "dvq-codes"}}, 400, "there is no header with format, schema, layout and labels"),
    ("/decode", {"content": b"[" * 100_000}, 400, "the body is no JSON"),
    ("/score", {"json": [], "params": {"model": "../mq"}}, 404, "there is no model '../mq' here"),
    ("/nothing", {}, 404, "there is nothing under this path"),
    ("/healthz", {}, 405, "this path takes another method"),
]


@pytest.mark.parametrize(("path", "options", "status", "words"), REFUSED, ids=[row[3][:30] for row in REFUSED])
def test_refusals(path: str, options: dict[str, Any], status: int, words: str, running: Running) -> None:
    """What cannot be answered is refused in JSON of one form, with a sentence that says what to do, and nothing is held
    afterwards."""
    answer = running.post(path, **options)
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert words in error["message"]
    assert all(served.held == 0 for served in running.server.engines.served.values())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(stream: bool, running: Running, steps: list[float]) -> None:
    """Within 50 steps of a client's going away its images have no slots and no room in the queue."""
    body = json.dumps({"n": 8, "guidance": 1.0, "stream": stream, "partial_images": 20}).encode()
    head = f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(head + body)
        until(lambda: running.load().busy == 4)
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
    left = time.monotonic()
    until(lambda: running.load().busy == 0)
    assert sum(when > left for when in steps) <= 50
    until(lambda: running.server.engines.served["dq"].held == 0)


def test_a_full_queue_refuses(running: Running, steps: list[float]) -> None:
    """Images beyond slots and queue are refused with 429 and Retry-After, those before are drawn; encoding another
    model's pictures goes on."""
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(running.post(DRAW, json={"n": 8, "seed": 1})))
    thread.start()
    until(lambda: running.server.engines.served["dq"].held == 8)
    for stream in (False, True):
        refused = running.post(DRAW, json={"stream": stream})
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        assert "8 images are being drawn or waiting" in refused.json()["error"]["message"]
    never = running.post(DRAW, json={"n": 9})
    assert never.status_code == 400 and "at most 8" in never.json()["error"]["message"]
    assert running.post("/encode", params={"model": "mq"}, content=BIG_ENOUGH).status_code == 200
    thread.join()
    assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 8


def test_what_cannot_be_in_time_is_refused_at_once(running: Running) -> None:
    """Where the images before would take longer than a request may, a new one is refused and not drawn in vain; alone
    it is tried."""
    served = running.server.engines.served["dq"]
    before, served.pace = served.pace, 50.0
    try:
        served.check_room(2)
        with served.admit(1, drawing=False), pytest.raises(ApiError, match="for 60 s of work; try again in 25 s"):
            served.check_room(1)
    finally:
        served.pace = before


SMALL = io.BytesIO()
Image.new("RGB", (64, 64), "teal").save(SMALL, "PNG")
BIG_ENOUGH = SMALL.getvalue()


def test_deadlines(running: Running, steps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that takes too long ends with 504, a stream with an event that says so; its slots are free."""
    monkeypatch.setattr(running.server, "settings", replace(SETTINGS, timeout=0.3))
    answer = running.post(DRAW, json={"n": 8})
    assert answer.status_code == 504 and "this took more than 0.3 s" in answer.json()["error"]["message"]
    events = running.post(DRAW, json={"n": 8, "stream": True, "partial_images": 64}).text.strip().split("\n\n")
    kind, data = events[-1].split("\n")
    assert kind == "event: error" and json.loads(data[6:])["error"]["code"] == "deadline"
    until(lambda: running.load().busy == 0)


def test_slow_clients_are_cut(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not come is refused with 408; a connection without a request, and one whose answer is not read,
    are cut."""
    monkeypatch.setattr(bodies, "UPLOAD_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
        assert client.recv(100).startswith(b"HTTP/1.1 408")
    monkeypatch.setattr(protocol, "LOOK_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.settimeout(20)
        client.sendall(b"POST /enc")
        with suppress(ConnectionResetError):
            assert client.recv(100) == b""


def test_metrics_and_log(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """The counters that a dashboard needs are there and count; a request's id is in its answer and its line."""
    caplog.set_level(logging.INFO, "dvq_rt.serve")
    answer = running.post(DRAW, json={"prompt": "flags"}, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert httpx.get(f"{running.url}/readyz").json() == {"status": "ready"}
    until(lambda: any(record.message == "request" for record in caplog.records))
    record = next(record for record in caplog.records if getattr(record, "fields", {}).get("path") == DRAW)
    line = json.loads(JsonLines().format(record))
    assert (line["status"], line["model"], line["images"], line["level"]) == (200, "dq", 1, "info")
    text = httpx.get(f"{running.url}/metrics").text
    lines = dict(row.rsplit(" ", 1) for row in text.splitlines() if not row.startswith("#"))
    for name in ("dvq_slots", "dvq_slots_busy", "dvq_queue_images", "dvq_tokens_total", "dvq_images_total"):
        assert f'{name}{{model="dq"}}' in lines
    assert float(lines['dvq_slots{model="dq"}']) == 4 and float(lines['dvq_images_total{model="dq"}']) >= 1
    assert float(lines['dvq_first_preview_seconds_count{model="dq"}']) >= 1
    assert float(lines['dvq_requests_total{path="other",status="404"}']) >= 1
    assert set(httpx.get(f"{running.url}/openapi.json").json()["paths"]) >= {DRAW, "/encode", "/metrics"}


def test_the_load_test_sees_other_images(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the figures of the documents: one command says throughput, latencies, first previews, refusals and
    memory; images of another model are faults."""
    asked = [running.url, "--images", "2", "--requests", "3", "--clients", "1", "--threads", "1"]
    assert load.main([*asked, "--stream", "--pid", str(os.getpid())]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["statuses"] == {"200": 3} and told["images_per_second"] > 0 and told["mib_after_3"] > 10
    assert (told["refused"], *(told[name] for name in load.FAULTS)) == (0,) * 5
    assert told["preview_p50"] <= told["preview_p95"] <= told["p95"] <= told["p99"] and told["compared"] == 3
    assert load.main([*asked, "--engine", "demo:mq"]) == 1
    assert json.loads(capsys.readouterr().out)["different"] == 3


def test_the_page_is_all_its_own(running: Running) -> None:
    """Every file comes from this server, none by a path of the client's, and the headers forbid anything else."""
    page = httpx.get(running.url)
    assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]
    folder = Path(bodies.__file__).with_name("page")
    for path in folder.iterdir():
        assert httpx.get(f"{running.url}/page/{path.name}").content == path.read_bytes()
        links = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in links and "https://" not in links
    for name in ("..%2Fapp.py", "../app.py", "%2Fetc%2Fpasswd", "app.py"):
        assert httpx.get(f"{running.url}/page/{name}").status_code == 404


def test_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key in the environment only those who know it are answered, but for the page and whether it is alive;
    pages of other sites are refused always."""
    monkeypatch.setenv(KEY_VARIABLE, "open-sesame\n")  # as it is read from a file
    keyed = Running(replace(SETTINGS, engines=(("mq", "demo:mq"),)))
    try:
        for path, status in {
            "/healthz": 200,
            "/": 200,
            "/page/app.js": 200,
            "/v1/models": 401,
            "/metrics": 401,
        }.items():
            assert httpx.get(keyed.url + path).status_code == status
        for word in ("Bearer open", "Basic open-sesame", "Bearer \xfc"):
            headers = {"Authorization": word.encode("latin-1")}
            assert httpx.get(f"{keyed.url}/v1/models", headers=headers).status_code == 401
        client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="open-sesame")
        assert [model.id for model in client.models.list()] == ["mq"]
        key = {"Authorization": "Bearer open-sesame"}
        for site in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://else.where"}, {"Origin": "null"}):
            assert keyed.post(DRAW, json={}, headers={**key, **site}).status_code == 403
        for site in ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxied"}, {"Origin": keyed.url}):
            assert keyed.post(DRAW, json={"n": 99}, headers={**key, **site}).status_code == 400
    finally:
        keyed.end()


@pytest.mark.parametrize("key", ["", " \n", "open sesame", "s\xe9same"])
def test_a_key_that_nobody_can_send_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a server that is open, or closed to all, because its key came out wrong."""
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(InputError, match=r"DVQ_RT_API_KEY (is empty|has white space inside)"):
        serve(SETTINGS)


@pytest.mark.parametrize("forced", [False, True])
def test_a_server_that_closes_says_so(forced: bool, steps: list[float]) -> None:
    """While what was begun is finished, new requests are refused with 503 and Retry-After; a second signal answers what
    is under way so, too."""
    ending, answers = Running(replace(SETTINGS, engines=(("mq", "demo:mq"),))), []
    thread = threading.Thread(target=lambda: answers.append(ending.post(DRAW, json={"n": 4, "seed": 1})))
    thread.start()
    until(lambda: ending.load("mq").busy)
    ending.uvicorn.should_exit = True
    until(lambda: ending.server.engines.closing)
    ready, refused = httpx.get(f"{ending.url}/readyz"), ending.post(DRAW, json={})
    assert (ready.status_code, ready.json()) == (503, {"status": "closing"})
    ending.uvicorn.force_exit = forced
    thread.join()
    ending.end()
    assert answers[0].status_code == (503 if forced else 200)
    for answer in (refused, *(answers if forced else [])):
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "closing"


def test_settings() -> None:
    """Names and limits are checked before anything is opened."""
    assert named_engines([]) == (("demo:dq", "demo:dq"),)
    assert named_engines(["faces=engines/a", "engines/b", "demo:mq"])[:2] == (
        ("faces", "engines/a"),
        ("b", "engines/b"),
    )
    assert named_engines(["a=x@v2@cuda:1", "demo:mq@cpu"]) == (("a", "x@v2@cuda:1"), ("demo:mq", "demo:mq@cpu"))
    assert [place(word) for word in ("x@v2@cuda:1", "x@v2")] == [("x@v2", "cuda:1"), ("x@v2", None)]
    with pytest.raises(InputError, match="of different names"):
        Settings(engines=(("a", "x"), ("a", "y")))
    for wrong in ({"port": 70000}, {"workers": 0}, {"timeout": 0.0}, {"engines": (("a/b", "x"),)}):
        with pytest.raises(InputError):
            Settings(**wrong)
    with pytest.raises(EngineError, match="does not exist"):
        serve(replace(SETTINGS, engines=(("a", "/nowhere"),)))
    with pytest.raises(BackendError, match=r"demo_mq was exported for the CPU"):  # and not a traceback of its start
        serve(replace(SETTINGS, engines=(("dq", "demo:dq"), ("mq", "demo:mq@cuda:1")), device="cpu"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot listen on"):
            listen(replace(SETTINGS, port=taken.getsockname()[1]))
