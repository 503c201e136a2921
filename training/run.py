"""The folder of a training run: its lock, its settings, the images it saw, its log."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dvq_rt.files import open_regular, parse_json, read_json, restore_folder, write_file
from runtimes.errors import ConfigError, guard, short
from training import processes
from training.checkpoint import checkpoint_step
from training.data.folder import ImageFolder
from training.data.listing import some

SETTINGS, IMAGES, LOG, LOCK = "settings.json", "images.jsonl", "log.jsonl", "lock"
FREE = ("steps", "workers", "validate_every", "picture_every", "checkpoint_every", "keep_last", "tracker")
"""Fields of ``TrainConfig`` that may change when a run is resumed; the first makes another schedule, the others not."""


def say(text: str) -> None:
    """A line of process 0 on standard output, where there is one, that leaves progress bars whole."""
    if sys.stdout is not None and processes.number() == 0:
        tqdm.write(text)


@contextmanager
def open_run(
    run: str | Path,
    resume: bool,
    settings: Mapping[str, Any],
    images: ImageFolder,
    inputs: Mapping[str, tuple[str | Path, str]],
    *,
    starts: Callable[[int], Mapping[str, int]] = lambda steps: {},
    new_classes: bool = True,
) -> Iterator[tuple[Path, bool]]:
    """A run folder that no other run trains into meanwhile: a new one, or one whose settings fit. Process 0 looks, and
    holds it for all that train together.

    Resumed runs may differ in ``FREE`` and may have more images, where all the old ones are still there and on their
    side of the split; what that changes is said.

    Args:
        run: the folder.
        resume: go on from its checkpoint; a run that was killed before it had one starts again.
        settings: the run's configurations by section, dataclasses; one is ``training``.
        images: what it is trained on.
        inputs: what else it reads: name -> (path, digest of the content).
        starts: number of all steps -> what starts within a run, and at which step. Another number of steps may not
            move that from before the checkpoint to behind it, or back.
        new_classes: whether images of further classes may come in.

    Returns:
        the folder, and whether it holds a checkpoint to go on from.

    Raises:
        ConfigError: another process trains into the folder, or it holds another run.
    """
    with ExitStack() as stack:

        def enter() -> bool:
            held = _entered(Path(run), resume, settings, images, inputs, starts, new_classes)
            return stack.enter_context(held)

        yield Path(run), processes.on_first(enter)


@contextmanager
def _entered(
    folder: Path,
    resume: bool,
    settings: Mapping[str, Any],
    images: ImageFolder,
    inputs: Mapping[str, tuple[str | Path, str]],
    starts: Callable[[int], Mapping[str, int]],
    new_classes: bool,
) -> Iterator[bool]:
    """``open_run`` of one process: whether the folder holds a checkpoint to go on from."""
    with guard(ConfigError, f"cannot write the run folder {folder}", "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    with lock, _held(lock, folder):
        begun = restore_folder(folder / "checkpoint").exists()
        if begun and not resume:
            raise ConfigError(f"{folder} already holds a run; add --resume to go on with it, or choose another --out")
        digests = {"images": images.digest(), **{name: digest for name, (_, digest) in inputs.items()}}
        now = {**{name: asdict(section) for name, section in settings.items()}, "inputs": digests}
        if resume and (begun or (folder / SETTINGS).exists()):
            before = read_json(folder / SETTINGS, mend="so the run cannot go on; choose another --out")
            step = checkpoint_step(folder / "checkpoint") if begun else 0
            _check_inputs(folder, before, inputs)
            _check_settings(folder, before, settings, step, starts)
            _check_images(folder, before, images, step, new_classes)
        if not begun:
            (folder / LOG).unlink(missing_ok=True)
        rows = (json.dumps(row) + "\n" for row in _image_rows(images))
        write_file(folder / IMAGES, "".join(rows).encode(), error=ConfigError)
        text = json.dumps(now, indent=1, sort_keys=True) + "\n"
        write_file(folder / SETTINGS, text.encode(), error=ConfigError)
        yield begun


# --- the lock --------------------------------------------------------------------------------------------------
@contextmanager
def _held(lock: TextIO, folder: Path) -> Iterator[None]:
    """Hold a lock file, with the name of this process in it. One that died holds none, whatever its file says."""
    if not _locked(lock):
        lock.seek(0)
        holder = lock.read(200).strip() or "another process"
        raise ConfigError(f"{folder} is being trained into by {holder}; wait for its end, or choose another --out")
    holder = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with guard(ConfigError, f"cannot write {folder / LOCK}", "make room, or choose another --out"):
        lock.truncate(0)
        os.write(lock.fileno(), holder.encode())  # what a buffer held would be tried again, and fail, at the end
    try:
        yield
    finally:
        lock.truncate(0)  # not removed: another process may have it open already


def _locked(lock: TextIO) -> bool:
    """Lock a file against other processes; whether that worked. The lock ends with the file or the process."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        lock.seek(1 << 30)  # far behind the text, which stays readable
        try:
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks: what the file says must do
        return not _is_alive(lock)
    return True


