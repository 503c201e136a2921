"""Runs resume exactly, checkpoints survive crashes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import small_model
from small_runs import Command, check_events, log, stage_2

from dvq_rt import files
from training import train_tokenizer, train_transformer
from training.checkpoint import (
    TrainingState,
    load_checkpoint,
    load_training_state,
    save_checkpoint,
)
from training.loop import TrainConfig


class Crash(BaseException):
    """Stands for a power cut, which nothing catches."""


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
    each time: the same log and events, the same weights and optimizer state to the bit, through the start of the
    codebook, augmentation, dropout and the first steps of a discriminator (its weights and its optimizer's too)."""
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
            patch.setattr(files, "sync", lambda path: crash() if path == tmp_path else None)
        else:
            rename = Path.rename
            culprit = "checkpoint" if moment == "before the swap" else f".checkpoint.{files.NEW}"
            patch.setattr(Path, "rename", lambda p, to: crash() if p.name == culprit else rename(p, to))
        with pytest.raises(Crash):
            save_checkpoint(models[1], folder, TrainingState(2))

    def holds(index: int) -> bool:
        weights = load_checkpoint(folder).state_dict()
        same = all(torch.equal(weights[k], v) for k, v in models[index].state_dict().items() if not v.isnan().any())
        return same and load_training_state(folder).step == index + 1

    assert holds(1 if moment == "after the swap" else 0)
    save_checkpoint(models[2], folder, TrainingState(3))
    assert holds(2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
