"""The demo model in int8 and fp8: what is built, what it draws, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from calibrations import Calibrated
from controlrt.compiler.reference import rms_error
from controlrt.compiler.weights import WeightStore
from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.demo.scenes import sample_scene
from controlrt.demo.scores import score
from controlrt.engines.backends import BACKENDS
from controlrt.engines.backends import openvino as openvino_backend
from controlrt.engines.build import BuildOptions, Built, build, export_programs, refuse_fp8_without_gpu_for_it
from controlrt.engines.likeness import psnr
from controlrt.engines.parts import part_graphs
from controlrt.engines.quantization import sensitivity
from controlrt.engines.quantization.choice import choose, compile_part
from controlrt.engines.quantization.options import QuantizationOptions
from controlrt.engines.quantization.replay import replay
from controlrt.engines.tensorrt.dialect import write_for_parser
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.runtime.bundle import Bundle, read_manifest
from controlrt.runtime.commands import main
from controlrt.runtime.cuda.gpu import Gpu
from controlrt.runtime.errors import BuildError, ParameterError, UserError
from controlrt.runtime.executors.base import Arrays
from controlrt.runtime.executors.openvino import OpenVinoExecutor, native_precisions
from controlrt.runtime.manifest import Backend as BackendName
from controlrt.runtime.manifest import Precision, QuantizedPrecision
from controlrt.runtime.pipeline import ControlNetPipeline
from controlrt.runtime.profile import ShapeProfile

pytestmark = pytest.mark.bundle
STEPS = ("unet.step", "controlnet.canny.step", "controlnet.mask.step")
LITTLE = 15.0
"""Decibels that two cases of two steps are enough for."""


def options(
    calibrated: Calibrated,
    output: Path,
    backend: str = "openvino",
    precision: QuantizedPrecision = "int8",
    engine: EngineOptions | None = None,
    fuse: tuple[str, ...] = (),
    **given: Any,
) -> BuildOptions:
    return BuildOptions(
        model=str(MODEL_DIR),
        controlnets={name: str(path) for name, path in CONTROLNETS.items()},
        profile=ShapeProfile.parse("512x512", "1-4"),
        output=output,
        backend=backend,  # type: ignore[arg-type]
        precision=precision,
        quantization=QuantizationOptions(
            precision=precision, statistics=calibrated.file, **{"min_psnr_db": LITTLE, **given}
        ),
        engine=engine or EngineOptions(),
        fuse=fuse,
    )


def program_bytes(bundle: Bundle) -> int:
    return sum(bundle.file(file).stat().st_size for file in bundle.manifest.files if file.startswith("programs/"))


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def built(request: pytest.FixtureRequest, calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip(request.param)
    return build(options(calibrated, tmp_path_factory.mktemp("int8") / "bundle", request.param), "pytest")


def test_steps_are_in_int8_and_the_rest_is_not(built: Built) -> None:
    programs = {program.name: program.precision for program in built.bundle.manifest.programs}
    assert {name for name, precision in programs.items() if precision == "int8"} == set(STEPS)
    graph = ir.load(built.bundle.file("programs/unet.step.onnx")).graph
    stored = {name: value.dtype for name, value in graph.initializers.items()}
    assert stored["unet.mid_block.resnets.0.conv1.weight.int8"] == ir.DataType.INT8
    assert stored["unet.conv_in.weight.half"] == ir.DataType.FLOAT16
    assert "unet.conv_in.weight.int8" not in stored


def test_quantizers_stand_where_they_should(built: Built) -> None:
    """One for each value, before layers alone, of the type that the backend multiplies; norms are smoothed."""
    expected = np.uint8(128) if built.bundle.manifest.backend == "onnxruntime" else np.int8(0)
    graph = ir.load(built.bundle.file("programs/unet.step.onnx")).graph
    quantizers = [node for node in graph if node.op_type == "QuantizeLinear"]
    assert len({node.inputs[0] for node in quantizers}) == len(quantizers) > 50
    layers = {"Conv", "MatMul", "Gemm"}
    for node in quantizers:
        _, scale, zero_point = node.inputs
        assert scale is not None
        assert zero_point is not None
        assert zero_point.const_value is not None
        zero = zero_point.const_value.numpy()
        assert (zero, zero.dtype) == (expected, expected.dtype)
        (dequantized,) = (reader.outputs[0] for reader in node.outputs[0].consumers())
        assert {reader.op_type for reader in dequantized.consumers()} <= layers
    attentions = [
        name.partition(".to_q.")[0] for name in graph.initializers if name.endswith("attn1.to_q.weight.smooth.int8")
    ]
    assert len(attentions) > 2
    for attention in attentions:
        read = set()
        for name in "qkv":
            (node,) = graph.initializers[f"{attention}.to_{name}.weight.smooth.int8"].consumers()
            read |= {reader.inputs[0] for reader in node.outputs[0].consumers()}
        assert len(read) == 1, attention


def test_it_takes_a_third_of_the_bytes(built: Built, demo_bundle: Path) -> None:
    full, found = map(program_bytes, (Bundle.open(demo_bundle), built.bundle))
    assert found <= 0.45 * full  # graphs do not shrink, and are a part of so small a model


def test_the_manifest_says_how_good_it_is(built: Built, calibrated: Calibrated) -> None:
    int8 = built.bundle.manifest.quantization
    assert int8 is not None
    (case,) = calibrated.statistics.unseen
    with ControlNetPipeline(built.bundle) as pipeline:
        latents, pictures = replay(pipeline, case.arguments, case.hints)
    scaled = [each.astype(np.float32) / 255 for each in (pictures, case.pictures)]
    assert int8.quality.psnr_db == pytest.approx(psnr(*scaled), abs=0.5)
    pairs = zip(latents, case.latents, strict=True)
    expected = [np.linalg.norm(mine - its) / np.linalg.norm(its) for mine, its in pairs]
    assert int8.quality.latent_errors == pytest.approx(expected, rel=0.05)
    assert int8.quality.psnr_db > LITTLE
    assert case.scene is not None
    scene = sample_scene(np.random.default_rng(case.scene))
    assert scene.prompt == case.arguments["prompt"]
    scores = [score(scene, each[0]) for each in (pictures, case.pictures)]
    found = int8.quality.scenes
    assert found is not None
    assert (found.iou, found.float32_iou) == pytest.approx([each.iou for each in scores], abs=0.01)
    assert [found.colours, found.float32_colours] == [float(each.both_colours) for each in scores]
    kept = {layer.name: layer.kept for layer in int8.layers if layer.part == "unet"}
    assert kept["unet.conv_in"]
    assert kept["unet.mid_block.resnets.0.conv1"] is None


def test_inspect_shows_what_is_in_int8(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built.bundle.path), "--quantization"]) == 0
    printed = capsys.readouterr().out
    assert re.match(
        r"212 of 230 layers in int8, by mse(, weights of 7 bits)?, smoothed by 0\.5; all else in (fp32|bf16); 1 unseen "
        r"pictures .* both colours right in \d+% \(\d+%\)",
        printed,
    )
    assert re.search(r"unet +\d+ layers: it carries the picture past the block", printed)
    page = tmp_path / "pages" / "page.html"
    assert main(["inspect", str(built.bundle.path), "--quantization", "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert "212 of 230 layers in int8" in page.read_text()


def test_fp8_and_fused_in_onnx_runtime(
    calibrated: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is fused has the layers of its networks in fp8, and draws what they draw one by one."""
    (case,) = calibrated.statistics.unseen
    asked = options(calibrated, tmp_path / "bundle", "onnxruntime", "fp8", fuse=tuple(case.hints))
    bundle = build(asked, "pytest").bundle
    programs = {program.name: program.precision for program in bundle.manifest.programs}
    assert {name for name, precision in programs.items() if precision == "fp8"} == {*STEPS, "fused.step"}
    fused = ir.load(bundle.file("programs/fused.step.onnx")).graph.initializers
    assert {
        name.partition("/")[0] for name in fused if name.endswith("resnets.0.conv1.weight.fp8") and "/" in name
    } == {*case.hints}
    assert "unet.mid_block.resnets.0.conv1.weight.fp8" in fused
    apart = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, fusion=None))
    drawn = []
    for each in (bundle, apart):
        with ControlNetPipeline(each) as pipeline:
            drawn.append(replay(pipeline, case.arguments, case.hints)[1].astype(np.float32) / 255)
    assert psnr(*drawn) > 35
    stored = ir.load(bundle.file("programs/unet.step.onnx")).graph.initializers
    assert stored["unet.mid_block.resnets.0.conv1.weight.fp8"].dtype == ir.DataType.FLOAT8E4M3FN
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.quality.psnr_db > LITTLE
    assert main(["inspect", str(bundle.path), "--quantization"]) == 0
    assert re.match(
        r"212 of 230 layers in fp8, by minmax, smoothed by 0\.5; all else in fp32; 1 unseen", capsys.readouterr().out
    )


