"""Checkpoint to TensorRT engine: ``python -m export.to_tensorrt CKPT [--out ENGINE_DIR] [--precision fp16]``.

TensorRT builds plans for the GPU of this machine. TensorRT-RTX also builds ahead of time, without a GPU, for several
kinds of GPU in one plan. The graphs that either gets are first run by ONNX Runtime on the CPU and compared with PyTorch
(but for bf16, which it cannot run), and what TensorRT reads from them is compared with the manifest.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from torch import Tensor, nn

from dvq_rt.files import read_tensors, write_tensors
from dvq_rt.generator import Generator
from dvq_rt.manifest import Manifest, write_engine
from dvq_rt.verify import drawn, free_params
from export.lowering import TENSORRT_OPSET, scatter_attention
from export.parity import check_engine, golden_values, padded
from export.steps import REPORTS, STATE, DecoderGraph, EncoderGraph, Step, example_inputs
from export.tensorrt.check import Census, check_graph, check_network, specs
from export.tensorrt.precision import PRECISIONS, narrow
from export.to_onnx import check_whole, count_parameters, trace
from runtimes.cuda import driver_version, find_gpu
from runtimes.errors import ConfigError
from runtimes.tensorrt_api import CURRENT, FLAVORS, TensorRT, choose_flavor
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded
from training.import_published import import_published
from training.models.tokenizer import Tokenizer

GRAPHS = ("encoder", "decoder", "step")
AHEAD = ("sm86", "sm89", "sm120")
"""Targets without a GPU at hand: GeForce RTX 30, 40 and 50."""
LARGE, FEW_TOKENS = 50_000_000, 24
"""Transformers of more parameters are compared on so few tokens, because this takes long on a CPU."""


class Built(NamedTuple):
    """A plan: what its network consists of, ``bytes`` of the plan, ``seconds`` of the build."""

    name: str
    census: Census
    bytes: int
    seconds: float


class PixelDecoder(DecoderGraph):
    """codes int64 [1, h, w] -> images float32 [1, 3, S, S], and ``pixels`` uint8 [1, S, S, 3] of them (the rule of
    ``dvq_rt.images.to_uint8``)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        images = super().forward(codes)
        levels = ((images + 1) * 127.5).clamp(0, 255).round()
        return images, levels.permute(0, 2, 3, 1).to(torch.uint8)


def export_tensorrt(
    model: Model,
    out: str | Path,
    *,
    slots: int = 8,
    precision: str = "fp16",
    targets: Sequence[str] = (),
    flavor: str = "auto",
    overwrite: bool = False,
    check_tokens: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Manifest, list[Built]]:
    """Write an engine folder of TensorRT plans.

    Args:
        model: a whole model, tokenizer and transformer; it is put into eval mode.
        out: the folder's name.
        slots: rows of the step, at least 2 (guidance takes two an image); the plan takes exactly so many.
        precision: ``fp32``, ``fp16`` or ``bf16``; see ``export.tensorrt.precision``.
        targets: such as ``sm86``, or ``current`` alone; empty takes the GPU of this machine or, without one, AHEAD.
        flavor: ``tensorrt``, ``tensorrt-rtx`` or ``auto``.
        overwrite: replace an existing engine folder.
        check_tokens: tokens after which the comparison with PyTorch stops; None takes whole images, or FEW_TOKENS of
            large models.
        say: told what is going on.

    Returns:
        the manifest and the plans that were built.

    Raises:
        ExportError: a part of the model is missing, the graphs do not agree with PyTorch, TensorRT would misread them,
            or cannot build them.
        ConfigError: an option is out of its range.
        BackendError: the package is missing, or ``current`` was asked for without a GPU.
        EngineError: the folder exists.
    """
    check_whole(model)
    assert model.transformer is not None
    if slots < 2:
        raise ConfigError(f"slots is {slots}; a plan needs at least 2, since guidance takes two slots an image")
    if check_tokens is not None and check_tokens < 1:
        raise ConfigError(f"check_tokens is {check_tokens}; it must be at least 1")
    traced = narrow(model, precision)
    api = choose_flavor(flavor, driver_version() is not None)
    targets = choose_targets(api, targets)
    size = sum(p.numel() for p in model.transformer.parameters())
    limit = min(check_tokens or (FEW_TOKENS if size > LARGE else model.layout.max_length), model.layout.max_length)
    model = model.eval().requires_grad_(False)
    say(f"{api.flavor} {api.version}, {precision}, {slots} slots, for {','.join(targets)}")

    built: list[Built] = []

    def build(folder: Path) -> Manifest:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.onnx.") as name:
            graphs = Path(name)
            say("tracing")
            interface = write_graphs(traced, graphs, slots)
            manifest = describe(model, interface, slots, precision, api, targets)
            for part in GRAPHS:
                caches = interface["caches"] if part == "step" else []
                check_graph(onnx.load(graphs / f"{part}.onnx", load_external_data=False), caches)
            if precision == "bf16":
                write_tensors(graphs / "golden.safetensors", golden_values(model, limit))
                say("not compared with PyTorch: ONNX Runtime cannot run bf16 on a CPU")
            else:
                say(f"comparing with PyTorch in ONNX Runtime on the CPU, at most {limit} tokens a sequence")
                manifest = check_engine(model, graphs, manifest, limit)
                if precision != "fp32":
                    keep_drawn(graphs, manifest)
            for part in GRAPHS:
                say(f"building {part}")
                built.append(build_plan(api, graphs / f"{part}.onnx", folder, interface, blocks(model), targets))
            shutil.move(graphs / "golden.safetensors", folder)
        return manifest

    return write_engine(out, build, overwrite=overwrite), built


