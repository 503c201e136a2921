"""TensorRT and TensorRT-RTX behind one interface: every version and API difference between them lives here.

Both build plans and run them. TensorRT-RTX also builds ahead of time, on a machine without a GPU, for several kinds of
GPU at once. Floors: the cache updates and native attention that the step graph needs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from runtimes.errors import BackendError, ConfigError, ExportError

CURRENT = "current"
DTYPES = {
    **{"FLOAT": "float32", "HALF": "float16", "BF16": "uint16", "INT64": "int64", "INT32": "int32"},
    **{"BOOL": "bool", "UINT8": "uint8", "INT8": "int8"},
}
"""numpy name of each of TensorRT's number formats; bfloat16, which numpy lacks, passes as its 16 bits."""


class Flavor(NamedTuple):
    """One of the two packages: ``module``, lowest ``version``, what to ``install``."""

    module: str
    version: tuple[int, int]
    install: str


FLAVORS = {
    "tensorrt": Flavor("tensorrt", (10, 15), "pip install 'dvq-rt[tensorrt]'"),
    "tensorrt-rtx": Flavor("tensorrt_rtx", (1, 4), "pip install 'dvq-rt[tensorrt-rtx]'"),
}
INSTALL = (
    "on any machine `pip install 'dvq-rt[tensorrt-rtx]'` (TensorRT-RTX, also builds without a GPU), or on a machine "
    "with an NVIDIA GPU `pip install 'dvq-rt[tensorrt]'`"
)


class Layer(NamedTuple):
    """A layer of a parsed network. ``mask`` (dtype, None without one) and ``decomposable`` are of attention only."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    mask: str | None = None
    decomposable: bool = False


class Network:
    """A parsed network. It keeps builder and parser alive, without which TensorRT crashes."""

    def __init__(self, trt: ModuleType, builder: Any, network: Any, parser: Any) -> None:
        self._trt, self.builder, self.network, self._parser = trt, builder, network, parser

    def layers(self) -> list[Layer]:
        """All layers, in the order of the graph."""
        return [self._layer(self.network.get_layer(i)) for i in range(self.network.num_layers)]

    def _layer(self, layer: Any) -> Layer:
        inputs, outputs = (
            tuple(t.name for i in range(count) if (t := get(i)) is not None)
            for count, get in ((layer.num_inputs, layer.get_input), (layer.num_outputs, layer.get_output))
        )
        kind, name = layer.type.name, layer.name
        if kind != "ATTENTION_INPUT":
            return Layer(kind, name, inputs, outputs)
        layer.__class__ = self._trt.IAttentionInputLayer  # get_layer gives the base class
        mask = layer.attention.mask
        dtype = None if mask is None else DTYPES.get(mask.dtype.name, mask.dtype.name)
        return Layer(kind, name, inputs, outputs, dtype, layer.attention.decomposable)

    def inputs(self) -> list[dict[str, Any]]:
        """``{"name", "dtype", "shape"}`` of each input, as a manifest lists them."""
        return [self._spec(self.network.get_input(i)) for i in range(self.network.num_inputs)]

    def outputs(self) -> list[dict[str, Any]]:
        """The same of each output."""
        return [self._spec(self.network.get_output(i)) for i in range(self.network.num_outputs)]

    @staticmethod
    def _spec(tensor: Any) -> dict[str, Any]:
        dtype = DTYPES.get(tensor.dtype.name, tensor.dtype.name)
        return {"name": tensor.name, "dtype": dtype, "shape": list(tensor.shape)}


class TensorRT:
    """One of the two packages, imported.

    Args:
        flavor: ``tensorrt`` or ``tensorrt-rtx``.

    Raises:
        BackendError: the package is missing, broken or too old; says what to install.
    """

    _loaded: dict[str, tuple[ModuleType, Any]] = {}  # noqa: RUF012  one logger per process: TensorRT ignores later ones

    def __init__(self, flavor: str) -> None:
        if flavor not in FLAVORS:
            raise BackendError(f"TensorRT flavor is {flavor!r}; it must be one of {sorted(FLAVORS)}")
        self.flavor = flavor
        if flavor not in self._loaded:
            trt = import_flavor(flavor)
            self._loaded[flavor] = (trt, _logger(trt))
        self.trt, self._log = self._loaded[flavor]
        self.version: str = self.trt.__version__

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds without a GPU."""
        return hasattr(self.trt, "ComputeCapability")

    def capabilities(self) -> list[str]:
        """Targets that it builds for ahead of time, e.g. ``sm86``."""
        names = self.trt.ComputeCapability.__members__ if self.ahead_of_time else ()
        return sorted((n.lower() for n in names if re.fullmatch(r"SM\d+", n)), key=lambda n: int(n[2:]))

    def check_targets(self, targets: Sequence[str]) -> None:
        """
        Raises:
            ConfigError: it cannot build for one of the targets.
        """
        if list(targets) == [CURRENT]:
            return
        if not self.ahead_of_time:
            raise ConfigError(
                f"target is {','.join(targets)}; {self.flavor} builds for the GPU of this machine only: use --target "
                "current there, or --flavor tensorrt-rtx"
            )
        if not targets or (odd := [t for t in targets if t not in self.capabilities()]):
            raise ConfigError(
                f"target is {','.join(targets)!r}; {self.flavor} {self.version} builds for {self.capabilities()}, one "
                f"or several with commas, or {CURRENT}" + (f", not {odd}" if targets else "")
            )

    # --- building ----------------------------------------------------------------------------------------------
    def parse(self, path: Path) -> Network:
        """The network of an ONNX file, strongly typed.

        Raises:
            ExportError: the parser refuses it.
        """
        builder = self.trt.Builder(self._log)
        flags = self.trt.NetworkDefinitionCreationFlag.__members__
        network = builder.create_network(sum(1 << int(flags[n]) for n in ("STRONGLY_TYPED",) if n in flags))
        parser = self.trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(path)):
            errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise ExportError(f"{self.flavor} {self.version} cannot parse {path.name}: {errors}")
        return Network(self.trt, builder, network, parser)

    def build(self, network: Network, targets: Sequence[str], *, tf32: bool = False) -> bytes:
        """The plan of a network. ``tf32`` allows float32 products with ten bits of mantissa.

        Raises:
            ExportError: the build fails; carries TensorRT's own words.
        """
        config = network.builder.create_builder_config()
        if not tf32:
            config.clear_flag(self.trt.BuilderFlag.TF32)
        if self.ahead_of_time:
            config.num_compute_capabilities = len(targets)
            for i, target in enumerate(targets):
                config.set_compute_capability(self.trt.ComputeCapability.__members__[target.upper()], i)
        self._log.errors.clear()
        plan = network.builder.build_serialized_network(network.network, config)
        if plan is None:
            raise ExportError(f"{self.flavor} {self.version} cannot build {targets}: {self.complaint()}")
        return bytes(plan)

    # --- running -----------------------------------------------------------------------------------------------
    def deserialize(self, plan: bytes) -> tuple[Any, Any]:
        """Runtime and engine of a plan; the runtime must outlive the engine. The engine is None if TensorRT refuses."""
        self._log.errors.clear()
        runtime = self.trt.Runtime(self._log)
        return runtime, runtime.deserialize_cuda_engine(plan)

    def specs(self, engine: Any) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Inputs and outputs of an engine by name: ``{"dtype", "shape"}``."""
        sides: tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]] = ({}, {})
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            side = sides[0 if engine.get_tensor_mode(name).name == "INPUT" else 1]
            dtype = engine.get_tensor_dtype(name).name
            side[name] = {"dtype": DTYPES.get(dtype, dtype), "shape": list(engine.get_tensor_shape(name))}
        return sides

    def aliases(self, engine: Any, outputs: Sequence[str]) -> dict[str, str]:
        """Outputs that must have an input's address, with that input."""
        sources = {name: engine.get_aliased_input_tensor(name) for name in outputs}
        return {name: source for name, source in sources.items() if source}

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether a context's next run can become a CUDA graph; TensorRT-RTX may still have kernels to compile."""
        return bool(context.is_stream_capturable(stream)) if hasattr(context, "is_stream_capturable") else True

    def complaint(self) -> str:
        """TensorRT's latest error messages."""
        return "; ".join(self._log.errors[-3:]) or "no reason given"


