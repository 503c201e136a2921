"""Run folders: one writer, what may change when a run is resumed, and runs that start from a checkpoint."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import log, losses, stage_2

from dvq_rt.files import OLD
from runtimes.errors import ConfigError
from training import train_tokenizer, train_transformer
from training.checkpoint import load_checkpoint, load_training_state, save_checkpoint
from training.data.folder import ImageFolder
from training.loop import TrainConfig
from training.models.blocks import shrunk
from training.run import open_run

HOLD = """
import sys
from training.data.folder import ImageFolder
from training.loop import TrainConfig
from training.run import open_run
with open_run(sys.argv[2], False, {"training": TrainConfig(steps=77)}, ImageFolder(sys.argv[1], 16), {}):
    print("held", flush=True)
    sys.stdin.read()
"""
"""Opens a run folder and stays in it until its standard input ends."""


def stage_1(data: Path, configs: Path, run: Path, *settings: str) -> list[str]:
    """Arguments of a run of 12 steps, whose codes start at step 3."""
    options = ("training.steps=12", "training.checkpoint_every=4", "training.validate_every=6", *settings)
    base = [str(data), "--out", str(run), "--config", str(configs / "one.json")]
    return [*base, *(word for option in options for word in ("--set", option))]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], main: object = train_tokenizer.main) -> str:
    """What a command says that ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)  # type: ignore[operator]
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def run(data: Path, configs: Path, tmp_path: Path) -> Path:
    """A finished run of 12 steps."""
    train_tokenizer.main(stage_1(data, configs, tmp_path / "run"))
    return tmp_path / "run"


