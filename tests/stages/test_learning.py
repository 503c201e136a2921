"""Both stages trained for real on small pictures: losses fall, and what they leave is a model."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from small_runs import QUANTIZE, STEPS, check_events, log, losses, stage_2, validation

import export.to_onnx
from dvq_rt.generator import Generator
from training import train_tokenizer, train_transformer
from training.checkpoint import (
    load_checkpoint,
    load_training_state,
)
from training.data.folder import ImageFolder
from training.data.pixels import to_float
from training.judging.metrics import psnr


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


def test_best_tokenizer_is_quantized(first: Path) -> None:
    """No checkpoint from before the codebook existed can be the best one, however well it passed images through; the
    best one is the one with the lowest validation loss after that."""
    checked = validation(first)
    start = int(STEPS * QUANTIZE)
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
    loss_curve, checked = losses(second), {step: values["loss"] for step, values in validation(second).items()}
    print(f"\nstage 2: loss {loss_curve[0]:.2f} at step 10, {loss_curve[-1]:.2f} at step {STEPS}; held out {checked}")
    assert loss_curve[-1] < 0.67 * loss_curve[0] and min(checked.values()) < 0.67 * checked[10]
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
    loss_curve = losses(tmp_path / "second")
    print(
        f"\nMQ: pixel loss {picture[0]:.3f} to {picture[-1]:.3f}, stage 2 {loss_curve[0]:.2f} to {loss_curve[-1]:.2f}"
    )
    assert picture[-1] < 0.5 * picture[0] and loss_curve[-1] < 0.75 * loss_curve[0]
    check_events(tmp_path / "first", {"reconstruction", "grain", "score"})
    model = load_checkpoint(tmp_path / "second" / "best")
    assert model.family == "mq" and model.layout.kept == 25 and model.layout.heads == ("content", "position")
    export.to_onnx.main([str(tmp_path / "second" / "best"), "--out", str(tmp_path / "engine"), "--weights", "fp16"])
    made = Generator(tmp_path / "engine", threads=1).sample(4, labels=["bars", "discs", None, 0], seed=1)
    assert [c.length for c in made.codes] == [25] * 4
