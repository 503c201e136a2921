"""The ONNX Runtime backend, and that the runtime works without PyTorch, ONNX and our own training code."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

import runtimes.onnxruntime as backend
from dvq_rt.generator import Generator
from dvq_rt.manifest import read_engine
from runtimes.errors import BackendError, EngineError

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


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ([], "neither onnxruntime nor onnxruntime-gpu is installed; exactly one is needed: pip install 'dvq-rt[cpu]'"),
        (
            ["onnxruntime", "onnxruntime-gpu"],
            "both onnxruntime 1.24 and onnxruntime-gpu 1.24 are installed; exactly one .* after pip uninstall",
        ),
    ],
)
def test_exactly_one_package(
    installed: list[str], words: str, class_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither package, or both, which overwrite each other's files: the error says which, and what to type."""

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return "1.24"

    monkeypatch.setattr(backend, "version", version)
    with pytest.raises(BackendError, match=words.replace("[", r"\[")):
        Generator(class_engine)


def test_gpu_package_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu counts as the one package, although its module has the same name."""

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1.24"

    monkeypatch.setattr(backend, "version", version)
    assert backend.import_onnxruntime().__name__ == "onnxruntime"


def test_cuda_needs_cuda(class_engine: Path, plain_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for CUDA there is CUDA or an error, never the CPU in silence; and an engine lowered for the CPU says so."""
    ort = backend.import_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"needs CUDAExecutionProvider, but .* install dvq-rt\[gpu\] .*device='cpu'"):
        Generator(plain_engine, device="cuda")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
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
    with pytest.raises(BackendError, match=r"asked for CUDAExecutionProvider, granted .*; check the CUDA driver"):
        Generator(plain_engine, device="cuda").sample()


def test_bad_options(class_engine: Path) -> None:
    """Devices and thread counts that are none."""
    with pytest.raises(BackendError, match=r"device is 'tpu'; it must be one of \('cpu', 'cuda'\)"):
        Generator(class_engine, device="tpu")
    for threads in (0, -1, 1.5, True):
        with pytest.raises(BackendError, match=f"threads is {threads}; it must be"):
            Generator(class_engine, threads=threads)  # type: ignore[arg-type]


def test_unreadable_graph(tmp_path: Path) -> None:
    """A file that is no graph is named."""
    (tmp_path / "step.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"onnxruntime cannot open .*step\.onnx on cpu"):
        backend.OnnxRuntimeBackend().load(tmp_path / "step.onnx")


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
