"""The sampler configs that few-step checkpoints are published with, with control, on a small model of their kind.

They are drawn without guidance. The reference is diffusers in eager PyTorch with the same scheduler.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
import torch
from parity.eager import PROMPT, check_same, hints

from controlrt.export import checkpoint
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.bundle import digest_files, read_manifest, write_manifest
from families import SCALED_LINEAR, SIDE, Family

TRAILING = {**SCALED_LINEAR, "timestep_spacing": "trailing"}
DDIM = {"clip_sample": False, "set_alpha_to_one": False}
Config = tuple[str, dict[str, Any], tuple[int, ...], dict[str, Any]]
"""The scheduler's class and options, the numbers of steps, and what else a call says."""
OF_2: dict[str, Config] = {
    "SD-Turbo": ("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "epsilon"}, (1, 4), {}),
    "LCM": ("LCMScheduler", {**SCALED_LINEAR, "clip_sample": False, "original_inference_steps": 50}, (1, 4), {}),
    "Hyper-SD": ("DDIMScheduler", {**TRAILING, **DDIM}, (2, 8), {}),
    "2.x at 768": ("DDIMScheduler", {**SCALED_LINEAR, **DDIM, "prediction_type": "v_prediction"}, (6,), {}),
}
OF_XL: dict[str, Config] = {
    "SDXL-Turbo": ("EulerAncestralDiscreteScheduler", TRAILING, (1, 3), {}),
    "SDXL-Lightning": ("EulerDiscreteScheduler", TRAILING, (2, 8), {}),
    "SDXL-Lightning in one step": ("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, (1,), {}),
    "Hyper-SD unified": ("TCDScheduler", {**SCALED_LINEAR, "timestep_spacing": "leading"}, (4,), {"eta": 0.5}),
}


@pytest.mark.parametrize("family", ["sd21"], indirect=True, scope="module")
@pytest.mark.parametrize("kind", list(OF_2))
def test_configs(compiled: ControlNetPipeline, family: Family, tmp_path: Path, kind: str) -> None:
    check(compiled, family, tmp_path, *OF_2[kind])


@pytest.mark.parametrize("family", ["sdxl"], indirect=True, scope="module")
@pytest.mark.parametrize("kind", list(OF_XL))
def test_configs_of_xl(compiled: ControlNetPipeline, family: Family, tmp_path: Path, kind: str) -> None:
    check(compiled, family, tmp_path, *OF_XL[kind])


def check(
    compiled: ControlNetPipeline,
    family: Family,
    folder: Path,
    name: str,
    config: dict[str, Any],
    steps: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    """The config is stored in a copy of the bundle, as the export of such a checkpoint stores it."""
    scheduler = getattr(diffusers, name).from_config(config)
    copy = Path(shutil.copytree(compiled.bundle.path, folder / "bundle"))
    (copy / "scheduler.json").write_text(json.dumps(checkpoint.stored_scheduler_config(scheduler)))
    write_manifest(copy, msgspec.structs.replace(read_manifest(copy), files=digest_files(copy)))
    (hint,) = hints(SIDE, 1)
    reference = family.reference("first")
    reference.scheduler = scheduler
    with ControlNetPipeline.load(copy) as pipeline:
        for count in steps:
            for guidance_scale in (0.0, 1.0):
                shared = {"num_inference_steps": count, "guidance_scale": guidance_scale, "output_type": "latent"}
                found = pipeline(PROMPT, {"first": hint}, seed=3, **shared, **options).images
                generator = torch.Generator().manual_seed(3)
                expected = reference(PROMPT, image=hint, generator=generator, **shared, **options).images
                check_same(pipeline, found, reference, expected)