def choose_targets(api: TensorRT, targets: Sequence[str]) -> list[str]:
    """GPUs to build for, ``current`` and nothing resolved by what is in this machine.

    Raises:
        ConfigError: the package cannot build for a target.
        BackendError: ``current`` without a GPU.
    """
    chosen = list(targets) or ([CURRENT] if driver_version() or not api.ahead_of_time else list(AHEAD))
    api.check_targets(chosen)
    if chosen == [CURRENT]:
        chosen = [find_gpu().target]
        if api.ahead_of_time:
            api.check_targets(chosen)
    return chosen


def write_graphs(model: Model, folder: Path, slots: int) -> dict[str, Any]:
    """Trace the three graphs with fixed sizes; returns the step's interface for the manifest."""
    vae, net = model.tokenizer, model.transformer
    assert vae is not None and net is not None
    size, side = vae.config.image_size, vae.config.sides[-1]
    inputs = example_inputs(net, slots)
    dtype = next(net.parameters()).dtype
    inputs["caches"] = [cache.to(dtype) for cache in inputs["caches"]]
    caches = [f"cache_{i}" for i in range(len(inputs["caches"]))]
    outputs = [*(f"{name}_out" for name in STATE), *REPORTS, *(f"{name}_out" for name in caches)]
    parts: dict[str, tuple[nn.Module, dict[str, Any], list[str]]] = {
        "encoder": (EncoderGraph(vae), {"images": torch.zeros(1, 3, size, size)}, ["codes", "grain"]),
        "decoder": (PixelDecoder(vae), {"codes": torch.zeros(1, side, side, dtype=torch.long)}, ["images", "pixels"]),
        "step": (Step(net, scatter_attention), inputs, outputs),
    }
    for name, (module, given, produced) in parts.items():
        trace(module.eval(), given, produced, folder / f"{name}.onnx", False, fixed=True, opset=TENSORRT_OPSET)
    step = onnx.load(folder / "step.onnx", load_external_data=False)
    return {**specs(step.graph), "caches": [[name, f"{name}_out"] for name in caches]}


def describe(
    model: Model, interface: dict[str, Any], slots: int, precision: str, api: TensorRT, targets: Sequence[str]
) -> Manifest:
    """The manifest, but for files and measured errors."""
    assert model.tokenizer is not None and model.transformer is not None
    return Manifest(
        layout=model.layout,
        family=model.family,
        image_size=model.tokenizer.config.image_size,
        slots=slots,
        step=interface,
        precision=precision,
        weights=precision,
        backend=api.flavor,
        target=",".join(targets),
        tools={api.flavor: api.version, **{n: version(n) for n in ("torch", "onnx")}},
        class_names=model.class_names,
        defaults=model.defaults,
        parameters=count_parameters(model),
    )


