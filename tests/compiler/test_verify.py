"""What --verify does with passes that keep the result, change it, or fail."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from compiler.graphs import contents, graph_of, operators
from compiler.group_norms import group_norm

from controlrt.compiler.compile import compile_program
from controlrt.compiler.passes.guidance_sharing import GuidanceSharing
from controlrt.compiler.reference import Reference, relative_error
from controlrt.compiler.verify import MAX_RELATIVE_ERROR, VerificationError, Verifier
from controlrt.runtime.errors import BuildError
from controlrt.runtime.manifest import Program
from controlrt.runtime.profile import ShapeProfile

PROFILE = ShapeProfile.parse("64x64", "1-4")
DIMS = {"batch": 2, "rows": 4, "steps": 1, "prompts": 1, "entries": 1}
KERNEL = np.random.default_rng(0).standard_normal((8, 8), np.float32)


def model() -> ir.Model:
    """A step in small: one product of the latents, one of the timestep, a sum with the prompt."""
    return graph_of(
        "float[batch, 8] latents, int64[rows] rows, float[batch, 8] timestep, float[rows, 8] prompt_embeds",
        "float[rows, 8] next_latents",
        "x = Gather <axis = 0> (latents, rows) a = MatMul (x, kernel) t = MatMul (timestep, kernel) "
        "e = Gather <axis = 0> (t, rows) b = Add (a, e) next_latents = Add (b, prompt_embeds)",
        kernel=KERNEL,
    )


PROGRAM = Program(
    name="unet",
    part="unet",
    stage=None,
    file="programs/unet.onnx",
    cost=None,
    inputs=(),
    outputs=(),
    max_relative_error=0.0,
    export_seconds=0.0,
)


class Scale(ir.passes.InPlacePass):
    """Multiplies every kernel, which changes the result by that factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in model.graph.initializers.values():
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(self.factor), name=value.name)
        return ir.passes.PassResult(model, True)


class Wrecks(ir.passes.InPlacePass):
    """Takes nodes away, and then finds that it cannot go on."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in list(model.graph)[1:]:
            if node.op_type == "Add":
                node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)
        raise RuntimeError("no rule for this graph")


class Nothing(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, False)


def compiled(passes: tuple[ir.passes.InPlacePass, ...], verifier: Verifier | None) -> dict[str, ir.Model]:
    found = compile_program(PROGRAM, model(), PROFILE, passes, verifier)
    return {each.program.stage or "": each.model for each in found}


def test_what_keeps_the_result_is_recorded(tmp_path: Path) -> None:
    with Verifier(DIMS, tmp_path / "kept") as verifier:
        compiled((Nothing(), GuidanceSharing(), Scale(1.0)), verifier)
    assert [(check.program, check.compiler_pass) for check in verifier.checks] == [
        ("unet", "GuidanceSharing"),
        ("unet", "Scale"),
        ("unet", "binding times"),
    ]
    assert all(0 <= check.max_relative_error < MAX_RELATIVE_ERROR for check in verifier.checks)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("before", [(), (GuidanceSharing(),)])
def test_a_pass_that_changes_the_result_is_named(tmp_path: Path, before: tuple[ir.passes.InPlacePass, ...]) -> None:
    kept = tmp_path / "kept"
    with Verifier(DIMS, kept) as verifier, pytest.raises(VerificationError, match="pass Scale changes unet") as caught:
        compiled((*before, Scale(1.5)), verifier)
    assert str(kept) in str(caught.value)
    assert isinstance(caught.value, BuildError)
    assert caught.value.check == verifier.checks[-1]
    assert 0.01 < caught.value.check.max_relative_error < 1
    assert sorted(path.name for path in kept.iterdir()) == ["after.onnx", "before.onnx", "weights.bin"]
    rng = np.random.default_rng(1)
    values = {name: rng.standard_normal((2, 8), np.float32) for name in ("latents", "timestep")}
    values |= {"rows": np.array([0, 1, 0, 1]), "prompt_embeds": rng.standard_normal((4, 8), np.float32)}
    products = np.tile((values["latents"] + values["timestep"]) @ KERNEL, (2, 1))
    for name, factor in (("before", 1.0), ("after", 1.5)):
        expected = values["prompt_embeds"] + factor * products
        (found,) = open_file(kept / f"{name}.onnx").run(None, values)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def open_file(file: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


class Unknown(ir.passes.InPlacePass):
    """Leaves an operator that no runtime has."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        next(node for node in model.graph if node.op_type == "Add").op_type = "NoSuchOperator"
        return ir.passes.PassResult(model, True)


