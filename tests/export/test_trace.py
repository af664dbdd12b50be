"""Tracing: dynamic sizes, and that a program that differs from PyTorch is not let through."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import pytest
import torch
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, nn

from controlrt.export import trace
from controlrt.export.programs import ProgramSpec
from controlrt.runtime.errors import BuildError
from controlrt.runtime.executors.onnxruntime import open_session
from controlrt.runtime.manifest import TensorSpec
from controlrt.runtime.profile import ShapeProfile


class Halve(nn.Module):
    """A convolution to half size and a mean over rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 5, 3, stride=2, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        return self.convolution(picture)


class Broken(Halve):
    """Traced as something else than it computes."""

    def forward(self, picture: Tensor) -> Tensor:
        result = super().forward(picture)
        return result * 1.01 if torch.compiler.is_exporting() else result


def spec(module: nn.Module) -> ProgramSpec:
    def example(_: TensorSpec, shape: tuple[int, ...], __: dict[str, int], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator)

    return ProgramSpec(
        name="halve",
        module=module.eval(),
        inputs={"picture": TensorSpec(name="picture", dtype="float32", shape=("batch", 3, "height", "width"))},
        outputs=(TensorSpec(name="small", dtype="float32", shape=("batch", 5, "height/2", "width/2")),),
        example=example,
    )


@pytest.mark.parametrize("profile", ["64x128", "64-192x64", "64-128x64-192", "64x64,192x128"])
def test_every_size_of_the_profile(tmp_path: Path, profile: str) -> None:
    shapes = ShapeProfile.parse(profile, "1-4")
    module = Halve().eval()
    program = trace.export_program(spec(module), shapes, tmp_path)
    assert program.max_relative_error < 1e-5
    session = open_session(tmp_path / "halve.onnx")
    for size in shapes.sizes:
        for width, height in ((size.width.low, size.height.high), (size.width.high, size.height.low)):
            picture = torch.randn(3, 3, height, width)
            (found,) = session.run(None, {"picture": picture.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), module(picture), rtol=1e-5, atol=1e-5)


def test_fixed_sides_are_numbers(tmp_path: Path) -> None:
    program = trace.export_program(spec(Halve()), ShapeProfile.parse("64-128x192"), tmp_path)
    assert program.inputs[0].shape == ("batch", 3, 192, "width")
    assert program.outputs[0].shape == ("batch", 5, 96, "width/2")


@pytest.mark.parametrize("module", [Broken()])
def test_a_graph_that_differs_is_refused(tmp_path: Path, module: Any) -> None:
    with pytest.raises(BuildError, match="halve: the ONNX graph differs from PyTorch"):
        trace.export_program(spec(module), ShapeProfile.parse("64x64"), tmp_path)


class Normal(Halve):
    """Groups of two million elements."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, picture: Tensor) -> Tensor:
        return super().forward(self.norm(picture + 0.3))


def test_large_pictures_do_not_drown_in_rounding(tmp_path: Path) -> None:
    """Sums of ONNX Runtime's own group norm would be wrong by 1e-5."""
    program = trace.export_program(spec(Normal()), ShapeProfile.parse("1024x768"), tmp_path)
    assert program.max_relative_error < 2e-6


class Mixed(Halve):
    """With linear layers, whose weights the exporter transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))

    def forward(self, picture: Tensor) -> Tensor:
        return self.mix(super().forward(picture))


def test_weights_are_gone_with_their_module(tmp_path: Path) -> None:
    module, memory = Mixed(), []
    for parameter in module.parameters():
        array = parameter.detach().numpy().copy()
        parameter.data = torch.from_numpy(array)
        memory.append(weakref.ref(array))  # what shares it holds on to it
    del array, parameter
    trace.export_program(spec(module), ShapeProfile.parse("64x64"), tmp_path)
    assert not any(array() is None for array in memory)
    del module
    gc.collect()
    assert [array() is None for array in memory] == [True] * 6


def test_a_rule_of_the_exporter_is_off_while_we_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(slice_split_rule, "match", lambda *_, **__: tried.append(True))
    trace.export_program(spec(Halve()), ShapeProfile.parse("64x64"), tmp_path)
    assert not tried
    onnxscript.optimizer.optimize(ir.load(tmp_path / "halve.onnx"))
    assert tried
