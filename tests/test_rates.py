"""Rate control: other grains or fewer cells than the tokenizer's own, from one run of the encoder."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dvq_rt.__main__ import main
from dvq_rt.codes import code_bits
from dvq_rt.generator import Generator
from dvq_rt.layout import TokenLayout
from dvq_rt.rates import Rate, by_codes, by_shares, select_codes
from runtimes.errors import InputError
from training.checkpoint import Model
from training.models.dqvae import DQVAE

TWO, THREE = TokenLayout(32, (4, 8)), TokenLayout(32, (2, 4, 8))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Half plain, half noise of growing strength."""
    rng = np.random.default_rng(0)
    images = np.full((3, 16, 16, 3), 120, np.uint8)
    for i, image in enumerate(images):
        image[:, 8:] = rng.integers(0, 80 + 80 * i, (16, 8, 3))
    return list(images)


@pytest.mark.parametrize("layout", [TWO, THREE], ids=["two grains", "three"])
def test_a_budget_is_kept_and_used(layout: TokenLayout) -> None:
    """With any number of codes no more than that are used, and no cell could be one step finer; more codes never make
    a cell of two grains coarser."""
    scores = (
        np.random.default_rng(1).normal(size=(layout.sides[0], layout.sides[0], layout.segments)).astype(np.float32)
    )
    least, before = layout.sides[0] ** 2, np.zeros((layout.sides[0],) * 2, int)
    for most in range(least, layout.cells + 4):
        grain = by_codes(layout, scores, most)
        used = int(layout.count_codes(grain))
        steps = [
            layout.codes_per_cell[s + 1] - layout.codes_per_cell[s] for s in grain.ravel() if s < layout.segments - 1
        ]
        assert used <= most and all(used + step > most for step in steps)
        assert layout.segments > 2 or (grain >= before).all()
        before = grain
    assert (by_codes(layout, scores, layout.cells) == layout.segments - 1).all()


def test_every_step_has_its_price() -> None:
    """An entropy router's scores grow by equal steps, of which the second buys twelve codes: it waits for cells of four
    times the entropy."""
    scores = (np.array([[0.1, 1.0], [2.0, 9.0]])[..., None] * [0, 1, 2]).astype(np.float32)
    assert by_codes(THREE, scores, 4 + 3 * 3 + 12).tolist() == [[0, 1], [1, 2]]


def test_shares() -> None:
    """Shares are met to the cell, by the cells that a grain suits best."""
    scores = np.zeros((2, 2, 3), np.float32)
    scores[..., 2] = [[9, 1], [2, 3]]
    scores[..., 1] = [[9, 7], [8, 1]]
    assert by_shares(scores, [0.5, 0.25]).tolist() == [[2, 1], [1, 0]]
    rounded = by_shares(np.zeros((3, 3, 3), np.float32), [5 / 6, 1 / 6])  # 7.5 and 1.5 of nine cells
    assert [(rounded == s).sum() for s in range(3)] == [0, 7, 2]
    assert by_shares(scores, [0, 0]).tolist() == [[0, 0], [0, 0]] and (by_shares(scores, [0, 1]) == 2).all()


def test_codes_of_a_grain_map() -> None:
    """Each cell takes the codes of its grain, and none where it has none."""
    codes = np.stack([np.full((8, 8), s) for s in range(3)])
    grain = np.array([[0, 1], [2, -1]])
    wanted = np.array([[0, 1], [2, -1]]).repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(select_codes(THREE, grain, codes), wanted)


def test_fine_ratio(generator: Generator, pictures: list[np.ndarray]) -> None:
    """Any share of the regions can be fine; the tokenizer's own share gives its own codes."""
    for ratio in (0, 0.25, np.float32(0.5), 1):
        for codes in generator.encode(pictures, fine_ratio=ratio):
            assert (codes.grain == 1).sum() == round(16 * float(ratio))
            assert generator.decode(codes).shape == (1, 16, 16, 3) and generator.score(codes)[0].total < 0
    for codes, picture in zip(generator.encode(pictures), pictures, strict=True):
        own = float((codes.grain == 1).mean())
        assert generator.encode(picture, fine_ratio=own) == [codes] and 0 < own < 1


def test_codes_are_those_of_another_threshold(class_model: Model, generator: Generator, pictures: Any) -> None:
    """What the host selects is what PyTorch codes with a threshold that makes as many regions fine."""
    vae = class_model.tokenizer
    assert isinstance(vae, DQVAE)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    before = vae.entropy_thresholds.clone()
    try:
        for image, codes in zip(images, generator.encode(pictures, fine_ratio=0.25), strict=True):
            entropy = vae.encode(image[None]).scores.flatten().sort(descending=True).values
            vae.entropy_thresholds.fill_(float(entropy[3] + entropy[4]) / 2)
            maps = vae.encode_maps(image[None])
            np.testing.assert_array_equal(codes.grain, maps[1][0].numpy())
            np.testing.assert_array_equal(codes.codes, maps[0][0].numpy())
    finally:
        vae.entropy_thresholds.copy_(before)


