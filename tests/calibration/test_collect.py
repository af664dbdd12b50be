"""Calibrations of the demo model, a few steps each."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from calibrations import OPTIONS, Calibrated
from controlrt.calibration import collect as module
from controlrt.calibration.cases import PlannedCase, plan_cases
from controlrt.calibration.collect import collect, partial_file
from controlrt.calibration.data import read_examples
from controlrt.compiler.quantization.layers import layers_of
from controlrt.compiler.quantization.statistics import BUCKETS, bucket_of
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import CalibrationError, OutputError, PictureError
from controlrt.runtime.pictures import to_pixels
from controlrt.runtime.pipeline import ControlNetPipeline
from controlrt.runtime.samplers import SamplerTable

pytestmark = pytest.mark.bundle
PARTS = ("unet", "controlnet.canny", "controlnet.mask")


def test_every_layer_of_every_step_is_seen(bundle: Bundle, calibrated: Calibrated) -> None:
    assert set(calibrated.statistics.layers) == set(PARTS)
    for part in PARTS:
        graph = ir.load(bundle.file(f"programs/{part}.step.onnx")).graph
        assert set(calibrated.statistics.layers[part]) == {layer.name for layer in layers_of(graph)}


def test_the_first_layer_reads_what_the_sampler_hands_on(bundle: Bundle, calibrated: Calibrated) -> None:
    """The UNet sees latents * input scale; the pipeline gives the latents away after each step."""
    examples = read_examples("demo", dict.fromkeys(("canny", "mask")), count=3, seed=OPTIONS.seed)
    expected = np.zeros(BUCKETS, np.float32)
    with ControlNetPipeline.load(bundle.path) as pipeline:
        for case in plan_cases(OPTIONS, examples, pipeline.controls)[: OPTIONS.cases]:
            table = pipeline.sampler_table(case.sampler, OPTIONS.steps)

            def keep(_: object, step: int, __: float, state: dict, table: SamplerTable = table) -> None:
                if step + 1 < OPTIONS.steps:
                    bucket = bucket_of(table.timesteps[step + 1])
                    seen = np.abs(state["latents"] * np.float32(table.input_scale[step + 1])).max()
                    expected[bucket] = max(expected[bucket], seen)

            pipeline(
                case.example.prompt,
                {name: case.example.controls[name](*OPTIONS.size) for name in case.controls},
                scheduler=case.sampler,
                num_inference_steps=OPTIONS.steps,
                guidance_scale=case.guidance_scale,
                seed=case.seed,
                callback_on_step_end=keep,
                output_type="latent",
            )
    found = calibrated.statistics.layers["unet"]["unet.conv_in"].bucket_amax
    np.testing.assert_allclose(found[expected > 0], expected[expected > 0], rtol=1e-4)


def test_samples_are_within_what_is_exact(calibrated: Calibrated) -> None:
    for layers in calibrated.statistics.layers.values():
        for layer in layers.values():
            assert layer.bucket_amax.max() == layer.amax
            width = layer.limit / layer.histogram.shape[1]
            for bucket, counts in zip(layer.bucket_amax, layer.histogram, strict=True):
                largest = np.flatnonzero(counts).max(initial=0) * width
                assert largest <= bucket
                assert bool(counts.any()) == bool(bucket > 0)


def test_cases_that_are_kept_are_drawn_again_by_their_arguments(bundle: Bundle, calibrated: Calibrated) -> None:
    (case,) = calibrated.statistics.unseen
    assert case.latents.shape == (OPTIONS.steps, 1, 4, 64, 64)
    with ControlNetPipeline.load(bundle.path) as pipeline:
        drawn = pipeline(**case.arguments, image=case.hints, output_type="np")
    difference = to_pixels(drawn.images).astype(int) - case.pictures
    assert np.abs(difference).max() <= 1  # without taps, sums may come in another order


def test_the_same_seed_makes_the_same_bytes_resumed_or_not(
    bundle: Bundle,
    calibrated: Calibrated,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    output = tmp_path / "statistics.safetensors"
    for done in (1, 2):
        with monkeypatch.context() as patch:
            interrupt_after(1, patch)
            with pytest.raises(KeyboardInterrupt):
                collect(bundle, "demo", OPTIONS, output)
        assert not output.exists()
        assert ("going on after case 1" in capsys.readouterr().err) == (done == 2)
    collect(bundle, "demo", OPTIONS, output)
    assert "going on after case 2" in capsys.readouterr().err
    assert output.read_bytes() == calibrated.file.read_bytes()
    assert list(tmp_path.iterdir()) == [output]


def test_other_options_start_anew_and_say_so(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "statistics.safetensors"
    partial_file(output).write_bytes(b"no statistics")
    options = dataclasses.replace(OPTIONS, steps=1, unseen=0, seed=3)
    for option in ({}, {"seed": 4}):
        with monkeypatch.context() as patch:
            interrupt_after(1, patch)
            with pytest.raises(KeyboardInterrupt):
                collect(bundle, "demo", dataclasses.replace(options, **option), output)
        assert "is of other options, programs or pictures; starting anew" in capsys.readouterr().err


def interrupt_after(calls: int, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the call after ``calls`` of the pipeline."""
    draw, left = ControlNetPipeline.__call__, [calls]

    def interrupted(self: ControlNetPipeline, *arguments: Any, **keywords: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return draw(self, *arguments, **keywords)

    patch.setattr(ControlNetPipeline, "__call__", interrupted)


def test_what_is_not_finite_is_named(bundle: Bundle, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle.path, tmp_path / "damaged"))
    graph = ir.load(damaged / "programs" / "unet.step.onnx").graph
    (layer,) = (layer for layer in layers_of(graph) if layer.name == "unet.mid_block.resnets.0.conv1")
    tensor = layer.weight.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with (damaged / "programs" / "weights.bin").open("r+b") as weights:
        weights.seek(tensor.offset or 0)
        weights.write(np.float32("nan").tobytes())
    with pytest.raises(
        CalibrationError, match=r"layer unet\.mid_block\.resnets\.0\.conv2 of unet reads values at timestep"
    ):
        collect(Bundle.open(damaged, verify=False), "demo", OPTIONS, tmp_path / "statistics.safetensors")


