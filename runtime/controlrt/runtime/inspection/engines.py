"""What a bundle's engines were built by, and what it takes to run them, in a line."""

from __future__ import annotations

from collections.abc import Sequence

from controlrt.runtime.manifest import Program


def describe_engines(programs: Sequence[Program]) -> str | None:
    """``tensorrt-rtx 1.7.1, for compute capability 8.6 and 8.9; built in 61 s``; None where programs are ONNX."""
    engines = [program.engine for program in programs if program.engine is not None]
    if not engines:
        return None
    about = engines[0]
    capabilities = " and ".join(about.compute_capabilities) or "8.0 and later"
    gpu = f"{about.gpu}, " if about.gpu else ""
    kinds = [
        name
        for name, holds in (
            ("refittable", about.refittable),
            ("without weights", about.stripped),
            ("version-compatible", about.version_compatible),
        )
        if holds
    ]
    seconds = sum(engine.build_seconds for engine in engines)
    listed = "".join(f", {kind}" for kind in kinds)
    refits = [engine.refit_seconds for engine in engines if engine.refit_seconds is not None]
    refitted = f", {len(refits)} of {len(engines)} refitted in {sum(refits):.1f} s" if refits else ""
    return (
        f"{about.builder} {about.version}, for {gpu}compute capability {capabilities}{listed}; built in {seconds:.0f} s"
        f"{refitted}"
    )
