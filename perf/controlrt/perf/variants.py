"""What is compared: eager PyTorch, the plain export, and the compiler's passes, one more each time."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from controlrt.engines.backends import BACKENDS
from controlrt.runtime.errors import UnknownNameError
from controlrt.runtime.manifest import Backend as BackendName

EAGER = ("eager", "eager-channels-last")
REFERENCE: Final = "plain-onnxruntime"
"""Runs beside all others; outputs are compared with its."""
CUT = "binding-times"
"""The last thing that the compiler does: after it, the programs are those of a bundle."""
FUSE = "fuse"
"""An option of the build, so it comes after what every bundle has."""

Runtime = BackendName | Literal["pytorch"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the step."""

    name: str
    runtime: Runtime
    passes: int = 0
    """How many of the backend's passes were run."""
    cut: bool = False
    """Whether the step was cut by binding times after them."""
    fused: bool = False
    """Whether ControlNet and UNet were joined into one program before everything else (``build-engines --fuse``)."""
    channels_last: bool = False

    @property
    def backend(self) -> BackendName | None:
        """Who runs its programs; None for PyTorch."""
        return None if self.runtime == "pytorch" else self.runtime

    @property
    def is_plain(self) -> bool:
        """Whether its graphs are those of the export, untouched."""
        return self.backend is not None and self.passes == 0 and not self.cut


def all_variants(backends: Sequence[BackendName] | None = None) -> list[Variant]:
    """Every variant that these backends can run, by default those that are installed; the reference is among them."""
    if backends is None:
        backends = [name for name, backend in BACKENDS.items() if backend.is_installed() and backend.device == "cpu"]
    ordered = sorted(backends, key=lambda name: plain(name) != REFERENCE)
    found = [Variant(name=name, runtime="pytorch", channels_last="channels-last" in name) for name in EAGER]
    found += [Variant(name=plain(name), runtime=name) for name in ordered]
    for name in ordered:
        passes = BACKENDS[name].passes
        found += [
            Variant(name=f"{name}+{_kebab(type(each).__name__)}", runtime=name, passes=count)
            for count, each in enumerate(passes, 1)
        ]
        found.append(Variant(name=f"{name}+{CUT}", runtime=name, passes=len(passes), cut=True))
        found.append(Variant(name=f"{name}+{FUSE}", runtime=name, passes=len(passes), cut=True, fused=True))
    return found


def choose_variants(only: Sequence[str], known: Sequence[Variant]) -> list[Variant]:
    """The variants that ``only`` names, and the plain ones they are compared with; all where it names none.

    Args:
        only: names, or patterns such as ``openvino*``.
        known: what there is.

    Raises:
        UnknownNameError: a name or pattern that fits no variant.
    """
    names = [variant.name for variant in known]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise UnknownNameError("variant", pattern, names)
    chosen = {name for pattern in only for name in fnmatch.filter(names, pattern)} or set(names)
    chosen |= {REFERENCE} | {plain(v.backend) for v in known if v.name in chosen and v.backend is not None}
    return [variant for variant in known if variant.name in chosen]


def plain(backend: BackendName) -> str:
    """The name of the variant that runs the export as it is."""
    return f"plain-{backend}"


def _kebab(name: str) -> str:
    """``UpsampleConvolution`` -> ``upsample-convolution``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()
