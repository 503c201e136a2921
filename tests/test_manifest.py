"""The engine folder: written whole or not at all, opened intact or not at all; tensor files."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dvq_rt.files import DTYPES, read_tensors, write_tensors
from dvq_rt.layout import TokenLayout
from dvq_rt.manifest import DEMOS, MANIFEST, Manifest, engine_folder, manifest_digest, read_engine, write_engine
from runtimes.errors import ConfigError, DvqError, EngineError, ExportError, InputError

CACHE = {"dtype": "float32", "shape": ["B", 4, 19, 8]}
STEP = {
    "inputs": [{"name": "token", "dtype": "int64", "shape": ["B"]}, {"name": "past.0", **CACHE}],
    "outputs": [{"name": "done", "dtype": "bool", "shape": ["B"]}, {"name": "present.0", **CACHE}],
    "caches": [["past.0", "present.0"]],
}
MADE = Manifest(
    layout=TokenLayout(codebook_size=16, sides=(2, 4), classes=2, null_label=True),
    image_size=32,
    slots=4,
    step=STEP,
    precision="fp32",
    weights="fp16",
    tools={"torch": "2.13.0"},
    class_names=("cat", "Säule, blau"),
    defaults={"temperature": 0.9, "top_k": None},
    tolerances={"logits": 1e-5},
    parameters={"step": 12},
)


def build(folder: Path) -> Manifest:
    (folder / "step.onnx").write_bytes(b"graph")
    (folder / "golden.safetensors").write_bytes(b"")
    return MADE


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    write_engine(tmp_path / "engine", build)
    return tmp_path / "engine"


def rewrite(folder: Path, **changes: object) -> None:
    """Change a manifest and make its own hash right again."""
    values = json.loads((folder / MANIFEST).read_text())
    del values["sha256"]
    values.update(changes)
    (folder / MANIFEST).write_text(json.dumps({**values, "sha256": manifest_digest(values)}))


def test_round_trip(engine):
    """What is written is what is read, with every file listed; extra files do no harm."""
    (engine / "notes.txt").write_text("mine")
    manifest = read_engine(str(engine))
    assert set(manifest.files) == {"step.onnx", "golden.safetensors"}
    assert manifest.files["step.onnx"]["bytes"] == 5
    assert manifest == replace(MADE, files=manifest.files)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest
    assert [p.name for p in engine.parent.iterdir()] == ["engine"]


def test_any_flipped_byte_is_noticed(engine):
    """No byte of any file, the manifest included, can change its meaning unnoticed."""
    good = read_engine(engine)
    for path in sorted(engine.iterdir()):
        data = path.read_bytes()
        for index in range(0, len(data), 3):
            path.write_bytes(data[:index] + bytes([data[index] ^ 0x11]) + data[index + 1 :])
            try:
                found = read_engine(engine)
            except EngineError as error:
                assert path.name in str(error) and str(engine) in str(error)
            else:
                assert path.name == MANIFEST and found == good  # a byte that means nothing
        path.write_bytes(data)
    assert read_engine(engine) == good


def test_missing_and_cut_files(engine):
    """A file that is gone or short is named, with the way out."""
    path = engine / "step.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(EngineError, match=r"step\.onnx has 4 bytes, not 5; export it again"):
        read_engine(engine)
    path.unlink()
    with pytest.raises(EngineError, match=r"step\.onnx is missing"):
        read_engine(engine)
    (engine / MANIFEST).unlink()
    with pytest.raises(EngineError, match=r"manifest\.json is missing"):
        read_engine(engine)
    with pytest.raises(EngineError, match="nowhere does not exist"):
        read_engine(engine.parent / "nowhere")


def test_links_are_followed(engine):
    """Engines open as package managers and download caches lay them out: linked file by file, out of the folder, under
    other names, or as a whole folder; the hash alone decides, so a link to something else is refused."""
    before, store = read_engine(engine), engine.parent / "store"
    store.mkdir()
    for i, path in enumerate(sorted(engine.iterdir())):
        path.rename(store / f"blob{i}")
        path.symlink_to(Path("..") / "store" / f"blob{i}")
    (engine.parent / "linked").symlink_to(engine)
    assert read_engine(engine) == read_engine(engine.parent / "linked") == before
    (engine / "step.onnx").unlink()
    (engine / "step.onnx").symlink_to(engine / "golden.safetensors")
    with pytest.raises(EngineError, match=r"step\.onnx has 0 bytes, not 5"):
        read_engine(engine)
    (store / "other").write_bytes(b"graqh")
    (engine / "step.onnx").unlink()
    (engine / "step.onnx").symlink_to(store / "other")
    with pytest.raises(EngineError, match=r"step\.onnx is corrupted"):
        read_engine(engine)
    (store / "other").unlink()
    with pytest.raises(EngineError, match=r"step\.onnx is missing or unreadable: No such file"):
        read_engine(engine)


def test_special_and_grown_files(engine, monkeypatch):
    """Pipes, devices and folders under an engine's names neither block nor are read; a file that grew to hundreds of
    gigabytes is refused by its size, before it is hashed."""
    for name in ("step.onnx", MANIFEST):
        data = (engine / name).read_bytes()
        for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
            (engine / name).unlink()
            make(engine / name)
            with pytest.raises(EngineError, match=rf"{name} is missing or unreadable: (it is not a regular|Is a dir)"):
                read_engine(engine)
            os.rmdir(engine / name) if (engine / name).is_dir() else (engine / name).unlink()
            (engine / name).write_bytes(data)
    assert read_engine(engine)
    with (engine / "golden.safetensors").open("r+b") as file:  # the first that is hashed
        file.truncate(300 << 30)
    monkeypatch.setattr("hashlib.file_digest", None)
    with pytest.raises(EngineError, match=r"golden\.safetensors has 322122547200 bytes, not 0"):
        read_engine(engine)
    with (engine / MANIFEST).open("r+b") as file:
        file.truncate(300 << 30)
    with pytest.raises(EngineError, match=r"manifest\.json is missing or unreadable: it has 322122547200 bytes"):
        read_engine(engine)


@pytest.mark.parametrize("name", ["", b"", b"engine", 3, True, [], {}, Path, object()])
def test_names_that_open_no_engine(name):
    """An unset shell variable or a value of another kind does not open the demo."""
    with pytest.raises(
        EngineError, match=r"the engine is .*; give the path of a folder, or one of demo:dq, demo:dq3, demo:mq$"
    ):
        engine_folder(name)


def test_names_of_engines(tmp_path):
    """Only no name at all is the demo; odd paths are engines that are not there."""
    assert engine_folder(None) == engine_folder("demo:dq") == DEMOS["demo:dq"]
    assert engine_folder(tmp_path) == engine_folder(str(tmp_path)) == tmp_path
    for odd in ("a\0b", "\ud800", "x" * 5000, "demo:none", " "):
        with pytest.raises(EngineError, match=r"does not exist|cannot be opened"):
            read_engine(engine_folder(odd))
    for bad in ("a\0b", "\ud800", None, 3, b"x"):
        with pytest.raises(EngineError):
            write_engine(bad, build)


def test_schema(engine):
    """A newer folder asks for an upgrade, an older one for a new export, before anything else is judged."""
    for schema, words in ((4, "upgrade dvq-rt"), (0, "export it again"), ("1", "no schema"), (True, "no schema")):
        values = json.loads((engine / MANIFEST).read_text())
        (engine / MANIFEST).write_text(json.dumps({**values, "schema": schema, "new field": 1}))
        with pytest.raises(EngineError, match=words):
            read_engine(engine)


@pytest.mark.parametrize(
    "name", ["../step.onnx", "/etc/passwd", "a/b", "a\\b", "..", ".hidden", "", "manifest.json", "C:x", "a\n"]
)
def test_file_names_stay_in_the_folder(engine, name):
    """A manifest cannot make us open or hash files elsewhere."""
    rewrite(engine, files={name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(EngineError, match="files"):
        read_engine(engine)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"schema": 1, "schema": 1}', "[" * 100_000])
def test_foreign_manifests(engine, text):
    """Anything but a manifest of ours is an EngineError, not a traceback of the JSON parser."""
    (engine / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(EngineError, match=r"manifest\.json"):
        read_engine(engine)


def test_strict_keys(engine):
    """Unknown and missing keys are named rather than guessed."""
    rewrite(engine, colour="red")
    with pytest.raises(EngineError, match=r"unknown keys \['colour'\]"):
        read_engine(engine)
    values = MADE.to_dict()
    del values["slots"]
    with pytest.raises(ConfigError, match=r"missing keys \['slots'\]"):
        Manifest.from_dict(values)


def test_values_are_checked():
    """Each field is refused with its name, value and range."""
    bad_step = {**STEP, "caches": [["past.0", "done"]]}
    for changes, words in (
        ({"image_size": 30}, "image_size is 30; it must be a positive multiple of 4"),
        ({"slots": 0}, "slots"),
        ({"family": "vq"}, "family"),
        ({"backend": "magic"}, "backend"),
        ({"precision": ""}, "precision"),
        ({"class_names": ("a",)}, "class_names"),
        ({"class_names": ("a", "a")}, "class_names"),
        ({"class_names": "ab"}, "class_names"),
        ({"class_names": ("a", "\ud800")}, "class_names"),
        ({"defaults": {"temperature": 0}}, "temperature is 0"),
        ({"defaults": {"top_q": 1}}, "top_q"),
        ({"defaults": {"top_k": [1]}}, "defaults"),
        ({"tolerances": {"logits": float("nan")}}, "tolerances"),
        ({"parameters": {"step": 1.5}}, "parameters"),
        ({"tools": {"torch": 2}}, "tools"),
        ({"files": {"a": {"sha256": "xyz", "bytes": 1}}}, "files"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": -1}}}, "files"),
        ({"step": {}}, "step"),
        ({"step": bad_step}, "step.caches.*one dtype and shape"),
        ({"step": {**STEP, "caches": [["past.0", "absent"]]}}, "step.caches"),
        ({"step": {**STEP, "caches": STEP["caches"] * 2}}, "once"),
        ({"step": {**STEP, "inputs": STEP["inputs"] * 2}}, "different names"),
        ({"step": {**STEP, "inputs": [{"name": "x", "dtype": "float33", "shape": []}]}}, "step.inputs"),
        ({"step": {**STEP, "inputs": [{"name": "x", "dtype": "float32", "shape": ["T"]}]}}, "step.inputs"),
        ({"step": {**STEP, "inputs": [{"name": "x", "dtype": "float32", "shape": [0]}]}}, "step.inputs"),
    ):
        with pytest.raises(DvqError, match=words):
            replace(MADE, **changes)


def test_fields_that_disagree():
    """What two fields say of one thing must agree, so that an engine whose manifest was changed, hash and all, is
    refused by name instead of failing while it draws."""
    fixed = json.loads(json.dumps(STEP).replace('"B"', "4"))
    assert replace(MADE, step=fixed).fixed_slots
    kept = replace(MADE.layout, sides=(4,), kept=5)
    long = json.loads(json.dumps(STEP).replace("19", "20"))
    eight = json.loads(json.dumps(STEP).replace("float32", "int8"))
    assert replace(MADE, step=eight, weights="int4").weights == "int4"
    for changes, words in (
        ({"step": fixed, "slots": 8}, "everywhere the 8 of slots"),
        ({"step": {**fixed, "inputs": [STEP["inputs"][0], fixed["inputs"][1]]}}, "everywhere the 4 of slots"),
        ({"step": json.loads(json.dumps(STEP).replace('"B", 4', '"B", "B"'))}, "as the first size alone"),
        ({"step": {**STEP, "inputs": [{**STEP["inputs"][0], "shape": []}, STEP["inputs"][1]]}}, "first size"),
        (
            {"layout": replace(MADE.layout, sides=(2, 8)), "image_size": 64},
            "must have 67, the longest prompt and image",
        ),
        ({"step": long}, "must have 19, the longest prompt and image"),
        ({"step": eight}, "must be float32: see precision and weights"),
        ({"weights": "int8"}, "must be int8: see precision and weights"),
        ({"precision": "fp16"}, "must be float16: see precision and weights"),
        ({"layout": kept}, "family is 'dq'; it must be 'mq' exactly where layout has a kept"),
        ({"family": "mq"}, "family is 'mq'; it must be 'mq' exactly where layout has a kept"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(MADE, **changes)


def test_bundled_engines_agree_with_themselves():
    """The checks above take what the exporter writes."""
    for folder in DEMOS.values():
        manifest = read_engine(folder)
        known = {"router", "entropy_low", "fine_percent", "median_percent"}
        assert manifest.schema == 3 and manifest.tokenizer.keys() <= known
        assert replace(manifest) == manifest


def test_the_schema_before(engine):
    """A folder of schema 1, which says nothing of its tokenizer, opens as it was written."""
    values = json.loads((engine / MANIFEST).read_text())
    del values["tokenizer"], values["sha256"]
    values["schema"] = 1
    (engine / MANIFEST).write_text(json.dumps({**values, "sha256": manifest_digest(values)}))
    manifest = read_engine(engine)
    assert (manifest.schema, manifest.tokenizer) == (1, {}) and replace(manifest) == manifest


@pytest.mark.parametrize("key", sorted(MADE.to_dict()))
def test_any_value_in_a_manifest(engine, key):
    """A field of another kind, with a right hash, is an EngineError that names the manifest, never another error."""
    for value in (None, -1, 1.5, "text", "", [], [[]], {}, {"a": []}, [{}], True, 10**400, "\ud800", [["a", "b"]]):
        rewrite(engine, **{key: value})
        try:
            read_engine(engine)
        except EngineError as error:
            assert MANIFEST in str(error) and len(str(error)) < 2000


def test_any_step_in_a_manifest(engine):
    """The same of the step's interface, part by part."""
    odd = {"name": "x", "dtype": [], "shape": [{}]}
    steps = [{"inputs": [{"name": []}]}, {"outputs": [odd]}, {"caches": [[[], {}]]}, {"caches": {}}, {"inputs": [3]}]
    for step in steps:
        rewrite(engine, step={**STEP, **step})
        with pytest.raises(EngineError, match=r"manifest\.json is wrong"):
            read_engine(engine)