def import_flavor(flavor: str) -> ModuleType:
    """
    Raises:
        BackendError: the package is missing, broken or too old.
    """
    module, floor, install = FLAVORS[flavor]
    try:
        trt = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise BackendError(f"{flavor} is installed but broken: {error}; {install}") from error
        raise BackendError(f"{flavor} is not installed; {install}") from None
    except (ImportError, OSError) as error:
        raise BackendError(f"{flavor} is installed but broken: {error}; {install}") from error
    if (*numbers(trt.__version__), 0, 0)[:2] < floor:
        least = ".".join(map(str, floor))
        raise BackendError(f"{flavor} {trt.__version__} is too old; {least} or newer is needed: {install}")
    return trt


def choose_flavor(flavor: str, driver: bool) -> TensorRT:
    """The package to build with: the one asked for; with ``auto`` TensorRT where there is a driver, else TensorRT-RTX.

    Raises:
        BackendError: it is not installed, or with ``auto`` neither is.
    """
    if flavor != "auto":
        return TensorRT(flavor)
    refusals = []
    for name in ("tensorrt", "tensorrt-rtx") if driver else ("tensorrt-rtx",):
        try:
            return TensorRT(name)
        except BackendError as error:
            refusals.append(str(error))
    raise BackendError(f"no TensorRT to build with ({'; '.join(refusals)}): {INSTALL}")


def cuda_major(flavor: str) -> int | None:
    """CUDA version that an installed package was made for, by the name of its distribution; None if it does not say."""
    names = packages_distributions().get(FLAVORS[flavor].module, [])
    majors = [int(m.group(1)) for name in names if (m := re.search(r"[-_]cu(\d+)", name))]
    return max(majors, default=None)


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version text."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _logger(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[name-defined]
        """Keeps errors for messages, and quiet otherwise."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(text)

    return Log()
