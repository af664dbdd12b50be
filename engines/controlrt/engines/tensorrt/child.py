"""The process that runs the builder: ``python -m controlrt.engines.tensorrt.child REQUEST.json``.

It may end in any way, since the builder is native code: ``build.py`` looks at what is left of it. Standard output and
error are the log.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from controlrt.engines.tensorrt.process import REFUSED
from controlrt.engines.tensorrt.request import MODULES, BuildAnswer, BuildRequest, Tensor

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "UINT8": "uint8"}


def main(path: str) -> int:
    """Builds what the request at ``path`` asks for."""
    request = msgspec.json.decode(Path(path).read_bytes(), type=BuildRequest)
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if request.flavour == "tensorrt-rtx" else "0"
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path, set_decomposable_attentions
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    phases = _phase_times(request)
    started = time.monotonic()
    try:
        builder, network, parser = network_from_onnx_path(request.onnx, strongly_typed=True)
        inputs = [_tensor(network.get_input(index)) for index in range(network.num_inputs)]
        outputs = [_tensor(network.get_output(index)) for index in range(network.num_outputs)]
        if hasattr(_module(request).LayerType, "ATTENTION_INPUT"):  # as matrix products where no fused kernel takes it
            set_decomposable_attentions((builder, network, parser))
        plan = engine_bytes_from_network(
            (builder, network, parser), config=_config(request, phases), save_timing_cache=request.timing_cache
        )
    except PolygraphyException as error:  # it has logged the reasons
        print(f"[E] {error}", flush=True)
        return REFUSED
    Path(request.plan).write_bytes(memoryview(plan))
    seconds = round(time.monotonic() - started, 3)
    answer = BuildAnswer(
        version=_module(request).__version__, seconds=seconds, phases=phases.seconds, inputs=inputs, outputs=outputs
    )
    Path(request.answer).write_bytes(msgspec.json.encode(answer))
    return 0


def _tensor(tensor: Any) -> Tensor:
    kind = tensor.dtype.name
    return Tensor(
        name=tensor.name, dtype=_DTYPES.get(kind, kind), shape=tuple(tensor.shape), on_host=tensor.is_shape_tensor
    )


def _config(request: BuildRequest, phases: Any) -> Any:
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile
    from polygraphy.exception import PolygraphyException

    trt, options = _module(request), request.options
    profiles = []
    for shapes in request.profiles:
        profile = Profile()
        for name, (low, best, high) in shapes.items():
            profile.add(name, min=low, opt=best, max=high)
        profiles.append(profile)
    limits = None
    if options.workspace_mib is not None:
        limits = {trt.MemoryPoolType.WORKSPACE: options.workspace_mib * 2**20}
    config = CreateConfig(
        profiles=profiles,
        memory_pool_limits=limits,
        builder_optimization_level=options.optimization_level,
        max_aux_streams=options.aux_streams,
        refittable=options.refittable or options.strip_weights,
        strip_plan=options.strip_weights,
        version_compatible=options.version_compatible,
        load_timing_cache=request.timing_cache if _exists(request.timing_cache) else None,
        progress_monitor=phases,
    )
    targets = options.compute_capabilities if request.flavour == "tensorrt-rtx" else ()

    def target(builder: Any, network: Any, config: Any) -> None:
        del builder, network
        config.num_compute_capabilities = len(targets)
        for index, name in enumerate(targets):
            capability = trt.ComputeCapability.__members__[f"SM{name.replace('.', '')}"]
            if config.set_compute_capability(capability, index) is False:
                raise PolygraphyException(f"compute capability {name} is refused")

    return PostprocessConfig(config, target) if targets else config


def _phase_times(request: BuildRequest) -> Any:
    """A progress monitor that notes how long each innermost phase took."""
    trt = _module(request)

    class PhaseTimes(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.seconds: dict[str, float] = {}
            self._started: dict[str, float] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del num_steps
            self._started[phase_name] = time.monotonic()
            self._started.pop(parent_phase or "", None)

        def phase_finish(self, phase_name: str) -> None:
            started = self._started.pop(phase_name, None)
            if started is not None:
                spent = self.seconds.get(phase_name, 0.0) + time.monotonic() - started
                self.seconds[phase_name] = round(spent, 3)

        def step_complete(self, phase_name: str, step: int) -> bool:
            del phase_name, step
            return True

    return PhaseTimes()


def _module(request: BuildRequest) -> Any:
    """The builder; the one place that knows which of the two it is."""
    return importlib.import_module(MODULES[request.flavour])


def _exists(path: str | None) -> bool:
    return path is not None and os.path.exists(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
