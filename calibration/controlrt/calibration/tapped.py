"""Runs a bundle in ONNX Runtime and listens at the taps of the programs of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.calibration.taps import MAX_RANK, POSITIONS, SAMPLES, Tap, add_taps
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executors.base import DECODER, Arrays, Launch
from controlrt.runtime.executors.onnxruntime import OnnxRuntimeExecutor, open_session

if TYPE_CHECKING:
    import onnxruntime as ort

TAPPED_STAGES = ("encode", "step")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one tap gave at one launch."""

    part: str
    """Of the program."""
    layers: tuple[str, ...]
    amax: NDArray[np.float32]
    """(channels,): see ``Tap``."""
    sample: NDArray[np.float32]
    """(SAMPLES,)."""


class TappedExecutor(OnnxRuntimeExecutor):
    """See ``OnnxRuntimeExecutor``; the programs on disk stay as they are.

    Args:
        bundle: an opened bundle of the backend onnxruntime.
        threads: CPU threads; all cores by default.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(bundle, threads)
        self._taps: dict[str, tuple[Tap, ...]] = {}
        self._outputs: dict[str, dict[str, NDArray[np.float32]]] = {}
        self._positions = np.zeros((SAMPLES, MAX_RANK))
        self._launched: list[str] = []
        self._generator = np.random.default_rng(0)

    def seed(self, *seed: int) -> None:
        """Draws the positions of all later launches from ``seed``, and forgets what was read so far."""
        self._generator = np.random.default_rng(seed)
        self._launched.clear()

    def readings(self) -> Iterator[Reading]:
        """What the taps gave in the launches since the last call, in the order of programs and layers.

        Arrays are the next launch's too; whoever keeps them copies them.
        """
        launched, self._launched = self._launched, []
        for program in launched:
            part, outputs = self._bundle.manifest.program(program).part, self._outputs[program]
            for tap in self._taps[program]:
                yield Reading(part=part, layers=tap.layers, amax=outputs[tap.amax], sample=outputs[tap.sample])

    def run(self, program: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See ``HostExecutor``. The decoder runs where the steps gave back what they computed in."""
        if program == DECODER and self._bundle.manifest.profile.vae_tile is None:
            self.release_scratch()
        return super().run(program, inputs)

    def bind_call(self, program: str, inputs: Arrays, outputs: Arrays) -> Launch:
        """See ``HostExecutor``."""
        self.load(program)
        if not self._taps.get(program):
            return super().bind_call(program, inputs, outputs)
        tapped = {**inputs, POSITIONS: self._positions}
        launch = super().bind_call(program, tapped, {**outputs, **self._outputs[program]})

        def launch_tapped() -> None:
            self._generator.random(out=self._positions)
            launch()
            self._launched.append(program)

        return launch_tapped

    def _open(self, program: str) -> ort.InferenceSession:
        entry = self._bundle.manifest.program(program)
        if entry.stage not in TAPPED_STAGES:
            return super()._open(program)
        file = self._bundle.file(entry.file)
        model = ir.load(file)
        self._taps[program] = taps = add_taps(model.graph)
        self._outputs[program] = _buffers(taps)
        return open_session(file, self._threads, _serialized(model))


def _buffers(taps: tuple[Tap, ...]) -> dict[str, NDArray[np.float32]]:
    """The outputs of all taps, by name."""
    sizes = [(tap.amax, tap.channels) for tap in taps] + [(tap.sample, SAMPLES) for tap in taps]
    return {name: np.zeros(size, np.float32) for name, size in sizes}


def _serialized(model: ir.Model) -> bytes:
    """The file's contents; weights that lie beside it stay there."""
    proto: Any = ir.to_proto(model)
    contents: bytes = proto.SerializeToString()
    return contents
