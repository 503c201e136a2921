"""The judge of an engine, on a random one and drawn images."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import VARIANTS, masked_model, small_model

import training.judging.engine
from dvq_rt import Generator
from dvq_rt.layout import TokenLayout
from export.to_onnx import export_onnx
from runtimes.errors import ConfigError, DataError, InputError
from training import compare
from training.checkpoint import Model, save_checkpoint
from training.config import read_config
from training.data.folder import ImageFolder
from training.data.pixels import to_float
from training.data.stream import Augment
from training.evaluate import main
from training.judging.classifier import Classifier, Judge, balanced, degrade, train_classifier
from training.judging.engine import open_data, train_judge
from training.judging.metrics import (
    accuracy,
    diversity,
    memorisation,
    nearest_features,
    nearest_pixels,
    spreads,
)
from training.judging.report import report, save_picture, sheet
from training.loop import TrainConfig
from training.models.dqvae import DQVAE, DQVAEConfig
from training.models.text import TextConfig
from training.models.transformer import StackedTransformer, TransformerConfig
from training.train_transformer import StageTwoConfig

NAMES = ("squares", "bars", "dots")  # not sorted, so that an order taken from elsewhere would show
FOLDERS = {"squares": ["a", "b"], "bars": ["c"], "dots": ["d"]}


def drawing(folder: str, rng: np.random.Generator) -> np.ndarray:
    """uint8 [16, 16, 3]: a square, a bar or four dots of a colour of its own on white."""
    image = np.full((16, 16, 3), 255, np.uint8)
    y, x = rng.integers(1, 8, 2)
    colour = rng.integers(0, 180, 3)
    if folder in "ab":
        image[y : y + 7, x : x + 7] = colour
    elif folder == "c":
        image[y : y + 3] = colour
    else:
        image[y : y + 8 : 4, x : x + 8 : 4] = colour
    return image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for folder in "abcd":
        (root / folder).mkdir()
        for i in range(20):
            Image.fromarray(drawing(folder, rng)).save(root / folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "two.json"
    stage = {"labels": dict(sorted(FOLDERS.items())), "flip_exclude": ["bars"], "val_fraction": 0.2}
    path.write_text(json.dumps({"training": {"shift": 1, "flip": True}, "stage": stage}))
    return path


@pytest.fixture(scope="module")
def folder(data: Path) -> ImageFolder:
    return ImageFolder(data, 16, val_fraction=0.2, labels=FOLDERS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "mini"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"channels": 16, "encoder_mult": (1, 1, 2), "decoder_channels": 16, "decoder_mult": (2, 1)}
        vae = DQVAE(DQVAEConfig(16, **sizes, z_channels=16, code_dim=8, codebook_size=32, norm_groups=8))
        vae.entropy_thresholds.fill_(1.0)
        vae.quantizer.codebook.normal_()
        layout = TokenLayout(32, vae.config.sides, classes=3, null_label=True)
        config = TransformerConfig(width=32, heads=4, position_blocks=1, content_blocks=1, block_size=layout.max_length)
        model = Model(vae, StackedTransformer(config, layout), NAMES, {"temperature": 0.8, "guidance": 1.5})
    export_onnx(model, path)
    return path


def test_evaluate_writes_numbers_pictures_and_a_table(
    engine: Path, data: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "result"
    arguments = [str(engine), str(data), "--out", str(out), "--config", str(config), "--n", "3"]
    main([*arguments, "--classifier-steps", "40", "--number", "12"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out)
    assert any(line.startswith("| squares | ") for line in printed)
    pictures = {"samples.png", "reconstructions.png", "grain.png", "nearest.png"}
    assert {path.name for path in out.iterdir()} == {*pictures, "evaluation.json"}
    assert all(Image.open(out / name).width > 300 for name in pictures)

    values = json.loads((out / "evaluation.json").read_text())
    manifest = json.loads((engine / "manifest.json").read_text())
    assert values["settings"]["engine"]["files"] == manifest["files"]
    assert values["params"]["temperature"] == 0.8 and values["params"]["guidance"] == 1.5
    samples = values["accuracy"]["samples"]
    assert samples["count"] == 9 and {row["count"] for row in samples["labels"].values()} == {3}
    assert values["accuracy"]["held_out"]["share"] > 0.6  # chance is a third
    assert values["cost"]["samples"]["fixed_codes"] == 64
    assert 16 <= values["cost"]["samples"]["codes"] <= 64
    assert len(values["memorisation"]["closest"]) == 9
    keys = {"samples", "held_out", "copies", "closer", "copy_like", "copies_found"}
    assert set(values["memorisation"]["pixels"]) == set(values["memorisation"]["features"]) == keys


def test_models_side_by_side(
    engine: Path, data: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects ``training.compare``: an engine and a checkpoint of the other family that reads prompts in one run, each
    with its own number of codes and labels, distances beside that of held-out images; a third one that makes larger
    images; and what cannot be compared."""
    save_checkpoint(masked_model(("dots", "bars"), text=TextConfig(16, 256, 1)), tmp_path / "new")
    save_checkpoint(small_model(("dots", "bars"), sizes=VARIANTS["shrunk"]), tmp_path / "large")
    out = tmp_path / "out"
    models = [f"old={engine}", *(f"{name}={tmp_path / name}" for name in ("new", "large"))]
    arguments = [str(data), *models, "--config", str(config), "--out", str(out)]
    few = ["--n", "2", "--number", "6", "--images", "12", "--classifier-steps", "2"]
    compare.main([*arguments, *few])
    printed = capsys.readouterr().out
    assert printed.strip().endswith(str(out)) and (out / "compare.md").read_text().strip() in printed
    assert {path.name for path in out.iterdir()} == {"compare.md", "compare.json", "codes.png", "samples.png"}
    values = json.loads((out / "compare.json").read_text())
    assert values["reconstruction"]["new"]["codes"] == 25 and values["reconstruction"]["old"]["fixed_codes"] == 64
    for name, size in (("old", 16), ("new", 16), ("large", 32)):
        row = values["reconstruction"][name]
        assert row["image_size"] == size and set(row["at"]) == {"16", "32"}
        assert row["at"]["16"]["psnr"] != row["at"]["32"]["psnr"]
    samples = values["labels"]["samples"]
    assert samples["new"]["labels"]["squares"] == {"share": None, "count": 0} and samples["old"]["count"] == 6
    assert values["shared"]["labels"] == ["bars", "dots"]
    sets = values["shared"]["sets"]
    assert set(values["captions"]["sets"]) == {"held-out images", "new"}
    assert (
        set(sets) == {"held-out images", "old", "new", "large"} and len({row["images"] for row in sets.values()}) == 1
    )
    assert set(values["nearest"]["old"]) == {"pixels", "features"}
    labels = 'stage.labels={"dots": ["d"], "squares": ["a"]}'
    with pytest.raises(SystemExit):
        compare.main([*arguments, *few, "--set", labels, "--set", "stage.flip_exclude=[]"])
    assert "has the labels" in capsys.readouterr().err


