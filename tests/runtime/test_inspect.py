"""What ``controlrt inspect`` says of programs and plans, against values worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from controlrt.runtime.bundle import Bundle, read_manifest
from controlrt.runtime.commands import main
from controlrt.runtime.commands.inspect import parse_windows
from controlrt.runtime.errors import BundleError, UserError
from controlrt.runtime.inspection.engines import describe_engines
from controlrt.runtime.inspection.plan_drawing import draw_plan
from controlrt.runtime.inspection.program_table import _controls, program_table
from controlrt.runtime.inspection.units import readable_bytes, readable_count, readable_flops
from controlrt.runtime.inspection.workload import ControlWindow, Workload, plan_picture
from controlrt.runtime.manifest import (
    SCHEMA_VERSION,
    Control,
    Cost,
    Engine,
    Manifest,
    Model,
    Program,
    Provenance,
    Stage,
    TensorSpec,
    TextEncoder,
)
from controlrt.runtime.plan import StepLayout
from controlrt.runtime.profile import ShapeProfile

LAYERS = 2
LATENTS = ("batch", 4, "height/8", "width/8")


def tensors(**shapes: tuple[int | str, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items())


def program(
    name: str, flops: int, inputs: tuple[TensorSpec, ...] = (), outputs: tuple[TensorSpec, ...] = ()
) -> Program:
    part, _, stage = name.rpartition(".")
    stages: dict[str, Stage] = {
        "prompt": "prompt",
        "prompt_timestep": "prompt_timestep",
        "hint": "hint",
        "step": "step",
    }
    return Program(
        name=name,
        part=part if stage in stages else name,
        stage=stages.get(stage),
        file=f"programs/{name}.onnx",
        cost=Cost(nodes=10, parameters=1000, weight_bytes=4000, flops=flops),
        inputs=inputs,
        outputs=outputs,
        max_relative_error=0.0,
        export_seconds=0.0,
    )


def sdxl_like(tmp_path: Path, scheduler: str = "DDIMScheduler", **options: object) -> Bundle:
    """Two text encoders, a UNet whose timestep stage needs the prompt too, and a ControlNet with nothing but a hint."""
    read = {f"residual_{layer}_in": ("rows", 8, "height/8", "width/8") for layer in range(LAYERS)}
    written = {f"residual_{layer}": ("rows", 8, "height/8", "width/8") for layer in range(LAYERS)}
    history = ("batch", 5, 4, "height/8", "width/8")
    programs = (
        program("text_encoder", 3, tensors(input_ids=("batch", 77)), tensors(prompt_embeds=("batch", 77, 32))),
        program("text_encoder_2", 5, tensors(input_ids=("batch", 77)), tensors(text_embeds=("batch", 8))),
        program(
            "unet.prompt_timestep",
            7,
            tensors(timestep=("entries",), text_embeds=("entries", 8)),
            tensors(prompt_timestep_0=("entries", 16)),
        ),
        program(
            "controlnet.depth.hint",
            11,
            tensors(hint=("batch", 3, "height", "width")),
            tensors(hint_0=("batch", 8, "height/8", "width/8")),
        ),
        program(
            "controlnet.depth.step",
            13,
            tensors(latents=LATENTS, conditioning_scale=("rows", LAYERS), **read, hint_0=("batch", 8, 8, 8)),
            tensors(**written),
        ),
        program(
            "unet.step",
            17,
            tensors(
                latents=LATENTS, **read, history=history, guidance=("batch", "rows"), prompt_timestep_0=("rows", 16)
            ),
            tensors(next_latents=LATENTS, next_history=history),
        ),
        program("vae_decoder", 19),
        program("vae_encoder", 23),
    )
    encoders = tuple(
        TextEncoder(
            program=name,
            tokenizer="",
            max_length=77,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            vocab_size=1,
            max_clip_skip=1,
            pooled=name.endswith("2"),
        )
        for name in ("text_encoder", "text_encoder_2")
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        key="0" * 64,
        backend="onnxruntime",
        precision="fp32",
        profile=ShapeProfile.parse("64x64"),
        model=Model(source="", latent_channels=4, vae_scale_factor=8, time_ids=True, zero_empty_negative=True),
        text_encoders=encoders,
        controls=(Control(name="depth", kind="controlnet", part="controlnet.depth", source="", layers=LAYERS),),
        fusion=None,
        programs=programs,
        checks=(),
        files={"scheduler.json": "0" * 64},
        provenance=Provenance(created="", command="", sources={}, versions={}),
    )
    config = {"_class_name": scheduler, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", **options}
    (tmp_path / "scheduler.json").write_text(json.dumps(config))
    return Bundle(tmp_path, manifest)


def calls(work: Workload) -> dict[str, int]:
    return {use.program.name: use.calls for use in work.uses}


@pytest.mark.parametrize(
    ("count", "says"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (82_672, "82.7 k"), (859_520_964, "860 M"), (999_999, "1.00 M")],
)
def test_counts(count: int, says: str) -> None:
    assert readable_count(count) == says


@pytest.mark.parametrize(
    ("flops", "says"),
    [(12, "12 FLOP"), (9_996, "10.0 kFLOP"), (1_974_000_000_000, "1.97 TFLOP"), (10**22, "10000 EFLOP")],
)
def test_flops(flops: int, says: str) -> None:
    assert readable_flops(flops) == says


@pytest.mark.parametrize(
    ("size", "says"),
    [(512, "512 B"), (1024, "1.0 KiB"), (575_236, "562 KiB"), (3_438_081_024, "3.2 GiB"), (2**20 - 1, "1.0 MiB")],
)
def test_bytes(size: int, says: str) -> None:
    assert readable_bytes(size) == says


def test_a_guided_picture_has_two_prompts(tmp_path: Path) -> None:
    work = plan_picture(sdxl_like(tmp_path), 20)
    assert calls(work) == {
        "text_encoder": 2,
        "text_encoder_2": 2,
        "unet.prompt_timestep": 2,
        "controlnet.depth.hint": 1,
        "controlnet.depth.step": 20,
        "unet.step": 20,
        "vae_decoder": 1,
        "vae_encoder": 0,
    }
    assert [use.entries for use in work.uses] == [1, 1, 20, 1, 1, 1, 1, 1]
    assert sum(use.flops for use in work.uses) == 2 * 3 + 2 * 5 + 2 * 20 * 7 + 11 + 20 * 13 + 20 * 17 + 19


def test_what_engines_take_to_run(tmp_path: Path) -> None:
    programs = sdxl_like(tmp_path).manifest.programs
    assert describe_engines(programs) is None
    engine = Engine(
        builder="tensorrt-rtx",
        version="1.7.1",
        compute_capabilities=("8.6", "8.9"),
        gpu=None,
        build_seconds=2.5,
        optimization_profiles=1,
        refittable=False,
        stripped=False,
        version_compatible=False,
    )

    def described(**values: object) -> str | None:
        changed = msgspec.structs.replace(engine, **values)
        return describe_engines([msgspec.structs.replace(program, engine=changed) for program in programs])

    assert described() == "tensorrt-rtx 1.7.1, for compute capability 8.6 and 8.9; built in 20 s"
    assert (
        described(compute_capabilities=()) == "tensorrt-rtx 1.7.1, for compute capability 8.0 and later; built in 20 s"
    )
    assert described(builder="tensorrt", gpu="NVIDIA H200", compute_capabilities=("9.0",), refittable=True) == (
        "tensorrt 1.7.1, for NVIDIA H200, compute capability 9.0, refittable; built in 20 s"
    )
    assert described(stripped=True, refit_seconds=None) == (
        "tensorrt-rtx 1.7.1, for compute capability 8.6 and 8.9, without weights; built in 20 s"
    )
    assert described(refit_seconds=0.25) == (
        "tensorrt-rtx 1.7.1, for compute capability 8.6 and 8.9; built in 20 s, 8 of 8 refitted in 2.0 s"
    )


def test_a_window_takes_calls_away(tmp_path: Path) -> None:
    bundle = sdxl_like(tmp_path)
    half = calls(plan_picture(bundle, 20, {"depth": ControlWindow(start=0.25, end=0.75)}))
    assert (half["controlnet.depth.step"], half["controlnet.depth.hint"], half["unet.step"]) == (10, 1, 20)
    for never in ({}, {"depth": ControlWindow(end=0.01)}, {"depth": ControlWindow(scale=0)}):
        shut = calls(plan_picture(bundle, 20, never))
        assert (shut["controlnet.depth.step"], shut["controlnet.depth.hint"], shut["unet.step"]) == (0, 0, 20)


def test_an_export_has_no_costs_yet(tmp_path: Path) -> None:
    compiled = sdxl_like(tmp_path)
    programs = tuple(msgspec.structs.replace(program, cost=None) for program in compiled.manifest.programs)
    export = Bundle(tmp_path, msgspec.structs.replace(compiled.manifest, programs=programs))
    with pytest.raises(BundleError, match="is an export, not compiled yet; compile it with build-engines"):
        plan_picture(export, 20)


def test_a_consistency_model_has_one_prompt(tmp_path: Path) -> None:
    """Its UNet is told the guidance scale, and draws a row for each picture."""
    name, guided = "unet.prompt_timestep", sdxl_like(tmp_path).manifest
    told = program(
        name,
        7,
        tensors(timestep=("entries",), timestep_cond=("entries", 32)),
        tensors(prompt_timestep_0=("entries", 16)),
    )
    programs = tuple(told if each.name == name else each for each in guided.programs)
    bundle = Bundle(tmp_path, msgspec.structs.replace(guided, programs=programs))
    assert (guided.time_cond_proj_dim, bundle.manifest.time_cond_proj_dim) == (None, 32)
    work = plan_picture(bundle, 4)
    found = calls(work)
    assert (found["text_encoder"], found[name], found["unet.step"]) == (1, 1, 4)
    assert "a picture: 64x64, 4 steps, controls: depth" in program_table(bundle, work)
    assert next(draw_plan(bundle, work)) == "1 picture of 64x64, a row for each"


def test_steps_are_calls_of_the_sampler(tmp_path: Path) -> None:
    """PNDM visits its second timestep twice; Heun calls the model twice a step but the last."""
    pndm = calls(plan_picture(sdxl_like(tmp_path, "PNDMScheduler", skip_prk_steps=True), 20))
    assert (pndm["unet.step"], pndm["controlnet.depth.step"]) == (21, 21)
    assert calls(plan_picture(sdxl_like(tmp_path, "HeunDiscreteScheduler"), 20))["unet.step"] == 39


def test_table(tmp_path: Path) -> None:
    bundle = sdxl_like(tmp_path)
    lines = list(program_table(bundle, plan_picture(bundle, 20, {"depth": ControlWindow(end=0.5)})))
    words = {line.split("  ")[0]: line.split() for line in lines}
    assert "  once per prompt and schedule  " in lines[3]
    assert words["unet.prompt_timestep"][-11:] == [
        "10",
        "1.00",
        "k",
        "3.9",
        "KiB",
        "7",
        "FLOP",
        "2",
        "20",
        "280",
        "FLOP",
    ]
    assert words["vae_encoder"][-3:] == ["0", "1", "-"]
    assert words["total"] == ["total", "80", "8.00", "k", "31.2", "KiB", "796", "FLOP"]  # 6+10+280+11+10*13+20*17+19
    assert lines[-4] == "a picture: 64x64, 20 steps with guidance, controls: depth at 10 of them"


def test_adapters_are_among_the_controls() -> None:
    steps = (
        StepLayout(controls=("canny",), adapters=("color",), guided=True),
        StepLayout(controls=(), adapters=("color",), guided=True),
    )
    work: Any = SimpleNamespace(layout=SimpleNamespace(steps=steps))
    assert _controls(work) == "canny at 1 of them, color"


def test_graph(tmp_path: Path) -> None:
    """Sizes by hand: a table of 4 steps, 2 rows, 16 float32; 2 residuals of 2 x 8 x 8 x 8 float32, 4096 bytes each."""
    bundle = sdxl_like(tmp_path)
    alone = """\
    unet.step
      <- latents, residuals.zero (2 tensors, 8.0 KiB), history, prompt_timestep_0.unet[step]
      <- from the request: guidance[step]
      -> latents, history"""
    expected = f"""\
