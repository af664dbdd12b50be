"""Long attention in tiles: ONNX Runtime's own operator, which never holds all scores of a head at once.

Matches ``Attention`` (opset 23) in float32 on (rows, tokens, channels), as ``AttentionLayout`` leaves it, with as many
heads of keys as of queries, no mask and nothing else that is asked of it, where the keys are many or their number is
not known when the graph is built and is not that of a prompt's tokens, in words or in pictures.

Gives ``com.microsoft.MultiHeadAttention``, which on the CPU walks over blocks of keys that fit the cache and keeps a
running maximum and sum for the softmax (Dao et al. 2022, arXiv 2205.14135, algorithm 1).

It is exact, up to the order in which a kernel sums.

Saves writing and reading queries x keys scores: 1 GiB for two rows of SD 1.5's 4096 tokens and 8 heads. The operator
alone, float32, one thread of an EPYC, milliseconds, median and in brackets least of nine (the machine was not quiet):

    rows, queries, keys, heads, width    Attention      MultiHeadAttention
    2, 4096, 4096, 8, 40                 1334 (1315)    1077 (1067)
    2, 2304, 2304, 8, 80                 692 (668)      584 (472)
    2, 1024, 1024, 8, 80                 123 (106)      119 (100)
    2, 1024, 77, 8, 80                   5.8 (5.6)      6.4 (6.2)
    2, 64, 77, 8, 160                    0.57 (0.57)    0.68 (0.67)
    1, 4096, 4096, 1, 512                853 (694)      904 (653)

So cross-attention stays as it is, and the VAE's one wide head does.
"""

from __future__ import annotations

import onnx_ir as ir

from controlrt.runtime.image_tokens import tokens_of_one

DOMAIN = "com.microsoft"
MIN_KEYS = 2048
"""With fewer keys there is nothing to gain."""
SHORT = frozenset(("tokens",))
"""Dimensions that are always fewer: a prompt of 16 chunks has 1232 tokens."""
MAX_WIDTH = 256
"""Of a head: a wider one leaves too little of the cache to a tile."""


class TiledAttention(ir.passes.InPlacePass):
    """Gives long attention to ONNX Runtime's operator that works in tiles; see the module.

    Comes after whatever reads ``Attention``: no other pass knows the operator.

    Args:
        min_keys: how many keys an attention has to have, where their number is known.
    """

    def __init__(self, min_keys: int = MIN_KEYS) -> None:
        super().__init__()
        self.min_keys = min_keys

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        found = [self._rewrite(node) for node in tuple(model.graph) if node.op_type == "Attention" and not node.domain]
        if any(found):
            model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, any(found))

    def _rewrite(self, attention: ir.Node) -> bool:
        heads = attention.attributes.get_int("q_num_heads", 0)
        if not heads or not _is_plain(attention) or not self._is_long(attention, heads):
            return False
        scale = attention.attributes.get("scale")
        attributes = [ir.AttrInt64("num_heads", heads), *([scale] if scale is not None else [])]
        (output, *_) = attention.outputs
        tiled = ir.Node(DOMAIN, "MultiHeadAttention", attention.inputs[:3], attributes, name=f"{output.name}.tiled")
        result = tiled.outputs[0]
        result.type, result.shape = output.type, output.shape
        graph = attention.graph
        assert isinstance(graph, ir.Graph)
        ir.convenience.replace_nodes_and_values(graph, attention, [attention], [tiled], [output], [result])
        return True

    def _is_long(self, attention: ir.Node, heads: int) -> bool:
        """Whether the scores are worth tiles: many keys, or nobody knows how many, of heads that are not too wide."""
        shapes = [value.shape if value is not None else None for value in attention.inputs[:3]]
        if any(shape is None or len(shape) != 3 for shape in shapes):
            return False
        query, key, value = (shape for shape in shapes if shape is not None)
        keys, channels = key[1], query[2]
        if not isinstance(channels, int) or not channels == key[2] == value[2] or channels > heads * MAX_WIDTH:
            return False
        if isinstance(keys, int):
            return keys >= self.min_keys
        return keys.value not in SHORT and tokens_of_one(keys.value) is None


def _is_plain(attention: ir.Node) -> bool:
    """Whether it is softmax(scale * q k) v in float32, with as many heads of keys as of queries, and no more."""
    attributes = attention.attributes
    return (
        len(attention.inputs) >= 3
        and all(value is None for value in attention.inputs[3:])
        and all(value is not None and value.dtype == ir.DataType.FLOAT for value in attention.inputs[:3])
        and not any(value.uses() or value.is_graph_output() for value in attention.outputs[1:])
        and attributes.get_int("q_num_heads", 0) == attributes.get_int("kv_num_heads", 0)
        and attributes.get_int("is_causal", 0) == 0
        and attributes.get_float("softcap", 0.0) == 0.0
        and attributes.get_int("softmax_precision", ir.DataType.FLOAT) == ir.DataType.FLOAT
    )
