"""Small pictures, and finished runs of both stages on them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from small_runs import ADVERSARIAL, MASKED, STAGE_1, STAGE_2, stage_2

from training import train_tokenizer, train_transformer


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 discs and 20 bars on white, 16 px."""
    folder, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for i in range(40):
        kind = ("bars", "discs")[i % 2]
        image = Image.new("RGB", (16, 16), "white")
        x, y, size = (int(v) for v in rng.integers(1, 8, 3))
        box = (x, y, x + size + 2, y + size + 2) if kind == "discs" else (0, y, 15, y + size)
        colour = tuple(int(v) for v in rng.integers(0, 160, 3))
        draw = ImageDraw.Draw(image)
        draw.ellipse(box, fill=colour) if kind == "discs" else draw.rectangle(box, fill=colour)
        (folder / kind).mkdir(exist_ok=True)
        image.save(folder / kind / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    stages = {"one": STAGE_1, "masked": MASKED, "adversarial": ADVERSARIAL, "two": STAGE_2}
    for name, values in stages.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def first(data: Path, configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage 1."""
    run = tmp_path_factory.mktemp("runs") / "first"
    train_tokenizer.main([str(data), "--out", str(run), "--config", str(configs / "one.json")])
    return run


@pytest.fixture(scope="session")
def adversarial(data: Path, configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage 1 with a discriminator, of an MQ-VAE."""
    run = tmp_path_factory.mktemp("runs") / "adversarial"
    train_tokenizer.main([str(data), "--out", str(run), "--config", str(configs / "adversarial.json")])
    return run


@pytest.fixture(scope="session")
def second(data: Path, configs: Path, first: Path) -> Path:
    """A finished run of stage 2 on the codes of ``first``."""
    run = first.with_name("second")
    train_transformer.main(stage_2(data, configs, first, run))
    return run