def test_a_picture_that_cannot_be_read_is_told_of_before_anything_runs(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(0, monkeypatch)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    line = {"prompt": "one", "controls": {"canny": "broken.png", "mask": "broken.png"}}
    (tmp_path / "set.jsonl").write_text(json.dumps(line) + "\n")
    options = dataclasses.replace(OPTIONS, unseen=0)
    with pytest.raises(PictureError, match=r"broken\.png is not a picture"):
        collect(bundle, str(tmp_path / "set.jsonl"), options, tmp_path / "statistics.safetensors")


def test_a_place_that_cannot_be_written(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; choose another place"):
        collect(bundle, "demo", OPTIONS, tmp_path / "file" / "statistics.safetensors")


def test_memory_does_not_grow_with_cases(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python and NumPy hold after each of 18 cases; the first nine have every sampler, scale and set of controls.

    Embeddings of each prompt are kept, a few KB; what one launch computes is tens of MiB.
    """
    held: list[int] = []
    see = module._Collection._see

    def listen(self: module._Collection, case: PlannedCase) -> None:
        see(self, case)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(module._Collection, "_see", listen)
    tracemalloc.start()
    try:
        collect(
            bundle, "demo", dataclasses.replace(OPTIONS, cases=18, steps=1, unseen=0), tmp_path / "file.safetensors"
        )
    finally:
        tracemalloc.stop()
    assert held[-1] - held[8] < 2**20


def test_lines_of_a_file_are_drawn_as_they_say(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, negative prompts and control pictures reach the pipeline."""
    edges = np.zeros((512, 512, 3), np.uint8)
    edges[100:400, 200] = 255
    Image.fromarray(edges).save(tmp_path / "edges.png")
    lines = [
        {"prompt": "a red star", "negative_prompt": "fog", "controls": {"canny": "edges.png"}},
        {"prompt": "a blue moon", "controls": {"mask": "edges.png"}},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    calls: list[dict[str, Any]] = []
    draw = ControlNetPipeline.__call__

    def listen(self: ControlNetPipeline, **keywords: Any) -> Any:
        calls.append(keywords)
        return draw(self, **keywords)

    monkeypatch.setattr(ControlNetPipeline, "__call__", listen)
    options = dataclasses.replace(OPTIONS, cases=2, steps=1, unseen=0)
    found = collect(bundle, str(file), options, tmp_path / "statistics.safetensors")
    assert set(found.layers) == set(PARTS)
    assert {(call["prompt"], call.get("negative_prompt"), *call["image"]) for call in calls} == {
        ("a red star", "fog", "canny"),
        ("a blue moon", None, "mask"),
    }
    assert all(np.array_equal(hint, edges) for call in calls for hint in call["image"].values())
