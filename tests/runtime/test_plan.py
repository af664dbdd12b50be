"""Plans of a hand-written manifest: which programs run, and that data flows through the right buffers."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlrt.runtime.errors import BundleError
from controlrt.runtime.manifest import (
    SCHEMA_VERSION,
    Control,
    Fusion,
    Manifest,
    Model,
    Program,
    Provenance,
    Stage,
    TensorSpec,
)
from controlrt.runtime.plan import (
    HALF,
    UNGUIDED,
    Layout,
    Plan,
    Planner,
    StepLayout,
    View,
    plan_denoising,
    stage_buffer,
)
from controlrt.runtime.profile import ShapeProfile

LAYERS = 3
CONDITIONAL = range(2, 4)
"""The conditional rows of two pictures: unconditional ones come first."""


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def program(part: str, stage: Stage, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Program:
    name = f"{part}.{stage}"
    return Program(
        name=name,
        part=part,
        stage=stage,
        file=f"{name}.onnx",
        cost=None,
        inputs=inputs,
        outputs=outputs,
        max_relative_error=0.0,
        export_seconds=0.0,
    )


LATENTS = tensor("latents", "batch", 4, "height/8", "width/8")
ROWS = tensor("rows", "rows", dtype="int64")
PASSED_ON = tuple(tensor(f"residual_{i}", "rows", 8, "height/8", "width/8") for i in range(LAYERS))
SO_FAR = tuple(tensor(f"residual_{i}_in", "rows", 8, "height/8", "width/8") for i in range(LAYERS))
HISTORY = {name: tensor(name, "batch", 5, 4, "height/8", "width/8") for name in ("history", "next_history")}
SAMPLER = (HISTORY["history"], tensor("noise", *LATENTS.shape), tensor("update", "batch", 6, 9))
GUIDANCE = tensor("guidance", "batch", "rows")
NEXT = (tensor("next_latents", *LATENTS.shape), HISTORY["next_history"])
TIMESTEP = tensor("timestep_0", "batch", 24)
PROMPT = tensor("prompt_0", "rows", 7, 16)
ADDED = tensor("prompt_timestep_0", "rows", 24)
HINT = tensor("hint_0", "batch", 8, "height/8", "width/8")
SCALE = tensor("conditioning_scale", "rows", LAYERS)


def early_stages(part: str, *outputs: TensorSpec) -> list[Program]:
    """One program for each output, whose leading axis counts the entries of its stage."""
    axes = {"timestep": "steps", "prompt": "prompts", "prompt_timestep": "entries", "hint": "batch"}
    programs = []
    for output in outputs:
        stage = output.name.removesuffix("_0")
        entry = tensor(output.name, axes[stage], *output.shape[1:])
        programs.append(program(part, stage, (tensor("given", axes[stage], 5),), (entry,)))
    return programs


def manifest(fusion: tuple[str, ...] = ()) -> Manifest:
    """A UNet and controls a and b, cut into stages, and the fused program of ``fusion`` if there is any."""
    programs = [
        *early_stages("unet", TIMESTEP, PROMPT, ADDED),
        program("unet", "step", (LATENTS, ROWS, TIMESTEP, PROMPT, ADDED, *SO_FAR, GUIDANCE, *SAMPLER), NEXT),
    ]
    for name in "ab":
        part = f"controlnet.{name}"
        inputs = (LATENTS, ROWS, TIMESTEP, HINT, SCALE, *SO_FAR)
        programs += [*early_stages(part, TIMESTEP, HINT), program(part, "step", inputs, PASSED_ON)]
    if fusion:
        scales = [tensor(f"conditioning_scale.{name}", *SCALE.shape) for name in fusion]
        inputs = (LATENTS, ROWS, TIMESTEP, HINT, *scales, GUIDANCE, *SAMPLER)
        programs += [*early_stages("fused", TIMESTEP, HINT), program("fused", "step", inputs, NEXT)]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        key="0" * 64,
        backend="onnxruntime",
        precision="fp32",
        profile=ShapeProfile.parse("64-128x64"),
        model=Model(
            source="",
            latent_channels=4,
            vae_scale_factor=8,
            time_ids=False,
            zero_empty_negative=False,
        ),
        text_encoders=(),
        controls=tuple(
            Control(name=name, kind="controlnet", part=f"controlnet.{name}", source="", layers=LAYERS) for name in "ab"
        ),
        fusion=Fusion(part="fused", controls=fusion) if fusion else None,
        programs=tuple(programs),
        checks=(),
        files={},
        provenance=Provenance(created="", command="", sources={}, versions={}),
    )


def layout(*controls: tuple[str, ...], guided: bool | str = True, draws: bool = False) -> Layout:
    """``guided`` for every step, or a letter for each: "+" with guidance, "-" without."""
    guidance = guided if isinstance(guided, str) else ("+" if guided else "-") * len(controls)
    steps = tuple(
        StepLayout(controls=names, guided=letter == "+") for names, letter in zip(controls, guidance, strict=True)
    )
    return Layout(width=128, height=64, batch=2, draws=draws, steps=steps)


def names(plan: Plan) -> list[list[str]]:
    return [[call.program.removesuffix(".step") for call in calls] for calls in plan.steps]


def test_shapes_follow_the_layout() -> None:
    buffers = plan_denoising(manifest(), layout(("a",), ())).buffers
    assert buffers["latents.0"] == ((2, 4, 8, 16), "float32")
    assert buffers["rows"] == ((4,), "int64")
    assert buffers["history.0"] == ((2, 5, 4, 8, 16), "float32")
    assert buffers["update"] == ((2, 2, 6, 9), "float32")
    assert buffers["guidance"] == ((2, 2, 4), "float32")
    assert buffers["conditioning_scale.a"] == ((2, 4, LAYERS), "float32")
    without = plan_denoising(manifest(), layout((), guided=False)).buffers
    assert without["rows"] == ((2,), "int64")
    assert without[UNGUIDED] == ((2, 2), "float32")
    assert "guidance" not in without


def test_early_stages_are_buffers_of_their_part() -> None:
    """Tables over steps where the timestep decides them; one entry for the whole run where only prompt or hint does."""
    plan = plan_denoising(manifest(), layout(("a",), ("a",), ("a",)))
    assert plan.parts == ("controlnet.a", "unet")
    buffers = {name: plan.buffers[stage_buffer(name, "unet")][0] for name in (TIMESTEP.name, PROMPT.name, ADDED.name)}
    assert buffers == {TIMESTEP.name: (3, 2, 24), PROMPT.name: (4, 7, 16), ADDED.name: (3, 4, 24)}
    assert plan.buffers["hint_0.controlnet.a"] == ((2, 8, 8, 16), "float32")
    for step, (control, unet) in enumerate(plan.steps):
        assert unet.inputs[TIMESTEP.name] == View("timestep_0.unet", step)
        assert unet.inputs[PROMPT.name] == View("prompt_0.unet")
        assert unet.inputs[ADDED.name] == View("prompt_timestep_0.unet", step)
        assert control.inputs[TIMESTEP.name] == View("timestep_0.controlnet.a", step)
        assert control.inputs[HINT.name] == View("hint_0.controlnet.a")
    assert not any(name.endswith("controlnet.b") for name in plan.buffers)


def test_mixtures_of_control_pictures_have_buffers_of_their_own() -> None:
    steps = [StepLayout(controls=("a", "b"), guided=True, mixtures=(("a", number),)) for number in (0, 1, 1)]
    steps.append(StepLayout(controls=("a", "b"), guided=True))
    plan = plan_denoising(manifest(), Layout(width=128, height=64, batch=2, draws=False, steps=tuple(steps)))
    read = [[calls[place].inputs[HINT.name].buffer for calls in plan.steps] for place in (0, 1)]
    first, second = (stage_buffer(HINT.name, "controlnet.a", number) for number in (0, 1))
    assert read == [[first, second, second, first], [stage_buffer(HINT.name, "controlnet.b")] * 4]
    assert plan.buffers[first] == plan.buffers[second] == ((2, 8, 8, 16), "float32")


def test_a_closed_window_contains_no_call() -> None:
    plan = plan_denoising(manifest(), layout(("a", "b"), ("b",), ()))
    assert names(plan) == [["controlnet.a", "controlnet.b", "unet"], ["controlnet.b", "unet"], ["unet"]]
    only_b = plan_denoising(manifest(), layout(("b",)))
    assert "hint_0.controlnet.a" not in only_b.buffers
    assert only_b.parts == ("controlnet.b", "unet")


def test_residuals_chain_and_never_run_in_place() -> None:
    both, only_b, none = plan_denoising(manifest(), layout(("a", "b"), ("b",), ())).steps
    assert [call.inputs["residual_0_in"].buffer for call in both] == ["residual_0.zero", "residual_0.a", "residual_0.b"]
    assert [call.inputs["residual_0_in"].buffer for call in only_b] == ["residual_0.zero", "residual_0.a"]
    assert none[0].inputs["residual_0_in"].buffer == "residual_0.zero"
    for call in (*both, *only_b, *none):
        assert not set(call.inputs.values()) & set(call.outputs.values())
        assert all(not view.buffer.endswith(".zero") for view in call.outputs.values())


def test_control_of_the_conditional_half_runs_half_the_rows_and_first() -> None:
    """Its residuals lie in buffers whose other rows nobody writes, so they are the zeros of the start."""
    steps = (
        StepLayout(controls=("a", "b"), conditional=("b",), guided=True),
        StepLayout(controls=("a", "b"), conditional=("a", "b"), guided=True),
        StepLayout(controls=("a", "b"), conditional=("b",), guided=False),
    )
    plan = plan_denoising(manifest(), Layout(width=128, height=64, batch=2, draws=False, steps=steps))
    assert names(plan) == [["controlnet.b", "controlnet.a", "unet"], *[["controlnet.a", "controlnet.b", "unet"]] * 2]
    residuals = [[call.inputs["residual_0_in"] for call in calls] for calls in plan.steps]
    half = range(2, 4)
    assert residuals[0] == [
        View("residual_0.zero", rows=half),
        View("residual_0.half.a"),
        View("residual_0.a"),
    ]
    assert residuals[1] == [
        View("residual_0.zero", rows=half),
        View("residual_0.half.a", rows=half),
        View("residual_0.half.b"),
    ]
    assert residuals[2] == [View(f"residual_0.{name}", rows=half) for name in ("zero", "a", "b")]
    for call in [*plan.steps[0][:1], *plan.steps[1][:2]]:
        assert call.inputs["rows"] == View("rows", rows=range(2))
        assert all(view.rows == half and ".half." in view.buffer for view in call.outputs.values())
    assert not any(".half." in view.buffer for view in plan.steps[0][1].outputs.values())


def test_latents_alternate_and_tables_advance() -> None:
    plan = plan_denoising(manifest(), layout((), (), ()))
    for step, (call,) in enumerate(plan.steps):
        assert call.inputs["latents"] == View(plan.state("latents", step))
        assert call.outputs["next_latents"] == View(plan.state("latents", step + 1))
        assert call.inputs["history"] == View(f"history.{step % 2}")
        assert call.outputs["next_history"] == View(f"history.{(step + 1) % 2}")
        assert call.inputs["update"] == View("update", step)
        assert call.inputs["guidance"] == View("guidance", step)
    assert plan.result == plan.state("latents", 3) == "latents.1"


def test_noise_is_a_table_only_where_the_sampler_draws() -> None:
    still, drawing = (plan_denoising(manifest(), layout((), (), draws=draws)) for draws in (False, True))
    assert still.buffers["noise"] == ((2, 4, 8, 16), "float32")
    assert drawing.buffers["noise"] == ((2, 2, 4, 8, 16), "float32")
    assert [call.inputs["noise"] for (call,) in still.steps] == [View("noise")] * 2
    assert [call.inputs["noise"] for (call,) in drawing.steps] == [View("noise", 0), View("noise", 1)]


def test_a_step_outside_the_guidance_window_runs_the_conditional_rows() -> None:
    plan = plan_denoising(manifest(), layout(("a",), ("a",), guided="+-"))
    assert plan.buffers["rows"][0] == (4,)
    (_, guided), (control, unguided) = plan.steps
    assert guided.inputs["guidance"] == View("guidance", 0)
    assert unguided.inputs["guidance"] == View(UNGUIDED)
    assert plan.buffers[UNGUIDED] == ((2, 2), "float32")
    assert unguided.inputs["rows"] == View("rows", None, range(2))  # pictures 0 and 1, not 2 and 3
    assert unguided.inputs[PROMPT.name] == View("prompt_0.unet", None, CONDITIONAL)
    assert unguided.inputs[ADDED.name] == View(f"prompt_timestep_0.unet{HALF}", 1)
    assert unguided.inputs["residual_0_in"] == View("residual_0.a", None, CONDITIONAL)
    assert control.inputs["conditioning_scale"] == View(f"conditioning_scale.a{HALF}", 1)
    assert plan.buffers[f"conditioning_scale.a{HALF}"][0] == (2, 2, *plan.buffers["conditioning_scale.a"][0][2:])
    assert control.outputs["residual_0"] == View("residual_0.a", None, CONDITIONAL)
    for name in ("latents", TIMESTEP.name, "update", "noise", "history"):  # what has one entry per picture
        assert unguided.inputs[name].rows is None
    assert all(view.rows is None for view in guided.inputs.values())


def test_without_guidance_at_any_step_there_are_no_rows_to_leave_out() -> None:
    for calls in plan_denoising(manifest(), layout(("a",), (), guided=False)).steps:
        for call in calls:
            assert all(view.rows is None for view in (*call.inputs.values(), *call.outputs.values()))


def test_the_fused_program_runs_where_exactly_its_controls_are_on() -> None:
    fused = manifest(fusion=("a",))
    plan = plan_denoising(fused, layout(("a",), ("a", "b"), ("b",), (), ("a",)))
    assert names(plan) == [
        ["fused"],
        ["controlnet.a", "controlnet.b", "unet"],
        ["controlnet.b", "unet"],
        ["unet"],
        ["fused"],
    ]
    (first,), *_, (last,) = plan.steps
    assert first.inputs[TIMESTEP.name] == View("timestep_0.fused", 0)
    assert last.inputs["latents"] == View(plan.state("latents", 4))
    assert last.outputs["next_latents"] == View(plan.state("latents", 5))
    assert "residual_0.a" not in plan_denoising(fused, layout(("a",))).buffers


def test_a_fused_control_and_the_control_alone_read_one_scale() -> None:
    plan = plan_denoising(manifest(fusion=("a",)), layout(("a",), ("a", "b")))
    ((fused,), (alone, *_)) = plan.steps
    assert fused.inputs["conditioning_scale.a"] == View("conditioning_scale.a", 0)
    assert alone.inputs["conditioning_scale"] == View("conditioning_scale.a", 1)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_two_fused_controls_in_any_order(order: tuple[str, ...]) -> None:
    plan = plan_denoising(manifest(fusion=order), layout(("a", "b"), ("a",), guided="+-"))
    assert names(plan) == [["fused"], ["controlnet.a", "unet"]]


def test_a_bundle_without_the_step_is_refused() -> None:
    whole = manifest()
    without = msgspec.structs.replace(whole, programs=tuple(p for p in whole.programs if p.name != "unet.step"))
    with pytest.raises(BundleError, match="no step program of unet; build it again"):
        plan_denoising(without, layout(()))


steps = st.lists(
    st.tuples(st.sampled_from([(), ("a",), ("b",), ("a", "b")]), st.sampled_from("+-")), min_size=1, max_size=6
)


@given(steps=steps, fusion=st.sampled_from([(), ("a",), ("b",), ("a", "b")]), draws=st.booleans())
def test_every_view_lies_in_its_buffer_and_fits_its_tensor(
    steps: list[tuple[tuple[str, ...], str]], fusion: tuple[str, ...], draws: bool
) -> None:
    """Whatever the windows: each step's views have the rows that the step runs, and what it reads was written."""
    chosen = layout(*(controls for controls, _ in steps), guided="".join(sign for _, sign in steps), draws=draws)
    plan = plan_denoising(manifest(fusion), chosen)
    by_name = {program.name: program for program in manifest(fusion).programs}
    buffers = {name: np.zeros(shape, dtype) for name, (shape, dtype) in plan.buffers.items()}
    for index, calls in enumerate(plan.steps):
        rows = chosen.batch * (2 if chosen.steps[index].guided else 1)
        written: set[View] = set()
        for call in calls:
            program = by_name[call.program]
            for specs, views in ((program.inputs, call.inputs), (program.outputs, call.outputs)):
                assert {spec.name for spec in specs} == set(views)
                for spec in specs:
                    view = views[spec.name]
                    array = buffers[view.buffer] if view.step is None else buffers[view.buffer][view.step]
                    array = array if view.rows is None else array[view.rows.start : view.rows.stop]
                    dims = {"batch": 2, "rows": rows, "height": 64, "width": 128, "height/8": 8, "width/8": 16}
                    assert array.shape == tuple(dims.get(dim, dim) for dim in spec.shape)
                    assert array.flags.c_contiguous
                    assert spec.dtype == array.dtype
            for name, view in call.inputs.items():
                if name.startswith("residual_") and not view.buffer.endswith(".zero"):
                    assert view in written
            written.update(call.outputs.values())


