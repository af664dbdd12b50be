"""Everything that is traced of a checkpoint: with all of its weights in memory, or where they do not fit, with those of
one part after the other."""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence

from controlrt.export import checkpoint as checkpoints
from controlrt.export.checkpoint import Checkpoint
from controlrt.export.exporter import ExportOptions, Sources
from controlrt.export.programs import (
    ProgramSpec,
    adapter_program,
    controlnet_program,
    ip_adapter_program,
    text_encoder_program,
    unet_program,
    vae_programs,
)
from controlrt.runtime.profile import ShapeProfile

ROOM = 1.5
"""What loading and tracing take in memory, about, times the weights in float32 that are loaded."""


class CheckpointPrograms:
    """The programs of a checkpoint, by part.

    Args:
        options, sources: of the checkpoint.
        memory_bytes: what may be used. A checkpoint that takes more is never in memory as a whole.

    Raises:
        SourceError: it cannot be loaded or is not supported.
    """

    def __init__(self, options: ExportOptions, sources: Sources, memory_bytes: int) -> None:
        self._options, self._sources = options, sources
        self.checkpoint = load_checkpoint(options, sources, only=())
        """Configs and shapes; whether the weights are there too depends on memory."""
        self.specs = program_specs(self.checkpoint, options.profile)
        """Of all programs, in the order of the manifest; weights as in ``checkpoint``."""
        self._whole = ROOM * sum(part_bytes(self.specs).values()) <= memory_bytes
        if self._whole:
            self.checkpoint = load_checkpoint(options, sources)
            self.specs = program_specs(self.checkpoint, options.profile)
        self.parts = tuple(part_bytes(self.specs))

    def of_part(self, part: str) -> list[ProgramSpec]:
        """The programs of one part, with its weights. Where the whole does not fit, both go from memory together.

        Raises:
            SourceError: the part cannot be loaded.
        """
        if self._whole:
            return _of_part(self.specs, part)
        gc.collect()  # what was traced before holds on to itself
        return programs_of_part(self._options, self._sources, part)


def programs_of_part(options: ExportOptions, sources: Sources, part: str) -> list[ProgramSpec]:
    """The programs of one part of a checkpoint, whose weights alone are read.

    Raises:
        SourceError: it cannot be loaded or is not supported.
    """
    loaded = load_checkpoint(options, sources, only=(part,))
    return _of_part(program_specs(loaded, options.profile), part)


def load_checkpoint(options: ExportOptions, sources: Sources, only: Collection[str] | None = None) -> Checkpoint:
    """The checkpoint with its ControlNets and adapters, LoRAs merged.

    Args:
        options, sources: of the checkpoint.
        only: the parts whose weights are read; all of them where None.

    Raises:
        SourceError: it cannot be loaded or is not supported.
    """
    return checkpoints.load(
        sources.model,
        sources.controlnets,
        sources.loras,
        adapters=sources.adapters,
        ip_adapters=sources.ip_adapters,
        config=sources.config,
        prediction_type=options.prediction_type,
        only=only,
    )


def program_specs(loaded: Checkpoint, profile: ShapeProfile) -> list[ProgramSpec]:
    """Everything that is traced of a checkpoint, in the order of the manifest."""
    return [
        *(text_encoder_program(parts) for parts in loaded.text_encoders),
        *(controlnet_program(loaded, name, controlnet) for name, controlnet in loaded.controlnets.items()),
        *(adapter_program(loaded, name, adapter) for name, adapter in loaded.adapters.items()),
        *(ip_adapter_program(parts) for parts in loaded.ip_adapters),
        unet_program(loaded),
        *vae_programs(loaded, tiles=profile.vae_tile is not None),
    ]


def part_bytes(specs: Sequence[ProgramSpec]) -> dict[str, int]:
    """What the weights of each part take in float32, in the order of ``specs``."""
    return {spec.part: 4 * sum(each.numel() for each in spec.module.parameters()) for spec in specs}


def _of_part(specs: Sequence[ProgramSpec], part: str) -> list[ProgramSpec]:
    return [spec for spec in specs if spec.part == part]
