"""Routers of a DQ-VAE: what is drawn, what it is worth to the router, budgets, and fitting to a folder of images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import TOKENIZER, VARIANTS
from torch import Tensor

from runtimes.errors import ConfigError
from training.checkpoint import Model, load_checkpoint, save_checkpoint
from training.data.folder import ImageFolder
from training.data.pixels import to_float
from training.models.blocks import shrunk
from training.models.dqvae import DQVAE, spread
from training.models.router import budget_loss, draw_gate, fit_biases, gumbel_noise
from training.objective import Objective, StageOneConfig, starts
from training.thresholds import fit_router, main


def test_draws_follow_the_logits() -> None:
    """A grain is drawn with the probability that softmax gives it: 100,000 draws within four standard deviations."""
    torch.manual_seed(0)
    logits = torch.tensor([0.3, -1.0, 1.2])
    count = 100_000
    gate = draw_gate(logits.expand(count, 3), gumbel_noise(logits.expand(count, 3)))
    wanted = torch.softmax(logits, 0)
    spread = (wanted * (1 - wanted) / count).sqrt()
    assert ((gate.mean(0) - wanted).abs() < 4 * spread).all()


def test_gradient_is_that_of_the_soft_draw() -> None:
    """The router's gradient is that of the objective with the soft draw in place of the hard one, by finite
    differences."""
    torch.manual_seed(1)
    logits = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    noise, worth = gumbel_noise(logits.detach()), torch.randn(2, 3, dtype=torch.double)
    (draw_gate(logits, noise) * worth).sum().backward()

    def soft(values: Tensor) -> Tensor:
        return (torch.softmax(values + noise, -1) * worth).sum()

    assert logits.grad is not None
    for place in np.ndindex(2, 3):
        step = torch.zeros(2, 3, dtype=torch.double)
        step[place] = 1e-5
        slope = (soft(logits.detach() + step) - soft(logits.detach() - step)) / 2e-5
        assert abs(float(slope - logits.grad[place])) < 1e-8


@pytest.mark.parametrize("ratios", [(0.4,), (0.3, 0.46)])
def test_budget_is_the_distance_of_the_shares(ratios: tuple[float, ...]) -> None:
    """For one-hot gates it is the factor times the squared distance, 0 only where the shares are met."""
    grains, cells = len(ratios) + 1, 100
    met = [1 - sum(ratios), *ratios]
    counts = [round(share * cells) for share in met]
    gate = torch.eye(grains)[torch.repeat_interleave(torch.arange(grains), torch.tensor(counts))].view(
        1, 10, 10, grains
    )
    assert budget_loss(gate, ratios, [10.0] * len(ratios)) < 1e-9
    coarse = torch.eye(grains)[torch.zeros(1, 10, 10, dtype=torch.long)]
    assert budget_loss(coarse, ratios, [10.0] * len(ratios)) == pytest.approx(10 * sum(r * r for r in ratios))


@pytest.mark.parametrize("name", ["dual feature", "triple feature"])
def test_training_moves_the_router_to_its_budget(name: str) -> None:
    """In training the budget is part of the loss and reaches the router; in evaluation there is none, and no draw."""
    torch.manual_seed(0)
    vae = DQVAE(replace(VARIANTS[name], budget=1000.0))
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    stage = StageOneConfig(warmup_fraction=0.0)
    objective = Objective(stage, starts(stage, 10), 32, vae.get_parameter("decoder.conv_out.weight"))
    torch.nn.init.zeros_(vae.get_parameter("router.gate.2.weight"))
    vae.get_parameter("router.gate.2.bias").data[0] = 4.0  # nearly all coarse
    optimizer = torch.optim.Adam(vae.router.parameters(), 0.1)
    vae.train()
    budgets = []
    for step in range(40):
        optimizer.zero_grad()
        scalars = objective.losses(vae, images, step)
        assert scalars["loss"] > scalars["budget"]
        scalars["loss"].backward()
        optimizer.step()
        budgets.append(scalars["budget"].item())
    assert np.mean(budgets[-10:]) < 0.1 * np.mean(budgets[:3])
    vae.eval()
    with torch.no_grad():
        first, second = vae(images), vae(images)
    assert first.budget is None and "budget" not in objective.losses(vae, images, 0)
    assert torch.equal(first.images, second.images)


@pytest.mark.parametrize("name", ["dual feature", "triple feature"])
def test_what_the_gate_learns_from(name: str) -> None:
    """Both gradients leave the merged map as it is. That of the chosen grain reaches its gate alone; that of every
    grain tells each gate how the loss changes with more of its grain's features."""
    torch.manual_seed(0)
    vaes = [DQVAE(replace(VARIANTS[name], router_gradient=kind)) for kind in ("chosen", "every")]
    n = vaes[0].config.grains
    maps = [torch.randn(2, 5, 4 * 2**s, 4 * 2**s) for s in range(n)]
    grain = torch.randint(n, (2, 4, 4))
    slope = torch.randn(2, 5, *maps[-1].shape[2:])  # of some loss, at the merged map
    moved = torch.stack([(spread(h, n - 1 - s) * slope).sum(1) for s, h in enumerate(maps)], -1)
    moved = moved.unflatten(1, (4, -1)).unflatten(3, (4, -1)).sum((2, 4))
    gradients = []
    for vae in vaes:
        gate = torch.nn.functional.one_hot(grain, n).float().requires_grad_()
        merged = vae.merge(maps, grain, gate)
        assert torch.equal(merged, vae.merge(maps, grain))
        gradients.append(torch.autograd.grad((merged * slope).sum(), gate)[0])
    chosen = torch.nn.functional.one_hot(grain, n).bool()
    torch.testing.assert_close(gradients[1], moved, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0], torch.where(chosen, moved, 0), rtol=1e-4, atol=1e-4)


