"""Command line: ``dvq-rt sample | edit | vary | reconstruct | inspect | verify | accept | bench | serve`` and more (or
``python -m dvq_rt``).

The commands that train and export are entry points of the group ``dvq_rt.commands`` in the package's metadata, so that
they can be called as ``dvq-rt train-tokenizer`` and so on, and the runtime still knows nothing of them.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvq_rt.completion import SHELLS, script
from dvq_rt.describe import describe, plain, table
from dvq_rt.editing import region_mask
from dvq_rt.files import write_file
from dvq_rt.images import grain_overlay, grid, open_rgb, psnr, square, to_array, to_uint8
from dvq_rt.labels import MOST_IMAGES, read_label, whole
from dvq_rt.manifest import engine_folder, read_engine
from dvq_rt.outputs import PICTURES, blocks, make_folder, picture_target, write_picture
from dvq_rt.rates import Rate
from dvq_rt.sampling import POSITIONS, SamplingParams
from runtimes.errors import DvqError, InputError, guard

PER_LABEL = 6
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
        with _logging(options):
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


@contextmanager
def _logging(options: argparse.Namespace) -> Iterator[None]:
    """Lines of our loggers on standard error: warnings, with ``-v`` also what is done, with ``-q`` neither."""
    ours = [logging.getLogger(name) for name in ("dvq_rt", "runtimes")]
    handler = logging.StreamHandler() if sys.stderr is not None else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.setLevel(logging.ERROR if options.quiet else logging.DEBUG)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    for logger in ours:
        logger.setLevel(logging.INFO if options.verbose else logging.NOTSET)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)


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
    if options.shard or options.workers or options.ray:
        return _sample_shards(options, given)
    target, folder = picture_target(options.out)
    generator = _generator(options)
    params = SamplingParams.from_dict({**generator.manifest.defaults, **given})
    prompts = pick_prompts(read_prompts(options.prompt, options.prompt_file), options.n)
    labels = None
    if prompts is None or options.labels is not None:
        n = options.n or len(prompts or []) or None
        labels = pick_labels(options.labels, n, generator.class_names, generator.manifest.layout.classes)
    n = options.n or len(labels or prompts or []) or 16
    columns = options.columns or (PER_LABEL if options.n is None and (labels or prompts) else None)
    watched = _watched(options)
    words = {"prompts": prompts, "negative_prompts": options.negative, "truncate": options.truncate}
    texts: dict[str, Any] = words if prompts or options.negative is not None else {}
    samples = generator.sample(n=n, labels=labels, seed=options.seed, params=params, progress=watched, **texts)
    if folder is not None:
        make_folder(folder)
        samples.save(folder)
    write_picture(target, samples.grid(columns=columns))
    print(target)
    return 0


def edit(options: argparse.Namespace) -> int:
    """Redraw a region of a picture and write the picture, what is redrawn, and the results side by side."""
    target, generator, picture, shared = _edited(options)
    if (options.mask is None) == (options.region is None):
        raise InputError("give --mask or --region, and not both")
    size = len(picture)
    if options.mask is not None:  # a picture like any other: white is redrawn
        mask = square(open_rgb(options.mask), size).max(-1) > 127
    else:
        mask = region_mask([int(word) for word in _numbers("--region", options.region, 4)], size)
    samples = generator.edit(
        picture, mask, grain=options.grain, dilate=options.dilate, candidates=options.candidates, **shared
    )
    cells = generator.edit_of(picture, mask, dilate=options.dilate).redraw.repeat(size // generator.layout.sides[0], 0)
    redrawn = np.where(cells.repeat(size // generator.layout.sides[0], 1)[..., None], 255, picture // 2)
    write_picture(target, grid(np.stack([picture, redrawn.astype(np.uint8), *samples.to_numpy()])))
    print(f"drawn from the law of: {samples.law}")
    print(target)
    return 0


def vary(options: argparse.Namespace) -> int:
    """Draw pictures that begin as a given one does, and write it beside them."""
    target, generator, picture, shared = _edited(options)
    keep: Any = "coarse" if options.keep == "coarse" else _numbers("--keep", options.keep, 1)[0]
    samples = generator.vary(picture, keep, **shared)
    write_picture(target, grid(np.stack([picture, *samples.to_numpy()])))
    print(target)
    return 0


def outpaint(options: argparse.Namespace) -> int:
    """Draw what lies around a picture."""
    target, generator, picture, shared = _edited(options)
    sides = {name: getattr(options, name) for name in ("left", "top", "right", "bottom")}
    image, _ = generator.outpaint(picture, **sides, **shared)
    write_picture(target, image)
    print(target)
    return 0


def _edited(options: argparse.Namespace) -> tuple[Path, Any, NDArray[np.uint8], dict[str, Any]]:
    """What the commands share that start from a picture: output, generator, the picture at the model's size, and how to
    draw."""
    target, _ = picture_target(options.out)
    generator = _generator(options)
    picture = square(open_rgb(options.image), generator.manifest.image_size)
    given = {name: getattr(options, name) for name in ("temperature", "guidance") if hasattr(options, name)}
    params = SamplingParams.from_dict({**generator.manifest.defaults, **given})
    label = None if options.label is None else read_label(options.label, generator.class_names)
    shared = {"labels": label, "prompts": options.prompt, "seed": options.seed, "params": params}
    return target, generator, picture, {**shared, "n": options.n} if hasattr(options, "n") else shared


def _numbers(name: str, text: str, count: int) -> list[float]:
    """Numbers separated by commas."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise InputError(f"{name} is {text!r}; it must be {count} number{'s, separated by commas' * (count > 1)}")
    return numbers


