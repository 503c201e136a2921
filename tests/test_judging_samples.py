"""Samples against real images: the formulas, the networks, and the command on a checkpoint."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import masked_model, small_model
from torch import nn

from dvq_rt import Generator, SamplingParams
from runtimes.errors import CheckpointError, ConfigError, InputError
from training.checkpoint import save_checkpoint
from training.checkpoint_engine import CheckpointEngine
from training.evaluate import main
from training.judging.distribution import Statistics, frechet_distance, inception_score, precision_recall
from training.judging.features import inception
from training.judging.samples import Conditions, alike, at_equal_numbers, draw, read_samples
from training.models.inception import CLASSES, Inception

RNG = np.random.default_rng(0)


def correlated(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 24)) @ np.random.default_rng(9).normal(size=(24, 24)) + 0.1 * seed).astype(
        np.float32
    )


def test_the_frechet_distance_is_that_of_torchmetrics(tmp_path: Path) -> None:
    """Protects FID: on saved features, also through written statistics, both agree within 1e-6 of the value."""
    metrics = pytest.importorskip("torchmetrics.image.fid")
    np.savez(tmp_path / "features.npz", real=correlated(300, 1), made=correlated(200, 2))
    saved = np.load(tmp_path / "features.npz")

    class Given(nn.Module):
        num_features = 24

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    theirs = metrics.FrechetInceptionDistance(feature=Given()).set_dtype(torch.float64)
    theirs.update(torch.from_numpy(saved["real"]), real=True)
    theirs.update(torch.from_numpy(saved["made"]), real=False)
    Statistics.of(saved["real"]).save(tmp_path / "stats.npz")
    reference = Statistics.load(tmp_path / "stats.npz", 24)
    ours = frechet_distance(reference, Statistics.of(saved["made"]))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert frechet_distance(reference, reference) < 1e-6 * ours


def test_the_inception_score_is_that_of_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.image.inception")
    logits = 3 * RNG.normal(size=(60, 10)).astype(np.float32)

    class Given(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values

    theirs = metrics.InceptionScore(feature=Given(), splits=1)
    theirs.update(torch.from_numpy(logits))
    assert inception_score(logits, splits=1)[0] == pytest.approx(float(theirs.compute()[0]), rel=1e-5)
    sure = np.eye(10, dtype=np.float32)[np.arange(100) % 10] * 1e3
    assert inception_score(sure, splits=1)[0] == pytest.approx(10)
    with pytest.raises(InputError, match="there are 3 images"):
        inception_score(logits[:3])


def test_precision_falls_with_strange_samples_and_recall_with_missing_ones() -> None:
    """Protects the two by their definition: samples at one of two clusters are precise and miss half; every second one
    far away halves precision."""
    real = np.concatenate([RNG.normal(size=(100, 3)), RNG.normal(size=(100, 3)) + 50])
    one = RNG.normal(size=(200, 3)) * 0.5
    precision, recall = precision_recall(real, one)
    assert precision > 0.9 and 0.2 < recall <= 0.5
    strange = np.concatenate([one[:100], one[:100] + 500])
    assert precision_recall(real, strange)[0] == pytest.approx(precision_recall(real, one[:100])[0] / 2)
    near = [np.sort(((real - each) ** 2).sum(1))[3] for each in real]  # the definition, written out
    inside = [any(((real[i] - each) ** 2).sum() <= near[i] for i in range(len(real))) for each in one]
    assert precision == np.mean(inside)
    with pytest.raises(InputError, match="more than 3"):
        precision_recall(real, one[:3])


def test_statistics_of_something_else_are_refused(tmp_path: Path) -> None:
    Statistics.of(correlated(30, 1)).save(tmp_path / "stats.npz")
    with pytest.raises(InputError, match="this extractor has 320 features"):
        Statistics.load(tmp_path / "stats.npz", 320)
    (tmp_path / "text.npz").write_text("mu")
    with pytest.raises(InputError, match=r"text.npz is no archive of statistics: .*--write-statistics"):
        Statistics.load(tmp_path / "text.npz", 24)
    np.savez(tmp_path / "half.npz", mu=np.zeros(24))
    with pytest.raises(InputError, match="no archive of statistics"):
        Statistics.load(tmp_path / "half.npz", 24)
    with pytest.raises(InputError, match="there is a feature of 1 images"):
        Statistics.of(correlated(1, 1))


def test_inception_takes_exactly_its_published_tensors(tmp_path: Path) -> None:
    """Protects the path of the FID network with random weights of its shape; the published ones were never here."""
    torch.manual_seed(0)
    net = Inception()
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    names = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert names["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert names["fc.weight"].shape == (CLASSES, 2048)
    torch.save(names, tmp_path / "inception.pth")
    loaded = inception(tmp_path / "inception.pth")
    with torch.no_grad():
        features, logits = loaded(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert features.shape == (2, 2048) and logits.shape == (2, CLASSES) and bool((features >= 0).all())
    assert torch.equal(loaded.Mixed_6e.branch_pool.conv.weight, net.Mixed_6e.branch_pool.conv.weight)
    torch.save({k: v for k, v in names.items() if k != "fc.bias"}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"missing \['fc.bias'\]"):
        inception(tmp_path / "less.pth")
    with pytest.raises(ConfigError, match="no number is called FID"):
        inception(tmp_path / "nowhere.pth")


def test_equal_numbers() -> None:
    """Sets of one law are as far at equal numbers, though one has more images, which alone would bring it nearer."""
    real, few, many = correlated(300, 1), correlated(40, 2)[:, ::-1], correlated(200, 3)[:, ::-1]
    table = at_equal_numbers(real, {"few": few, "many": many})
    assert (table["few"]["images"], table["few"]["parts"], table["many"]["parts"]) == (40, 1, 5)
    assert table["many"]["frechet"] > 1.02 * frechet_distance(Statistics.of(real), Statistics.of(many))
    assert alike(np.array([4, 7, 9]), 2).tolist() == [4, 7] and alike(np.array([4, 7]), 4).tolist() == [4, 4, 7, 7]


def test_samples_are_read_from_files_and_shards(tmp_path: Path) -> None:
    """Protects ``--samples``: pictures of a folder and of tar shards, whatever else is in them, and how they were
    drawn."""
    colours = [(10 * i, 0, 0) for i in range(5)]
    for i, colour in enumerate(colours[:2]):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{i}.png")
    with tarfile.open(tmp_path / "shard-000000.tar", "w") as shard:
        for i, colour in enumerate(colours[2:]):
            data = io.BytesIO()
            Image.new("RGB", (16, 16), colour).save(data, "PNG")
            for name, content in ((f"{i}.json", b"{}"), (f"{i}.png", data.getvalue())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    (tmp_path / "plan.json").write_text('{"seed": 3}')
    chunks, count, plan = read_samples(tmp_path, 16)
    images = np.concatenate(list(chunks))
    assert count == 5 and images.shape == (5, 16, 16, 3) and images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40]
    assert plan == {"seed": 3}
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        read_samples(tmp_path / "empty", 16)


@pytest.mark.parametrize("model", [small_model(("a", "b")), masked_model(("a", "b"))], ids=["dq", "mq"])
def test_a_checkpoint_draws_in_batches_as_an_engine_does(model: nn.Module, tmp_path: Path) -> None:
    """Protects that batches make the images of one call, and that scores are those of the model's own logits."""
    save_checkpoint(model, tmp_path / "ckpt")
    generator = Generator.over(CheckpointEngine(tmp_path / "ckpt"))
    params = SamplingParams(temperature=0.8, guidance=1.5)
    labels: list[int | None] = [0] * 40 + [1] * 30
    images = np.concatenate(list(draw(generator, Conditions(labels, None), 5, params)))
    last = generator.sample(2, [1, 1], 5, params, first=68).to_numpy()
    assert images.shape == (70, 16, 16, 3) and np.array_equal(images[68:], last)
    codes = generator.encode(Image.fromarray(images[0]))
    assert np.isfinite(generator.score(codes, [0])[0].total)


