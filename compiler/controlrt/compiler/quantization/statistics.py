"""What ``controlrt calibrate`` saw of the layers' inputs: a file that is looked at, kept and used again.

One safetensors file; what is no array is JSON in its header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from controlrt.runtime.errors import UserError
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.storage import atomic_file

UNET = "unet"
BUCKETS = 10
"""Intervals of 100 of the 1,000 timesteps that a model was trained on, the least noise first."""
BINS = 1024
"""Of a histogram of magnitudes, all as wide."""
FORMAT = 3
_HEADER = "controlrt"


def bucket_of(timestep: float) -> int:
    """Which interval of timesteps one is in."""
    return min(max(int(timestep * BUCKETS / 1000), 0), BUCKETS - 1)


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What the input of one layer was seen to be."""

    channel_amax: NDArray[np.float32]
    """(channels,): the largest magnitude of each, over everything; exact."""
    bucket_amax: NDArray[np.float32]
    """(BUCKETS,): the largest magnitude at timesteps of each interval, 0 where there were none; exact."""
    histogram: NDArray[np.int64]
    """(BUCKETS, BINS): how many of the values that were sampled have magnitudes in each bin."""
    limit: float
    """The upper end of the histogram's last bin; no sampled value is larger."""

    @property
    def amax(self) -> float:
        """The largest magnitude of all."""
        return float(self.channel_amax.max())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call that no statistics are of: what float32 made of it, for what comes out in int8 to be held against."""

    arguments: Mapping[str, Any]
    """Of the call, all that is JSON: prompt, steps, seed, sampler..."""
    hints: Mapping[str, NDArray[np.uint8]]
    """Control pictures by control: (height, width, channels)."""
    latents: NDArray[np.float32]
    """(steps, batch, channels, height/8, width/8): after every step."""
    pictures: NDArray[np.uint8]
    """(batch, height, width, 3)."""
    scene: tuple[int, int] | None = None
    """What a scene of the demo was drawn at random by."""


class About(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where statistics come from."""

    parts: dict[str, str]
    """SHA-256 of the weights of each part, see ``weights_of``."""
    data: str
    """The calibration set, as it was named."""
    cases: int
    steps: int
    samplers: tuple[str, ...]
    guidance_scales: tuple[float, ...]
    size: tuple[int, int]
    """Width and height in pixels."""
    seed: int
    versions: dict[str, str]
    key: str = ""
    """SHA-256 of everything that decides the statistics: programs, pictures, options."""


def weights_of(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of what decides the weights of the UNet and of each control: checkpoints, and the LoRAs merged into them.

    Args:
        manifest: of an export or a bundle.
    """
    sources = manifest.provenance.sources
    loras = [f"{lora.sha256} {lora.weight}" for lora in manifest.model.loras]
    model = "\n".join([sources["model"], *loras])
    found = {UNET: hashlib.sha256(model.encode()).hexdigest()}
    for control in manifest.controls:
        found[control.part] = hashlib.sha256(sources[control.part].encode()).hexdigest()
    return found


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of every layer, by part (``unet``, ``controlnet.NAME``) and name."""

    about: About
    layers: Mapping[str, Mapping[str, LayerStatistics]]
    unseen: tuple[Case, ...] = field(default=())

    def save(self, file: Path) -> None:
        """Writes all of it or nothing. The same statistics make the same bytes."""
        arrays: dict[str, NDArray[Any]] = {}
        limits: dict[str, dict[str, float]] = {}
        for part, layers in sorted(self.layers.items()):
            limits[part] = {}
            for name, layer in sorted(layers.items()):
                limits[part][name] = layer.limit
                for kind in ("channel_amax", "bucket_amax", "histogram"):
                    arrays[f"{part}/{name}/{kind}"] = getattr(layer, kind)
        for number, case in enumerate(self.unseen):
            arrays[f"unseen/{number}/latents"] = case.latents
            arrays[f"unseen/{number}/pictures"] = case.pictures
            arrays |= {f"unseen/{number}/hints/{control}": hint for control, hint in case.hints.items()}
        header = {
            "format": FORMAT,
            "about": msgspec.to_builtins(self.about),
            "limits": limits,
            "unseen": [{"arguments": dict(case.arguments), "scene": case.scene} for case in self.unseen],
        }
        text = msgspec.json.encode(header, order="sorted").decode()
        with atomic_file(file) as partial:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, {_HEADER: text})

    @staticmethod
    def load(file: Path) -> Statistics:
        """Reads a file.

        Raises:
            UserError: it is not there, damaged, or no file of statistics.
        """
        from safetensors import safe_open

        if not file.is_file():
            raise UserError(f"there are no statistics at {file}; make them with: controlrt calibrate")
        try:
            with safe_open(file, "numpy") as opened:
                header = (opened.metadata() or {}).get(_HEADER)
            arrays = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} cannot be read as statistics ({error}); make it with: controlrt calibrate"
            ) from None
        if header is None:
            raise UserError(f"{file} holds no statistics of controlrt; make them with: controlrt calibrate")
        try:
            found = msgspec.json.decode(header)
            if found["format"] == FORMAT:
                return _read(found, arrays)
        except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file} is damaged; make it again with: controlrt calibrate") from None
        raise UserError(f"{file} is of another version of controlrt; make it again with: controlrt calibrate")


def _read(found: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Statistics:
    """What is in a file's header and its arrays."""
    return Statistics(
        about=msgspec.convert(found["about"], About),
        layers={
            part: {
                name: LayerStatistics(
                    limit=limit,
                    **{kind: arrays[f"{part}/{name}/{kind}"] for kind in ("channel_amax", "bucket_amax", "histogram")},
                )
                for name, limit in layers.items()
            }
            for part, layers in found["limits"].items()
        },
        unseen=tuple(
            Case(
                arguments=case["arguments"],
                hints={
                    key.removeprefix(f"unseen/{number}/hints/"): array
                    for key, array in arrays.items()
                    if key.startswith(f"unseen/{number}/hints/")
                },
                latents=arrays[f"unseen/{number}/latents"],
                pictures=arrays[f"unseen/{number}/pictures"],
                scene=msgspec.convert(case["scene"], tuple[int, int] | None),
            )
            for number, case in enumerate(found["unseen"])
        ),
    )
