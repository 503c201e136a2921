"""The MQ-VAE at its edges: few and all cells kept, ties, noise, damped attention, the random scorer, refused sizes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dvq_rt.codes import Codes
from dvq_rt.layout import TokenLayout
from runtimes.errors import ConfigError, InputError
from training.models.blocks import AttnBlock
from training.models.mqvae import MQVAE, SCORERS, MQVAEConfig

CONFIG = MQVAEConfig(
    image_size=32,
    channels=16,
    encoder_mult=(1, 1, 2),
    decoder_channels=16,
    decoder_mult=(1, 1, 2),
    z_channels=16,
    code_dim=8,
    codebook_size=32,
    norm_groups=8,
    demask_blocks=2,
)


def small_mqvae(seed: int = 0, **changes: Any) -> MQVAE:
    """Random weights, in eval mode; 8 x 8 cells."""
    torch.manual_seed(seed)
    vae = MQVAE(replace(CONFIG, **changes))
    vae.quantizer.codebook.normal_()
    return vae.eval()


def pictures() -> Tensor:
    """Four images: white, black, noise, and noise on its left half alone, [4, 3, 32, 32]."""
    torch.manual_seed(7)
    images = torch.stack([torch.ones(3, 32, 32), -torch.ones(3, 32, 32), *torch.rand(2, 3, 32, 32) * 2 - 1])
    images[3, :, :, 16:] = 0
    return images


@torch.no_grad()
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(("ratio", "kept"), [(1 / 64, 1), (0.05, 3), (0.5, 32), (1.0, 64)])
def test_any_image_at_any_ratio(ratio: float, kept: int, scorer: str) -> None:
    """From one code per image to all, flat images and noise encode, decode and become Codes without error or NaN; the
    cells differ, and decoding gives what the forward pass gives, whatever the order of the codes."""
    vae, images = small_mqvae(kept_ratio=ratio, scorer=scorer), pictures()
    assert vae.config.kept == kept
    layout = TokenLayout(**vae.config.layout())
    codes, positions, scores = vae.encode(images)
    assert codes.shape == positions.shape == (4, kept) and scores.shape == (4, 8, 8)
    assert codes.dtype == positions.dtype == torch.int64
    assert all(len(set(row)) == kept for row in positions.tolist())
    assert int(codes.min()) >= 0 and int(codes.max()) < 32 and int(positions.max()) < 64
    maps, grain = vae.encode_maps(images)
    for row in range(4):
        made = Codes(maps[row].numpy(), grain[row].numpy(), layout)
        assert made.length == kept and len(made.tokens().content) == kept + 1
    decoded = vae.decode_codes(codes, positions)
    assert decoded.shape == images.shape and torch.isfinite(decoded).all() and torch.isfinite(scores).all()
    other = torch.randperm(kept)
    assert torch.equal(vae.decode_codes(codes[:, other], positions[:, other]), decoded)
    torch.testing.assert_close(vae(images).images, decoded, rtol=1e-5, atol=1e-5)
    assert (vae.decode_codes((codes + 1) % 32, positions) != decoded).flatten(1).any(1).all(), "the codes must matter"


@pytest.mark.parametrize("scorer", ["conv", "token"])
def test_ties_keep_the_first_cells(scorer: str) -> None:
    """Where scores are equal the lower row-major position is kept and comes first: a blind scorer keeps the first
    cells, and of a flat image, whose inner cells tie, none is skipped for a later one."""
    vae = small_mqvae(scorer=scorer, kept_ratio=0.25)
    images = pictures()
    with torch.no_grad():
        _, positions, scores = vae.encode(images[:2])
        for place, score in zip(positions, scores.flatten(1), strict=True):
            ordered = sorted(range(64), key=lambda cell: (-score[cell].item(), cell))
            assert place.tolist() == ordered[:16]
        assert vae.masker.score_pred_net is not None
        for parameter in vae.masker.score_pred_net.parameters():
            parameter.zero_()
        _, positions, scores = vae.encode(images)
    assert (scores == 0.5).all()
    assert positions.tolist() == [list(range(16))] * 4


def test_kept_is_truncated() -> None:
    """K is the product in double precision, cut as released: 0.29 of 100 cells are 28."""
    assert replace(CONFIG, image_size=40, kept_ratio=0.29).kept == 28
    assert replace(CONFIG, image_size=40, kept_ratio=0.3).kept == 30


def test_damping_by_hand() -> None:
    """A damped cell counts less as a key, after the softmax and without renormalising, for every query."""
    torch.manual_seed(0)
    block, x, damping = AttnBlock(8, 4), torch.randn(2, 8, 3, 3), torch.rand(2, 9)
    h = block.norm(x)
    q, k, v = (layer(h).flatten(2) for layer in (block.q, block.k, block.v))
    mixed = torch.zeros(2, 8, 9)
    for b in range(2):
        for query in range(9):
            weight = torch.softmax(torch.stack([q[b, :, query] @ k[b, :, key] for key in range(9)]) / 8**0.5, 0)
            mixed[b, :, query] = sum(weight[key] * damping[b, key] * v[b, :, key] for key in range(9))
    want = x + block.proj_out(mixed.view(2, 8, 3, 3))
    torch.testing.assert_close(block(x, damping), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block(x, torch.ones(2, 9)), block(x), rtol=0, atol=0)
    assert not torch.allclose(want, block(x), atol=1e-3)


@torch.no_grad()
def test_damping_fades() -> None:
    """Masked keys start at the configured weight, each further block takes its square root; kept ones count whole."""
    vae, seen = small_mqvae(demask_blocks=8, mask_damping=0.02, kept_ratio=0.25), []
    for block in vae.demasker.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    positions = vae.encode(pictures()).positions
    vae(pictures())
    kept = torch.zeros(4, 64, dtype=torch.bool).scatter(1, positions, True)
    assert len(seen) == 8
    for block, damping in enumerate(seen):
        assert (damping[kept] == 1).all()
        assert damping[~kept].unique().tolist() == pytest.approx([0.02 ** (0.5**block)], rel=1e-6)


def test_random_scorer() -> None:
    """The ablation baseline keeps the same cells for every image in evaluation, and after a round trip through its
    state; in training it keeps others each time."""
    vae, images = small_mqvae(scorer="random", kept_ratio=0.25), pictures()
    with torch.no_grad():
        first, again = vae.encode(images).positions, vae.encode(images).positions
        assert torch.equal(first, again) and (first == first[0]).all()
        other = small_mqvae(seed=1, scorer="random", kept_ratio=0.25)
        assert not torch.equal(other.encode(images).positions, first)
        other.load_state_dict(vae.state_dict())
        assert torch.equal(other.encode(images).positions, first)
        vae.train()
        grains = [vae(images).grain for _ in range(2)]
    assert all((grain == 0).sum((1, 2)).tolist() == [16] * 4 for grain in grains)
    assert not torch.equal(grains[0], grains[1]) and not torch.equal(grains[0][0], grains[0][1])


@pytest.mark.parametrize("scorer", SCORERS)
def test_gradients(scorer: str) -> None:
    """In training every parameter gets a gradient, the scorer through the weighing of the kept cells, the stand-in for
    masked cells through the attention; the bias before a batch normalisation has none to get."""
    vae = small_mqvae(scorer=scorer).train()
    out = vae(pictures())
    (out.images.square().mean() + out.loss).backward()
    dead = {name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()}
    assert dead <= {"masker.score_pred_net.3.bias"}
    assert all(torch.isfinite(p.grad).all() for p in vae.parameters() if p.grad is not None)


@torch.no_grad()
def test_some_of_the_codes_decode() -> None:
    """An image of fewer codes than the model keeps can be decoded; a cell without a code takes no code's value."""
    vae = small_mqvae()
    codes, positions, _ = vae.encode(pictures())
    whole, part = vae.decode_codes(codes, positions), vae.decode_codes(codes[:, :5], positions[:, :5])
    assert torch.isfinite(part).all() and not torch.equal(whole, part)
    maps = vae.to_map(codes[:, :5], positions[:, :5])
    assert ((maps >= 0).sum((1, 2)) == 5).all() and int(maps.min()) == -1
    assert torch.equal(vae.decode_maps(maps), part)
    none = vae.decode_maps(torch.full((1, 8, 8), -1))
    vae.quantizer.codebook.mul_(2)
    assert torch.equal(vae.decode_maps(torch.full((1, 8, 8), -1)), none)


