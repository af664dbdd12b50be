"""Small graphs from text, and running graphs in ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

_TYPES = {"float32": "float", "float16": "float16", "int64": "int64", "uint8": "uint8", "bool": "bool"}
"""NumPy's names and those of ONNX text."""


def graph_of(inputs: str, outputs: str, body: str, infer: bool = True, **constants: Any) -> ir.Model:
    """A model of ``body``: text as onnx.parser reads it.

    Args:
        inputs, outputs: ``float[batch, 4] x, int64[rows] rows``.
        body: nodes, one after the other; operators of domain "local" are not known to anyone.
        infer: record the shapes of intermediate values.
        constants: initializers by name; integers are int64, other values float32 unless they are arrays.
    """
    tensors = [ir.tensor(_array(value), name=name) for name, value in constants.items()]
    declared = ", ".join(
        f"{_TYPES[tensor.numpy().dtype.name]}[{','.join(map(str, tensor.shape))}] {tensor.name}" for tensor in tensors
    )
    header = '<ir_version: 10, opset_import: ["": 23, "local": 1, "com.microsoft": 1]>'
    model = ir.from_onnx_text(f"{header} agraph ({inputs}) => ({outputs}) <{declared}> {{ {body} }}", tensors)
    if infer:
        ShapeInferencePass()(model)
    return model


def read_by(body: str, constants: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``constants`` that nodes of ``body`` read."""
    read = {name for operands in re.findall(r"\(([^()]*)\)", body) for name in re.findall(r"\w+", operands)}
    return {name: value for name, value in constants.items() if name in read}


def _array(value: Any) -> NDArray[Any]:
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    """The graph as it is, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    ir.external_data.load_to_model(model)
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def feed(running: onnxruntime.InferenceSession, values: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Outputs by name; ``values`` may hold more than the graph takes."""
    wanted = {tensor.name for tensor in running.get_inputs()}
    names = [tensor.name for tensor in running.get_outputs()]
    return dict(zip(names, running.run(names, {k: v for k, v in values.items() if k in wanted}), strict=True))


def run(model: ir.Model, **values: Any) -> dict[str, NDArray[Any]]:
    """Runs ``model`` once."""
    return feed(session(model), values)


def contents(model: ir.Model) -> bytes:
    """Equal for equal models."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def ancestors(value: ir.Value) -> set[ir.Value]:
    """Everything that ``value`` is computed from, and itself."""
    found: set[ir.Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        found.add(current)
        producer = current.producer()
        if producer is not None:
            pending += [read for read in producer.inputs if read is not None]
    return found
