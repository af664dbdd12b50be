"""Fuses ControlNets and the UNet into one step: residuals never leave the graph.

The graphs are joined before any other pass, at the tensors whose names they share: latents, rows, timestep, prompt.
Each ControlNet's hint, scale and regions get its name, such as ``hint.NAME``. Nothing is computed otherwise, so the
fused step gives the picture of the separate ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.graph import only_consumer

OWN_INPUTS = ("hint", "conditioning_scale", "region_")
"""How the names of a ControlNet's inputs begin that are not those of the UNet."""


def fuse(unet: ir.Model, controlnets: Mapping[str, ir.Model]) -> ir.Model:
    """One step of the ControlNets, in this order, and the UNet. The models given stay as they are.

    Args:
        unet: the UNet's step, with inputs ``residual_<i>_in``.
        controlnets: by control name, each with the same residuals as inputs and ``residual_<i>`` as outputs.

    Raises:
        ValueError: a ControlNet whose residuals are not those that the UNet takes.
    """
    fused = unet.clone()
    graph = fused.graph
    first = next(iter(graph))
    shared = {value.name: value for value in graph.inputs if value.name is not None}
    residuals: dict[str, ir.Value] = {}
    for name, controlnet in controlnets.items():
        part = controlnet.clone().graph
        written = [f"{output.name}_in" for output in part.outputs]
        _prefix_names(part, name)
        for value in list(part.inputs):
            given = value.name or ""
            if given in residuals:
                value.replace_all_uses_with(residuals[given])
            elif _is_residual(given):
                _add_nothing_before(value)
            elif given.startswith(OWN_INPUTS):
                own = ir.Value(name=f"{given}.{name}", shape=value.shape, type=value.type)
                graph.inputs.append(own)
                value.replace_all_uses_with(own)
            else:
                value.replace_all_uses_with(shared[given])
        residuals = dict(zip(written, part.outputs, strict=True))
        nodes = list(part)
        part.outputs[:] = []
        part.remove(nodes)
        for key, initializer in list(part.initializers.items()):
            part.initializers.pop(key)
            graph.register_initializer(initializer)
        graph.insert_before(first, nodes)
    taken = {name for name in shared if _is_residual(name)}
    if residuals and set(residuals) != taken:
        raise ValueError(f"the ControlNets give {sorted(residuals)}, the UNet takes {sorted(taken)}")
    for name, value in residuals.items():
        shared[name].replace_all_uses_with(value)
        graph.inputs.remove(shared[name])
    RemoveUnusedNodesPass()(fused)
    return fused


def fused_name(control: str, name: str) -> str:
    """What a node, value or initializer of a ControlNet is called in the fused graph; the UNet's keep their names."""
    return f"{control}/{name}"


def _is_residual(name: str) -> bool:
    return name.startswith("residual_") and name.endswith("_in")


def _prefix_names(graph: ir.Graph, prefix: str) -> None:
    """Names of nodes, values and initializers that no other graph has."""
    for name, initializer in list(graph.initializers.items()):
        graph.initializers.pop(name)
        initializer.name = fused_name(prefix, name)
        graph.register_initializer(initializer)
    for node in graph:
        node.name = fused_name(prefix, node.name or node.outputs[0].name or "")
        for output in node.outputs:
            output.name = fused_name(prefix, output.name or "")


def _add_nothing_before(residual: ir.Value) -> None:
    """Takes away the sum with the residuals before the first ControlNet, which are zero.

    Raises:
        ValueError: the residual is used in any other way than added.
    """
    add = only_consumer(residual)
    if add is None or add.op_type != "Add":
        raise ValueError(f"{residual.name} is not simply added")
    own = add.inputs[1] if add.inputs[0] is residual else add.inputs[0]
    if own is None:
        raise ValueError(f"{residual.name} is added to nothing")
    add.outputs[0].replace_all_uses_with(own, replace_graph_outputs=True)
