"""Stage 1: ``python -m training.train_tokenizer DATA --out RUN``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dvq_rt.files import read_dataclass
from dvq_rt.images import grain_overlay, grid, to_uint8
from runtimes.errors import ConfigError
from training import processes
from training.checkpoint import Model, digest, family_config, load_strictly, load_tokenizer, new_tokenizer
from training.cli import guarded
from training.config import read_config
from training.data.folder import ImageFolder
from training.data.pixels import to_float
from training.data.stream import Augment, batches
from training.judging.metrics import psnr, ssim
from training.loop import Critic, Stage, TrainConfig, fit
from training.models.dqvae import DQVAE, DQVAEConfig
from training.models.mqvae import MQVAEConfig
from training.models.tokenizer import Tokenizer
from training.objective import Objective, StageOneConfig, starts
from training.perceptual import load_perceptual
from training.run import open_run, say
from training.thresholds import fit_router


def held_out_folder(data: str | Path, size: int, training: TrainConfig, stage: StageOneConfig) -> ImageFolder:
    """The images of stage 1, split as for its training."""
    fraction, exclude = stage.val_fraction, stage.exclude
    return ImageFolder(data, size, val_fraction=fraction, seed=training.seed, exclude=exclude)


def train_tokenizer(
    data: str | Path,
    run: str | Path,
    tokenizer: DQVAEConfig | MQVAEConfig,
    training: TrainConfig,
    stage: StageOneConfig,
    resume: bool = False,
    init: str | Path | None = None,
    device: str = "",
    init_decoder: str | Path | None = None,
) -> Model:
    """Train a tokenizer on a folder of images; see ``fit`` for what the run folder holds.

    Of several processes, each calls this with the same arguments.

    Args:
        data: see ``list_images``.
        run: the run folder.
        tokenizer, training, stage: sizes and settings.
        resume: go on from the run's checkpoint, if there is one; see ``open_run``.
        init: checkpoint folder whose tokenizer, of the same sizes, is trained on. Its codebook is used from the first
            step; of a DQ-VAE the entropy thresholds are made anew of these images, if all learns.
        device: see ``processes.start``.
        init_decoder: checkpoint folder, of either family, whose decoder is trained on in place of that of ``init``, if
            ``stage.learns`` is ``decoder``; see ``begin_from``.

    Raises:
        DataError, ConfigError, CheckpointError, TrainingError: what a user can cause.
    """
    stage.check_size(tokenizer.image_size)
    accelerator = processes.start(device, training.precision, training.compile)
    training.check_parts()
    perceptual = load_perceptual(stage.perceptual, stage.lpips_weights)
    folder = held_out_folder(data, tokenizer.image_size, training, stage)
    folder.check_held_out()
    settings = {"tokenizer": tokenizer, "training": training, "stage": stage}
    before = None if init is None else load_tokenizer(init)
    fixed = stage.learns == "decoder"
    if fixed and init is None:
        raise ConfigError("stage.learns is 'decoder', which needs the codes of a tokenizer; give it with --init")
    if init_decoder is not None and not fixed:
        raise ConfigError(f"--init-decoder {init_decoder} is for stage.learns=decoder, not {stage.learns}")
    painter = None if init_decoder is None else load_tokenizer(init_decoder)
    inputs = {} if init is None or before is None else {"init": (init, digest(before))}
    if init_decoder is not None and painter is not None:
        inputs["init-decoder"] = (init_decoder, digest(painter))
    if perceptual:
        inputs["stage.perceptual"] = (str(stage.lpips_weights or stage.perceptual), digest(perceptual))

    def begins(steps: int) -> dict[str, int]:
        return starts(stage, steps, has_codes=init is not None)

    with open_run(run, resume, settings, folder, inputs, starts=begins) as (path, resumed):
        torch.manual_seed(training.seed)
        vae = load_tokenizer(path / "checkpoint") if resumed else new_tokenizer(tokenizer)
        if before is not None and not resumed:
            begin_from(vae, before, str(init), fixed, painter)
        if isinstance(vae, DQVAE) and vae.config.router == "entropy" and not (resumed or fixed):
            processes.on_first(lambda: fit_router(vae, folder))  # ``fit`` gives it to the others
        if fixed:
            vae.fix_codes()
        last = vae.get_parameter("decoder.conv_out.weight")
        grains = len(tokenizer.sides)
        objective = Objective(stage, begins(training.steps), tokenizer.codebook_size, last, perceptual, grains)
        if perceptual:
            perceptual.to(accelerator.device)
        stages = learning(vae, objective, folder, training, accelerator.device)
        return fit(stages, training, path, resumed, accelerator)


def begin_from(vae: Tokenizer, before: Tokenizer, source: str, fixed: bool, painter: Tokenizer | None = None) -> None:
    """Give a tokenizer the weights of another one, which must be of its sizes; if the codes are ``fixed``, what makes
    images of them may be of others, and its decoder be that of a ``painter``. What has the same size in both keeps its
    weights then, levels being counted from the one of the fewest pixels, and the rest starts anew.

    Raises:
        CheckpointError: it is not.
    """
    weights = before.state_dict()
    if fixed:
        codes = {name: x for name, x in weights.items() if not name.startswith(before.behind_codes)}
        own = {name: x for name, x in vae.state_dict().items() if name.startswith(vae.behind_codes)}
        drawing = painter or before
        more = len(vae.config.decoder_mult) - len(drawing.config.decoder_mult)
        level = re.compile(r"(?<=decoder\.up\.)\d+")
        there = {name: x for name, x in weights.items() if not name.startswith("decoder.")}
        for name, x in drawing.state_dict().items():
            if name.startswith("decoder."):
                there[level.sub(lambda at: str(int(at[0]) + more), name)] = x
        same = {name: there[name] for name, x in own.items() if name in there and x.shape == there[name].shape}
        if len(same) < len(own):
            say(f"the decoder of {source} is of another size; {len(own) - len(same)} of {len(own)} weights start anew")
        weights = codes | own | same
    load_strictly(vae, weights, f"the tokenizer of {source}")


def learning(
    vae: Tokenizer, objective: Objective, folder: ImageFolder, training: TrainConfig, device: torch.device
) -> Stage:
    """What ``fit`` does to a tokenizer."""

    def stream(step: int) -> Iterator[list[np.ndarray]]:
        parts = training.accumulate
        made = batches(
            folder,
            folder.train,
            training.batch_size // parts,
            seed=training.seed,
            step=step * parts,
            augment=Augment(shift=training.shift, flip=training.flip, crop=training.crop),
            workers=training.workers,
            part=(processes.number(), processes.count()),
        )
        while True:
            yield [next(made)[0] for _ in range(parts)]

    def before(step: int) -> None:
        if step == objective.starts.get("codes"):
            with processes.alone():  # all do the same
                initialize_codebook(vae, folder, training.batch_size, training.seed)
            processes.share(list(vae.quantizer.buffers()))

    def loss(net: nn.Module, images: np.ndarray, step: int, scale: float | Tensor) -> dict[str, Tensor]:
        return objective.losses(net, processes.moved(to_float(images), device), step, scale)

    def validate(model: Model) -> dict[str, float]:
        net = tokenizer_of(model)
        if isinstance(net, DQVAE) and net.config.router == "feature" and not net.codes_fixed:  # it goes on learning
            fit_router(net, folder)
        sums: dict[str, float] = {}
        for images, _ in folder.chunks(folder.val, 16):
            x = to_float(images).to(device)
            y = net.decode_maps(net.encode_maps(x)[0]) if objective.quantizing else net(x, quantize=False).images
            parts = {"psnr": psnr(x, y), "ssim": ssim(x, y)}
            if objective.quantizing:  # a checkpoint without a codebook is no candidate for the best one
                parts |= objective.error(x, y)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value.sum()) / len(folder.val)
        return sums

    def pictures(model: Model) -> dict[str, np.ndarray]:
        originals, _ = folder.load(folder.val[:: max(1, len(folder.val) // 16)][:16])
        out = tokenizer_of(model)(to_float(originals).to(device), quantize=objective.quantizing)
        rows = np.concatenate([originals, to_uint8(out.images.cpu().numpy())])
        overlays = [
            np.asarray(grain_overlay(image, grain, vae.config.sides).convert("RGB"))
            for image, grain in zip(originals, out.grain.cpu().numpy(), strict=True)
        ]
        return {
            "reconstruction": np.asarray(grid(rows, columns=len(originals))),
            "grain": np.asarray(grid(np.stack(overlays), columns=8)),
            "score": np.asarray(grid(heat(out.scores.float().cpu(), vae.config.image_size), columns=8)),
        }

    critic = Critic(objective.discriminator, objective.critic_loss) if objective.discriminator else None
    return Stage(
        Model(vae), tokenizer_of, stream, loss, validate, pictures, before, critic, "picture", objective.problem
    )


def tokenizer_of(model: Model) -> Tokenizer:
    """The tokenizer of a model that has one."""
    assert model.tokenizer is not None
    return model.tokenizer


def heat(scores: Tensor, size: int) -> np.ndarray:
    """Score maps [B, h, w] as grey pictures uint8 [B, size, size, 3], each one's range from black to white."""
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    grey = to_uint8(((scores - low) / (high - low).clamp_min(1e-5) * 2 - 1)[:, None].expand(-1, 3, -1, -1).numpy())
    rows = np.arange(size) * grey.shape[1] // size
    return grey[:, rows][:, :, rows]


