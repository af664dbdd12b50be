from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from controlrt.engines.build import BuildOptions, build
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.profile import ShapeProfile
from families import SIDE, Family


@pytest.fixture(scope="module")
def compiled(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlNetPipeline]:
    """The family's checkpoint, built and loaded."""
    output: Path = tmp_path_factory.mktemp("bundles") / family.name
    options = BuildOptions(
        **family.sources(),
        profile=ShapeProfile.parse(f"{SIDE}x{SIDE}", "1-4"),
        output=output,
    )
    build(options, "pytest")
    with ControlNetPipeline.load(output) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def wide(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlNetPipeline]:
    """The family's checkpoint with one ControlNet, at two sizes and with long prompts."""
    output = tmp_path_factory.mktemp("bundles") / "wide"
    options = BuildOptions(
        model=str(family.model),
        controlnets={"first": str(family.controlnets["first"])},
        profile=ShapeProfile.parse(f"{SIDE}x{SIDE},{2 * SIDE}x{2 * SIDE}", prompt_chunks="1-3"),
        output=output,
    )
    build(options, "pytest")
    with ControlNetPipeline.load(output) as pipeline:
        yield pipeline
