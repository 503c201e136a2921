"""Checkpoint to TensorRT engine: ``python -m export.to_tensorrt CKPT [--out ENGINE_DIR] [--precision fp16]``.

TensorRT builds plans for the GPU of this machine. TensorRT-RTX also builds ahead of time, without a GPU, for several
kinds of GPU in one plan. The graphs that either gets are first run by ONNX Runtime on the CPU and compared with PyTorch
(but for bf16, which it cannot run), and what TensorRT reads from them is compared with the manifest.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

from dvq_rt.generator import Generator
from dvq_rt.manifest import Manifest, read_tensors, write_engine, write_tensors
from dvq_rt.verify import drawn, free_params
from export.lowering import TENSORRT_OPSET, scatter_attention
from export.package import GRAPHS, check_number, check_whole, describe, summary, write_graphs
from export.parity import check_engine, golden_values, padded
from export.tensorrt.check import check_graph
from export.tensorrt.plans import AHEAD, Plan, build_plan, choose_targets, plans_table
from export.tensorrt.precision import PRECISIONS, narrow
from export.tracing import MOST_ROWS
from runtimes.cuda import driver_version
from runtimes.errors import ConfigError
from runtimes.tensorrt_api import CURRENT, FLAVORS, TensorRT, choose_flavor
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded
from training.import_published import import_published

LARGE, FEW_TOKENS = 50_000_000, 24
"""Transformers of more parameters are compared on so few tokens, because this takes long on a CPU."""


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
) -> tuple[Manifest, list[Plan]]:
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
    _, net = check_whole(model)
    check_number("slots", slots, 2, MOST_ROWS, ", since guidance takes two slots an image")
    if check_tokens is not None:
        check_number("check_tokens", check_tokens, 1, 2**31)
    traced = narrow(model, precision)
    api = choose_flavor(flavor, driver_version() is not None)
    targets = choose_targets(api, targets)
    large = sum(p.numel() for p in net.parameters()) > LARGE
    limit = min(check_tokens or (FEW_TOKENS if large else net.layout.max_length), net.layout.max_length)
    blocks = net.config.position_blocks + net.config.content_blocks
    model = model.eval().requires_grad_(False)
    say(f"{api.flavor} {api.version}, {precision}, {slots} slots, for {','.join(targets)}")

    built: list[Plan] = []

    def build(folder: Path) -> Manifest:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.onnx.") as name:
            graphs = Path(name)
            say("tracing")
            interface = trace_graphs(traced, graphs, slots)
            manifest = describe_plans(model, interface, slots, precision, api, targets)
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
                built.append(build_plan(api, graphs / f"{part}.onnx", folder, interface, blocks, targets))
            shutil.move(graphs / "golden.safetensors", folder)
        return manifest

    return write_engine(out, build, overwrite=overwrite), built


def trace_graphs(model: Model, folder: Path, slots: int) -> dict[str, Any]:
    """The graphs that TensorRT gets; see ``export.package.write_graphs``."""
    return write_graphs(model, folder, scatter_attention, slots=slots, pixels=True, opset=TENSORRT_OPSET)


def describe_plans(
    model: Model, interface: dict[str, Any], slots: int, precision: str, api: TensorRT, targets: Sequence[str]
) -> Manifest:
    """The manifest, but for files and measured errors."""
    backend, target = (api.flavor, api.version), ",".join(targets)
    return describe(
        model, interface, slots=slots, backend=backend, target=target, precision=precision, weights=precision
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
    out = f"{str(source).removesuffix('.ckpt')}-tensorrt" if args.out is None else args.out
    manifest, built = export_tensorrt(
        model,
        out,
        slots=args.slots,
        precision=args.precision,
        targets=() if args.target is None else args.target.split(","),
        flavor=args.flavor,
        overwrite=args.overwrite,
        check_tokens=args.check_tokens,
        say=lambda text: print(text, flush=True),
    )
    print(summary(manifest, out, plans_table(built)))


if __name__ == "__main__":
    main()
