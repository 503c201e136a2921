"""Graphs as ONNX Runtime's CUDA kernels want them: fewer of them, and none that is given nothing.

A residual sum, the bias before it and the layer norm after it become one operator. ONNX Runtime does this itself only
where nothing else reads the sum, and in a pre-norm block the next sum always does.
"""

from __future__ import annotations

from collections import Counter

import onnx

DOMAIN = "com.microsoft"


def replace_empty_sums(proto: onnx.ModelProto) -> int:
    """Write the sums over an axis of length 0 as zeros, in place: ONNX Runtime's CUDA kernel refuses them, and a model
    with one segment compares its positions with no further ones.

    Returns:
        how many were replaced.
    """
    graph = proto.graph
    empty = empty_values(graph)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    replaced = 0
    for i, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "ReduceSum" or node.input[0] not in empty:
            continue
        rank = len(empty[node.input[0]])
        axes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
        keep = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        if keep or axes not in ([-1], [rank - 1]):
            continue
        (total,) = node.output
        zero = onnx.helper.make_tensor("zero", kinds[total], [1], [0])
        size = onnx.helper.make_node("Shape", [node.input[0]], [f"{total}_size"], name=f"{node.name}_size", end=-1)
        zeros = onnx.helper.make_node("ConstantOfShape", [f"{total}_size"], [total], name=node.name, value=zero)
        del graph.node[i]
        graph.node.insert(i, zeros)
        graph.node.insert(i, size)
        shape = onnx.helper.make_tensor_value_info(
            f"{total}_size", onnx.TensorProto.INT64, [len(empty[node.input[0]]) - 1]
        )
        graph.value_info.append(shape)
        replaced += 1
    return replaced


def empty_values(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Sizes of the tensors with an axis of length 0, by name; an axis that may have any length counts as -1."""
    sizes = {
        v.name: [d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim]
        for v in graph.value_info
    }
    return {name: dims for name, dims in sizes.items() if 0 in dims}


def fuse_residual_norms(proto: onnx.ModelProto) -> int:
    """Replace ``Add`` (and a bias's ``Add`` before it) and ``LayerNormalization`` by ``SkipLayerNormalization``, whose
    last output is the sum, in place in a graph.

    Returns:
        how many were replaced.
    """
    graph = proto.graph
    makers = {value: node for node in graph.node for value in node.output}
    readers = Counter(value for node in graph.node for value in node.input)
    readers.update(value.name for value in graph.output)
    shapes = {v.name: v.type.tensor_type.shape.SerializeToString() for v in graph.value_info}
    vectors = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    fused: dict[int, onnx.NodeProto] = {}  # by the place of the sum
    gone: set[int] = set()
    for norm in graph.node:
        total = makers.get(norm.input[0]) if norm.op_type == "LayerNormalization" else None
        if total is None or total.op_type != "Add" or len(norm.input) < 3:
            continue
        known = [shapes.get(value) for value in (*total.input, total.output[0])]
        if None in known or len(set(known)) > 1 or id(total) in gone:
            continue
        skip, bias, dropped = total.input[1], "", [total, norm]
        before = makers.get(skip)
        if before is not None and before.op_type == "Add" and readers[skip] == 1 and set(before.input) & vectors:
            bias = next(value for value in before.input if value in vectors)
            skip = next(value for value in before.input if value != bias)
            dropped.append(before)
        inputs = [total.input[0], skip, *norm.input[1:3], bias]
        outputs = [norm.output[0], "", "", total.output[0] if readers[total.output[0]] > 1 else ""]
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        fused[id(total)] = onnx.helper.make_node(
            "SkipLayerNormalization",
            inputs if bias else inputs[:-1],
            outputs if outputs[-1] else outputs[:1],
            name=f"{norm.name}_skip",
            domain=DOMAIN,
            epsilon=epsilon,
        )
        gone.update(map(id, dropped))
    nodes = [fused.get(id(node), node) for node in graph.node if id(node) in fused or id(node) not in gone]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    if fused and all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return len(fused)