def test_sweep_covers_the_grid(
    engine: Path,
    data: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(training.judging.engine.SWEEP, "temperature", (0.5,))
    arguments = [str(engine), str(data), "--out", str(tmp_path), "--config", str(config), "--classifier-steps", "2"]
    main([*arguments, "--sweep", "2"])
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert {(row["guidance"], row["top_k"]) for row in rows} == {(g, k) for g in (1, 1.5, 2, 2.5) for k in (None, 100)}
    assert [row["min"] for row in rows] == sorted((row["min"] for row in rows), reverse=True)
    assert all(row["labels"][row["worst_label"]] == row["min"] <= row["mean"] for row in rows)
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path)


def test_split_and_labels_are_those_of_training(engine: Path, data: Path, config: Path, folder: ImageFolder) -> None:
    sections = {"training": TrainConfig, "stage": StageTwoConfig}
    values = read_config(config, sections, [])
    opened, stage = open_data(Generator(engine), data, values["training"], values["stage"])
    assert opened.classes == list(NAMES)  # the engine's order, although the configuration has another
    trained = ImageFolder(data, 16, val_fraction=0.2, labels=values["stage"].labels)
    assert {opened.relative(int(i)) for i in opened.val} == {trained.relative(int(i)) for i in trained.val}
    assert stage.flip_exclude == ("bars",)
    rest = replace(values["stage"], labels={"squares": ["a"], "bars": ["c"], "dots": ["d"], "": ["*"]})
    opened, _ = open_data(Generator(engine), data, values["training"], rest)
    assert opened.classes == [*NAMES, ""] and (opened.labels == 3).sum() == 20  # what has none of the labels


