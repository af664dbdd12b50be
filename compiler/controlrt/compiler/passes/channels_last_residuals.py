"""Residuals go from program to program with their channels last, as both sides compute them.

Matches graph inputs and outputs that are pictures and pass from a ControlNet to the next one or to the UNet.

Gives the same inputs and outputs with channels last, and a ``Transpose`` inside, for ``SinkTransposes``.

It is exact, where every program of a bundle is compiled with it: the buffers between them have the new shape.

Saves two transposes for each residual of each ControlNet, and one in the UNet.

Comes before ``SinkTransposes``.
"""

from __future__ import annotations

import onnx_ir as ir

from controlrt.compiler.passes.channels_last import TO_FIRST, TO_LAST, last, transpose
from controlrt.compiler.passes.half_precision import PASSED_ON

_MARK = "controlrt.channels"
"""Of a graph's inputs and outputs, for those whose channels are last."""


class ChannelsLastResiduals(ir.passes.InPlacePass):
    """Moves the channels of residuals to the end, between programs; see the module."""

    typed = True
    reshapes_inputs = True
    """Before and after cannot be run on the same inputs."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites ``model``."""
        graph = model.graph
        entering = [value for value in graph.inputs if _passes_on(value)]
        leaving = [index for index, value in enumerate(graph.outputs) if _passes_on(value)]
        for value in entering:
            swapped = last(value)
            after = transpose(value, TO_FIRST, f"{value.name}.first")
            after.outputs[0].shape = value.shape
            value.replace_all_uses_with(after.outputs[0])
            after.replace_input_with(0, value)
            value.shape = swapped
            value.metadata_props[_MARK] = "last"
            next(iter(graph)).prepend(after)
        for index in leaving:
            value = graph.outputs[index]
            before = transpose(value, TO_LAST, value.name or "")
            value.name = f"{value.name}.first"
            graph.append(before)
            before.outputs[0].metadata_props[_MARK] = "last"
            graph.outputs[index] = before.outputs[0]
        return ir.passes.PassResult(model, bool(entering or leaving))


def _passes_on(value: ir.Value) -> bool:
    named = (value.name or "").startswith(PASSED_ON) and _MARK not in value.metadata_props
    return named and value.shape is not None and len(value.shape) == 4
