"""The programs of a bundle as a table: when each runs, how large it is, and what it costs a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.inspection.units import readable_bytes, readable_count, readable_flops
from controlrt.runtime.inspection.workload import ProgramUse, Workload
from controlrt.runtime.manifest import Program, Stage

_STAGES: dict[Stage, str] = {
    "timestep": "once per schedule",
    "prompt": "once per prompt",
    "prompt_timestep": "once per prompt and schedule",
    "image": "once per image prompt",
    "hint": "once per control picture",
    "encode": "every step, beside the ControlNets",
    "step": "every step",
}
_WHOLE = {
    "text_encoder": "once per prompt",
    "text_encoder_2": "once per prompt",
    "vae_decoder": "once per picture",
    "vae_encoder": "once per picture to start from",
}
_HEADER = (
    "program",
    "runs",
    "computes in",
    "loss",
    "nodes",
    "parameters",
    "weights",
    "FLOPs",
    "calls",
    "entries",
    "FLOPs a picture",
)
_LEFT = 3
"""Columns of words; the others are numbers and stand to the right."""


def when(program: Program) -> str:
    """When ``program`` runs, in words."""
    if program.stage is not None:
        return _STAGES[program.stage]
    if program.name.startswith("ip_adapter."):
        return "once per image prompt"
    return _WHOLE.get(program.name, "not while drawing")


def program_table(bundle: Bundle, work: Workload) -> Iterator[str]:
    """Lines: one per program, the total, and what the columns mean."""
    total = sum(use.flops for use in work.uses)
    totals = (
        str(sum(use.cost.nodes for use in work.uses)),
        readable_count(sum(use.cost.parameters for use in work.uses)),
        readable_bytes(sum(use.cost.weight_bytes for use in work.uses)),
    )
    yield from _aligned(
        [_HEADER, *map(_row, work.uses), ("total", "", "", "", *totals, "", "", "", readable_flops(total))]
    )
    width, height = work.layout.width, work.layout.height
    yield ""
    yield f"a picture: {width}x{height}, {len(work.plan.steps)} steps{_guidance(work)}, controls: {_controls(work)}"
    yield "loss: of the whole part against the float32 export, rms relative; measured below fp32, and with --verify"
    yield "FLOPs: of matrix products and convolutions, for one picture or one entry (a timestep, a prompt)"
    yield f"weights: programs share them; {readable_bytes(_stored(bundle))} are stored"


def _guidance(work: Workload) -> str:
    return " with guidance" if work.layout.guided else ""


def _row(use: ProgramUse) -> tuple[str, ...]:
    cost = use.cost
    return (
        use.program.name,
        when(use.program),
        ", ".join(filter(None, (use.program.precision, use.program.unquantized))),
        "-" if use.program.loss is None else f"{use.program.loss.rms_relative_error:.1e}",
        str(cost.nodes),
        readable_count(cost.parameters),
        readable_bytes(cost.weight_bytes),
        readable_flops(cost.flops),
        str(use.calls),
        str(use.entries),
        readable_flops(use.flops) if use.calls else "-",
    )


def _controls(work: Workload) -> str:
    """The controls that run, each with its number of steps where that is not all of them."""
    acting = [(*step.controls, *step.adapters) for step in work.layout.steps]
    counts = Counter(name for names in acting for name in names)
    everywhere = len(work.layout.steps)
    listed = (name if count == everywhere else f"{name} at {count} of them" for name, count in counts.items())
    return ", ".join(listed) or "none"


def _stored(bundle: Bundle) -> int:
    """Bytes of the files of weights."""
    names = [name for name in bundle.manifest.files if name.startswith("programs/") and not name.endswith(".onnx")]
    return sum(bundle.file(name).stat().st_size for name in names)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if number < _LEFT else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
