"""What the commands of training refuse, and what thresholds does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_models import TOKENIZER, small_model
from small_runs import STEPS, stage_2

from dvq_rt.files import read_dataclass
from training import cli, thresholds, train_tokenizer, train_transformer
from training.checkpoint import (
    Model,
    family_config,
    load_checkpoint,
    load_training_state,
    save_checkpoint,
)
from training.config import CONFIGS, read_config
from training.data.folder import ImageFolder
from training.data.pixels import to_float
from training.loop import TrainConfig
from training.models.dqvae import DQVAE
from training.models.router import patch_entropy
from training.models.tokenizer import Reconstruction
from training.models.transformer import TransformerConfig
from training.prompts import TextSettings


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "training.step=3"], "unknown fields ['step']; there are ['accumulate', 'batch_size'"),
        (["--set", "training.steps=many"], "steps is 'many'; it must be of type int"),
        (["--set", "training.steps=2.5"], "steps is 2.5; it must be of type int"),
        (["--set", "training.steps=0"], "training.steps is 0; it must be at least 1"),
        (["--set", "training.lr=0"], "must be positive"),
        (["--set", "training.lr=Infinity"], "lr is inf; it must be of type float"),
        (["--set", "training.clip=NaN"], "clip is nan; it must be of type float"),
        (["--set", "training.weight_decay=1" + "0" * 400], "weight_decay is 1000"),
        (["--set", "training.steps=1" + "0" * 400], "training.steps is 1000"),
        (["--set", "stage.quantizer_weight=-0.1"], "stage.quantizer_weight is -0.1; it must be in 0..1e+09"),
        (["--set", "stage.min_perplexity=1"], "stage.min_perplexity is 1; it must be in [0, 1)"),
        (["--set", "tokenizer.beta=-Infinity"], "beta is -inf; it must be of type float"),
        (["--set", "tokenizer.entropy_low=0.5"], "tokenizer.entropy_low is 0.5; it must be -1 or 0"),
        (["--set", "training.seed=" + "[" * 9000], "seed is '[[[["),
        (["--set", "training.steps.many=3"], "steps is 80, which has no keys; set it whole"),
        (["--set", "training=3"], "'training=3' is not SECTION.FIELD=VALUE"),
        (["--set", 'tokenizer.family=["dq"]'], "family is ['dq']; it must be one of"),
        (["--set", 'stage.exclude=["squares"]'], "exclude names squares, which"),
        (["--set", "training.flip=1"], "flip is 1; it must be of type bool"),
        (["--set", "training.betas=[0.9]"], "betas is [0.9]; it must be of type tuple[float, float]"),
        (["--set", 'training.betas=[0.9, "b"]'], "betas is [0.9, 'b']; it must be of type"),
        (["--set", "training.betas=[0.9, 1]"], "training.betas is (0.9, 1); it must be two numbers"),
        (["--set", "training.seed=-1"], "training.seed is -1; it must be in 0..2^63 - 1"),
        (["--set", "training.seed=9223372036854775808"], "it must be in 0..2^63 - 1"),
        (["--set", "tokenizer.norm_groups=0"], "tokenizer.norm_groups is 0; it must be positive integers"),
        (["--set", "tokenizer.codebook_size=0"], "tokenizer.codebook_size is 0"),
        (["--set", "tokenizer.blocks=-1"], "tokenizer.blocks is -1"),
        (["--set", "tokenizer.encoder_mult=[1, 1, 0]"], "tokenizer.encoder_mult is (1, 1, 0)"),
        (["--set", 'tokenizer.decoder_mult=["a", 1]'], "decoder_mult is ['a', 1]; it must be of type tuple[int, ...]"),
        (["--set", "tokenizer.image_size=8"], "tokenizer.image_size is 8; it must be at least 11, the window of SSIM"),
        (["--set", "steps=3"], "override 'steps=3' is not SECTION.FIELD=VALUE"),
        (["--set", "model.steps=3"], "is not SECTION.FIELD=VALUE with a section of ['stage', 'tokenizer', 'training']"),
        (["--set", "training.steps"], "override 'training.steps' is not SECTION.FIELD=VALUE"),
        (["--set", "tokenizer.image_size=18"], "tokenizer.image_size is 18; it must be a multiple of 4"),
        (["--set", "tokenizer.family=vq"], "family is 'vq'; it must be one of ['dq', 'mq']"),
        (["--config", "masked.json", "--set", "tokenizer.kept_ratio=0"], "tokenizer.kept_ratio is 0; it must be at"),
        (["--config", "masked.json", "--set", "tokenizer.scorer=best"], "tokenizer.scorer is 'best'; it must be one"),
        (["--set", "stage.warmup_fraction=1"], "stage.warmup_fraction is 1; it must be in [0, 1)"),
        (["--set", "stage.adversarial_weight=-1"], "stage.adversarial_weight is -1; it must be in 0..1e+09"),
        (["--set", "stage.adversarial_weight=Infinity"], "adversarial_weight is inf; it must be of type float"),
        (["--set", "stage.adversarial_start=1"], "stage.adversarial_start is 1; it must be in [0, 1)"),
        (["--set", "stage.discriminator_width=0"], "stage.discriminator_width is 0; it must be in 1..65536"),
        (["--set", "stage.discriminator_layers=0"], "stage.discriminator_layers is 0; it must be in 1..16"),
        (
            ["--set", "stage.adversarial_weight=0.75"],
            "stage.discriminator_layers is 3, which needs images of 24 px; these have 16, use fewer layers",
        ),
        (["--config", "nonesuch"], "give a JSON file or one of ['dq_class_transformer'"),
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


def test_truncated_images_and_no_labels(
    first: Path, data: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files cut short, in training and held out, are left out with a warning; and one label "" of every sub-folder
    trains an unconditional model. Before quantization the pictures are what the network makes without a codebook."""
    images = tmp_path / "images"
    shutil.copytree(data, images)
    folder = ImageFolder(images, 16, val_fraction=0.1)
    for path in (folder.paths[folder.train[0]], folder.paths[folder.val[0]]):
        path.write_bytes(path.read_bytes()[:60])
    short = ["--set", "training.steps=3", "--set", "training.picture_every=1"]
    base = [str(images), "--out", str(tmp_path / "one"), "--config", str(configs / "one.json"), *short]
    quantized: list[bool] = []
    forward = DQVAE.forward

    def watched(vae: DQVAE, x: torch.Tensor, *, quantize: bool = True) -> Reconstruction:
        quantized.extend([] if vae.training else [quantize])
        return forward(vae, x, quantize=quantize)

    monkeypatch.setattr(DQVAE, "forward", watched)
    with pytest.warns(UserWarning, match="unreadable image"):
        train_tokenizer.main([*base, "--set", "stage.warmup_fraction=0.67"])
    assert quantized[0] is False and quantized[-1] is True
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
        (
            ["--set", 'stage.labels={"": ["bars"], "round": ["discs"]}', "--set", "stage.label_dropout=0"],
            '"" (images without a label) needs the null label, a stage.label_dropout above 0',
        ),
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


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_configs_of_the_package(path: Path) -> None:
    """The configuration files in the package fit the code that reads them."""
    if "tokenizer" in path.stem:
        sections = {"tokenizer": dict, "training": TrainConfig, "stage": train_tokenizer.StageOneConfig}
        sizes = read_config(path.stem, sections, [])["tokenizer"]
        family = family_config(sizes.pop("family", "dq"))
        assert read_dataclass(family, sizes, path.stem, defaults=True) != TOKENIZER
        return
    config = read_config(path.stem, train_transformer.SECTIONS, ["training.steps=7"])
    assert config["training"].steps == 7
    assert (
        config["stage"].defaults.get("guidance", 1) > 1 or not config["stage"].label_dropout
    )  # the published have none
    read_dataclass(TransformerConfig, config["transformer"], path.stem, defaults=True)
    read_dataclass(TextSettings, config["text"], path.stem, defaults=True)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (SafetensorError("I/O error"), "I/O error"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_the_machine_refuses(error: Exception, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk or memory is one line and exit status 2, not a traceback."""

    @cli.guarded
    def command(argv: list[str] | None) -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {words}\n"


def in_another_process(code: str, encoding: str = "utf-8", **options: Any) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, **options)


def test_consoles_that_lack_a_character() -> None:
    """A path that the console cannot show is shown as far as it can be; a name that is no text at all too."""
    code = "from training.cli import guarded; guarded(lambda _: print('caf\\xe9 \\u6f22 \\udcff'))()"
    with in_another_process(code, "cp1252", stdout=subprocess.PIPE) as process:
        out, error = process.communicate()
    assert (process.returncode, out.split(), error) == (0, ["caf\xe9".encode("cp1252"), b"?", b"?"], b"")


def test_readers_that_leave() -> None:
    """Output into a pipe that nobody reads any more ends quietly."""
    code = "from training.cli import guarded; guarded(lambda _: [print('x' * 9999) for _ in range(99)])()"
    read, write = os.pipe()
    os.close(read)
    with in_another_process(code, stdout=write) as process:
        os.close(write)
        assert process.stderr is not None and process.stderr.read() == b""
    assert process.returncode == cli.BROKEN_PIPE


def test_windowed_programs(data: Path, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no standard output and error, as under pythonw, both stages train and validate all the same."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    short = [word for name in ("steps", "validate_every", "picture_every") for word in ("--set", f"training.{name}=3")]
    config = ["--config", str(configs / "one.json")]
    train_tokenizer.main([str(data), "--out", str(tmp_path / "one"), *config, *short])
    two = stage_2(data, configs, tmp_path / "one", tmp_path / "two")
    train_transformer.main([*two, *short, "--set", "stage.min_psnr=0"])
    assert load_training_state(tmp_path / "two" / "checkpoint").step == 3
    with pytest.raises(SystemExit) as stopped:
        train_transformer.main([*two, *short])
    assert stopped.value.code == 2
