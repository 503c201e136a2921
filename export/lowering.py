"""Cached attention, the one operation that each export target computes its own way; and an operator that the exporter
lacks.

Every form of attention appends one token to a cache and attends over what the cache then holds:

    qkv float [B, 1, 3 C] (query, key and value side by side), keys and values float [B, H, Tmax, D],
    length int32 [B] (tokens already cached, less than Tmax), heads H, scales None
    -> output float [B, 1, C], and both caches with the new token in row ``length``

Rows beyond ``length`` never count. Caches start at zero. With ``scales`` float32 [2, H, 1, D], of keys and of values,
``GroupQueryAttention`` caches int8, value / scale to the nearest. In PyTorch floats are cached, which
``export.quantization.weights.CachedProjection`` rounds to such multiples; the other exported forms are not for
quantized models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, INT64
from onnxscript import opset20 as op
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor, Tensor]]
OPSET, TENSORRT_OPSET = 20, 24


def reference_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, heads: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard operators only: what PyTorch runs, and what is exported where no fused kernel fits (CUDA, float32).

    The scatters are in place when an engine binds one buffer on both sides.
    """
    b, _, width = qkv.shape
    q, k, v = qkv.view(b, 3, heads, 1, width // 3 // heads).unbind(1)  # [B, H, 1, D]
    at = length.long()[:, None, None, None]
    keys, values = keys.scatter(2, at.expand_as(k), k), values.scatter(2, at.expand_as(v), v)
    scores = (q @ keys.transpose(2, 3)) * q.shape[-1] ** -0.5  # [B, H, 1, Tmax]
    seen = torch.arange(keys.shape[2], device=qkv.device) <= at
    weight = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    return (weight @ values).view(b, 1, width // 3), keys, values


def grouped_query_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, length: Tensor, heads: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX Runtime's ``GroupQueryAttention`` (CPU). For tracing only; it computes nothing in PyTorch.

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
    """Opset 24's ``TensorScatter`` and ``Attention`` (TensorRT). For tracing only; it computes nothing in PyTorch.

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


LOWERINGS: dict[str, Attention] = {"cpu": grouped_query_attention, "cuda": reference_attention}


def stable_sort(
    self: FLOAT, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[FLOAT, INT64]:
    """``aten.sort.stable`` as TopK, which on ties gives the lower index first."""
    count = op.Shape(self, start=dim, end=dim + 1 or None)
    return op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: stable_sort}
