"""From an exported program to those of a bundle: names of dimensions, stages, manifest entries and costs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from compiler.graphs import contents, graph_of, operators, run

from controlrt.compiler.compile import ProgramGraph, compile_program, load_program, name_dimensions, one_picture
from controlrt.compiler.passes.guidance_sharing import GuidanceSharing
from controlrt.compiler.passes.row_agnostic_reshapes import RowAgnosticReshapes
from controlrt.compiler.passes.winograd_convolution import MIN_CHANNELS, WinogradConvolution
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.manifest import DType, Program, TensorSpec
from controlrt.runtime.profile import ShapeProfile

ONE, MANY = ShapeProfile.parse("64x128"), ShapeProfile.parse("64x128", "1-4")
KERNEL = np.random.default_rng(0).standard_normal((8, 8), np.float32)
PASSES = (RowAgnosticReshapes(), GuidanceSharing())


def tensor(name: str, *shape: int | str, dtype: DType = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def entry(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Program:
    return Program(
        name=name,
        part=name,
        stage=None,
        file=f"programs/{name}.onnx",
        cost=None,
        inputs=inputs,
        outputs=outputs,
        max_relative_error=2e-7,
        export_seconds=1.5,
    )


STEP = entry(
    "unet",
    (
        tensor("latents", "batch", 8),
        tensor("rows", "rows", dtype="int64"),
        tensor("timestep", "batch"),
        tensor("prompt_embeds", "rows", 8),
    ),
    (tensor("next_latents", "rows", 8),),
)


def step() -> ir.Model:
    """As the exporter leaves it: sizes under names of its own, in intermediate values too."""
    model = graph_of(
        "float[s7, 8] latents, int64[s93] rows, float[s7] timestep, float[s93, 8] prompt_embeds",
        "float[s93, 8] next_latents",
        "x = Gather <axis = 0> (latents, rows) a = MatMul (x, kernel) u = Unsqueeze (timestep, ends) "
        "t = Expand (u, width) s = MatMul (t, kernel) e = Gather <axis = 0> (s, rows) b = Add (a, e) "
        "p = MatMul (prompt_embeds, kernel) next_latents = Add (b, p)",
        kernel=KERNEL,
        ends=[1],
        width=[1, 8],
    )
    return model


def shapes(model: ir.Model) -> dict[str, list[int | str | None]]:
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    return {
        value.name: [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        for value in values
        if value.shape is not None
    }


def test_dimensions_get_the_names_of_the_manifest() -> None:
    model = step()
    name_dimensions(model, STEP, MANY)
    found = shapes(model)
    assert found["latents"] == ["batch", 8]
    assert found["timestep"] == ["batch"]
    assert found["u"] == ["batch", 1]
    assert found["prompt_embeds"] == found["x"] == found["next_latents"] == ["rows", 8]


def test_a_batch_of_one_number_is_that_number() -> None:
    """Rows stay open: two for each picture with guidance, one without."""
    for profile, batch in ((ONE, 1), (ShapeProfile.parse("64x128", "3"), 3)):
        model = step()
        name_dimensions(model, STEP, profile)
        found = shapes(model)
        assert found["latents"] == [batch, 8]
        assert found["u"] == [batch, 1]
        assert found["x"] == found["next_latents"] == ["rows", 8]
        values = {"latents": np.ones((batch, 8), np.float32), "timestep": np.ones(batch, np.float32)}
        values |= {"rows": np.zeros(2, np.int64), "prompt_embeds": np.ones((2, 8), np.float32)}
        assert run(model, **values)["next_latents"].shape == (2, 8)


def test_sides_that_vary_are_named_and_unknown_symbols_stay() -> None:
    program = entry(
        "vae", (tensor("latents", "batch", 4, "height/8", 24),), (tensor("picture", "batch", 8, "height/8", 24),)
    )
    model = graph_of(
        "float[s1, 4, s2, 24] latents",
        "float[s1, 8, s2, 24] picture",
        "a = Neg (latents) picture = Concat <axis = 1> (a, latents)",
    )
    next(iter(model.graph)).outputs[0].shape = ir.Shape(["s1", 4, "s2 + 0", 24])
    name_dimensions(model, program, MANY)
    found = shapes(model)
    assert found["latents"] == ["batch", 4, "height/8", 24]
    assert found["picture"] == ["batch", 8, "height/8", 24]
    assert found["a"] == ["batch", 4, "s2 + 0", 24]


def compiled(profile: ShapeProfile = MANY) -> dict[str | None, ProgramGraph]:
    model = step()
    name_dimensions(model, STEP, profile)
    return {each.program.stage: each for each in compile_program(STEP, model, profile, PASSES)}


def test_stages_are_programs_of_one_part() -> None:
    found = compiled()
    assert list(found) == ["timestep", "prompt", "step"]
    for stage, each in found.items():
        assert each.program.name == f"unet.{stage}"
        assert each.program.file == f"programs/unet.{stage}.onnx"
        assert each.program.part == "unet"
        assert each.program.max_relative_error == STEP.max_relative_error
        assert each.program.export_seconds == STEP.export_seconds
        assert [spec.name for spec in each.program.inputs] == [value.name for value in each.model.graph.inputs]
        assert [spec.name for spec in each.program.outputs] == [value.name for value in each.model.graph.outputs]
    assert found["timestep"].program.inputs == (tensor("timestep", "steps"),)
    assert found["prompt"].program.inputs == (tensor("prompt_embeds", "prompts", 8),)
    assert set(found["step"].program.inputs) == {
        tensor("latents", "batch", 8),
        tensor("rows", "rows", dtype="int64"),
        tensor("timestep_0", "batch", 8),
        tensor("prompt_0", "rows", 8),
    }
    assert found["step"].program.outputs == STEP.outputs


def test_a_batch_of_one_in_every_entry() -> None:
    found = compiled(ONE)
    assert found["timestep"].program.inputs == (tensor("timestep", "steps"),)  # the schedule is not the batch
    assert tensor("latents", 1, 8) in found["step"].program.inputs
    assert tensor("timestep_0", 1, 8) in found["step"].program.inputs
    assert "Gather" not in operators(found["step"].model)  # one picture is broadcast


def test_costs() -> None:
    """A product of one row by the kernel is 2 * 8 * 8 FLOPs; the step has it for one picture, not for its two rows."""
    for stage, each in compiled().items():
        cost = each.program.cost
        assert cost is not None
        assert cost.flops == 2 * 8 * 8, stage
        assert cost.nodes == len(list(each.model.graph))
        assert cost.parameters >= KERNEL.size
        assert KERNEL.nbytes <= cost.weight_bytes < KERNEL.nbytes + 64


def test_a_program_outside_the_loop_stays_one() -> None:
    program = entry("vae_decoder", (tensor("latents", "batch", 8),), (tensor("picture", "batch", 8),))
    model = graph_of("float[s1, 8] latents", "float[s1, 8] picture", "picture = MatMul (latents, k)", k=KERNEL)
    name_dimensions(model, program, MANY)
    (found,) = compile_program(program, model, MANY, PASSES)
    cost = found.program.cost
    assert cost is not None
    assert found.program == msgspec.structs.replace(program, cost=cost)
    assert cost.flops == 2 * 8 * 8


def test_weights_that_a_pass_replaced_are_gone() -> None:
    """From a program that is not cut, too: they would be stored, and loaded."""
    picture = tensor("latents", "batch", MIN_CHANNELS, 16, 16)
    program = entry("vae_decoder", (picture,), (msgspec.structs.replace(picture, name="picture"),))
    shape = f"float[s1, {MIN_CHANNELS}, 16, 16]"
    model = graph_of(
        f"{shape} latents",
        f"{shape} picture",
        "picture = Conv <pads = [1, 1, 1, 1]> (latents, k)",
        k=np.ones((MIN_CHANNELS, MIN_CHANNELS, 3, 3), np.float32),
    )
    name_dimensions(model, program, MANY)
    (found,) = compile_program(program, model, MANY, (WinogradConvolution(),))
    weights = found.model.graph.initializers
    assert len(operators(found.model)) > 6
    assert "k" not in weights
    assert all(weight.uses() for weight in weights.values())


def test_the_graph_given_stays_as_it_is() -> None:
    model = step()
    name_dimensions(model, STEP, MANY)
    before = contents(model)
    compile_program(STEP, model, MANY, PASSES)
    assert contents(model) == before


def test_one_picture() -> None:
    dims = one_picture(ShapeProfile.parse("512-1024x256", "1-4"))
    assert (dims["batch"], dims["rows"]) == (1, 2)
    assert dims["height"] == 256
    for power in range(1, 7):
        assert dims[f"width/{2**power}"] * 2**power == dims["width"]


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"], indirect=True, scope="module")
@pytest.mark.parametrize("batch", ["1", "1-4"])
def test_every_program_of_a_checkpoint(exported: Path, batch: str) -> None:
    """The stages of a program take its inputs and give its outputs; only a step's batch is ever fixed."""
    profile = ShapeProfile.parse("128x128", batch)
    for program in read_manifest(exported).programs:
        stages = compile_program(program, load_program(program, exported, profile), profile, PASSES)
        in_loop = program.name.startswith(("unet", "controlnet"))
        assert (len(stages) > 1) == in_loop
        assert {each.program.part for each in stages} == {program.name}
        one = 1 if batch == "1" and in_loop else "batch"

        def settled(spec: TensorSpec, one: int | str = one) -> TensorSpec:
            return tensor(spec.name, *(one if dim == "batch" else dim for dim in spec.shape), dtype=spec.dtype)

        given = {spec.name for each in stages for spec in each.program.inputs}
        unread = {"rows"} if batch == "1" else set()  # where one picture is broadcast, nothing is expanded
        assert {spec.name for spec in program.inputs} - given <= unread
        assert stages[-1].program.outputs == tuple(map(settled, program.outputs))
        for spec in (spec for each in stages for spec in (*each.program.inputs, *each.program.outputs)):
            assert all(isinstance(dim, int) or dim in LEADING for dim in spec.shape)


LEADING = ("batch", "rows", "steps", "prompts", "entries", "extra")
