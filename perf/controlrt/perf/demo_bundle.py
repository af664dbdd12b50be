"""The bundle that a benchmark runs where none is named: the demo model's, small, with both of its ControlNets."""

from __future__ import annotations

from pathlib import Path

from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.engines.build import BuildOptions, build
from controlrt.perf.models import bench_directory
from controlrt.runtime.errors import UserError
from controlrt.runtime.manifest import MANIFEST_NAME
from controlrt.runtime.profile import ShapeProfile

PROFILE, BATCH = "256x256", "1-4"


def named_or_demo(named: Path | None, command: str) -> Path:
    """The bundle that was named, or the demo model's, which is built in the cache where it is missing.

    Args:
        named: on the command line.
        command: what asks for it, as the bundle will remember.

    Raises:
        UserError: what was named is no bundle.
    """
    if named is not None:
        if not (named / MANIFEST_NAME).is_file():
            raise UserError(f"{named} is no bundle; make one with build-engines")
        return named
    options = BuildOptions(
        model=str(MODEL_DIR),
        controlnets={name: str(path) for name, path in CONTROLNETS.items()},
        profile=ShapeProfile.parse(PROFILE, BATCH),
        output=bench_directory() / "bundles" / f"demo-{PROFILE}-server",
        measure=False,
    )
    return build(options, command).bundle.path
