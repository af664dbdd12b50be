"""Gives engines other weights, each in a process of its own."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from controlrt.engines.tensorrt import refit_child
from controlrt.engines.tensorrt.builder import TensorRtBuilder
from controlrt.engines.tensorrt.process import REFUSED, Ended, refuse_full_disk, run_child
from controlrt.engines.tensorrt.request import Flavour, RefitAnswer, RefitRequest
from controlrt.runtime.cuda.gpu import RTX_CAPABILITIES, find_gpu
from controlrt.runtime.errors import BuildError, DeviceError, UserError
from controlrt.runtime.manifest import Engine, Program

CHILD = (sys.executable, "-m", refit_child.__name__)


class TensorRtRefitter:
    """TensorRT's refitter, or that of TensorRT-RTX; both need a GPU that the engines run on."""

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour
        self._builder = TensorRtBuilder(flavour)

    def check(self, engines: Iterable[Engine]) -> None:
        """Refuses what cannot be refitted on this machine.

        Raises:
            UserError: the library is absent or of another version.
            DeviceError: no GPU, or not one of theirs.
        """
        gpu = find_gpu()
        if gpu is None:
            raise DeviceError(
                "engines are refitted on a GPU that runs them, and there is none here; "
                "refit the bundle on the machine that will draw"
            )
        if not self._builder.is_installed():
            raise UserError(f"{self.flavour} is not installed here; pip install 'controlrt[{self.flavour}]'")
        here, version = gpu.compute_capability, self._builder.versions()[self.flavour]
        for engine in engines:
            if not f"{version}.".startswith(f"{engine.version}."):  # a wheel's may have more to it than the library's
                raise UserError(
                    f"the engines were built by {self.flavour} {engine.version}, here is {version}; install that, or "
                    "build the bundle again with build-engines"
                )
            capabilities = engine.compute_capabilities or RTX_CAPABILITIES
            if here not in capabilities:
                raise DeviceError(
                    f"the engines run on GPUs of compute capability {', '.join(capabilities)}, and {gpu.name} has "
                    f"{here}; refit the bundle on the machine that will draw"
                )

    def refit(self, program: Program, onnx: Path, changed: Sequence[str], plan: Path, target: Path) -> Program:
        """Writes the engine of ``program`` with other weights.

        Args:
            program: its manifest entry.
            onnx: what the parser reads, the new weights beside it.
            changed: names of the weights that have other values.
            plan: the engine as it is.
            target: where it goes.

        Returns:
            The manifest entry of the new engine.

        Raises:
            BuildError: TensorRT refuses it, crashes or is killed.
            OutputError: no space left.
        """
        if program.engine is None:
            raise BuildError(f"program {program.name} is no engine; build the bundle again with build-engines")
        with tempfile.TemporaryDirectory(prefix="controlrt-refit-") as scratch:
            request = RefitRequest(
                flavour=self.flavour,
                onnx=str(onnx),
                plan=str(plan),
                refitted=str(target),
                answer=f"{scratch}/answer.json",
                changed=list(changed),
                version_compatible=program.engine.version_compatible,
            )
            ended = run_child(CHILD, request, Path(scratch))
            if ended.code != 0 or not Path(request.answer).is_file():
                raise self._failure(program.name, ended)
            answer = msgspec.json.decode(Path(request.answer).read_bytes(), type=RefitAnswer)
        engine = msgspec.structs.replace(
            program.engine, stripped=False, refittable=answer.refittable, refit_seconds=answer.seconds
        )
        return msgspec.structs.replace(program, engine=engine)

    def _failure(self, name: str, ended: Ended) -> BuildError:
        refuse_full_disk(ended, f"refitting the engine of {name}")
        mend = "build a bundle of these weights with build-engines"
        if ended.code == -signal.SIGKILL:
            mend = "was there enough memory? end what else uses it"
        elif ended.code > 0 and ended.code != REFUSED:
            mend = f"is it whole? pip install 'controlrt[{self.flavour}]'"
        return BuildError(
            f"program {name}: {self.flavour} {ended.how} when it is refitted; {mend}. The end of its log:\n"
            f"{ended.end_of_log}"
        )
