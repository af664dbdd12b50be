from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlrt.engines.build import BuildOptions, build
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.profile import ShapeProfile
from families import SIDE, Family

BUNDLES = Path(os.environ["CONTROLRT_CACHE"]) / "tests"


@pytest.fixture(scope="module")
def compiled(family: Family, exported: Path) -> Iterator[ControlNetPipeline]:
    """The family's checkpoint, built and loaded. The bundle stays in the cache, and several files of tests share it."""
    profile = ShapeProfile.parse(f"{SIDE}x{SIDE}", "1-4")
    output = BUNDLES / exported.name
    build(BuildOptions(**family.sources(), profile=profile, output=output), "pytest")
    with ControlNetPipeline.load(output) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def wide(family: Family, exported: Path) -> Iterator[ControlNetPipeline]:
    """The family's checkpoint with one ControlNet, at two sizes and with long prompts; it stays in the cache too."""
    output = BUNDLES / f"{exported.name}-wide"
    options = BuildOptions(
        model=str(family.model),
        controlnets={"first": str(family.controlnets["first"])},
        profile=ShapeProfile.parse(f"{SIDE}x{SIDE},{2 * SIDE}x{2 * SIDE}", prompt_chunks="1-3"),
        output=output,
    )
    build(options, "pytest")
    with ControlNetPipeline.load(output) as pipeline:
        yield pipeline
