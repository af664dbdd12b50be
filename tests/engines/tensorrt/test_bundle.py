"""Whole bundles of engines, built without a GPU: what is in them, and that a second build copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from controlrt.compiler.compile import compile_program, load_program
from controlrt.compiler.passes.quantize import Quantize
from controlrt.compiler.quantization.layers import layers_of
from controlrt.compiler.weights import WeightStore
from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.engines.backends import BACKENDS
from controlrt.engines.build import BuildOptions, build, export_programs
from controlrt.engines.tensorrt import builder
from controlrt.engines.tensorrt.dialect import write_for_parser
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.runtime.bundle import Bundle, read_manifest
from controlrt.runtime.manifest import Precision
from controlrt.runtime.profile import ShapeProfile

if TYPE_CHECKING:
    from families import Family

pytestmark = pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].is_installed(), reason="the extra tensorrt-rtx is absent")
DEMO = {"model": str(MODEL_DIR), "controlnets": {name: str(path) for name, path in CONTROLNETS.items()}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache of engines; exports stay where they are."""
    engines = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "engine_cache", lambda: engines)
        yield engines


def check(bundle: Bundle) -> None:
    """Every program is an engine, of plausible size, and nothing else was shipped."""
    manifest = bundle.manifest
    plans = {f"programs/{program.name}.plan" for program in manifest.programs}
    assert {program.file for program in manifest.programs} == plans
    assert {name for name in manifest.files if name.startswith("programs/")} == plans
    assert not (bundle.path / "compiled").exists()
    for program in manifest.programs:
        assert program.engine is not None
        assert program.engine.builder == "tensorrt-rtx"
        assert program.loss is not None
        assert program.loss.max_relative_error < 0.01
        assert program.cost is not None
        plan = (bundle.path / program.file).read_bytes()
        assert len(plan) > 0.9 * program.cost.weight_bytes
        for spec in (*program.inputs, *program.outputs):
            assert spec.name.encode() in plan
    assert {program.name for program in manifest.programs} >= {"unet.step", "unet.prompt", "vae_decoder", "vae_encoder"}


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_a_small_sdxl(family: Family, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from families import SIDE

    options = {
        **family.sources(),
        "profile": ShapeProfile.parse(f"{SIDE}x{SIDE}", "1-4"),
        "backend": "tensorrt-rtx",
        "precision": "fp16",
    }
    first = build(BuildOptions(**options, output=tmp_path / "first"), "pytest").bundle
    check(first)
    names = {program.name: program for program in first.manifest.programs}
    assert {"text_encoder", "text_encoder_2", "unet.prompt_timestep", "controlnet.first.hint"} <= names.keys()
    residuals = [spec for spec in names["unet.step"].inputs if spec.name.startswith("residual_")]
    assert {spec.dtype for spec in residuals} == {"float16"}
    assert names["vae_decoder"].precision == "fp32"  # its activations leave the range of float16
    kept = {path.name for path in cache.iterdir()}
    assert len(kept) <= len(names)

    monkeypatch.setattr(builder, "CHILD", ("false",))  # the builder would fail
    second = build(BuildOptions(**options, output=tmp_path / "second"), "pytest").bundle
    assert second.manifest.programs == first.manifest.programs
    assert second.manifest.files == first.manifest.files
    assert {path.name for path in cache.iterdir()} == kept


@pytest.mark.parametrize(
    ("batch", "profiles", "precision"),
    [("1", 2, "fp16"), ("1-2", 1, "fp16"), ("1", 2, "int8"), ("1", 2, "fp8")],
    ids=["static", "range", "weights in int8", "fp8"],
)
@pytest.mark.usefixtures("cache")
def test_the_demo_models_step(tmp_path: Path, batch: str, profiles: int, precision: Precision) -> None:
    """A fixed batch: one optimization profile with guidance and one without; a range of them: one for all."""
    source = export_programs(profile=ShapeProfile.parse("512x512", "1-4"), **DEMO)
    exported = read_manifest(source)
    entry, profile = exported.program("controlnet.canny"), ShapeProfile.parse("512x512", batch)
    backend = BACKENDS["tensorrt-rtx"]
    model = load_program(entry, source, profile)
    middle = [layer.name for layer in layers_of(model.graph) if ".mid_block." in layer.name]
    inputs = "fp8" if precision == "fp8" else backend.int8_inputs
    quantize = Quantize(dict.fromkeys(middle, 8.0), inputs=inputs) if precision != "fp16" else None
    compiled = compile_program(entry, model, profile, backend.passes, None, "fp16", quantize=quantize)
    (step,) = (each for each in compiled if each.program.stage == "step")
    assert step.program.precision == precision
    for folder in ("programs", "onnx"):
        (tmp_path / folder).mkdir()
    with WeightStore(tmp_path / "onnx") as store:
        store.save(step.model, "step.onnx")
    onnx = tmp_path / "onnx" / "step.onnx"
    options = EngineOptions(compute_capabilities=("8.9",))
    built = backend.finish(step.program, onnx, tmp_path, profile, options)
    assert built.engine is not None
    assert built.engine.optimization_profiles == profiles
    latents = next(spec for spec in built.inputs if spec.name == "latents")
    assert latents.shape[0] == (1 if profiles == 2 else "batch")
    assert (tmp_path / built.file).stat().st_size > 2 * 2**20


@pytest.mark.parametrize("part", ["controlnet.canny", "text_encoder", "vae_decoder"])
def test_the_parser_knows_every_weight_by_its_name(part: str, tmp_path: Path) -> None:
    """So that it can be replaced by that name; without a GPU no engine opens that would say so itself."""
    import tensorrt_rtx as trt

    source = export_programs(profile=ShapeProfile.parse("512x512", "1-4"), **DEMO)
    exported = read_manifest(source)
    model = load_program(exported.program(part), source, exported.profile)
    passes = BACKENDS["tensorrt-rtx"].passes
    logger = trt.Logger(trt.Logger.ERROR)
    with WeightStore(tmp_path) as store:
        for each in compile_program(exported.program(part), model, exported.profile, passes, None, "fp16"):
            store.save(each.model, f"{each.program.name}.onnx")
            file, structure = write_for_parser(each.program.name, tmp_path / f"{each.program.name}.onnx")
            network = trt.Builder(logger).create_network()
            assert trt.OnnxParser(network, logger).parse_from_file(str(file))
            assert structure.weights
            assert all(network.mark_weights_refittable(name) for name in structure.weights)
            assert not network.mark_weights_refittable("no such weight")


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["512x512", "256-512x256-512"], ids=["static", "range"])
def test_the_demo_model(profile: str, tmp_path: Path) -> None:
    options = BuildOptions(
        **DEMO,
        profile=ShapeProfile.parse(profile),
        backend="tensorrt-rtx",
        precision="fp16",
        output=tmp_path / "bundle",
    )
    check(build(options, "pytest").bundle)