def keep_drawn(folder: Path, manifest: Manifest) -> None:
    """Replace the golden free runs by those of ONNX Runtime, which has the same number format as the plan."""
    golden = read_tensors(folder / "golden.safetensors")
    generator = Generator.of_folder(folder, manifest)
    found: dict[str, list[Any]] = {"free_position": [], "free_content": []}
    for i, label in enumerate(golden["free_labels"].tolist()):
        count = int((golden["free_position"][i] >= 0).sum()) - 1
        params = free_params(manifest.layout, manifest.defaults, label, few=True)
        tokens = drawn(generator, label, i, params, count)
        for rows, start, values in zip(found.values(), (golden[name][i, :1] for name in found), tokens, strict=True):
            rows.append([*start, *values[values >= 0]])
    write_tensors(folder / "golden.safetensors", {**golden, **{name: padded(rows) for name, rows in found.items()}})


def blocks(model: Model) -> int:
    """Transformer blocks of both stacks."""
    assert model.transformer is not None
    return model.transformer.config.position_blocks + model.transformer.config.content_blocks


def build_plan(
    api: TensorRT, graph: Path, folder: Path, interface: dict[str, Any], count: int, targets: Sequence[str]
) -> Built:
    """Parse a graph, check the network, write the plan."""
    network = api.parse(graph)
    if graph.stem == "step":
        census = check_network(network, interface, count)
    else:
        wanted = specs(onnx.load(graph, load_external_data=False).graph)
        census = check_network(network, {**wanted, "caches": []}, 0)
    start = time.monotonic()
    plan = api.build(network, targets)
    (folder / f"{graph.stem}.plan").write_bytes(plan)
    return Built(graph.stem, census, len(plan), time.monotonic() - start)


def summary(built: Sequence[Built]) -> str:
    """A table of the plans."""
    lines = [f"{'plan':8s} {'layers':>7s} {'KV updates':>11s} {'attentions':>11s} {'MB':>8s} {'build s':>8s}"]
    for plan in built:
        layers, updates, attentions = plan.census
        lines.append(
            f"{plan.name:8s} {layers:7d} {updates:11d} {attentions:11d} {plan.bytes / 1e6:8.1f} {plan.seconds:8.1f}"
        )
    return "\n".join(lines)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m export.to_tensorrt", description="Checkpoint to TensorRT engine.")
    parser.add_argument("checkpoint", help="checkpoint folder with both stages, or with --config a published .ckpt")
    parser.add_argument("--config", help="released configuration of a published .ckpt, JSON or YAML")
    parser.add_argument("--out", help="engine folder; CHECKPOINT-tensorrt if left out")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="fp16")
    parser.add_argument("--slots", type=int, default=8, help="rows of the step; the plan has exactly so many")
    parser.add_argument(
        "--target",
        help=f"GPUs such as sm86,sm89 or `{CURRENT}`; this machine's GPU if left out, without one {','.join(AHEAD)}",
    )
    parser.add_argument("--flavor", choices=["auto", *FLAVORS], default="auto", help="package to build with")
    parser.add_argument("--check-tokens", type=int, help="compare at most so many tokens of a sequence with PyTorch")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing engine folder")
    args = parser.parse_args(argv)
    source = Path(args.checkpoint)
    if source.suffix == ".ckpt" and not args.config:
        raise ConfigError(f"{source} is a published checkpoint; give its released configuration with --config")
    model = import_published(args.config, source) if args.config else load_checkpoint(source)
    out = args.out or f"{str(source).removesuffix('.ckpt')}-tensorrt"
    manifest, built = export_tensorrt(
        model,
        out,
        slots=args.slots,
        precision=args.precision,
        targets=args.target.split(",") if args.target else (),
        flavor=args.flavor,
        overwrite=args.overwrite,
        check_tokens=args.check_tokens,
        say=lambda text: print(text, flush=True),
    )
    for name, error in manifest.tolerances.items():
        print(f"{name:60s} {error:.3g}")
    print(summary(built))
    print(f"{sum(f['bytes'] for f in manifest.files.values()) / 1e6:.1f} MB")
    print(out)


if __name__ == "__main__":
    main()
