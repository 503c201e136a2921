"""Find, watch and replace layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and layers of a transformer's step, in the order in which they run; the text encoder runs once an image."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith("text."):
            yield name, layer


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one of that name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


@contextmanager
def watching(layers: Iterable[tuple[str, nn.Module]], look: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``look`` with the name, the input and the output of every layer that runs."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: look(name, inputs[0], output)

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