def _sample_shards(options: argparse.Namespace, given: dict[str, Any]) -> int:
    """Draw what a folder of tar files still lacks; image i has label i modulo their number."""
    from dvq_rt.bulk import SHARD, draw_shards

    if options.columns or Path(options.out).suffix.lower() in PICTURES:
        raise InputError(
            "--shard, --workers and --ray write tar files: name a folder with --out, and leave out --columns"
        )
    manifest = read_engine(engine_folder(options.engine))
    prompts = read_prompts(options.prompt, options.prompt_file)
    alone = bool(prompts) and options.labels is None
    paths = draw_shards(
        options.engine,
        options.out,
        options.n or len(prompts) or 16,
        None if alone else named_labels(options.labels, manifest.class_names, manifest.layout.classes) or None,
        options.seed,
        SamplingParams.from_dict({**manifest.defaults, **given}),
        prompts=prompts or None,
        negative_prompt=options.negative,
        truncate=options.truncate,
        shard=options.shard or SHARD,
        workers=options.workers or 1,
        ray=options.ray,
        progress=_watched(options),
        **{name: getattr(options, name) for name in ("device", "slots", "threads")},
    )
    print(f"{len(paths)} shards in {options.out}")
    return 0


def reconstruct(options: argparse.Namespace) -> int:
    """Code pictures and decode them again; write originals above reconstructions above grain maps."""
    target, folder = picture_target(options.out)
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
        make_folder(folder)
    write_picture(target, blocks(rows, RECONSTRUCTION_COLUMNS))
    print(target)
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print what an engine folder holds, after checking its files."""
    folder = engine_folder(options.engine)
    manifest = read_engine(folder)
    print(plain({"path": str(folder), **manifest.to_dict()}) if options.json else describe(manifest, folder))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check an engine against the numbers stored at its export; exit status 1 if a check fails."""
    checks = _generator(options).verify()
    failed = [c.name for c in checks if not c.ok]
    if options.json:
        print(plain({"checks": [c._asdict() for c in checks], "failed": failed}))
        return 1 if failed else 0
    rows = [(c.name, f"{c.measured:.3g}", f"{c.bound:.3g}", "ok" if c.ok else "FAILED") for c in checks]
    print(table([("check", "measured", "bound", "result"), *rows]))
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
        write_file(Path(options.out), (plain(result) + "\n").encode())
    print(plain(result) if options.json else table(tool.report(result)))
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
        write_file(Path(options.out), (plain(result) + "\n").encode())
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


