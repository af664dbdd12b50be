"""A fused bundle (``build-engines --fuse``) against eager diffusers: all controls on, and one off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from parity.eager import hints
from parity.test_diffusers import check_same_picture

from controlrt.engines.build import BuildOptions, build
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.profile import ShapeProfile
from families import CONTROLS, SIDE, Family


@pytest.fixture(scope="module")
def fused(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlNetPipeline]:
    output: Path = tmp_path_factory.mktemp("bundles") / f"{family.name}-fused"
    options = BuildOptions(
        **family.sources(),
        profile=ShapeProfile.parse(f"{SIDE}x{SIDE}", "1-4"),
        output=output,
        fuse=CONTROLS,
    )
    build(options, "pytest")
    with ControlNetPipeline.load(output) as pipeline:
        yield pipeline


@pytest.mark.parametrize("family", ["sd15", "sdxl"], indirect=True, scope="module")
@pytest.mark.parametrize("controls", [CONTROLS, CONTROLS[:1]])
def test_same_picture(fused: ControlNetPipeline, family: Family, controls: tuple[str, ...]) -> None:
    """The second case has a control off, so the separate programs run."""
    check_same_picture(
        fused, family.reference(*controls), controls, hints(SIDE, len(controls)), scale=0.9, guidance_scale=5.0, steps=3
    )


@pytest.mark.parametrize("family", ["sd15"], indirect=True, scope="module")
def test_one_program_a_step(fused: ControlNetPipeline) -> None:
    pictures = dict(zip(CONTROLS, hints(SIDE, 2), strict=True))
    fused("", pictures, num_inference_steps=2, control_guidance_end=[1.0, 0.5], output_type="latent", seed=1)
    plan = next(reversed(fused._bound.values())).plan
    assert [[call.program for call in step] for step in plan.steps] == [
        ["fused.step"],
        [f"controlnet.{CONTROLS[0]}.step", "unet.step"],
    ]
