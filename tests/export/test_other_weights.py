"""Graphs that get other weights instead of being traced anew, beside PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from controlrt.export.programs import ProgramSpec
from controlrt.export.trace import export_program
from controlrt.export.traced import note_traced, program_keys, take_graph, take_traced
from controlrt.runtime.bundle import digest_files
from controlrt.runtime.executors.onnxruntime import open_session
from controlrt.runtime.manifest import Program, TensorSpec
from controlrt.runtime.profile import ShapeProfile

PROFILE = ShapeProfile.parse("64x64")
TOOLS = {"torch": "2.13.0"}


class Mixed(nn.Module):
    """Weights in all the ways of a graph: as they are, transposed, of a Gemm, merged, folded away, unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 16, 3, padding=1)
        self.token = nn.Linear(16, 16)
        self.gemm = nn.Linear(16, 16)
        self.position = nn.Embedding(16, 16)
        self.twins = nn.ParameterList([nn.Parameter(torch.full((16,), 0.5)) for _ in range(2)])
        self.unused = nn.Linear(16, 16)

    def forward(self, picture: Tensor) -> Tensor:
        features = self.convolution(picture)
        tokens = self.token(features.flatten(2).transpose(1, 2)) * self.twins[0]
        means = self.gemm(features.mean((2, 3))) + self.position(torch.arange(16)).mean(0) * self.twins[1].tanh()
        return tokens + means[:, None]


def spec(module: nn.Module) -> ProgramSpec:
    return ProgramSpec(
        name="mixed",
        module=module.eval(),
        inputs={"picture": TensorSpec(name="picture", dtype="float32", shape=("batch", 3, "height", "width"))},
        outputs=(TensorSpec(name="tokens", dtype="float32", shape=("batch", 4096, 16)),),
        example=lambda _, shape, __, generator: torch.randn(shape, generator=generator),
    )


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    """An export of ``Mixed`` as it is first, and its program."""
    directory = tmp_path_factory.mktemp("export")
    (directory / "programs").mkdir()
    return directory, export_program(spec(Mixed()), PROFILE, directory / "programs")


@pytest.fixture
def taken(
    export: tuple[Path, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[nn.Module], Program | None]:
    """Takes the graph for another module into ``tmp_path``."""
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    directory, program = export
    note_traced(program_keys(spec(Mixed()), PROFILE, TOOLS), program, directory, digest_files(directory))

    def take(module: nn.Module) -> Program | None:
        keys = program_keys(spec(module), PROFILE, TOOLS)
        assert take_traced(keys, tmp_path) is None
        return take_graph(keys, spec(module), PROFILE, tmp_path)

    return take


def changed(*names: str) -> Mixed:
    module = Mixed()
    torch.manual_seed(1)
    with torch.no_grad():
        for name in names:
            parameter = module.get_parameter(name)
            parameter.copy_(torch.randn_like(parameter))
    return module


def test_weights_take_the_places_of_others(taken: Callable[[nn.Module], Program | None], tmp_path: Path) -> None:
    """Square matrices too, whose shape does not say whether they are transposed."""
    module = changed("convolution.weight", "convolution.bias", "token.weight", "token.bias", "gemm.weight")
    program = taken(copy.deepcopy(module))
    assert program is not None
    assert program.max_relative_error < 1e-5
    picture = torch.randn(2, 3, 64, 64)
    (found,) = open_session(tmp_path / "mixed.onnx").run(None, {"picture": picture.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), module(picture), rtol=1e-4, atol=1e-4)
        assert (Mixed().eval()(picture) - module(picture)).abs().max() > 1


@pytest.mark.parametrize("name", ["position.weight", "unused.weight", "twins.0", "twins.1"])
def test_a_tensor_that_the_graph_does_not_hold_by_itself(
    taken: Callable[[nn.Module], Program | None], tmp_path: Path, name: str
) -> None:
    assert taken(changed(name)) is None
    assert not list(tmp_path.glob("mixed*"))


def test_a_graph_that_does_not_give_what_pytorch_gives(
    taken: Callable[[nn.Module], Program | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlrt.export.other_weights.relative_error", lambda *_: 0.01)
    assert taken(changed("token.weight")) is None
    assert not list(tmp_path.glob("mixed*"))


def test_another_module_is_another_graph(taken: Callable[[nn.Module], Program | None]) -> None:
    wider = Mixed()
    wider.convolution = nn.Conv2d(3, 16, 5, padding=2)
    other = Mixed()
    other.token = nn.Sequential(other.token)
    assert taken(wider) is None
    assert taken(other) is None
