"""Bulk drawing: an image is the same whoever draws it, and nothing that dies loses more than it was at."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvq_rt import Generator
from dvq_rt.__main__ import main
from dvq_rt.bulk import draw_shards, in_processes
from runtimes.errors import BackendError, InputError

ROOT = Path(__file__).parents[1]
LABELS = [2, 0, 5]


def members(paths: list[Path]) -> dict[str, bytes]:
    """Contents of all shards by the name of the file."""
    found: dict[str, bytes] = {}
    for path in paths:
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None and member.name not in found
                found[member.name] = file.read()
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Five images in shards of two, and their folder."""
    folder = tmp_path_factory.mktemp("drawn")
    return folder, draw_shards(None, folder, 5, LABELS, seed=4, shard=2, slots=2, threads=1)


def test_shards_hold_what_sample_draws(drawn: tuple[Path, list[Path]]) -> None:
    """Protects the promise of bulk drawing: image i of the seed, byte for byte, with its facts."""
    found = members(drawn[1])
    assert [path.name for path in drawn[1]] == [f"shard-{i:06d}.tar" for i in range(3)]
    assert list(found) == [f"{i:08d}.{kind}" for i in range(5) for kind in ("png", "json")]
    labels = [LABELS[i % 3] for i in range(5)]
    with Generator(slots=2, threads=1) as generator:
        samples = generator.sample(5, labels, seed=4)
        for i, (image, codes) in enumerate(zip(samples.images, samples.codes, strict=True)):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(found[f"{i:08d}.png"]))), np.asarray(image))
            facts = {"seed": 4, "index": i, "label": labels[i], "name": generator.class_names[labels[i]]}
            assert json.loads(found[f"{i:08d}.json"]) == {**facts, "codes": codes.length}


def test_the_size_of_shards_changes_no_image(drawn: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Protects bulk drawing in any division of the work."""
    assert members(draw_shards(None, tmp_path, 5, LABELS, seed=4, shard=3, slots=2, threads=1)) == members(drawn[1])


def test_only_missing_shards_are_drawn(drawn: tuple[Path, list[Path]]) -> None:
    """Protects resuming: what is there is not drawn again, what is missing comes back as it was, and a folder never
    mixes two plans."""
    folder, paths = drawn
    lost, kept = paths[1].read_bytes(), paths[0].stat().st_mtime_ns
    paths[1].unlink()
    told: list[tuple[int, int]] = []
    draw_shards(None, folder, 5, LABELS, seed=4, shard=2, slots=2, threads=1, progress=lambda *done: told.append(done))
    assert paths[1].read_bytes() == lost and paths[0].stat().st_mtime_ns == kept
    assert told == [(3, 5), (5, 5)]
    with pytest.raises(InputError, match=r"holds images whose seed is 4, not 5; give the same values to go on"):
        draw_shards(None, folder, 5, LABELS, seed=5, shard=2, slots=2)
    (folder / "plan.json").rename(folder / "other.json")
    with pytest.raises(InputError, match=r"holds shards but no plan\.json"):
        draw_shards(None, folder, 5, LABELS, seed=4, shard=2, slots=2)
    (folder / "other.json").rename(folder / "plan.json")


def test_a_killed_worker_loses_nothing(drawn: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Protects long runs: one of several is killed, as by a lack of memory, and all shards come all the same."""
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done and not killed:
            victim = multiprocessing.active_children()[0]
            killed.append(victim.pid or 0)
            victim.kill()

    paths = draw_shards(None, tmp_path, 5, LABELS, seed=4, shard=1, workers=2, slots=2, threads=1, progress=kill)
    assert killed and members(paths) == members(drawn[1])
    assert not multiprocessing.active_children()


def test_workers_who_always_die_are_told() -> None:
    """Protects from an endless loop where no worker lives."""
    with pytest.raises(BackendError, match="workers died 3 times before one finished a shard"):
        list(in_processes(signal.raise_signal, [signal.SIGKILL, signal.SIGTERM], 2))


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    """Protects ``kill -9`` on the command: its workers end with it, and the same command completes the folder."""
    folder = tmp_path / "out"
    run = [
        *["sample", "--n", "4", "--shard", "1", "--workers", "2", "--slots", "2", "--threads", "1", "--out"],
        str(folder),
        "--labels",
    ]
    command = [sys.executable, "-m", "dvq_rt", *run, "hearts"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("shard-*.tar")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        began = len(list(folder.glob("shard-*.tar")))
        while time.monotonic() < deadline:  # the workers are the rest of its group
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.02)
        else:
            pytest.fail("workers outlived the command")
    assert 1 <= began < 4
    assert main([*run, "hearts", "-q"]) == 0
    assert len(members(sorted(folder.glob("*.tar")))) == 8
    assert not list(folder.glob(".*"))


def test_bulk_wants_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects from a folder of shards named samples.png."""
    assert main(["sample", "--n", "4", "--shard", "2"]) == 2
    assert "name a folder with --out" in capsys.readouterr().err


def test_a_plan_is_checked_before_it_is_written(tmp_path: Path) -> None:
    """Protects a folder from the plan of a call that cannot draw, which the right call would then contradict."""
    for wrong in ({"slots": 0}, {"slots": 10**9}, {"ray": True, "device": "cuda:1"}):
        with pytest.raises(InputError, match=r"slots is|a GPU of its own"):
            draw_shards(None, tmp_path / "drawn", 2, **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "drawn").exists()
