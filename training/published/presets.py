"""Models of the published sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dvq_rt.layout import TokenLayout
from runtimes.errors import ConfigError
from training.checkpoint import Model
from training.models.dqvae import DQVAE, DQVAEConfig
from training.models.mqvae import MQVAE, MQVAEConfig
from training.models.transformer import StackedTransformer, TransformerConfig

DQ = DQVAEConfig(
    image_size=256,
    channels=128,
    encoder_mult=(1, 1, 2, 2, 4),
    decoder_channels=128,
    decoder_mult=(1, 1, 2, 2),
    blocks=2,
    decoder_blocks=2,
    attention=(16, 32),
    decoder_attention=(32,),
    z_channels=256,
    codebook_size=1024,
    code_dim=256,
)


def dq_model(config: DQVAEConfig, order: str = "row-first") -> Model:
    """A DQ-VAE, and 6 position and 18 content blocks of width 1,024 with 1,000 labels (spec/dq.md section 14)."""
    tokenizer = DQVAE(config)
    if config.router == "entropy":
        tokenizer.entropy_thresholds.copy_(torch.linspace(0.0, 3.0, 99))
    layout = TokenLayout(**config.layout(), classes=1000, order=order)
    sizes = TransformerConfig(width=1024, heads=8, position_blocks=6, content_blocks=18, block_size=2048)
    return Model(tokenizer, StackedTransformer(sizes, layout))


def dq_class_p6c18() -> Model:
    """``class_imagenet_p6c18``: entropy-routed DQ-VAE of 256 px with 16 x 16 and 32 x 32 cells, 1,024 codes."""
    return dq_model(DQ)


def dq_feature_class_p6c18() -> Model:
    """The same sizes with the learned router of ``dqvae-dual-r-05_imagenet``."""
    return dq_model(replace(DQ, router="feature"))


def dq_triple_class_p6c18() -> Model:
    """The tokenizer of ``dqvae-triple-r-03-03_imagenet`` (8 x 8, 16 x 16 and 32 x 32 cells) with the same transformer,
    which the released code does not have."""
    mult, sides = (1, 1, 2, 2, 4, 4), (8, 16, 32)
    config = replace(
        DQ, encoder_mult=mult, attention=sides, grains=3, router="feature", median_percent=30, fine_percent=30
    )
    return dq_model(config, "region-first")


def mq_class_v12p12() -> Model:
    """The class-conditional MQ-VAE + Stackformer: 256 px, 256 of 32 x 32 cells kept, 1,024 codes, 12 content and 12
    position blocks of width 1,024, 1,000 labels (spec/mq.md section 7)."""
    tokenizer = MQVAE(
        MQVAEConfig(
            image_size=256,
            channels=128,
            encoder_mult=(1, 1, 2, 2),
            decoder_channels=128,
            decoder_mult=(1, 1, 2, 2),
            blocks=2,
            decoder_blocks=2,
            attention=(32,),
            decoder_attention=(32,),
            z_channels=256,
            codebook_size=1024,
            code_dim=256,
            kept_ratio=0.25,
            demask_blocks=8,
        )
    )
    layout = TokenLayout(**tokenizer.config.layout(), classes=1000)
    sizes = TransformerConfig(
        width=1024, heads=16, position_blocks=12, content_blocks=12, block_size=1024, segment_embedding=False
    )
    return Model(tokenizer, StackedTransformer(sizes, layout))


PRESETS: dict[str, Callable[[], Model]] = {
    f.__name__: f for f in (dq_class_p6c18, dq_feature_class_p6c18, dq_triple_class_p6c18, mq_class_v12p12)
}


def preset(name: str, seed: int = 0) -> Model:
    """A model of a published size in eval mode, with random weights of a seed.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset is {name!r}; it must be one of {sorted(PRESETS)}")
    torch.manual_seed(seed)
    return PRESETS[name]().eval().requires_grad_(False)