def _is_alive(lock: TextIO) -> bool:
    """Whether the process that a lock file names may live; one on another machine may."""
    lock.seek(0)
    words = lock.read(200).split()
    if len(words) < 4 or words[3] != platform.node():
        return bool(words)
    try:
        os.kill(int(words[1]), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        pass
    return int(words[1]) != os.getpid()


# --- what must be as before ------------------------------------------------------------------------------------
def _check_inputs(folder: Path, before: Any, inputs: Mapping[str, tuple[str | Path, str]]) -> None:
    known = before.get("inputs") if isinstance(before, dict) else None
    if not isinstance(known, dict) or "images" not in known:
        raise ConfigError(f"{folder / SETTINGS} is damaged, so the run cannot go on; choose another --out")
    for name, (path, digest) in inputs.items():
        if known.get(name) != digest:
            raise ConfigError(f"{folder} was not started with the {name} that {path} holds now; resume with the same")
    if lacking := sorted(set(known) - {"images", *inputs}):
        raise ConfigError(f"{folder} was started with --{lacking[0]}; resume with the same")


def _check_settings(
    folder: Path,
    before: dict[str, Any],
    settings: Mapping[str, Any],
    step: int,
    starts: Callable[[int], Mapping[str, int]],
) -> None:
    """Refuse settings that differ, but for ``FREE``, whose effect is said. Fields that are younger than the run count
    as if it had been started with their defaults."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name, section in settings.items():
        old = before.get(name)
        if not isinstance(old, dict) or set(old) - {f.name for f in fields(section)}:
            raise ConfigError(f"{folder} was started with other settings ({folder / SETTINGS}); resume with the same")
        for f in fields(section):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            values = old.get(f.name, _plain(default)), _plain(getattr(section, f.name))
            if values[0] != values[1]:
                changes[f"{name}.{f.name}"] = values
    fixed = {name: values for name, values in changes.items() if name.removeprefix("training.") not in FREE}
    if fixed:
        told = "; ".join(f"{name} {short(old)}, not {short(new)}" for name, (old, new) in fixed.items())
        raise ConfigError(f"{folder} was started with other settings: {told}; resume with the same ones")
    for name, (old, new) in changes.items():
        if name != "training.steps":
            say(f"resumed with {name} {new} instead of {old}, which changes no weight")
            continue
        if new < step:
            raise ConfigError(f"training.steps is {new}, but {folder} has taken {step} already; give at least that")
        moved = [(dict(starts(steps)), [start < step for start in starts(steps).values()]) for steps in (old, new)]
        if moved[0][1] != moved[1][1]:
            raise ConfigError(
                f"{folder} has taken {step} of {old} steps; with training.steps {new} what starts at {moved[0][0]} "
                f"would start at {moved[1][0]}, on the other side; choose another number, or a new run with --init"
            )
        rates = [replace(settings["training"], steps=steps).rate(step) for steps in (old, new)]
        say(
            f"resumed with {name} {new} instead of {old}: from step {step} on the learning rate follows the new "
            f"schedule ({rates[1]:.3g} there instead of {rates[0]:.3g})"
        )


def _check_images(folder: Path, before: dict[str, Any], images: ImageFolder, step: int, new_classes: bool) -> None:
    """Refuse another set of images, unless some have only come in; that is said."""
    if before["inputs"]["images"] == images.digest():
        return
    other = f"{folder} was not started with the images that {images.root} holds now"
    with guard(ConfigError, f"{other}, and {folder / IMAGES}, where those are listed, cannot be read"):
        with open_regular(folder / IMAGES) as file:
            rows = [parse_json(line) for line in file]
        old = {path: (label, side) for path, label, side in rows}
    now = {path: (label, side) for path, label, side in _image_rows(images)}
    if gone := sorted(set(old) - set(now)):
        raise ConfigError(f"{other}: {len(gone)} are gone ({some(gone)}); resume with the same")
    if moved := sorted(path for path in old if old[path] != now[path]):
        raise ConfigError(
            f"{other}: {len(moved)} have changed their class or whether they are held out ({some(moved)}); resume with "
            "the same"
        )
    fresh = sorted({label for label, _ in now.values()} - {label for label, _ in old.values()})
    if fresh and not new_classes:
        raise ConfigError(f"{other}: the classes {some(fresh)} have come in, which the model has no labels for")
    say(f"resumed with {len(now) - len(old)} more images than before: they are drawn from step {step} on")


def _image_rows(images: ImageFolder) -> Iterator[tuple[str, str, str]]:
    """Path, class and side of the split of each image."""
    for side, indices in (("train", images.train), ("val", images.val)):
        for index in indices:
            yield images.relative(int(index)), images.classes[images.labels[index]], side


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


# --- the log ---------------------------------------------------------------------------------------------------
def cut_log(run: Path, step: int) -> None:
    """Drop the log's rows beyond a step, which a resumed run writes again, and a row that a crash left half."""
    path = run / LOG
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(Exception):
            kept += [line] if json.loads(line)["step"] <= step else []
    write_file(path, "".join(f"{line}\n" for line in kept).encode(), error=ConfigError)


def log(run: Path, row: dict[str, Any]) -> None:
    """Add a row to the log.

    Raises:
        ConfigError: the disk refused.
    """
    path = run / LOG
    refused = guard(ConfigError, f"cannot write {path}", "make room, and go on with --resume")
    with refused, path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
