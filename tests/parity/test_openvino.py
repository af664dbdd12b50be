"""OpenVINO bundles against eager diffusers, and what happens where OpenVINO is not installed.

The bounds are those of parity/eager.py; rounding alone gives about 2e-6 of the latents' norm.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from parity.eager import PROMPT, PSNR_BOUND, check_same, demo_reference, hints, psnr
from parity.test_diffusers import NEGATIVE, check_same_picture
from PIL import Image

from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.demo.scenes import sample_scene
from controlrt.engines.backends import choose_backend
from controlrt.engines.build import BuildOptions, build
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.commands import main
from controlrt.runtime.errors import BundleError, UserError
from controlrt.runtime.executors import openvino as openvino_executor
from controlrt.runtime.profile import ShapeProfile
from families import CONTROLS, SIDE, Family


@pytest.fixture(scope="module")
def demo_on_openvino() -> Iterator[ControlNetPipeline]:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    output = Path(os.environ["CONTROLRT_CACHE"]) / "tests" / "demo-512x512-openvino"
    options = BuildOptions(
        model=str(MODEL_DIR),
        controlnets={name: str(path) for name, path in CONTROLNETS.items()},
        profile=ShapeProfile.parse("512x512", "1-4"),
        output=output,
        backend="openvino",
    )
    build(options, "pytest")
    with ControlNetPipeline.load(output) as pipeline:
        yield pipeline


@pytest.mark.parametrize("controls", [("canny",), ("canny", "mask")])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_same_picture_of_the_demo_model(
    demo_on_openvino: ControlNetPipeline, controls: tuple[str, ...], guidance_scale: float
) -> None:
    scene = sample_scene(np.random.default_rng(22))
    pictures = [Image.fromarray(scene.control(name, 512)) for name in controls]
    reference = demo_reference(*controls)
    check_same_picture(demo_on_openvino, reference, controls, pictures, 0.8, guidance_scale, steps=3)


def test_steps_of_sizes_no_longer_planned_are_let_go(demo_on_openvino: ControlNetPipeline) -> None:
    """Each size packs the weights anew: what a server keeps is bounded by the plans it keeps."""
    one_step = {"num_inference_steps": 1, "output_type": "latent"}
    for batch in (1, 2, 3, 4):
        for guidance_scale in (1.0, 5.0):
            demo_on_openvino("", num_images_per_prompt=batch, guidance_scale=guidance_scale, **one_step)
    gc.collect()
    assert len(demo_on_openvino._bound) == 4
    assert len(demo_on_openvino._executor._sized) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_weights_that_are_packed_do_not_stay_mapped(demo_on_openvino: ControlNetPipeline) -> None:
    """Those of programs of any size are packed by their first run, those of the VAE of one size when it is opened."""
    hint = {"mask": Image.fromarray(sample_scene(np.random.default_rng(28)).control("mask", 512))}
    demo_on_openvino("a line", hint, num_inference_steps=1)
    file = demo_on_openvino.bundle.path / "programs" / "weights.bin"
    assert _resident(file) < 0.01 * file.stat().st_size
    vae = demo_on_openvino._executor._any_size["vae_decoder"]
    assert vae.get_compiled_model().input("latents").get_partial_shape().is_static


def _resident(file: Path) -> int:
    """Bytes of the file's maps, of which there are some, that are in this process's memory."""
    found, of_file = 0, False
    assert str(file.resolve()) in Path("/proc/self/maps").read_text()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            of_file = line.endswith(str(file.resolve()))
        elif of_file and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_vae_gives_back_what_it_computed_in(
    demo_on_openvino: ControlNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps' before it runs, its own after; the demo model's, which is small, keeps it. The pictures stay the same
    to the bit."""
    executor, latents = demo_on_openvino._executor, np.random.default_rng(0).normal(size=(1, 4, 64, 64))
    inputs = {"latents": latents.astype(np.float32)}
    call = {"num_inference_steps": 1, "seed": 0, "output_type": "latent"}
    drawn = demo_on_openvino("", **call).images
    events: list[set[int]] = []
    release = openvino_executor._release_scratch

    def recorded(*requests: Any) -> None:
        events.append({id(request) for request in requests})
        release(*requests)

    monkeypatch.setattr(openvino_executor, "_release_scratch", recorded)
    expected, held = executor.run("vae_decoder", inputs)["picture"], _anonymous()
    assert not events
    monkeypatch.setattr(openvino_executor, "_LARGE", 0)
    found, left = executor.run("vae_decoder", inputs)["picture"], _anonymous()
    steps, own = events
    assert steps == {id(request) for request in executor._sized.values()}
    assert own == {id(executor._any_size["vae_decoder"])}
    assert np.array_equal(found, expected)
    assert held - left > 4 * expected.nbytes
    assert np.array_equal(demo_on_openvino("", **call).images, drawn)


