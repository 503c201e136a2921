"""Narrow number formats decided in the graph, as TensorRT's strongly typed networks and ONNX Runtime on CUDA want it.

The convolutional networks and the transformer compute in the narrow format. Around them stays float32 what decides
between neighbours: entropy and routers, the masker's scores, distances to codes and the codebook, the softmax of the
tokenizers' attention, logits once they leave a head, sampling; normalisations sum in float32 in every backend.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from runtimes.errors import ConfigError
from training.checkpoint import Model

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NETWORKS = ("encoder", "demasker", "decoder")
"""Parts of a tokenizer that compute in the narrow format; it lacks those of the other family."""


class Narrow(nn.Module):
    """A module computing in a narrow format between float32 inputs and outputs; other dtypes pass unchanged."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner.to(dtype), dtype

    def forward(self, *inputs: Tensor) -> Any:
        out = self.inner(*(x.to(self.dtype) if x.is_floating_point() else x for x in inputs))
        return tuple(part.float() for part in out) if isinstance(out, tuple) else out.float()


class Constant(nn.Module):
    """A module that always gives the same tensor."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)

    def forward(self) -> Tensor:
        return self.value


def narrow(model: Model, precision: str, tokenizer: bool = True) -> Model:
    """A copy of a whole model that computes in ``fp32`` (unchanged), ``fp16`` or ``bf16``; for tracing. ``tokenizer``
    says whether its networks do too.

    Raises:
        ConfigError: the precision is another one.
    """
    if precision not in list(PRECISIONS):
        raise ConfigError(f"precision is {precision!r}; it must be one of {sorted(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if precision == "fp32":
        return model
    vae, net = model.both()
    decoder = vae.get_submodule("decoder")
    for name, part in list(decoder.named_children()):
        if tokenizer and name.startswith("position_bias"):  # a constant: computed wide, rounded once
            setattr(decoder, name, Constant(part()))
    for name in NETWORKS:
        if tokenizer and hasattr(vae, name):
            setattr(vae, name, Narrow(getattr(vae, name), dtype))
    net.to(dtype)
    if net.text is not None:  # a graph of its own, once for each prompt
        net.text.float()
    for name in ("position_head", "content_head"):
        setattr(net, name, Narrow(getattr(net, name), dtype))
    return model
