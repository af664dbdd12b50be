"""Splits the UNet's step in two: what needs no residuals of ControlNets, and the rest.

A UNet adds the residuals to its skip connections, so its encoder and middle block do not wait for the ControlNets, and
on a GPU, which small tensors do not fill, both run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from controlrt.compiler.binding import dependencies, pruned

RESIDUAL, STATE = "residual", "state"
_STATE_INPUT = "latents"


def split_step(model: ir.Model) -> tuple[ir.Model, ir.Model] | None:
    """Splits a step at its residuals; ``model`` stays as it is.

    What depends on latents and on no residual goes into the first program; what it passes on is called ``encoded_0``,
    ``encoded_1``, ... What depends on neither, such as slices of tables, goes where it is read, to both if need be.

    Args:
        model: in topological order; its inputs for residuals are called ``residual_...``.

    Returns:
        The two programs; None where there is nothing to split, or a shape between them is not known.
    """
    model = model.clone()
    graph = model.graph
    names = [value.name or "" for value in graph.inputs]
    labels = dict.fromkeys(names, "other") | {_STATE_INPUT: STATE}
    labels |= {name: RESIDUAL for name in names if name.startswith("residual_")}
    depends = dependencies(graph, labels)
    crossing = _crossing(graph, depends)
    if RESIDUAL not in labels.values() or not crossing or any(value.shape is None for value in crossing):
        return None
    for number, value in enumerate(crossing):
        value.name = f"encoded_{number}"
    encoder = model.clone()
    by_name = {output.name: output for node in encoder.graph for output in node.outputs}
    encoder.graph.outputs[:] = [by_name[value.name] for value in crossing]
    for value in crossing:
        passed = ir.Value(name=value.name, shape=value.shape, type=value.type)
        value.name = f"{value.name}.inside"
        value.replace_all_uses_with(passed)
        graph.inputs.append(passed)
    return pruned(encoder), pruned(model)


def _crossing(graph: ir.Graph, depends: dict[ir.Value, frozenset[str]]) -> list[ir.Value]:
    """Computed values of the first program that the second reads."""

    def first(value: ir.Value) -> bool:
        found = depends.get(value, frozenset())
        return STATE in found and RESIDUAL not in found

    def reads(nodes: Iterable[ir.Node]) -> bool:
        return any(not first(output) for node in nodes for output in node.outputs)

    return [
        output
        for node in graph
        for output in node.outputs
        if first(output) and not output.is_graph_output() and reads(output.consumers())
    ]
