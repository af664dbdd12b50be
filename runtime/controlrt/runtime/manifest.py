"""The schema of ``manifest.json``: what a bundle holds. Writers import it from here, its leanest reader."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from controlrt.runtime.errors import BundleError
from controlrt.runtime.profile import ShapeProfile

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"

DType = Literal["float32", "float16", "int64", "int32", "uint8"]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the schema: immutable, unknown keys are refused."""


class TensorSpec(_Record, frozen=True, kw_only=True):
    """One input or output. A dimension is a number, or the name of one that varies from call to call."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


class Program(_Record, frozen=True, kw_only=True):
    """One compiled program."""

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_relative_error: float
    """Largest error against eager PyTorch on random inputs, relative to the output's largest value."""
    export_seconds: float


class TextEncoder(_Record, frozen=True, kw_only=True):
    """One text encoder and its tokenizer."""

    program: str
    tokenizer: str
    """Tokenizer file, relative to the bundle."""
    max_length: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    pooled: bool
    """Whether its pooled output feeds the UNet's added conditioning (SDXL)."""


class Control(_Record, frozen=True, kw_only=True):
    """One ControlNet."""

    name: Name
    program: str
    source: str
    layers: int
    """How many residuals it makes: one per skip connection and one for the middle block."""


class Hint(_Record, frozen=True, kw_only=True):
    """What a ControlNet expects to see: the contents of ``hints/NAME.json``."""

    annotator: str | None
    """What makes its control pictures (``controlrt annotate``); None where the names do not tell."""
    channels: int
    """Channels of the control picture, each in [0, 1]."""


class Model(_Record, frozen=True, kw_only=True):
    """What the runtime must know of the checkpoint."""

    source: str
    latent_channels: int
    vae_scale_factor: int
    time_ids: bool
    """Whether the UNet takes SDXL's size and crop conditioning."""
    zero_empty_negative: bool
    """Whether a missing negative prompt means zero embeddings (SDXL's force_zeros_for_empty_prompt)."""


class Provenance(_Record, frozen=True, kw_only=True):
    """Where the bundle came from."""

    created: str
    command: str
    sources: dict[str, Sha256]
    """Digest of each checkpoint's files, by source."""
    versions: dict[str, str]


class Manifest(_Record, frozen=True, kw_only=True):
    """A whole bundle."""

    schema_version: int
    key: Sha256
    """Digest of everything that decides the contents: checkpoints, options, builder versions."""
    backend: Literal["onnxruntime"]
    precision: Literal["fp32"]
    profile: ShapeProfile
    model: Model
    text_encoders: tuple[TextEncoder, ...]
    controls: tuple[Control, ...]
    programs: tuple[Program, ...]
    files: dict[str, Sha256]
    """Every file of the bundle but the manifest, with its digest."""
    provenance: Provenance

    def program(self, name: str) -> Program:
        """The program called ``name``.

        Raises:
            BundleError: the manifest lists none.
        """
        for program in self.programs:
            if program.name == name:
                return program
        raise BundleError(f"the bundle has no program {name!r}; build it again with build-engines")
