"""Entropy thresholds from a folder of images: ``python -m training.thresholds DATA --checkpoint CKPT``.

The table's entry p is the p-th percentile of the patch entropies of all images, computed with the model's own bins
(spec/dq.md section 3 and Q14). It lives in the checkpoint.
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
from training.models.dqvae import DQVAE, DQVAEConfig, patch_entropy


def threshold_table(images: Iterable[np.ndarray], patch: int, low: float = -1.0) -> Tensor:
    """Percentiles 1 to 99 of the patch entropies.

    Args:
        images: uint8 [S, S, 3] each.
        patch: patch side in pixels (the coarse stride).
        low: value of the first entropy bin, see ``patch_entropy``.

    Returns:
        float32 [99], see ``percentiles``.

    Raises:
        DataError: there is no image.
    """
    entropies = [patch_entropy(to_float(image[None]), patch, low).flatten() for image in images]
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
    return threshold_table(
        progress_bar(images, total=len(subset), desc="patch entropies"), config.stride, config.entropy_low
    )


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.thresholds", description=__doc__)
    parser.add_argument("data", help="folder of images with one sub-folder per class")
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder whose table is replaced")
    args = parser.parse_args(argv)
    model = load_checkpoint(args.checkpoint)
    if not isinstance(model.tokenizer, DQVAE):
        raise CheckpointError(f"{args.checkpoint} holds no DQ-VAE; give a checkpoint of training.train_tokenizer")
    resumable = (Path(args.checkpoint) / STATE).exists()
    state = load_training_state(args.checkpoint) if resumable else None
    config = model.tokenizer.config
    table = folder_thresholds(ImageFolder(args.data, config.image_size, val_fraction=0), config)
    model.tokenizer.entropy_thresholds.copy_(table)
    save_checkpoint(model, args.checkpoint, state)
    for p in (10, 25, 50, 75, 90):
        print(f"{p:3d} % of the patches lie at or below {table[p - 1]:.4f} nats")
    print(args.checkpoint)


if __name__ == "__main__":
    main()
