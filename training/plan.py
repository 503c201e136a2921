"""What a training takes: ``python -m training.plan CONFIG``.

Prints parameters, memory per process and the speed that a number of days needs, of either stage. The model is not made;
see ``training.footprint`` for how it is counted.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from dvq_rt.files import read_dataclass, read_json
from dvq_rt.layout import TokenLayout
from runtimes.errors import ConfigError, InputError
from training.checkpoint import family_config
from training.cli import guarded
from training.config import CONFIGS, read_config
from training.footprint import PRECISIONS, Footprint, footprint, measured, tokenizer_work, transformer_work
from training.judging.report import table
from training.loop import TrainConfig
from training.models.dqvae import DQVAEConfig
from training.models.mqvae import MQVAEConfig
from training.models.text import TextConfig
from training.models.transformer import TransformerConfig
from training.objective import StageOneConfig
from training.prompts import TextSettings
from training.train_transformer import SECTIONS, StageTwoConfig

GIB, DAY = 2**30, 86400


def share(batch: int, runs: int) -> int:
    """Images that go through the networks of one process at once.

    Args:
        runs: processes times the parts of a batch (``training.accumulate``).

    Raises:
        InputError: the batch cannot be divided.
    """
    if batch % runs:
        raise InputError(
            f"a batch of {batch} images cannot be divided by {runs} (--processes times training.accumulate); give "
            "another --batch"
        )
    return batch // runs


def mean_codes(config: DQVAEConfig | MQVAEConfig) -> float:
    """Codes of an image whose grains have their shares."""
    if isinstance(config, MQVAEConfig):
        return config.kept
    return config.sides[0] ** 2 * (1 + sum(share * (4**s - 1) for s, share in enumerate(config.ratios, 1)))


def read_tokenizer(name: str, overrides: list[str]) -> tuple[DQVAEConfig | MQVAEConfig, dict[str, Any]]:
    """Sizes of a tokenizer, and all sections of its configuration.

    Raises:
        ConfigError: the configuration is wrong.
    """
    sections: dict[str, Any] = {"tokenizer": dict, "training": TrainConfig, "stage": StageOneConfig}
    config = read_config(name, sections, overrides)
    sizes = dict(config["tokenizer"])
    family = family_config(sizes.pop("family", "dq"))
    return read_dataclass(family, sizes, "section 'tokenizer'", defaults=True), config


def read_text(values: dict[str, Any]) -> TextConfig | None:
    """Sizes of a section ``text``; None where it is empty.

    Raises:
        ConfigError: it is wrong, or names a frozen encoder.
    """
    if not values:
        return None
    text = read_dataclass(TextSettings, values, "section 'text'", defaults=True)
    if text.encoder:
        raise ConfigError("a frozen encoder's width is not planned; plan without it: --set text.encoder=")
    return TextConfig(text.length, text.vocabulary, text.blocks)


def report(plan: Footprint, batch: int, units: float, unit: str, steps: int, runs: int, days: float) -> str:
    """The plan as text.

    Args:
        runs: of so many images in an optimizer step, on all processes.
        batch: images of a run; units: mean number of images or tokens in it, ``unit`` says of which.
    """
    memory = {
        "parameters and buffers": plan.weights,
        "networks that only judge": plan.frozen,
        "optimizer": plan.optimizer,
        "gradient exchange": plan.buckets,
        "average of the weights": plan.average,
        f"a step of {batch} images: activations, gradients, temporaries": plan.step,
        "**together**": plan.total,
    }
    lines = [[name, f"{value / GIB:.3g}"] for name, value in memory.items() if value]
    speed = units * runs * steps / (days * DAY)
    flops = plan.flops * runs * steps
    rest = [
        *([f"parameters of the {name}", f"{count:,}"] for name, count in plan.parameters.items()),
        ["steps", f"{steps:,}"],
        [f"{unit} in all", f"{units * runs * steps:.3g}"],
        ["TFLOP of a step, all processes", f"{plan.flops * runs / 1e12:.3g}"],
        ["FLOP in all", f"{flops:.3g}"],
        [f"{unit} a second, for {days:g} days", f"{speed:,.3g}"],
        ["TFLOP a second, for these", f"{flops / (days * DAY) / 1e12:.3g}"],
    ]
    return table(["memory of a process", "GiB"], lines) + "\n\n" + table(["what", "number"], rest)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.plan", description="Memory, computation and the speed that a training needs."
    )
    parser.add_argument("config", help="JSON file, or a name in training/configs, of either stage")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--tokenizer", help="configuration of stage 1, for one of stage 2")
    parser.add_argument("--labels", type=int, help="number of labels, where every sub-folder is one")
    parser.add_argument("--batch", type=int, help="images of a step, of all processes (the configuration's)")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="(the configuration's)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="then take two real steps on the CPU, and compare")
    parser.add_argument("--days", type=float, default=7.0, help="time to train in (7)")
    args = parser.parse_args(argv)
    for name in ("labels", "batch", "processes", "days"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e9:
            raise InputError(f"--{name} is {value}; it must be above 0")
    file = args.config if args.config.endswith(".json") else CONFIGS / f"{args.config}.json"
    known = sorted(path.stem for path in CONFIGS.glob("*.json"))
    second = "transformer" in read_json(file, mend=f"give a JSON file or one of {known}")
    if second:
        if not args.tokenizer:
            raise ConfigError(f"{args.config} is one of stage 2; give the tokenizer's configuration with --tokenizer")
        vae, _ = read_tokenizer(args.tokenizer, [])
        config = read_config(args.config, SECTIONS, args.set)
        stage: StageTwoConfig = config["stage"]
        plain = stage.labels == {"": ["*"]}
        count = args.labels or len([label for label in stage.labels if label])
        if not count and not plain:
            raise ConfigError(f"{args.config} makes every sub-folder a label; give their number with --labels")
        layout = TokenLayout(
            order=stage.order,
            classes=count,
            null_label=stage.label_dropout > 0 and not plain,
            **{**vae.layout(), **({"first": stage.first} if stage.first else {})},
        )
        sizes = {**config["transformer"], "block_size": layout.max_length, "given": stage.given > 0}
        net = read_dataclass(TransformerConfig, sizes, "section 'transformer'", defaults=True)
        text = read_text(config["text"])
        work = partial(transformer_work, net, layout, args.precision or config["training"].precision, text=text)
        unit, per_image = "tokens", mean_codes(vae) + (2 * layout.segments - 1 if layout.covering else 0)
    else:
        vae, config = read_tokenizer(args.config, args.set)
        work = partial(tokenizer_work, vae, config["stage"], args.precision or config["training"].precision)
        unit, per_image = "images", 1.0
    training: TrainConfig = config["training"]
    batch = share(args.batch or training.batch_size, args.processes * training.accumulate)
    plan = footprint(partial(work, batch), args.processes, training.ema > 0)
    runs = args.processes * training.accumulate
    print(report(plan, batch, batch * per_image, unit, training.steps, runs, args.days))
    if args.check:
        grown = measured(partial(work, batch), training)
        print(f"\nmeasured on this CPU: {grown / GIB:.3g} GiB, {grown / plan.total:.2f} times the plan")


if __name__ == "__main__":
    main()
