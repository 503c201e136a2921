"""Tokenizers side by side at equal budgets, and the plot of rate against distortion."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import VARIANTS, masked_model, small_model

from dvq_rt.rates import Rate
from runtimes.errors import InputError
from training.checkpoint import Model, save_checkpoint
from training.evaluate import main
from training.judging.plot import Line, line_plot, ticks
from training.judging.tokenizers import Coded

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)


def coded(name: str) -> Coded:
    model = masked_model() if name == "mq" else small_model(sizes=VARIANTS[name])
    vae = model.both()[0]
    return Coded(name, vae, IMAGES.repeat(vae.config.image_size // 16, 1).repeat(vae.config.image_size // 16, 2))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_budget_is_met_and_shared_by_all_images(name: str) -> None:
    """Protects the equal budgets: the mean number of codes is the wanted one within one cell of all images, from all
    coarse to all fine, and the maps decode."""
    each = coded(name)
    least, most = each.reach
    for tokens in np.linspace(least, most, 5):
        codes, grain = each.at(float(tokens))
        lengths = each.layout.count_codes(grain)
        assert abs(lengths.mean() - tokens) <= each.layout.codes_per_cell[-1] / len(IMAGES)
        assert each.used_codes(codes, grain).sum() == lengths.sum()
    assert (each.at(least)[1] == 0).all() and (each.at(most)[1] == each.layout.segments - 1).all()
    assert each.decode(each.at(least)[0]).shape == each.images.shape
    with pytest.raises(InputError, match=f"{name} codes an image with {least} to {most} codes, not with 1"):
        each.at(1)


def test_models_that_keep_cells_keep_the_most_important_ones() -> None:
    each = coded("mq")
    codes, grain = each.at(7)
    assert each.layout.count_codes(grain).tolist() == [7] * len(IMAGES)
    one = Rate(kept=7).grain(each.layout, 16, each.grain[0], each.scores[0])
    assert np.array_equal(grain[0], one) and np.array_equal(codes[0] >= 0, one >= 0)
    assert np.array_equal(each.at(each.reach[1])[0], each.codes)


def test_tokenizers_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects the command: a row for each tokenizer and rate, of the same number of codes at a budget, and a plot."""
    torch.manual_seed(0)
    for i in range(12):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(IMAGES[i % 6] // (1 + i)).save(tmp_path / "images" / f"{i}.png")
    models = {"two": small_model(), "three": small_model(sizes=VARIANTS["triple entropy"]), "kept": masked_model()}
    for name, model in models.items():
        save_checkpoint(Model(model.both()[0]), tmp_path / name)
    arguments = [f"{name}={tmp_path / name}" for name in models] + [str(tmp_path / "images")]
    config = tmp_path / "one.json"
    config.write_text(json.dumps({"stage": {"val_fraction": 0.3}}))
    out = ["--out", str(tmp_path / "out"), "--tokenizer-config", str(config)]
    main([*arguments, *out, "--tokens", "20,40"])
    printed = capsys.readouterr().out
    assert sum(line.startswith("| two |") for line in printed.splitlines()) == 3
    assert "Fréchet distance (EfficientNet-Lite0)" in printed and "FID" not in printed
    values = json.loads((tmp_path / "out" / "tokenizers.json").read_text())
    at_20 = {row["tokenizer"]: row for row in values["rows"] if row["rate"] == "20 codes"}
    assert set(at_20) == {"two", "three", "kept"}
    one_cell = 16 / values["settings"]["images"]
    assert all(abs(row["tokens"] - 20) <= one_cell for row in at_20.values())
    assert {row["tokenizer"] for row in values["rows"] if row["rate"] == "40 codes"} == {"two", "three"}
    assert values["settings"]["extractor"] == "EfficientNet-Lite0" and values["settings"]["budgets"] == [20, 40]
    assert Image.open(tmp_path / "out" / "rate_distortion.png").size == (960, 600)
    for budget, message in (("500", "they reach"), ("many", "numbers with commas")):
        with pytest.raises(SystemExit):
            main([*arguments, *out, "--tokens", budget])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("low", "high"), [(0.157, 0.578), (13.9, 26.6), (0, 1), (5, 5), (-3e-4, 8e-4), (0, 123456)])
def test_ticks_are_few_and_around_the_values(low: float, high: float) -> None:
    values = ticks(low, high)
    assert values[0] <= low + 1e-9 and values[-1] >= high - 1e-9 and 2 <= len(values) <= 9


def test_lines_go_where_their_numbers_are() -> None:
    """Protects the plot: a line is drawn in its own colour at the places of its points, a higher value higher up."""
    picture = np.asarray(line_plot([Line("a", [(0, 0), (1, 1)]), Line("b", [(0, 1)], [(1, 0)])], "t", "x", "y", "ring"))
    near = [np.abs(picture.astype(int) - colour).max(-1) < 40 for colour in ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00])]
    blue, orange = near
    heights = [np.flatnonzero(blue[:, column]).mean() for column in (90, 300, 600)]
    assert heights[0] > heights[1] + 50 and heights[1] > heights[2] + 50
    assert orange[:60, 70:100].any() and not blue[:60, 70:100].any()
