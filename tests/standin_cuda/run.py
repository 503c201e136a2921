"""ONNX Runtime's own CUDA provider over a driver that computes nothing: ``python tests/standin_cuda/run.py ENGINE...``.

It needs no GPU, but gcc and three packages that are unpacked, not installed::

    pip download --no-deps onnxruntime-gpu==1.31.1 "nvidia-cuda-runtime==13.*" "nvidia-cuda-crt==13.*" -d wheels
    python tests/standin_cuda/run.py --wheels wheels ENGINE...

For every engine of ``export.to_onnx --target cuda`` it prints whether the provider takes the whole step as a CUDA graph
(it refuses one with a node on the CPU), and what one token calls: kernels, cuBLAS, copies, waits; plainly, and later as
a graph. ``--table`` writes ``export/coverage/cuda_kernels.tsv`` anew. Nothing that is computed means anything.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

HERE = Path(__file__).resolve().parent
BUILT = "STANDIN_CUDA"
"""Environment variable that holds the folder of what is built, in the process that uses it."""
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
TENSORRT = "onnxruntime/capi/libonnxruntime_providers_tensorrt.so"
SYMBOL = re.compile(r"UND ([A-Za-z0-9_]+)@(lib\S+?)(?: |$)")
HANDLES = re.compile(r"(cublas|cublasLt|cudnn)\w*Create\w*")
BODIES = {
    "cublasLtMatmulAlgoGetHeuristic": "int F(void*a,void*b,void*c,void*d,void*e,void*f,void*g,int n,char*r,int*k)"
    "{memset(r,0,96);*k=1;return 0;}",
    "cublasGetMathMode": "int F(void*h,int*m){*m=0;return 0;}",
    "cudnnGetReductionWorkspaceSize": "int F(void*h,void*d,void*a,void*c,size_t*s){*s=0;return 0;}",
    "cudnnGetVersion": "size_t F(void){return 91000;}",
    "getInferLibVersion": "int F(void){return 101500;}",
}
OBJECT = "static long zero(void){return 0;}static void*vt[256];static struct{void**v;char pad[512];}object;"
OBJECT += "static void*get(void){for(int i=0;i<256;i++)vt[i]=zero;object.v=vt;return&object;}\n"


def build(wheels: Path, folder: Path) -> None:
    """Unpack the wheels, and make a library for each that the provider wants."""
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "packages")
    packages = folder / "packages"
    include = packages / "nvidia/cu13/include"
    wanted: dict[str, set[str]] = defaultdict(set)
    for library in (PROVIDER, TENSORRT):
        listing = subprocess.run(
            ["readelf", "--dyn-syms", "-W", str(packages / library)], capture_output=True, text=True, check=True
        ).stdout
        for name, owner in SYMBOL.findall(listing):
            if owner.startswith(("libcu", "libcudnn")):
                wanted[owner].add(name)
    text = (packages / PROVIDER).read_bytes()
    wanted["libcudnn.so.9"] |= {m.decode() for m in re.findall(rb"\x00(cudnn[A-Z]\w+)(?=\x00)", text)}
    wanted["libcuda.so.1"] |= {"cuTensorMapEncodeTiled"}
    wanted["libcurand.so.10"] |= set()
    own = set(re.findall(r"(\w+)\(", (HERE / "runtime.c").read_text()))
    runtime = next(name for name in wanted if name.startswith("libcudart"))
    for library in [runtime, *(name for name in wanted if name != runtime)]:
        names = wanted[library] - own if library == runtime else wanted[library]
        source = "#include <stdlib.h>\n#include <string.h>\nvoid standin_note(const char*);\n"
        source += "\n".join(map(function, sorted(names)))
        compile_library(folder, library, source, bool(wanted[library]) and library != "libcuda.so.1", include, runtime)
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        names = ["createInferRuntime_INTERNAL", "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL"]
        names += ["createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getPluginRegistry"]
        source = OBJECT + "\n".join(f"void*{name}(void*a,void*b,int c){{return get();}}" for name in names)
        source += "\n" + function("getInferLibVersion")
        compile_library(folder, library, source, False, include, runtime)


def function(name: str) -> str:
    """A C function of that name that is counted and succeeds; one that creates gives a handle."""
    if name in BODIES:
        return BODIES[name].replace(" F(", f" {name}(")
    if HANDLES.fullmatch(name) or name.startswith("cudnnCreate"):
        return f"int {name}(void**p){{*p=malloc(256);return 0;}}"
    return f'long {name}(void){{standin_note("{name}");return 0;}}'


def compile_library(folder: Path, library: str, source: str, versioned: bool, include: Path, runtime: str) -> None:
    (folder / "part.c").write_text(source)
    (folder / "versions").write_text(f"{library} {{ global: *; }};\n")
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-w",
        "-O1",
        f"-Wl,-soname,{library}",
        f"-I{include}",
        "-o",
        library,
        "part.c",
    ]
    if library == runtime:
        command.append(str(HERE / "runtime.c"))
    else:
        command += ["-L.", f"-l:{runtime}", "-Wl,--no-as-needed"]
    subprocess.run([*command, *(["-Wl,--version-script,versions"] if versioned else [])], check=True, cwd=folder)


def counts(runtime: Any, folder: Path) -> dict[str, int]:
    """Calls since the last ``standin_reset``."""
    runtime.standin_write(str(folder / "counts").encode())
    lines = (folder / "counts").read_text().splitlines()
    return {name: int(count) for name, _, count in (line.rpartition(" ") for line in lines)}


def grouped(calls: dict[str, int]) -> str:
    """Calls by what they do on a GPU."""
    groups = {
        "kernels": lambda name: "LaunchKernel" in name,
        "cuBLAS": lambda name: name.startswith("cublas") and ("emm" in name or name.endswith("Matmul")),
        "cuDNN": lambda name: name in ("cudnnReduceTensor", "cudnnSoftmaxForward", "cudnnConvolutionForward"),
        "memsets": lambda name: name == "cudaMemsetAsync",
        "copies on the device": lambda name: name == "copy device to device",
        "copies from or to the host": lambda name: name in ("copy host to device", "copy device to host"),
        "waits": lambda name: "Synchronize" in name,
        "captures that forbid other threads' calls": lambda name: name == "capture that forbids other threads' calls",
        "graph launches": lambda name: name == "cudaGraphLaunch",
    }
    found = {group: sum(count for name, count in calls.items() if of(name)) for group, of in groups.items()}
    return ", ".join(f"{count} {group}" for group, count in found.items() if count)


def use(engines: list[str], slots: int, folder: Path) -> None:
    """In the process that has the libraries: open each step, bind it, and count the calls of a token."""
    import numpy as np
    import onnxruntime

    from runtimes.cuda import Device
    from runtimes.onnxruntime_cuda import cuda_options

    runtime = ctypes.CDLL("libcudart.so.13")

    def allocate(size: int) -> int:
        address = ctypes.c_void_p()
        assert runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size)) == 0
        assert address.value
        return address.value

    stream = ctypes.c_void_p()
    runtime.cudaStreamCreate(ctypes.byref(stream))
    formats = {"float": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32, "bool": np.bool_}
    for engine in engines:
        for part in ("encoder", "decoder", "step"):
            options = cuda_options(cast(Device, SimpleNamespace(index=0, stream=stream.value)), main=part == "step")
            session = onnxruntime.InferenceSession(
                f"{engine}/{part}.onnx", providers=[("CUDAExecutionProvider", options)], enable_fallback=0
            )
            print(f"{engine}/{part}: opened by {session.get_providers()[0]}")
        binding, addresses = session.io_binding(), {}
        for side, tensors in (("input", session.get_inputs()), ("output", session.get_outputs())):
            for tensor in tensors:
                shape = [size if isinstance(size, int) else slots for size in tensor.shape]
                alias = addresses.get(tensor.name.removesuffix("_out")) if tensor.name.startswith("cache_") else None
                address = addresses[tensor.name] = alias or allocate(8 * int(np.prod(shape)))
                dtype = formats.get(tensor.type[len("tensor(") : -1], 16)  # 16 is onnx's bfloat16
                getattr(binding, f"bind_{side}")(tensor.name, "cuda", 0, dtype, shape, address)
        for what, graph, runs in (("plainly", "-1", 1), ("as a new graph", "1", 1), ("as a graph", "1", 1)):
            run = onnxruntime.RunOptions()
            run.add_run_config_entry("gpu_graph_id", graph)
            run.add_run_config_entry("disable_synchronize_execution_providers", "1")
            for _ in range(runs):
                runtime.standin_reset()
                session.run_with_iobinding(binding, run)
            print(f"  one token {what}: {grouped(counts(runtime, folder))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*")
    parser.add_argument("--wheels", type=Path, default=Path("wheels"))
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="write the table of kernels anew")
    options = parser.parse_args()
    if built := os.environ.get(BUILT):
        if options.table:
            from export.coverage.kernels import main as write_table

            write_table()
        use(options.engines, options.slots, Path(built))
        return
    with tempfile.TemporaryDirectory() as name:
        build(options.wheels, Path(name))
        path = os.pathsep.join([f"{name}/packages", *filter(None, sys.path)])
        environment = {**os.environ, BUILT: name, "LD_LIBRARY_PATH": name, "PYTHONPATH": path}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


if __name__ == "__main__":
    main()
