"""examples/browser: the loop in JavaScript draws what the loop in Python draws."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvq_rt import Generator, SamplingParams
from dvq_rt.sampling import uniforms
from dvq_rt.step import PORTS, PROMPT_PORTS

FOLDER = Path(__file__).parents[1] / "examples" / "browser"
node = pytest.mark.skipif(not shutil.which("node"), reason="needs Node")
package = pytest.mark.skipif(
    not (FOLDER / "node_modules" / "onnxruntime-web").is_dir(), reason="needs npm install in examples/browser"
)


def javascript(*arguments: str) -> Any:
    """What a script of the folder printed as JSON."""
    done = subprocess.run(["node", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@node
@pytest.mark.parametrize(("seed", "image", "steps"), [(0, 0, 1), (1, 0, 7), (2**64 - 1, 2**62, 325)])
def test_random_numbers(seed: int, image: int, steps: int) -> None:
    """Protects "same seed, same image": every number is numpy's, for the largest keys and odd lengths too."""
    code = f"""import {{ uniforms }} from "./philox.js";
        console.log(JSON.stringify(Array.from(uniforms({seed}n, {image}n, {steps}))));"""
    got = np.array(javascript("--input-type=module", "-e", code), dtype=np.float32)
    assert np.array_equal(got.reshape(steps, 2), uniforms(seed, image, steps))


def test_idle_values() -> None:
    """Protects engines with controls that this page does not offer: each has the idle value of the step's table."""
    (table,) = re.findall(r"const IDLE = \{\n(.*?)\};", (FOLDER / "engine.js").read_text(encoding="utf-8"), re.S)
    idle = {name: value.strip('"').lower() for name, value in re.findall(r"(\w+): ([\w-]+),", table)}
    for port in (*PORTS, *PROMPT_PORTS):
        if port.role in ("state", "control"):
            want = "own" if port.idle == "own" else str(int(port.idle))
            assert idle[port.name] == want, port.name


@node
@package
@pytest.mark.parametrize(
    ("engine", "options"),
    [("demo:dq", {"guidance": 1.0}), ("demo:mq", {"guidance": 2.0, "top_k": 40, "temperature": 0.9})],
)
def test_tokens_are_the_generators(engine: str, options: dict[str, Any]) -> None:
    """Protects the loop: labels, controls, refilled slots, guidance and pixels. The kernels differ in last bits, which
    may turn a draw; here none does."""
    generator = Generator(engine, slots=2, threads=1)
    asked = {"n": 3 if options["guidance"] == 1 else 1, "label": 3, "seed": 5, "first": 1, "slots": 2, **options}
    drawn = javascript("draw.mjs", str(generator.path), json.dumps(asked))
    params = SamplingParams.from_dict({**generator.manifest.defaults, **options})
    samples = generator.sample(asked["n"], 3, seed=5, first=1, params=params)
    for image, codes, picture in zip(drawn["images"], samples.codes, samples.images, strict=True):
        cells = np.array(image["cells"]).reshape(codes.codes.shape)
        assert np.array_equal(np.where(cells < 0, -1, cells % generator.layout.codebook_size), codes.codes)
        pixels = np.frombuffer(base64.b64decode(image["rgba"]), np.uint8).reshape(*picture.size, 4)[..., :3]
        assert np.abs(pixels.astype(int) - np.asarray(picture)).max() <= 1