def test_layout_follows() -> None:
    """The token layout has the tokenizer's sizes, and codes come first unless asked otherwise."""
    layout = TokenLayout(**replace(CONFIG, kept_ratio=0.3).layout(), classes=4)
    assert (layout.codebook_size, layout.sides, layout.kept, layout.max_length) == (32, (8,), 19, 19)
    assert layout.heads == ("content", "position")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept_ratio": 0}, r"kept_ratio is 0; it must be at least 0.01562 \(one of 64 cells\) and at most 1"),
        ({"kept_ratio": 0.01}, r"kept_ratio is 0.01; it must be at least"),
        ({"kept_ratio": 1.01}, r"kept_ratio is 1.01; .* at most 1"),
        ({"kept_ratio": float("nan")}, r"kept_ratio is nan"),
        ({"kept_ratio": "half"}, r"kept_ratio is 'half'"),
        ({"scorer": "best"}, r"scorer is 'best'; it must be one of \('conv', 'token', 'random'\)"),
        ({"demask_blocks": -1}, r"demask_blocks is -1.*must be an integer of at least 0"),
        ({"demask_blocks": 1.5}, r"demask_blocks is 1.5"),
        ({"mask_damping": 1.5}, r"mask_damping 1.5; .* a number in \[0, 1\]"),
        ({"decoder_mult": (1, 2)}, r"decoder_mult has 2 levels; the cells need 3"),
        ({"image_size": 34}, r"image_size is 34; it must be a multiple of 4"),
        ({"norm_groups": 5}, r"norm_groups is 5; it must divide every width"),
        ({"codebook_size": 0}, r"codebook_size is 0; it must be positive"),
        ({"decay": 1.0}, r"decay 1.0 .* must be in \[0, 1\)"),
    ],
)
def test_bad_sizes_are_named(changes: dict[str, Any], words: str) -> None:
    """Sizes that no model can have are refused with field, value and rule."""
    with pytest.raises(ConfigError, match=words):
        replace(CONFIG, **changes)


def test_images_of_another_size() -> None:
    """Images are not silently scored on a grid that the model does not have."""
    with pytest.raises(InputError, match=r"images have shape \(1, 3, 16, 16\); this model takes \[B, 3, 32, 32\]"):
        small_mqvae().encode(torch.zeros(1, 3, 16, 16))


def test_from_the_image_to_the_file(tmp_path: Any) -> None:
    """Codes of images survive a file and decode to the same image."""
    vae = small_mqvae(kept_ratio=0.2)
    with torch.no_grad():
        maps, grain = vae.encode_maps(pictures())
        made = Codes(maps[2].numpy(), grain[2].numpy(), TokenLayout(**vae.config.layout()))
        made.save(tmp_path / "codes.npz")
        read = Codes.load(tmp_path / "codes.npz")
        np.testing.assert_array_equal(read.codes, maps[2].numpy())
        assert torch.equal(vae.decode_maps(torch.from_numpy(read.codes.copy())[None]), vae.decode_maps(maps[2:3]))
