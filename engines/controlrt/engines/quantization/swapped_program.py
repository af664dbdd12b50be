"""A bundle with one program in place of another, and what that one is run on."""

from __future__ import annotations

from typing import Any

import msgspec
from numpy.typing import NDArray

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.executors import HostExecutor
from controlrt.runtime.executors.base import Arrays, Launch
from controlrt.runtime.manifest import Program


class SwappedExecutor(HostExecutor):
    """Runs all but one program in ``rest``, which stays open, and that one by itself.

    Args:
        bundle: where all of them are.
        rest: what is left open for the next one.
        own: what runs the program in question; closed with this.
        program: its name.
    """

    def __init__(self, bundle: Bundle, rest: HostExecutor, own: HostExecutor, program: str) -> None:
        super().__init__(bundle)
        self.bundle = bundle
        self.largest: tuple[Arrays, Arrays] = ({}, {})
        """Inputs and outputs that the program was bound to, of those with the most bytes."""
        self._rest, self._own, self._program = rest, own, program

    def load(self, program: str) -> None:
        """See ``Executor``."""
        self._of(program).load(program)

    def run(self, program: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See ``Executor``."""
        return self._of(program).run(program, inputs)

    def bind_call(self, program: str, inputs: Arrays, outputs: Arrays) -> Launch:
        """See ``HostExecutor``."""
        if program == self._program and _bytes(inputs) >= _bytes(self.largest[0]):
            self.largest = inputs, outputs
        return self._of(program).bind_call(program, inputs, outputs)

    def close(self) -> None:
        """Closes what is its own."""
        if self._own is not self._rest:
            self._own.close()

    def _of(self, program: str) -> HostExecutor:
        return self._own if program == self._program else self._rest


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def with_program(bundle: Bundle, program: Program) -> Bundle:
    """``bundle`` with ``program`` in place of the one of its name."""
    programs = tuple(program if each.name == program.name else each for each in bundle.manifest.programs)
    files = {**bundle.manifest.files, program.file: ""}
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, programs=programs, files=files))
