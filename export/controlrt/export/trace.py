"""Traces one program to ONNX and checks it against eager PyTorch before anyone uses it."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from controlrt.compiler.exact_norms import write_out_group_norms
from controlrt.export.programs import ProgramSpec, Sizes
from controlrt.runtime.errors import BuildError
from controlrt.runtime.executors.onnxruntime import open_session
from controlrt.runtime.image_tokens import image_dimensions, tokens_of_one
from controlrt.runtime.manifest import Program, TensorSpec
from controlrt.runtime.profile import MAX_BATCH, MAX_IMAGES, SIDE_STEP, ShapeProfile

if TYPE_CHECKING:
    import onnxruntime as ort

OPSET = 23
"""Attention and GroupNormalization are one node each from here on."""
MAX_EXTRA = 65536
"""Vectors of textual inversions that a text encoder takes."""
TRACED_ROWS = 63
"""From 64 rows on diffusers' upsampling asks for contiguous memory, which a graph knows nothing of; torch.export would
find that out at the end and trace the UNet a second time."""
COUNTS = ("batch", "rows", "extra")
"""Named dimensions that no profile fixes."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules that a node stands in, the operation itself last."""
MAX_RELATIVE_ERROR = 1e-4
"""Float32 rounding through the deepest network stays an order of magnitude below this."""


def export_program(spec: ProgramSpec, profile: ShapeProfile, directory: Path) -> Program:
    """Writes ``spec`` as ``directory/<name>.onnx`` (weights beside it) and returns its manifest entry.

    Sides and tokens that the profile fixes are constants of the graph; batch and rows always vary.

    Raises:
        BuildError: PyTorch cannot trace it, or the ONNX graph does not give what PyTorch gives.
    """
    started = time.monotonic()
    file = directory / f"{spec.name}.onnx"
    flat: list[TensorSpec] = pytree.tree_leaves(spec.inputs)
    traced = _sizes(profile, batch=2, rows=3, largest=False)
    for side, extent in (("width", profile.widths), ("height", profile.heights)):
        if extent.low != extent.high:
            traced[side] = max(traced[side], 2 * SIDE_STEP)  # torch.export takes a size of one block for a constant
    traced["extra"] = traced["images"] = 2
    with _quiet() as log, _slices_left_alone():
        try:
            program = torch.onnx.export(
                spec.module,
                args=(),
                kwargs=_example(spec, traced, seed=0),
                dynamo=True,
                opset_version=OPSET,
                input_names=[tensor.name for tensor in flat],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=pytree.tree_map(_dynamic_shapes(profile, flat), spec.inputs),
                optimize=False,
                verbose=False,
            )
            weights = list(program.model.graph.initializers.values())
            program.optimize()
            _name_weights(program.model)
            program.save(file, external_data=True, include_initializers=True)
            for weight in (*weights, *program.model.graph.initializers.values()):
                weight.const_value = None  # rules of the exporter hold on to the last graph that they saw
        except Exception as error:
            raise BuildError(f"PyTorch cannot trace {spec.name}: {error}\n{log.getvalue()[-2000:]}") from error
    worst = relative_error(spec, profile, file)
    if not worst <= MAX_RELATIVE_ERROR:
        raise BuildError(
            f"{spec.name}: the ONNX graph differs from PyTorch by {worst:.1e} of the largest value; "
            f"at most {MAX_RELATIVE_ERROR:.0e} is allowed"
        )
    return Program(
        name=spec.name,
        part=spec.name,
        stage=None,
        cost=None,
        file=f"{directory.name}/{file.name}",
        inputs=tuple(_settled(tensor, profile) for tensor in flat),
        outputs=tuple(_settled(tensor, profile) for tensor in spec.outputs),
        max_relative_error=worst,
        export_seconds=round(time.monotonic() - started, 3),
    )


def relative_error(spec: ProgramSpec, profile: ShapeProfile, file: Path) -> float:
    """How far the ONNX graph is from eager PyTorch on inputs of two shapes, or of the one that there is: the largest
    difference over the largest value of an output, of the worst one."""
    pictures = 1 if spec.part == "vae" else 2  # it never has more, and takes most of the memory
    small = _example(spec, _sizes(profile, batch=1, rows=2, largest=False), seed=1)
    large = _example(spec, _sizes(profile, batch=pictures, rows=2, largest=True), seed=1)
    model = ir.load(file)
    write_out_group_norms(model)  # or what is compared is how ONNX Runtime rounds
    contents: bytes = ir.to_proto(model).SerializeToString()
    session = open_session(file, model=contents, packed=False)
    return max(
        _relative_error(spec, session, inputs) for inputs in ([small] if _alike(small, large) else [small, large])
    )


@contextlib.contextmanager
def _slices_left_alone() -> Iterator[None]:
    """Switches off the exporter's rule that makes a Split of two slices.

    It walks through the whole graph at every node, so its time grows with the square of the graph; in these models
    there is nothing for it to find.
    """
    slice_split_rule.try_rewrite = lambda *_, **__: None  # hides the method
    try:
        yield
    finally:
        del slice_split_rule.try_rewrite


