"""Runs programs with OpenVINO on the CPU: the fast path on x86, of Intel and of AMD.

OpenVINO is used directly. ONNX Runtime's plugin for it runs the same engine, but takes no CPU that is not Intel's.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BundleError
from controlrt.runtime.executors.base import DECODER, ENCODER, Arrays, HostExecutor, Launch
from controlrt.runtime.executors.mapped_weights import released
from controlrt.runtime.manifest import Precision, Program

if TYPE_CHECKING:
    import openvino

_log = logging.getLogger(__name__)

_LARGE = 2**25
"""Bytes of weights from which on a VAE is of a published size (in float16 an encoder has 65 MiB), not a small one."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OpenVinoExecutor(HostExecutor):
    """Compiles a program once for any size, and once for every set of sizes that a plan binds."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(bundle, threads)
        self._any_size: dict[str, openvino.InferRequest] = {}
        self._ran: set[tuple[str, Shapes]] = set()
        """Those of any size that have run, and at which sizes."""
        # those of a plan's sizes hold packed weights, and go with the last plan that launches them
        self._sized: WeakValueDictionary[tuple[str, Shapes], openvino.InferRequest] = WeakValueDictionary()

    def load(self, program: str) -> None:
        """Opens a program that is run at any size; one of the loop opens with the first plan that binds it."""
        if self._bundle.manifest.program(program).stage != "step":
            self._request_of_any_size(program)

    def run(self, program: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See ``HostExecutor``."""
        request, described = self._request_of_any_size(program), self._bundle.manifest.program(program)
        ran = program, tuple((name, array.shape) for name, array in inputs.items())
        large = self._takes_much(described)
        if large:
            _release_scratch(*self._sized.values())
        try:
            if ran in self._ran:
                request.infer(dict(inputs), share_inputs=True)
            else:  # packs its weights, where its sizes vary, and some of them anew for other sizes
                with released(self._bundle.file(described.file).parent):
                    request.infer(dict(inputs), share_inputs=True)
                self._ran.add(ran)
            return {output.name: np.array(request.get_tensor(output.name).data) for output in described.outputs}
        finally:
            if large:
                _release_scratch(request)

    def bind_call(self, program: str, inputs: Arrays, outputs: Arrays) -> Launch:
        """See ``HostExecutor``."""
        import openvino

        shapes = tuple((name, array.shape) for name, array in inputs.items())
        request = self._sized.get((program, shapes))
        if request is None:
            self._sized[program, shapes] = request = self._compile(program, dict(shapes))
        tensors = [
            (name, openvino.Tensor(array, shared_memory=True)) for name, array in (*inputs.items(), *outputs.items())
        ]

        def launch() -> None:
            for name, tensor in tensors:
                request.set_tensor(name, tensor)
            request.infer()

        return launch

    def close(self) -> None:
        """See ``HostExecutor``."""
        self._any_size.clear()
        self._ran.clear()
        self._sized.clear()

    def _request_of_any_size(self, program: str) -> openvino.InferRequest:
        if program not in self._any_size:
            self._any_size[program] = self._compile(program, self._only_shapes(program))
        return self._any_size[program]

    def _takes_much(self, program: Program) -> bool:
        """Whether a program computes in so much memory that steps must not hold theirs beside it: a VAE of a published
        size does, of whole pictures; tiles bound it by themselves."""
        whole = program.name in (DECODER, ENCODER) and self._bundle.manifest.profile.vae_tile is None
        return whole and program.cost is not None and program.cost.weight_bytes >= _LARGE

    def _only_shapes(self, program: str) -> dict[str, tuple[int, ...]] | None:
        """Those that a program runs at, where there are no others: the VAE takes one picture at a time, and a bundle
        may be for one size. OpenVINO lays the memory of fixed sizes out ahead, which takes a third less."""
        if program not in (DECODER, ENCODER):
            return None
        (picture,) = self._bundle.manifest.program(program).inputs
        sides = tuple(side for side in picture.shape[1:] if isinstance(side, int))
        return {picture.name: (1, *sides)} if len(sides) == 3 else None

    def _compile(self, program: str, shapes: dict[str, tuple[int, ...]] | None) -> openvino.InferRequest:
        described = self._bundle.manifest.program(program)
        file = self._bundle.file(described.file)
        seldom = described.stage != "step" and program not in (DECODER, ENCODER)  # once a prompt, picture or schedule
        precision = described.unquantized or described.precision
        compiled = compile_model(file, shapes, self._threads, precision, keep_half=seldom)
        return compiled.create_infer_request()


