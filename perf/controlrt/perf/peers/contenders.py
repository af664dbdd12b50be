"""Who is compared: eager PyTorch, torch.compile, the plain export in two runtimes, every backend and precision, and
stable-diffusion.cpp."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from controlrt.engines.backends import BACKENDS, Device
from controlrt.runtime.errors import UnknownNameError
from controlrt.runtime.manifest import Backend as BackendName
from controlrt.runtime.manifest import Precision

Kind = Literal["eager", "plain", "bundle", "stable-diffusion.cpp"]

EAGER = "eager"
PLAIN_CUDA = "plain-cuda"
BFLOAT16_ISA = ("avx512_bf16", "amx_bf16")
"""A CPU without these computes bfloat16 by way of float32, which is of no use to anybody."""
MIN_PSNR_DB: dict[str, float] = {"fp32": 45.0, "fp16": 30.0, "bf16": 20.0, "int8": 20.0, "fp8": 20.0}
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
    def gives_latents(self) -> bool:
        """Whether its latents after each step can be compared."""
        return self.kind != "stable-diffusion.cpp"

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
            if self.device == "cuda":
                found["cudnn"] = "benchmark"
                found["tf32"] = "off" if self.precision == "fp32" else "high"
            if self.compile_mode is not None:
                found["torch.compile"] = (
                    f"{self.compile_mode}, full graphs of static shapes: UNet, ControlNets, decoder"
                )
            return found
        tuned = {
            "onnxruntime": "all graph optimizations, memory bound once",
            "openvino": "LATENCY, compiled for the shapes that are called",
        }
        found = {"device": self.device, "runtime": tuned.get(self.runtime, "as the runtime opens it")}
        if self.kind == "stable-diffusion.cpp":
            found["runtime"] = (
                "as pip builds it; the precision is that of the weights, the ControlNet's matrices are float32"
            )
        elif self.kind == "plain":
            found["graphs"] = "as exported" if self.precision == "fp32" else "as exported, brought to float16"
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
    that has the plain names. Contenders of the CPU come last there, and only those who ask for them get them.

    Args:
        device: of PyTorch.
        isa: extensions of the CPU (``Machine.isa``).
        named: takes the place of the bundle that would be built for its backend and precision.
    """
    found = [*_pytorch(device, isa), *_plain(device), *_bundles(device, isa, named), *_stable_diffusion_cpp(isa)]
    return sorted(found, key=lambda peer: peer.device != device)


def choose_peers(only: Sequence[str], known: Sequence[Peer]) -> list[Peer]:
    """The contenders that ``only`` names, and the first, whose pictures are the measure.

    Where it names none they are all on the first one's device, and a bundle that was named. stable-diffusion.cpp has to
    be asked for: it knows published architectures alone.

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
    chosen = {name for pattern in only for name in fnmatch.filter(names, pattern)}
    if not only:
        here = [peer for peer in known if peer.device == known[0].device and peer.kind != "stable-diffusion.cpp"]
        chosen = {peer.name for peer in (*here, *(each for each in known if each.bundle is not None))}
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
    found.append(peer("torch-compile", channels_last=True, compile_mode=mode))
    if device == "cuda":  # what takes seconds to compile, not minutes
        found.append(peer("torch-compile-quick", channels_last=True, compile_mode="reduce-overhead"))
    return found


def _plain(device: Device) -> list[Peer]:
    found = [
        Peer(name=f"plain-{backend}", kind="plain", runtime=backend, precision="fp32", backend=backend)
        for backend, each in BACKENDS.items()
        if each.is_installed() and each.device == "cpu"
    ]
    if device == "cuda":
        found.insert(0, Peer(name=PLAIN_CUDA, kind="plain", runtime="onnxruntime", precision="fp16", device="cuda"))
    return found


def _bundles(device: Device, isa: Sequence[str], named: NamedBundle | None) -> list[Peer]:
    found = []
    for backend, each in BACKENDS.items():
        for precision in each.precisions:
            is_named = named is not None and (named.backend, named.precision) == (backend, precision)
            runs = each.is_installed() and each.device in ("cpu", device)
            if each.device == "cpu" and precision == "bf16":
                runs = runs and bool(set(BFLOAT16_ISA) & set(isa))
            if runs or is_named:
                found.append(
                    Peer(
                        name=f"{backend}-{precision}",
                        kind="bundle",
                        runtime=backend,
                        precision=precision,
                        device=each.device,
                        backend=backend,
                        bundle=named.path if named is not None and is_named else None,
                    )
                )
    return found


def _stable_diffusion_cpp(isa: Sequence[str]) -> list[Peer]:
    """On the CPU, in what it is fastest in."""
    if importlib.util.find_spec("stable_diffusion_cpp") is None:
        return []
    precision: Precision = "bf16" if set(BFLOAT16_ISA) & set(isa) else "fp16"
    kind: Kind = "stable-diffusion.cpp"
    return [Peer(name="stable-diffusion-cpp", kind=kind, runtime=kind, precision=precision)]
