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

from dvq_rt.engine import Engine
from dvq_rt.files import write_tensors
from dvq_rt.labels import whole
from dvq_rt.manifest import Manifest, write_engine
from dvq_rt.sampling import SamplingParams
from export.coverage.check import check_coverage
from export.folding import fold_projection_biases
from export.labels import keep_labels
from export.lowering import TARGETS, attention_for
from export.package import check_whole, describe, summary, write_graphs, write_tokenizer
from export.parity import check_engine, check_limit, golden_values, keep_drawn
from export.precision import PRECISIONS, narrow
from export.quantization.calibration import CALIBRATION
from export.quantization.model import BITS, quantize_model, quantize_weights
from export.tracing import MOST_ROWS
from runtimes.errors import ConfigError, ExportError
from runtimes.onnxruntime import OnnxRuntimeBackend, import_onnxruntime
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded
from training.step import step_table

WEIGHTS = (*PRECISIONS, *BITS)
MOST_IMAGES, MOST_STEPS = 100_000, 1_000_000
"""Limits of calibration and tuning; far beyond what helps."""


def export_onnx(
    model: Model,
    out: str | Path,
    *,
    slots: int = 8,
    target: str = "cpu",
    precision: str = "fp32",
    weights: str | None = None,
    calibrate: int = CALIBRATION,
    tuning: int = 0,
    check_tokens: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write an engine folder.

    Args:
        model: a whole model, tokenizer and transformer.
        out: the folder's name.
        slots: number of slots that a generator uses by default; the graphs take any.
        target: ``cpu`` or ``cuda``; a node without a kernel for CUDA is an error (``export.coverage``).
        precision: what is computed in: ``fp32``, for ``cuda`` also ``fp16`` and ``bf16`` (``export.precision``).
        weights: number format of the weights, None for that of the precision. ``fp16`` with precision ``fp32`` stores
            all weights as float16 (half the size; computation stays float32). ``int8`` and ``int4`` quantize for
            ``cpu`` the transformer, its caches and the image decoder, and for ``cuda`` the weights of the
            transformer's linear layers alone (``export.quantization``). Weights are rounded before anything is
            compared, so that the golden values are those of the rounded model.
        calibrate: images that the model draws for itself to calibrate ``int8`` and ``int4``; 0 rounds to nearest and
            takes the ranges of keys, values and the decoder's maps from random codes.
        tuning: optimization steps of ``export.quantization.tuning`` on those images.
        check_tokens: of a narrow precision compare at most so many tokens of a sequence; None takes whole images, or
            ``parity.FEW_TOKENS`` of large models. bf16 is not compared: ONNX Runtime has no kernels for it on CPUs.
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
    weights = precision if weights is None else weights
    for name, value, choices in (
        ("target", target, TARGETS),
        ("precision", precision, tuple(sorted(PRECISIONS))),
        ("weights", weights, WEIGHTS),
    ):
        if value not in choices:
            raise ExportError(f"{name} is {value!r}; it must be one of {choices}")
    if precision != "fp32" and target == "cpu":
        raise ExportError(f"precision is {precision!r}, but ONNX Runtime computes in fp32 on CPUs; use --target cuda")
    integers = weights in BITS
    if not integers and weights != precision and (weights, precision) != ("fp16", "fp32"):
        raise ExportError(f"weights are {weights!r}, but precision is {precision!r}; leave --weights out")
    if integers:
        calibrate, tuning = whole("calibrate", calibrate, 0, MOST_IMAGES), whole("tuning", tuning, 0, MOST_STEPS)
        if tuning and not calibrate:
            raise ConfigError(f"tuning is {tuning} and calibrate 0; tuning needs images")
        if tuning and target != "cpu":
            raise ConfigError(f"tuning is {tuning}; it is for target 'cpu', where activations are rounded too")
    limit = None
    if precision != "fp32":
        limit = check_limit(net.layout, sum(p.numel() for p in net.parameters()), check_tokens)
    elif check_tokens is not None:
        raise ConfigError("check_tokens is for precisions fp16 and bf16; leave it out")
    backend = "onnxruntime", import_onnxruntime().__version__

    def build(folder: Path) -> Manifest:
        rounded = copy.deepcopy(model).eval().requires_grad_(False)
        if integers:
            rounded = (
                quantize_model(rounded, weights, calibrate, tuning)
                if target == "cpu"
                else quantize_weights(rounded, weights, calibrate)
            )
        elif weights == "fp16":
            round_to_half(rounded)
        folded = rounded if integers or precision == "fp32" else fold_projection_biases(rounded)
        # in the opset of these graphs convolutions have no bf16
        traced = narrow(folded, precision, tokenizer=precision != "bf16")
        table = step_table(traced.both()[1], torch.int8 if integers and target == "cpu" else None)
        manifest = describe(
            model,
            table.to_dict(),
            slots=slots,
            backend=backend,
            target=target,
            precision=precision,
            weights=weights,
        )
        half = weights == "fp16" and precision == "fp32"
        attention = attention_for(target, precision)
        gpu = target == "cuda"
        write_graphs(traced, folder, table, attention, half_weights=half, pixels=gpu, fused=gpu)
        if gpu:
            for part in manifest.graphs:
                check_coverage(folder / f"{part}.onnx")
        write_tokenizer(model, folder)
        if precision == "bf16":
            write_tensors(folder / "golden.safetensors", golden_values(rounded, limit))
            return manifest
        manifest = check_engine(rounded, folder, manifest, limit)
        if precision != "fp32":
            keep_drawn(Engine(folder, manifest, OnnxRuntimeBackend()))
        return manifest

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
    parser.add_argument("--target", choices=TARGETS, default="cpu")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp32", help="fp16 and bf16 are for cuda")
    parser.add_argument("--weights", choices=WEIGHTS, help="as --precision if left out; on CPUs fp16 is stored only")
    parser.add_argument(
        "--calibrate",
        type=int,
        default=CALIBRATION,
        metavar="N",
        help="images drawn to calibrate integers; 0: none",
    )
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="tune int8 and int4 on those images")
    parser.add_argument("--check-tokens", type=int, help="of fp16: compare at most so many tokens of a sequence")
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
        precision=args.precision,
        weights=args.weights,
        calibrate=args.calibrate,
        tuning=args.tune,
        check_tokens=args.check_tokens,
        overwrite=args.overwrite,
    )
    print(summary(manifest, Path(out)))


if __name__ == "__main__":
    main()
