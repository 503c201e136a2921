"""Checkpoint to ONNX Runtime engine: ``python -m export.to_onnx CKPT [--out ENGINE_DIR] [--slots B]``.

The engine folder gets its name only after its graphs, run by ONNX Runtime, agree with PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from dvq_rt.layout import UNORDERED
from dvq_rt.manifest import Manifest, write_engine
from dvq_rt.sampling import SamplingParams
from export.labels import keep_labels
from export.lowering import LOWERINGS, OPSET, TRANSLATIONS
from export.parity import check_engine, heads, random_rows
from export.quantization.calibration import tune
from export.quantization.decoder import quantise_decoder
from export.quantization.weights import BITS, CALIBRATION, UNCALIBRATED, check_widths, own_rows, quantise, spread_labels
from export.steps import REPORTS, STATE, DecoderGraph, EncoderGraph, Step, example_inputs
from runtimes.errors import ExportError
from runtimes.onnxruntime import import_onnxruntime
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded
from training.models.dqvae import DQVAE

WEIGHTS = ("fp32", "fp16", *BITS)
EXTERNAL_ABOVE = 1_900_000_000
"""Bytes of weights from which a graph keeps them in a file beside it; protobuf ends at 2 GiB."""


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
            and ``int4`` quantise the transformer (``export.quantization.weights``) and the image decoder
            (``export.quantization.decoder``). Weights are rounded before anything is compared, so that the golden
            values are those of the rounded model.
        calibrate: images that the model draws for itself to calibrate ``int8`` and ``int4``; 0 rounds to nearest and
            takes the ranges of keys, values and the decoder's maps from random codes.
        tuning: optimisation steps of ``export.quantization.calibration`` on those images.
        overwrite: replace an existing engine folder.

    Returns:
        the manifest, with the errors measured against PyTorch in ``tolerances``.

    Raises:
        ExportError: a part of the model or its threshold table is missing, the weights' format is unknown or not made
            for the target, a layer is too narrow for integers, a number is negative, or the graphs do not agree with
            PyTorch.
        EngineError: the folder exists.
    """
    check_whole(model)
    if weights not in WEIGHTS:
        raise ExportError(f"weights is {weights!r}; it must be one of {WEIGHTS}")
    if weights in BITS and target != "cpu":
        raise ExportError(f"weights {weights} are made for target 'cpu', not {target!r}; use fp32 or fp16 there")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = count_parameters(model)
    assert model.tokenizer is not None and model.transformer is not None
    if weights == "fp16":
        round_to_half(model)
    elif weights in BITS:
        if calibrate < 0 or tuning < 0 or (tuning and not calibrate):
            raise ExportError(
                f"calibrate is {calibrate} and tuning {tuning}; neither can be negative, and tuning needs images"
            )
        check_widths(model.transformer, weights)
        layout = model.transformer.layout
        if calibrate or layout.order == UNORDERED:
            rows = own_rows(model.transformer, calibrate or UNCALIBRATED)
        else:
            rows = random_rows(layout, spread_labels(layout, UNCALIBRATED))
        maps = [torch.from_numpy(layout.to_map(*row)[0]) for row in rows]
        model.tokenizer = quantise_decoder(model.tokenizer, maps)
        quantised = quantise(model.transformer, weights, rows, feed_back=calibrate > 0)
        model.transformer = tune(model.transformer, quantised, rows, tuning) if tuning else quantised

    def build(folder: Path) -> Manifest:
        interface = write_graphs(model, folder, target, weights)
        assert model.tokenizer is not None and model.transformer is not None
        manifest = Manifest(
            layout=model.transformer.layout,
            family=model.family,
            image_size=model.tokenizer.config.image_size,
            slots=slots,
            step=interface,
            precision="fp32",
            weights=weights,
            target=target,
            tools={"onnxruntime": import_onnxruntime().__version__, **{n: version(n) for n in ("torch", "onnx")}},
            class_names=model.class_names,
            defaults=model.defaults,
            parameters=parameters,
        )
        return check_engine(model, folder, manifest)

    return write_engine(out, build, overwrite=overwrite)


def check_whole(model: Model) -> None:
    """
    Raises:
        ExportError: a part of the model or its threshold table is missing.
    """
    if model.tokenizer is None or model.transformer is None:
        missing = "tokenizer" if model.tokenizer is None else "transformer"
        raise ExportError(f"the checkpoint has no {missing}; an engine needs both stages")
    if isinstance(model.tokenizer, DQVAE) and model.tokenizer.threshold().isnan():
        raise ExportError("the tokenizer has no entropy thresholds; make them with python -m training.thresholds")


def count_parameters(model: Model) -> dict[str, int]:
    """Parameters of each part, and of these the transformer's embedding tables."""
    assert model.tokenizer is not None and model.transformer is not None
    parts = [*model.tokenizer.named_children(), ("transformer", model.transformer)]
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts}
    tables = [p.numel() for name, p in model.transformer.named_parameters() if "_emb" in name]
    return {**{name: count for name, count in counts.items() if count}, "embeddings": sum(tables)}


