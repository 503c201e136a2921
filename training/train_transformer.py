"""Stage 2: ``python -m training.train_transformer DATA --tokenizer CKPT --out RUN``."""

from __future__ import annotations

import argparse
import copy
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dvq_rt.decoding import cells_to_maps
from dvq_rt.files import read_dataclass
from dvq_rt.images import grid, to_uint8
from dvq_rt.layout import TokenLayout
from dvq_rt.progress import progress_bar
from dvq_rt.prompts import BYTES
from dvq_rt.sampling import SamplingParams
from runtimes.errors import CheckpointError, ConfigError, DataError, short
from training import processes
from training.checkpoint import Model, digest, load_checkpoint, load_tokenizer
from training.cli import guarded
from training.config import read_config
from training.data.codes import Tokenization, begin, open_codes
from training.data.folder import ImageFolder
from training.data.listing import some
from training.data.pixels import to_float
from training.data.stream import Augment
from training.data.tokens import collate
from training.frozen_text import describe_frozen, load_frozen
from training.judging.metrics import psnr
from training.loop import Stage, TrainConfig, fit
from training.losses import stacked_losses
from training.models.tokenizer import Tokenizer
from training.models.transformer import StackedTransformer, TransformerConfig
from training.prompts import Prompts, TextSettings, directed_images, hold_out, read_captions
from training.run import open_run, say
from training.sampling import embed_prompts
from training.sequences import Sequences
from training.torch_program import sample_events
from training.warm_start import begin_from

SHOWN_PROMPTS = 16
"""Held-out captions that pictures are drawn for during training."""


@dataclass(frozen=True, slots=True)
class StageTwoConfig:
    """What stage 2 has beyond TrainConfig and TransformerConfig (whose ``block_size`` comes from the layout).

    Args:
        labels: label -> sub-folders it joins, ["*"] joins the rest; empty makes every sub-folder a label. The one label
            "" is an unconditional model: ``{"": ["*"]}``. Beside other labels "" gathers images that have none, which
            are trained with the null label; it becomes the last.
        flip_exclude: labels whose images are never mirrored.
        flip_exclude_words: phrases; images with a caption that has all words of one are never mirrored.
        hold_out: phrases; images with a caption that has all words of one are held out.
        order: order of the fine positions, ``row-first`` or ``region-first``.
        first: which head draws first, ``position`` or ``content``; empty takes the published order of the family.
        copies: augmented copies of the training set that are tokenized before training starts.
        balance: 0 draws images alike, 1 draws labels alike.
        label_dropout: share of the sequences trained with the null label; 0 makes a model without one.
        given: share of the sequences that begin with what a random edit keeps, so that the model draws the rest given
            all of it (``training.data.holes``); 0 makes a model that cannot.
        val_fraction: share of the images held out; give the value of stage 1.
        min_psnr: stop if the tokenizer's mean PSNR on the held-out images is lower, dB.
        defaults: recommended sampling parameters, kept in the checkpoint.
    """

    labels: dict[str, list[str]] = field(default_factory=dict)
    flip_exclude: tuple[str, ...] = ()
    flip_exclude_words: tuple[str, ...] = ()
    hold_out: tuple[str, ...] = ()
    order: str = "row-first"
    first: str = ""
    copies: int = 1
    balance: float = 0.0
    label_dropout: float = 0.1
    given: float = 0.0
    val_fraction: float = 0.05
    min_psnr: float = 15.0
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.copies <= 1 << 20:
            raise ConfigError(f"stage.copies is {short(self.copies)}; it must be at least 1, and {1 << 20} at most")
        if not 0 <= self.balance <= 1 or not 0 <= self.label_dropout < 1:
            raise ConfigError(
                f"stage.balance {self.balance} must be in [0, 1], stage.label_dropout {self.label_dropout} in [0, 1)"
            )
        if not 0 <= self.given < 1:
            raise ConfigError(f"stage.given is {short(self.given)}; it must be in [0, 1)")
        if not abs(self.min_psnr) <= 1e9:
            raise ConfigError(f"stage.min_psnr is {short(self.min_psnr)}; it must be a number of decibels")
        for label, names in self.labels.items():
            if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"stage.labels: {label!r} is {names!r}; it must be a list of sub-folders")
        if len(self.labels) > 1 and "" in self.labels:
            if not self.label_dropout:
                raise ConfigError(
                    'stage.labels: "" (images without a label) needs the null label, a stage.label_dropout above 0'
                )
            last = {"": self.labels[""]}
            object.__setattr__(self, "labels", {name: self.labels[name] for name in self.labels if name} | last)
        SamplingParams.from_dict(self.defaults)


