"""Images by the ten thousand, as tar files that WebDataset reads: resumable, by one process, several, or Ray's.

A folder of shards holds ``plan.json`` and tar files. Image i of a plan depends on the plan alone, so it does not matter
who draws a shard, when, or beside what. A shard is written under its name when it is complete, so what is missing is
what has no file: a process that is killed loses nothing but the shard that it was at.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from dvq_rt.engine import MOST_SLOTS
from dvq_rt.files import FileName, read_dataclass, read_json, write_file
from dvq_rt.generator import Generator
from dvq_rt.labels import Label, choose_labels, whole
from dvq_rt.manifest import Manifest, engine_folder, manifest_digest, read_engine
from dvq_rt.progress import Progress, told
from dvq_rt.prompts import Prompt, choose_prompts, read_tokenizer
from dvq_rt.sampling import SamplingParams
from runtimes.devices import read_device
from runtimes.errors import BackendError, EngineError, InputError, guard, short

LOG = logging.getLogger(__name__)
PLAN = "plan.json"
SHARD = 256
MOST = 10**9
RAY_STORE = 100 << 20
"""Bytes of Ray's object store on this machine; what goes through it are numbers of shards."""
FRUITLESS = 3
"""Times in a row that workers may die before one of them finishes a shard."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a folder of shards holds. Image i has label ``labels[i % len(labels)]``, if there are prompts
    ``prompts[i % len(prompts)]``, and is image i of ``seed``.

    Args:
        engine: SHA-256 of the engine's manifest.
        n: number of images, at least 1.
        seed: 0 to 2**64 - 1.
        labels: indices, None for no label.
        params: fields of ``SamplingParams``.
        shard: images in a shard; the last one may have fewer.
        slots: of the decode loop, fixed because last bits may differ between numbers of slots.
        prompts: what to draw, None for anything.
        negative, truncate: of all images, see ``Generator.sample``.

    Raises:
        InputError: a number is out of its range.
    """

    engine: str
    n: int
    seed: int
    labels: tuple[int | None, ...]
    params: dict[str, Any]
    shard: int
    slots: int
    prompts: tuple[str | None, ...] = ()
    negative: str | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        limits = (("n", 1, MOST), ("seed", 0, 2**64 - 1), ("shard", 1, 100_000), ("slots", 1, MOST_SLOTS))
        for name, low, high in limits:
            object.__setattr__(self, name, whole(name, getattr(self, name), low, high))

    @property
    def shards(self) -> int:
        return -(-self.n // self.shard)

    def images(self, shard: int) -> range:
        """Numbers of the images of a shard."""
        return range(shard * self.shard, min(self.n, (shard + 1) * self.shard))

    def path(self, folder: FileName, shard: int) -> Path:
        return Path(folder) / f"shard-{shard:06d}.tar"


def draw_shards(
    engine: str | os.PathLike[str] | None,
    folder: FileName,
    n: int,
    labels: Label | Iterable[Label] = None,
    seed: int = 0,
    params: SamplingParams | None = None,
    *,
    prompts: Prompt | Iterable[Prompt] = None,
    negative_prompt: Prompt = None,
    truncate: bool = False,
    shard: int = SHARD,
    workers: int = 1,
    ray: bool = False,
    slots: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    progress: Progress = None,
) -> list[Path]:
    """Draw the images that a folder still lacks. The same call goes on where an earlier one was stopped.

    Args:
        engine: as for ``Generator``; with Ray, every machine opens it by this name.
        folder: made if it is not there; with Ray, a folder that all machines share.
        n: number of images.
        labels: images take them in turn; None draws without a label.
        seed, params: as for ``Generator.sample``.
        prompts: of models that read them; images take them in turn, at most ``n``. None draws without.
        negative_prompt, truncate: of all images, as for ``Generator.sample``.
        shard: images in a tar file. Each has ``<number>.png`` and ``<number>.json`` with ``seed``, ``index``,
            ``label``, ``name`` (null without names) and ``codes``, their number; and ``prompt`` if there are prompts.
        workers: processes, each with its own engine; 1 draws in this one. Python starts them anew, so a script guards
            its own work by ``if __name__ == "__main__"``.
        ray: let Ray Data's actors be the workers, on this machine or the cluster that ``RAY_ADDRESS`` names.
        slots: images that each worker draws side by side; None takes the engine's number.
        threads: of each worker; None divides this machine's processors.
        device: as for ``Generator``.
        progress: True shows a bar; a function is called with (images done, images in all).

    Returns:
        paths of all shards, in order.

    Raises:
        InputError: an argument is wrong, or the folder holds images of another plan.
        EngineError: the engine cannot be opened, or is not the plan's.
        BackendError: workers die again and again, or Ray is not installed.
    """
    opened = engine_folder(engine)
    manifest = read_engine(opened)
    several = tuple(choose_labels(manifest.layout, manifest.class_names, labels))
    params = SamplingParams.from_dict(manifest.defaults) if params is None else params
    slots = manifest.slots if slots is None else slots
    texts = () if prompts is None else tuple(choose_prompts("prompts", prompts, None))
    plan = Plan(_identity(manifest), n, seed, several, params.to_dict(), shard, slots, texts, negative_prompt, truncate)
    _check_prompts(plan, manifest, opened)
    workers = whole("workers", workers, 1, 4096)
    where = read_device(device or ("cpu" if manifest.backend == "onnxruntime" else "cuda"))
    if ray and where.number:
        raise InputError(f"device is {device!r}, but Ray gives each worker a GPU of its own; use 'cuda'")
    _settle(plan, Path(folder))
    missing = [i for i in range(plan.shards) if not plan.path(folder, i).is_file()]
    threads = threads or max(1, (os.cpu_count() or 1) // (1 if ray else workers))
    opening = {"engine_dir": engine, "slots": slots, "threads": threads, "device": device}
    job = partial(_draw_to, json.dumps(asdict(plan)), os.path.abspath(folder), tuple(opening.items()))
    LOG.info("%d of %d shards are missing in %s", len(missing), plan.shards, folder)
    kept = plan.n - sum(len(plan.images(i)) for i in missing)
    with told(progress, plan.n) as tell:
        tell(kept)
        if ray:
            done_shards = _in_ray(job, missing, workers, threads, int(where.kind == "cuda"))
        else:
            done_shards = in_processes(job, missing, workers)
        for done in done_shards:
            kept += len(plan.images(done))
            tell(kept)
    return [plan.path(folder, i) for i in range(plan.shards)]


def _check_prompts(plan: Plan, manifest: Manifest, folder: Path) -> None:
    """
    Raises:
        InputError: the model reads no prompts, or needs some, or one is too long; or there are more than images.
    """
    if len(plan.prompts) > plan.n:
        raise InputError(f"there are {len(plan.prompts)} prompts for {plan.n} images; raise n or give fewer")
    if plan.negative is not None and SamplingParams.from_dict(plan.params).guidance == 1:
        raise InputError("a negative prompt needs guidance above 1, and it is 1")
    if not manifest.conditioning:
        if plan.prompts or plan.negative is not None:
            raise InputError(f"prompts were given, but the model of {folder} reads none; leave them out")
        return
    tokenizer = read_tokenizer(folder, manifest.conditioning["tokenizer"], manifest.prompt)
    lengths = [len(tokenizer.encode(text or "", plan.truncate)) for text in (*plan.prompts, plan.negative)]
    if not manifest.empty_prompt and not (plan.prompts and all(lengths[:-1])):
        raise InputError("this model needs prompts: it was trained without the empty prompt")


def shard_bytes(generator: Generator, plan: Plan, shard: int) -> bytes:
    """A shard as a tar file, the same bytes whoever draws it with the same versions of the libraries.

    Raises:
        EngineError: the generator's engine is not the plan's.
    """
    if _identity(generator.manifest) != plan.engine:
        raise EngineError(f"engine {generator.path} is another one than the plan's; copy the plan's engine there")
    numbers, names = plan.images(shard), generator.class_names
    labels = [plan.labels[i % len(plan.labels)] for i in numbers]
    params = SamplingParams.from_dict(plan.params)
    prompts = [plan.prompts[i % len(plan.prompts)] for i in numbers] if plan.prompts else None
    texts: dict[str, Any] = {"prompts": prompts, "negative_prompts": plan.negative, "truncate": plan.truncate}
    samples = generator.sample(len(numbers), labels, plan.seed, params, first=numbers[0], **texts)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, image, codes, label in zip(numbers, samples.images, samples.codes, labels, strict=True):
            picture = io.BytesIO()
            image.save(picture, "PNG")
            name = names[label] if names and label is not None else None
            told = {"seed": plan.seed, "index": number, "label": label, "name": name, "codes": codes.length}
            told |= {"prompt": codes.prompt} if plan.prompts else {}
            for suffix, data in (("png", picture.getvalue()), ("json", json.dumps(told).encode())):
                member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _identity(manifest: Manifest) -> str:
    return manifest_digest(manifest.to_dict())


def _settle(plan: Plan, folder: Path) -> None:
    """Write the plan into the folder, or compare it with the one that is there."""
    with guard(InputError, f"cannot make folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    if path.exists():
        old = read_dataclass(Plan, read_json(path, error=InputError), str(path), defaults=True, error=InputError)
        for field in fields(Plan):
            have, want = getattr(old, field.name), getattr(plan, field.name)
            if have != want:
                raise InputError(
                    f"{folder} holds images whose {field.name} is {short(have)}, not {short(want)}; give the same "
                    "values to go on, or choose another folder"
                )
    elif any(folder.glob("shard-*.tar")):
        raise InputError(f"{folder} holds shards but no {PLAN}, so nothing says what they are; choose another folder")
    else:
        write_file(path, (json.dumps(asdict(plan), indent=1) + "\n").encode())


# --- workers ---------------------------------------------------------------------------------------------------
def _draw_to(plan: str, folder: str, opening: tuple[tuple[str, Any], ...], shard: int) -> int:
    """Draw a shard into the folder, with the engine that this process opened for the one before."""
    whole_plan = _plan(plan)
    write_file(whole_plan.path(folder, shard), shard_bytes(_opened(opening), whole_plan, shard))
    LOG.info("shard %d of %d", shard + 1, whole_plan.shards)
    return shard


@cache
def _plan(text: str) -> Plan:
    return read_dataclass(Plan, json.loads(text), PLAN)


@cache
def _opened(opening: tuple[tuple[str, Any], ...]) -> Generator:
    return Generator(**dict(opening))


def _follow_parent() -> None:
    """End this worker with its parent; it would wait for work for ever if that was killed."""

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def in_processes(job: Callable[[int], int], shards: Iterable[int], workers: int) -> Iterator[int]:
    """Numbers of the shards as they are done, in this process or in several; a shard whose worker dies is done again.

    Raises:
        BackendError: workers die again and again.
    """
    if workers == 1:
        yield from map(job, shards)
        _opened.cache_clear()
        return
    missing, fruitless = dict.fromkeys(shards), 0
    while missing:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(missing)), context, _follow_parent)
        try:
            for future in as_completed([pool.submit(job, shard) for shard in missing]):
                done = future.result()
                del missing[done]
                fruitless = 0
                yield done
        except BrokenProcessPool as error:
            fruitless += 1
            LOG.warning("a worker died; %d shards are drawn again or yet", len(missing))
            if fruitless == FRUITLESS:
                raise BackendError(
                    f"workers died {FRUITLESS} times before one finished a shard; is memory short? Use fewer workers "
                    "or slots; what is drawn is kept"
                ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_ray(job: Callable[[int], int], shards: list[int], workers: int, threads: int, gpus: int) -> Iterator[int]:
    """As ``in_processes``, in actors of Ray Data, which starts those that die anew. Ray itself is started, and ended,
    where the caller has not done so."""
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise BackendError("drawing with Ray needs the package ray; pip install 'dvq-rt[cpu,ray]'") from error

    class Worker:
        def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
            return {"shard": [job(int(shard)) for shard in batch["shard"]]}

    if not shards:
        return
    address, workers = os.environ.get("RAY_ADDRESS", "local"), min(workers, len(shards))
    here: dict[str, Any] = (
        {"num_cpus": workers * threads, "object_store_memory": RAY_STORE} if address == "local" else {}
    )
    ours = not ray.is_initialized()
    with guard(BackendError, "drawing with Ray stopped; what is drawn is kept"):
        if ours:
            ray.init(address=address, log_to_driver=False, **here)
        try:
            rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
            pool = ray.data.ActorPoolStrategy(size=workers)
            done = rows.map_batches(Worker, batch_size=1, compute=pool, num_cpus=threads, num_gpus=gpus)
            for row in done.iter_rows():
                yield row["shard"]
        finally:
            if ours:
                ray.shutdown()
