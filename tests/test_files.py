"""Files and folders that are whole or not there, bounded reading, JSON into dataclasses."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvq_rt.files import (
    new_folder,
    open_regular,
    read_dataclass,
    read_json,
    restore_folder,
    sync,
    write_file,
)
from runtimes.errors import CheckpointError, ConfigError, DataError, DvqError, EngineError, InputError, guard, short


# --- reading ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Inner:
    size: int = 3

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"inner.size is {self.size}; it must be at least 1")


@dataclass(frozen=True)
class Outer:
    count: int
    rate: float
    name: str
    on: bool
    inner: Inner
    pair: tuple[int, str]
    sides: tuple[int, ...] = (1,)
    nested: tuple[tuple[int, ...], ...] = ()
    kept: int | None = None
    extra: dict[str, float] | None = None
    free: Any = None


GOOD = {"count": 1, "rate": 2, "name": "x", "on": False, "inner": {"size": 4}, "pair": [1, "a"]}


def test_dataclass_of_json():
    """Lists become tuples, objects become nested dataclasses, and an integer will do for a float."""
    made = read_dataclass(Outer, {**GOOD, "sides": [2, 4], "extra": {"a": 1}, "free": [1]}, "here", defaults=True)
    assert made == Outer(1, 2, "x", False, Inner(4), (1, "a"), (2, 4), extra={"a": 1}, free=[1])
    assert read_dataclass(Inner, {"size": np.int64(5)}, "here") == Inner(5)
    assert read_dataclass(Outer, {**GOOD, "inner": Inner()}, "here", defaults=True).inner == Inner()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": True}, "here: count is True; it must be of type int"),
        ({"count": 1.0}, "here: count is 1.0; it must be of type int"),
        ({"rate": "2"}, "here: rate is '2'; it must be of type float"),
        ({"rate": float("nan")}, "here: rate is nan"),
        ({"rate": float("inf")}, "here: rate is inf"),
        ({"rate": 10**400}, "here: rate is 1000"),
        ({"name": None}, "here: name is None; it must be of type str"),
        ({"on": 1}, "here: on is 1; it must be of type bool"),
        ({"inner": 3}, "here.inner is 3; it must be an object of named fields"),
        ({"inner": {"size": 0}}, "inner.size is 0; it must be at least 1"),
        ({"inner": {"size": "0"}}, "here.inner: size is '0'"),
        ({"inner": {"sizes": 1}}, "here.inner: unknown fields ['sizes']; there are ['size']"),
        ({"pair": [1, "a", 2]}, "here: pair is [1, 'a', 2]; it must be of type tuple[int, str]"),
        ({"sides": "24"}, "here: sides is '24'; it must be of type tuple[int, ...]"),
        ({"sides": [2, [4]]}, "here: sides is [2, [4]]"),
        ({"nested": [[1], ["b"]]}, "here: nested is [[1], ['b']]"),
        ({"kept": "no"}, "here: kept is 'no'; it must be of type int | None"),
        ({"extra": {"a": "b"}}, "here: extra is {'a': 'b'}"),
        ({"odd": 1, 7: 2}, "here: unknown fields ['7', 'odd']; there are ['count'"),
    ],
)
def test_wrong_values_are_named(change, words):
    """What does not fit a field is refused with the place, the key and the value, as the class that was asked for."""
    with pytest.raises(CheckpointError) as caught:
        read_dataclass(Outer, {**GOOD, **change}, "here", defaults=True, error=CheckpointError)
    assert str(caught.value).startswith(words)


def test_exact_keys():
    """Without leave to take defaults every field must be there; with it those that have one may be missing."""
    with pytest.raises(ConfigError, match=r"here: unknown keys \['a'\], missing keys \['size'\]"):
        read_dataclass(Inner, {"a": 1}, "here")
    with pytest.raises(ConfigError, match=r"here: unknown keys \[\], missing keys \['name', 'on'\]"):
        read_dataclass(Outer, {k: GOOD[k] for k in ("count", "rate", "inner", "pair")}, "here", defaults=True)
    for bad in (None, [], "size", 3, [["size", 1]]):
        with pytest.raises(ConfigError, match=r"here is .*an object of named fields"):
            read_dataclass(Inner, bad, "here")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe\x00", b'{"a": 1, "a": 2}', b"[" * 200_000, b'{"a":' * 200_000, b"nul", b"1" * 9000]
)
def test_json_that_cannot_be_read(tmp_path, data):
    """Whatever the parser raises is the error that was asked for, with the file's name, the way out and the cause."""
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.json cannot be read: .+; mend it") as caught:
        read_json(path, error=DataError, mend="mend it")
    assert caught.value.__cause__ is not None


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    """A pipe does not block, a device is not read, and a size is compared before a byte is read; links are followed."""
    path = tmp_path / "a.json"
    path.write_text('{"a": "é漢"}', encoding="utf-8")
    (tmp_path / "link").symlink_to(path)
    assert read_json(tmp_path / "link") == {"a": "é漢"}
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "absent", "a\0b", "\ud800", None, 3):
        with pytest.raises(EngineError, match="cannot be read"):
            read_json(bad, error=EngineError)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="has 1099511627776 bytes; at most"):
        read_json(tmp_path / "sparse")
    with pytest.raises(ValueError, match="at most 3 are read"), open_regular(path, 3):
        pass