def test_a_larger_picture_of_the_same_codes() -> None:
    """With ``shrink`` an image has the codes of its smaller self, which differs from Pillow's by its two roundings, but
    for the edges, where Pillow leaves out what is not there."""
    torch.manual_seed(0)
    vae, small = DQVAE(VARIANTS["shrunk"]).eval(), DQVAE(TOKENIZER).eval()
    for part in ("encoder", "quant_conv", "quantizer"):
        small.get_submodule(part).load_state_dict(vae.get_submodule(part).state_dict())
    for one in (vae, small):
        one.entropy_thresholds.fill_(1.0)
    pixels = np.random.default_rng(0).integers(90, 166, (4, 32, 32, 3), dtype=np.uint8)
    less = shrunk(to_float(pixels), 2)
    with torch.no_grad():
        for mine, other in zip(vae.encode(to_float(pixels)), small.encode(less), strict=True):
            assert torch.equal(mine, other)
        assert vae.decode_codes(vae.encode(to_float(pixels)).codes).shape == (4, 3, 32, 32)
    pillow = [np.asarray(Image.fromarray(x).resize((16, 16), Image.Resampling.LANCZOS), float) for x in pixels]
    pixels_of_less = (less.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    error = np.abs(pixels_of_less - np.stack(pillow))[:, 3:-3, 3:-3].max()
    print(f"\nlargest difference to Pillow: {error:.2f} levels")
    assert error < 1.2


@pytest.mark.parametrize("name", VARIANTS)
def test_grain_does_not_depend_on_the_batch(name: str) -> None:
    """An image has the same grain and scores, to the bit, alone and beside others."""
    torch.manual_seed(0)
    vae = DQVAE(VARIANTS[name]).eval()
    if VARIANTS[name].router == "entropy":
        vae.entropy_thresholds.copy_(torch.linspace(0, 3, 99))
    side = vae.config.image_size
    images = torch.rand(6, 3, side, side) * 2 - 1
    with torch.no_grad():
        together = vae.encode(images)
        for i in range(6):
            alone = vae.encode(images[i : i + 1])
            assert torch.equal(alone.grain[0], together.grain[i])


def test_copies_of_a_vector_count_once() -> None:
    """With three grains a coarse vector's sixteen copies weigh as one, and each code has one vector."""
    vae = DQVAE(VARIANTS["triple feature"]).eval()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        vae.router_biases.copy_(fit_biases(vae.logits(images).flatten(0, 2), (0.3, 0.4)))
        encoding, vectors = vae.encode(images), vae.code_vectors(images)
    codes = torch.tensor([1, 4, 16])[encoding.grain].sum()
    assert set(encoding.grain.flatten().tolist()) == {0, 1, 2}
    assert len(vectors) == codes == vae.copy_weights(encoding.grain).sum()


def test_biases_meet_the_shares() -> None:
    """Fitted biases give each grain its share of cells within 0.1 percent, from logits that alone give none to one."""
    torch.manual_seed(0)
    for grains, ratios in ((2, (0.05,)), (2, (0.4,)), (3, (0.3, 0.46)), (3, (0.9, 0.05)), (3, (0.01, 0.01))):
        logits = torch.randn(20_000, grains) * torch.tensor([1.0, 3.0, 0.5][:grains]) + torch.tensor(
            [0.0, -9.0, 4.0][:grains]
        )
        biases = fit_biases(logits, ratios)
        shares = torch.bincount((logits + biases).argmax(1), minlength=grains) / len(logits)
        assert biases[0] == 0 and np.allclose(shares[1:], ratios, atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_command(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``training.thresholds`` fits either router to a folder: the shares of its images are met, and nothing else in the
    checkpoint changes."""
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "all").mkdir(parents=True)
    for i in range(60):
        picture = 128 + rng.normal(0, 1 + 60 * rng.random((4, 4, 1)).repeat(4, 0).repeat(4, 1), (16, 16, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / "data" / "all" / f"{i}.png")
    torch.manual_seed(0)
    before = Model(DQVAE(VARIANTS[name]))
    save_checkpoint(before, tmp_path / "checkpoint")
    main([str(tmp_path / "data"), "--checkpoint", str(tmp_path / "checkpoint")])
    printed, entropy = capsys.readouterr().out, VARIANTS[name].router == "entropy"
    assert ("nats" in printed) == entropy and ("bias of fine" in printed) == (not entropy)
    after = load_checkpoint(tmp_path / "checkpoint").tokenizer
    assert isinstance(after, DQVAE) and before.tokenizer is not None
    folder = ImageFolder(tmp_path / "data", after.config.image_size, val_fraction=0)
    with torch.no_grad():
        grain = after.encode(to_float(folder.load(folder.train)[0])).grain
    shares = [(grain == s).float().mean().item() for s in range(1, after.config.grains)]
    assert np.allclose(shares, after.config.ratios, atol=0.005)
    changed = [n for n, t in after.state_dict().items() if not torch.equal(t, before.tokenizer.state_dict()[n])]
    assert changed == ["entropy_thresholds" if entropy else "router_biases"]


def test_fitting_needs_no_table_for_a_feature_router(tmp_path: Path) -> None:
    """A feature router has biases, an entropy router thresholds, and neither has the other's."""
    vae = DQVAE(VARIANTS["dual feature"])
    assert "router_biases" in vae.state_dict() and "entropy_thresholds" not in vae.state_dict()
    assert "router_biases" not in DQVAE(TOKENIZER).state_dict()
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    (tmp_path / "all").mkdir()
    (tmp_path / "one.png").rename(tmp_path / "all" / "one.png")
    fit_router(vae.eval(), ImageFolder(tmp_path, 16, val_fraction=0))
    assert torch.isfinite(vae.router_biases).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grains": 4}, "tokenizer.grains is 4; it must be one of [2, 3]"),
        ({"grains": 3}, "tokenizer.decoder_mult has 2 levels; the fine grid needs 1"),
        ({"router": "random"}, "tokenizer.router is 'random'; it must be one of ('entropy', 'feature')"),
        ({"fine_percent": 0}, "tokenizer.fine_percent is 0; it must be a whole number above 0 and below 100"),
        ({"fine_percent": 40.5}, "tokenizer.fine_percent is 40.5; it must be a whole number"),
        ({"fine_percent": 100, "router": "feature"}, "fine_percent is 100; it must be a number above 0 and below 100"),
        ({"median_percent": 30}, "tokenizer.median_percent is 30, but there are two grains; set it to 0, or"),
        ({"router": "feature", "router_gradient": "all"}, "tokenizer.router_gradient is 'all'; it must be one of"),
        ({"router": "feature", "router_gate": "tanh"}, "tokenizer.router_gate is 'tanh'; it must be one of"),
        ({"router": "feature", "router_norm_groups": 7}, "router_norm_groups is 7; it must be 0, for none, or divide"),
        ({"router": "feature", "router_norm_groups": 8, "budget": -1}, "tokenizer.budget is -1; it must be a number"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], words: str) -> None:
    """Grains, shares and budgets that cannot be met are named with their range, and the way out where there is one."""
    with pytest.raises(ConfigError) as caught:
        replace(TOKENIZER, **changes)
    assert words in str(caught.value)


def test_shares_must_leave_something_coarse() -> None:
    """Shares of three grains that add to everything."""
    with pytest.raises(ConfigError, match=r"median_percent \+ fine_percent is 100; it must be below 100"):
        replace(VARIANTS["triple entropy"], median_percent=50, fine_percent=50)
    with pytest.raises(ConfigError, match=r"tokenizer\.median_percent is 0; it must be a whole number above 0"):
        replace(VARIANTS["triple entropy"], median_percent=0)
