"""What int8 costs and gives, block by block: the error of the final latents against the time that is saved.

Each block is brought to int8 by itself, all else staying as it was, and draws pictures that the calibration left out.
Errors of blocks are taken to add up as independent ones do, in squares; the quality gate then sees what all of them
do together.

Pictures are drawn in float32, since the rounding of bfloat16 would hide what one block does. Time is measured in what
the bundle computes in.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from time import perf_counter

import msgspec
import numpy as np
from numpy.typing import NDArray

from controlrt.compiler.compile import ProgramGraph
from controlrt.compiler.quantization.statistics import Case
from controlrt.compiler.reference import rms_error
from controlrt.compiler.weights import WeightStore
from controlrt.engines.quantization.layer_choice import amax_by_part
from controlrt.engines.quantization.replay import replay_latents
from controlrt.engines.quantization.swapped_program import SwappedExecutor, with_program
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import UserError
from controlrt.runtime.executors import HostExecutor, open_host_executor
from controlrt.runtime.executors.base import Arrays
from controlrt.runtime.manifest import Manifest, QuantizedBlock, QuantizedLayer
from controlrt.runtime.pipeline import ControlNetPipeline
from controlrt.runtime.progress import Progress

Compile = Callable[[str, Mapping[str, float]], ProgramGraph]
"""The step of a part with these layers in int8, by name and threshold."""
CASES = 2
"""That a block draws."""
TURNS, SECONDS = 9, 3.0
"""How often programs without and with a block in int8 run in turns, A B B A, at least; and how long, where they are
short."""
_BLOCK = re.compile(r"^(.*?\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+)\.")
_ZERO = re.compile(r"^(.*?\.?controlnet_(?:down_blocks|mid_block))")


def block_of(layer: str) -> str:
    """The block that a layer is measured with: a ResNet, a transformer, a resampling, or all zero convolutions."""
    found = _BLOCK.match(layer) or _ZERO.match(layer)
    return found[1] if found else layer


def measure_blocks(
    bundle: Bundle, store: WeightStore, layers: Iterable[QuantizedLayer], cases: Sequence[Case], compile_step: Compile
) -> list[QuantizedBlock]:
    """Measures every block that has a layer for int8.

    Args:
        bundle: with nothing in int8, its programs in ``store``.
        store: where programs with a block in int8 are put beside them.
        layers: those with ``kept`` None are to be in int8.
        cases: what can be drawn; each block draws the first few that its part has to do with.
        compile_step: see ``Compile``.

    Raises:
        UserError: a part that no case has to do with.
    """
    blocks: dict[tuple[str, str], dict[str, float]] = {}
    for part, thresholds in amax_by_part(layers).items():
        for name, amax in thresholds.items():
            blocks.setdefault((part, block_of(name)), {})[name] = amax
    drawn = {part: _cases_of(part, bundle.manifest, cases) for part, _ in blocks}
    exact, found = _in_float32(bundle), []
    with (
        Progress("sensitivity", len(blocks)) as progress,
        open_host_executor(exact) as rest,
        contextlib.nullcontext(rest) if exact.manifest == bundle.manifest else open_host_executor(bundle) as as_built,
    ):
        expected = {part: _draw(SwappedExecutor(exact, rest, rest, ""), chosen) for part, chosen in drawn.items()}
        for number, ((part, block), thresholds) in enumerate(blocks.items()):
            progress.start(f"{part} {block}")
            step = compile_step(part, thresholds)
            file = f"block_{number}.onnx"
            store.save(step.model, file)
            program = msgspec.structs.replace(step.program, file=f"programs/{file}")
            changed = with_program(bundle, program)
            rounding = _in_float32(changed)
            executor = SwappedExecutor(rounding, rest, open_host_executor(rounding), program.name)
            errors = [rms_error(*pair) for pair in zip(_draw(executor, drawn[part]), expected[part], strict=True)]
            with open_host_executor(changed) as quantized:
                saved = seconds_saved(as_built, quantized, program.name, executor.largest)
            error = float(np.sqrt(np.mean(np.square(errors))))
            found.append(QuantizedBlock(part=part, name=block, latent_error=error, seconds_saved=saved, chosen=False))
    return found


def _in_float32(bundle: Bundle) -> Bundle:
    """The same programs, with what is in bfloat16 computed in float32."""
    programs = tuple(
        msgspec.structs.replace(
            program,
            precision="fp32" if program.precision == "bf16" else program.precision,
            unquantized="fp32" if program.unquantized == "bf16" else program.unquantized,
        )
        for program in bundle.manifest.programs
    )
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, programs=programs))


def _cases_of(part: str, manifest: Manifest, cases: Sequence[Case]) -> Sequence[Case]:
    """Those at which the programs of a part run."""
    names = {name for control in manifest.controls if control.part == part for name in control.names}
    found = [case for case in cases if not names or names.intersection(case.hints)][:CASES]
    if not found:
        raise UserError(
            f"the statistics hold no unseen picture that {part} is on in, to measure its blocks by; take them again "
            "with a larger --unseen: controlrt calibrate --unseen 8"
        )
    return found


def _draw(executor: SwappedExecutor, cases: Sequence[Case]) -> list[NDArray[np.float32]]:
    """The final latents of each case."""
    with ControlNetPipeline(executor.bundle, executor=executor) as pipeline:
        return [replay_latents(pipeline, case.arguments, case.hints)[-1] for case in cases]


def seconds_saved(before: HostExecutor, after: HostExecutor, program: str, bound: tuple[Arrays, Arrays]) -> float:
    """What one run of a program in ``after`` saves at least: a lower bound of the median, with a confidence of 98%.

    Of the differences of n turns it is the one that so many are below as a binomial distribution of n and 1/2 has in 2%
    of all cases at most, by its normal approximation: one of 9, 39 of 100. What the first of two runs has of the
    second is the same for both within a turn.

    Args:
        before: runs it without the block in int8.
        after: runs it with it.
        program: its name.
        bound: inputs and outputs.
    """
    launches = [executor.bind_call(program, *bound) for executor in (before, after)]
    for launch in launches:
        launch()
    differences: list[float] = []
    began = perf_counter()
    while len(differences) < TURNS or perf_counter() - began < SECONDS:
        seconds = [0.0, 0.0]
        for which in (0, 1, 1, 0):
            started = perf_counter()
            launches[which]()
            seconds[which] += perf_counter() - started
        differences.append((seconds[0] - seconds[1]) / 2)
    turns = len(differences)
    below = NormalDist(turns / 2, math.sqrt(turns) / 2).inv_cdf(0.02)
    return sorted(differences)[math.floor(below)]


def choose_blocks(blocks: Sequence[QuantizedBlock], budget: float) -> list[QuantizedBlock]:
    """The blocks that save the most time for their error, until the budget is spent.

    Args:
        blocks: what was measured.
        budget: of the error of the final latents, relative to theirs.

    Returns:
        All of them, in the same order, with ``chosen`` set. One that saves nothing is never chosen.
    """

    def worth(block: QuantizedBlock) -> float:
        return block.seconds_saved / max(block.latent_error**2, 1e-20)

    chosen: set[tuple[str, str]] = set()
    spent = 0.0
    for block in sorted((each for each in blocks if each.seconds_saved > 0), key=worth, reverse=True):
        if spent + block.latent_error**2 <= budget**2:
            spent += block.latent_error**2
            chosen.add((block.part, block.name))
    return [msgspec.structs.replace(block, chosen=(block.part, block.name) in chosen) for block in blocks]


def keep_others(layers: Iterable[QuantizedLayer], blocks: Iterable[QuantizedBlock]) -> tuple[QuantizedLayer, ...]:
    """The layers, those of blocks that were not chosen staying as they are."""
    measured = {(block.part, block.name): block for block in blocks}
    found = []
    for layer in layers:
        block = measured.get((layer.part, block_of(layer.name)))
        if layer.kept is None and block is not None:
            layer = msgspec.structs.replace(layer, kept=block.kept)
        found.append(layer)
    return tuple(found)