def test_short_representations():
    """Values that refer to themselves a billion times, or cannot be shown, give a short text at once."""
    bomb: Any = "lol"
    for _ in range(40):
        bomb = [bomb] * 9

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    values: list[Any] = [bomb, "x" * 10**8, b"x" * 10**8, 10**10_000, [10**10_000], {i: bomb for i in range(99)}]
    for value in [*values, Broken(), np.zeros((1000, 1000))]:
        assert 0 < len(short(value)) <= 410
    assert short([1, "a", None]) == "[1, 'a', None]"


def test_guard():
    """Anything becomes the error that was asked for, with its cause; what is that error already, and what is no error
    at all, passes."""
    for cause in (RecursionError("deep"), MemoryError(), OSError(2, "No such file"), UnicodeError("odd"), Warning("w")):
        expected = pytest.raises(EngineError, match=r"^it is broken: .+; mend it$")
        with expected as caught, guard(EngineError, "it is broken", "mend it"):
            raise cause
        assert caught.value.__cause__ is cause
    for passing in (EngineError("as it is"), KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(passing)) as same, guard(EngineError, "it is broken"):
            raise passing
        assert same.value is passing
    with pytest.raises(DvqError) as long, guard(DataError, "x"):
        raise ValueError("y" * 10**6)
    assert len(str(long.value)) < 600


# --- writing ---------------------------------------------------------------------------------------------------
def child(code: str, *arguments: Path) -> int:
    """Exit status of a process that runs some lines after importing ours; negative if a signal ended it."""
    start = "import os, signal, sys\nfrom pathlib import Path\nimport dvq_rt.files as files\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, check=False, cwd=Path(__file__).parents[1]).returncode


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_file_replaces_or_leaves(tmp_path):
    """A file is replaced in one go, a device or folder never, and the usual permissions apply."""
    path = tmp_path / "a"
    write_file(path, b"one")
    write_file(str(path), b"two")
    assert path.read_bytes() == b"two"
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    for bad in (tmp_path, Path("/dev/null"), tmp_path / "absent" / "a", tmp_path / ("x" * 300), "a\0b", "", None):
        with pytest.raises(InputError, match="cannot write"):
            write_file(bad, b"three")
    with pytest.raises(EngineError, match="cannot write"):
        write_file(tmp_path, b"three", error=EngineError)
    assert names(tmp_path) == ["a", "plain"]
    for long in ("x" * 255, "漢" * 85):
        write_file(tmp_path / long, b"long")
        assert (tmp_path / long).read_bytes() == b"long"
    assert len(names(tmp_path)) == 4


