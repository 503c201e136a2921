"""Runs that cannot come right end with an error that names where, and leave their last good checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import log, stage_2
from torch import Tensor

from training import objective, train_tokenizer, train_transformer
from training.checkpoint import load_checkpoint, load_training_state
from training.losses import PICTURE_LOSSES
from training.watch import IN_A_ROW


@pytest.fixture
def arguments(data: Path, configs: Path, tmp_path: Path) -> list[str]:
    """A run of 40 steps into ``tmp_path/run`` with a checkpoint every fourth, whose codes start at step 2."""
    settings = ("steps=40", "checkpoint_every=4", "validate_every=5", "picture_every=40")
    options = [word for setting in settings for word in ("--set", f"training.{setting}")]
    base = [str(data), "--out", str(tmp_path / "run"), "--config", str(configs / "one.json")]
    return [*base, *options, "--set", "stage.warmup_fraction=0.05"]


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Tensor], Tensor]) -> None:
    """Change the pixel loss by the number of the step, from 1."""
    right = PICTURE_LOSSES["multiscale"]
    calls = iter(range(1, 1000))
    monkeypatch.setitem(PICTURE_LOSSES, "multiscale", lambda x, y: change(next(calls), right(x, y)))


def ends(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        train_tokenizer.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "change", "first"),
    [
        ("not a number", lambda step, loss: loss * (float("nan") if step > 13 else 1), 14),
        ("infinite", lambda step, loss: loss * (float("inf") if step > 21 else 1), 22),
        ("no gradient", lambda step, loss: loss + (loss * 0).sqrt() if step > 9 else loss, 10),
    ],
)
def test_no_finite_gradient(
    kind: str,
    change: Callable[[int, Tensor], Tensor],
    first: int,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a step on no gradient is finite (``sqrt`` at 0 has none, though the loss looks well): the run ends after ten
    such steps, names step, loss and learning rate, and keeps the checkpoint from before, which loads."""
    spoil(monkeypatch, change)
    error = ends(arguments, capsys)
    end, saved = first + IN_A_ROW - 1, (first - 1) // 4 * 4
    assert f"error: stopped at step {end}: 10 steps in a row had no finite gradient (loss " in error
    assert "learning rate 0.00" in error and "with --init" in error
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint'} of step {saved}" in error
    assert load_training_state(tmp_path / "run" / "checkpoint").step == saved
    assert all(v.isfinite().all() for v in load_checkpoint(tmp_path / "run" / "checkpoint").state_dict().values())


def test_single_steps_are_skipped(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few bad steps, not in a row, are left out, counted and shown, and the run goes on to its end."""
    spoil(monkeypatch, lambda step, loss: loss + (loss * 0).sqrt() if step in (7, 8, 23) else loss)
    train_tokenizer.main(arguments)
    printed = capsys.readouterr()
    assert "step 7: skipped, its gradient is not finite (loss " in printed.out and "step 23: skipped" in printed.out
    assert "3 of 40 steps were skipped" in printed.out and "3 steps skipped" in printed.err
    counts = {row["step"]: row.get("skipped", 0) for row in log(tmp_path / "run") if "train" in row}
    assert counts == {10: 2, 20: 2, 30: 3, 40: 3}
    assert load_training_state(tmp_path / "run" / "checkpoint").values["skipped"] == 3


def test_poisoned_codebook(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers that the optimizer never sees (moving averages of the codebook) are looked at before a checkpoint is
    replaced."""
    update = objective.perplexity
    calls = iter(range(3, 1000))

    def poison(codes: Tensor, size: int) -> Tensor:
        if next(calls) == 40:  # in the last step, which is saved whatever went before
            models[0].get_buffer("quantizer.embed_sum")[3, 1] = float("nan")
        return update(codes, size)

    models: list[torch.nn.Module] = []
    make = train_tokenizer.new_tokenizer
    monkeypatch.setattr(train_tokenizer, "new_tokenizer", lambda config: models.append(make(config)) or models[0])
    monkeypatch.setattr(objective, "perplexity", poison)
    error = ends(arguments, capsys)
    assert (
        "stopped at step 40: the model holds numbers that are not finite, in ['tokenizer.quantizer.embed_sum']" in error
    )
    assert load_training_state(tmp_path / "run" / "checkpoint").step == 36


def test_diverging_loss(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that stays far above what it was ends the run; a single outlier, and the step to codes, do not."""
    spoil(monkeypatch, lambda step, loss: loss * (1000 if step == 12 or step > 25 else 1))
    error = ends(arguments, capsys)
    assert "stopped at step 35: the loss diverges: in 10 steps in a row it was above 10 times its lowest mean" in error
    assert "of step 24;" in error and load_training_state(tmp_path / "run" / "checkpoint").step == 24


def test_before_the_first_checkpoint(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is wrong from the start says that there is no checkpoint, and leaves none."""
    spoil(monkeypatch, lambda step, loss: loss * float("nan"))
    assert "stopped at step 10: " in (error := ends(arguments, capsys)) and "there is no checkpoint yet" in error
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_collapsing_codebook(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Codes that are hardly used are said at each validation and end the run at the third in a row; the share of the
    codebook that must be used can be set."""
    error = ends([*arguments, "--set", "stage.min_perplexity=0.9"], capsys)
    assert (
        "stopped at step 15: at 3 validations in a row, the codebook collapses: the perplexity of the codes is" in error
    )
    assert "below 28.8, stage.min_perplexity 0.9 of 32 codes" in error
    shutil.rmtree(tmp_path / "run")
    train_tokenizer.main([*arguments, "--set", "stage.min_perplexity=0"])
    assert "collapses" not in capsys.readouterr().out


def test_labels_that_lack_images(
    first: Path, data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A label without a held-out image is named in a warning, since its training is right; one without an image to
    train on is an error, since the model would offer it untrained."""
    images = tmp_path / "images"
    shutil.copytree(data, images)
    (images / "rings").mkdir()
    for index in range(3):
        Image.fromarray(np.full((16, 16, 3), 70 * index, np.uint8)).save(images / "rings" / f"{index}.png")
    short = ["--set", "training.steps=2", "--set", "stage.val_fraction=0.02"]
    with pytest.warns(UserWarning, match="no image of rings is held out, so the validation loss says nothing of it"):
        train_transformer.main([*stage_2(images, configs, first, tmp_path / "one"), *short])
    for path in (images / "rings").iterdir():
        path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="unreadable"):
        train_transformer.main([*stage_2(images, configs, first, tmp_path / "two"), *short])
    assert "no training image of rings can be decoded" in capsys.readouterr().err