def test_a_pass_whose_graph_does_not_run_is_named(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with Verifier(DIMS, kept) as verifier, pytest.raises(VerificationError, match="pass Unknown changes unet"):
        compiled((Unknown(),), verifier)
    assert "NoSuchOperator" in {node.op_type for node in ir.load(kept / "after.onnx").graph}
    assert (kept / "before.onnx").exists()


def test_a_little_is_rounding(tmp_path: Path) -> None:
    """Float32 rounding passes, ten times the bound does not."""
    with Verifier(DIMS, tmp_path / "kept") as verifier:
        compiled((Scale(1 + 2**-22),), verifier)
        with pytest.raises(VerificationError):
            compiled((Scale(1 + 10 * MAX_RELATIVE_ERROR),), verifier)


def test_an_output_that_is_not_finite_is_a_change(tmp_path: Path) -> None:
    with Verifier(DIMS, tmp_path / "kept") as verifier, pytest.raises(VerificationError, match="differs by inf"):
        compiled((Scale(np.nan),), verifier)


def test_a_cut_that_changes_the_result_is_named(tmp_path: Path) -> None:
    before = model()
    stages = compiled((), None)
    Scale(2.0)(stages["timestep"])
    kept = tmp_path / "kept"
    with Verifier(DIMS, kept) as verifier, pytest.raises(VerificationError, match="pass binding times changes unet"):
        verifier.check_cut("unet", before, stages)
    assert {path.name for path in kept.iterdir()} == {
        "before.onnx",
        "weights.bin",
        *(f"after.{stage}.onnx" for stage in stages),
    }
    for path in kept.glob("*.onnx"):
        open_file(path)


@pytest.mark.parametrize("verifying", [False, True])
def test_a_pass_that_fails_leaves_the_graph_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, verifying: bool
) -> None:
    with caplog.at_level(logging.WARNING, "controlrt.compiler"), Verifier(DIMS, tmp_path / "kept") as verifier:
        found = compiled((Wrecks(), GuidanceSharing()), verifier if verifying else None)
    expected = compiled((GuidanceSharing(),), None)
    assert {stage: contents(graph) for stage, graph in found.items()} == {
        stage: contents(graph) for stage, graph in expected.items()
    }
    (record,) = (record for record in caplog.records if record.name.startswith("controlrt"))
    assert record.getMessage().startswith("unet: pass Wrecks left the graph as it was: ")
    assert "no rule for this graph" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert "Wrecks" not in {check.compiler_pass for check in verifier.checks}


def test_the_graph_given_stays_as_it_is() -> None:
    graph = model()
    before = contents(graph)
    compile_program(PROGRAM, graph, PROFILE, (GuidanceSharing(), Scale(2.0)))
    assert contents(graph) == before


def test_relative_error() -> None:
    expected = np.array([1.0, -4.0], np.float32)
    assert relative_error(np.array([1.0, -4.0], np.float32), expected) == 0
    assert relative_error(np.array([1.5, -4.0], np.float32), expected) == 0.125
    assert relative_error(np.array([1.0, np.nan], np.float32), expected) == np.inf
    assert relative_error(np.array([np.inf, 0], np.float32), expected) == np.inf
    assert relative_error(np.zeros(2, np.float32), np.zeros(2, np.float32)) == 0
    # the difference is taken in float64: float16 and integers do not wrap around
    assert relative_error(np.array([0], np.uint8), np.array([255], np.uint8)) == 1


def test_close_is_idempotent(tmp_path: Path) -> None:
    verifier = Verifier(DIMS, tmp_path)
    verifier.close()
    verifier.close()


def test_what_graphs_are_held_against_sums_group_norms_exactly() -> None:
    """Or a graph that does so too would differ from it: ONNX Runtime's own norm is wrong by 1e-4 here."""
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(1, 1, 8).astype(np.float32), rng.normal(0, 1, 8).astype(np.float32)
    norm = graph_of(
        "float[1, 8, 512, 512] x",
        "float[1, 8, 512, 512] y",
        "y = GroupNormalization <num_groups = 2> (x, scale, bias)",
        scale=scale,
        bias=bias,
    )
    x = rng.normal(10, 1, (1, 8, 512, 512)).astype(np.float32)
    expected = group_norm(x, scale, bias, 2, 1e-5)
    with Reference({}) as reference:
        assert relative_error(reference.run(norm, {"x": x})["y"], expected) < 1e-6
    assert operators(norm) == ["GroupNormalization"]
