"""Checkpoint to ONNX Runtime engine: ``python -m export.to_onnx CKPT [--out ENGINE_DIR] [--slots B]``.

The engine folder gets its name only after its graphs, run by ONNX Runtime, agree with PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dvq_rt.labels import whole
from dvq_rt.manifest import Manifest, write_engine
from dvq_rt.sampling import SamplingParams
from export.labels import keep_labels
from export.lowering import LOWERINGS
from export.package import check_whole, describe, summary, write_graphs, write_tokenizer
from export.parity import check_engine
from export.quantization.calibration import CALIBRATION
from export.quantization.model import BITS, quantize_model
from export.tracing import MOST_ROWS
from runtimes.errors import ConfigError, ExportError
from runtimes.onnxruntime import import_onnxruntime
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded
from training.step import step_table

WEIGHTS = ("fp32", "fp16", *BITS)
MOST_IMAGES, MOST_STEPS = 100_000, 1_000_000
"""Limits of calibration and tuning; far beyond what helps."""


def export_onnx(
    model: Model,
    out: str | Path,
    *,
    slots: int = 8,
    target: str = "cpu",
    weights: str = "fp32",
    calibrate: int = CALIBRATION,
    tuning: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Write an engine folder.

    Args:
        model: a whole model, tokenizer and transformer.
        out: the folder's name.
        slots: number of slots that a generator uses by default; the graphs take any.
        target: ``cpu`` uses ONNX Runtime's fused attention; ``cuda`` standard operators only.
        weights: ``fp32``; ``fp16`` stores all weights as float16 (half the size; computation stays float32); ``int8``
            and ``int4`` quantize the transformer and the image decoder (``export.quantization``). Weights are rounded
            before anything is compared, so that the golden values are those of the rounded model.
        calibrate: images that the model draws for itself to calibrate ``int8`` and ``int4``; 0 rounds to nearest and
            takes the ranges of keys, values and the decoder's maps from random codes.
        tuning: optimization steps of ``export.quantization.tuning`` on those images.
        overwrite: replace an existing engine folder.

    Returns:
        the manifest, with the errors measured against PyTorch in ``tolerances``.

    Raises:
        CheckpointError: a part of the model is missing.
        InputError, ConfigError: a number or a recommended sampling parameter is out of range.
        ExportError: its threshold table is missing, the weights' format is unknown or not made for the target, a layer
            is too narrow for integers, or the graphs do not agree with PyTorch.
        EngineError: the folder exists.
    """
    _, net = check_whole(model)
    slots = whole("slots", slots, 1, MOST_ROWS)
    for name, value, choices in (("weights", weights, WEIGHTS), ("target", target, tuple(sorted(LOWERINGS)))):
        if value not in choices:
            raise ExportError(f"{name} is {value!r}; it must be one of {choices}")
    integers = weights in BITS
    if integers:
        calibrate, tuning = whole("calibrate", calibrate, 0, MOST_IMAGES), whole("tuning", tuning, 0, MOST_STEPS)
        if tuning and not calibrate:
            raise ConfigError(f"tuning is {tuning} and calibrate 0; tuning needs images")
        if model.text is not None:
            raise ExportError(f"weights {weights} are not made for models that read prompts; use fp32 or fp16")
        if target != "cpu":
            raise ExportError(f"weights {weights} are made for target 'cpu', not {target!r}; use fp32 or fp16 there")
    table = step_table(net, torch.int8 if integers else None)
    backend = "onnxruntime", import_onnxruntime().__version__
    manifest = describe(model, table.to_dict(), slots=slots, backend=backend, target=target, weights=weights)

    def build(folder: Path) -> Manifest:
        rounded = copy.deepcopy(model).eval().requires_grad_(False)
        if weights == "fp16":
            round_to_half(rounded)
        elif integers:
            rounded = quantize_model(rounded, weights, calibrate, tuning)
        write_graphs(rounded, folder, table, LOWERINGS[target], half_weights=weights == "fp16")
        write_tokenizer(model, folder)
        return check_engine(rounded, folder, manifest)

    return write_engine(out, build, overwrite=overwrite)


def round_to_half(model: nn.Module) -> None:
    """Round every parameter and float buffer but the router's thresholds and biases to values that float16 holds."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(("entropy_thresholds", "router_biases")):
            tensor.copy_(tensor.half().float())


def read_default(text: str) -> tuple[str, Any]:
    """Name and value of a ``NAME=VALUE``; values are JSON, or plain strings.

    Raises:
        ConfigError: there is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--default {text!r} is not NAME=VALUE, such as temperature=0.8")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m export.to_onnx", description="Checkpoint to ONNX Runtime engine.")
    parser.add_argument("checkpoint", help="checkpoint folder with both stages")
    parser.add_argument("--out", help="engine folder; CHECKPOINT-onnx if left out")
    parser.add_argument("--slots", type=int, default=8, help="images drawn side by side by default")
    parser.add_argument("--target", choices=sorted(LOWERINGS), default="cpu")
    parser.add_argument("--weights", choices=WEIGHTS, default="fp32", help="fp16 is computed in float32 too")
    parser.add_argument(
        "--calibrate",
        type=int,
        default=CALIBRATION,
        metavar="N",
        help="images drawn to calibrate integers; 0: none",
    )
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="tune int8 and int4 on those images")
    parser.add_argument("--labels", help="offer only these labels, separated by commas")
    parser.add_argument(
        "--default", action="append", default=[], metavar="NAME=VALUE", help="recommend another sampling parameter"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing engine folder")
    args = parser.parse_args(argv)
    out = f"{args.checkpoint.rstrip('/')}-onnx" if args.out is None else args.out
    model = load_checkpoint(args.checkpoint)
    model.defaults |= dict(read_default(text) for text in args.default)
    SamplingParams.from_dict(model.defaults)
    if args.labels is not None:
        model = keep_labels(model, args.labels.split(","))
    manifest = export_onnx(
        model,
        out,
        slots=args.slots,
        target=args.target,
        weights=args.weights,
        calibrate=args.calibrate,
        tuning=args.tune,
        overwrite=args.overwrite,
    )
    print(summary(manifest, Path(out)))


if __name__ == "__main__":
    main()
