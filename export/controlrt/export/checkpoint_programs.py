"""Everything that is traced of a checkpoint: with all of its weights in memory, or where they do not fit, with those of
one part after the other."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Sequence

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
from controlrt.runtime.progress import note

COPIES = 1.5
"""Of weights in float32, while they are loaded and traced."""
PROCESS_BYTES = 2**30
"""Python with PyTorch and the exporter."""
PIXEL_BYTES = 10 * 2**10
"""Of what a VAE computes when it is compared with PyTorch, for each pixel of its picture; others compute less."""
GIB = 2**30


class CheckpointPrograms:
    """The programs of a checkpoint, by part.

    Args:
        options, sources: of the checkpoint.
        memory_bytes: what may be used; 0 where nobody knows. A checkpoint that takes more is never there as a whole.

    Raises:
        SourceError: it cannot be loaded or is not supported.
    """

    def __init__(self, options: ExportOptions, sources: Sources, memory_bytes: int) -> None:
        self._options, self._sources = options, sources
        self.checkpoint = load_checkpoint(options, sources, only=())
        """Configs and shapes; whether the weights are there too depends on memory."""
        self.specs = program_specs(self.checkpoint, options.profile)
        """Of all programs, in the order of the manifest; weights as in ``checkpoint``."""
        self.parts = tuple(dict.fromkeys(spec.part for spec in self.specs))
        needed = tracing_bytes(weight_bytes(self.specs), options.profile)
        self._whole = needed <= memory_bytes
        if self._whole:
            self.checkpoint = load_checkpoint(options, sources)
            self.specs = program_specs(self.checkpoint, options.profile)
        else:
            said = (
                f"of which there are {memory_bytes / GIB:.1f}" if memory_bytes else "and nobody knows how much there is"
            )
            note(f"the whole checkpoint takes about {needed / GIB:.1f} GiB of memory, {said}: parts take turns")

    def of_part(self, part: str) -> list[ProgramSpec]:
        """The programs of one part, with its weights.

        Where the whole does not fit, let go of them before you ask for the next part.

        Raises:
            SourceError: the part cannot be loaded.
        """
        if self._whole:
            return _of_part(self.specs, part)
        return programs_of_part(self._options, self._sources, part)


def programs_of_part(options: ExportOptions, sources: Sources, part: str) -> list[ProgramSpec]:
    """The programs of one part of a checkpoint, whose weights alone are read.

    Raises:
        SourceError: it cannot be loaded or is not supported.
    """
    gc.collect()  # what was traced before holds on to itself
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


def weight_bytes(specs: Iterable[ProgramSpec]) -> int:
    """What the weights of programs take in float32; those that several have count once."""
    return 4 * sum({id(each): each.numel() for spec in specs for each in spec.module.parameters()}.values())


def tracing_bytes(weights: int, profile: ShapeProfile) -> int:
    """What a process takes, about, that loads so many bytes of weights and traces their programs."""
    pixels = max(size.width.high * size.height.high for size in profile.sizes)
    return int(PROCESS_BYTES + COPIES * weights + PIXEL_BYTES * pixels)


def _of_part(specs: Sequence[ProgramSpec], part: str) -> list[ProgramSpec]:
    return [spec for spec in specs if spec.part == part]