@pytest.mark.parametrize("kind", ["generator", "mq_generator"])
def test_bits_per_pixel(kind: str, pictures: list[np.ndarray], request: pytest.FixtureRequest) -> None:
    """The codes cost at most what is asked, and not a step less than they could; more bits never give fewer codes."""
    generator: Generator = request.getfixturevalue(kind)
    layout = generator.layout
    low, high = (code_bits(layout, n) / 256 for n in ((16, 64) if layout.covering else (5, 25)))
    lengths = []
    for rate in np.linspace(low, high, 7):
        for codes in generator.encode(pictures, bits_per_pixel=rate):
            assert codes.bits_per_pixel(16) <= rate + 1e-9
        lengths.append(codes.length)
        step = 3 if layout.covering else 1
        assert codes.length + step > layout.filled_cells or code_bits(layout, codes.length + step) / 256 > rate
    assert lengths == sorted(lengths) and lengths[-1] == layout.filled_cells


def test_kept(mq_generator: Generator, pictures: list[np.ndarray]) -> None:
    """Fewer cells are the most important of those that are kept anyway, and decode."""
    own = mq_generator.encode(pictures)
    for kept in (1, 7, 25):
        for codes, whole in zip(mq_generator.encode(pictures, kept=kept), own, strict=True):
            assert codes.length == kept and ((codes.codes == whole.codes) | (codes.codes < 0)).all()
            assert mq_generator.decode(codes).dtype == np.uint8
    assert mq_generator.encode(pictures, kept=25) == own


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        ({"fine_ratio": 1.2}, r"fine_ratio is 1\.2; it must be a number from 0 to 1"),
        ({"fine_ratio": "half"}, "fine_ratio is 'half'; it must be a number"),
        ({"fine_ratio": math.nan}, "fine_ratio is nan"),
        ({"fine_ratio": (0.2, 0.2)}, r"fine_ratio is \(0\.2, 0\.2\); this model takes 1, one a finer grain"),
        ({"bits_per_pixel": 0.1}, r"bits_per_pixel is 0\.1; this model codes an image with 0\.375 to 1\.312"),
        ({"bits_per_pixel": math.inf}, "bits_per_pixel is inf; it must be a number of at least 0"),
        ({"bits_per_pixel": -1}, "bits_per_pixel is -1"),
        ({"kept": 3}, "kept is for models that keep some cells; this one codes all, give fine_ratio"),
        (
            {"fine_ratio": 0.5, "bits_per_pixel": 1},
            "fine_ratio and bits_per_pixel are given; one of them says the rate",
        ),
        ({"quality": 3}, r"unknown rates \['quality'\]; there are \['fine_ratio', 'bits_per_pixel', 'kept'\]"),
    ],
)
def test_rates_that_cannot_be(rate: dict[str, Any], words: str, generator: Generator, pictures: Any) -> None:
    """A rate that the model has not is refused with those that it has."""
    with pytest.raises(InputError, match=words):
        generator.encode(pictures, **rate)


def test_rates_that_mq_has_not(mq_generator: Generator, pictures: Any) -> None:
    """More cells than were trained, shares of grains, and too few bits are refused by name."""
    for rate, words in (
        ({"kept": 26}, "kept is 26; it must be an integer from 1 to 25"),
        ({"kept": 0}, "kept is 0"),
        ({"fine_ratio": 0.5}, "fine_ratio is for models with several grains; this one has one, give kept"),
        ({"bits_per_pixel": 0.01}, r"bits_per_pixel is 0\.01; this model codes an image with 0\.0"),
    ):
        with pytest.raises(InputError, match=words):
            mq_generator.encode(pictures, **rate)
    three = Rate(fine_ratio=(0.8, 0.4))
    with pytest.raises(InputError, match="together the shares are at most 1"):
        three.grain(THREE, 16, np.zeros((2, 2), np.int64), np.zeros((2, 2, 3), np.float32))


def test_the_command(class_engine: Path, pictures: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``reconstruct`` takes a rate, and its table says what the codes cost."""
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    words = ["reconstruct", "--engine", str(class_engine), str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]
    assert main([*words, "--fine-ratio", "0.25"]) == 0 and "28 of 64 codes" in capsys.readouterr().out
    assert main([*words, "--bits-per-pixel", "0.9"]) == 0 and "40 of 64 codes, 0.844 bits" in capsys.readouterr().out
    assert main([*words, "--kept", "3"]) == 2 and "kept is for models that keep some cells" in capsys.readouterr().err
