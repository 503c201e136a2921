"""Command line: ``dvq-rt sample | reconstruct | inspect | verify | accept | bench`` (or ``python -m dvq_rt``).

The commands that train and export are entry points of the group ``dvq_rt.commands`` in the package's metadata, so that
they can be called as ``dvq-rt train-tokenizer`` and so on, and the runtime still knows nothing of them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dvq_rt.files import write_file
from dvq_rt.images import grain_overlay, grid, psnr, to_array, to_uint8
from dvq_rt.labels import MOST_IMAGES, whole
from dvq_rt.manifest import Manifest, engine_folder, read_engine
from dvq_rt.rates import Rate
from dvq_rt.sampling import POSITIONS, SamplingParams
from runtimes.errors import DvqError, InputError

PER_LABEL = 6
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FOLDER_GRID = "grid.png"
RECONSTRUCTION_COLUMNS = 8
BROKEN_PIPE = 141
RATES = tuple(Rate.__dataclass_fields__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0, 1 (``verify`` found a failure), 2 (bad use, or a ``DvqError``, printed to stderr), 130
        (interrupted) or 141 (whoever read the output left).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # None in windowed programs
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character shows another one
    try:
        if words and (command := _installed().get(words[0])):
            return _run_installed(command, words[1:])
        options = _parser().parse_args(words)
        status: int = options.command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except DvqError as error:
        _complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is flushed into the pipe
        return BROKEN_PIPE


def _complain(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def _installed() -> dict[str, EntryPoint]:
    """The commands of training and export."""
    return {point.name: point for point in entry_points(group="dvq_rt.commands")}


def _run_installed(command: EntryPoint, words: list[str]) -> int:
    try:
        run = command.load()
    except ModuleNotFoundError as error:
        raise InputError(
            f"{command.name} needs the package {error.name}; pip install 'dvq-rt[cpu,train,export]'"
        ) from error
    try:
        return int(run(words) or 0)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 2


# --- commands --------------------------------------------------------------------------------------------------
def sample(options: argparse.Namespace) -> int:
    """Draw pictures and write them as a grid, in a folder also one by one."""
    given = {name: getattr(options, name) for name in SamplingParams.__dataclass_fields__ if hasattr(options, name)}
    SamplingParams.from_dict(given)
    for name in ("n", "columns"):
        if getattr(options, name) is not None:
            whole(f"--{name}", getattr(options, name), 1, MOST_IMAGES)
    target, folder = _output(options.out)
    generator = _generator(options)
    params = SamplingParams.from_dict({**generator.manifest.defaults, **given})
    labels = pick_labels(options.labels, options.n, generator.class_names, generator.manifest.layout.classes)
    n = options.n or len(labels or []) or 16
    columns = options.columns or (PER_LABEL if options.n is None and labels else None)
    watched = sys.stderr is not None and sys.stderr.isatty()
    samples = generator.sample(n=n, labels=labels, seed=options.seed, params=params, progress=watched)
    if folder is not None:
        _make_folder(folder)
        samples.save(folder)
    _write_picture(target, samples.grid(columns=columns))
    print(target)
    return 0


def reconstruct(options: argparse.Namespace) -> int:
    """Code pictures and decode them again; write originals above reconstructions above grain maps."""
    target, folder = _output(options.out)
    generator = _generator(options)
    size, layout = generator.manifest.image_size, generator.manifest.layout
    originals = [to_uint8(to_array(path, size)[None])[0] for path in options.images]
    codes = generator.encode(originals, **{name: value for name, value in vars(options).items() if name in RATES})
    restored = generator.decode(codes)
    scale = max(1, 256 // size)
    rows: list[list[NDArray[np.uint8]]] = [[], [], []]
    for path, before, after, code in zip(options.images, originals, restored, codes, strict=True):
        rows[0].append(before.repeat(scale, 0).repeat(scale, 1))
        rows[1].append(after.repeat(scale, 0).repeat(scale, 1))
        rows[2].append(np.asarray(grain_overlay(before, code.grain, layout.sides, scale)))
        print(
            f"{path}: {code.length} of {layout.cells} codes, {code.bits_per_pixel(size):.3f} bits per pixel, "
            f"PSNR {psnr(before, after):.2f} dB"
        )
    if folder is not None:
        _make_folder(folder)
    _write_picture(target, _blocks(rows, RECONSTRUCTION_COLUMNS))
    print(target)
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print what an engine folder holds, after checking its files."""
    folder = engine_folder(options.engine)
    print(describe(read_engine(folder), folder))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check an engine against the numbers stored at its export; exit status 1 if a check fails."""
    checks = _generator(options).verify()
    rows = [(c.name, f"{c.measured:.3g}", f"{c.bound:.3g}", "ok" if c.ok else "FAILED") for c in checks]
    print(table([("check", "measured", "bound", "result"), *rows]))
    failed = [c.name for c in checks if not c.ok]
    print(
        f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}" if failed else f"all {len(checks)} passed"
    )
    return 1 if failed else 0


def bench(options: argparse.Namespace) -> int:
    """Measure an engine's speed; PyTorch baselines are in ``python -m export.bench``."""
    from dvq_rt import bench as tool

    generator = _generator(options)
    result = tool.bench(
        generator,
        slots=[options.slots] if options.slots else (1, 8),
        length=options.length,
        rounds=options.rounds,
        images=options.images,
        steps=options.tokens,
        mixed=options.mixed,
    )
    if options.out:
        write_file(Path(options.out), (json.dumps(result, indent=1) + "\n").encode())
    print(table(tool.report(result)))
    return 0