@torch.no_grad()
def initialize_codebook(vae: Tokenizer, folder: ImageFolder, batch_size: int, seed: int) -> None:
    """Start the codebook from k-means of the features of a few hundred training images, one vector per code place."""
    generator = torch.Generator().manual_seed(seed)
    some_images = folder.train[torch.randperm(len(folder.train), generator=generator)[:256].numpy()]
    vectors, count = [], 0
    for images, _ in folder.chunks(some_images, 16):
        count += len(images)
        vectors.append(vae.code_vectors(to_float(images).to(vae.quantizer.codebook.device)))
    features = torch.cat(vectors)
    vae.quantizer.initialize(features, len(features) * batch_size / count, noise=generator)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.train_tokenizer", description="Train a DQ-VAE or an MQ-VAE."
    )
    parser.add_argument("data", help="folder of images, or a list of their paths")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--config", default="emoji_tokenizer", help="JSON file, or a name in training/configs")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--init", metavar="CKPT", help="checkpoint folder to train on from, of the same sizes")
    parser.add_argument("--init-decoder", metavar="CKPT", help="checkpoint folder whose decoder to train on instead")
    parser.add_argument("--resume", action="store_true", help="go on from RUN/checkpoint, if there is one")
    parser.add_argument("--device", default="", help="cuda, mps or cpu; by default the first of these that is there")
    args = parser.parse_args(argv)
    sections: dict[str, Any] = {"tokenizer": dict, "training": TrainConfig, "stage": StageOneConfig}
    config = read_config(args.config, sections, args.set)
    sizes = dict(config["tokenizer"])
    family = family_config(sizes.pop("family", "dq"))
    tokenizer = read_dataclass(family, sizes, "section 'tokenizer'", defaults=True)
    settings = tokenizer, config["training"], config["stage"]
    try:
        train_tokenizer(args.data, args.out, *settings, args.resume, args.init, args.device, args.init_decoder)
        say(str(Path(args.out) / "best"))
    finally:
        processes.leave()


if __name__ == "__main__":
    main()
