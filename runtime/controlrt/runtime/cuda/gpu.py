"""Which GPU this machine has, asked of the driver itself: a build and ``doctor`` need to know that and nothing more."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*"""

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX 1.7 can be told to build for, and runs on; without a word of it, it builds for 8.0 and later. On a
GPU of another, such as 9.0, it builds an engine and refuses to open it."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU that the driver names."""

    name: str
    compute_capability: str


def find_gpu() -> Gpu | None:
    """It, or None where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    device = ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else Gpu(name=name.value.decode(), compute_capability=f"{major.value}.{minor.value}")
