"""What every exporter does with a model: check it, trace its three graphs, describe them, and say what was measured."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dvq_rt.manifest import Manifest
from dvq_rt.prompts import BYTES
from dvq_rt.step import StepTable
from export.graphs import DecoderGraph, EncoderGraph, PixelDecoder, TextGraph
from export.lowering import OPSET
from export.tracing import trace
from runtimes.errors import ExportError
from training.checkpoint import TEXT_TOKENIZER, Model
from training.checkpoint_engine import manifest_of
from training.frozen_text import frozen_of
from training.models.dqvae import DQVAE
from training.models.tokenizer import Tokenizer
from training.models.transformer import StackedTransformer
from training.step import Attention, Step, example_inputs


def check_whole(model: Model) -> tuple[Tokenizer, StackedTransformer]:
    """Both stages of a model that can be exported.

    Raises:
        CheckpointError: a stage is missing.
        ExportError: the tokenizer's threshold table is missing.
    """
    vae, net = model.both()
    if isinstance(vae, DQVAE) and vae.config.router == "entropy" and vae.entropy_thresholds.isnan().any():
        raise ExportError("the tokenizer has no entropy thresholds; make them with python -m training.thresholds")
    return vae, net


def write_graphs(
    model: Model,
    folder: Path,
    table: StepTable,
    attention: Attention,
    *,
    slots: int | None = None,
    half_weights: bool = False,
    pixels: bool = False,
    fused: bool = False,
    opset: int = OPSET,
) -> None:
    """Trace encoder, decoder and step into a folder; of a model that reads prompts also the text encoder.

    Args:
        table: the step's interface.
        attention: the step's, one of ``export.lowering``.
        slots: fixes the step's batch to so many, and the other graphs' to 1; None leaves all three symbolic.
        half_weights: store weights as float16.
        pixels: whether the decoder also gives bytes.
        fused: whether the step's residual sums and norms are one operator (``export.fusion``).
    """
    vae, net = model.both()
    size, side, rows = vae.config.image_size, vae.config.sides[-1], 1 if slots else 2
    images, codes = torch.zeros(rows, 3, size, size), torch.zeros(rows, side, side, dtype=torch.long)
    options: dict[str, Any] = {"half_weights": half_weights, "fixed": slots is not None, "opset": opset}
    trace(
        EncoderGraph(vae).eval(),
        {"images": images},
        ["codes", "grain", "scores", "grain_codes"],
        folder / "encoder.onnx",
        **options,
    )
    decoder, outputs = (PixelDecoder(vae), ["images", "pixels"]) if pixels else (DecoderGraph(vae), ["images"])
    trace(decoder.eval(), {"codes": codes}, outputs, folder / "decoder.onnx", **options)
    trace(
        Step(net, attention).eval(),
        example_inputs(table, slots or 2),
        [port.output for port in table.outputs],
        folder / "step.onnx",
        names=[port.name for port in table.inputs],
        fused=fused,
        **options,
    )
    if net.text is not None:
        prompt = {"ids": torch.zeros(1, table.prompt, dtype=torch.long), "length": torch.ones(1, dtype=torch.long)}
        trace(
            TextGraph(net.text, frozen_of(model)).eval(),
            prompt,
            ["prefix"],
            folder / "text.onnx",
            **{**options, "fixed": True},
        )


def write_tokenizer(model: Model, folder: Path) -> None:
    """The text tokenizer's file, where it has one."""
    if model.text is not None and model.text_tokenizer != BYTES:
        (folder / TEXT_TOKENIZER).write_text(model.text_tokenizer, encoding="utf-8")


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
        step: its interface, see ``StepTable.to_dict``.
        backend: name and version of what the engine is made for.
    """
    return manifest_of(
        model,
        step,
        slots=slots,
        precision=precision,
        weights=weights,
        backend=backend[0],
        target=target,
        tools={backend[0]: backend[1], **{name: version(name) for name in ("torch", "onnx")}},
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
