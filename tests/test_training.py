"""Both stages trained for real on small pictures: losses fall, runs resume exactly, checkpoints survive crashes."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_models import TOKENIZER, small_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import export.to_onnx
from dvq_rt.generator import Generator
from training import checkpoint, cli, thresholds, train_tokenizer, train_transformer
from training.checkpoint import (
    Model,
    TrainingState,
    family_config,
    load_checkpoint,
    load_training_state,
    save_checkpoint,
)
from training.cli import read_config
from training.data import ImageFolder
from training.loop import TrainConfig
from training.losses import psnr
from training.models.dqvae import DQVAE, patch_entropy
from training.models.tokenizer import Reconstruction
from training.models.transformer import TransformerConfig
from training.thresholds import to_float

STEPS, QUANTISE = 80, 0.25
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
    "stage": {"warmup_fraction": QUANTISE, "val_fraction": 0.1},
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    stages = {"one": STAGE_1, "masked": MASKED, "adversarial": ADVERSARIAL, "two": STAGE_2}
    for name, values in stages.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def first(data: Path, configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage 1."""
    run = tmp_path_factory.mktemp("runs") / "first"
    train_tokenizer.main([str(data), "--out", str(run), "--config", str(configs / "one.json")])
    return run


@pytest.fixture(scope="module")
def adversarial(data: Path, configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage 1 with a discriminator, of an MQ-VAE."""
    run = tmp_path_factory.mktemp("runs") / "adversarial"
    train_tokenizer.main([str(data), "--out", str(run), "--config", str(configs / "adversarial.json")])
    return run


@pytest.fixture(scope="module")
def second(data: Path, configs: Path, first: Path) -> Path:
    """A finished run of stage 2 on the codes of ``first``."""
    run = first.with_name("second")
    train_transformer.main(stage_2(data, configs, first, run))
    return run


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


# --- training --------------------------------------------------------------------------------------------------
def test_tokenizer_learns(first: Path, data: Path) -> None:
    """Stage 1 learns to reconstruct: the pixel loss falls to less than half, and on held-out images the trained codes
    beat a white page by 3 dB."""
    picture = losses(first, "picture")
    print(f"\nstage 1: pixel loss {picture[0]:.3f} at step 10, {picture[-1]:.3f} at step {STEPS}")
    assert picture[-1] < 0.5 * picture[0]
    folder = ImageFolder(data, 16, val_fraction=0.1)
    pictures = to_float(np.stack([folder.pixels(int(i)) for i in folder.val]))
    vae = load_checkpoint(first / "best").tokenizer
    assert vae is not None
    with torch.no_grad():
        encoding = vae.encode(pictures)
        reached = psnr(pictures, vae.decode_codes(encoding.codes)).mean()
        white = psnr(pictures, torch.ones_like(pictures)).mean()
    print(f"held-out PSNR {reached:.1f} dB, of a white page {white:.1f} dB")
    assert reached > white + 3
    assert len(encoding.codes.unique()) > 4 and set(encoding.grain.flatten().tolist()) == {0, 1}


def test_best_tokenizer_is_quantised(first: Path) -> None:
    """No checkpoint from before the codebook existed can be the best one, however well it passed images through; the
    best one is the one with the lowest validation loss after that."""
    checked = validation(first)
    start = int(STEPS * QUANTISE)
    assert {step for step, values in checked.items() if "loss" not in values} == set(range(10, start + 1, 10))
    best = min((values["loss"], step) for step, values in checked.items() if "loss" in values)
    state = load_training_state(first / "best")
    assert (state.values["best"], state.step) == best


def test_discriminator_learns(adversarial: Path) -> None:
    """With an adversarial loss there is a discriminator from the configured step on; it tells pictures from
    reconstructions (a blind one has the loss 1), the tokenizer learns all the same, and the model's own file holds
    nothing of it."""
    rows = [row["train"] for row in log(adversarial) if "train" in row]
    assert ["critic" in row for row in rows] == [step > 0.4 * STEPS for step in range(10, STEPS + 1, 10)]
    judged = [row["critic"] for row in rows if "critic" in row]
    print(f"\ndiscriminator: mean loss {np.mean(judged):.3f}; pixel loss {rows[-1]['picture']:.3f} at the end")
    assert np.mean(judged) < 0.95
    assert all(0 < row["adversarial_weight"] <= 1 for row in rows if "critic" in row)
    assert rows[-1]["picture"] < 0.75 * rows[0]["picture"]
    assert load_checkpoint(adversarial / "best").family == "mq"
    names = set(load_training_state(adversarial / "checkpoint").tensors)
    assert {"critic.main.0.weight", "critic.main.3.running_mean", "critic_optimizer.0.exp_avg"} <= names


def test_adversarial_loss_of_either_family(data: Path, configs: Path, tmp_path: Path) -> None:
    """A DQ-VAE trains with a discriminator too, and from the first step if so configured."""
    run, options = tmp_path / "run", ["--config", str(configs / "one.json"), "--set", "training.steps=10"]
    for setting in (
        "adversarial_weight=0.75",
        "adversarial_start=0",
        "discriminator_layers=2",
        "discriminator_width=8",
    ):
        options += ["--set", f"stage.{setting}"]
    train_tokenizer.main([str(data), "--out", str(run), *options])
    assert losses(run, "critic")[0] > 0 and "perplexity" in log(run)[0]["train"]
    assert load_checkpoint(run / "best").family == "dq"


def test_transformer_learns(second: Path) -> None:
    """Stage 2 learns the codes: training and validation loss fall by a third, and the best checkpoint holds the whole
    model with its labels, null label and recommended parameters."""
    found, checked = losses(second), {step: values["loss"] for step, values in validation(second).items()}
    print(f"\nstage 2: loss {found[0]:.2f} at step 10, {found[-1]:.2f} at step {STEPS}; held out {checked}")
    assert found[-1] < 0.67 * found[0] and min(checked.values()) < 0.67 * checked[10]
    model = load_checkpoint(second / "best")
    assert model.class_names == ("bars", "discs") and model.defaults == {"temperature": 0.9}
    assert model.layout.classes == 2 and model.layout.null_label and model.layout.sides == (4, 8)
    assert load_training_state(second / "best").values["best"] == min(checked.values())


def test_the_tokenizer_stays_as_it_was(first: Path, second: Path) -> None:
    """Stage 2 leaves the tokenizer whose codes it learns untouched, to the bit."""
    before, after = (load_file(run / "best" / "model.safetensors") for run in (first, second))
    names = [name for name in after if name.startswith("tokenizer.")]
    assert set(names) == set(before)
    assert all(torch.equal(before[name], after[name]) for name in names)


def check_events(run: Path, pictures: set[str]) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "train/images_per_s", "val/loss"} <= set(tags["scalars"])
    assert set(tags["images"]) == pictures
    assert [e.step for e in events.Scalars("train/loss")] == list(range(10, STEPS + 1, 10))
    assert [e.step for e in events.Images(next(iter(pictures)))] == [40, 80]


def test_tensorboard(first: Path, second: Path) -> None:
    """Scalars of training and validation, and the pictures of each stage, can be looked at."""
    check_events(first, {"reconstruction", "grain", "score"})
    check_events(second, {"samples"})


def test_trained_model_becomes_an_engine(second: Path, tmp_path: Path) -> None:
    """From the training run to pictures: the export command, verification, samples of both labels and of none."""
    export.to_onnx.main([str(second / "best"), "--out", str(tmp_path / "engine"), "--weights", "fp16"])
    generator = Generator(tmp_path / "engine", threads=1)
    assert all(check.ok for check in generator.verify())
    made = generator.sample(6, labels=["bars", "discs", None] * 2, seed=1)
    assert made.params.temperature == 0.9 and made.to_numpy().shape == (6, 16, 16, 3)
    lengths = [c.length for c in made.codes]
    assert all(16 <= n <= 64 for n in lengths) and len(set(lengths)) > 1
    total = sum(s.total for s in generator.score(made.codes))
    wrong = sum(s.total for s in generator.score([c for c in made.codes if c.label == 0], "discs"))
    right = sum(s.total for s in generator.score([c for c in made.codes if c.label == 0], "bars"))
    assert total < 0 and right > wrong


def test_masked_models_learn(data: Path, configs: Path, tmp_path: Path) -> None:
    """The MQ family goes the same way: its two stages learn, scores and masks can be looked at, and the engine keeps
    the share of the cells that was asked for."""
    config = str(configs / "masked.json")
    share = ["--set", "tokenizer.kept_ratio=0.4"]
    train_tokenizer.main([str(data), "--out", str(tmp_path / "first"), "--config", config, *share])
    picture = losses(tmp_path / "first", "picture")
    train_transformer.main(stage_2(data, configs, tmp_path / "first", tmp_path / "second"))
    found = losses(tmp_path / "second")
    print(f"\nMQ: pixel loss {picture[0]:.3f} to {picture[-1]:.3f}, stage 2 {found[0]:.2f} to {found[-1]:.2f}")
    assert picture[-1] < 0.5 * picture[0] and found[-1] < 0.75 * found[0]
    check_events(tmp_path / "first", {"reconstruction", "grain", "score"})
    model = load_checkpoint(tmp_path / "second" / "best")
    assert model.family == "mq" and model.layout.kept == 25 and model.layout.heads == ("content", "position")
    export.to_onnx.main([str(tmp_path / "second" / "best"), "--out", str(tmp_path / "engine"), "--weights", "fp16"])
    made = Generator(tmp_path / "engine", threads=1).sample(4, labels=["bars", "discs", None, 0], seed=1)
    assert [c.length for c in made.codes] == [25] * 4


# --- resumption ------------------------------------------------------------------------------------------------
class Crash(Exception):
    """Stands for a power cut."""


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something at the start of a step."""
    rate = TrainConfig.rate

    def watched(config: TrainConfig, now: int) -> float:
        if now == step:
            action()
        return rate(config, now)

    monkeypatch.setattr(TrainConfig, "rate", watched)


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("stage", ["first", "adversarial", "second"])
def test_interrupted_run_equals_a_whole_one(
    stage: str,
    data: Path,
    configs: Path,
    first: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed before the first checkpoint, stopped by a signal, then by a crash beyond the last checkpoint, and resumed
    each time: the same log and events, the same weights and optimiser state to the bit, through the start of the
    codebook, augmentation, dropout and the first steps of a discriminator (its weights and its optimiser's too)."""
    run = tmp_path / "run"
    whole: Path = request.getfixturevalue(stage)
    config = {"first": "one", "adversarial": "adversarial"}.get(stage)
    options = [str(data), "--out", str(run), "--config", str(configs / f"{config}.json")]
    arguments = options if config else stage_2(data, configs, first, run)
    main: Command = train_tokenizer.main if config else train_transformer.main
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        interrupt(patch, 12, crash)
        with pytest.raises(Crash):
            main([*arguments, "--resume"])
    assert log(run)[-1]["step"] == 10 and not (run / "checkpoint").exists()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        interrupt(patch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--resume"])
    printed = capsys.readouterr()
    assert stopped.value.code == 130 and "stopped at step 14; the same command with --resume" in printed.err
    assert str(run) not in printed.out
    assert load_training_state(run / "checkpoint").step == 14
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    with monkeypatch.context() as patch:
        interrupt(patch, 42, crash)
        with pytest.raises(Crash):
            main([*arguments, "--resume"])
    assert load_training_state(run / "checkpoint").step == 30
    assert log(run)[-1]["step"] == 40
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 41, "tra')
    main([*arguments, "--resume"])
    assert log(run) == log(whole)
    check_events(run, {"reconstruction", "grain", "score"} if config else {"samples"})
    for folder in ("checkpoint", "best"):
        for name in ("model.safetensors", "training.safetensors"):
            one, other = (load_file(each / folder / name) for each in (run, whole))
            assert set(one) == set(other)
            assert [k for k in one if not torch.equal(one[k], other[k])] == []
        states = [load_training_state(each / folder) for each in (run, whole)]
        assert states[0].step == states[1].step and states[0].values["best"] == states[1].values["best"]


def test_finished_run_stays_as_it_is(first: Path, data: Path, configs: Path) -> None:
    """Resuming a run that has all its steps takes no further one."""
    before = log(first), load_file(first / "checkpoint" / "model.safetensors")
    train_tokenizer.main([str(data), "--out", str(first), "--config", str(configs / "one.json"), "--resume"])
    after = log(first), load_file(first / "checkpoint" / "model.safetensors")
    assert before[0] == after[0] and all(torch.equal(before[1][k], after[1][k]) for k in before[1])


@pytest.mark.parametrize("moment", ["writing", "before the swap", "inside the swap", "after the swap"])
def test_checkpoint_survives_a_crash(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a crash hits, the folder is the old checkpoint or the new one, whole, and the next save works."""
    folder, models = tmp_path / "checkpoint", [small_model(seed=i) for i in range(3)]
    save_checkpoint(models[0], folder, TrainingState(1))
    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(os, "fsync", lambda _: crash())
        elif moment == "after the swap":
            remove = shutil.rmtree
            last = folder.with_name("checkpoint.old")
            patch.setattr(
                checkpoint.shutil,
                "rmtree",
                lambda path, **kw: crash() if path == last and last.exists() else remove(path, **kw),
            )
        else:
            rename = Path.rename
            culprit = "checkpoint" if moment == "before the swap" else "checkpoint.new"
            patch.setattr(Path, "rename", lambda p, to: crash() if p.name == culprit else rename(p, to))
        with pytest.raises(Crash):
            save_checkpoint(models[1], folder, TrainingState(2))
    expected = 1 if moment == "after the swap" else 0
    left = sorted(p.name for p in tmp_path.iterdir())

    def holds(index: int) -> bool:
        weights = load_checkpoint(folder).state_dict()
        same = all(torch.equal(weights[k], v) for k, v in models[index].state_dict().items() if not v.isnan().any())
        return same and load_training_state(folder).step == index + 1

    assert holds(expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == left  # reading renames nothing
    save_checkpoint(models[2], folder, TrainingState(3))
    assert holds(2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


# --- thresholds ------------------------------------------------------------------------------------------------
def test_threshold_command(first: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table is the percentiles of the patch entropies of all images of the folder, it replaces the one in the
    checkpoint and nothing else, and a run can still be resumed from there."""
    shutil.copytree(first / "checkpoint", tmp_path / "checkpoint")
    target = str(tmp_path / "checkpoint")
    before = load_file(tmp_path / "checkpoint" / "model.safetensors")
    shutil.copytree(data / "bars", tmp_path / "data" / "bars")
    thresholds.main([str(tmp_path / "data"), "--checkpoint", target])
    assert capsys.readouterr().out.splitlines()[-1] == target
    folder = ImageFolder(tmp_path / "data", 16)
    images = np.stack([folder.pixels(i) for i in range(len(folder))])
    entropies = np.sort(patch_entropy(to_float(images), 4).numpy().reshape(-1))
    after = load_file(tmp_path / "checkpoint" / "model.safetensors")
    table = after.pop("tokenizer.entropy_thresholds").numpy()
    np.testing.assert_allclose(table, [entropies[len(entropies) * p // 100] for p in range(1, 100)], rtol=1e-6)
    assert (table != before.pop("tokenizer.entropy_thresholds").numpy()).any()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert load_training_state(tmp_path / "checkpoint").step == STEPS
    save_checkpoint(Model(None, small_model().transformer), tmp_path / "second only")
    with pytest.raises(SystemExit):
        thresholds.main([str(data), "--checkpoint", str(tmp_path / "second only")])
    assert "second only holds no DQ-VAE" in capsys.readouterr().err


# --- errors ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "training.step=3"], "unknown fields ['step']; there are ['batch_size'"),
        (["--set", "training.steps=many"], "steps is 'many'; it must be of type int"),
        (["--set", "training.steps=2.5"], "steps is 2.5; it must be of type int"),
        (["--set", "training.steps=0"], "training.steps is 0; it must be at least 1"),
        (["--set", "training.lr=0"], "must be positive"),
        (["--set", "training.flip=1"], "flip is 1; it must be of type bool"),
        (["--set", "training.betas=[0.9]"], "training.betas is (0.9,); it must be two numbers in [0, 1)"),
        (["--set", 'training.betas=[0.9, "b"]'], "training.betas is (0.9, 'b'); it must be two numbers"),
        (["--set", "training.betas=[0.9, 1]"], "training.betas is (0.9, 1); it must be two numbers"),
        (["--set", "training.seed=-1"], "training.seed is -1; it must be in 0..2^63 - 1"),
        (["--set", "training.seed=9223372036854775808"], "it must be in 0..2^63 - 1"),
        (["--set", "tokenizer.norm_groups=0"], "tokenizer.norm_groups is 0; it must be positive integers"),
        (["--set", "tokenizer.codebook_size=0"], "tokenizer.codebook_size is 0"),
        (["--set", "tokenizer.blocks=-1"], "tokenizer.blocks is -1"),
        (["--set", "tokenizer.encoder_mult=[1, 1, 0]"], "tokenizer.encoder_mult is (1, 1, 0)"),
        (["--set", 'tokenizer.decoder_mult=["a", 1]'], "tokenizer.decoder_mult is ('a', 1)"),
        (["--set", "tokenizer.image_size=8"], "tokenizer.image_size is 8; it must be at least 11, the window of SSIM"),
        (["--set", "steps=3"], "override 'steps=3' is not SECTION.FIELD=VALUE"),
        (["--set", "model.steps=3"], "is not SECTION.FIELD=VALUE with a section of ['stage', 'tokenizer', 'training']"),
        (["--set", "training.steps"], "override 'training.steps' is not SECTION.FIELD=VALUE"),
        (["--set", "tokenizer.image_size=18"], "tokenizer.image_size is 18; it must be a multiple of 4"),
        (["--set", "tokenizer.family=vq"], "family is 'vq'; it must be one of ['dq', 'mq']"),
        (["--config", "masked.json", "--set", "tokenizer.kept_ratio=0"], "tokenizer.kept_ratio is 0; it must be at"),
        (["--config", "masked.json", "--set", "tokenizer.scorer=best"], "tokenizer.scorer is 'best'; it must be one"),
        (["--set", "stage.warmup_fraction=1"], "stage.warmup_fraction 1 must be in [0, 1)"),
        (["--set", "stage.adversarial_weight=-1"], "stage.adversarial_weight -1 must be a number of at least 0"),
        (["--set", "stage.adversarial_weight=Infinity"], "stage.adversarial_weight inf must be a number"),
        (["--set", "stage.adversarial_start=1"], "stage.adversarial_start 1 in [0, 1)"),
        (["--set", "stage.discriminator_width=0"], "stage.discriminator_width 0 and"),
        (["--set", "stage.discriminator_layers=0"], "stage.discriminator_layers 0 must be at least 1"),
        (
            ["--set", "stage.adversarial_weight=0.75"],
            "stage.discriminator_layers is 3, which needs images of 24 px; these have 16, use fewer layers",
        ),
        (["--config", "nonesuch"], "give a JSON file or one of ['emoji_mq_tokenizer'"),
        (["--config", "list.json"], "list.json must be one JSON object of sections"),
        (["--config", "two.json"], "two.json: unknown sections ['transformer']"),
    ],
)
def test_bad_training_commands(
    options: list[str],
    words: str,
    data: Path,
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong option is one line that names it, exit status 2, and no run folder."""
    monkeypatch.chdir(configs)
    (configs / "list.json").write_text("[]")
    with pytest.raises(SystemExit) as caught:
        train_tokenizer.main([str(data), "--out", str(tmp_path / "run"), "--config", "one.json", *options])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and words in error
    assert not list(tmp_path.iterdir())


def test_runs_are_not_mixed(first: Path, data: Path, configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run is neither started over, also not when a crash left only its old checkpoint, nor resumed with other
    settings; it stays as it was."""
    before = log(first)
    base = [str(data), "--out", str(first), "--config", str(configs / "one.json")]
    (first / "checkpoint").rename(first / "checkpoint.old")
    with pytest.raises(SystemExit):
        train_tokenizer.main(base)
    assert "already holds a run; add --resume to go on with it" in capsys.readouterr().err
    (first / "checkpoint.old").rename(first / "checkpoint")
    for options, words in (
        ([], "already holds a run; add --resume to go on with it, or choose another --out"),
        (["--resume", "--set", "training.lr=0.5"], "was started with other settings"),
        (["--resume", "--set", "training.steps=90"], "was started with other settings"),
    ):
        with pytest.raises(SystemExit):
            train_tokenizer.main([*base, *options])
        assert words in capsys.readouterr().err
    assert log(first) == before


def test_changed_inputs_are_noticed(
    first: Path, second: Path, data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is not resumed on other images, nor stage 2 on another tokenizer, even of the same sizes."""
    more = tmp_path / "more"
    shutil.copytree(data, more)
    shutil.copy(more / "bars" / "00.png", more / "discs" / "zz.png")
    other = load_checkpoint(first / "best")
    assert other.tokenizer is not None
    other.tokenizer.entropy_thresholds += 1e-3
    save_checkpoint(other, tmp_path / "other")
    one = ["--out", str(first), "--config", str(configs / "one.json"), "--resume"]
    two = [*stage_2(data, configs, first, second), "--resume"]
    for main, arguments, words in (
        (train_tokenizer.main, [str(more), *one], f"was not started with the images that {more} holds now"),
        (train_transformer.main, [str(more), *two[1:]], f"was not started with the images that {more} holds now"),
        (
            train_transformer.main,
            [*two, "--tokenizer", str(tmp_path / "other")],
            f"was not started with the tokenizer that {tmp_path / 'other'} holds now",
        ),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err


def test_truncated_images_and_no_labels(
    first: Path, data: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files cut short, in training and held out, are left out with a warning; and one label "" of every sub-folder
    trains an unconditional model. Before quantisation the pictures are what the network makes without a codebook."""
    images = tmp_path / "images"
    shutil.copytree(data, images)
    folder = ImageFolder(images, 16, val_fraction=0.1)
    for path in (folder.paths[folder.train[0]], folder.paths[folder.val[0]]):
        path.write_bytes(path.read_bytes()[:60])
    short = ["--set", "training.steps=3", "--set", "training.picture_every=1"]
    base = [str(images), "--out", str(tmp_path / "one"), "--config", str(configs / "one.json"), *short]
    quantised: list[bool] = []
    forward = DQVAE.forward

    def watched(vae: DQVAE, x: torch.Tensor, *, quantize: bool = True) -> Reconstruction:
        quantised.extend([] if vae.training else [quantize])
        return forward(vae, x, quantize=quantize)

    monkeypatch.setattr(DQVAE, "forward", watched)
    with pytest.warns(UserWarning, match="unreadable image"):
        train_tokenizer.main([*base, "--set", "stage.warmup_fraction=0.67"])
    assert quantised[0] is False and quantised[-1] is True
    options = ["--set", 'stage.labels={"": ["*"]}', "--set", "stage.min_psnr=0"]
    with pytest.warns(UserWarning, match="unreadable image"):
        train_transformer.main([*stage_2(images, configs, first, tmp_path / "two"), *short, *options])
    model = load_checkpoint(tmp_path / "two" / "best")
    assert model.class_names == () and model.layout.classes == 0 and not model.layout.null_label


def test_what_stage_two_refuses(
    first: Path, data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A poor tokenizer is noticed before its codes are used, and a wrong option or checkpoint is named."""
    save_checkpoint(Model(None, small_model().transformer), tmp_path / "second only")
    run = tmp_path / "run"
    for options, words in (
        (["--set", "stage.min_psnr=60"], "dB, below stage.min_psnr 60"),
        (["--tokenizer", str(tmp_path / "nowhere")], "nowhere is no checkpoint folder"),
        (["--tokenizer", str(tmp_path / "second only")], "second only holds no tokenizer"),
        (["--set", "transformer.depth=3"], "section 'transformer': unknown fields ['depth']"),
        (["--set", "transformer.heads=5"], "transformer.width is 32; it must be a multiple of heads (5)"),
        (["--set", "stage.order=spiral"], "layout.order is 'spiral'"),
        (["--set", "stage.copies=0"], "stage.copies is 0; it must be at least 1"),
        (["--set", 'stage.labels={"round": 3}'], "stage.labels: 'round' is 3; it must be a list of sub-folders"),
        (
            ["--set", 'stage.defaults={"guidance": 2}', "--set", "stage.label_dropout=0"],
            "stage.defaults has guidance 2, but stage.label_dropout 0 has no null label",
        ),
        (
            ["--set", 'stage.defaults={"guidance": 2}', "--set", 'stage.labels={"": ["*"]}'],
            "stage.defaults has guidance 2, but an unconditional model (stage.labels) has no null label",
        ),
        (["--set", 'stage.defaults={"top_q": 1}'], "sampling parameters: unknown fields ['top_q']"),
        (["--set", 'stage.labels={"round": ["disc"]}'], "labels names disc, which"),
    ):
        with pytest.raises(SystemExit):
            train_transformer.main([*stage_2(data, configs, first, run), *options])
        assert words in capsys.readouterr().err
        assert not (run / "checkpoint").exists()


def test_unusable_folders(data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is missing or too small to hold an image out, and a run folder that cannot be made, say so before
    training starts instead of failing in the middle."""
    (tmp_path / "few" / "bars").mkdir(parents=True)
    shutil.copy(next((data / "bars").iterdir()), tmp_path / "few" / "bars" / "a.png")
    for images, run, words in (
        (tmp_path / "few", tmp_path / "run", "none of the 1 images of"),
        (tmp_path / "no", tmp_path / "run", "no does not exist"),
        (data, tmp_path / "few/bars/a.png/run", "cannot write the run folder"),
    ):
        with pytest.raises(SystemExit):
            train_tokenizer.main([str(images), "--out", str(run), "--config", str(configs / "one.json")])
        assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["few"]


@pytest.mark.parametrize("path", sorted(cli.CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_configs_of_the_package(path: Path) -> None:
    """The configuration files in the package fit the code that reads them."""
    if "tokenizer" in path.stem:
        sections = {"tokenizer": dict, "training": TrainConfig, "stage": train_tokenizer.StageOneConfig}
        sizes = read_config(path.stem, sections, [])["tokenizer"]
        assert cli.build(family_config(sizes.pop("family", "dq")), sizes, path.stem) != TOKENIZER
        return
    sections = {"transformer": dict, "training": TrainConfig, "stage": train_transformer.StageTwoConfig}
    config = read_config(path.stem, sections, ["training.steps=7"])
    assert config["training"].steps == 7 and config["stage"].defaults["guidance"] > 1
    cli.build(TransformerConfig, config["transformer"], path.stem)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_what_the_disk_refuses(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk is one line and exit status 2, not a traceback."""

    @cli.guarded
    def command(argv: list[str] | None) -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {error}\n"