1 picture of 64x64, guided: 2 rows, unconditional ones first

before the loop
  once per prompt
    text_encoder: input_ids -> prompt_embeds
    text_encoder_2: input_ids -> text_embeds
  once per prompt and schedule, 4 timesteps at once
    unet.prompt_timestep: timestep, text_embeds -> prompt_timestep_0.unet (4x2x16 float32, 512 B)
  once per control picture
    controlnet.depth.hint: hint -> hint_0.controlnet.depth (1x8x8x8 float32, 2.0 KiB)

the loop: 4 steps, 6 launches
  step 0: unet.step
{alone}
  steps 1-2: controlnet.depth.step -> unet.step
    controlnet.depth.step
      <- latents, residuals.zero (2 tensors, 8.0 KiB), hint_0.controlnet.depth
      <- from the request: conditioning_scale.depth[step]
      -> residuals.a (2 tensors, 8.0 KiB)
{alone.replace("residuals.zero", "residuals.a")}
  step 3: unet.step
{alone}

after the loop
  vae_decoder: latents -> picture"""
    work = plan_picture(bundle, 4, {"depth": ControlWindow(start=0.25, end=0.75)})
    assert "\n".join(draw_plan(bundle, work)) == expected


def test_windows_are_read_as_in_generate() -> None:
    assert parse_windows(None) is None
    assert parse_windows([]) == {}
    assert parse_windows(["canny,start=0.1,end=0.5", "mask,scale=0"]) == {
        "canny": ControlWindow(start=0.1, end=0.5),
        "mask": ControlWindow(scale=0),
    }
    for wrong in ("", ",end=1", "canny=a.png", "canny,0.5", "canny,size=3", "canny,end=x", "canny,end=0,end=1"):
        with pytest.raises(UserError):
            parse_windows([wrong])
    with pytest.raises(UserError, match="twice"):
        parse_windows(["canny", "canny,end=0.5"])


@pytest.mark.bundle
def test_programs_of_the_demo(demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every sum is that of the manifest, the counts are those of a 20-step DDIM with one control off after step 9."""
    options = ["--programs", "--steps", "20", "--control", "canny,end=0.5", "--control", "mask"]
    assert main(["inspect", str(demo_bundle), *options]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    costs = {program.name: program.cost for program in read_manifest(demo_bundle).programs if program.cost}
    expected = {"text_encoder": 2, "vae_decoder": 1, "vae_encoder": 0, "unet.step": 20}
    expected |= {"controlnet.canny.step": 10, "controlnet.mask.step": 20}
    for part in ("unet", "controlnet.canny", "controlnet.mask"):
        expected |= {f"{part}.timestep": 20, f"{part}.prompt": 2}
        expected |= {f"{part}.hint": 1} if part != "unet" else {}
    assert header.split()[:5] == ["program", "runs", "computes", "in", "loss"]
    assert [line.split()[0] for line in lines[: len(costs)]] == list(costs)
    for line, (name, cost) in zip(lines, costs.items(), strict=False):
        calls_, entries = (1, 20) if name.endswith(".timestep") else (expected[name], 1)
        flops = readable_flops(expected[name] * cost.flops) if expected[name] else "-"
        assert line.endswith(f"{calls_:>7}  {entries:>7}  {flops:>15}")
        assert f" {cost.nodes}  " in line
        assert f" {readable_count(cost.parameters)} " in line
        assert f" {readable_bytes(cost.weight_bytes)} " in line
        assert f" {readable_flops(cost.flops)} " in line
    total = sum(expected[name] * cost.flops for name, cost in costs.items())
    assert lines[len(costs)].split()[:2] == ["total", str(sum(cost.nodes for cost in costs.values()))]
    assert lines[len(costs)].endswith(f"  {readable_flops(total)}")
    stored = (demo_bundle / "programs" / "weights.bin").stat().st_size
    assert lines[-1] == f"weights: programs share them; {readable_bytes(stored)} are stored"


@pytest.mark.bundle
def test_graph_of_the_demo(demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(demo_bundle), "--graph"]) == 0
    assert "  steps 0-49: controlnet.canny.step -> controlnet.mask.step -> unet.step" in capsys.readouterr().out
    assert main(["inspect", str(demo_bundle), "--graph", "--steps", "20", "--control", "canny,start=0.1,end=0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  step")] == [
        "  steps 0-1: unet.step",
        "  steps 2-9: controlnet.canny.step -> unet.step",
        "  steps 10-19: unet.step",
    ]
    assert "the loop: 20 steps, 28 launches" in lines
    assert not any(".mask" in line for line in lines)
    assert max(map(len, lines)) <= 120


@pytest.mark.bundle
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--programs", "--steps", "0"], "from 1 to 1000"),
        (["--graph", "--control", "depth"], "known: canny, mask"),
        (["--graph", "--control", "cany"], "did you mean 'canny'"),
        (["--graph", "--control", "canny,start=0.6,end=0.5"], "less than control_guidance_end (0.5)"),
        (["--graph", "--control", "canny,end=1.5"], "a fraction of the steps, from 0 to 1"),
        (["--graph", "--control", "canny,end=half"], "must be a number"),
        (["--graph", "--control", "canny,scale=nan"], "a finite number"),
        (["--graph", "--control", "canny=edges.png"], "is not NAME[,scale=1][,start=0][,end=1]"),
        (["--steps", "20"], "add --programs or --graph"),
        (["--tensors", "--control", "canny"], "add --programs or --graph"),
        (["--json", "--programs"], "one of --json, --tensors, --programs, --graph and --quantization"),
        (["--quantization"], "has nothing in int8 or fp8; build it with: build-engines --precision int8"),
    ],
)
def test_mistakes(demo_bundle: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str) -> None:
    assert main(["inspect", str(demo_bundle), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert says in printed.err
    assert printed.err.count("\n") == 1
