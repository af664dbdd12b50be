"""What an engine was built from but for the values of its weights, which another checkpoint of the same shape replaces.

It is kept beside engines that can be refitted, as ``programs/NAME.structure.json``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import onnx_ir as ir

from controlrt.runtime.errors import BundleError

_REAL = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Weight(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of weights."""

    dtype: str
    """As NumPy calls it."""
    shape: tuple[int, ...]
    sha256: str
    """Of its bytes."""

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Structure(msgspec.Struct, frozen=True, kw_only=True):
    """Weights by name, and a digest of all the rest."""

    weights: dict[str, Weight]
    graph: str
    """Of inputs, outputs, nodes and constants. Single numbers are constants, and so are integers: a parser may make
    them a layer's parameter, which no refitting reaches."""

    @property
    def digest(self) -> str:
        """Of all of it; weights count by their bytes, wherever in their file they lie."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    def difference(self, other: Structure) -> str | None:
        """What keeps the weights of ``other`` from taking the place of these, in words; None if nothing does."""
        for name in sorted(self.weights.keys() | other.weights.keys()):
            own, new = self.weights.get(name), other.weights.get(name)
            if own is None or new is None:
                return f"weight {name} is in {'the engine' if new is None else 'the checkpoint'} alone"
            if (own.dtype, own.shape) != (new.dtype, new.shape):
                return f"weight {name} is {new}, and {own} in the engine"
        return None if self.graph == other.graph else "its operators or constants are others"

    def changed(self, other: Structure) -> list[str]:
        """The weights of ``other`` that have other values than these."""
        return [name for name, weight in other.weights.items() if weight.sha256 != self.weights[name].sha256]


def structure_file(plan: str) -> str:
    """Where the structure of an engine lies, relative to the bundle, as ``plan`` is."""
    return f"{plan.removesuffix('.plan')}.structure.json"


def structure_of(model: ir.Model) -> Structure:
    """Of a program as TensorRT's parser reads it."""
    weights: dict[str, Weight] = {}
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        content = hashlib.sha256(tensor.tobytes()).hexdigest()
        shape = tuple(int(dim) for dim in tensor.shape.numpy())
        if tensor.dtype in _REAL and tensor.size > 1:
            weights[name] = Weight(dtype=tensor.dtype.numpy().name, shape=shape, sha256=content)
        else:
            digest.update(f"{name}\0{tensor.dtype}\0{shape}\0{content}\n".encode())
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
    digest.update(without_initializers(model))
    return Structure(weights=weights, graph=digest.hexdigest())


def without_initializers(model: ir.Model) -> bytes:
    """Inputs, outputs and nodes; the same bytes for the same graph."""
    proto = ir.to_proto(model)
    del proto.graph.initializer[:]
    return bytes(proto.SerializeToString(deterministic=True))


def read_structure(file: Path) -> Structure:
    """Reads what a build has written.

    Raises:
        BundleError: it is missing or damaged.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=Structure)
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(f"{file} cannot be read: {error}; build the bundle again with build-engines") from error


def write_structure(file: Path, structure: Structure) -> None:
    """Writes it for a later refit."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(structure), indent=1))
