"""The process that a variant lives in: opens it, then does what the driver says, line by line.

    python -m controlrt.perf.worker SPEC

SPEC is a ``WorkerSpec`` as JSON. Commands come on stdin, one a line, and each is answered by one line of JSON on stdout
(``Reply``): ``step`` runs the step once; ``save FILE`` writes the last outputs as ``.npz``. The first answer comes
unasked, when the variant is loaded. The end of stdin ends the process. Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from controlrt.perf.inputs import StepInputs
from controlrt.perf.memory import peak_memory


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker runs."""

    kind: Literal["compiled", "eager"]
    inputs: str
    """File of the inputs."""
    threads: int
    manifest: str = ""
    """Compiled: the manifest file,"""
    directory: str = ""
    """and the directory that its programs are named in."""
    model: str = ""
    controlnet: str = ""
    """Eager: diffusers folders."""
    channels_last: bool = False


class Reply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One answer."""

    seconds: float = 0.0
    """What the step took."""
    peak_bytes: int = 0
    """The most memory the process has had resident so far (VmHWM), its libraries and mapped weights included."""


class Step(Protocol):
    """What a worker repeats."""

    def run(self) -> None:
        """Runs it once."""

    def outputs(self) -> dict[str, NDArray[np.float32]]:
        """What the last run gave."""


def main() -> None:
    """Serves the step that the command line describes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears Ctrl-C too, and ends its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(open_step(msgspec.json.decode(sys.argv[1], type=WorkerSpec)), sys.stdin, answers)


def open_step(spec: WorkerSpec) -> Step:
    """Loads what ``spec`` describes."""
    inputs = StepInputs.load(Path(spec.inputs))
    if spec.kind == "eager":
        from controlrt.perf.eager_step import EagerStep

        return EagerStep(Path(spec.model), Path(spec.controlnet), inputs, spec.threads, spec.channels_last)
    from controlrt.perf.compiled_step import CompiledStep

    return CompiledStep(Path(spec.directory), Path(spec.manifest), inputs, spec.threads)


def serve(step: Step, commands: TextIO, answers: TextIO) -> None:
    """Answers ``commands`` until they end."""
    _answer(answers, Reply(peak_bytes=peak_memory()))
    for line in commands:
        command, _, argument = line.rstrip("\n").partition(" ")
        seconds = 0.0
        if command == "step":
            started = time.perf_counter()
            step.run()
            seconds = time.perf_counter() - started
        elif command == "save":
            outputs: dict[str, Any] = dict(step.outputs())
            np.savez(argument, **outputs)
        else:
            raise ValueError(f"unknown command {command!r}; there are: step, save FILE")
        _answer(answers, Reply(seconds=seconds, peak_bytes=peak_memory()))


def _answer(answers: TextIO, reply: Reply) -> None:
    answers.write(msgspec.json.encode(reply).decode() + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