def test_the_judge_knows_every_class(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells all sub-folders apart, those of no label too, has seen none of what is held out, and mirrors no class
    whose label is not mirrored."""
    stage = StageTwoConfig(labels={"squares": ["a", "b"], "dots": ["d"]}, flip_exclude=("squares",), val_fraction=0.2)
    folder, seen = ImageFolder(data, 16, val_fraction=0.2, labels=stage.labels), []
    monkeypatch.setattr(
        "training.judging.engine.train_classifier",
        lambda every, steps, augment, seed: (seen.append((every, augment)), Classifier(4))[1],
    )
    judge = train_judge(folder, TrainConfig(flip=True), stage, ("dots", "squares"), 1)
    assert len(judge.nets) == len(seen) == 3
    every, augment = seen[0]
    assert every.classes == list("abcd") and judge.label_of.tolist() == [1, 1, -1, 0]
    assert augment.flip_exclude == {"a", "b"}
    held = {folder.relative(int(i)) for i in folder.val}
    names = {every.relative(int(i)) for i in every.train}
    assert held and not held & names and len(names) == 80 - len(held)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "0"], "--n is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--classifier-steps", "0"], "--classifier-steps is 0"),
        (["--sweep", "0"], "--sweep is 0"),
        (["--set", 'stage.labels={"cats": ["a"]}', "--set", "stage.flip_exclude=[]"], "has the labels"),
        (["--set", "stage.val_fraction=0"], "held out"),
        (["--config", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_name_the_way_out_and_write_nothing(
    arguments: list[str],
    message: str,
    engine: Path,
    data: Path,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main([str(engine), str(data), "--out", str(out), "--config", str(config), *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not out.exists()


def test_wrong_engines_and_folders(engine: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, stage = Generator(engine), StageTwoConfig(labels=FOLDERS)
    with pytest.raises(DataError, match="does not exist"):
        open_data(generator, tmp_path / "none", TrainConfig(), stage)
    with pytest.raises(ConfigError, match="--config"):  # without a mapping every sub-folder is a label
        open_data(generator, data, TrainConfig(), StageTwoConfig())
    monkeypatch.setattr(Generator, "class_names", ())
    with pytest.raises(InputError, match="have no names"):
        open_data(generator, data, TrainConfig(), stage)


def test_classifier_is_small_reproducible_and_leaves_the_random_state(folder: ImageFolder) -> None:
    assert 2.5e5 < sum(p.numel() for p in Classifier(10).parameters()) < 3.5e5
    before = torch.random.get_rng_state()
    first, second = (train_classifier(folder, 3, Augment(shift=1)) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    images, _ = folder.load(folder.val)
    judges = [Judge((net,), np.arange(3), 16) for net in (first, second)]
    assert np.array_equal(judges[0](images).features, judges[1](images).features)
    other = train_classifier(folder, 3, Augment(shift=1), seed=1)
    both = Judge((first, other), np.arange(3), 16)(images)
    logits = [net(to_float(images))[0].log_softmax(1) for net in (first, other)]
    assert both.labels.tolist() == (logits[0] + logits[1]).argmax(1).tolist()
    assert np.array_equal(both.features, judges[0](images).features)
    seen = first(to_float(folder.load(folder.train)[0]))[1]
    assert seen.mean(0).abs().max() < 1e-3 and seen.std(0, correction=0).max() == pytest.approx(1, abs=1e-3)
    assert judges[0](images[:0]).features.shape == (0, judges[0](images).features.shape[1])
    with pytest.raises(ConfigError, match="at least 1"):
        train_classifier(folder, 0, Augment())


def test_labels_are_drawn_alike_from_training_images_only(folder: ImageFolder) -> None:
    drawn = balanced(folder)
    assert len(set(np.bincount(folder.labels[drawn]).tolist())) == 1
    assert set(drawn.tolist()) == set(folder.train.tolist())


def test_degrade_blurs_without_moving_the_mean() -> None:
    flat = torch.full((4, 3, 16, 16), 0.5)
    assert (degrade(flat) - flat).abs().max() < 0.6 and (degrade(flat) - flat).abs().mean() > 0.001


def test_nearest_pixels_sees_through_shifts_and_mirrors() -> None:
    rng = np.random.default_rng(1)
    training = rng.integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    moved = np.pad(training[[5, 270]], ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    copies = np.stack([moved[0, 5:21, 1:17], moved[1, 0:16, 6:22][:, ::-1]])
    distance, index = nearest_pixels(np.concatenate([copies, training[:1] // 2]), training)
    assert index[:2].tolist() == [5, 270] and (distance[:2] < 0.2).all()
    assert nearest_pixels(copies, training, shift=1)[0].min() > 20  # the search finds no more than it is allowed to
    assert distance[2] == pytest.approx(np.sqrt(np.square(training[0] - training[0] // 2.0).mean()), rel=1e-3)


def test_nearest_features_takes_the_mirrored_ones_too() -> None:
    axes = np.eye(4, dtype=np.float32)
    distance, index = nearest_features(axes[[2, 0]], axes[[0, 1]], axes[[3, 2]])
    assert index.tolist() == [1, 0] and distance.tolist() == [0, 0]


def test_memorisation_tells_copies_from_new_images() -> None:
    held_out, copies = np.linspace(10, 20, 50, dtype=np.float32), np.linspace(1, 2, 50, dtype=np.float32)
    new, old = memorisation(held_out + 5, held_out, copies), memorisation(copies, held_out, copies)
    assert (new["closer"], new["copy_like"]) == (0, 0) and old["closer"] == 1 and old["copy_like"] > 0.9
    assert new["samples"]["p50"] == pytest.approx(20)
    assert memorisation(held_out, held_out[:0], copies)["closer"] is None


def test_accuracy_and_diversity_count_per_label() -> None:
    result = accuracy(np.array([0, 1, 1]), np.array([0, 0, 1]), ("a", "b", "c"))
    assert result["share"] == pytest.approx(2 / 3) and result["labels"]["a"] == {"share": 0.5, "count": 2}
    assert result["labels"]["c"] == {"share": None, "count": 0}
    axes = np.eye(3, dtype=np.float32)
    real = spreads(axes[[0, 1, 2, 0]], np.array([0, 0, 1, 1]), 3)
    same = spreads(axes[[0, 0, 1, 2]], np.array([0, 0, 1, 1]), 3)
    assert real[:2].tolist() == [1, 1] and np.isnan(real[2])
    assert diversity(same, real) == 0.5 and np.isnan(diversity(real[2:], real[2:]))


def test_sheet_places_titles_and_rows() -> None:
    red = Image.new("RGB", (32, 32), "red")
    picture = sheet([("one", [red, red]), ("a longer title", [red])], ("heading",))
    pixels = np.asarray(picture)
    reds = (pixels == [255, 0, 0]).all(-1)
    assert reds.sum() == 3 * 32 * 32 and (pixels[:, : np.flatnonzero(reds.any(0))[0]] < 128).any()


def test_pictures_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves the older picture as it was, and an ending without a format is named."""
    picture = Image.new("RGB", (8, 8), "red")
    save_picture(tmp_path / "a.png", picture)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(InputError, match=r"cannot write .*a\.xyz: no picture has the ending '\.xyz'; take \.png"):
        save_picture(tmp_path / "a.xyz", picture)
    with pytest.raises(InputError, match=r"cannot write .*nowhere/a\.png"):
        save_picture(tmp_path / "nowhere" / "a.png", picture)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left on device"):
        save_picture(tmp_path / "a.png", Image.new("RGB", (9, 9)))
    assert (tmp_path / "a.png").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_report_marks_labels_without_held_out_images() -> None:
    row = {"share": None, "count": 0}
    shares = {**row, "labels": {"a": row}}
    cost = {"codes": 5.0, "fixed_codes": 16, "bits_per_pixel": 0.5, "fixed_bits_per_pixel": 1.0}
    near = memorisation(*[np.ones(3, np.float32)] * 3)
    text = report(
        {
            "training_images": {"a": 4},
            "accuracy": {name: shares for name in ("held_out", "held_out_reconstructed", "samples")},
            "reconstruction": {"count": 2, "psnr": 20.0, "ssim": 0.5},
            "cost": {"held_out": cost, "samples": cost},
            "diversity": 1.0,
            "memorisation": {space: {**near, "copies_found": 1.0} for space in ("pixels", "features")},
        }
    )
    assert "| a | 4 | – | – | – |" in text and "20.00" in text
