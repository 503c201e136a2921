"""Models that train, export and run in seconds, and sequences to compare them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dvq_rt.engine import LOGITS, Engine
from dvq_rt.layout import HEADS, TokenLayout, Tokens
from training.checkpoint import Model
from training.models.dqvae import DQVAE, DQVAEConfig
from training.models.mqvae import MQVAE, MQVAEConfig
from training.models.router import fit_biases
from training.models.text import TextConfig
from training.models.transformer import StackedTransformer, TransformerConfig

Logits = dict[str, NDArray[np.float32]]
BOUND = 2e-4
"""Largest logit error that the project allows, relative to the largest logit."""

TOKENIZER = DQVAEConfig(
    image_size=16,
    channels=16,
    encoder_mult=(1, 1, 2),
    decoder_channels=16,
    decoder_mult=(2, 1),
    z_channels=16,
    code_dim=8,
    codebook_size=32,
    norm_groups=8,
)

VARIANTS = {
    "dual feature": replace(TOKENIZER, router="feature", router_norm_groups=8),
    "triple entropy": replace(
        TOKENIZER, grains=3, encoder_mult=(1, 1, 2, 2), median_percent=30, fine_percent=40, decoder_mult=(2, 1)
    ),
    "triple feature": replace(
        TOKENIZER,
        grains=3,
        encoder_mult=(1, 1, 2, 2),
        median_percent=30,
        fine_percent=40,
        router="feature",
        router_norm_groups=0,
        router_gate="relu",
    ),
    "shrunk": replace(TOKENIZER, image_size=32, shrink=2, decoder_mult=(1, 2, 1)),
}
"""Tokenizers of two and three grains, with either router, and one whose encoder sees smaller images."""

MASKED = MQVAEConfig(
    image_size=16,
    channels=16,
    encoder_mult=(1, 2),
    decoder_channels=16,
    decoder_mult=(2, 1),
    z_channels=16,
    code_dim=8,
    codebook_size=32,
    norm_groups=8,
    kept_ratio=0.4,
    demask_blocks=2,
)


def small_transformer(
    layout: TokenLayout, seed: int = 0, given: bool = False, text: TextConfig | None = None
) -> StackedTransformer:
    """Random weights, large enough that every draw matters, in eval mode; ``given``: tokens may be given first."""
    torch.manual_seed(seed)
    config = TransformerConfig(32, 4, 1, 2, block_size=layout.max_length, given=given)
    net = StackedTransformer(config, layout, text)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
        if net.index_emb is not None:
            net.index_emb.normal_(std=0.1)
    return net.eval().requires_grad_(False)


def small_model(
    class_names: Sequence[str] = (),
    order: str = "row-first",
    seed: int = 0,
    sizes: DQVAEConfig = TOKENIZER,
    given: bool = False,
    text: TextConfig | None = None,
) -> Model:
    """A whole model with random weights; with class names it also has a null label."""
    torch.manual_seed(seed + 100)
    vae = DQVAE(sizes)
    if sizes.router == "feature":
        with torch.no_grad():
            logits = vae.logits(torch.rand(64, 3, sizes.image_size, sizes.image_size) * 2 - 1)
        vae.router_biases.copy_(fit_biases(logits.flatten(0, 2), sizes.ratios))
    elif sizes.grains == 2:
        vae.entropy_thresholds.fill_(1.0)
    else:
        vae.entropy_thresholds.copy_(torch.linspace(0.0, 3.0, 99))
    vae.quantizer.codebook.normal_()
    layout = TokenLayout(32, sizes.sides, order, len(class_names), null_label=bool(class_names))
    defaults = {"guidance": 1.5, "temperature": 0.8} if class_names else {}
    return Model(vae, small_transformer(layout, seed, given, text), tuple(class_names), defaults).eval()


def masked_model(
    class_names: Sequence[str] = (), seed: int = 0, text: TextConfig | None = None, **layout: Any
) -> Model:
    """As ``small_model``, of the MQ family; ``layout`` replaces arguments of the TokenLayout."""
    torch.manual_seed(seed + 100)
    vae = MQVAE(MASKED)
    vae.quantizer.codebook.normal_()
    fields = {**MASKED.layout(), "classes": len(class_names), "null_label": bool(class_names), **layout}
    defaults = {"guidance": 1.5, "temperature": 0.8} if class_names else {}
    net = small_transformer(TokenLayout(**fields), seed, text=text)
    return Model(vae, net, tuple(class_names), defaults).eval()


def ragged_tokens(layout: TokenLayout, count: int, seed: int = 0) -> list[Tokens]:
    """Sequences of random codes, from all coarse to all fine or of random cells, the positions of each segment
    shuffled."""
    rng = np.random.default_rng(seed)
    grains = [layout.random_grain(rng, i / max(1, count - 1)) for i in range(count)]
    return [layout.random_tokens(rng, i % layout.starts, grain, shuffled=True) for i, grain in enumerate(grains)]


@torch.no_grad()
def full_logits(net: StackedTransformer, tokens: Tokens) -> Logits:
    """Both heads of the uncached forward over one sequence alone, [T, V] each."""
    content, position, segment = (torch.from_numpy(part)[None] for part in tokens)
    following = torch.from_numpy(net.layout.following(tokens))[None]
    out = net(content[:, :-1], position[:, :-1], segment[:, :-1], following)
    steps = net.layout.steps_of(tokens)
    return {head: values[0, :steps].numpy() for head, values in zip(HEADS, out, strict=True)}


def engine_logits(engine: Engine, rows: Sequence[Tokens], slots: int) -> list[Logits]:
    """Both heads of an engine that is forced along sequences, which take slots in the order given."""
    return [
        {head: record[name] for head, name in zip(HEADS, LOGITS, strict=True)}
        for record in engine.force(rows, LOGITS, slots=slots)
    ]


def relative_error(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """Largest difference over the largest wanted value, NaN if there is any."""
    assert got.shape == want.shape, f"{got.shape} instead of {want.shape}"
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def cells_of(layout: TokenLayout, sequence: tuple[Sequence[int], Sequence[int]]) -> NDArray[np.int64]:
    """What an engine's ``cells`` hold at the end of a (content, joint position) sequence."""
    cells = np.full(layout.cells, -1, dtype=np.int64)
    for content, position in zip(*sequence, strict=True):
        if content < layout.codebook_size:
            joint = np.array(position)
            segment = int(layout.segment_of(joint))
            covered = layout.covered_cells(segment)[layout.local(joint)]
            assert (cells[covered] == -1).all(), "a cell is coded twice"
            cells[covered] = content + segment * layout.codebook_size
    assert (cells >= 0).sum() == layout.filled_cells, "there are not as many codes as there should be"
    return cells
