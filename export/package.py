"""What every exporter does with a model: check it, trace its three graphs, describe them, and say what was measured."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dvq_rt.manifest import Manifest
from export.graphs import DecoderGraph, EncoderGraph, PixelDecoder
from export.lowering import OPSET, Attention
from export.steps import REPORTS, STATE, Step, example_inputs
from export.tracing import flat_names, trace
from runtimes.errors import ConfigError, ExportError
from training.checkpoint import Model
from training.models.dqvae import DQVAE
from training.models.tokenizer import Tokenizer
from training.models.transformer import StackedTransformer

GRAPHS = ("encoder", "decoder", "step")
FORMATS = {torch.bfloat16: "uint16"}
"""Names in a manifest of number formats that numpy lacks."""


def check_whole(model: Model) -> tuple[Tokenizer, StackedTransformer]:
    """Both stages of a model that can be exported.

    Raises:
        CheckpointError: a stage is missing.
        ExportError: the tokenizer's threshold table is missing.
    """
    vae, net = model.both()
    if isinstance(vae, DQVAE) and vae.threshold().isnan():
        raise ExportError("the tokenizer has no entropy thresholds; make them with python -m training.thresholds")
    return vae, net


def check_number(name: str, value: Any, least: int, most: int, reason: str = "") -> None:
    """
    Raises:
        ConfigError: an option is not an integer from ``least`` to ``most``.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        raise ConfigError(f"{name} is {repr(value)[:100]}; it must be an integer from {least} to {most}{reason}")


def write_graphs(
    model: Model,
    folder: Path,
    attention: Attention,
    *,
    slots: int | None = None,
    cache: torch.dtype | None = None,
    half_weights: bool = False,
    pixels: bool = False,
    opset: int = OPSET,
) -> dict[str, Any]:
    """Trace encoder, decoder and step into a folder.

    Args:
        attention: the step's, one of ``export.lowering``.
        slots: fixes the step's batch to so many, and the other graphs' to 1; None leaves all three symbolic.
        cache: number format of the caches; None takes that of the transformer's weights.
        half_weights: store weights as float16.
        pixels: whether the decoder also gives bytes.

    Returns:
        the step's interface for the manifest.
    """
    vae, net = model.both()
    size, side, rows = vae.config.image_size, vae.config.sides[-1], 1 if slots else 2
    inputs = example_inputs(net, slots or 2)
    cache = cache or next(net.parameters()).dtype
    inputs["caches"] = [values.to(cache) for values in inputs["caches"]]
    interface = describe_step(net, inputs, fixed=slots is not None)
    outputs = [spec["name"] for spec in interface["outputs"]]
    parts: dict[str, tuple[nn.Module, dict[str, Any], list[str]]] = {
        "encoder": (EncoderGraph(vae), {"images": torch.zeros(rows, 3, size, size)}, ["codes", "grain"]),
        "decoder": (
            PixelDecoder(vae) if pixels else DecoderGraph(vae),
            {"codes": torch.zeros(rows, side, side, dtype=torch.long)},
            ["images", "pixels"] if pixels else ["images"],
        ),
        "step": (Step(net, attention), inputs, outputs),
    }
    for name, (module, examples, produced) in parts.items():
        trace(
            module.eval(),
            examples,
            produced,
            folder / f"{name}.onnx",
            half_weights=half_weights,
            fixed=slots is not None,
            opset=opset,
        )
    return interface


def describe_step(net: StackedTransformer, inputs: dict[str, Any], *, fixed: bool) -> dict[str, Any]:
    """The step's interface for the manifest, from example inputs of any batch; ``fixed`` keeps their batch."""
    batch: int | str = len(inputs["label"]) if fixed else "B"
    names = flat_names(inputs)
    tensors = dict(zip(names, [*(t for name, t in inputs.items() if name != "caches"), *inputs["caches"]], strict=True))
    caches = [name for name in names if name not in inputs]
    widths = {"position": net.layout.position_head, "content": net.layout.content_vocabulary}

    def spec(name: str, tensor: Tensor) -> dict[str, Any]:
        dtype = FORMATS.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")
        return {"name": name, "dtype": dtype, "shape": [batch, *tensor.shape[1:]]}

    reports = [
        {"name": name, "dtype": "float32", "shape": [batch, widths[head]] if kind == "logits" else [batch]}
        for name in REPORTS
        for head, kind in [name.split("_")]
    ]
    return {
        "inputs": [spec(name, tensor) for name, tensor in tensors.items()],
        "outputs": [
            *(spec(f"{name}_out", tensors[name]) for name in STATE),
            *reports,
            *(spec(f"{name}_out", tensors[name]) for name in caches),
        ],
        "caches": [[name, f"{name}_out"] for name in caches],
    }


def describe(
    model: Model,
    step: dict[str, Any],
    *,
    slots: int,
    backend: tuple[str, str],
    target: str,
    precision: str = "fp32",
    weights: str,
) -> Manifest:
    """The manifest, but for files and measured errors.

    Args:
        model: as it was trained, whose parameters are counted.
        step: see ``write_graphs``.
        backend: name and version of what the engine is made for.
    """
    vae, net = model.both()
    return Manifest(
        layout=net.layout,
        family=model.family,
        image_size=vae.config.image_size,
        slots=slots,
        step=step,
        precision=precision,
        weights=weights,
        backend=backend[0],
        target=target,
        tools={backend[0]: backend[1], **{name: version(name) for name in ("torch", "onnx")}},
        class_names=model.class_names,
        defaults=model.defaults,
        parameters=count_parameters(model),
    )


def count_parameters(model: Model) -> dict[str, int]:
    """Parameters of each part, and of these the transformer's embedding tables."""
    vae, net = model.both()
    parts = [*vae.named_children(), ("transformer", net)]
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts}
    tables = [p.numel() for name, p in net.named_parameters() if "_emb" in name]
    return {**{name: count for name, count in counts.items() if count}, "embeddings": sum(tables)}


def summary(manifest: Manifest, out: str | Path, *remarks: str) -> str:
    """What an export command prints at its end: measured errors, remarks, size, and last the folder's name."""
    errors = [f"{name:60s} {error:.3g}" for name, error in manifest.tolerances.items()]
    size = sum(entry["bytes"] for entry in manifest.files.values())
    return "\n".join([*errors, *remarks, f"{size / 1e6:.1f} MB", str(out)])
