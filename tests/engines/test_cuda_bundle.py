"""A bundle for a GPU, built without one and run on a simulated one, beside the same programs on the CPU."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from runtime.cuda.simulated import SimulatedDevice, SimulatedEngines

from controlled_calls import CALLS, draw, square
from controlrt.compiler.standard_form import standard_form
from controlrt.compiler.weights import WeightStore
from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.engines.backends.cuda import CudaBackend
from controlrt.engines.build import BuildOptions, build
from controlrt.runtime import ControlNetPipeline, pipeline
from controlrt.runtime.bundle import Bundle, digest_files
from controlrt.runtime.executors import open_host_executor
from controlrt.runtime.executors.cuda import CudaExecutor
from controlrt.runtime.profile import ShapeProfile


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo model for backend cuda, its operators written in standard ones, as the CPU runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CudaBackend, "is_installed", lambda _: True)
        patch.setattr(CudaBackend, "versions", lambda _: {"onnxruntime-gpu": "1.31.1"})
        options = BuildOptions(
            model=str(MODEL_DIR),
            controlnets={name: str(path) for name, path in CONTROLNETS.items()},
            profile=ShapeProfile.parse("512x512", "1-4"),
            output=tmp_path_factory.mktemp("built") / "demo",
            backend="cuda",
            precision="fp32",
        )
        built = build(options, "pytest").bundle
    directory = tmp_path_factory.mktemp("standard")
    (directory / "programs").mkdir()
    with WeightStore(directory / "programs") as store:
        for program in built.manifest.programs:
            store.save(standard_form(ir.load(built.path / program.file)), Path(program.file).name)
    for file in built.manifest.files:
        if not file.startswith("programs/"):
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).write_bytes((built.path / file).read_bytes())
    return Bundle(directory, msgspec.structs.replace(built.manifest, files=digest_files(directory)))


def test_the_encoder_beside_the_controlnets_changes_nothing(
    bundle: Bundle, demo: ControlNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit what the same programs make one after the other; and what another backend makes, to rounding."""
    monkeypatch.setattr(pipeline, "open_executor", lambda found, *_: open_host_executor(found))
    device = SimulatedDevice()
    engines = SimulatedEngines(device)
    with ControlNetPipeline(bundle) as on_the_cpu:
        monkeypatch.setattr(pipeline, "open_executor", lambda found, *_: CudaExecutor(found, device, engines))
        with ControlNetPipeline(bundle) as simulated:
            for call in CALLS.values():
                found = draw(simulated, **call)
                np.testing.assert_array_equal(found, draw(on_the_cpu, **call))
                np.testing.assert_allclose(found, draw(demo, **call), atol=2e-3)
    assert device.held() == (0, 0, 0, 0)


def test_two_streams_meet_before_the_decoder(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    engines = SimulatedEngines(device)
    monkeypatch.setattr(pipeline, "open_executor", lambda found, *_: CudaExecutor(found, device, engines))
    with ControlNetPipeline(bundle) as simulated:
        draw(simulated, num_inference_steps=1, image={"mask": square(), "canny": square(90)})
        (graph,) = device.graphs.values()
    queued = [entry for entry, _ in graph if entry[0] in ("run", "wait")]
    assert queued == [
        ("wait", 1, 0),
        ("run", "unet.encode", 0),
        ("run", "controlnet.canny.step", 1),
        ("run", "controlnet.mask.step", 1),
        ("wait", 0, 1),
        ("run", "unet.step", 0),
    ]
