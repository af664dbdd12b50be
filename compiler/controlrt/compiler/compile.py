"""From one exported program to the programs a bundle holds: passes, the cut by binding times, and what they cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from controlrt.compiler.binding import LAYOUT, cut
from controlrt.compiler.flops import count_flops, graph_size
from controlrt.compiler.fuse import fuse
from controlrt.compiler.passes.half_precision import HalfPrecision
from controlrt.compiler.passes.half_weights import HalfWeights
from controlrt.compiler.passes.quantize import Quantize, quantized_precision
from controlrt.compiler.split import split_step
from controlrt.compiler.standard_form import standard_form
from controlrt.compiler.verify import Verifier
from controlrt.runtime.errors import BuildError
from controlrt.runtime.image_tokens import image_dimensions
from controlrt.runtime.manifest import Cost, DType, Precision, Program, Stage, TensorSpec
from controlrt.runtime.plan import PER_STEP_STAGES
from controlrt.runtime.profile import ShapeProfile

Passes = tuple[ir.passes.InPlacePass, ...]

LABELS = {
    "timestep": "timestep",
    "prompt_embeds": "prompt",
    "text_embeds": "prompt",
    "time_ids": "prompt",
    "timestep_cond": "prompt",
    "ip_embeds": "image",
    "control_types": "prompt",
    "hint": "hint",
    "hint_type": "hint",
    "hint_scale": "hint",
    "rows": LAYOUT,
}
"""What each input of a step stands for; the rest belongs to the step itself. The control types of a ControlNet Union
are embedded beside the pooled prompt, so they go where that goes. So does the guidance scale that a consistency model
is told: it too is a picture's own, and the same at every step."""
UNET = "unet"
FUSED = "fused"
"""The part that is the UNet and ControlNets in one."""

_DTYPES: dict[ir.DataType, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.UINT8: "uint8",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProgramGraph:
    """A program's manifest entry and its graph."""

    program: Program
    model: ir.Model


def load_program(exported: Program, source: Path, profile: ShapeProfile) -> ir.Model:
    """The graph of an exported program, its dimensions named as in the manifest; weights stay in their file."""
    model = ir.load(source / exported.file)
    name_dimensions(model, exported, profile)
    return model


def compile_program(
    exported: Program,
    model: ir.Model,
    profile: ShapeProfile,
    passes: Passes,
    verifier: Verifier | None = None,
    precision: Precision = "fp32",
    *,
    quantize: Quantize | None = None,
    half_weights: bool = False,
    split: bool = False,
    guided: bool = True,
) -> list[ProgramGraph]:
    """Runs ``passes`` over an exported program and cuts it by binding times if its inputs have any.

    Args:
        exported: the manifest entry.
        model: its graph, as ``load_program`` gives it.
        profile: sizes and batch.
        passes: in order. One that cannot handle the graph is left out, with the reason in the log; one whose attribute
            ``float32_only`` is true is for "fp32" alone, and those whose attribute ``typed`` is true see the graph in
            its precision, after all others; one whose attribute ``reshapes_inputs`` is true is not verified by itself.
        verifier: compares the graph before and after every pass and the cut, in float32: in "fp16", passes that see
            the graph in its precision are run for it on the float32 graph as well.
        precision: what the programs compute in; with quantized layers, that of all else. "bf16" leaves the graph as it
            is: the backend rounds.
        quantize: brings layers to int8 or fp8; not verified, since it changes the result.
        half_weights: store float32 weights in float16.
        split: have the UNet's encoder in a program of its own, to be run beside the ControlNets.
        guided: whether the cost is that of pictures with two rows, for classifier-free guidance, or with one.

    Returns:
        The program itself, or one program per stage of it.

    Raises:
        VerificationError: a pass that changes the result.
        BuildError: a graph that cannot be brought to float16.
    """
    split = split and exported.name == UNET
    typed = [each for each in passes if getattr(each, "typed", False)]
    late = [each for each in passes if each not in typed and getattr(each, "float32_only", False)]
    for each in passes:
        if each not in typed and each not in late:
            model = _apply(each, model, exported.name, verifier)
    last = [*(late if precision == "fp32" else ()), *typed]
    labels = input_labels(model)
    if verifier is not None:
        full = model
        for each in last:
            full = _apply(each, full, exported.name, verifier)
        if labels:
            verifier.check_cut(exported.name, full, _stages(full, labels, split=split))
    if precision == "fp16":
        model = _in_half(model, labels, exported.name)
    if quantize is not None:
        model = model.clone()
        try:
            quantize(model)
        except ValueError as error:
            mend = "the statistics are of another export; take them again with: controlrt calibrate"
            raise BuildError(f"{exported.name}: {error}; {mend}") from None
        RemoveUnusedNodesPass()(model)  # the weights as they were
    for each in (*last, *([HalfWeights()] if half_weights else ())):
        model = _apply(each, model, exported.name, None)
    if not labels:
        return [_describe(exported, model, exported.name, None, profile, precision, guided=guided)]
    return [
        _describe(exported, part, f"{exported.name}.{stage}", stage, profile, precision, guided=guided)
        for stage, part in _stages(model, labels, split=split).items()
    ]


def input_labels(model: ir.Model) -> dict[str, str]:
    """What each input of a step stands for, by its name; inputs that belong to the step itself are left out."""
    names = [value.name for value in model.graph.inputs if value.name]
    return {name: LABELS[kind] for name in names if (kind := _kind(name)) in LABELS}


def fuse_programs(unet: ProgramGraph, controlnets: Mapping[str, ProgramGraph]) -> ProgramGraph:
    """The UNet's step and those of the ControlNets, by control name, as one program; see ``fuse``."""
    sources = [unet, *controlnets.values()]
    program = msgspec.structs.replace(
        unet.program,
        name=FUSED,
        part=FUSED,
        max_relative_error=max(source.program.max_relative_error for source in sources),
        export_seconds=sum(source.program.export_seconds for source in sources),
    )
    return ProgramGraph(program=program, model=fuse(unet.model, {n: source.model for n, source in controlnets.items()}))


def name_dimensions(model: ir.Model, program: Program, profile: ShapeProfile) -> None:
    """Gives the exporter's symbols the names of the manifest, and fixes the batch of a step where the profile does.

    Text encoders and VAE run on one picture at a time, whatever the batch.
    """
    fixed = _is_step(model) and profile.batch.low == profile.batch.high
    specs = {spec.name: spec for spec in (*program.inputs, *program.outputs)}
    names: dict[str, int | str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        spec = specs.get(value.name or "")
        if spec is None or value.shape is None:
            continue
        for dim, name in zip(value.shape, spec.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim) and isinstance(name, str) and dim.value is not None:
                names[dim.value] = profile.batch.low if name == "batch" and fixed else name
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, int | str]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value not in names:
        return dim
    name = names[dim.value]
    return name if isinstance(name, int) else ir.SymbolicDim(name)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(output for node in graph for output in node.outputs)]