def write_graphs(model: Model, folder: Path, target: str, weights: str) -> dict[str, Any]:
    """Trace the three graphs into a folder; returns the step's interface for the manifest."""
    vae, transformer, half_weights = model.tokenizer, model.transformer, weights == "fp16"
    assert vae is not None and transformer is not None
    if target not in LOWERINGS:
        raise ExportError(f"target is {target!r}; it must be one of {sorted(LOWERINGS)}")
    size, side = vae.config.image_size, vae.config.sides[-1]
    trace(
        EncoderGraph(vae),
        {"images": torch.zeros(2, 3, size, size)},
        ["codes", "grain"],
        folder / "encoder.onnx",
        half_weights,
    )
    trace(
        DecoderGraph(vae),
        {"codes": torch.zeros(2, side, side, dtype=torch.long)},
        ["images"],
        folder / "decoder.onnx",
        half_weights,
    )
    step = Step(transformer, LOWERINGS[target]).eval()
    inputs = example_inputs(transformer, 2)
    if weights in BITS:
        inputs["caches"] = [cache.to(torch.int8) for cache in inputs["caches"]]
    caches = [f"cache_{i}" for i in range(len(inputs["caches"]))]
    outputs = [*(f"{name}_out" for name in STATE), *REPORTS, *(f"{name}_out" for name in caches)]
    trace(step, inputs, outputs, folder / "step.onnx", half_weights)
    flat = {**{k: v for k, v in inputs.items() if k != "caches"}, **dict(zip(caches, inputs["caches"], strict=True))}
    width = heads(model)

    def describe(name: str, tensor: Tensor) -> dict[str, Any]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"name": name, "dtype": dtype, "shape": ["B", *tensor.shape[1:]]}

    reports = [
        {"name": name, "dtype": "float32", "shape": ["B", width[head]] if kind == "logits" else ["B"]}
        for name in REPORTS
        for head, kind in [name.split("_")]
    ]
    return {
        "inputs": [describe(name, tensor) for name, tensor in flat.items()],
        "outputs": [
            *(describe(f"{name}_out", flat[name]) for name in STATE),
            *reports,
            *(describe(f"{name}_out", flat[name]) for name in caches),
        ],
        "caches": [[name, f"{name}_out"] for name in caches],
    }


def trace(
    module: nn.Module,
    inputs: dict[str, Any],
    outputs: list[str],
    path: Path,
    half_weights: bool,
    *,
    fixed: bool = False,
    opset: int = OPSET,
) -> None:
    """Export a module with a symbolic batch dimension ``B`` on every input, or with the given size if ``fixed``."""
    batch = torch.export.Dim("B", min=1, max=4096)
    shapes = {k: [{0: batch}] * len(v) if isinstance(v, list) else {0: batch} for k, v in inputs.items()}
    names = [
        name
        for k, v in inputs.items()
        for name in ([f"cache_{i}" for i in range(len(v))] if isinstance(v, list) else [k])
    ]
    with quiet():
        program = torch.export.export(module, (), inputs, dynamic_shapes=None if fixed else shapes)
        graph = torch.onnx.export(
            program,
            input_names=names,
            output_names=outputs,
            opset_version=opset,
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert graph is not None
    proto = graph.model_proto
    for node in proto.graph.node:  # stack traces with this machine's paths
        del node.metadata_props[:]
        node.doc_string = ""
    if half_weights:
        store_half(proto)
    save(proto, path)


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph, with its weights in ``<name>.data`` beside it if they are too large for one file."""
    if sum(len(t.raw_data) for t in proto.graph.initializer) > EXTERNAL_ABOVE:
        onnx.save_model(proto, path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024)
    else:
        onnx.save_model(proto, path)


def round_to_half(model: nn.Module) -> None:
    """Round every parameter and float buffer but the entropy thresholds to values that float16 holds."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("entropy_thresholds"):
            tensor.copy_(tensor.half().float())


def store_half(proto: onnx.ModelProto) -> None:
    """Store float32 weights that float16 holds exactly as float16 with a Cast, which the engine folds at load."""
    for tensor in list(proto.graph.initializer):
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < 256 or not np.array_equal(values.astype(np.float16).astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), name + ".half"))
        cast = onnx.helper.make_node("Cast", [name + ".half"], [name], to=onnx.TensorProto.FLOAT)
        proto.graph.node.insert(0, cast)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress and deprecation notices off the terminal; errors pass."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(before)


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
    out = Path(args.out or f"{args.checkpoint.rstrip('/')}-onnx")
    model = load_checkpoint(args.checkpoint)
    for text in args.default:
        name, _, value = text.partition("=")
        try:
            model.defaults[name] = json.loads(value)
        except ValueError:
            model.defaults[name] = value
    SamplingParams.from_dict(model.defaults)
    if args.labels:
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
    for name, error in manifest.tolerances.items():
        print(f"{name:60s} {error:.3g}")
    print(f"{sum(f['bytes'] for f in manifest.files.values()) / 1e6:.1f} MB")
    print(out)


if __name__ == "__main__":
    main()
