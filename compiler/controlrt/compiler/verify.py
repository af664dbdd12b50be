"""Runs graphs before and after a change on seeded inputs and measures the difference."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.weights import WeightStore
from controlrt.runtime.errors import BuildError
from controlrt.runtime.executors.onnxruntime import open_session
from controlrt.runtime.manifest import PassCheck

MAX_RELATIVE_ERROR = 1e-5
"""Of the largest value of an output: what another order of float32 sums costs through a deep network, with room."""

Feeds = dict[str, NDArray[Any]]
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
    """Checks passes and cuts on ONNX Runtime's CPU provider. A context manager.

    Args:
        dims: sizes of the named dimensions to run with.
        kept: where the graphs of a failing pass are written.
    """

    def __init__(self, dims: Mapping[str, int], kept: Path) -> None:
        self.dims, self.kept = dict(dims), kept
        self.checks: list[PassCheck] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="controlrt-verify-")
        self._store = WeightStore(Path(self._scratch.name))
        self._last: tuple[ir.Model, dict[str, NDArray[Any]]] | None = None

    def check_pass(self, program: str, compiler_pass: str, before: ir.Model, after: ir.Model) -> None:
        """Records how far ``after`` is from ``before``.

        Raises:
            VerificationError: too far.
        """
        feeds = self._feeds(before)
        expected = self._expected(before, feeds)
        found = self._attempt(after, feeds)
        self._record(program, compiler_pass, expected, found, {"before": before, "after": after})
        self._last = after, found

    def check_cut(self, program: str, before: ir.Model, stages: Mapping[Any, ir.Model]) -> None:
        """Records how far the stages, one after the other, are from the whole.

        Raises:
            VerificationError: too far.
        """
        feeds = self._feeds(before)
        expected = self._expected(before, feeds)
        values = dict(feeds)
        for stage, model in stages.items():
            values |= self._attempt(model, _entries(values) if stage == "prompt_timestep" else values)
        graphs = {"before": before} | {f"after.{stage}": model for stage, model in stages.items()}
        self._record(program, "binding times", expected, values, graphs)
        self._last = None

    def close(self) -> None:
        """Removes the scratch files; safe to call twice."""
        self._store.close()
        self._scratch.cleanup()

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
        return self._run(before, feeds)

    def _attempt(self, model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """What a changed graph gives: nothing, with the reason in the log, where it does not run."""
        try:
            return self._run(model, feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no class
            _log.error("the changed graph does not run: %s", error)
            return {}

    def _run(self, model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self._store.save(model, "model.onnx")
        session = open_session(self._store.directory / "model.onnx")
        wanted = {tensor.name for tensor in session.get_inputs()}
        names = [tensor.name for tensor in session.get_outputs()]
        return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))

    def _feeds(self, model: ir.Model) -> Feeds:
        """Seeded inputs: each picture's rows, timesteps over the schedule, normal values otherwise."""
        feeds: Feeds = {}
        for number, value in enumerate(model.graph.inputs):
            rng = np.random.default_rng([0, number])
            if value.shape is None or value.name is None:
                raise ValueError(f"the graph says nothing of the shape of {value.name}")
            shape = [dim if isinstance(dim, int) else self.dims[str(dim.value)] for dim in value.shape]
            if value.name == "rows":
                feeds[value.name] = np.arange(shape[0]) % self.dims["batch"]
            elif value.name == "input_ids":
                feeds[value.name] = rng.integers(0, 400, shape)
            elif value.name == "timestep":
                feeds[value.name] = rng.uniform(0, 999, shape).round().astype(np.float32)
            elif value.name in ("input_scale", "hint", "conditioning_scale", "update", "clip"):
                feeds[value.name] = rng.random(shape, np.float32)
            else:
                feeds[value.name] = rng.standard_normal(shape, np.float32)
        return feeds

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


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference over the largest expected value; infinite where a value is not finite."""
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    return difference / max(float(np.abs(expected).max()), 1e-12) if np.isfinite(difference) else float("inf")


def _entries(feeds: Mapping[str, NDArray[Any]]) -> Feeds:
    """The inputs of a stage whose every entry is a row with its own timestep."""
    return {**feeds, "timestep": feeds["timestep"][feeds["rows"]]}