def test_full_disk_keeps_the_older_file(tmp_path):
    """A write that the system cuts short leaves the older content and nothing beside it."""
    path = tmp_path / "a"
    write_file(path, b"older")
    code = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        files.write_file(sys.argv[1], b"x" * 5000)
    except files.InputError as error:
        sys.exit(7 if "File too large" in str(error) else 8)
    """
    assert child(code, path) == 7
    assert path.read_bytes() == b"older" and names(tmp_path) == ["a"]


def test_killed_while_writing_a_file(tmp_path):
    """A killed writer leaves the older file; the next writer of that name removes what it left."""
    path = tmp_path / "a"
    write_file(path, b"older")
    code = """
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    files.write_file(sys.argv[1], b"newer")
    """
    assert child(code, path) == -9
    assert path.read_bytes() == b"older" and names(tmp_path) == [".a.dvq-tmp", "a"]
    write_file(path, b"newest")
    assert path.read_bytes() == b"newest" and names(tmp_path) == ["a"]


def test_two_writers_of_one_file(tmp_path, monkeypatch):
    """A second writer neither waits for a living one nor removes what that one is writing."""
    path, sync_file, inner = tmp_path / "a", os.fsync, [b"inner"]

    def interrupted(handle: int) -> None:
        if inner:
            write_file(path, inner.pop())
        sync_file(handle)

    monkeypatch.setattr(os, "fsync", interrupted)
    write_file(path, b"outer")
    assert path.read_bytes() == b"outer" and names(tmp_path) == ["a"]


def test_many_writers_at_once(tmp_path):
    """Writers that overlap all succeed, and what stands in the end is whole and alone."""
    path, lengths = tmp_path / "a", (10, 200_000)

    def write(number: int) -> None:
        write_file(path, bytes([number]) * lengths[number % 2])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(64)))
    data = path.read_bytes()
    assert data == data[:1] * lengths[data[0] % 2] and names(tmp_path) == ["a"]
    targets = [tmp_path / "folder"] * 16

    def replace(target: Path) -> None:
        with new_folder(target, overwrite=True) as folder:
            fill(folder, "whole")

    replace(targets[0])
    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(replace, target) for target in targets]
    assert [job.exception() for job in done] == [None] * 16
    assert content(targets[0]) == ["whole"] * 2 and names(tmp_path) == ["a", "folder"]


def test_a_name_that_another_writer_took(tmp_path, monkeypatch):
    """A writer whose new file is swept before it is locked leaves the name to the writer that takes it then."""
    path, temporary, open_file, held = tmp_path / "a", tmp_path / ".a.dvq-tmp", os.open, []

    def too_late(name, flags: int, *rest) -> int:
        if Path(name) == temporary and temporary.exists() and not held:
            temporary.unlink()
            held.append(open_file(temporary, os.O_RDWR | os.O_CREAT))
            fcntl.flock(held[0], fcntl.LOCK_EX)
            os.write(held[0], b"other")
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(name))
        return open_file(name, flags, *rest)

    monkeypatch.setattr(os, "open", too_late)
    write_file(path, b"mine")
    assert held and path.read_bytes() == b"mine" and temporary.read_bytes() == b"other"
    os.close(held[0])


def test_disks_without_locks(tmp_path, monkeypatch):
    """Where files cannot be locked, writing works all the same and leaves nothing."""

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    for text in ("one", "two"):
        write_file(tmp_path / "a", text.encode())
        with new_folder(tmp_path / "folder", overwrite=True) as folder:
            fill(folder, text)
        assert (tmp_path / "a").read_text() == text and content(tmp_path / "folder") == [text] * 2
    assert names(tmp_path) == ["a", "folder"]


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    (folder / "a").write_text(text)
    (folder / "sub" / "b").write_text(text)


def content(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("a", "sub/b")]


def test_new_folder(tmp_path):
    """A folder appears when its block ends, and replaces another only on request; a failing block leaves nothing."""
    target = tmp_path / "new" / "deep" / "folder"
    for error in (ZeroDivisionError, KeyboardInterrupt, ConfigError):
        with pytest.raises(error), new_folder(target) as folder:
            fill(folder, "lost")
            raise error
        assert not names(tmp_path)
    with new_folder(target) as folder:
        fill(folder, "one")
        assert not target.exists()
    assert content(target) == ["one"] * 2
    with pytest.raises(EngineError, match="exists already"), new_folder(target, error=EngineError):
        pass
    with new_folder(str(target), overwrite=True) as folder:
        fill(folder, "two")
        assert content(target) == ["one"] * 2
    assert content(target) == ["two"] * 2 and names(target.parent) == ["folder"]
    (tmp_path / "file").write_text("mine")
    for bad in (tmp_path / "file", tmp_path / "file" / "x", "a\0b", "\ud800", None, tmp_path / ("x" * 300)):
        with pytest.raises(InputError), new_folder(bad, overwrite=True):
            pass
    with pytest.raises(InputError, match="cannot write"), new_folder(tmp_path / "full"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == ["file", "new"]


@pytest.mark.parametrize("moment", [0, 1, 2, 3])
def test_killed_while_replacing_a_folder(tmp_path, moment):
    """Killed before, between or after its renames, a replacement leaves the old or the new folder whole under its
    name, at the latest when it is opened; what lies beside it is gone after the next one."""
    target = tmp_path / "folder"
    with new_folder(target) as folder:
        fill(folder, "old")
    code = """
    left, rename = [int(sys.argv[2])], Path.rename
    def killed(*arguments):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return rename(*arguments)
    Path.rename = killed
    with files.new_folder(sys.argv[1], overwrite=True) as folder:
        (folder / "sub").mkdir()
        (folder / "a").write_text("new")
        (folder / "sub" / "b").write_text("new")
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert child(code, target, Path(str(moment))) == -9
    assert restore_folder(target) == target
    assert content(target) == [{0: "old", 1: "old", 2: "new", 3: "new"}[moment]] * 2
    with new_folder(target, overwrite=True) as folder:
        fill(folder, "next")
    assert content(target) == ["next"] * 2 and names(tmp_path) == ["folder"]


