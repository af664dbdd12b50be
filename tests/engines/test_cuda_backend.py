"""What the CUDA backend makes of exported programs, on a machine without a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from controlrt.compiler.compile import ProgramGraph, compile_program, load_program, one_picture
from controlrt.compiler.flops import count_flops
from controlrt.compiler.verify import Verifier
from controlrt.compiler.weights import WeightStore
from controlrt.engines.backends.cuda import CudaBackend
from controlrt.engines.backends.openvino import OpenVinoBackend
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.errors import BuildError
from controlrt.runtime.manifest import Precision, Program
from controlrt.runtime.profile import ShapeProfile

pytestmark = pytest.mark.parametrize(
    "family", ["shallow", pytest.param("sdxl", marks=pytest.mark.slow)], indirect=True, scope="module"
)
LOWERED = [type(each).__name__ for each in CudaBackend.passes if getattr(each, "typed", False)]


def compiled(
    exported: Path, name: str, precision: Precision, verifier: Verifier | None = None
) -> dict[str, ProgramGraph]:
    profile = read_manifest(exported).profile
    program = next(program for program in read_manifest(exported).programs if program.name == name)
    model = load_program(program, exported, profile)
    found = compile_program(program, model, profile, CudaBackend.passes, verifier, precision)
    return {each.program.name: each for each in found}


def finished(program: Program, directory: Path, profile: ShapeProfile) -> Program:
    return CudaBackend().finish(program, directory / "model.onnx", directory, profile, EngineOptions())


@pytest.mark.parametrize("name", ["unet", "controlnet.first", "vae_decoder", "vae_encoder", "text_encoder"])
def test_every_pass_is_exact_in_float32(exported: Path, name: str, tmp_path: Path) -> None:
    dims = one_picture(read_manifest(exported).profile) | {"batch": 2, "rows": 4}
    with Verifier(dims, tmp_path) as verifier:
        compiled(exported, name, "fp16", verifier)
    checked = [check.compiler_pass for check in verifier.checks]
    expected = {"ChannelsLast", "SinkTransposes", "SkipGroupNorm"} if name != "text_encoder" else {"SkipLayerNorm"}
    assert expected <= set(checked)
    assert set(LOWERED).isdisjoint(checked[: checked.index(next(c for c in checked if c in LOWERED))])


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_step_swaps_axes_at_its_ends_alone(exported: Path, precision: Precision) -> None:
    step = compiled(exported, "unet", precision)["unet.step"].model.graph
    count = Counter(node.op_type for node in step)
    assert not {"Conv", "GroupNormalization", "Attention"} & set(count)
    swaps = [node for node in step if node.op_type == "Transpose" and len(node.attributes.get_ints("perm", ())) == 4]
    assert len(swaps) == 2  # the latents in, the prediction out
    residuals = [value for value in step.inputs if (value.name or "").startswith("residual_")]
    assert residuals
    assert all(value.shape is not None and value.shape[1] == value.shape[2] for value in residuals)


def test_programs_are_valid_and_cost_what_they_cost_elsewhere(exported: Path, tmp_path: Path) -> None:
    manifest = read_manifest(exported)
    dims = one_picture(manifest.profile)
    with WeightStore(tmp_path) as store:
        for program in manifest.programs:
            model = load_program(program, exported, manifest.profile)
            plain = compile_program(program, model, manifest.profile, OpenVinoBackend.passes[:4], None, "fp16")
            for each, other in zip(compiled(exported, program.name, "fp16").values(), plain, strict=True):
                store.save(each.model, "model.onnx")
                assert finished(each.program, tmp_path, manifest.profile) == each.program
                assert each.program.name == other.program.name
                assert each.program.cost is not None
                assert each.program.cost.flops == count_flops(other.model.graph, dims).total


def test_a_graph_that_is_not_valid_is_refused(exported: Path, tmp_path: Path) -> None:
    step = compiled(exported, "unet", "fp16")["unet.step"]
    norm = next(node for node in step.model.graph if node.op_type == "GroupNorm")
    norm.attributes["groups"] = ir.AttrString("groups", "many")
    with WeightStore(tmp_path) as store:
        store.save(step.model, "model.onnx")
    with pytest.raises(BuildError, match=r"program unet\.step: .*groups"):
        finished(step.program, tmp_path, read_manifest(exported).profile)
