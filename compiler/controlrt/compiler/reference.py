"""Runs graphs on seeded inputs with ONNX Runtime on the CPU: what every change of a graph is held against."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from controlrt.compiler.exact_norms import write_out_group_norms
from controlrt.compiler.standard_form import standard_form
from controlrt.compiler.weights import WeightStore
from controlrt.runtime.executors.onnxruntime import open_session

Feeds = dict[str, NDArray[Any]]


class Reference:
    """A place to run graphs in. A context manager; ``close`` may be called twice.

    Args:
        dims: sizes of the named dimensions to run with.
    """

    def __init__(self, dims: Mapping[str, int]) -> None:
        self.dims = dict(dims)
        self._scratch = tempfile.TemporaryDirectory(prefix="controlrt-reference-")
        self._store = WeightStore(Path(self._scratch.name))

    def run(self, model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
        """The outputs of ``model`` by name; ``feeds`` may hold more than it reads. Group norms in float32 sum exactly.

        Raises:
            BundleError: ONNX Runtime refuses the graph.
        """
        written = standard_form(model).clone()
        write_out_group_norms(written)
        self._store.save(written, "model.onnx")
        session = open_session(self._store.directory / "model.onnx")
        wanted = {tensor.name for tensor in session.get_inputs()}
        names = [tensor.name for tensor in session.get_outputs()]
        return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))

    def feeds(self, model: ir.Model) -> Feeds:
        """Seeded inputs: each picture's rows, timesteps over the schedule, normal values otherwise."""
        feeds: Feeds = {}
        for number, value in enumerate(model.graph.inputs):
            rng = np.random.default_rng([0, number])
            if value.shape is None or value.name is None:
                raise ValueError(f"the graph says nothing of the shape of {value.name}")
            shape = [dim if isinstance(dim, int) else self.dims[str(dim.value)] for dim in value.shape]
            kind = value.name.partition(".")[0]
            if kind == "rows":
                feeds[value.name] = np.arange(shape[0]) % self.dims["batch"]
            elif kind == "input_ids":
                feeds[value.name] = rng.integers(0, 400, shape)
            elif kind == "clip_skip":
                feeds[value.name] = np.zeros(shape, np.int64)
            elif kind == "timestep":
                feeds[value.name] = rng.uniform(0, 999, shape).round().astype(np.float32)
            elif kind in ("input_scale", "hint", "hint_scale", "conditioning_scale", "ip_scale", "update", "clip"):
                feeds[value.name] = rng.random(shape, np.float32)
            else:
                feeds[value.name] = rng.standard_normal(shape, np.float32)
        return feeds

    def close(self) -> None:
        """Removes the scratch files."""
        self._store.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def entries(feeds: Mapping[str, NDArray[Any]]) -> Feeds:
    """The inputs of a stage whose every entry is a row with its own timestep."""
    return {**feeds, "timestep": feeds["timestep"][feeds["rows"]]}


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference over the largest expected value; infinite where a value is not finite."""
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    return difference / max(float(np.abs(expected).max()), 1e-12) if np.isfinite(difference) else float("inf")


def rms_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Root mean square of the difference over that of the expected values; infinite where a value is not finite."""
    difference = float(np.sqrt(np.mean(np.square(found.astype(np.float64) - expected))))
    scale = float(np.sqrt(np.mean(np.square(expected.astype(np.float64)))))
    return difference / max(scale, 1e-12) if np.isfinite(difference) else float("inf")
