"""Taps: outputs beside a program's own that tell what its layers read, without any tensor leaving the program whole.

For every value x that layers read there are two: the largest magnitude of each channel, over everything, and the values
at positions that are drawn anew for every launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from controlrt.compiler.quantization.layers import Layer, layers_of
from controlrt.runtime.errors import BuildError

SAMPLES = 4096
"""Values that a launch samples of each x."""
MAX_RANK = 4
POSITIONS = "tap.positions"
"""The extra input, (SAMPLES, MAX_RANK) float64 in [0, 1): where the samples lie, as a fraction of each axis. A value of
fewer axes has the first columns."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Two outputs, float32."""

    amax: str
    """(channels,): the largest magnitude of each channel; not a number where a value of x is infinite or no number."""
    sample: str
    """(SAMPLES,): values of x."""
    channels: int
    layers: tuple[str, ...]
    """The layers that read x."""


def add_taps(graph: ir.Graph) -> tuple[Tap, ...]:
    """Adds taps for everything that layers of ``graph`` read, in its order, and the input ``POSITIONS``.

    Raises:
        BuildError: a graph that says nothing of the shape of what a layer reads.
    """
    readers: dict[tuple[ir.Value, int], list[Layer]] = {}
    for layer in layers_of(graph):
        readers.setdefault((layer.input, layer.channels_axis), []).append(layer)
    if not readers:
        return ()
    positions = ir.val(POSITIONS, ir.DataType.DOUBLE, (SAMPLES, MAX_RANK))
    graph.inputs.append(positions)
    writer = _Writer(positions)
    taps = [writer.tap(number, layers) for number, layers in enumerate(readers.values())]
    for number, node in enumerate(writer.tape.nodes):
        for output in node.outputs:
            output.name = output.name or f"tap.value.{number}"
    graph.extend(writer.tape.nodes)
    graph.outputs.extend(writer.outputs)
    return tuple(taps)


class _Writer:
    """Writes the nodes of taps."""

    def __init__(self, positions: ir.Value) -> None:
        self.positions, self.tape = positions, ir.tape.Tape()
        self.outputs: list[ir.Value] = []
        self._columns: dict[int, ir.Value] = {}

    def tap(self, number: int, layers: list[Layer]) -> Tap:
        layer = layers[0]
        shape = layer.weight.shape
        channels = shape[layer.input_axis] if shape is not None else None
        if not isinstance(channels, int):
            raise BuildError(f"the graph says nothing of the shape of the weights of {layer.name}")
        amax = self._output(f"tap.{number}.amax", self._amax(layer), channels)
        sample = self._output(f"tap.{number}.sample", self._sample(layer), SAMPLES)
        names = tuple(dict.fromkeys(each.name for each in layers))
        return Tap(amax=amax, sample=sample, channels=channels, layers=names)

    def _amax(self, layer: Layer) -> ir.Value:
        """A maximum passes over what is not a number, a sum does not."""
        rank = _rank(layer)
        others = self._ints(*(axis for axis in range(rank) if axis != layer.channels_axis % rank))
        magnitudes = self.tape.op("Abs", [layer.input])
        largest = self.tape.op("ReduceMax", [magnitudes, others], {"keepdims": 0})
        total = self.tape.op("ReduceSum", [magnitudes], {"keepdims": 0})
        zero = self.tape.op("Mul", [total, self.tape.op("Constant", [], {"value": ir.tensor(np.float32(0))})])
        return self.tape.op("Add", [largest, zero])

    def _sample(self, layer: Layer) -> ir.Value:
        """Each axis has its own fractions, so the places are spread evenly over all elements."""
        sides = self.tape.op("Cast", [self.tape.op("Shape", [layer.input])], {"to": ir.DataType.DOUBLE})
        places = self.tape.op("Mul", [self._fractions(_rank(layer)), sides])
        return self.tape.op("GatherND", [layer.input, self.tape.op("Cast", [places], {"to": ir.DataType.INT64})])

    def _fractions(self, rank: int) -> ir.Value:
        """(SAMPLES, rank)."""
        if rank not in self._columns:
            ends = [self._ints(0), self._ints(rank), self._ints(1)]
            self._columns[rank] = self.tape.op("Slice", [self.positions, *ends])
        return self._columns[rank]

    def _ints(self, *values: int) -> ir.Value:
        return self.tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})

    def _output(self, name: str, value: ir.Value, length: int) -> str:
        value.name, value.shape, value.type = name, ir.Shape([length]), ir.TensorType(ir.DataType.FLOAT)
        self.outputs.append(value)
        return name


def _rank(layer: Layer) -> int:
    """How many axes the layer's input has."""
    shape = layer.input.shape
    if layer.node.op_type == "MatMul" and shape is None:
        raise BuildError(f"the graph says nothing of the shape of what {layer.name} reads")
    rank = len(shape) if shape is not None else len(layer.weight.shape or ())
    if rank > MAX_RANK:
        raise BuildError(f"{layer.name} reads a value of {rank} axes; calibration knows up to {MAX_RANK}")
    return rank