def _name_weights(model: ir.Model) -> None:
    """Names matrices that the exporter transposed, those of linear layers, as their modules name them."""
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or not (weight.name or "").startswith("val_"):
            continue
        *_, module, _ = ("", "", *ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")))
        name = f"{module}.weight"
        if module and name not in model.graph.initializers:
            weight.name = name


def _sizes(profile: ShapeProfile, *, batch: int, rows: int, largest: bool) -> Sizes:
    width, height = profile.widths, profile.heights
    return {
        "batch": batch,
        "rows": rows,
        "tokens": profile.tokens.high if largest else profile.tokens.low,
        "extra": 3 if largest else 1,
        "images": 3 if largest else 1,
        "width": width.high if largest else width.low,
        "height": height.high if largest else height.low,
    }


def _side(dim: str) -> tuple[str, int]:
    """``height/16`` -> ("height", 16), ``tokens`` -> ("tokens", 1)."""
    match = re.fullmatch(r"(height|width|tokens)(?:/(\d+))?", dim)
    assert match is not None, dim
    return match[1], int(match[2] or 1)


def _fixed(profile: ShapeProfile, side: str) -> int | None:
    extent = {"height": profile.heights, "width": profile.widths, "tokens": profile.tokens}[side]
    return extent.low if extent.low == extent.high else None


def _settled(tensor: TensorSpec, profile: ShapeProfile) -> TensorSpec:
    """The spec with every side, and the tokens, that the profile fixes as a number."""
    shape: list[int | str] = []
    for dim in tensor.shape:
        if isinstance(dim, str) and dim not in COUNTS and tokens_of_one(dim) is None:
            side, divisor = _side(dim)
            extent = _fixed(profile, side)
            shape.append(dim if extent is None else extent // divisor)
        else:
            shape.append(dim)
    return TensorSpec(name=tensor.name, dtype=tensor.dtype, shape=tuple(shape))


def _dynamic_shapes(profile: ShapeProfile, inputs: Iterable[TensorSpec]) -> Any:
    """A function from a spec to torch.export's description of what varies."""
    dims: dict[str, Any] = {"batch": Dim("batch", min=1, max=MAX_BATCH), "rows": Dim("rows", min=1, max=TRACED_ROWS)}
    for number, (name, one) in enumerate(image_dimensions(inputs).items()):
        dims[name] = Dim(f"image_tokens_{number}", min=one, max=one * MAX_IMAGES)
    dims["extra"] = Dim("extra", min=1, max=MAX_EXTRA)
    if profile.tokens.low != profile.tokens.high:
        dims["tokens"] = Dim("tokens", min=profile.tokens.low, max=profile.tokens.high)
    for side, extent in (("height", profile.heights), ("width", profile.widths)):
        if extent.low != extent.high:
            unit = Dim(f"{side}_blocks", min=max(1, extent.low // SIDE_STEP), max=extent.high // SIDE_STEP)
            for power in range(7):
                factor = SIDE_STEP // 2**power
                dims[f"{side}/{2**power}" if power else side] = factor * unit if factor > 1 else unit

    def describe(tensor: TensorSpec) -> dict[int, Any]:
        return {axis: dims[dim] for axis, dim in enumerate(tensor.shape) if isinstance(dim, str) and dim in dims}

    return describe


def _example(spec: ProgramSpec, sizes: Sizes, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: TensorSpec) -> Tensor:
        shape = []
        for dim in tensor.shape:
            if isinstance(dim, int):
                shape.append(dim)
            elif dim in COUNTS:
                shape.append(sizes[dim])
            elif (one := tokens_of_one(dim)) is not None:
                shape.append(one * sizes["images"])
            else:
                side, divisor = _side(dim)
                shape.append(sizes[side] // divisor)
        return spec.example(tensor, tuple(shape), sizes, generator)

    return dict(pytree.tree_map(fill, spec.inputs))


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether inputs have the same shapes."""
    shapes = [[tensor.shape for tensor in pytree.tree_leaves(inputs)] for inputs in (one, other)]
    return shapes[0] == shapes[1]


def _relative_error(spec: ProgramSpec, session: ort.InferenceSession, inputs: dict[str, Any]) -> float:
    """Largest difference between ONNX Runtime and PyTorch over the largest value, worst output."""
    with torch.no_grad():
        expected = pytree.tree_leaves(spec.module(**inputs))
    wanted = {tensor.name for tensor in session.get_inputs()}
    names = [tensor.name for tensor in pytree.tree_leaves(spec.inputs)]
    feeds = dict(zip(names, (leaf.numpy() for leaf in pytree.tree_leaves(inputs)), strict=True))
    found = session.run(None, {name: value for name, value in feeds.items() if name in wanted})
    worst = 0.0
    for reference, output in zip(expected, found, strict=True):
        difference = (torch.from_numpy(output) - reference).abs().max().item()
        worst = max(worst, difference / max(reference.abs().max().item(), 1e-12))
        if not math.isfinite(difference):
            return math.inf
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keeps the exporter's chatter out of the terminal; yields what it said."""
    log = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(log):
            warnings.simplefilter("ignore")
            yield log
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
