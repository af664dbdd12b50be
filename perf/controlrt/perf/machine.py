"""What a measurement was made on and with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from controlrt.runtime.machine import flags, memory, usable_cores

PACKAGES = (
    *("controlrt", "torch", "triton", "onnxruntime", "onnxruntime-gpu", "openvino", "diffusers", "transformers"),
    *("tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-libs", "cuda-bindings", "onnx-ir", "numpy"),
    "stable-diffusion-cpp-python",
)

ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16")
"""Extensions that matrix kernels choose by, as Linux names them."""
_GPU_FIELDS = "name,compute_cap,memory.total,driver_version,clocks.max.sm,clocks.max.mem,power.limit"


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hardware and system."""

    cpu: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    os: str
    python: str
    load_average: float
    """Of the last minute, before the measurement: how busy others kept the machine."""
    clock_mhz: float | None = None
    """The fastest core's at that time; None where the system does not tell."""
    governor: str | None = None
    """Of the clock, ``performance`` or ``powersave``; None in most virtual machines."""
    isa: tuple[str, ...] = ()
    """Vector and matrix extensions of the CPU that kernels choose by."""
    gpus: tuple[str, ...] = ()
    """Name, compute capability, memory, driver, highest clocks and power limit of each."""

    @property
    def is_busy(self) -> bool:
        """Whether others use more than a quarter of it."""
        return self.load_average > self.cores / 4


class Commit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the code was."""

    hash: str
    dirty: bool
    """Whether tracked files differ from the commit, or there are new ones."""


def this_machine() -> Machine:
    """The machine this runs on."""
    return Machine(
        cpu=_cpu(),
        cores=usable_cores(),
        memory_bytes=memory("MemTotal"),
        os=platform.platform(),
        python=platform.python_version(),
        load_average=round(os.getloadavg()[0], 2),
        clock_mhz=_clock(),
        governor=_governor(),
        isa=tuple(name for name in ISA if name in flags()),
        gpus=_gpus(),
    )


def installed_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(directory: Path) -> Commit | None:
    """The commit of the checkout that ``directory`` is in; None outside of one, or without git."""
    head = _git(directory, "rev-parse", "HEAD")
    status = _git(directory, "status", "--porcelain")
    if head is None or status is None:
        return None
    return Commit(hash=head.strip(), dirty=bool(status.strip()))


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout if found.returncode == 0 else None


def _cpu() -> str:
    """Model name, with family and model where the name alone says little (virtual machines shorten it)."""
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _cpuinfo() -> dict[str, str]:
    """Of the first core; empty where the system does not tell."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, colon, value = line.partition(":")
            if colon:
                fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    return fields


def _clock() -> float | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return max((float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")), default=None)


def _governor() -> str | None:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return None


def _gpus() -> tuple[str, ...]:
    try:
        query = ["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError:
        return ()
    return tuple(found.stdout.strip().splitlines()) if found.returncode == 0 else ()
