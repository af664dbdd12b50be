"""What TensorRT's parser reads differently from the other backends, put right in the ONNX file that it is given."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from controlrt.engines.tensorrt.structure import Structure, structure_of
from controlrt.runtime.errors import BuildError

SOFTMAX_PRECISION = "softmax_precision"
"""Of ``Attention``. The parser refuses it; the kernels that attention is fused into sum exponentials in float32."""


def write_for_parser(program: str, file: Path) -> tuple[Path, Structure]:
    """Writes the variant of ``file`` that TensorRT's parser reads beside it, sharing its weights.

    Args:
        program: its name, for errors.
        file: its ONNX file, weights beside it.

    Returns:
        The variant's path, and what is in it.

    Raises:
        BuildError: the file or its weights cannot be read.
    """
    target = file.with_suffix(".parser.onnx")
    try:
        model = ir.load(file)
        for node in model.graph:
            if node.op_type == "Attention":
                node.attributes.pop(SOFTMAX_PRECISION, None)
        ir.save(model, target)
        return target, structure_of(model)
    except Exception as error:  # protobuf's and onnx-ir's exceptions share no base class
        raise BuildError(
            f"program {program}: its ONNX and weights cannot be read ({error}); is the disk full or failing?"
        ) from error