def _anonymous() -> int:
    """Bytes of this process's memory that are of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_float16_stays_where_a_program_runs_seldom(
    demo_on_openvino: ControlNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, bool] = {}

    def compiled(file: Path, *_: Any, keep_half: bool) -> Any:
        kept[file.stem] = keep_half
        return SimpleNamespace(create_infer_request=lambda: None)

    monkeypatch.setattr(openvino_executor, "compile_model", compiled)
    for program in demo_on_openvino.bundle.manifest.programs:
        demo_on_openvino._executor._compile(program.name, None)
    assert {name for name, half in kept.items() if half} == {
        "text_encoder",
        *(f"{part}.{stage}" for part in ("controlnet.canny", "controlnet.mask") for stage in ("hint", "prompt")),
        *(f"{part}.timestep" for part in ("controlnet.canny", "controlnet.mask", "unet")),
        "unet.prompt",
    }
    assert {"unet.step", "vae_decoder", "vae_encoder"} < set(kept)


@pytest.mark.parametrize("keep_half", [False, True])
def test_weights_in_float16_stay_so_in_memory(tmp_path: Path, keep_half: bool) -> None:
    """And what is multiplied by them is the same as by their values in float32, which NumPy says."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(96, 160)).astype(np.float16)
    nodes = [
        onnx.helper.make_node("Cast", ["weight"], ["full"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("MatMul", ["rows", "full"], ["out"]),
    ]
    described = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        for name, size in (("rows", 96), ("out", 160))
    ]
    graph = onnx.helper.make_graph(
        nodes, "half", described[:1], described[1:], [onnx.numpy_helper.from_array(weight, "weight")]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "half.onnx")
    compiled = openvino_executor.compile_model(tmp_path / "half.onnx", keep_half=keep_half)
    rows = rng.normal(size=(7, 96)).astype(np.float32)
    found = compiled([rows])[0]
    np.testing.assert_allclose(found, rows @ weight.astype(np.float32), rtol=1e-5, atol=1e-5)
    held = {
        str(node.output(0).get_element_type().get_type_name())
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "Const" and node.output(0).get_element_type().is_real()
    }
    assert held == ({"f16"} if keep_half else {"f32"})


def test_two_pictures_and_a_window_of_guidance(demo_on_openvino: ControlNetPipeline) -> None:
    """Two plans on the same buffers: a step binds some of their rows."""
    scenes = [sample_scene(np.random.default_rng(seed)) for seed in (25, 26)]
    pictures = [Image.fromarray(scene.control("mask", 512)) for scene in scenes]
    prompts = [scene.prompt for scene in scenes]
    reference = demo_reference("mask")

    def off(pipeline: object, step: int, _: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step != 1:
            return {}
        pipeline._guidance_scale = 0.0  # type: ignore[attr-defined]
        return {name: value.chunk(2)[1] for name, value in tensors.items()}

    expected = reference(
        prompts,
        image=pictures,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        callback_on_step_end=off,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "image"],
        output_type="np",
    ).images
    shared = {"num_inference_steps": 3, "guidance_scale": 7.5, "seed": [1, 2], "output_type": "np"}
    found = demo_on_openvino(prompts, {"mask": pictures}, guidance_end=0.7, **shared).images
    for picture in range(2):
        assert psnr(found[picture], expected[picture]) > PSNR_BOUND


def test_the_same_call_twice(demo_on_openvino: ControlNetPipeline) -> None:
    """After another size of the batch, which compiles the loop anew, and with a control that was off before."""
    hint = {"mask": Image.fromarray(sample_scene(np.random.default_rng(27)).control("mask", 512))}
    shared = {"num_inference_steps": 2, "seed": 3, "output_type": "latent"}
    first = demo_on_openvino(PROMPT, hint, **shared).images
    demo_on_openvino([PROMPT, "a black moon"], num_inference_steps=2, seed=9, output_type="latent")
    np.testing.assert_array_equal(demo_on_openvino(PROMPT, hint, **shared).images, first)


@pytest.fixture(scope="module")
def on_openvino(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlNetPipeline]:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    output: Path = tmp_path_factory.mktemp("openvino") / family.name
    options = BuildOptions(
        **family.sources(),
        profile=ShapeProfile.parse(f"{SIDE}x{SIDE}", "1-4"),
        output=output,
        backend="openvino",
    )
    build(options, "pytest")
    with ControlNetPipeline.load(output) as pipeline:
        yield pipeline


@pytest.mark.parametrize("family", ["sd21", "sdxl"], indirect=True, scope="module")
@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_same_picture(on_openvino: ControlNetPipeline, family: Family, guidance_scale: float) -> None:
    """Linear projections and v-prediction; added conditioning and two text encoders."""
    reference = family.reference(*CONTROLS)
    check_same_picture(on_openvino, reference, CONTROLS, hints(SIDE, 2), 0.9, guidance_scale, steps=4)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True, scope="module")