SECTIONS: dict[str, Any] = {"transformer": dict, "training": TrainConfig, "stage": StageTwoConfig, "text": dict}
"""Of a configuration, see ``read_config``."""


def batch_losses(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """``stacked_losses`` of a collated batch; ``counts`` is in it, if it is a part of one."""
    prompt = batch.get("prompt"), batch.get("prompt_length")
    inputs = (batch[name] for name in ("content", "position", "segment", "following"))
    position, content = model(*inputs, *prompt, batch.get("kind"))
    targets = batch["target_position"], batch["target_content"], batch["target_segment"]
    return stacked_losses(position, content, *targets, batch.get("counts"))


def train_transformer(
    data: str | Path,
    run: str | Path,
    tokenizer: str | Path,
    transformer: dict[str, Any],
    training: TrainConfig,
    stage: StageTwoConfig,
    resume: bool = False,
    init: str | Path | None = None,
    device: str = "",
    codes: str | Path | None = None,
    text: TextSettings | None = None,
) -> Model:
    """Train the stacked transformer on the codes of a trained tokenizer; see ``fit`` for what the run folder holds.

    Of several processes, each calls this with the same arguments.

    Args:
        data: see ``list_images``.
        run: the run folder.
        tokenizer: checkpoint folder of stage 1.
        transformer, training, stage: sizes and settings.
        resume: go on from the run's checkpoint, if there is one; see ``open_run``.
        init: checkpoint folder whose transformer, of the same sizes, is trained on; see ``begin_from``.
        codes: what ``training.tokenize`` has written for these images, tokenizer and settings; None makes it, in the
            run folder.
        text: makes a model that reads prompts, trained on the images' captions; None makes one without.
        device: see ``processes.start``.

    Raises:
        DataError, ConfigError, CheckpointError, TrainingError: what a user can cause.
    """
    accelerator = processes.start(device, training.precision, training.compile)
    training.check_parts()
    vae = load_tokenizer(tokenizer).requires_grad_(False).to(accelerator.device)
    work = tokenization(data, vae, training, stage)
    folder = work.folder
    names = tuple(filter(None, folder.classes))  # the null label's number is that of "", if it is there
    unconditional = not names
    layout = TokenLayout(
        order=stage.order,
        classes=len(names),
        null_label=stage.label_dropout > 0 and not unconditional,
        **{**vae.config.layout(), **({"first": stage.first} if stage.first else {})},
    )
    guidance = SamplingParams.from_dict(stage.defaults).guidance
    if guidance != 1 and not layout.null_label and not (text and text.dropout):
        reason = "an unconditional model (stage.labels)" if unconditional else "stage.label_dropout 0"
        raise ConfigError(f"stage.defaults has guidance {guidance:g}, but {reason} has no null label: set it to 1")
    sizes = {**transformer, "block_size": layout.max_length, "given": stage.given > 0}
    config = read_dataclass(TransformerConfig, sizes, "section 'transformer'", defaults=True)
    settings = {"transformer": config, "training": training, "stage": stage, **({"text": text} if text else {})}
    before = None if init is None else load_checkpoint(init)
    inputs = {"tokenizer": (tokenizer, digest(vae))}
    if init is not None and before is not None:
        inputs["init"] = (init, digest(before.both()[1]))
    with open_run(run, resume, settings, folder, inputs, new_classes=unconditional) as (path, resumed):
        processes.on_first(lambda: check_tokenizer(vae, folder, stage.min_psnr, str(tokenizer)))
        torch.manual_seed(training.seed)
        if resumed:
            model = load_checkpoint(path / "checkpoint")
        else:
            frozen = load_frozen(text.encoder) if text and text.encoder else None
            known = before.text_tokenizer if before is not None and before.text else ""
            source, reads = (BYTES, None) if text is None else read_captions(folder, text, frozen, known)
            model = Model(vae, StackedTransformer(config, layout, reads), names, stage.defaults, source)
            model.text_encoder = {} if frozen is None else describe_frozen(frozen)
        if before is not None and not resumed:
            begin_from(model, before, str(init))
        model.both()[0].requires_grad_(False)
        if codes is None:
            make_codes(path / "codes", work)
        prompts = None if text is None else Prompts(model, folder, text, path / "features")
        stages = learning(model, work, Path(codes or path / "codes"), training, stage, accelerator.device, prompts)
        return fit(stages, training, path, resumed, accelerator)


def tokenization(
    data: str | Path, vae: Tokenizer, training: TrainConfig, stage: StageTwoConfig, shard_size: int = 4096
) -> Tokenization:
    """How stage 2 has its images tokenized."""
    folder, augment = labelled_images(data, vae.config.image_size, training, stage)
    folder.check_held_out()
    return Tokenization(vae, folder, stage.copies, training.seed + 1, augment, shard_size, stage.given > 0)


def labelled_images(
    data: str | Path, size: int, training: TrainConfig, stage: StageTwoConfig
) -> tuple[ImageFolder, Augment]:
    """The images of stage 2 with its labels and split, and how they are augmented."""
    folder = ImageFolder(data, size, val_fraction=stage.val_fraction, seed=training.seed, labels=stage.labels or None)
    hold_out(folder, stage.hold_out)
    directed = directed_images(folder, stage.flip_exclude_words)
    return folder, Augment(training.shift, training.flip, frozenset(stage.flip_exclude), directed, training.crop)


def make_codes(out: Path, work: Tokenization) -> None:
    """Tokenize all images into a folder, which is made anew where it holds codes of something else. Processes that
    train together share the parts."""

    def started() -> None:
        try:
            begin(out, work)
        except DataError as error:
            say(f"tokenizing again: {error}")
            shutil.rmtree(out)
            begin(out, work)

    processes.on_first(started)
    own = work.parts()[processes.number() :: processes.count()]
    count, other = sum(part.count for part in own), processes.number() > 0
    with progress_bar(total=count, desc="tokenizing", unit="image", disable=other) as bar:
        for part in own:
            work.write(out, part, bar.update)
    processes.on_first(lambda: None)  # all are done


def learning(
    model: Model,
    work: Tokenization,
    codes: Path,
    training: TrainConfig,
    stage: StageTwoConfig,
    device: torch.device,
    prompts: Prompts | None = None,
) -> Stage:
    """What ``fit`` does to a transformer, on the codes in a folder.

    Raises:
        DataError: a label has no image that can be decoded, or the codes are incomplete or of something else.
    """
    net, folder = model.both()[1], work.folder
    layout, names = net.layout, model.class_names
    train, val = open_codes(codes, work)
    check_labels(folder, train.labels, val.labels)
    sequences = Sequences(
        train,
        layout,
        training,
        device,
        weights=np.bincount(train.labels).astype(float)[train.labels] ** -stage.balance,
        label_dropout=stage.label_dropout,
        given=stage.given,
        prompts=prompts,
    )

    def validate(model: Model) -> dict[str, float]:
        sums: dict[str, float] = {}
        for start in range(0, len(val.labels), 16):
            rows = np.arange(start, min(start + 16, len(val.labels)))
            batch = collate(layout, val, rows, val.labels[rows])
            if prompts is not None:
                batch |= prompts.collate(val.images[rows], np.zeros(len(rows)), np.zeros(len(rows), bool))
            batch = {name: x.to(device) for name, x in batch.items()}
            for name, value in batch_losses(transformer_of(model), batch).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(rows) / len(val.labels)
        return sums

    def pictures(model: Model) -> dict[str, np.ndarray]:
        count = min(max(1, len(names)), 10)
        shown = [i % count for i in range(2 * count)]
        params = SamplingParams.from_dict(stage.defaults)
        model = model if device.type == "cpu" else copy.deepcopy(model).cpu()  # where the decode loop's arrays are
        net = transformer_of(model)
        if prompts is None:
            images = decode_cells(model, [event.cells for event in sample_events(net, shown, params)])
            return {"samples": np.asarray(grid(images, columns=count))}
        held = folder.val[np.linspace(0, len(folder.val) - 1, min(SHOWN_PROMPTS, len(folder.val))).astype(int)]
        given = embed_prompts(net, [prompts.read(prompts.caption(i)) for i in held])
        labels = folder.labels[held].tolist()
        images = decode_cells(model, [event.cells for event in sample_events(net, labels, params, prompts=given)])
        pairs = np.concatenate([folder.load(held)[0], images])  # held-out images above what their captions give
        return {"samples": np.asarray(grid(pairs, columns=len(held)))}

    def loss(net: nn.Module, part: dict[str, Tensor], step: int, scale: float | Tensor) -> dict[str, Tensor]:
        return batch_losses(net, part)

    return Stage(model, transformer_of, sequences.stream, loss, validate, pictures)


def transformer_of(model: Model) -> StackedTransformer:
    """The transformer of a whole model."""
    return model.both()[1]


def check_labels(folder: ImageFolder, train: NDArray[np.int64], val: NDArray[np.int64]) -> None:
    """Warn of labels without a held-out image, which training does not need.

    Raises:
        DataError: a label has no image to train on.
    """
    for labels, wrong in ((train, True), (val, False)):
        counts = np.bincount(labels, minlength=len(folder.classes))
        if lacking := [name for name, count in zip(folder.classes, counts, strict=True) if not count]:
            if wrong:
                raise DataError(f"no training image of {some(lacking)} can be decoded; replace them, or leave it out")
            warnings.warn(
                f"no image of {some(lacking)} is held out, so the validation loss says nothing of it; raise "
                "stage.val_fraction, or give it at least 10 images",
                stacklevel=4,
            )


def decode_cells(model: Model, cells: list[NDArray[np.int32]]) -> NDArray[np.uint8]:
    """Images uint8 [N, S, S, 3] of what drawn images hold, see ``dvq_rt.decoding.Event``."""
    tokenizer, transformer = model.both()
    codes = np.stack([cells_to_maps(transformer.layout, row)[0] for row in cells])
    images = tokenizer.decode_maps(torch.from_numpy(codes))
    return to_uint8(images.numpy())


@torch.no_grad()
def check_tokenizer(vae: Tokenizer, folder: ImageFolder, least: float, name: str) -> None:
    """Assert the tokenizer's quality before its codes are used.

    Raises:
        CheckpointError: its PSNR on held-out images is below ``least`` dB.
    """
    x = to_float(folder.load(folder.val[:32])[0]).to(next(vae.parameters()).device)
    measured = float(psnr(x, vae.decode_maps(vae.encode_maps(x)[0])).mean())
    if not measured >= least:
        raise CheckpointError(
            f"{name} reconstructs held-out images of {folder.root} at {measured:.1f} dB, below stage.min_psnr {least}; "
            "train it longer, or give the tokenizer of these images"
        )


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.train_transformer", description="Train a DQ-Transformer or a Stackformer."
    )
    parser.add_argument("data", help="folder of images with one sub-folder per class, or a list of paths and classes")
    parser.add_argument("--tokenizer", required=True, help="checkpoint folder of stage 1")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--config", default="emoji_transformer", help="JSON file, or a name in training/configs")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument(
        "--init", metavar="CKPT", help="checkpoint folder of stage 2 to train on from, of the same sizes"
    )
    parser.add_argument(
        "--codes", metavar="CODES", help="what training.tokenize wrote with the same settings; otherwise it is made"
    )
    parser.add_argument("--resume", action="store_true", help="go on from RUN/checkpoint, if there is one")
    parser.add_argument("--device", default="", help="cuda, mps or cpu; by default the first of these that is there")
    args = parser.parse_args(argv)
    config = read_config(args.config, SECTIONS, args.set)
    settings = config["transformer"], config["training"], config["stage"]
    text = read_dataclass(TextSettings, config["text"], "section 'text'", defaults=True) if config["text"] else None
    where = args.resume, args.init, args.device
    try:
        train_transformer(args.data, args.out, args.tokenizer, *settings, *where, args.codes, text)
        say(str(Path(args.out) / "best"))
    finally:
        processes.leave()


if __name__ == "__main__":
    main()