def compile_model(
    file: Path,
    shapes: dict[str, tuple[int, ...]] | None = None,
    threads: int | None = None,
    precision: Precision = "fp32",
    *,
    keep_half: bool = False,
) -> openvino.CompiledModel:
    """Compiles an ONNX file for the CPU.

    Args:
        file: the ONNX file.
        shapes: of its inputs, by name; as the file says where not given.
        threads: all cores by default.
        precision: what to compute in, where the CPU can; in float32 where it cannot, which is slower and more exact.
            What is in int8 is so in the graph.
        keep_half: whether matrices that the file has in float16, and reads back in float32 to multiply by them, stay
            so in memory. That takes longer, with the same result.

    Raises:
        BundleError: OpenVINO is missing or refuses the file.
    """
    core, model = read_model(file)
    if keep_half:
        _keep_half(model)
    options = {
        "INFERENCE_PRECISION_HINT": _precision_hint(core, precision),  # it would choose by itself
        "PERFORMANCE_HINT": "LATENCY",
        **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
    }
    try:
        if shapes:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        with released(file.parent):
            return core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise BundleError(f"OpenVINO cannot compile {file}: {error}") from error


def _release_scratch(*requests: openvino.InferRequest) -> None:
    """Gives back what programs compute in, which their next run takes anew. None of them may be running."""
    for request in requests:
        request.get_compiled_model().release_memory()


def _keep_half(model: openvino.Model) -> None:
    """Marks what reads float16 matrices back in float32 as OpenVINO's own compression of weights does. Otherwise it
    makes float32 of them, and packs that beside it. An OpenVINO that does not know the mark does so still."""
    for node in model.get_ops():
        if node.get_type_name() != "Convert" or node.input(0).get_element_type().get_type_name() != "f16":
            continue
        read_by = {reader.get_node().get_type_name() for reader in node.output(0).get_target_inputs()}
        weight = node.input_value(0).get_node()
        if weight.get_type_name() == "Constant" and len(weight.output(0).shape) == 2 and read_by == {"MatMul"}:
            node.get_rt_info()["decompression_0"] = ""


_HINTS: dict[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
"""By precision."""


def native_precisions() -> tuple[Precision, ...]:
    """What OpenVINO computes in on this CPU; in float32 where it is asked for another.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    import openvino

    return _native_precisions(openvino.Core())


def _native_precisions(core: openvino.Core) -> tuple[Precision, ...]:
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return tuple(precision for precision in _HINTS if precision.upper() in capabilities)


def _precision_hint(core: openvino.Core, precision: Precision) -> str:
    if precision == "int8":  # of a bundle that does not say what all else is in
        return _HINTS["fp32"]
    if precision in _native_precisions(core):
        return _HINTS[precision]
    _log.info("this CPU does not compute in %s; OpenVINO takes float32", precision)
    return "f32"


def read_model(file: Path) -> tuple[openvino.Core, openvino.Model]:
    """Reads an ONNX file; its weights stay mapped from their file.

    Raises:
        BundleError: OpenVINO is missing or refuses the file.
    """
    try:
        import openvino
    except ModuleNotFoundError:
        raise BundleError(
            "this bundle is for OpenVINO, which is not installed: pip install 'controlrt[openvino]', "
            "or build one for ONNX Runtime with build-engines --backend onnxruntime"
        ) from None
    except ImportError as error:
        raise BundleError(f"OpenVINO is installed, but cannot be imported: {error}") from error
    core = openvino.Core()
    try:
        return core, core.read_model(file)
    except RuntimeError as error:
        raise BundleError(f"OpenVINO {openvino.__version__} cannot read {file}: {error}") from error
