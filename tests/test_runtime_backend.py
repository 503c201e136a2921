"""The ONNX Runtime backend, and that the runtime works without PyTorch, ONNX and our own training code."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from standin import HostDevice

import runtimes.onnxruntime as backend
from dvq_rt.generator import Generator
from dvq_rt.manifest import read_engine
from runtimes.errors import BackendError, EngineError
from runtimes.graph_files import check_interface
from runtimes.protocol import Backend, TensorSpec
from runtimes.registry import open_backend

ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "training", "export", "onnx", "onnxscript", "safetensors"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import dvq_rt
before = set(sys.modules)
generator = dvq_rt.Generator(sys.argv[1], threads=1)
samples = generator.sample(2, labels="bee", seed=1)
assert generator.reconstruct(samples.images).shape == (2, 16, 16, 3)
assert generator.score(samples.codes)[0].total < 0
assert all(check.ok for check in generator.verify())
print(samples.codes[0].codes.tolist())
print(sorted({name.split(".")[0] for name in before}))
"""


def test_runs_without_torch(class_engine: Path, generator: Generator, tmp_path: Path) -> None:
    """Sampling, coding, scoring and verification in a process where importing PyTorch or our training code fails; the
    images are the same, and ``import dvq_rt`` alone brings in neither of them nor ONNX Runtime."""
    command = [sys.executable, "-c", ALONE, str(class_engine)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert found.returncode == 0, found.stderr
    codes, modules = found.stdout.splitlines()
    assert codes == str(generator.sample(2, labels="bee", seed=1).codes[0].codes.tolist())
    assert not {"'torch'", "'training'", "'export'", "'onnx'", "'onnxruntime'"} & set(re.findall(r"'\w+'", modules))
    assert "'dvq_rt'" in modules and "'runtimes'" in modules


# --- which onnxruntime -----------------------------------------------------------------------------------------
@pytest.fixture
def fresh() -> Iterator[None]:
    """``import_onnxruntime`` looks anew, in the test and after it."""
    backend.import_onnxruntime.cache_clear()
    yield
    backend.import_onnxruntime.cache_clear()


def module(path: Path, **attributes: Any) -> ModuleType:
    """A package of the name onnxruntime in a folder."""
    made = ModuleType("onnxruntime")
    made.__path__ = [str(path / "onnxruntime")]
    made.__file__ = str(path / "onnxruntime" / "__init__.py")
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def installed(folder: Path, name: str, version: str, *files: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{file},sha256=0,1\n" for file in files), encoding="utf-8")


def test_builds_are_found_by_their_files(tmp_path: Path) -> None:
    """Every distribution that holds the module's files counts, whatever its name; those that only sound like it, with
    modules of their own, do not."""
    for name in ("onnxruntime-openvino", "ort-nightly-gpu"):
        installed(tmp_path, name, "1.24.0", "onnxruntime/__init__.py", "onnxruntime/capi/x.so")
    installed(tmp_path, "onnxruntime-extensions", "0.14.0", "onnxruntime_extensions/__init__.py")
    assert backend.installed_builds(module(tmp_path)) == ["onnxruntime-openvino 1.24.0", "ort-nightly-gpu 1.24.0"]


def test_two_builds_are_warned_of_once(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that overwrite each other's files still run, with one warning that names them and what is in use."""
    monkeypatch.setattr(backend, "installed_builds", lambda _: ["onnxruntime 1.30", "onnxruntime-gpu 1.29"])
    with pytest.warns(
        UserWarning, match=r"onnxruntime 1\.30 and onnxruntime-gpu 1\.29 overwrite .*CPUExecution"
    ) as heard:
        for _ in range(2):
            assert backend.import_onnxruntime().InferenceSession
    assert len(heard) == 1


@pytest.mark.parametrize("error", [ImportError(), OSError("libx.so: no such file"), AttributeError("_ARRAY_API")])
def test_broken_packages(error: Exception, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that fails in any way while it is imported is named as broken, one that is not there as missing."""

    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "onnxruntime":
                raise error

    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(BackendError, match=rf"installed but broken \({str(error) or 'ImportError'}\); reinstall"):
        backend.import_onnxruntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"onnxruntime is not installed; pip install 'dvq-rt\[cpu\]'"):
        backend.import_onnxruntime()


def test_packages_that_cannot_work(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name (a stranger's, or what an uninstallation left) is named by its path; a version below the
    floor by its number. The floor itself, and a nightly build, pass."""
    monkeypatch.setitem(sys.modules, "onnxruntime", module(tmp_path))
    with pytest.raises(BackendError, match=f"onnxruntime in {re.escape(str(tmp_path))}.* has no InferenceSession"):
        backend.import_onnxruntime()
    for version, good in (("1.18.1", False), ("1.19.0", True), ("1.33.0.dev20260101002", True), ("2.0.1+cu13", True)):
        made = module(tmp_path, __version__=version, InferenceSession=object)
        monkeypatch.setitem(sys.modules, "onnxruntime", made)
        if good:
            assert backend.import_onnxruntime() is made
            backend.import_onnxruntime.cache_clear()
        else:
            with pytest.raises(BackendError, match=r"onnxruntime 1\.18\.1 is too old; 1\.19 or newer is needed"):
                backend.import_onnxruntime()


def test_integer_weights_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer engines are refused where onnxruntime 1.27 would draw wrong tokens; float engines are not."""
    monkeypatch.setattr(backend.import_onnxruntime(), "__version__", "1.27.0")
    for weights in ("fp32", "fp16"):
        assert opened(weights=weights).suffix == ".onnx"
    for weights in ("int8", "int4"):
        with pytest.raises(
            BackendError, match=rf"engine mine has {weights} weights, which need onnxruntime 1\.28 .*1\.27"
        ):
            opened(weights=weights)
    monkeypatch.setattr(backend.import_onnxruntime(), "__version__", "1.28.0")
    assert opened(weights="int8").suffix == ".onnx"


# --- options ---------------------------------------------------------------------------------------------------
def opened(kind: str = "onnxruntime", **changes: Any) -> Backend:
    """A backend by its name."""
    return open_backend(kind, **{"engine": "mine", "target": "cpu", "weights": "fp16", "tools": {}, **changes})


def test_cuda_needs_cuda(class_engine: Path, plain_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for CUDA there is CUDA or an error, never the CPU in silence; and an engine lowered for the CPU says so."""
    ort = backend.import_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"needs CUDAExecutionProvider, but .* install dvq-rt\[gpu\] .*device='cpu'"):
        Generator(plain_engine, device="cuda")
    with pytest.raises(BackendError, match="exported for the CPU; export it again with --target cuda"):
        Generator(class_engine, device="cuda")


def test_granted_providers_are_checked(plain_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that onnxruntime opened on the CPU instead of the GPU is not used."""
    ort = backend.import_onnxruntime()

    class Fallback:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Fallback)
    monkeypatch.setattr(backend, "find_gpu", lambda needed, index: None)
    monkeypatch.setattr(backend, "open_device", HostDevice)
    with pytest.raises(
        BackendError, match=r"asked for CUDAExecutionProvider, granted .*; check the driver and libraries"
    ):
        Generator(plain_engine, device="cuda").sample()


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, 100_000, 2**31, 10**30, "4", b"4", np.float64(2), [1]])
@pytest.mark.parametrize("kind", ["onnxruntime", "tensorrt"])
def test_threads_that_cannot_be_had(threads: Any, kind: str) -> None:
    """Numbers of threads that are none, or that would end the process, are refused before anything is opened; the text
    says how many cores there are."""
    with pytest.raises(BackendError, match=rf"threads is .*; it must be an integer of 1 to .* has {os.cpu_count()}"):
        opened(kind, threads=threads)


def test_threads_that_can_be_had(class_engine: Path) -> None:
    """64 threads run on any machine, and numbers may be numpy's."""
    for threads in (1, 64, np.int32(2)):
        program = opened(threads=threads).load(class_engine / "decoder.onnx")
        assert program.run({"codes": np.zeros((1, 8, 8), np.int64)})["images"].shape == (1, 3, 16, 16)


def test_bad_options(class_engine: Path) -> None:
    """Devices and kinds that are none, and options of the other kind of engine."""
    for device in ("tpu", "", 3):
        with pytest.raises(BackendError, match=rf"device is {device!r}; it must be 'cpu', 'cuda'"):
            Generator(class_engine, device=device)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"engine mine is for 'openvino'; there are onnxruntime, tensorrt and"):
        opened("openvino")
    with pytest.raises(BackendError, match="engine mine holds TensorRT plans, which run on cuda only; device is 'cpu'"):
        opened("tensorrt", device="cpu")
    with pytest.raises(BackendError, match="engine mine holds TensorRT plans; providers and session_options are of"):
        opened("tensorrt", providers=["CPUExecutionProvider"])


def test_providers(class_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers go to onnxruntime as they are, with their options and in their order; what is not there, not granted,
    or no list is refused."""
    program = opened(providers=[("CPUExecutionProvider", {})]).load(class_engine / "decoder.onnx")
    assert program.run({"codes": np.zeros((1, 8, 8), np.int64)})["images"].shape == (1, 3, 16, 16)
    for odd in (["NoSuchProvider"], [], "CPUExecutionProvider", 3, [3], [()], [None]):
        with pytest.raises(BackendError, match=r"providers is .*; it must be a list of some of \['.*CPUExecution"):
            opened(providers=odd)
    ort, asked = backend.import_onnxruntime(), ["XExecutionProvider", ("CPUExecutionProvider", {"use_arena": "0"})]
    seen = []

    class Session:
        def __init__(self, *_: object, providers: Any, **__: object) -> None:
            seen.append(providers)

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["XExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    with pytest.raises(
        BackendError, match=r"asked for XExecutionProvider, CPUExecutionProvider, granted .*; check the"
    ):
        opened(providers=asked).load(class_engine / "decoder.onnx")
    assert seen == [asked]


def test_session_options(class_engine: Path, tmp_path: Path) -> None:
    """Attributes and configuration entries reach onnxruntime; what it does not take is refused when it is given."""
    written = tmp_path / "optimized.onnx"
    options = {"optimized_model_filepath": str(written), "session.intra_op.allow_spinning": 0}
    opened(session_options=options).load(class_engine / "decoder.onnx")
    assert written.stat().st_size > 1000
    for odd in ({"no_such": 1}, {"intra_op_num_threads": "x"}, {"session.x": "y" * 10_000}, {3: 1}):
        with pytest.raises(BackendError, match=r"session_options has .*, which onnxruntime .* does not take"):
            opened(session_options=odd)
    with pytest.raises(BackendError, match=r"session_options is .*; it must be a mapping"):
        opened(session_options=["enable_profiling"])


def test_buffers_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer larger than memory, or all of them together, names its bytes and the way out; none is made, and what
    went back is there again."""
    runtime = opened()
    for slots in (10**9, 2**62, 10**30):
        with pytest.raises(BackendError, match=rf"a buffer of {slots * 32768:,} bytes, .* float32; use fewer slots"):
            runtime.allocate((slots, 8, 32, 32), "float32")
    monkeypatch.setattr(backend, "physical_memory", lambda: 1000)
    first = runtime.allocate((75,), "int64")
    with pytest.raises(
        BackendError, match=r"600 bytes, \[75\] int64; use fewer slots \(this machine has 1,000, 600 held\)"
    ):
        runtime.allocate((75,), "int64")
    del first
    assert runtime.allocate((75,), "int64").read().shape == (75,)


# --- graphs and their files ------------------------------------------------------------------------------------
def listed(*paths: Path) -> dict[str, dict[str, Any]]:
    """Files as a manifest lists them."""
    contents = {path.name: path.read_bytes() for path in paths}
    return {n: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for n, data in contents.items()}


def test_only_listed_bytes_are_loaded(class_engine: Path, tmp_path: Path) -> None:
    """A graph of another size or content than the manifest lists, one that it does not list, or that is missing or no
    regular file, is refused by name; sizes come first, so that 100 GB are not read."""
    path, files = tmp_path / "decoder.onnx", listed(class_engine / "decoder.onnx")
    data = (class_engine / "decoder.onnx").read_bytes()
    path.symlink_to(class_engine / "decoder.onnx")  # as package managers lay files out
    assert opened().load(path, files)
    path.unlink()
    with pytest.raises(EngineError, match=r"cannot read .*decoder\.onnx: No such file or directory; copy or export"):
        opened().load(path, files)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(EngineError, match=r"decoder\.onnx is not the file that the manifest lists \(its SHA-256\)"):
        opened().load(path, files)
    with path.open("wb") as file:
        file.truncate(10**11)
    with pytest.raises(EngineError, match=r"the manifest lists: it has 100,000,000,000 bytes, not"):
        opened().load(path, files)
    with pytest.raises(EngineError, match=r"decoder\.onnx is not a file that the manifest lists"):
        opened().load(path, {})
    path.unlink()
    path.mkdir()
    with pytest.raises(EngineError, match=r"decoder\.onnx is not a regular file"):
        opened().load(path, files)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    """A named pipe in place of a graph is refused instead of waited for."""
    os.mkfifo(tmp_path / "step.onnx")
    with pytest.raises(EngineError, match=r"step\.onnx is not a regular file"):
        opened().load(tmp_path / "step.onnx")


def test_a_graph_is_the_one_that_was_compared(
    class_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is replaced between the comparison and onnxruntime's opening it is refused."""
    path = tmp_path / "decoder.onnx"
    path.write_bytes((class_engine / "decoder.onnx").read_bytes())
    ort, session = backend.import_onnxruntime(), backend.import_onnxruntime().InferenceSession

    def replaced(*args: Any, **options: Any) -> Any:
        path.write_bytes((class_engine / "encoder.onnx").read_bytes())
        return session(*args, **options)

    assert set(opened().load(path, listed(path)).inputs) == {"codes"}
    monkeypatch.setattr(ort, "InferenceSession", replaced)
    with pytest.raises(EngineError, match=r"decoder\.onnx was replaced while it was opened; copy or export"):
        opened().load(path, listed(path))


def external(path: Path, location: str, nested: bool = False) -> None:
    """Write a graph y = x + w, with w in a file; inside a branch of a condition if ``nested``."""
    weights = numpy_helper.from_array(np.arange(2048, dtype=np.float32), "w")
    (path.parent / "weights.data").write_bytes(weights.raw_data)
    set_external_data(weights, location)
    weights.ClearField("raw_data")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2048]) for name in "xy")
    add = helper.make_node("Add", ["x", "w"], ["y"])
    graph = helper.make_graph([add], "add", [x], [y], [weights])
    if nested:
        inner = [helper.make_node("Constant", [], ["w"], value=weights), add]
        branch = helper.make_graph(inner, "branch", [], [helper.make_tensor_value_info("y", 1, None)])
        always = helper.make_node("Constant", [], ["always"], value=numpy_helper.from_array(np.array(True)))
        choice = helper.make_node("If", ["always"], ["y"], then_branch=branch, else_branch=branch)
        graph = helper.make_graph([always, choice], "choice", [x], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("linked", [False, True])
def test_external_data(linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in a file beside the graph are found from any working directory, also through links, compared with the
    manifest, and what is compared is what is loaded."""
    real = tmp_path / "real"
    folder = tmp_path / "linked" if linked else real
    (tmp_path / "elsewhere").mkdir()
    real.mkdir()
    external(real / "step.onnx", "weights.data")
    if linked:
        folder.mkdir()
        for i, path in enumerate(sorted(real.iterdir())):
            path.rename(tmp_path / str(i))  # as in a cache of blobs
            (folder / path.name).symlink_to(tmp_path / str(i))
    monkeypatch.chdir(tmp_path / "elsewhere")
    path, data = folder / "step.onnx", folder / "weights.data"
    values, content, files = np.zeros((2, 2048), np.float32), data.read_bytes(), listed(path, data)
    for table in (files, None):
        program = opened().load(path, table)
        np.testing.assert_array_equal(program.run({"x": values})["y"], np.arange(2048) + values)
    with pytest.raises(EngineError, match=r"weights\.data is not a file that the manifest lists"):
        opened().load(path, listed(path))
    data.write_bytes(content[:-1] + b"x")
    with pytest.raises(EngineError, match=r"weights\.data is not the file that the manifest lists \(its SHA-256\)"):
        opened().load(path, files)
    data.write_bytes(content + b"x")
    with pytest.raises(EngineError, match=r"weights\.data .*: it has 8,193 bytes, not 8,192"):
        opened().load(path, files)
    data.unlink()
    with pytest.raises(EngineError, match=r"cannot read .*weights\.data: No such file"):
        opened().load(path, files)


@pytest.mark.parametrize("location", ["../weights.data", "/etc/hostname", "C:\\x", "sub/weights.data", "..", ""])
@pytest.mark.parametrize("nested", [False, True])
def test_external_data_stays_in_the_folder(location: str, nested: bool, tmp_path: Path) -> None:
    """No graph reads values from outside its folder, wherever in it the name stands."""
    (tmp_path / "engine").mkdir()
    external(tmp_path / "engine" / "step.onnx", location, nested)
    (tmp_path / "weights.data").write_bytes(bytes(8192))
    with pytest.raises(EngineError, match=r"step\.onnx keeps values in .*, which is not the name of a file beside it"):
        opened().load(tmp_path / "engine" / "step.onnx")


def test_external_data_needs_a_newer_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime that takes no such file from memory is named with the version that does."""
    external(tmp_path / "step.onnx", "weights.data")
    monkeypatch.setattr(backend, "IN_MEMORY", "no_such_method")
    with pytest.raises(BackendError, match=r"keeps weights in weights\.data, which needs onnxruntime 1\.24 or newer"):
        opened().load(tmp_path / "step.onnx")


def test_damaged_graphs_with_external_data(tmp_path: Path) -> None:
    """Every cut of a graph ends in an error of ours."""
    external(tmp_path / "step.onnx", "weights.data", nested=True)
    data = (tmp_path / "step.onnx").read_bytes()
    for end in range(len(data) - 1):
        (tmp_path / "step.onnx").write_bytes(data[:end])
        with pytest.raises((EngineError, BackendError), match=r"step\.onnx"):
            opened().load(tmp_path / "step.onnx")


def test_unreadable_graph(tmp_path: Path) -> None:
    """A file that is no graph is named."""
    (tmp_path / "step.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"onnxruntime cannot open .*step\.onnx on cpu"):
        backend.OnnxRuntimeBackend().load(tmp_path / "step.onnx")


def interface(engine: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    step = read_engine(engine).step
    inputs, outputs = (
        {t["name"]: TensorSpec(t["dtype"], tuple(t["shape"])) for t in step[s]} for s in ("inputs", "outputs")
    )
    return inputs, outputs


@pytest.mark.parametrize("name", ["class_engine", "plain_engine", "mq_engine"])
def test_graphs_are_what_their_manifests_say(name: str, request: pytest.FixtureRequest) -> None:
    """The step graphs of all kinds of engine have the tensors that their manifests describe."""
    path = request.getfixturevalue(name) / "step.onnx"
    program = opened().load(path)
    check_interface(path, program, *interface(path.parent))
    assert len(program.inputs) > 20 and program.inputs["uniforms"].dtype == "float32"


@pytest.mark.parametrize(
    ("tensor", "wanted", "words"),
    [
        ("done", None, "input 'done' is only in the graph"),
        ("more", TensorSpec("bool", ("B",)), "input 'more' is only in the manifest"),
        ("done", TensorSpec("uint8", ("B",)), r"input 'done' is uint8 \[B\] in the manifest, bool \[.*\] in the graph"),
        (
            "cells",
            TensorSpec("int32", ("B", 63)),
            r"'cells' is int32 \[B, 63\] in the manifest, int32 \[.*, 64\] in the",
        ),
        (
            "cells",
            TensorSpec("int32", ("B", "n")),
            r"'cells' is int32 \[B, n\] in the manifest, int32 \[.*, 64\] in the",
        ),
        (
            "cells",
            TensorSpec("int32", ("B", 8, 8)),
            r"'cells' is int32 \[B, 8, 8\] in the manifest, int32 \[.*, 64\] in",
        ),
    ],
)
def test_graphs_that_are_not(tensor: str, wanted: TensorSpec | None, words: str, class_engine: Path) -> None:
    """A manifest with another name, number format, size or rank than its graph is refused with both sides named."""
    path = class_engine / "step.onnx"
    inputs, outputs = interface(class_engine)
    if wanted is None:
        del inputs[tensor]
    else:
        inputs[tensor] = wanted
    with pytest.raises(EngineError, match=rf"step\.onnx is not the graph that its manifest describes: .*{words}"):
        check_interface(path, opened().load(path), inputs, outputs)


def test_sizes_that_are_not_compared(class_engine: Path) -> None:
    """A size that the graph leaves open may be a number in the manifest, and None is any; many differences are counted
    instead of printed."""
    path = class_engine / "decoder.onnx"
    program = opened().load(path)
    images = {"images": TensorSpec("float32", (4, None, 16, 16))}
    check_interface(path, program, {"codes": TensorSpec("int64", (None, 8, None))}, images)
    with pytest.raises(EngineError, match=r"'a' is only .*'b' is only .*'c' is only .* and 3 more; copy or export"):
        check_interface(path, program, {name: TensorSpec("int64", ()) for name in "abcde"}, images)


def test_binding_needs_every_tensor(class_engine: Path) -> None:
    """A manifest that names other tensors than its graph is noticed when the buffers are bound, by name."""
    runtime = backend.OnnxRuntimeBackend(threads=1)
    program = runtime.load(class_engine / "decoder.onnx")
    codes, images = runtime.allocate((1, 8, 8), "int64"), runtime.allocate((1, 3, 16, 16), "float32")
    with pytest.raises(EngineError, match=r"differ from its manifest by \['extra'\]; re-export"):
        program.bind({"codes": codes, "extra": codes}, {"images": images})
    with pytest.raises(EngineError, match=r"differ from its manifest by \['images'\]"):
        program.bind({"codes": codes}, {})


def test_bound_buffers_are_used_in_place(class_engine: Path) -> None:
    """A bound program reads and writes the buffers themselves: new input values give new outputs, and what it computes
    is what a plain run computes."""
    runtime = backend.OnnxRuntimeBackend(threads=1)
    program = runtime.load(class_engine / "decoder.onnx")
    codes, images = runtime.allocate((2, 8, 8), "int64"), runtime.allocate((2, 3, 16, 16), "float32")
    binding = program.bind({"codes": codes}, {"images": images})
    place = images.read().ctypes.data
    for seed in (0, 1):
        values = np.random.default_rng(seed).integers(0, 32, (2, 8, 8))
        codes.write(values)
        binding.run()
        np.testing.assert_array_equal(images.read(), program.run({"codes": values})["images"])
    assert images.read().ctypes.data == place


def test_caches_are_bound_on_both_sides(class_engine: Path) -> None:
    """The manifest pairs every cache, two per block, and nothing else: lengths and tokens must have two buffers."""
    step = read_engine(class_engine).step
    assert sorted(step["caches"]) == sorted([f"cache_{i}", f"cache_{i}_out"] for i in range(6))


# --- the end ---------------------------------------------------------------------------------------------------
DAEMON = """
import atexit, sys, threading
import numpy as np

def late():
    print(len(generator.encode(image)), flush=True)

atexit.register(late)  # runs after what dvq_rt registers
import dvq_rt
generator, image = dvq_rt.Generator(sys.argv[1], threads=1), np.zeros((64, 64, 3), np.uint8)
codes = generator.encode(image)
begun = [threading.Event() for _ in range(3)]

def work(event):
    while True:
        WORK
        event.set()

for event in begun:
    threading.Thread(target=work, args=(event,), daemon=True).start()
for event in begun:
    event.wait()
"""


@pytest.mark.parametrize(
    "work",
    [
        "generator.encode(image)",
        "generator.decode(codes)",
        "dvq_rt.Generator(sys.argv[1]).encode(image)",
        "generator.sample(1)",
        "list(generator.stream(1))",
        "generator.score(codes)",
    ],
)
def test_the_end_of_the_interpreter(work: str) -> None:
    """Daemon threads inside graphs, or opening one, when the program ends: it ends well and without a word, and what
    the main thread registered for the end still runs."""
    command = [sys.executable, "-c", DAEMON.replace("WORK", work), "demo:dq"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def cuda_missing() -> bool:
    """Whether this machine's ONNX Runtime has no CUDA provider."""
    return "CUDAExecutionProvider" not in backend.import_onnxruntime().get_available_providers()


@pytest.mark.gpu
@pytest.mark.skipif(cuda_missing(), reason="needs an NVIDIA GPU and onnxruntime-gpu")
def test_cuda_agrees_with_pytorch(plain_engine: Path) -> None:
    """On a GPU: every golden check of an engine exported for CUDA passes there, free-running tokens included."""
    for check in Generator(plain_engine, device="cuda").verify():
        print(f"\n{check.name}: {check.measured:.3g} (at most {check.bound:.3g})", end="")
        assert check.ok, check
