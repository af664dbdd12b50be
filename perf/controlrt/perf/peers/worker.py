"""The process that a contender lives in: opens it, then draws what it is asked for, line by line.

    python -m controlrt.perf.peers.worker SPEC

SPEC is a ``PeerSpec`` as JSON. A ``Request`` comes on stdin, one a line, and each is answered by one ``Answer`` on
stdout; the first comes unasked. The end of stdin ends the process. Whatever libraries print goes to stderr, and the
last line there says what went wrong.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np

from controlrt.perf.memory import file_backed_memory, peak_memory
from controlrt.perf.peers.compiling import CACHE_VARIABLE, inductor_cache
from controlrt.perf.peers.drawer import CallSeconds, Drawer, Drawn
from controlrt.perf.peers.specs import (
    Answer,
    BundleSpec,
    EagerSpec,
    PeerSpec,
    PlainSpec,
    Request,
    StableDiffusionCppSpec,
)


def main() -> None:
    """Serves the contender that the command line describes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears Ctrl-C too, and ends its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(open_drawer(msgspec.json.decode(sys.argv[1], type=PeerSpec)), sys.stdin, answers)
    except Exception as error:  # anything that any of the libraries may raise
        traceback.print_exc()
        print(reason(error), file=sys.stderr, flush=True)
        sys.exit(1)


def open_drawer(spec: PeerSpec) -> Drawer:
    """Loads what ``spec`` describes."""
    if isinstance(spec, EagerSpec):
        from controlrt.perf.peers.eager import EagerDrawer

        os.environ.setdefault(CACHE_VARIABLE, str(inductor_cache()))
        options = {name: getattr(spec, name) for name in ("xl", "precision", "device", "threads", "channels_last")}
        return EagerDrawer(spec.model, spec.controlnets, compile_mode=spec.compile_mode, **options)
    if isinstance(spec, BundleSpec):
        from controlrt.perf.peers.bundle import BundleDrawer

        return BundleDrawer(Path(spec.path), spec.threads)
    if isinstance(spec, StableDiffusionCppSpec):
        from controlrt.perf.peers.stable_diffusion_cpp import StableDiffusionCppDrawer

        return StableDiffusionCppDrawer(spec.model, spec.controlnet, precision=spec.precision, threads=spec.threads)
    from controlrt.perf.peers.plain import PlainDrawer

    return PlainDrawer(_plain_bundle(spec), spec.threads, spec.device)


def serve(drawer: Drawer, requests: Iterable[str], answers: TextIO) -> None:
    """Answers ``requests`` until they end."""
    _answer(answers, None)
    for line in requests:
        request = msgspec.json.decode(line, type=Request)
        drawn = drawer.draw(request.call, bool(request.record))
        if request.record:
            _save(drawn, request.record)
        _answer(answers, drawn.seconds)


def reason(error: Exception) -> str:
    """One line that says what went wrong, without the colours of compilers."""
    text = str(error).strip()
    first = text.splitlines()[0].strip() if text else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _plain_bundle(spec: PlainSpec) -> Any:
    from controlrt.runtime.bundle import Bundle

    exported = Bundle.open(spec.export)
    backend = spec.backend or exported.manifest.backend
    return Bundle(exported.path, msgspec.structs.replace(exported.manifest, backend=backend))


def _save(drawn: Drawn, file: str) -> None:
    np.savez(file, pictures=drawn.pictures, latents=np.array(drawn.latents, np.float32))


def _answer(answers: TextIO, seconds: CallSeconds | None) -> None:
    answer = Answer(
        seconds=seconds,
        moment=time.monotonic(),
        peak_host_bytes=peak_memory(),
        file_backed_bytes=file_backed_memory(),
    )
    answers.write(msgspec.json.encode(answer).decode() + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
