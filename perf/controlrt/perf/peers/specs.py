"""What a contender's process is told: which drawer to open. Tagged, so that it reads back as what it was."""

from __future__ import annotations

import msgspec

from controlrt.perf.peers.calls import Call
from controlrt.perf.peers.drawer import CallSeconds


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what crosses between processes, as one line of JSON each."""


class EagerSpec(_Line, frozen=True, kw_only=True, tag="eager"):
    """diffusers' pipeline; see ``EagerDrawer``."""

    model: str
    controlnets: dict[str, str]
    xl: bool
    precision: str
    device: str
    threads: int
    channels_last: bool
    compile_mode: str | None


class PlainSpec(_Line, frozen=True, kw_only=True, tag="plain"):
    """The plain export; see ``PlainDrawer``."""

    export: str
    backend: str | None
    """Of a CPU."""
    threads: int
    device: str


class BundleSpec(_Line, frozen=True, kw_only=True, tag="bundle"):
    """A bundle; see ``BundleDrawer``."""

    path: str
    threads: int


class StableDiffusionCppSpec(_Line, frozen=True, kw_only=True, tag="stable-diffusion.cpp"):
    """stable-diffusion.cpp; see ``StableDiffusionCppDrawer``."""

    model: str
    controlnet: str
    precision: str
    threads: int


PeerSpec = EagerSpec | PlainSpec | BundleSpec | StableDiffusionCppSpec


class Request(_Line, frozen=True, kw_only=True):
    """A call, and the file for its pictures and the latents of its steps; nothing is kept where that is empty."""

    call: Call
    record: str = ""


class Answer(_Line, frozen=True, kw_only=True):
    """What a call took. The first answer comes unasked when the contender is loaded, without seconds."""

    seconds: CallSeconds | None
    moment: float
    """When it was given, on the clock that all processes share (``time.monotonic``)."""
    peak_host_bytes: int
    file_backed_bytes: int