def test_a_second_build_does_nothing(built: Built, calibrated: Calibrated) -> None:
    again = options(calibrated, built.bundle.path, built.bundle.manifest.backend)
    assert build(again, "pytest").cached


@pytest.mark.parametrize("native", [True, False])
def test_all_else_is_in_bfloat16_where_the_cpu_computes_in_it(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(openvino_backend, "native_precisions", lambda: ("fp32", "bf16") if native else ("fp32",))
    plain = options(calibrated, tmp_path / "plain")
    assert plain.unquantized_precision == ("bf16" if native else "fp32")
    for asked in ("bf16", "fp32"):
        assert options(calibrated, tmp_path / "bundle", unquantized=asked).unquantized_precision == asked
    for backend, asked in (("onnxruntime", "bf16"), ("tensorrt-rtx", "fp32")):
        with pytest.raises(ParameterError, match=f"--unquantized is '{asked}', but must be left out with {backend}"):
            options(calibrated, tmp_path / "bundle", backend, unquantized=asked)
    assert options(calibrated, tmp_path / "bundle", "tensorrt-rtx").unquantized_precision == "fp16"


def test_all_else_is_computed_as_asked_for(
    calibrated: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By OpenVINO, of one graph; a CPU without bfloat16 computes in float32."""
    (case,) = calibrated.statistics.unseen
    drawn, graphs = {}, {}
    for asked in ("fp32", "bf16"):
        bundle = build(options(calibrated, tmp_path / asked, unquantized=asked), "pytest").bundle
        found = {each.name: (each.precision, each.unquantized) for each in bundle.manifest.programs}
        assert {found[name] for name in STEPS} == {("int8", asked)}
        assert found["vae_decoder"] == (asked, None)
        assert found["text_encoder"] == ("fp32", None)
        graphs[asked] = bundle.file("programs/unet.step.onnx").read_bytes()
        with ControlNetPipeline(bundle) as pipeline:
            drawn[asked] = replay(pipeline, case.arguments, case.hints)[0]
        assert main(["inspect", str(bundle.path), "--programs"]) == 0
        assert f"int8, {asked}" in capsys.readouterr().out
    assert graphs["fp32"] == graphs["bf16"]  # of so few channels; larger ones have Winograd convolutions in float32
    native = "bf16" in native_precisions()
    assert np.array_equal(drawn["fp32"], drawn["bf16"]) != native
    assert rms_error(drawn["bf16"], drawn["fp32"]) < 0.05


@pytest.mark.parametrize("unquantized", ["fp32", "bf16"])
def test_within_a_budget_the_fast_blocks_are_taken(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unquantized: Precision
) -> None:
    """As if int8 were faster in the first block and slower in the second, whatever CPU this is."""
    saved, timed = iter([1.0, -1.0]), []

    def measure(before: OpenVinoExecutor, after: OpenVinoExecutor, program: str, bound: tuple[Arrays, Arrays]) -> float:
        timed.append([each._bundle.manifest.program(program) for each in (before, after)])
        assert bound[0]["latents"].shape == (1, 4, 64, 64)
        assert abs(run_in_turns(before, after, program, bound)) < 10
        return next(saved)

    run_in_turns = sensitivity.seconds_saved
    monkeypatch.setattr(sensitivity, "seconds_saved", measure)
    rest = ("down_blocks", "up_blocks", "controlnet.", "shortcut", "attentions")
    asked = options(calibrated, tmp_path / "bundle", budget=0.5, keep=rest, unquantized=unquantized)
    int8 = build(asked, "pytest").bundle.manifest.quantization
    assert [[(each.precision, each.unquantized) for each in pair] for pair in timed] == 2 * [
        [(unquantized, None), ("int8", unquantized)]
    ]
    assert int8 is not None
    assert {block.name for block in int8.blocks} == {
        "unet.mid_block.resnets.0",
        "unet.mid_block.resnets.1",
    }
    assert all(0 < block.latent_error < 0.5 for block in int8.blocks)
    assert [block.chosen for block in int8.blocks] == [True, False]
    chosen = {block.name for block in int8.blocks if block.chosen}
    assert {sensitivity.block_of(layer.name) for layer in int8.layers if layer.kept is None} == chosen


def test_a_budget_that_cannot_be_met(calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "seconds_saved", lambda *_: 1.0)
    keep = ("down_blocks", "up_blocks", "controlnet.", "shortcut", "attentions", "resnets.1")
    with pytest.raises(BuildError, match=r"no block is faster in int8 here within a quality budget of 1e-06"):
        build(options(calibrated, tmp_path / "bundle", budget=1e-6, keep=keep), "pytest")


def test_below_the_gate_nothing_is_left(calibrated: Calibrated, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"int8 draws pictures .* at least 120 are asked for"):
        build(options(calibrated, tmp_path / "bundle", min_psnr_db=120.0), "pytest")
    assert not list(tmp_path.iterdir())


def test_statistics_of_other_weights_are_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    parts = {**calibrated.statistics.about.parts, "controlnet.mask": "0" * 64}
    about = msgspec.structs.replace(calibrated.statistics.about, parts=parts)
    file = tmp_path / "statistics.safetensors"
    dataclasses.replace(calibrated.statistics, about=about).save(file)
    with pytest.raises(UserError, match=r"the statistics are of other weights than those of controlnet\.mask"):
        build(options(Calibrated(file, calibrated.statistics), tmp_path / "bundle"), "pytest")


def test_statistics_of_another_controlnet_are_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    """One of the same architecture."""
    others = {**CONTROLNETS, "canny": CONTROLNETS["mask"], "mask": CONTROLNETS["canny"]}
    good = options(calibrated, tmp_path / "bundle")
    with pytest.raises(UserError, match=r"of other weights than those of controlnet\.(canny|mask)"):
        build(dataclasses.replace(good, controlnets={name: str(path) for name, path in others.items()}), "pytest")


def test_statistics_of_fewer_parts_are_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    layers = {part: found for part, found in calibrated.statistics.layers.items() if part != "controlnet.mask"}
    file = tmp_path / "statistics.safetensors"
    dataclasses.replace(calibrated.statistics, layers=layers).save(file)
    with pytest.raises(UserError, match=r"the statistics say nothing of controlnet\.mask"):
        build(options(Calibrated(file, calibrated.statistics), tmp_path / "bundle"), "pytest")


def test_pictures_that_the_build_cannot_draw_are_none(calibrated: Calibrated, tmp_path: Path) -> None:
    (case,) = calibrated.statistics.unseen
    larger = dataclasses.replace(case, arguments={**case.arguments, "width": 768})
    file = tmp_path / "statistics.safetensors"
    dataclasses.replace(calibrated.statistics, unseen=(larger,)).save(file)
    with pytest.raises(UserError, match="the statistics hold no unseen picture that a bundle of 512x512"):
        build(options(Calibrated(file, calibrated.statistics), tmp_path / "bundle"), "pytest")


def test_what_makes_no_sense_is_refused(calibrated: Calibrated, tmp_path: Path) -> None:
    good = options(calibrated, tmp_path / "bundle")
    with pytest.raises(UserError, match=r"--precision int8 needs .* --calibration FILE"):
        dataclasses.replace(good, quantization=None)
    for precision in ("fp32", "fp8"):
        with pytest.raises(ParameterError, match="left out without --precision int8 or fp8"):
            dataclasses.replace(good, backend="onnxruntime", precision=precision)
    with pytest.raises(ParameterError, match="int8 with openvino; fp8 is for tensorrt, tensorrt-rtx, onnxruntime"):
        options(calibrated, tmp_path / "bundle", "openvino", "fp8")
    named = options(calibrated, tmp_path / "bundle", "tensorrt-rtx", "fp8").engine_options.compute_capabilities
    assert named == ("8.9", "12.0", "12.1")
    for capability, has_it in (("8.6", False), ("8.9", True), ("12.0", True)):
        asked = options(calibrated, tmp_path / "bundle", "tensorrt", "fp8")
        with contextlib.nullcontext() if has_it else pytest.raises(UserError, match=r"has compute capability 8\.6"):
            refuse_fp8_without_gpu_for_it(asked, Gpu(name="GeForce", compute_capability=capability))
    old = EngineOptions(compute_capabilities=("8.6", "8.9"))
    with pytest.raises(ParameterError, match=r"--compute-capability is '8\.6', but must be 8\.9 or later"):
        options(calibrated, tmp_path / "bundle", "tensorrt-rtx", "fp8", engine=old)
    with pytest.raises(ParameterError, match="--quality-budget"):
        options(calibrated, tmp_path / "bundle", "tensorrt-rtx", budget=0.1)
    with pytest.raises(UserError, match="there are no statistics at"):
        build(options(Calibrated(tmp_path / "none", calibrated.statistics), tmp_path / "bundle"), "pytest")


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_tensorrt_takes_the_step_of_a_calibration(calibrated: Calibrated, tmp_path: Path, backend: BackendName) -> None:
    """TensorRT-RTX builds it with weights alone in int8, and its parser reads TensorRT's, with inputs in int8 too."""
    trt = pytest.importorskip("tensorrt_rtx")
    given = options(calibrated, tmp_path / "bundle", backend)
    source = export_programs(given.model, given.controlnets, given.profile)
    exported = read_manifest(source)
    graphs = list(part_graphs(source, exported, ()))
    assert given.quantization is not None
    chosen = choose(calibrated.statistics, given.quantization, backend, exported, source, graphs, {})
    (unet,) = (each for each in graphs if each.program.name == "unet")
    programs = compile_part(unet, exported, BACKENDS[backend], "fp16", chosen.quantize("unet"))
    (step,) = (each for each in programs if each.program.stage == "step")
    for folder in ("programs", "onnx"):
        (tmp_path / folder).mkdir()
    with WeightStore(tmp_path / "onnx") as store:
        store.save(step.model, "step.onnx")
    onnx = tmp_path / "onnx" / "step.onnx"
    if backend == "tensorrt-rtx":
        engine = EngineOptions(compute_capabilities=("8.9",))
        built = BACKENDS[backend].finish(step.program, onnx, tmp_path, given.profile, engine)
        assert (tmp_path / built.file).stat().st_size > 2**20
        return
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network()
    file, _ = write_for_parser(step.program.name, onnx)
    assert trt.OnnxParser(network, logger).parse_from_file(str(file))
    found = [network.get_layer(number).type for number in range(network.num_layers)]
    written = Counter(node.op_type for node in step.model.graph)
    assert found.count(trt.LayerType.QUANTIZE) == written["QuantizeLinear"] > 50
    assert found.count(trt.LayerType.DEQUANTIZE) == written["DequantizeLinear"] > 2 * written["QuantizeLinear"]
