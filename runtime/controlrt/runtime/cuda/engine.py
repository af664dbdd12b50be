"""What runs one program on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from controlrt.runtime.cuda.device import DeviceArrays
from controlrt.runtime.manifest import Program


class EngineLaunch(Protocol):
    """A launch of a program on arrays that stay where they are: queues work on the engine's stream and returns.

    It may be captured in a graph, once it has run outside of one.
    """

    scratch_bytes: int
    """Device memory that it needs while it runs, beside its arrays and what the engine has itself."""

    def use_scratch(self, address: int) -> None:
        """Says where that memory is; before the first launch."""

    def __call__(self) -> None:
        """Queues it."""


class Engine(Protocol):
    """One compiled program on one device."""

    def bind(self, inputs: DeviceArrays, outputs: DeviceArrays) -> EngineLaunch:
        """A launch that reads and writes these arrays.

        Raises:
            BundleError: shapes that the engine was not built for.
        """

    def close(self) -> None:
        """Lets go of what works on the device's streams, whoever still holds a launch; safe to call twice."""


class Engines(Protocol):
    """Opens engines of one backend on one device."""

    def open(self, program: Program, file: Path, stream: int) -> Engine:
        """Opens the engine of ``program``, which lies in ``file``, to be launched on MAIN or SIDE.

        Raises:
            BundleError: what runs it is missing, or refuses it.
            DeviceMemoryError: it does not fit.
        """

    def close(self) -> None:
        """Lets go of what the engines share, after them; safe to call twice."""