# --- one writer ------------------------------------------------------------------------------------------------
@pytest.fixture
def holder(data: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the run folder ``tmp_path/run``, which has no checkpoint yet."""
    command = [sys.executable, "-c", HOLD, str(data), str(tmp_path / "run")]
    paths = os.pathsep.join(sys.path)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_one_writer(
    holder: subprocess.Popen[str], data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second training into a folder is refused by the other process's number and leaves its settings alone, also
    before the first checkpoint; once that process has died, however, nothing holds the folder."""
    run = tmp_path / "run"
    before = (run / "settings.json").read_bytes()
    for options in ([], ["--resume"]):
        error = refused(capsys, [*stage_1(data, configs, run), *options])
        assert f"{run} is being trained into by process {holder.pid} on " in error and "another --out" in error
    assert (run / "settings.json").read_bytes() == before and json.loads(before)["training"]["steps"] == 77
    holder.kill()
    holder.wait()
    assert f"process {holder.pid} on" in (run / "lock").read_text()  # it died without a word
    train_tokenizer.main(stage_1(data, configs, run))
    assert json.loads((run / "settings.json").read_text())["training"]["steps"] == 12
    assert (run / "lock").read_text() == ""


def test_one_writer_in_one_process(data: Path, tmp_path: Path) -> None:
    """Two threads of one program cannot train into one folder either, and a run that fails gives it back."""
    images, settings = ImageFolder(data, 16), {"training": TrainConfig()}
    again = open_run(tmp_path / "run", True, settings, images, {})
    message = f"trained into by process {os.getpid()}"
    with open_run(tmp_path / "run", False, settings, images, {}), pytest.raises(ConfigError, match=message), again:
        pass
    with pytest.raises(KeyError), open_run(tmp_path / "run", False, settings, images, {}):
        raise KeyError
    with open_run(tmp_path / "run", False, settings, images, {}) as (folder, resumed):
        assert folder == tmp_path / "run" and not resumed


# --- settings --------------------------------------------------------------------------------------------------
def test_runs_are_not_mixed(
    run: Path, data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is neither started over, also not when a crash left only its old checkpoint, nor resumed with other
    settings, which are named; it stays as it was."""
    before, base = log(run), stage_1(data, configs, run)
    (run / "checkpoint").rename(run / f".checkpoint.{OLD}")
    assert "already holds a run; add --resume to go on with it" in refused(capsys, base)
    assert (run / "checkpoint").exists()
    error = refused(capsys, [*base, "--resume", "--set", "training.lr=0.5", "--set", "stage.exclude=[]"])
    assert "was started with other settings: training.lr 0.004, not 0.5; resume with the same ones" in error
    settings = json.loads((run / "settings.json").read_text())
    settings["stage"]["lambda"] = 3  # of a later version
    (run / "settings.json").write_text(json.dumps(settings))
    assert "was started with other settings" in refused(capsys, [*base, "--resume"])
    (run / "settings.json").write_text("[" * 100_000)
    assert "settings.json cannot be read" in refused(capsys, [*base, "--resume"])
    assert log(run) == before


def test_older_runs_go_on(run: Path, data: Path, configs: Path) -> None:
    """A run from before a field existed counts as one with its default; it needs no list of its images."""
    settings = json.loads((run / "settings.json").read_text())
    for section, name in (("tokenizer", "entropy_low"), ("stage", "exclude"), ("stage", "min_perplexity")):
        del settings[section][name]
    (run / "settings.json").write_text(json.dumps(settings))
    (run / "images.jsonl").unlink()
    before = log(run)
    train_tokenizer.main([*stage_1(data, configs, run), "--resume"])
    assert log(run) == before


def test_more_steps_and_other_intervals(
    run: Path, data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run takes more steps: what it had logged stays, the learning rate follows the longer schedule, and
    that is said. Steps that would move the start of the codes behind the checkpoint, or are fewer than it has, are
    refused."""
    before, base = log(run), stage_1(data, configs, run)
    capsys.readouterr()
    longer = ["--resume", "--set", "training.steps=20", "--set", "training.checkpoint_every=7"]
    train_tokenizer.main([*base, *longer])
    printed = capsys.readouterr().out
    rate = TrainConfig(steps=20, lr=0.004, warmup=5).rate(12)
    assert (
        f"training.steps 20 instead of 12: from step 12 on the learning rate follows the new schedule ({rate:.3g}"
        in (printed)
    )
    assert "training.checkpoint_every 7 instead of 4, which changes no weight" in printed
    assert log(run)[: len(before)] == before and log(run)[-1]["step"] == 20
    assert load_training_state(run / "checkpoint").step == 20
    train_tokenizer.main([*base, *longer])  # the new settings are those of the run now
    assert "instead of" not in capsys.readouterr().out
    error = refused(capsys, [*base, "--resume", "--set", "training.steps=200"])
    assert "has taken 20 of 20 steps; with training.steps 200 what starts at {'codes': 5} would start at" in error
    error = refused(capsys, [*base, "--resume", "--set", "training.steps=19"])
    assert "training.steps is 19, but" in error and "has taken 20 already" in error


def test_other_intervals_change_no_weight(run: Path, data: Path, configs: Path, tmp_path: Path) -> None:
    """An interrupted run that goes on with other intervals ends with the weights of an uninterrupted one."""
    whole = load_file(run / "checkpoint" / "model.safetensors")
    short = stage_1(data, configs, tmp_path / "other", "training.checkpoint_every=5")
    shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoint")
    shutil.copytree(run / "best", tmp_path / "other" / "checkpoint")  # of step 6 or 12
    train_tokenizer.main([*short, "--resume"])
    got = load_file(tmp_path / "other" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(got[name], whole[name]) for name in whole)


# --- inputs ----------------------------------------------------------------------------------------------------
def test_images_that_came_in(
    run: Path, data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Further images are trained on from where the run stands, and that is said; images that are gone, have another
    class or another side of the split are refused by name."""
    more = tmp_path / "more"
    shutil.copytree(data, more)
    (more / "rings").mkdir()
    shutil.copy(more / "discs" / "01.png", more / "rings" / "a.png")
    base = [*stage_1(more, configs, run, "training.steps=14"), "--resume"]
    capsys.readouterr()
    train_tokenizer.main(base)
    assert "resumed with 1 more images than before: they are drawn from step 12 on" in capsys.readouterr().out
    assert log(run)[-1]["step"] == 14
    (more / "rings").rename(more / "round")
    error = refused(capsys, base)
    assert f"was not started with the images that {more} holds now: 1 are gone (rings/a.png)" in error
    (more / "round").rename(more / "rings")
    rows = (run / "images.jsonl").read_text()
    assert '["bars/00.png", "bars", "train"]' in rows
    (run / "images.jsonl").write_text(rows.replace('"bars/00.png", "bars", "train"', '"bars/00.png", "bars", "val"'))
    (more / "rings" / "b.png").write_bytes((more / "rings" / "a.png").read_bytes())
    assert "1 have changed their class or whether they are held out (bars/00.png)" in refused(capsys, base)
    (run / "images.jsonl").unlink()
    error = refused(capsys, base)
    assert (
        "was not started with the images" in error and "images.jsonl, where those are listed, cannot be read" in error
    )


def test_what_stage_two_does_not_go_on_with(
    first: Path, second: Path, data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stage 2 has no label for a class that came in, and no use for codes of another tokenizer, even of the same
    sizes."""
    more = tmp_path / "more"
    shutil.copytree(data, more)
    (more / "rings").mkdir()
    shutil.copy(more / "discs" / "01.png", more / "rings" / "a.png")
    other = load_checkpoint(first / "best")
    assert other.tokenizer is not None
    other.tokenizer.entropy_thresholds += 1e-3
    save_checkpoint(other, tmp_path / "other")
    two = [*stage_2(data, configs, first, second), "--resume"]
    error = refused(capsys, [*two, "--tokenizer", str(tmp_path / "other")], train_transformer.main)
    assert f"was not started with the tokenizer that {tmp_path / 'other'} holds now" in error
    error = refused(capsys, [str(more), *two[1:]], train_transformer.main)
    assert "the classes rings have come in, which the model has no labels for" in error


# --- init ------------------------------------------------------------------------------------------------------
def test_fine_tuning_stage_one(
    first: Path, run: Path, data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that starts from a checkpoint starts where that ended, uses its codebook from the first step on, resumes
    with the same option only, and does not begin with a model of other sizes."""
    start, tuned = ["--init", str(first / "best")], tmp_path / "tuned"
    base = stage_1(data, configs, tuned, "training.lr=0.0001")
    train_tokenizer.main([*base, *start])
    assert losses(tuned, "perplexity") and losses(tuned, "picture")[0] < 0.7 * losses(run, "picture")[0]
    one, two = (load_checkpoint(folder / "best").tokenizer for folder in (first, tuned))
    assert one is not None and two is not None
    moved = (one.quantizer.codebook - two.quantizer.codebook).norm() / one.quantizer.codebook.norm()
    assert 0 < moved < 0.2  # a codebook of its own would be another one
    assert "was started with --init; resume with the same" in refused(capsys, [*base, "--resume"])
    error = refused(capsys, [*base, "--resume", "--init", str(run / "best")])
    assert f"was not started with the init that {run / 'best'} holds now" in error
    train_tokenizer.main([*base, *start, "--resume"])
    other = stage_1(data, configs, tmp_path / "other", "tokenizer.code_dim=4")
    error = refused(capsys, [*other, *start])
    assert f"the tokenizer of {first / 'best'} does not fit" in error and "codebook (32, 8) instead of (32, 4)" in error
    assert f"{tmp_path} is no checkpoint folder" in refused(capsys, [*base, "--init", str(tmp_path)])


@pytest.mark.parametrize(("sizes", "trained"), [("one", "first"), ("masked", "adversarial")])
def test_decoders_that_learn_alone(
    sizes: str,
    trained: str,
    data: Path,
    configs: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Images keep their codes to the bit while the decoder learns, which may be of another size than before, and make
    larger images."""
    start = request.getfixturevalue(trained) / "best"
    base = [str(data), "--config", str(configs / f"{sizes}.json"), "--set", "stage.learns=decoder"]
    base += ["--set", "training.steps=3", "--out"]
    before = load_checkpoint(start).tokenizer
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, width in (("same", 16), ("wide", 24)):
        size = ["--set", f"tokenizer.decoder_channels={width}"]
        train_tokenizer.main([*base, str(tmp_path / name), "--init", str(start), *size])
        assert ("the decoder of" in capsys.readouterr().out) == (name == "wide")
        tuned = load_checkpoint(tmp_path / name / "best").tokenizer
        assert before is not None and tuned is not None
        old, new = before.state_dict(), tuned.state_dict()
        ahead = [key for key in old if not key.startswith(tuned.behind_codes)]
        assert ahead and all(torch.equal(old[key], new[key]) for key in ahead)
        (codes, grain), now = before.encode_maps(images), tuned.encode_maps(images)
        assert torch.equal(codes, now[0]) and torch.equal(grain, now[1])
        assert not torch.equal(before.decode_maps(codes), tuned.decode_maps(codes))
    large = [
        "tokenizer.image_size=32",
        "tokenizer.shrink=2",
        f"tokenizer.decoder_mult={[1, *tuned.config.decoder_mult]}",
    ]
    sizes_of_large = [word for setting in large for word in ("--set", setting)]
    train_tokenizer.main([*base, str(tmp_path / "large"), "--init", str(start), *sizes_of_large])
    count = re.search(r"(\d+) of (\d+) weights start anew", capsys.readouterr().out)
    assert count and int(count[1]) < int(count[2])  # all but the finest level have their sizes
    tuned = load_checkpoint(tmp_path / "large" / "best").tokenizer
    assert tuned is not None
    big = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (codes, grain), now = before.encode_maps(shrunk(big, 2)), tuned.encode_maps(big)
    assert torch.equal(codes, now[0]) and torch.equal(grain, now[1])
    assert "needs the codes of a tokenizer" in refused(capsys, [*base, str(tmp_path / "none")])
    # the decoder of another tokenizer, kept where next to nothing is learned
    other = ["--init-decoder", str(tmp_path / "wide" / "best")]
    still = ["--set", "training.lr=1e-9", *size, *other]
    train_tokenizer.main([*base, str(tmp_path / "taken"), "--init", str(start), *still])
    taken, wide = (load_checkpoint(tmp_path / name / "best").tokenizer for name in ("taken", "wide"))
    assert taken is not None and wide is not None
    own = taken.state_dict()
    assert all((own[f"decoder.{key}"] - value).abs().max() < 1e-6 for key, value in wide.decoder.state_dict().items())
    assert torch.equal(before.encode_maps(images)[0], taken.encode_maps(images)[0])
    all_learn = [
        str(data),
        "--config",
        str(configs / f"{sizes}.json"),
        "--init",
        str(start),
        "--out",
        str(tmp_path / "no"),
    ]
    assert "is for stage.learns=decoder, not all" in refused(capsys, [*all_learn, *other])


def test_fine_tuning_stage_two(
    first: Path, second: Path, data: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The transformer of a checkpoint is trained on, where its sizes and layout fit; another tokenizer is said."""
    short = ["--set", "training.steps=10", "--set", "training.lr=0.0001"]
    start = ["--init", str(second / "best")]
    train_transformer.main([*stage_2(data, configs, first, tmp_path / "tuned"), *short, *start])
    assert losses(tmp_path / "tuned")[0] < 0.7 * losses(second)[0]
    assert "codes of another tokenizer" not in capsys.readouterr().out
    for options, words in (
        (["--set", "transformer.width=16"], f"the transformer of {second / 'best'} does not fit"),
        (["--set", "stage.order=region-first"], "has the layout TokenLayout("),
        (["--init", str(first / "best")], "holds stage 1 only"),
    ):
        arguments = [*stage_2(data, configs, first, tmp_path / "other"), *short, *start, *options]
        assert words in refused(capsys, arguments, train_transformer.main)
    other = load_checkpoint(first / "best")
    assert other.tokenizer is not None
    other.tokenizer.entropy_thresholds += 1e-3
    save_checkpoint(other, tmp_path / "first" / "best")
    train_transformer.main([*stage_2(data, configs, tmp_path / "first", tmp_path / "far"), *short, *start])
    assert "was trained on the codes of another tokenizer" in capsys.readouterr().out
    labels = ('stage.labels={"": ["*"]}', 'stage.labels.bars=["bars"]')  # discs have none
    some = [word for setting in (*labels, "stage.given=0.3") for word in ("--set", setting)]
    train_transformer.main([*stage_2(data, configs, first, tmp_path / "some"), *short, *start, *some])
    assert "the labels ['discs'] of" in capsys.readouterr().out
    assert losses(tmp_path / "some")[0] < 0.7 * losses(second)[0]
    assert load_checkpoint(tmp_path / "some" / "best").class_names == ("bars",)
