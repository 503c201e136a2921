"""Settings of small training runs, and what they leave behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS, QUANTIZE = 80, 0.25
STAGE_1 = {
    "tokenizer": {
        "image_size": 16,
        "channels": 16,
        "encoder_mult": [1, 1, 2],
        "decoder_channels": 16,
        "decoder_mult": [2, 1],
        "z_channels": 16,
        "code_dim": 8,
        "codebook_size": 32,
        "norm_groups": 8,
        "restart_below": 0.03,
    },
    "training": {
        "steps": STEPS,
        "lr": 0.004,
        "warmup": 5,
        "shift": 1,
        "flip": True,
        "validate_every": 10,
        "picture_every": 40,
        "checkpoint_every": 15,
    },
    "stage": {"warmup_fraction": QUANTIZE, "val_fraction": 0.1},
}
MASKED = {
    **STAGE_1,
    "tokenizer": {
        "family": "mq",
        "image_size": 16,
        "channels": 16,
        "encoder_mult": [1, 2],
        "decoder_channels": 16,
        "decoder_mult": [1, 1],
        "z_channels": 16,
        "code_dim": 8,
        "codebook_size": 32,
        "norm_groups": 8,
        "kept_ratio": 0.5,
        "demask_blocks": 2,
        "restart_below": 0.03,
    },
}
ADVERSARIAL = {
    **MASKED,
    "stage": {
        **STAGE_1["stage"],
        "adversarial_weight": 0.75,
        "adversarial_start": 0.4,
        "discriminator_width": 8,
        "discriminator_layers": 2,
    },
}
STAGE_2 = {
    "transformer": {"width": 32, "heads": 4, "position_blocks": 1, "content_blocks": 1},
    "training": {**STAGE_1["training"], "flip": False, "lr": 0.01},
    "stage": {"copies": 2, "balance": 0.5, "label_dropout": 0.2, "val_fraction": 0.1, "defaults": {"temperature": 0.9}},
}

Row = dict[str, Any]
Command = Callable[[list[str]], None]


def stage_2(data: Path, configs: Path, first: Path, run: Path) -> list[str]:
    tokenizer = str(first / "best")
    return [str(data), "--tokenizer", tokenizer, "--out", str(run), "--config", str(configs / "two.json")]


def log(run: Path) -> list[Row]:
    """The rows of a run's log without their times."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "s"} for row in rows]


def losses(run: Path, part: str = "loss") -> list[float]:
    return [row["train"][part] for row in log(run) if "train" in row]


def validation(run: Path) -> dict[int, Row]:
    return {row["step"]: row["val"] for row in log(run) if "val" in row}


def check_events(run: Path, pictures: set[str]) -> None:
    for path in (run / "tensorboard").iterdir():  # files of one second are in order of a counter without leading zeros
        before, _, counter = path.name.rpartition(".")
        path.rename(path.with_name(f"{before}.{int(counter):06}"))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "train/images_per_s", "val/loss"} <= set(tags["scalars"])
    assert set(tags["images"]) == pictures
    assert [e.step for e in events.Scalars("train/loss")] == list(range(10, STEPS + 1, 10))
    assert [e.step for e in events.Images(next(iter(pictures)))] == [40, 80]
