"""Checkpoint to TensorRT engine: ``python -m export.to_tensorrt CKPT [--out ENGINE_DIR] [--precision fp16]``.

TensorRT builds plans for the GPU of this machine. TensorRT-RTX also builds ahead of time, without a GPU, for several
kinds of GPU in one plan. The graphs that either gets are first run by ONNX Runtime on the CPU and compared with PyTorch
(but for bf16, which it cannot run), and what TensorRT reads from them is compared with the manifest.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from dvq_rt.engine import Engine
from dvq_rt.files import write_tensors
from dvq_rt.labels import whole
from dvq_rt.manifest import Manifest, write_engine
from dvq_rt.step import StepTable
from export.lowering import TENSORRT_OPSET, scatter_attention
from export.package import check_whole, describe, summary, write_graphs, write_tokenizer
from export.parity import check_engine, check_limit, golden_values, keep_drawn
from export.precision import PRECISIONS, narrow
from export.tensorrt.check import check_graph
from export.tensorrt.plans import AHEAD, Plan, build_plan, choose_targets, plans_table
from export.tracing import MOST_ROWS, load_graph
from runtimes.cuda import driver_version
from runtimes.errors import ConfigError
from runtimes.onnxruntime import OnnxRuntimeBackend
from runtimes.tensorrt_api import CURRENT, FLAVORS, TensorRT, choose_flavor
from training.checkpoint import Model, load_checkpoint
from training.cli import guarded
from training.import_published import import_published
from training.step import step_table


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
        precision: ``fp32``, ``fp16`` or ``bf16``; see ``export.precision``.
        targets: such as ``sm86``, or ``current`` alone; empty takes the GPU of this machine or, without one, AHEAD.
        flavor: ``tensorrt``, ``tensorrt-rtx`` or ``auto``.
        overwrite: replace an existing engine folder.
        check_tokens: tokens after which the comparison with PyTorch stops; None takes whole images, or FEW_TOKENS of
            large models.
        say: told what is going on.

    Returns:
        the manifest and the plans that were built.

    Raises:
        CheckpointError: a part of the model is missing.
        ExportError: the graphs do not agree with PyTorch, TensorRT would misread them, or cannot build them.
        InputError, ConfigError: an option is out of its range.
        BackendError: the package is missing, or ``current`` was asked for without a GPU.
        EngineError: the folder exists.
    """
    _, net = check_whole(model)
    slots = whole("slots", slots, 1, MOST_ROWS)
    if slots < 2:
        raise ConfigError(f"slots is {slots}; a plan needs at least 2, since guidance takes two slots an image")
    limit = check_limit(net.layout, sum(p.numel() for p in net.parameters()), check_tokens)
    traced = narrow(model, precision)
    api = choose_flavor(flavor, driver_version() is not None)
    targets = choose_targets(api, targets)
    table = step_table(traced.both()[1])
    manifest = describe_plans(model, table, slots, precision, api, targets)
    model = model.eval().requires_grad_(False)
    say(f"{api.flavor} {api.version}, {precision}, {slots} slots, for {manifest.target}")

    built: list[Plan] = []

    def build(folder: Path) -> Manifest:
        graphs = folder / "onnx"  # within, so that what is left of a killed process is removed with the folder
        graphs.mkdir()
        say("tracing")
        trace_graphs(traced, graphs, table, slots)
        for part in manifest.graphs:
            caches = manifest.step["caches"] if part == "step" else []
            check_graph(load_graph(graphs / f"{part}.onnx"), caches)
        measured = manifest
        if precision == "bf16":
            write_tensors(graphs / "golden.safetensors", golden_values(model, limit))
            say("not compared with PyTorch: ONNX Runtime cannot run bf16 on a CPU")
        else:
            say(f"comparing with PyTorch in ONNX Runtime on the CPU, at most {limit} tokens a sequence")
            measured = check_engine(model, graphs, manifest, limit)
            if precision != "fp32":
                keep_drawn(Engine(graphs, manifest, OnnxRuntimeBackend()))
        for part in manifest.graphs:
            say(f"building {part}")
            built.append(build_plan(api, graphs / f"{part}.onnx", folder, manifest.step, targets))
        shutil.move(graphs / "golden.safetensors", folder)
        shutil.rmtree(graphs)
        write_tokenizer(model, folder)
        return measured

    return write_engine(out, build, overwrite=overwrite), built


def trace_graphs(model: Model, folder: Path, table: StepTable, slots: int) -> None:
    """The graphs that TensorRT gets; see ``export.package.write_graphs``."""
    write_graphs(model, folder, table, scatter_attention, slots=slots, pixels=True, opset=TENSORRT_OPSET)


def describe_plans(
    model: Model, table: StepTable, slots: int, precision: str, api: TensorRT, targets: Sequence[str]
) -> Manifest:
    """The manifest, but for files and measured errors."""
    backend, step = (api.flavor, api.version), table.to_dict(slots)
    return describe(
        model, step, slots=slots, backend=backend, target=",".join(targets), precision=precision, weights=precision
    )


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