def accept(options: argparse.Namespace) -> int:
    """Check and measure engines on a GPU, in under ten minutes; exit status 1 if a check fails."""
    from dvq_rt import accept as tool

    plan = tool.REHEARSAL if options.rehearse else tool.Plan()
    plan = replace(plan, **{name: value for name, value in vars(options).items() if name in ("images", "soak")})
    result = tool.accept(
        options.engines,
        device=options.device,
        plan=plan,
        threads=options.threads,
        baselines=None if options.checkpoint is None else _baselines(options.checkpoint),
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if options.out:
        write_file(Path(options.out), (json.dumps(result, indent=1) + "\n").encode())
    print(table(tool.rows(result)))
    return 0 if result["ok"] else 1


def _baselines(checkpoint: str) -> Any:
    """PyTorch's times of a checkpoint, from the package that has PyTorch."""
    for point in entry_points(group="dvq_rt.baselines"):
        try:
            return point.load()(checkpoint)
        except ModuleNotFoundError as error:
            raise InputError(f"--checkpoint needs the package {error.name}; pip install 'dvq-rt[train]'") from error
    raise InputError("--checkpoint needs dvq-rt as it is installed by pip; leave it out")


# --- texts and pictures ----------------------------------------------------------------------------------------
def describe(manifest: Manifest, folder: Path) -> str:
    """A readable summary of an engine."""
    layout = manifest.layout
    sides = ", ".join(f"{side} x {side}" for side in layout.sides)
    labels = f"{layout.classes}" if layout.classes else "none"
    if layout.classes:
        labels += " and a null label (guidance works)" if layout.null_label else ", no null label (no guidance)"
    most = "at most " if layout.covering else ""
    kind = f"{manifest.precision}, weights {manifest.weights}"
    rows = [
        ("engine", str(folder)),
        ("family", f"{manifest.family}, schema {manifest.schema}"),
        ("runs on", f"{manifest.backend} for {manifest.target}, {kind}, {manifest.slots} slots"),
        ("image", f"{manifest.image_size} x {manifest.image_size} pixels"),
        ("codes", f"{layout.codebook_size} codes; grids {sides}; {layout.order}; {most}{layout.filled_cells} an image"),
        ("labels", labels),
    ]
    sections = [table(rows)]
    if manifest.class_names:
        sections.append("\n".join(["label names", *(f"  {i:3d} {n}" for i, n in enumerate(manifest.class_names))]))
    files = {name: f"{entry['bytes']:,} bytes" for name, entry in manifest.files.items()}
    parts: list[tuple[str, dict[str, Any]]] = [
        ("recommended sampling", manifest.defaults),
        ("tokenizer", manifest.tokenizer),
        ("parameters", {name: f"{count:,}" for name, count in manifest.parameters.items()}),
        ("errors measured at export", {name: f"{value:.3g}" for name, value in manifest.tolerances.items()}),
        ("made with", manifest.tools),
        ("files (sizes and SHA-256 checked)", files),
    ]
    for title, values in parts:
        if values:
            sections.append(f"{title}\n{table([(f'  {name}', str(value)) for name, value in values.items()])}")
    return "\n\n".join(sections)


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _blocks(rows: list[list[NDArray[np.uint8]]], columns: int) -> Image.Image:
    """Rows of pictures side by side, broken into blocks of at most ``columns``."""
    across = min(columns, len(rows[0]))
    blank = np.full_like(rows[0][0], 255)
    cells: list[NDArray[np.uint8]] = []
    for start in range(0, len(rows[0]), across):
        for row in rows:
            part = row[start : start + across]
            cells += part + [blank] * (across - len(part))
    return grid(np.stack(cells), across)


# --- arguments -------------------------------------------------------------------------------------------------
def _generator(options: argparse.Namespace) -> Any:
    from dvq_rt.generator import Generator

    return Generator(options.engine, device=options.device, slots=options.slots, threads=options.threads)


def pick_labels(text: str | None, n: int | None, names: Sequence[str], classes: int) -> list[int | str] | None:
    """One label for each picture: those asked for, or all, in equal shares and in order; without ``n`` a row of
    pictures for each (at most the first ten if all)."""
    wanted: list[int | str] = list(range(classes))
    if text is not None:
        words = [text] if text in names else [word.strip() for word in text.split(",")]
        wanted = [int(w) if w not in names and w.removeprefix("-").isdecimal() else w for w in words]
        if n is not None and len(wanted) > n:
            raise InputError(f"--labels names {len(wanted)} labels, but --n is {n}; raise --n or name fewer labels")
    elif n is None:
        wanted = wanted[:10]
    n = n or PER_LABEL * len(wanted)
    return [wanted[i * len(wanted) // n] for i in range(n)] if wanted else None


def _output(text: str) -> tuple[Path, Path | None]:
    """The picture to write, and the folder if ``--out`` names one; checked to be writable before any work."""
    folder = Path(text) if text.endswith(("/", os.sep)) or os.path.isdir(text) else None
    target = folder / FOLDER_GRID if folder else Path(text)
    if target.suffix.lower() not in PICTURES:
        raise InputError(f"--out is {text}; end it with one of {', '.join(PICTURES)}, or with / for a folder")
    try:
        if target.exists() and not target.is_file():
            raise InputError(f"--out {target} exists and is not a regular file; choose another name")
        parent = target.absolute().parent
        while folder and not parent.exists():  # it is made later; the nearest parent that exists must take it
            parent = parent.parent
        probe = parent / f".{secrets.token_hex(4)}.tmp"
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write --out {text}: {reason}; choose a folder that can be written") from error
    return target, folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make folder {folder}: {error.strerror}") from error


def _write_picture(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    kind = PICTURES[path.suffix.lower()]
    try:
        picture.save(buffer, kind, **({"quality": 95} if kind != "PNG" else {}))
    except (OSError, ValueError) as error:
        raise InputError(
            f"a picture of {picture.width} x {picture.height} cannot be stored as {kind}: {error}"
        ) from error
    write_file(path, buffer.getvalue())


def _top_k(text: str) -> int | None:
    return None if text == "none" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dvq-rt", description="Make pictures with an engine folder.")
    parser.epilog = f"Also installed: {', '.join(sorted(_installed()))}; each has a --help of its own."
    commands = parser.add_subparsers(required=True, metavar="sample | reconstruct | inspect | verify | accept | bench")

    def add(function: Callable[[argparse.Namespace], int], runs: bool, **engine: Any) -> argparse.ArgumentParser:
        words = (function.__doc__ or "").strip()
        command = commands.add_parser(function.__name__, help=words, description=words, allow_abbrev=False)
        command.set_defaults(command=function)
        name = engine.pop("name", "engine")
        command.add_argument(
            name, metavar="DIR", help="engine folder, demo:dq or demo:mq; demo:dq if left out", **engine
        )
        if runs:
            command.add_argument("--device", help="cpu, cuda or cuda:N; the engine's own if left out")
            command.add_argument("--slots", type=int, help="images drawn at once; the engine's own number if left out")
            command.add_argument("--threads", type=int, help="processor threads")
        return command

    drawing = add(sample, True, name="--engine")
    drawing.add_argument("--n", type=int, help="number of pictures (a row per label, or 16)")
    drawing.add_argument("--labels", help="names or indices, separated by commas; all labels if left out")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--out", default="samples.png", help="picture, or a folder ending with / (samples.png)")
    drawing.add_argument("--columns", type=int, help="pictures per row of the grid")
    tuning = drawing.add_argument_group("sampling", "what is left out keeps the engine's recommended value")
    for name in ("temperature", "top-p", "top-p-position", "guidance"):
        tuning.add_argument(f"--{name}", type=float, default=argparse.SUPPRESS)
    for name in ("top-k", "top-k-position"):
        tuning.add_argument(f"--{name}", type=_top_k, default=argparse.SUPPRESS, help="a number, or none")
    tuning.add_argument("--positions", choices=POSITIONS, default=argparse.SUPPRESS)

    coding = add(reconstruct, True, name="--engine")
    coding.add_argument("images", nargs="+", metavar="IMAGE")
    rate = coding.add_mutually_exclusive_group()
    rate.add_argument("--bits-per-pixel", type=float, default=argparse.SUPPRESS, help="the most that codes may cost")
    rate.add_argument(
        "--fine-ratio", type=float, nargs="+", default=argparse.SUPPRESS, help="share of each finer grain"
    )
    rate.add_argument("--kept", type=int, default=argparse.SUPPRESS, help="cells that keep a code")
    coding.add_argument("--out", default="reconstructions.png", help="picture, or a folder ending with /")

    add(inspect, False, nargs="?")
    add(verify, True, nargs="?")

    words = (accept.__doc__ or "").strip()
    acceptance = commands.add_parser("accept", help=words, description=words, allow_abbrev=False)
    acceptance.set_defaults(command=accept)
    acceptance.add_argument("engines", nargs="+", metavar="DIR", help="engine folder, demo:dq or demo:mq")
    acceptance.add_argument("--device", default="cuda", help="cuda (the first GPU) or cuda:N")
    acceptance.add_argument("--rehearse", action="store_true", help="run the same on the CPU, shortened")
    acceptance.add_argument("--checkpoint", metavar="CKPT", help="also time PyTorch with this checkpoint there")
    acceptance.add_argument("--images", type=int, default=argparse.SUPPRESS, help="with changed neighbours (200)")
    acceptance.add_argument("--soak", type=float, default=argparse.SUPPRESS, help="seconds of drawing (120)")
    acceptance.add_argument("--threads", type=int, help="processor threads of a rehearsal")
    acceptance.add_argument("--out", help="write all numbers to this JSON file")

    timing = add(bench, True, nargs="?")
    timing.add_argument("--length", type=int, help="tokens cached when one token is timed (half of the longest)")
    timing.add_argument("--tokens", type=int, help="tokens of the images whose time is split (5/8 of the longest)")
    timing.add_argument("--rounds", type=int, default=5, help="turns; every number is their median")
    timing.add_argument("--images", type=int, nargs="*", default=[1, 10], help="numbers of images to draw (1 10)")
    timing.add_argument("--mixed", action="store_true", help="also 64 images of mixed lengths, refilled and static")
    timing.add_argument("--out", help="write all numbers to this JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