def test_killed_while_overwriting(engine):
    """Between the two renames of an overwriting export the name stands for nothing; opened, it is the old engine
    again, and the next export leaves nothing else behind."""
    before = read_engine(engine)
    (engine.parent / ".engine.deadbeef.dvq-new").mkdir()  # of two exporters that were killed earlier
    (engine.parent / ".engine.dvq-new").mkdir()
    code = """
    import os, signal, sys
    from pathlib import Path
    from dvq_rt.manifest import read_engine, write_engine
    manifest, rename = read_engine(sys.argv[1]), Path.rename
    Path.rename = lambda *names: (rename(*names), os.kill(os.getpid(), signal.SIGKILL))
    def build(folder):
        (folder / "step.onnx").write_bytes(b"new graph")
        return manifest
    write_engine(sys.argv[1], build, overwrite=True)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), engine], cwd=Path(__file__).parents[1])
    assert run.returncode == -9 and not engine.exists()
    assert read_engine(engine) == before and engine.exists()
    write_engine(engine, build, overwrite=True)
    assert read_engine(engine) == before and [p.name for p in engine.parent.iterdir()] == ["engine"]


def test_read_only_disk_opens_what_was_left(engine, monkeypatch):
    """Where the name cannot be given back, the old engine is opened where it stands."""
    before = read_engine(engine)
    engine.rename(engine.with_name(".engine.dvq-old"))

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    assert read_engine(engine) == before


def test_failed_build_leaves_nothing(tmp_path):
    """An export that fails parity or is interrupted leaves no folder that looks like an engine, nor parents it made."""

    def fails(folder: Path) -> Manifest:
        build(folder)
        raise ExportError("parity")

    def stopped(folder: Path) -> Manifest:
        build(folder)
        raise KeyboardInterrupt

    def nests(folder: Path) -> Manifest:
        (folder / "sub").mkdir()
        return MADE

    def links(folder: Path) -> Manifest:
        (folder / "a").symlink_to("/dev/null")
        return MADE

    def links_within(folder: Path) -> Manifest:
        (folder / "a").write_bytes(b"")
        (folder / "b").symlink_to("a")
        return MADE

    def lists_itself(folder: Path) -> Manifest:
        (folder / MANIFEST).write_text("{}")
        return MADE

    def full(folder: Path) -> Manifest:
        raise OSError(28, "No space left on device")

    cases = (
        (fails, ExportError),
        (stopped, KeyboardInterrupt),
        (nests, EngineError),
        (links, EngineError),
        (links_within, EngineError),
        (lists_itself, DvqError),
        (full, EngineError),
    )
    for function, error in cases:
        with pytest.raises(error):
            write_engine(tmp_path / "new" / "deep" / "engine", function)
        assert not list(tmp_path.iterdir())


def test_overwrite(engine):
    """An engine is replaced only on request, only by a complete one, and nothing but an engine is ever replaced."""
    before = read_engine(engine)

    def other(folder: Path) -> Manifest:
        (folder / "step.onnx").write_bytes(b"new")
        assert read_engine(engine) == before  # the old one is there until the end
        return MADE

    with pytest.raises(EngineError, match="exists already"):
        write_engine(engine, other)
    with pytest.raises(ZeroDivisionError):
        write_engine(engine, lambda folder: 1 // 0, overwrite=True)
    assert read_engine(engine) == before
    write_engine(engine, other, overwrite=True)
    assert read_engine(engine).files["step.onnx"]["bytes"] == 3
    assert not (engine / "golden.safetensors").exists()
    assert [p.name for p in engine.parent.iterdir()] == ["engine"]
    (engine.parent / "home").mkdir()
    (engine.parent / "link").symlink_to(engine)
    for name in ("home", "link"):
        with pytest.raises(EngineError, match="not an engine folder"):
            write_engine(engine.parent / name, other, overwrite=True)


def test_failed_swap_restores_the_old_engine(engine, monkeypatch):
    """If the last rename fails, the old engine is back under its name."""
    before, rename = read_engine(engine), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith("new"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(EngineError, match="Input/output"):
        write_engine(engine, build, overwrite=True)
    assert read_engine(engine) == before
    assert [p.name for p in engine.parent.iterdir()] == ["engine"]


# --- tensors ---------------------------------------------------------------------------------------------------
def tensor_file(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_tensors_from_hand_made_bytes(tmp_path):
    """The reader follows the published format, not merely our writer."""
    path = tmp_path / "a.safetensors"
    header = {"__metadata__": {"by": "hand"}, "x": entry("I32", [2, 1], 0, 8), "y": entry("F16", [], 8, 10)}
    path.write_bytes(tensor_file(header, b"\x01\0\0\0\xff\xff\xff\xff\x00\x3c"))
    tensors = read_tensors(path)
    assert list(tensors) == ["x", "y"]
    assert tensors["x"].dtype == np.int32 and tensors["x"].tolist() == [[1], [-1]]
    assert tensors["y"].dtype == np.float16 and tensors["y"].shape == () and tensors["y"] == 1.0
    assert tensors["x"].flags.writeable
    expected = tensor_file(b'{"x":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}   ', b"\1\2\3")
    write_tensors(path, {"x": np.array([1, 2, 3], dtype=np.uint8)})
    assert path.read_bytes() == expected


def all_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.integers(0, 2, (2, 3)).astype(d) for i, d in enumerate(DTYPES.values())}
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    return {**tensors, "turned": base.T, "empty": np.zeros((0, 4), np.int64), "scalar": np.array(2.5), "ü": base}


def test_tensors_round_trip(tmp_path):
    """Every number format, layout in memory and odd shape comes back equal, and equal input gives equal bytes."""
    path, tensors = tmp_path / "a.safetensors", all_tensors()
    write_tensors(path, tensors)
    first = path.read_bytes()
    found = read_tensors(path)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)
    write_tensors(path, dict(reversed(tensors.items())))
    assert path.read_bytes() == first
    write_tensors(path, {"big": np.array([1, 2], dtype=">i4")})
    assert read_tensors(path)["big"].tolist() == [1, 2]
    write_tensors(path, {})
    assert read_tensors(path) == {}


def test_tensors_agree_with_the_safetensors_package(tmp_path):
    """Files pass both ways between the runtime's reader and the package that the exporter may use."""
    package = pytest.importorskip("safetensors.numpy")
    path, tensors = tmp_path / "a.safetensors", all_tensors()
    tensors["turned"] = np.ascontiguousarray(tensors["turned"])
    write_tensors(path, tensors)
    theirs = package.load_file(path)
    package.save_file(tensors, path, metadata={"a": "b"})
    ours = read_tensors(path)
    for name, value in tensors.items():
        for found in (theirs[name], ours[name]):
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 8 + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        tensor_file([], b""),
        tensor_file(b"[" * 100_000, b""),
        tensor_file(b"{\xff}", b""),
        tensor_file({"x": entry("F32", [2], 0, 4)}, b"\0" * 4),
        tensor_file({"x": entry("F32", [2], 0, 8)}, b"\0" * 4),
        tensor_file({"x": entry("F32", [1], 0, 4)}, b"\0" * 8),
        tensor_file({"x": entry("F32", [1], 4, 8)}, b"\0" * 8),
        tensor_file({"x": entry("F32", [1], 8, 4)}, b"\0" * 8),
        tensor_file({"x": entry("F32", [-1], 0, -4)}, b""),
        tensor_file({"x": entry("F32", [-1, -1], 0, 4)}, b"\0" * 4),
        tensor_file({"x": entry("F32", [2**62, 4], 0, 0)}, b""),
        tensor_file({"x": entry("F32", [1.0], 0, 4)}, b"\0" * 4),
        tensor_file({"x": entry("F32", [True], 0, 4)}, b"\0" * 4),
        tensor_file({"x": entry("F32", "1", 0, 4)}, b"\0" * 4),
        tensor_file({"x": entry("BF16", [2], 0, 4)}, b"\0" * 4),
        tensor_file({"x": entry([], [1], 0, 4)}, b"\0" * 4),
        tensor_file({"x": {"dtype": "U8", "shape": [1]}}, b"\0"),
        tensor_file({"x": entry("BOOL", [1], 0, 1)}, b"\2"),
        tensor_file({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 0, 4)}, b"\0" * 4),
        tensor_file({"x": entry("F32", [1], 0, 4), "y": entry("F32", [1], 8, 12)}, b"\0" * 12),
        tensor_file(b'{"x":' + b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 1 + b'"x":3}', b""),
    ],
)
def test_damaged_tensor_files(tmp_path, data):
    """Lengths, offsets and shapes that do not fit are refused; nothing outside the file's data is ever read."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(EngineError, match=r"a\.safetensors is not a whole safetensors file"):
        read_tensors(path)


def test_tensor_errors(tmp_path):
    """Missing files and number formats without a name are refused by name, and no file appears."""
    with pytest.raises(EngineError, match="cannot read"):
        read_tensors(tmp_path / "a.safetensors")
    for tensors in ({"x": np.zeros(1, complex)}, {"__metadata__": np.zeros(1)}, {"x": np.array(["a"])}):
        with pytest.raises(InputError, match="dtype"):
            write_tensors(tmp_path / "a.safetensors", tensors)
    assert not os.listdir(tmp_path)