def serve(options: argparse.Namespace) -> int:
    """Answer requests over HTTP, with a page to try it; needs the extra [serve]."""
    from dvq_rt.serve.settings import Settings, named_engines

    fields = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    settings = Settings(**{**fields, "engines": named_engines(options.engines)})
    try:
        from dvq_rt.serve.command import serve as run
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs the package {error.name}; pip install 'dvq-rt[cpu,serve]'") from error
    return run(settings)


def push(options: argparse.Namespace) -> int:
    """Upload an engine and its model card to the Hugging Face Hub; print the name that opens it."""
    from dvq_rt.publish import model_card
    from dvq_rt.publish import push as upload

    if options.dry_run:
        print(model_card(read_engine(engine_folder(options.engine)), options.repository, options.license))
    else:
        print(upload(options.engine, options.repository, options.license, private=options.private))
    return 0


def completion(options: argparse.Namespace) -> int:
    """Print a script that completes commands, options and file names in a shell: eval "$(dvq-rt completion)"."""
    print(script(options.shell, options.parsers, _installed()), end="")
    return 0


# --- arguments -------------------------------------------------------------------------------------------------
def _generator(options: argparse.Namespace) -> Any:
    from dvq_rt.generator import Generator

    return Generator(options.engine, device=options.device, slots=options.slots, threads=options.threads)


