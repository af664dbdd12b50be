"""Where a result comes from."""

from __future__ import annotations

from controlrt.perf.machine import Commit, Machine
from controlrt.runtime.inspection.units import readable_bytes


def run_facts(
    command: str, created: str, commit: Commit | None, machine: Machine, versions: dict[str, str]
) -> list[tuple[str, str]]:
    """How a result came about."""
    memory, cores = readable_bytes(machine.memory_bytes), machine.cores
    clock = "" if machine.clock_mhz is None else f", {machine.clock_mhz:.0f} MHz"
    governor = "" if machine.governor is None else f", governor {machine.governor}"
    return [
        ("command", command),
        ("measured", created),
        ("commit", "none" if commit is None else commit.hash + ", with changes" * commit.dirty),
        ("processor", f"{machine.cpu}, {cores} cores{clock}{governor}; {' '.join(machine.isa)}".rstrip("; ")),
        *(("GPU", gpu) for gpu in machine.gpus),
        ("memory", memory),
        ("system", f"{machine.os}, Python {machine.python}, load {machine.load_average} before the start"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
