"""What TensorRT's parser reads differently from the other backends, put right in the ONNX file that it is given."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

SOFTMAX_PRECISION = "softmax_precision"
"""Of ``Attention``. The parser refuses it; the kernels that attention is fused into sum exponentials in float32."""


def write_for_parser(file: Path) -> tuple[Path, str]:
    """Writes the variant of ``file`` that TensorRT's parser reads beside it, sharing its weights.

    Returns:
        Its path, and a digest of graph and weights that does not depend on where in their file the weights lie.
    """
    model = ir.load(file)
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes.pop(SOFTMAX_PRECISION, None)
    target = file.with_suffix(".parser.onnx")
    ir.save(model, target)
    return target, _digest(model)


def _digest(model: ir.Model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        content = hashlib.sha256(tensor.tobytes()).hexdigest()
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0{content}\n".encode())
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
    proto = ir.to_proto(model)
    del proto.graph.initializer[:]
    digest.update(proto.SerializeToString(deterministic=True))
    return digest.hexdigest()