def pick_labels(text: str | None, n: int | None, names: Sequence[str], classes: int) -> list[int | str] | None:
    """One label for each picture: those asked for, or all, in equal shares and in order; without ``n`` a row of
    pictures for each (at most the first ten if all)."""
    wanted = named_labels(text, names, classes)
    if text is not None and n is not None and len(wanted) > n:
        raise InputError(f"--labels names {len(wanted)} labels, but --n is {n}; raise --n or name fewer labels")
    if text is None and n is None:
        wanted = wanted[:10]
    n = n or PER_LABEL * len(wanted)
    return [wanted[i * len(wanted) // n] for i in range(n)] if wanted else None


def read_prompts(texts: list[str] | None, path: str | None) -> list[str]:
    """Those given, and the lines of a file, but for empty ones."""
    if path is None:
        return texts or []
    with guard(InputError, f"--prompt-file {path} cannot be read"):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise InputError(f"--prompt-file {path} has no prompts; write one a line")
    return [*(texts or []), *filter(None, lines)]


def pick_prompts(texts: list[str] | None, n: int | None) -> list[str] | None:
    """One prompt for each picture: those asked for in equal shares and in order; without ``n`` a row for each."""
    if not texts:
        return None
    if n is not None and len(texts) > n:
        raise InputError(f"there are {len(texts)} prompts, but --n is {n}; raise --n or give fewer")
    n = n or PER_LABEL * len(texts)
    return [texts[i * len(texts) // n] for i in range(n)]


def named_labels(text: str | None, names: Sequence[str], classes: int) -> list[int | str]:
    """The labels that ``--labels`` names, or all."""
    if text is None:
        return list(range(classes))
    words = [text] if text in names else [word.strip() for word in text.split(",")]
    return [int(w) if w not in names and w.removeprefix("-").isdecimal() else w for w in words]


def _watched(options: argparse.Namespace) -> bool:
    """Whether somebody looks at a progress bar."""
    return sys.stderr is not None and sys.stderr.isatty() and not options.quiet


def _top_k(text: str) -> int | None:
    return None if text == "none" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dvq-rt", description="Make pictures with an engine folder.")
    parser.epilog = (
        f"Also installed: {', '.join(sorted(_installed()))}; each has a --help of its own. Exit status: 0 done, 1 a "
        "check of verify or accept failed, 2 bad use or an error that is told, 130 interrupted, 141 whoever read the "
        "output left."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function: Callable[[argparse.Namespace], int], runs: bool, **engine: Any) -> argparse.ArgumentParser:
        words = (function.__doc__ or "").strip()
        command = commands.add_parser(function.__name__, help=words, description=words, allow_abbrev=False)
        command.set_defaults(command=function)
        name = engine.pop("name", "engine")
        command.add_argument(
            name, metavar="DIR", help="engine folder, demo:dq, demo:dq3, demo:mq or hf:owner/name (demo:dq)", **engine
        )
        talk = command.add_mutually_exclusive_group()
        talk.add_argument("-v", "--verbose", action="store_true", help="say on standard error what is done")
        talk.add_argument("-q", "--quiet", action="store_true", help="neither warnings nor a progress bar")
        if runs:
            command.add_argument("--device", help="cpu, cuda or cuda:N; the engine's own if left out")
            command.add_argument("--slots", type=int, help="images drawn at once; the engine's own number if left out")
            command.add_argument("--threads", type=int, help="processor threads")
        return command

    drawing = add(sample, True, name="--engine")
    drawing.add_argument("--n", type=int, help="number of pictures (a row per label, or 16)")
    drawing.add_argument("--labels", help="names or indices, separated by commas; all labels if left out")
    drawing.add_argument("--prompt", action="append", help="what to draw, in words; give it again for more")
    drawing.add_argument("--prompt-file", metavar="FILE", help="a prompt a line")
    drawing.add_argument("--negative", metavar="PROMPT", help="what guidance leads away from")
    drawing.add_argument("--truncate", action="store_true", help="leave out the end of prompts that are too long")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--out", default="samples.png", help="picture, or a folder ending with / (samples.png)")
    drawing.add_argument("--columns", type=int, help="pictures per row of the grid")
    bulk = drawing.add_argument_group(
        "many images", "any of these writes tar files into the folder --out; the same command goes on where one stopped"
    )
    bulk.add_argument("--shard", type=int, metavar="IMAGES", help="images in a tar file (256)")
    bulk.add_argument("--workers", type=int, help="processes, or actors of Ray (1)")
    bulk.add_argument("--ray", action="store_true", help="workers on a Ray cluster, which RAY_ADDRESS names")
    tuning = drawing.add_argument_group("sampling", "what is left out keeps the engine's recommended value")
    for name in ("temperature", "top-p", "top-p-position", "guidance"):
        tuning.add_argument(f"--{name}", type=float, default=argparse.SUPPRESS)
    for name in ("top-k", "top-k-position"):
        tuning.add_argument(f"--{name}", type=_top_k, default=argparse.SUPPRESS, help="a number, or none")
    tuning.add_argument("--positions", choices=POSITIONS, default=argparse.SUPPRESS)

    for function, out in ((edit, "edited.png"), (vary, "varied.png"), (outpaint, "outpainted.png")):
        command = add(function, True, name="--engine")
        command.add_argument("image", metavar="IMAGE", help="cut to a square and resized to the model's size")
        command.add_argument("--label", help="name or index; none if left out")
        command.add_argument("--prompt", help="what to draw, in words, where the model reads them")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--out", default=out, help=f"picture ({out})")
        for name in ("temperature", "guidance"):
            command.add_argument(f"--{name}", type=float, default=argparse.SUPPRESS)
        if function is not outpaint:
            command.add_argument("--n", type=int, default=4, help="number of results (4)")
        if function is edit:
            command.add_argument("--mask", metavar="PICTURE", help="white is redrawn; cut and resized as IMAGE is")
            command.add_argument("--region", metavar="L,T,R,B", help="a rectangle in pixels of the model's size")
            command.add_argument("--grain", choices=("free", "keep"), default="free", help="of what is redrawn")
            command.add_argument("--dilate", type=int, default=0, help="rings of cells that are redrawn too")
            command.add_argument("--candidates", type=int, default=1, help="images drawn for each result")
        elif function is vary:
            command.add_argument("--keep", default="coarse", help="coarse, or a share of the tokens from 0 to 1")
        else:
            for name in ("left", "top", "right", "bottom"):
                command.add_argument(f"--{name}", type=int, default=0, help="pixels to add, whole coarsest cells")

    coding = add(reconstruct, True, name="--engine")
    coding.add_argument("images", nargs="+", metavar="IMAGE")
    rate = coding.add_mutually_exclusive_group()
    rate.add_argument("--bits-per-pixel", type=float, default=argparse.SUPPRESS, help="the most that codes may cost")
    rate.add_argument(
        "--fine-ratio", type=float, nargs="+", default=argparse.SUPPRESS, help="share of each finer grain"
    )
    rate.add_argument("--kept", type=int, default=argparse.SUPPRESS, help="cells that keep a code")
    coding.add_argument("--out", default="reconstructions.png", help="picture, or a folder ending with /")

    checking = add(inspect, False, nargs="?"), add(verify, True, nargs="?")

    words = (accept.__doc__ or "").strip()
    acceptance = commands.add_parser("accept", help=words, description=words, allow_abbrev=False)
    acceptance.set_defaults(command=accept)
    acceptance.add_argument("engines", nargs="+", metavar="DIR", help="engine folder or a demo, such as demo:mq")
    acceptance.add_argument("--device", default="cuda", help="cuda (the first GPU) or cuda:N")
    acceptance.add_argument("--rehearse", action="store_true", help="run the same on the CPU, shortened")
    acceptance.add_argument("--checkpoint", metavar="CKPT", help="also time PyTorch with this checkpoint there")
    acceptance.add_argument("--images", type=int, default=argparse.SUPPRESS, help="with changed neighbours (200)")
    acceptance.add_argument("--soak", type=float, default=argparse.SUPPRESS, help="seconds of drawing (120)")
    acceptance.add_argument("--threads", type=int, help="processor threads of a rehearsal")
    acceptance.add_argument("--out", help="write all numbers to this JSON file")

    timing = add(bench, True, nargs="?")
    for command in (*checking, timing):
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    timing.add_argument("--length", type=int, help="tokens cached when one token is timed (half of the longest)")
    timing.add_argument("--tokens", type=int, help="tokens of the images whose time is split (5/8 of the longest)")
    timing.add_argument("--rounds", type=int, default=5, help="turns; every number is their median")
    timing.add_argument("--images", type=int, nargs="*", default=[1, 10], help="numbers of images to draw (1 10)")
    timing.add_argument("--mixed", action="store_true", help="also 64 images of mixed lengths, refilled and static")
    timing.add_argument("--out", help="write all numbers to this JSON file")

    serving = add(serve, True, name="engines", nargs="*")
    serving.epilog = "An engine is DIR or NAME=DIR, and may end with @cpu, @cuda or @cuda:N, its device."
    serving.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1, this machine alone)")
    serving.add_argument("--port", type=int, default=8000, help="8000; 0 takes a free one")
    serving.add_argument("--queue", type=int, default=64, help="images of an engine that may wait for a slot (64)")
    serving.add_argument("--timeout", type=float, default=60.0, help="seconds that a request may take (60)")
    serving.add_argument("--workers", type=int, default=1, help="processes, each with its own engines (1)")
    serving.add_argument("--images", type=int, default=16, help="most images of a request (16)")
    serving.add_argument("--megabytes", type=int, default=8, help="largest body of a request in MiB (8)")
    serving.add_argument("--megapixels", type=int, default=32, help="largest picture in a request (32)")

    publishing = add(push, False)
    publishing.add_argument("repository", metavar="OWNER/NAME")
    publishing.add_argument("--license", required=True, help="as the hub writes it, such as mit")
    publishing.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    publishing.add_argument("--dry-run", action="store_true", help="print the model card and upload nothing")

    words = (completion.__doc__ or "").strip()
    completing = commands.add_parser("completion", help=words, description=words)
    completing.set_defaults(command=completion)
    completing.add_argument("shell", nargs="?", choices=list(SHELLS), default="bash", help="bash if left out")
    parser.set_defaults(parsers=commands.choices, quiet=False, verbose=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
