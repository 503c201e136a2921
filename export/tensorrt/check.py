"""What TensorRT makes of a graph, checked before anything is built from it: with or without a GPU, at every export.

TensorRT's parser accepts graphs that it misreads: it drops ``Attention.nonpad_kv_seqlen``, moves the diagonal of
``is_causal``, and takes a cache for an ordinary tensor where a rule is broken. Each of these is an error here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import onnx

from runtimes.errors import ExportError
from runtimes.tensorrt_api import Network

QUERY, MASK, PAST, NONPAD = 0, 3, (4, 5), 6  # inputs of the ONNX operator Attention
FORMATS: dict[int, str] = {onnx.TensorProto.BFLOAT16: "uint16"}
"""Names of number formats that numpy lacks."""


class Census(NamedTuple):
    """What a network consists of."""

    layers: int
    cache_updates: int
    attentions: int


def specs(graph: onnx.GraphProto) -> dict[str, list[dict[str, Any]]]:
    """``inputs`` and ``outputs`` of a graph of fixed shapes, each ``{"name", "dtype", "shape"}``."""

    def spec(value: onnx.ValueInfoProto) -> dict[str, Any]:
        kind = value.type.tensor_type
        dtype = FORMATS.get(kind.elem_type) or onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        return {"name": value.name, "dtype": dtype, "shape": [d.dim_value for d in kind.shape.dim]}

    return {"inputs": [spec(v) for v in graph.input], "outputs": [spec(v) for v in graph.output]}


def check_graph(proto: onnx.ModelProto, caches: list[list[str]]) -> None:
    """Refuse an ONNX graph that TensorRT would misread.

    Args:
        proto: the graph that TensorRT will parse.
        caches: pairs [input name, output name].

    Raises:
        ExportError: names every fault.
    """
    graph, faults = proto.graph, []
    readers = Counter(name for node in graph.node for name in node.input)
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
    updates = []
    for node in graph.node:
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        given = [i for i, name in enumerate(node.input) if name]
        if node.op_type == "Attention":
            if MASK not in given:
                faults.append(f"{node.name} has no mask, so it would read rows that no token has filled")
            elif types.get(node.input[MASK], onnx.TensorProto.BOOL) != onnx.TensorProto.BOOL:
                faults.append(f"{node.name} has a mask that is not boolean")
            if NONPAD in given:
                faults.append(f"{node.name} has nonpad_kv_seqlen, which TensorRT drops without a word")
            if set(PAST) & set(given) or len(node.output) > 1:
                faults.append(f"{node.name} carries its own past, which is not updated in place")
            if options.get("is_causal"):
                faults.append(f"{node.name} has is_causal, which TensorRT aligns to the other corner")
        elif node.op_type == "TensorScatter":
            updates.append([node.input[0], node.output[0]])
            if options.get("mode", b"linear") != b"linear" or options.get("axis", -2) != -2 or len(given) < 3:
                faults.append(f"{node.name} is not a linear update of rows at given places")
    for pair in caches:
        if updates.count(pair) != 1:
            faults.append(f"cache {pair[0]} is not updated into {pair[1]} exactly once")
        if readers[pair[0]] != 1:
            faults.append(f"cache {pair[0]} is read {readers[pair[0]]} times, not by its update alone")
    faults += [f"cache update {pair} is not a cache of the manifest" for pair in updates if pair not in caches]
    _refuse("graph", faults)


def check_network(network: Network, interface: dict[str, Any], blocks: int) -> Census:
    """Compare a parsed network with the interface that the manifest promises.

    Args:
        network: what TensorRT parsed.
        interface: ``inputs``, ``outputs``, ``caches`` as in the manifest.
        blocks: transformer blocks in the graph; each has one attention and two cache updates.

    Raises:
        ExportError: names every fault.
    """
    layers, faults = network.layers(), []
    for side, parsed in (("inputs", network.inputs()), ("outputs", network.outputs())):
        if parsed != (promised := interface[side]):
            odd = [spec for spec in (*parsed, *promised) if spec not in parsed or spec not in promised]
            faults.append(f"its {side} are not the manifest's: {odd or 'another order'}")
    updates = [layer for layer in layers if layer.kind == "KV_CACHE_UPDATE"]
    attentions = [layer for layer in layers if layer.kind == "ATTENTION_INPUT"]
    if len(updates) != 2 * blocks or len(attentions) != blocks:
        faults.append(
            f"it has {len(updates)} native cache updates and {len(attentions)} native attentions, not {2 * blocks} and "
            f"{blocks}: something was decomposed"
        )
    tied = Counter((layer.inputs[0], layer.outputs[0]) for layer in updates)
    readers = Counter(name for layer in layers for name in layer.inputs)
    pairs = [(source, result) for source, result in interface["caches"]]
    for source, result in pairs:
        if tied[source, result] != 1:
            faults.append(f"cache {source} is not tied to {result}")
        if readers[source] != 1:
            faults.append(f"cache {source} is read by {readers[source]} layers, not by its update alone")
    faults += [f"{pair} are tied, but are no pair of the manifest" for pair in tied - Counter(pairs)]
    for layer in attentions:
        if layer.mask != "bool":
            faults.append(f"{layer.name} has mask {layer.mask}, not a boolean one")
        if layer.decomposable:
            faults.append(f"{layer.name} may be decomposed")
    _refuse("network", faults)
    return Census(len(layers), len(updates), len(attentions))


def _refuse(what: str, faults: list[str]) -> None:
    if faults:
        raise ExportError(f"TensorRT would misread this {what}: " + "; ".join(faults))
