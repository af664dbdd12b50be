"""A checkpoint as people have it, from files to latents: one build of a single file, a ControlNet file and two LoRAs.

The reference is diffusers in eager PyTorch on the folders that the files were made from, its LoRAs loaded beside the
weights; float32 on both sides.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from original_layout import checkpoint_tensors, controlnet_tensors
from parity.eager import LATENTS_BOUND, PROMPT, check_same, hints, relative
from safetensors.torch import save_file

from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.commands import main
from controlrt.runtime.storage import sha256_file
from families import SIDE, Family, lora_tensors

WEIGHTS = (0.8, -0.5)
pytestmark = pytest.mark.parametrize("family", ["sd21"], indirect=True, scope="module")


def style(family: Family) -> dict[str, torch.Tensor]:
    return lora_tensors(family, "kohya", seed=1, alpha=2.0, convolutions=True)


def details(family: Family) -> dict[str, torch.Tensor]:
    return lora_tensors(family, "peft", seed=2)


@pytest.fixture(scope="module")
def files(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.ckpt and what describes it, control.pth, style.safetensors and details.safetensors."""
    folder = tmp_path_factory.mktemp("files")
    torch.save({"state_dict": checkpoint_tensors(family.reference(), family.name)}, folder / "model.ckpt")
    shutil.copytree(family.model, folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    control = controlnet_tensors(ControlNetModel.from_pretrained(family.controlnets["first"]))
    torch.save({f"control_model.{name}": value for name, value in control.items()}, folder / "control.pth")
    save_file(style(family), folder / "style.safetensors")
    save_file(details(family), folder / "details.safetensors")
    return folder


def build(files: Path, output: Path) -> str:
    command = [
        sys.executable,
        "-c",
        "import sys; from controlrt.runtime.commands import build_engines; sys.exit(build_engines())",
    ]
    options = ["--profile", f"{SIDE}x{SIDE}", "--backend", "onnxruntime", "--output", str(output)]
    options += ["--model", str(files / "model.ckpt"), "--config", str(files / "config")]
    options += ["--controlnet", f"first={files / 'control.pth'}"]
    options += [
        "--lora",
        f"{files / 'style.safetensors'}:{WEIGHTS[0]}",
        "--lora",
        f"{files / 'details.safetensors'}:-0.5",
    ]
    built = subprocess.run([*command, *options], capture_output=True, text=True, env=dict(os.environ), timeout=600)
    assert built.returncode == 0, built.stderr
    return built.stdout


@pytest.fixture(scope="module")
def bundle(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundles") / "sd21"
    build(files, output)
    return output


@pytest.fixture(scope="module")
def reference(family: Family) -> Any:
    pipeline = family.reference("first")
    pipeline.load_lora_weights(
        lora_tensors(family, "kohya", seed=1, alpha=2.0, convolutions=True), adapter_name="style"
    )
    pipeline.load_lora_weights(lora_tensors(family, "peft", seed=2), adapter_name="details")
    pipeline.set_adapters(["style", "details"], list(WEIGHTS))
    return pipeline


def drawn(pipeline: Any, hint: Any, **options: Any) -> Any:
    return np.asarray(pipeline(PROMPT, image=hint, output_type="latent", **options).images)


def test_the_same_picture(bundle: Path, reference: Any) -> None:
    (hint,) = hints(SIDE, 1)
    shared = {"num_inference_steps": 5, "guidance_scale": 4.0, "negative_prompt": "a moon"}
    with ControlNetPipeline.load(bundle) as pipeline:
        found = drawn(pipeline, {"first": hint}, seed=3, **shared)
        expected = drawn(reference, hint, generator=torch.Generator().manual_seed(3), **shared)
        check_same(pipeline, found, reference, expected)
    reference.disable_lora()
    without = drawn(reference, hint, generator=torch.Generator().manual_seed(3), **shared)
    assert relative(without, expected) > 20 * LATENTS_BOUND
    reference.enable_lora()


def test_what_was_merged_is_on_record(bundle: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(bundle)
    found = [(lora.name, lora.source, lora.weight, lora.sha256) for lora in manifest.model.loras]
    named = [(name, files / f"{name}.safetensors") for name in ("style", "details")]
    assert found == [
        (name, str(file), weight, sha256_file(file)) for (name, file), weight in zip(named, WEIGHTS, strict=True)
    ]
    sources = {"model", "config", "controlnet.first", "lora.style", "lora.details"}
    assert set(manifest.provenance.sources) == sources
    assert main(["inspect", str(bundle)]) == 0
    printed = capsys.readouterr().out
    assert f"lora       style at 0.8 ({files / 'style.safetensors'}, sha256 {found[0][3][:12]})" in printed
    assert "lora       details at -0.5" in printed


def test_a_second_build_does_nothing(bundle: Path, files: Path) -> None:
    assert "up to date, nothing to do" in build(files, bundle)
