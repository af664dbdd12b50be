"""Who is compared: eager PyTorch, torch.compile, the plain export in two runtimes, and every backend and precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from controlrt.engines.backends import BACKENDS
from controlrt.runtime.errors import UnknownNameError
from controlrt.runtime.manifest import Backend as BackendName
from controlrt.runtime.manifest import Precision

Device = Literal["cpu", "cuda"]
Kind = Literal["eager", "plain", "bundle"]

EAGER = "eager"
BFLOAT16_ISA = ("avx512_bf16", "amx_bf16")
"""A CPU without these computes bfloat16 by way of float32, which is of no use to anybody."""
MIN_PSNR_DB: dict[str, float] = {"fp32": 45.0, "fp16": 30.0, "bf16": 20.0}
"""What a picture must have against eager PyTorch's in float32 to count as the same one. Rounding alone gives 100 dB in
float32, which many steps, and much more guidance, amplify."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One contender."""

    name: str
    kind: Kind
    runtime: str
    precision: Precision
    device: Device = "cpu"
    channels_last: bool = False
    compile_mode: str | None = None
    """Of torch.compile."""
    backend: BackendName | None = None
    """Who runs a plain export or a bundle."""
    bundle: Path | None = None
    """A bundle that was named; built where None."""

    @property
    def is_eager(self) -> bool:
        """Whether it is diffusers as it comes: what ratios may be to."""
        return self.kind == "eager" and self.compile_mode is None

    @property
    def options(self) -> dict[str, str]:
        """How it was tuned, for the result."""
        if self.kind == "eager":
            found = {
                "device": self.device,
                "attention": "scaled_dot_product_attention",
                "memory_format": "channels_last" if self.channels_last else "contiguous",
                "grad": "inference_mode",
            }
            if self.compile_mode is not None:
                found["torch.compile"] = f"{self.compile_mode}, static shapes: UNet, ControlNets, VAE decoder"
            return found
        tuned = {
            "onnxruntime": "all graph optimizations, memory bound once",
            "openvino": "LATENCY, compiled for the shapes that are called",
        }
        found = {"device": "cpu", "runtime": tuned.get(self.runtime, "as the runtime opens it")}
        if self.kind == "plain":
            found["graphs"] = "as exported"
        elif self.bundle is not None:
            found["bundle"] = str(self.bundle)
        return found


@dataclass(frozen=True, kw_only=True)
class NamedBundle:
    """The bundle on the command line."""

    path: Path
    backend: BackendName
    precision: Precision


def all_peers(device: Device, isa: Sequence[str], named: NamedBundle | None) -> list[Peer]:
    """Every contender that this machine can run, or should be able to; one that cannot is shown as failed.

    The first is what pictures are compared with: eager PyTorch in float32. On a GPU float16 is what its users run, so
    that has the plain names.

    Args:
        device: of PyTorch.
        isa: extensions of the CPU (``Machine.isa``).
        named: takes the place of the bundle that would be built for its backend and precision.
    """
    return [*_pytorch(device, isa), *_plain(), *_bundles(isa, named)]


def choose_peers(only: Sequence[str], known: Sequence[Peer]) -> list[Peer]:
    """The contenders that ``only`` names, and the first, whose pictures are the measure; all where it names none.

    Args:
        only: names, or patterns such as ``openvino*``.
        known: what there is.

    Raises:
        UnknownNameError: a name or pattern that fits none.
    """
    names = [peer.name for peer in known]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            raise UnknownNameError("contender", pattern, names)
    chosen = {name for pattern in only for name in fnmatch.filter(names, pattern)} or set(names)
    return [peer for peer in known if peer.name in chosen or peer is known[0]]


def _pytorch(device: Device, isa: Sequence[str]) -> list[Peer]:
    base: Precision = "fp32" if device == "cpu" else "fp16"
    mode = "default" if device == "cpu" else "max-autotune"

    def peer(
        name: str, precision: Precision = base, *, channels_last: bool = False, compile_mode: str | None = None
    ) -> Peer:
        return Peer(
            name=name,
            kind="eager",
            runtime="pytorch",
            precision=precision,
            device=device,
            channels_last=channels_last,
            compile_mode=compile_mode,
        )

    found = [peer(EAGER), peer(f"{EAGER}-channels-last", channels_last=True)]
    if device == "cuda":
        found.insert(0, peer(f"{EAGER}-fp32", "fp32"))
    elif set(BFLOAT16_ISA) & set(isa):
        found.append(peer(f"{EAGER}-bf16", "bf16", channels_last=True))
    return [*found, peer("torch-compile", channels_last=True, compile_mode=mode)]


def _plain() -> list[Peer]:
    return [
        Peer(name=f"plain-{backend}", kind="plain", runtime=backend, precision="fp32", backend=backend)
        for backend, each in BACKENDS.items()
        if each.is_installed()
    ]


def _bundles(isa: Sequence[str], named: NamedBundle | None) -> list[Peer]:
    found = []
    for backend, each in BACKENDS.items():
        for precision in each.precisions:
            is_named = named is not None and (named.backend, named.precision) == (backend, precision)
            runs = each.is_installed() and (precision != "bf16" or bool(set(BFLOAT16_ISA) & set(isa)))
            if runs or is_named:
                found.append(
                    Peer(
                        name=f"{backend}-{precision}",
                        kind="bundle",
                        runtime=backend,
                        precision=precision,
                        backend=backend,
                        bundle=named.path if named is not None and is_named else None,
                    )
                )
    return found
