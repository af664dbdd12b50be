"""The process that gives an engine other weights: ``python -m controlrt.engines.tensorrt.refit_child REQUEST.json``.

Weights have the names of the ONNX file that the engine was built from. What the parser makes of nodes itself comes from
its other half, ``OnnxParserRefitter``. That takes weights too, but counts them in its own way: TensorRT 10.11 is known
to say no where none is missing.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.engines.tensorrt.process import REFUSED
from controlrt.engines.tensorrt.request import MODULES, RefitAnswer, RefitRequest

SHOWN = 5
"""Names of weights that an error lists."""


def main(path: str) -> int:
    """Refits what the request at ``path`` asks for."""
    request = msgspec.json.decode(Path(path).read_bytes(), type=RefitRequest)
    trt = importlib.import_module(MODULES[request.flavour])
    started = time.monotonic()
    try:
        engine = _refitted(trt, request)
        refittable = _write(trt, engine, Path(request.refitted))
    except _RefusedError as error:
        print(f"[E] {error}", flush=True)
        return REFUSED
    seconds = round(time.monotonic() - started, 3)
    Path(request.answer).write_bytes(msgspec.json.encode(RefitAnswer(seconds=seconds, refittable=refittable)))
    return 0


class _RefusedError(Exception):
    """The library said no; why, it has logged."""


def _refitted(trt: Any, request: RefitRequest) -> Any:
    """The engine, with other weights."""
    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    if request.version_compatible:
        runtime.engine_host_code_allowed = True  # the plan brings its own runtime; the bundle's hashes vouch
    engine = runtime.deserialize_cuda_engine(Path(request.plan).read_bytes())
    if engine is None:
        raise _RefusedError("the engine does not open here")
    try:
        refitter = trt.Refitter(engine, logger)
    except TypeError:  # how the bindings put a null pointer
        raise _RefusedError("the engine was not built to be refitted") from None
    names = set(refitter.get_all_weights())
    if fixed := sorted(set(request.changed) - names):
        raise _RefusedError(f"the engine keeps these weights as they were built: {_listed(fixed)}")
    weights = _initializers(request.onnx)  # in memory until the refit is done
    given = [name for name in weights if name in names]
    if refused := [name for name in given if not _give(trt, refitter, name, weights[name])]:
        raise _RefusedError(f"the engine does not take {_listed(refused)}")
    if refitter.get_missing_weights():
        trt.OnnxParserRefitter(refitter, logger).refit_from_file(request.onnx)
    if missing := refitter.get_missing_weights():
        raise _RefusedError(f"weights are missing: {_listed(missing)}")
    if not refitter.refit_cuda_engine():
        raise _RefusedError("the refit failed")
    return engine


def _give(trt: Any, refitter: Any, name: str, array: NDArray[Any]) -> bool:
    """Gives one weight in the type that the engine has it in; the bindings do not know all of NumPy's."""
    built = refitter.get_weights_prototype(name)
    fits = (built.size, built.nbytes) == (array.size, array.nbytes)
    return fits and bool(refitter.set_named_weights(name, trt.Weights(built.dtype, array.ctypes.data, array.size)))


def _initializers(onnx: str) -> dict[str, NDArray[Any]]:
    tensors = {name: value.const_value for name, value in ir.load(onnx).graph.initializers.items()}
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items() if tensor is not None}


def _write(trt: Any, engine: Any, file: Path) -> bool:
    """Writes the plan with its weights; returns whether it can be refitted again, which early versions leave out."""
    config, flags = engine.create_serialization_config(), trt.SerializationFlag
    config.clear_flag(flags.EXCLUDE_WEIGHTS)
    again = "INCLUDE_REFIT" in flags.__members__ and config.set_flag(flags.INCLUDE_REFIT)
    plan = engine.serialize_with_config(config)
    if plan is None:
        raise _RefusedError("the engine cannot be written")
    file.write_bytes(memoryview(plan))
    return bool(again)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
