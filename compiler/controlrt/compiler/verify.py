"""Runs graphs before and after a change on seeded inputs and measures the difference."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.reference import Feeds, Reference, entries, relative_error
from controlrt.compiler.weights import WeightStore
from controlrt.runtime.errors import BuildError
from controlrt.runtime.manifest import PassCheck

MAX_RELATIVE_ERROR = 1e-5
"""Of the largest value of an output: what another order of float32 sums costs through a deep network, with room."""

_log = logging.getLogger(__name__)


class VerificationError(BuildError):
    """A pass that changes the result, or leaves a graph that does not run. Both graphs lie in ``directory``."""

    def __init__(self, check: PassCheck, directory: Path) -> None:
        self.check, self.directory = check, directory
        super().__init__(
            f"pass {check.compiler_pass} changes {check.program}: the output differs by {check.max_relative_error:.1e} "
            f"of its largest value, at most {MAX_RELATIVE_ERROR:.0e} is allowed; the graphs before and after are in "
            f"{directory}"
        )


class Verifier:
    """Checks passes and cuts against ``Reference``. A context manager.

    Args:
        dims: sizes of the named dimensions to run with.
        kept: where the graphs of a failing pass are written.
    """

    def __init__(self, dims: Mapping[str, int], kept: Path) -> None:
        self.kept = kept
        self.checks: list[PassCheck] = []
        self._reference = Reference(dims)
        self._last: tuple[ir.Model, dict[str, NDArray[Any]]] | None = None

    def check_pass(self, program: str, compiler_pass: str, before: ir.Model, after: ir.Model) -> None:
        """Records how far ``after`` is from ``before``.

        Raises:
            VerificationError: too far.
        """
        feeds = self._reference.feeds(before)
        expected = self._expected(before, feeds)
        found = self._attempt(after, feeds)
        self._record(program, compiler_pass, expected, found, {"before": before, "after": after})
        self._last = after, found

    def check_cut(self, program: str, before: ir.Model, stages: Mapping[Any, ir.Model]) -> None:
        """Records how far the stages, one after the other, are from the whole.

        Raises:
            VerificationError: too far.
        """
        feeds = self._reference.feeds(before)
        expected = self._expected(before, feeds)
        values = dict(feeds)
        for stage, model in stages.items():
            values |= self._attempt(model, entries(values) if stage == "prompt_timestep" else values)
        graphs = {"before": before} | {f"after.{stage}": model for stage, model in stages.items()}
        self._record(program, "binding times", expected, values, graphs)
        self._last = None

    def close(self) -> None:
        """Removes the scratch files; safe to call twice."""
        self._reference.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _expected(self, before: ir.Model, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """What ``before`` gives; the last ``after`` is not run again."""
        if self._last is not None and self._last[0] is before:
            return self._last[1]
        return self._reference.run(before, feeds)

    def _attempt(self, model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What a changed graph gives: nothing, with the reason in the log, where it does not run."""
        try:
            return self._reference.run(model, feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no class
            _log.error("the changed graph does not run: %s", error)
            return {}

    def _record(
        self,
        program: str,
        compiler_pass: str,
        expected: Mapping[str, NDArray[Any]],
        found: Mapping[str, NDArray[Any]],
        graphs: Mapping[str, ir.Model],
    ) -> None:
        error = max(relative_error(found[name], expected[name]) if name in found else math.inf for name in expected)
        check = PassCheck(program=program, compiler_pass=compiler_pass, max_relative_error=error)
        self.checks.append(check)
        if not error <= MAX_RELATIVE_ERROR:
            self.kept.mkdir(parents=True, exist_ok=True)
            with WeightStore(self.kept) as store:
                for name, model in graphs.items():
                    store.save(model, f"{name}.onnx")
            raise VerificationError(check, self.kept)
