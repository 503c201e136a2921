"""A form of ``training.step.Attention`` for each export target, and an operator that the exporter lacks. The forms here
are for tracing only: they compute nothing in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, INT64
from onnxscript import opset20 as op
from torch import Tensor

from training.step import Attention, reference_attention

OPSET, TENSORRT_OPSET = 20, 24


def grouped_query_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, heads: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX Runtime's ``GroupQueryAttention``, on the CPU and in half precision on CUDA; the one form for models with
    quantized caches, which it holds as int8.

    ``total_sequence_length`` is the whole cache, so that no slot's arithmetic depends on another slot's length.
    """
    total = torch.full((), keys.shape[2], dtype=torch.int32)
    inputs: list[Tensor | None] = [qkv, None, None, keys, values, length, total]
    attrs: dict[str, Any] = {"num_heads": heads, "kv_num_heads": heads, "do_rotary": 0}
    if scales is not None:
        inputs += [None, None, None, None, None, scales[0], scales[1]]
        attrs |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    y, keys, values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attrs=attrs,
        dtypes=[qkv.dtype, keys.dtype, values.dtype],
        shapes=[[qkv.shape[0], 1, qkv.shape[2] // 3], keys.shape, values.shape],
        version=1,
    )
    return y, keys, values


def scatter_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, heads: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Opset 24's ``TensorScatter`` and ``Attention`` (TensorRT).

    TensorRT makes native cache updates and attention of them where each cache is an input of the graph, updated once,
    and the result an output. What may be seen is said by the mask alone: TensorRT's parser drops ``nonpad_kv_seqlen``.
    """
    b, _, width = qkv.shape
    q, k, v = qkv.view(b, 3, heads, 1, width // 3 // heads).unbind(1)  # [B, H, 1, D]
    at = length.long()
    grown = []
    for cache, new in ((keys, k), (values, v)):
        (cache,) = torch.onnx.ops.symbolic_multi_out(
            "TensorScatter",
            [cache, new, at],
            attrs={"axis": -2, "mode": "linear"},
            dtypes=[cache.dtype],
            shapes=[cache.shape],
            version=TENSORRT_OPSET,
        )
        grown.append(cache)
    seen = (torch.arange(keys.shape[2]) <= at[:, None])[:, None, None]  # [B, 1, 1, Tmax]
    (y,) = torch.onnx.ops.symbolic_multi_out(
        "Attention",
        [q, *grown, seen],
        attrs={"is_causal": 0},
        dtypes=[q.dtype],
        shapes=[q.shape],
        version=TENSORRT_OPSET,
    )
    return y.reshape(b, 1, width // 3), grown[0], grown[1]


TARGETS = ("cpu", "cuda")


def attention_for(target: str, precision: str) -> Attention:
    """The form for ONNX Runtime on a target. On CUDA ``GroupQueryAttention`` has kernels for half precision only, so
    float32 is left to standard operators."""
    return reference_attention if target == "cuda" and precision == "fp32" else grouped_query_attention


def stable_sort(
    self: FLOAT, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[FLOAT, INT64]:
    """``aten.sort.stable`` as TopK, which on ties gives the lower index first."""
    count = op.Shape(self, start=dim, end=dim + 1 or None)
    return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: stable_sort}