def test_a_batch(on_openvino: ControlNetPipeline, family: Family) -> None:
    prompts = [PROMPT, "a black circle on an orange background"]
    shared = {
        "num_inference_steps": 3,
        "guidance_scale": 6.0,
        "negative_prompt": [NEGATIVE] * 2,
        "output_type": "latent",
    }
    pictures = hints(SIDE, 2)
    generator = torch.Generator().manual_seed(9)
    reference = family.reference("first")
    expected = reference(prompts, image=pictures, generator=generator, **shared).images
    found = on_openvino(prompts, {"first": pictures}, seed=9, **shared).images
    check_same(on_openvino, found, reference, expected)


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.fixture
def openvino_bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """The demo bundle with the name of the other backend in its manifest."""
    copy = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"backend": "openvino"}))
    return copy


@pytest.mark.usefixtures("without_openvino")
def test_a_bundle_where_openvino_is_not_installed(openvino_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says = r"not installed: pip install 'controlrt\[openvino\]', or build one .* build-engines --backend onnxruntime"
    with pytest.raises(BundleError, match=says):
        ControlNetPipeline.load(openvino_bundle)
    output = openvino_bundle.parent / "out.png"
    assert main(["generate", str(openvino_bundle), "--prompt", "a star", "--steps", "1", "-o", str(output)]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert "pip install 'controlrt[openvino]'" in error[-1]
    assert not output.exists()


@pytest.mark.usefixtures("without_openvino")
def test_building_where_openvino_is_not_installed() -> None:
    assert choose_backend(None) == "onnxruntime"
    with pytest.raises(UserError, match=r"openvino is not installed here; .* pip install 'controlrt\[openvino\]'"):
        choose_backend("openvino")
    with pytest.raises(UserError, match="no backend 'coreml'; there are: tensorrt, cuda, tensorrt-rtx, openvino, onnx"):
        choose_backend("coreml")