@given(steps=steps)
def test_equal_layouts_share_a_plan(steps: list[tuple[tuple[str, ...], str]]) -> None:
    """Plans are kept by layout, so a layout is a key."""
    one, two = (layout(*(c for c, _ in steps), guided="".join(sign for _, sign in steps)) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != replace(one, batch=3)
    assert plan_denoising(manifest(), one) == plan_denoising(manifest(), two)


@given(before=steps, chosen=steps, fusion=st.sampled_from([(), ("a",)]))
def test_a_planner_remembers_and_plans_the_same(
    before: list[tuple[tuple[str, ...], str]], chosen: list[tuple[tuple[str, ...], str]], fusion: tuple[str, ...]
) -> None:
    planner = Planner(manifest(fusion))
    for each in (before, chosen):
        wanted = layout(*(c for c, _ in each), guided="".join(sign for _, sign in each))
        found, alone = planner.plan(wanted), plan_denoising(manifest(fusion), wanted)
        assert found == alone
        assert list(found.buffers) == list(alone.buffers)


def test_plans_have_the_calls_in_common_that_a_window_leaves() -> None:
    planner = Planner(manifest())
    on, closed = planner.plan(layout(("a",), ("a",), ("a",))), planner.plan(layout(("a",), ("a",), ()))
    assert all(one is other for step in (0, 1) for one, other in zip(on.steps[step], closed.steps[step], strict=True))
    assert closed.steps[2][-1] is not on.steps[2][-1]
    assert planner.plan(layout((), (), ())).steps[2][-1] is closed.steps[2][-1]