def _kind(name: str) -> str:
    """``hint.canny`` is a ``hint``."""
    return name.partition(".")[0]


def _is_step(model: ir.Model) -> bool:
    return any(value.name == "timestep" for value in model.graph.inputs)


def _apply(each: ir.passes.InPlacePass, model: ir.Model, name: str, verifier: Verifier | None) -> ir.Model:
    """``model`` after the pass; the pass works on a copy, so nothing is ever half rewritten."""
    copy = model.clone()
    try:
        result = each(copy)
    except Exception as error:  # a pass that cannot handle a graph is no reason not to build
        if getattr(each, "reshapes_inputs", False):  # but the programs of a bundle must agree on what they exchange
            raise BuildError(f"{name}: pass {type(each).__name__} failed: {error}") from error
        _log.warning("%s: pass %s left the graph as it was: %s", name, type(each).__name__, error)
        return model
    if not result.modified:
        return model
    RemoveUnusedNodesPass()(copy)  # the weights of what the pass replaced
    if verifier is not None and not getattr(each, "reshapes_inputs", False):
        verifier.check_pass(name, type(each).__name__, model, copy)
    return copy


def _stages(model: ir.Model, labels: Mapping[str, str], *, split: bool) -> dict[Stage, ir.Model]:
    stages = cut(model, labels)
    halves = split_step(stages["step"]) if split else None
    if halves is not None:
        del stages["step"]
        stages["encode"], stages["step"] = halves
    return stages


def _in_half(model: ir.Model, labels: Mapping[str, str], name: str) -> ir.Model:
    copy = model.clone()
    try:
        HalfPrecision(labels)(copy)
    except Exception as error:  # of the pass framework, with the reason behind it
        raise BuildError(f"{name} cannot be brought to float16: {error}; build it with --precision fp32") from error
    RemoveUnusedNodesPass()(copy)  # the float32 weights
    return copy


def _describe(
    exported: Program,
    model: ir.Model,
    name: str,
    stage: Stage | None,
    profile: ShapeProfile,
    precision: Precision,
    *,
    guided: bool,
) -> ProgramGraph:
    size, quantized = graph_size(model.graph), quantized_precision(model.graph)
    fixed = stage in ("encode", "step") and profile.batch.low == profile.batch.high
    batch = profile.batch.low if fixed else 1
    rows = 2 * batch if guided else batch
    dims = one_picture(profile) | image_dimensions(exported.inputs) | {"batch": batch, "rows": rows}
    program = msgspec.structs.replace(
        exported,
        name=name,
        part=exported.name,
        stage=stage,
        precision=quantized or _precision_of(name, stage, precision),
        unquantized=precision if quantized else None,
        file=f"programs/{name}.onnx",
        inputs=tuple(map(_spec, model.graph.inputs)),
        outputs=tuple(map(_spec, model.graph.outputs)),
        cost=Cost(
            nodes=size.nodes,
            parameters=size.parameters,
            weight_bytes=size.parameter_bytes,
            flops=count_flops(standard_form(model).graph, dims).total // batch,
        ),
    )
    return ProgramGraph(program=program, model=model)


def _precision_of(name: str, stage: Stage | None, precision: Precision) -> Precision:
    """What runs once per schedule, and in bfloat16 what runs once per prompt, stays in float32: it costs nothing."""
    prompts = stage in ("prompt", "image") or name.startswith(("text_encoder", "ip_adapter"))
    rare = stage in PER_STEP_STAGES or (precision == "bf16" and prompts)
    return "fp32" if rare else precision


def one_picture(profile: ShapeProfile) -> dict[str, int]:
    """The dimensions of one guided picture of the profile's default size and shortest prompt, and of one entry of
    every earlier stage."""
    width, height = profile.default_size
    dims = {"batch": 1, "rows": 2, "steps": 1, "prompts": 1, "entries": 1, "width": width, "height": height}
    dims |= {"tokens": profile.tokens.low, "extra": 1}
    for power in range(1, 7):
        dims |= {f"width/{2**power}": width // 2**power, f"height/{2**power}": height // 2**power}
    return dims


def _spec(value: ir.Value) -> TensorSpec:
    if value.shape is None or value.dtype is None or value.name is None:
        raise ValueError(f"the graph says nothing of the shape or type of {value.name}")
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(name=value.name, dtype=_DTYPES[value.dtype], shape=shape)
