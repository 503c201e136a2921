"""Fit a router to a folder of images: ``python -m training.thresholds DATA --checkpoint CKPT``.

Of the entropy router this makes the table of thresholds, whose entry p is the p-th percentile of the patch entropies of
all images, computed with the model's own bins (spec/dq.md section 3 and Q14); of a feature router the biases with which
its largest logits give each grain its share of the regions. Either lives in the checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dvq_rt.progress import progress_bar
from runtimes.errors import CheckpointError, DataError
from training.checkpoint import STATE, load_checkpoint, load_training_state, save_checkpoint
from training.cli import guarded
from training.data.folder import ImageFolder
from training.data.pixels import to_float
from training.models.blocks import shrunk
from training.models.dqvae import DQVAE, DQVAEConfig
from training.models.router import GRAINS, fit_biases, patch_entropy


def threshold_table(images: Iterable[np.ndarray], patch: int, low: float = -1.0, shrink: int = 1) -> Tensor:
    """Percentiles 1 to 99 of the patch entropies.

    Args:
        images: uint8 [S, S, 3] each.
        patch: patch side in pixels (the coarse stride), of images that are ``shrink`` times smaller.
        low: value of the first entropy bin, see ``patch_entropy``.

    Returns:
        float32 [99], see ``percentiles``.

    Raises:
        DataError: there is no image.
    """
    seen = (shrunk(to_float(image[None]), shrink) for image in images)
    entropies = [patch_entropy(image, patch, low).flatten() for image in seen]
    if not entropies:
        raise DataError("no image can be decoded, so there are no entropy thresholds; replace the files")
    return percentiles(torch.cat(entropies))


def percentiles(values: Tensor) -> Tensor:
    """Percentiles 1 to 99: float [N] -> [99], entry p - 1 is element floor(N * p / 100) of the sorted values."""
    ordered = values.sort().values
    return torch.stack([ordered[len(ordered) * p // 100] for p in range(1, 100)])


def folder_thresholds(folder: ImageFolder, config: DQVAEConfig, limit: int = 20_000) -> Tensor:
    """``threshold_table`` of a folder's training images for a model; of an even subset when there are more than
    ``limit``."""
    subset = folder.train[:: max(1, len(folder.train) // limit)]
    images = (image for batch, _ in folder.chunks(subset, 64) for image in batch)
    images = progress_bar(images, total=len(subset), desc="patch entropies")
    return threshold_table(images, config.stride // config.shrink, config.entropy_low, config.shrink)


@torch.no_grad()
def fit_router(vae: DQVAE, folder: ImageFolder, limit: int = 20_000) -> None:
    """Fit the thresholds or biases of a model in eval mode to a folder's training images; to an even subset when there
    are more than ``limit``."""
    if vae.config.router == "entropy":
        vae.entropy_thresholds.copy_(folder_thresholds(folder, vae.config, limit))
        return
    subset = folder.train[:: max(1, len(folder.train) // limit)]
    device = vae.router_biases.device
    logits = [vae.logits(to_float(images).to(device)).flatten(0, 2) for images, _ in folder.chunks(subset, 64)]
    if not logits:
        raise DataError("no image can be decoded, so the router cannot be fitted; replace the files")
    vae.router_biases.copy_(fit_biases(torch.cat(logits), vae.config.ratios))


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.thresholds", description=__doc__)
    parser.add_argument("data", help="folder of images with one sub-folder per class")
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder whose thresholds or biases are replaced")
    args = parser.parse_args(argv)
    model = load_checkpoint(args.checkpoint)
    if not isinstance(model.tokenizer, DQVAE):
        raise CheckpointError(f"{args.checkpoint} holds no DQ-VAE; give a checkpoint of training.train_tokenizer")
    resumable = (Path(args.checkpoint) / STATE).exists()
    state = load_training_state(args.checkpoint) if resumable else None
    vae, config = model.tokenizer, model.tokenizer.config
    fit_router(vae, ImageFolder(args.data, config.image_size, val_fraction=0))
    save_checkpoint(model, args.checkpoint, state)
    if config.router == "entropy":
        for p in (10, 25, 50, 75, 90):
            print(f"{p:3d} % of the patches lie at or below {vae.entropy_thresholds[p - 1]:.4f} nats")
    else:
        for name, bias in zip(GRAINS[config.grains], vae.router_biases.tolist(), strict=True):
            print(f"bias of {name}: {bias:.4f}")
    print(args.checkpoint)


if __name__ == "__main__":
    main()
