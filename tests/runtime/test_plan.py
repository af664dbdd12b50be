"""Plans of a hand-written manifest: which programs run, and that data flows through the right buffers."""

from __future__ import annotations

from controlrt.runtime.manifest import SCHEMA_VERSION, Control, Manifest, Model, Program, Provenance, TensorSpec
from controlrt.runtime.plan import Layout, View, plan_denoising
from controlrt.runtime.profile import ShapeProfile

LAYERS = 3


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def program(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Program:
    return Program(
        name=name, file=f"{name}.onnx", inputs=inputs, outputs=outputs, max_relative_error=0.0, export_seconds=0.0
    )


def manifest() -> Manifest:
    latents = tensor("latents", "batch", 4, "height/8", "width/8")
    rows = tensor("rows", "rows", dtype="int64")
    residuals = tuple(tensor(f"residual_{i}_in", "rows", 8, "height/8", "width/8") for i in range(LAYERS))
    written = tuple(tensor(f"residual_{i}", "rows", 8, "height/8", "width/8") for i in range(LAYERS))
    state = {name: tensor(name, "batch", 5, 4, "height/8", "width/8") for name in ("history", "next_history")}
    noise = tensor("noise", "batch", 4, "height/8", "width/8")
    update = tensor("update", "batch", 6, 9)
    unet = program(
        "unet",
        (latents, rows, *residuals, state["history"], noise, update),
        (tensor("next_latents", "batch", 4, "height/8", "width/8"), state["next_history"]),
    )
    hint = tensor("hint", "batch", 3, "height", "width")
    scale = tensor("conditioning_scale", "rows", LAYERS)
    controls = [program(f"controlnet.{name}", (latents, rows, hint, scale, *residuals), written) for name in "ab"]
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
        controls=tuple(Control(name=name, program=f"controlnet.{name}", source="", layers=LAYERS) for name in "ab"),
        programs=(unet, *controls),
        files={},
        provenance=Provenance(created="", command="", sources={}, versions={}),
    )


def layout(*active: tuple[str, ...], guided: bool = True, draws: bool = False) -> Layout:
    return Layout(width=128, height=64, batch=2, guided=guided, draws=draws, active=active)


def test_shapes_follow_the_layout() -> None:
    buffers = plan_denoising(manifest(), layout(("a",), ())).buffers
    assert buffers["latents.0"] == ((2, 4, 8, 16), "float32")
    assert buffers["rows"] == ((4,), "int64")
    assert buffers["history.0"] == ((2, 5, 4, 8, 16), "float32")
    assert buffers["update"] == ((2, 2, 6, 9), "float32")
    assert buffers["hint.a"] == ((2, 3, 64, 128), "float32")
    assert buffers["conditioning_scale.a"] == ((2, 4, LAYERS), "float32")
    assert plan_denoising(manifest(), layout((), guided=False)).buffers["rows"] == ((2,), "int64")


def test_a_closed_window_contains_no_call() -> None:
    plan = plan_denoising(manifest(), layout(("a", "b"), ("b",), ()))
    assert [[call.program for call in step] for step in plan.steps] == [
        ["controlnet.a", "controlnet.b", "unet"],
        ["controlnet.b", "unet"],
        ["unet"],
    ]
    assert "hint.a" not in plan_denoising(manifest(), layout(("b",))).buffers


def test_residuals_chain_and_never_run_in_place() -> None:
    both, only_b, none = plan_denoising(manifest(), layout(("a", "b"), ("b",), ())).steps
    assert [call.inputs["residual_0_in"].buffer for call in both] == ["residual_0.zero", "residual_0.a", "residual_0.b"]
    assert [call.inputs["residual_0_in"].buffer for call in only_b] == ["residual_0.zero", "residual_0.a"]
    assert none[0].inputs["residual_0_in"].buffer == "residual_0.zero"
    for call in (*both, *only_b, *none):
        assert not set(call.inputs.values()) & set(call.outputs.values())
        assert all(not view.buffer.endswith(".zero") for view in call.outputs.values())


def test_latents_alternate_and_tables_advance() -> None:
    plan = plan_denoising(manifest(), layout((), (), ()))
    for step, (call,) in enumerate(plan.steps):
        assert call.inputs["latents"] == View(plan.latents(step))
        assert call.outputs["next_latents"] == View(plan.latents(step + 1))
        assert call.inputs["history"] == View(f"history.{step % 2}")
        assert call.outputs["next_history"] == View(f"history.{(step + 1) % 2}")
        assert call.inputs["update"] == View("update", step)
    assert plan.result == plan.latents(3) == "latents.1"


def test_noise_is_a_table_only_where_the_sampler_draws() -> None:
    still, drawing = (plan_denoising(manifest(), layout((), (), draws=draws)) for draws in (False, True))
    assert still.buffers["noise"] == ((2, 4, 8, 16), "float32")
    assert drawing.buffers["noise"] == ((2, 2, 4, 8, 16), "float32")
    assert [call.inputs["noise"] for (call,) in still.steps] == [View("noise")] * 2
    assert [call.inputs["noise"] for (call,) in drawing.steps] == [View("noise", 0), View("noise", 1)]
