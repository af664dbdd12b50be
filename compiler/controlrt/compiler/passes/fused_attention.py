"""Attention by CUDA's fused kernels: ONNX Runtime's own operator, which never holds all scores of a head at once.

Matches ``Attention`` (opset 23) on (rows, tokens, channels), as ``AttentionLayout`` leaves it, in float16 or float32,
with as many heads of keys as of queries, no mask and nothing else that is asked of it, where a head's width is a
multiple of 8 up to 1024.

Gives ``com.microsoft.MultiHeadAttention``, whose CUDA kernels are flash attention (Dao 2023, arXiv 2307.08691),
cuDNN's, and CUTLASS's for heads of more than 256, such as a VAE's. They read heads where they lie and keep the softmax
in float32 registers, whatever the operands are. Any other ``Attention`` loses its ``softmax_precision``, which ONNX
Runtime's CUDA kernel of it refuses: that one, too, computes the softmax in float32.

It is exact, up to the order in which a kernel sums and to the rounding of the softmax's result to float16.

Saves the scores: 0.5 GiB in float16 for two rows of SD 1.5's 4096 tokens and 8 heads.
"""

from __future__ import annotations

import onnx_ir as ir

DOMAIN = "com.microsoft"
MAX_WIDTH = 1024
"""Of a head."""
_DTYPES = (ir.DataType.FLOAT16, ir.DataType.FLOAT)


class FusedAttention(ir.passes.InPlacePass):
    """Gives every attention that CUDA has a fused kernel for to that kernel; see the module."""

    typed = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        found = [_rewrite(node) for node in tuple(model.graph) if node.op_type == "Attention" and not node.domain]
        if any(node.op_type == "MultiHeadAttention" for node in model.graph):
            model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, any(found))


def _rewrite(attention: ir.Node) -> bool:
    heads = attention.attributes.get_int("q_num_heads", 0)
    if not heads or not _is_plain(attention) or not _fits(attention, heads):
        return attention.attributes.pop("softmax_precision", None) is not None
    scale = attention.attributes.get("scale")
    attributes = [ir.AttrInt64("num_heads", heads), *([scale] if scale is not None else [])]
    output = attention.outputs[0]
    fused = ir.Node(DOMAIN, "MultiHeadAttention", attention.inputs[:3], attributes, name=f"{output.name}.fused")
    result = fused.outputs[0]
    result.name, result.type, result.shape = output.name, output.type, output.shape
    graph = attention.graph
    assert isinstance(graph, ir.Graph)
    ir.convenience.replace_nodes_and_values(graph, attention, [attention], [fused], [output], [result])
    return True


def _fits(attention: ir.Node, heads: int) -> bool:
    """Whether the operands are of one type, three-dimensional, and a head is as wide as the kernels take."""
    operands = [value for value in attention.inputs[:3] if value is not None]
    shapes = [value.shape for value in operands if value.shape is not None and len(value.shape) == 3]
    if len(shapes) != 3 or len({value.dtype for value in operands}) != 1 or operands[0].dtype not in _DTYPES:
        return False
    widths = {shape[2] for shape in shapes}
    width = next(iter(widths))
    return len(widths) == 1 and isinstance(width, int) and width % (8 * heads) == 0 and width // heads <= MAX_WIDTH


def _is_plain(attention: ir.Node) -> bool:
    """Whether it is softmax(scale * q k) v, with as many heads of keys as of queries, and no more."""
    attributes = attention.attributes
    return (
        len(attention.inputs) >= 3
        and all(value is None for value in attention.inputs[3:])
        and not any(value.uses() or value.is_graph_output() for value in attention.outputs[1:])
        and attributes.get_int("q_num_heads", 0) == attributes.get_int("kv_num_heads", 0)
        and attributes.get_int("is_causal", 0) == 0
        and attributes.get_float("softcap", 0.0) == 0.0
    )
