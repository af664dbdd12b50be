"""The command: its mistakes, and a run of it on the demo model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import diffusers
import msgspec
import numpy as np
import pytest

from controlrt.perf.inputs import OUTPUT_COLUMN, STEP, STEPS, StepInputs, step_inputs
from controlrt.perf.report import AblationReport
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.commands import main
from controlrt.runtime.manifest import Manifest, Program, TensorSpec

SCRATCH = Path(os.environ["CONTROLRT_CACHE"]) / "bench" / "ablation"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats is 0, but must be at least 1"),
        (["--threads", "0"], "--threads is 0, but must be at least 1"),
        (["--only", "eager,nothing"], "unknown variant 'nothing'"),
        (["--memory", "0.1"], "and 0.1 GiB may be used; free some memory, or say with --memory GIB"),
        (["--output", "/proc/no/such/file.json"], "cannot write /proc/no/such/file.json"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path))
    assert main(["bench", "ablation", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_inputs_are_those_of_the_diffusers_step(demo_export: Bundle, tmp_path: Path) -> None:
    inputs = step_inputs(demo_export, "controlnet.canny")
    scheduler = diffusers.DDIMScheduler.from_config(json.loads(demo_export.file("scheduler.json").read_text()))
    scheduler.set_timesteps(STEPS)
    assert inputs.timestep == [float(scheduler.timesteps[STEP])]
    assert inputs.latents.shape == (1, 4, 8, 8)
    assert inputs.prompt_embeds.shape == (2, 77, 64)
    assert inputs.hint.shape == (1, 3, 64, 64)
    assert set(np.unique(inputs.hint)) == {0, 1}
    (history,) = np.flatnonzero(inputs.update[0, 1])
    assert (history, inputs.update[0, 1, history]) == (OUTPUT_COLUMN, 1)
    inputs.save(tmp_path / "inputs.npz")
    read = StepInputs.load(tmp_path / "inputs.npz")
    for name in StepInputs.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(read, name), getattr(inputs, name))


@pytest.fixture
def demo_export(tmp_path: Path) -> Bundle:
    """As much of an export as inputs are made from."""
    from controlrt.demo import MODEL_DIR

    tensors = {
        "latents": ("batch", 4, 8, 8),
        "prompt_embeds": ("rows", 77, 64),
        "hint": ("batch", 3, 64, 64),
    }
    program = Program(
        name="controlnet.canny",
        part="controlnet.canny",
        stage=None,
        file="programs/controlnet.canny.onnx",
        cost=None,
        inputs=tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in tensors.items()),
        outputs=(),
        max_relative_error=0.0,
        export_seconds=0.0,
    )
    scheduler = (MODEL_DIR / "scheduler" / "scheduler_config.json").read_text()
    (tmp_path / "scheduler.json").write_text(scheduler)
    unused = dict.fromkeys(Manifest.__struct_fields__)
    return Bundle(tmp_path, Manifest(**{**unused, "programs": (program,), "files": {"scheduler.json": "0" * 64}}))


@pytest.mark.slow
def test_the_demo_model_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every runtime once, the last variants of each: what they give is right, and less is computed."""
    output = tmp_path / "results" / "ablation.json"
    only = "eager,*+guidance-sharing,*+binding-times,*+fuse"
    assert main(["bench", "ablation", "--repeats", "1", "--only", only, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    report = msgspec.json.decode(output.read_bytes(), type=AblationReport)
    variants = {variant.name: variant for variant in report.variants}
    assert all(name in printed for name in variants)
    assert variants.keys() >= {"eager", "plain-onnxruntime", "onnxruntime+binding-times", "onnxruntime+fuse"}
    for name, variant in variants.items():
        assert variant.peak_memory_bytes > 2**26
        assert variant.load_seconds > variant.median_seconds > 0
        assert (variant.accuracy is None) == (name == "plain-onnxruntime")
        assert (variant.graph is None) == (name == "eager")
    assert not report.failed
    plain, shared = variants["plain-onnxruntime"].graph, variants["onnxruntime+guidance-sharing"].graph
    bundle = variants["onnxruntime+binding-times"].graph
    assert plain is not None
    assert shared is not None
    assert bundle is not None
    assert plain.flops > shared.flops > bundle.flops
    assert plain.matmuls > bundle.matmuls
    assert not SCRATCH.exists()