def test_living_writers_are_left_alone(tmp_path):
    """Two writers of one folder do not disturb each other; the one that ends last is the one that stands."""
    target = tmp_path / "folder"
    with new_folder(target, overwrite=True) as outer:
        fill(outer, "outer")
        with new_folder(target, overwrite=True) as inner:
            fill(inner, "inner")
        assert content(target) == ["inner"] * 2
    assert content(target) == ["outer"] * 2 and names(tmp_path) == ["folder"]
    with pytest.raises(InputError, match="cannot write"), new_folder(tmp_path / "one") as outer:
        fill(outer, "outer")
        with new_folder(tmp_path / "one") as inner:
            fill(inner, "inner")
    assert content(tmp_path / "one") == ["inner"] * 2


def test_nothing_is_restored_over_what_is_there(tmp_path):
    """Only a missing folder gets its name back; a removed one whose replacement is complete stays removed."""
    with new_folder(tmp_path / "folder") as folder:
        fill(folder, "one")
    with new_folder(tmp_path / "folder", overwrite=True) as folder:
        fill(folder, "two")
    (tmp_path / "folder").rename(tmp_path / "moved")
    assert restore_folder(tmp_path / "folder") == tmp_path / "folder"
    assert names(tmp_path) == ["moved"]
    for odd in ("", ".", "/", "..", "a\0b", "\ud800"):
        assert restore_folder(odd) == Path(odd)


def test_sync_takes_files_and_folders(tmp_path):
    """Both kinds can be brought to the disk; what is not there cannot."""
    (tmp_path / "a").write_text(json.dumps({}))
    sync(tmp_path / "a")
    sync(tmp_path)
    with pytest.raises(OSError):
        sync(tmp_path / "b")
