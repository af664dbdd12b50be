"""A TensorRT of a few lines for machines without a GPU: it builds and refits, and its plans hold weights by name.

A plan is a safetensors file; one without weights has the same names and nothing in them. What it is told to do badly
stands in ``$FAKE_TENSORRT_FAILS``. ``python fake_tensorrt.py build|refit REQUEST.json`` is what controlrt starts.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import safetensors.numpy
from numpy.typing import NDArray

from controlrt.engines.tensorrt import refit_child
from controlrt.engines.tensorrt.process import Ended
from controlrt.engines.tensorrt.request import BuildAnswer, BuildRequest, Tensor

FAILS = "FAKE_TENSORRT_FAILS"
BUILD = (sys.executable, __file__, "build")
REFIT = (sys.executable, __file__, "refit")
Arrays = dict[str, NDArray[Any]]


def weights_of(plan: bytes) -> Arrays:
    """Weights by name; empty arrays where they were stripped."""
    return dict(safetensors.numpy.load(plan))


def traits_of(plan: bytes) -> dict[str, Any]:
    """``refittable``, ``stripped``, and the ``sizes`` of weights by name."""
    header = json.loads(plan[8 : 8 + int.from_bytes(plan[:8], "little")])
    return dict(json.loads(header["__metadata__"]["traits"]))


def make_plan(weights: Arrays, *, refittable: bool, stripped: bool) -> bytes:
    """A plan of its kind."""
    held = {name: np.zeros(0, array.dtype) if stripped else array for name, array in weights.items()}
    sizes = {name: array.size for name, array in weights.items()}
    traits = {"refittable": refittable, "stripped": stripped, "sizes": sizes}
    return safetensors.numpy.save(held, {"traits": json.dumps(traits)})


def initializers(onnx: str) -> Arrays:
    """The real numbers that an ONNX file holds; those of one element are a layer's parameter and no weights."""
    values = ir.load(onnx).graph.initializers.items()
    arrays = {name: value.const_value.numpy() for name, value in values}
    return {
        name: np.ascontiguousarray(array)
        for name, array in arrays.items()
        if np.issubdtype(array.dtype, np.floating) and array.size > 1
    }


class SerializationFlag(enum.Enum):
    EXCLUDE_WEIGHTS = 0
    INCLUDE_REFIT = 2


class Engine:
    def __init__(self, plan: bytes) -> None:
        self.weights, self.traits = weights_of(plan), traits_of(plan)

    def create_serialization_config(self) -> SerializationConfig:
        return SerializationConfig({SerializationFlag.EXCLUDE_WEIGHTS} if self.traits["stripped"] else set())

    def serialize_with_config(self, config: SerializationConfig) -> bytes | None:
        if fails("serialize"):
            return None
        stripped = SerializationFlag.EXCLUDE_WEIGHTS in config.flags
        again = SerializationFlag.INCLUDE_REFIT in config.flags
        return make_plan(self.weights, refittable=again, stripped=stripped)


class SerializationConfig:
    def __init__(self, flags: set[SerializationFlag]) -> None:
        self.flags = flags

    def clear_flag(self, flag: SerializationFlag) -> bool:
        self.flags.discard(flag)
        return True

    def set_flag(self, flag: SerializationFlag) -> bool:
        self.flags.add(flag)
        return True


class Logger:
    WARNING = "warning"

    def __init__(self, severity: str) -> None:
        assert severity == self.WARNING


class Runtime:
    def __init__(self, logger: Logger) -> None:
        del logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if fails("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if fails("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        return None if fails("deserialize") else Engine(plan)


class Refitter:
    def __init__(self, engine: Engine, logger: Logger) -> None:
        del logger
        if not engine.traits["refittable"]:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._engine, self._given = engine, dict[str, NDArray[Any]]()
        self.asked_parser = False

    def get_all_weights(self) -> list[str]:
        return sorted(self._engine.weights)[1 if fails("fixed") else 0 :]

    def get_weights_prototype(self, name: str) -> Any:
        dtype, size = self._engine.weights[name].dtype, self._engine.traits["sizes"][name]
        size += fails("size")
        return SimpleNamespace(dtype=dtype, size=size, nbytes=size * dtype.itemsize)

    def set_named_weights(self, name: str, weights: NDArray[Any]) -> bool:
        self._given[name] = weights
        return not fails("refuse")

    def get_missing_weights(self) -> list[str]:
        by_nodes = [] if self.asked_parser or not fails("node") else ["node.constant"]
        return ["somewhere.weight"] if fails("missing") else by_nodes

    def refit_cuda_engine(self) -> bool:
        if fails("refit"):
            return False
        self._engine.weights |= self._given
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Logger) -> None:
        del logger
        self._refitter = refitter

    def refit_from_file(self, onnx: str) -> bool:
        assert Path(onnx).is_file()
        self._refitter.asked_parser = True
        return False


def Weights(dtype: np.dtype[Any], address: int, count: int) -> NDArray[Any]:  # noqa: N802 - a class of the library
    held = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(held, dtype).copy()


def fails(what: str) -> bool:
    return os.environ.get(FAILS) == what


def run_here(command: Sequence[str], request: msgspec.Struct, scratch: Path) -> Ended:
    """In place of ``run_child``: the same in this process, which is quicker."""
    asked = scratch / "request.json"
    asked.write_bytes(msgspec.json.encode(request))
    code = {BUILD: build, REFIT: refit}[tuple(command)](str(asked))
    return Ended(code=code, log="")


def build(path: str) -> int:
    """What ``controlrt.engines.tensorrt.child`` does."""
    request = msgspec.json.decode(Path(path).read_bytes(), type=BuildRequest)
    graph = ir.load(request.onnx).graph
    stripped = request.options.strip_weights
    plan = make_plan(initializers(request.onnx), refittable=request.options.refittable or stripped, stripped=stripped)
    Path(request.plan).write_bytes(plan)
    answer = BuildAnswer(
        version=installed_version(),
        seconds=1.0,
        phases={},
        inputs=tensors(graph.inputs),
        outputs=tensors(graph.outputs),
    )
    Path(request.answer).write_bytes(msgspec.json.encode(answer))
    return 0


def tensors(values: Iterable[ir.Value]) -> list[Tensor]:
    return [
        Tensor(
            name=str(value.name),
            dtype=value.dtype.numpy().name,
            shape=tuple(dim if isinstance(dim, int) else -1 for dim in value.shape),
            on_host=False,
        )
        for value in values
    ]


def installed_version() -> str:
    """That of the library which is installed, since the manifest is held against it."""
    from controlrt.engines.tensorrt.builder import TensorRtBuilder

    return TensorRtBuilder("tensorrt-rtx").versions()["tensorrt-rtx"]


def refit(path: str) -> int:
    """What ``controlrt.engines.tensorrt.refit_child`` does, with this library in place of TensorRT-RTX."""
    sys.modules["tensorrt_rtx"] = sys.modules[__name__]
    return refit_child.main(path)


if __name__ == "__main__":
    sys.exit({"build": build, "refit": refit}[sys.argv[1]](sys.argv[2]))