def test_the_command_reports_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the field's numbers with all their settings, and that without Inception nothing is called FID."""
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(12):
            pixels = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    save_checkpoint(small_model(("a", "b")), tmp_path / "ckpt")
    (tmp_path / "two.json").write_text(json.dumps({"stage": {"val_fraction": 0.2}}))
    arguments = [
        str(tmp_path / "ckpt"),
        str(tmp_path / "images"),
        "--config",
        str(tmp_path / "two.json"),
        "--no-classifier",
    ]
    first = ["--number", "8", "--write-statistics", str(tmp_path / "stats.npz"), "--param", "temperature=0.5"]
    main([*arguments, "--out", str(tmp_path / "one"), *first])
    printed = capsys.readouterr().out
    assert "nats a token" in printed and "FID" not in printed and "Inception Score" not in printed
    field = json.loads((tmp_path / "one" / "evaluation.json").read_text())["field"]
    settings = field["settings"]["samples"]
    assert (settings["number"], settings["seed"], settings["params"]["temperature"]) == (8, 0, 0.5)
    assert field["equal_numbers"]["held-out images"]["images"] == field["equal_numbers"]["samples"]["images"] > 3
    assert 0 <= field["precision"] <= 1 and field["likelihood"]["tokens_per_image"] > 16
    generator = Generator.over(CheckpointEngine(tmp_path / "ckpt"))
    generator.sample(8, [0] * 4 + [1] * 4, 0, SamplingParams(temperature=0.5, guidance=1.5)).save(tmp_path / "samples")
    second = ["--samples", str(tmp_path / "samples"), "--reference", str(tmp_path / "stats.npz")]
    main([*arguments, "--out", str(tmp_path / "two"), *second])
    again = json.loads((tmp_path / "two" / "evaluation.json").read_text())["field"]
    name = "Fréchet distance (EfficientNet-Lite0)"
    assert again[name] == pytest.approx(field[name], rel=1e-6) and again["precision"] is None
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "three"), "--param", "heat=1"])
    assert "heat" in capsys.readouterr().err
