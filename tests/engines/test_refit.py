"""``controlrt refit`` on engines of ``fake_tensorrt``: what is in them before and after, and what is refused.

The export is the demo model's, of which some parts are enough here. A ControlNet takes another's place as if it had
been traced there.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_tensorrt
import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.engines import build as building
from controlrt.engines import refit as refitting
from controlrt.engines import refit_command
from controlrt.engines.backends import BACKENDS
from controlrt.engines.build import BuildOptions, build, export_programs
from controlrt.engines.refit import Refitted, refit
from controlrt.engines.refit_options import RefitOptions
from controlrt.engines.tensorrt import builder, refitter
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.engines.tensorrt.structure import structure_file
from controlrt.runtime.bundle import Bundle, digest_files, read_manifest, write_manifest
from controlrt.runtime.commands import guarded, run_command
from controlrt.runtime.commands.lora_option import LoraOption
from controlrt.runtime.cuda.gpu import Gpu
from controlrt.runtime.errors import DeviceError, SourceError, UnknownNameError, UserError
from controlrt.runtime.manifest import Fusion, Lora, Loss, Manifest, Program
from controlrt.runtime.profile import ShapeProfile

pytestmark = pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].is_installed(), reason="the extra tensorrt-rtx is absent")
ADA = Gpu(name="NVIDIA L40S", compute_capability="8.9")
PARTS = ("controlnet.canny", "controlnet.mask")
FREQUENCIES = "unsqueeze_1"
"""Of the sinusoids that a timestep is embedded in; no checkpoint holds them."""
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some parts of the demo model's export."""
    source = export_programs(
        str(MODEL_DIR), {name: str(path) for name, path in CONTROLNETS.items()}, ShapeProfile.parse("512x512", "1-4")
    )
    directory = Path(shutil.copytree(source, tmp_path_factory.mktemp("exports") / "demo"))
    manifest = read_manifest(directory)
    write_manifest(directory, changed(manifest, programs=tuple(manifest.program(part) for part in PARTS)))
    return directory


def changed(record: Any, **values: Any) -> Any:
    return msgspec.structs.replace(record, **values)


def with_mask_as_canny(exported: Path, directory: Path, **others: NDArray[Any]) -> Path:
    """Writes the export of the same model with mask's ControlNet in the place of canny's.

    Args:
        exported: what to change.
        directory: where it goes.
        others: initializers that are others, by name.
    """
    shutil.copytree(exported, directory)
    model = ir.load(exported / "programs" / "controlnet.mask.onnx")
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        value.const_value = ir.tensor(others.get(value.name, array), name=value.name)
    ir.save(model, directory / "programs" / "controlnet.canny.onnx")
    manifest = read_manifest(directory)
    sources = manifest.provenance.sources
    provenance = changed(manifest.provenance, sources={**sources, "controlnet.canny": sources["controlnet.mask"]})
    write_manifest(directory, changed(manifest, key="a" * 64, files=digest_files(directory), provenance=provenance))
    return directory


@pytest.fixture(scope="module")
def library(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A GPU, and the fake library that builds and refits; exports are ``exported``."""
    cache = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        for module, child in ((builder, fake_tensorrt.BUILD), (refitter, fake_tensorrt.REFIT)):
            patch.setattr(module, "CHILD", child)
            patch.setattr(module, "run_child", fake_tensorrt.run_here)
            patch.setattr(module, "find_gpu", lambda: ADA)
        patch.setattr(builder, "engine_cache", lambda: cache)
        patch.setattr(building, "export_sources", lambda _: exported)
        patch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt)
        yield


def built(output: Path, fuse: tuple[str, ...] = (), **options: Any) -> Path:
    made = BuildOptions(
        model=str(MODEL_DIR),
        controlnets={name: str(path) for name, path in CONTROLNETS.items()},
        profile=ShapeProfile.parse("512x512", "1-4"),
        backend="tensorrt-rtx",
        precision="fp16",
        measure=False,
        fuse=fuse,
        output=output,
        engine=EngineOptions(**options),
    )
    build(made, "pytest")
    return output


@pytest.fixture(scope="module")
def refittable(library: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001 - it is in place
    return built(tmp_path_factory.mktemp("bundles") / "refittable", refittable=True)


@pytest.fixture(scope="module")
def stripped(refittable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as with ``strip_weights``."""
    bundle = Path(shutil.copytree(refittable, tmp_path_factory.mktemp("bundles") / "stripped"))
    manifest = read_manifest(bundle)
    for program in manifest.programs:
        weights = fake_tensorrt.weights_of(plan(bundle, program.name))
        (bundle / program.file).write_bytes(fake_tensorrt.make_plan(weights, refittable=True, stripped=True))
    programs = with_engines(manifest, stripped=True)
    write_manifest(bundle, changed(manifest, programs=programs, files=digest_files(bundle)))
    return bundle


@pytest.fixture(scope="module")
def with_mask(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export in which mask's ControlNet is canny."""
    return with_mask_as_canny(exported, tmp_path_factory.mktemp("exports") / "with_mask")


def refit_from(export: Path, **options: Any) -> tuple[Refitted, BuildOptions]:
    """What a refit makes of an export, and what it asked to have exported."""
    asked: list[BuildOptions] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refitting, "export_sources", lambda options: asked.append(options) or export)
        return refit(RefitOptions(**options), "pytest"), asked[0]


@pytest.fixture(scope="module")
def refitted(refittable: Path, with_mask: Path) -> Path:
    """The bundle with mask's ControlNet as canny."""
    output, mask = refittable.with_name("refitted"), str(CONTROLNETS["mask"])
    made, asked = refit_from(with_mask, bundle=refittable, output=output, controlnets={"canny": mask})
    assert asked.controlnets == {"canny": mask, "mask": mask}
    assert (asked.model, asked.precision, asked.loras) == (str(MODEL_DIR), "fp16", ())
    assert made.programs == tuple(name for name in programs(refittable) if name.startswith("controlnet.canny."))
    return output


def programs(bundle: Path) -> dict[str, Program]:
    return {program.name: program for program in Bundle.open(bundle).manifest.programs}


def plan(bundle: Path, program: str) -> bytes:
    return (bundle / f"programs/{program}.plan").read_bytes()


def expected(checkpoint: Path) -> Arrays:
    """The tensors of a ControlNet as programs in float16 have them. Matrices are transposed, but in the time MLP, which
    stays in float32."""
    found = {}
    for name, tensor in load_file(checkpoint / "diffusion_pytorch_model.safetensors").items():
        if name.startswith("time_embedding") or ".time_emb_proj." in name:
            found[f"controlnet.{name}"] = tensor.astype(np.float32)
        else:
            found[f"controlnet.{name}.half"] = (tensor.T if tensor.ndim == 2 else tensor).astype(np.float16)
    return found


def check_controlnet(bundle: Path, name: str, checkpoint: Path) -> None:
    """Every tensor of the checkpoint is in one of the engines, and nothing else."""
    found: Arrays = {}
    for program in programs(bundle):
        if program.startswith(f"controlnet.{name}."):
            found |= fake_tensorrt.weights_of(plan(bundle, program))
    del found[FREQUENCIES]
    wanted = expected(checkpoint)
    assert found.keys() == wanted.keys()
    for weight, array in wanted.items():
        assert found[weight].dtype == array.dtype
        np.testing.assert_array_equal(found[weight].ravel(), array.ravel(), err_msg=weight)


def test_another_controlnet_in_the_place_of_one(refittable: Path, refitted: Path) -> None:
    check_controlnet(refittable, "canny", CONTROLNETS["canny"])
    for name in ("canny", "mask"):
        check_controlnet(refitted, name, CONTROLNETS["mask"])
    before, after = Bundle.open(refittable).manifest, Bundle.open(refitted).manifest
    for program in after.programs:
        assert program.engine is not None
        assert (program.engine.refit_seconds is None) == (program.part != "controlnet.canny")
        if program.part != "controlnet.canny":
            assert program == before.program(program.name)
            assert plan(refitted, program.name) == plan(refittable, program.name)
    assert after.refitted_from == before.key != after.key
    assert {control.source for control in after.controls} == {str(CONTROLNETS["mask"])}
    assert after.provenance.sources["controlnet.canny"] == before.provenance.sources["controlnet.mask"]
    assert not (refitted / "compiled").exists()


def test_a_refitted_bundle_is_refitted_where_it_lies(refitted: Path, exported: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(refitted, tmp_path / "bundle"))
    refit_from(exported, bundle=bundle, output=bundle, controlnets={"canny": str(CONTROLNETS["canny"])})
    check_controlnet(bundle, "canny", CONTROLNETS["canny"])
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("library")
def test_the_command_gives_engines_their_own_weights(
    stripped: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(refitting, "export_sources", lambda _: exported)
    monkeypatch.setattr(sys, "argv", ["controlrt", "refit", str(stripped)])
    whole = stripped.with_name("stripped-refitted")
    for says in ("8 of 8 engines have other weights, which took", "up to date, nothing to do"):
        assert guarded(lambda: run_command(refit_command, [str(stripped)], "controlrt refit"), []) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"{whole}: ")
        assert says in printed
    assert Bundle.open(whole).manifest.provenance.command == f"controlrt refit {stripped}"
    for program in read_manifest(whole).programs:
        assert program.engine is not None
        assert not program.engine.stripped
        traits = fake_tensorrt.traits_of(plan(whole, program.name))
        assert (traits["refittable"], traits["stripped"]) == (True, False)
    for name, path in CONTROLNETS.items():
        check_controlnet(whole, name, path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], RefitOptions(bundle=Path("b"), output=Path("b-refitted"))),
        (["--lora", "none", "-o", "c"], RefitOptions(bundle=Path("b"), output=Path("c"), loras=())),
        (
            ["--lora", "x:0.5", "--model", "m", "--adapter", "a=b", "--ip-adapter", "f=g"],
            RefitOptions(
                bundle=Path("b"),
                output=Path("b-refitted"),
                model="m",
                adapters={"a": "b"},
                ip_adapters={"f": "g"},
                loras=(LoraOption(source="x", weight=0.5),),
            ),
        ),
    ],
)
def test_what_the_command_line_says(
    arguments: list[str], expected: RefitOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RefitOptions] = []

    def note(options: RefitOptions, command: str) -> Refitted:
        asked.append(options)
        raise UserError(command)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(refit_command, "refit", note)
    with pytest.raises(UserError):
        run_command(refit_command, ["b", *arguments], "controlrt refit")
    output = expected.output if "-o" in arguments else tmp_path / expected.output
    assert asked == [dataclasses.replace(expected, output=output)]


@pytest.mark.usefixtures("library")
def test_another_shape(refittable: Path, exported: Path, tmp_path: Path) -> None:
    bias = "controlnet.controlnet_cond_embedding.conv_in.bias"
    source = with_mask_as_canny(exported, tmp_path / "export", **{bias: np.zeros(24, np.float32)})
    says = (
        rf"^program controlnet\.canny\.hint: weight {bias}\.half is float16 \(24,\), and float16 \(8,\) in the "
        "engine; .* build a bundle of this one with build-engines$"
    )
    with pytest.raises(SourceError, match=says):
        refit_from(source, bundle=refittable, output=tmp_path / "out", controlnets={"canny": "wide"})
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_changed_part_is_measured_where_it_was_before(refittable: Path, with_mask: Path, tmp_path: Path) -> None:
    """What float16 gives up is a matter of weights."""
    manifest, lost = read_manifest(refittable), Loss(max_relative_error=1.0, rms_relative_error=1.0)
    programs = tuple(changed(program, loss=lost) for program in manifest.programs)
    bundle = edited(refittable, tmp_path / "bundle", programs=programs)
    refit_from(with_mask, bundle=bundle, output=tmp_path / "out", controlnets={"canny": str(CONTROLNETS["mask"])})
    for program in read_manifest(tmp_path / "out").programs:
        assert program.loss is not None
        if program.part == "controlnet.canny":
            assert 0 < program.loss.max_relative_error < 0.01
        else:
            assert program.loss == lost


def edited(bundle: Path, directory: Path, **values: Any) -> Path:
    """A bundle whose manifest says something else."""
    shutil.copytree(bundle, directory)
    write_manifest(directory, changed(read_manifest(directory), **values))
    return directory


def with_engines(manifest: Manifest, **values: Any) -> tuple[Program, ...]:
    return tuple(changed(each, engine=changed(each.engine, **values)) for each in manifest.programs)


@pytest.mark.parametrize(
    ("case", "named", "error", "says"),
    [
        ("onnxruntime", {"canny": "x"}, UserError, "is for onnxruntime, whose programs are ONNX .* with build-engines"),
        ("fixed", {"canny": "x"}, UserError, "its engines keep their weights; build it again .* and --refittable"),
        ("int8", {"canny": "x"}, UserError, "is in int8: .* calibrate the other checkpoint and build a bundle"),
        ("no structure", {"canny": "x"}, UserError, "has no programs/.*structure.json, .* build it again"),
        ("", {"cany": "x"}, UnknownNameError, "unknown ControlNet 'cany'; known: canny, mask .did you mean 'canny'"),
        ("", {}, UserError, "has its weights; say what to replace: --controlnet NAME=SOURCE, --lora"),
        ("no GPU", {"canny": "x"}, DeviceError, "there is none here; refit the bundle on the machine that will draw"),
    ],
)
def test_refused_before_anything_is_traced(
    refittable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    named: dict[str, str],
    error: type[Exception],
    says: str,
) -> None:
    def trace(_: BuildOptions) -> Path:
        raise AssertionError("the export was asked for")

    monkeypatch.setattr(refitting, "export_sources", trace)
    bundle, manifest = tmp_path / "bundle", read_manifest(refittable)
    structures = {structure_file(program.file) for program in manifest.programs}
    edits: dict[str, dict[str, Any]] = {
        "onnxruntime": {"backend": "onnxruntime"},
        "fixed": {"programs": with_engines(manifest, refittable=False)},
        "int8": {"precision": "int8"},
        "no structure": {"files": {name: sha for name, sha in manifest.files.items() if name not in structures}},
    }
    edited(refittable, bundle, **edits.get(case, {}))
    if case == "no GPU":
        monkeypatch.setattr(refitter, "find_gpu", lambda: None)
    with pytest.raises(error, match=says):
        refit(RefitOptions(bundle=bundle, output=tmp_path / "out", controlnets=named), "pytest")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("controlnet.canny", {"controlnet.canny", "fused"}),
        ("controlnet.mask", {"controlnet.mask"}),
        ("adapter.depth", {"adapter.depth"}),
        ("image_encoder.face", {"ip_adapter.face"}),
        ("ip_adapter.face", {"ip_adapter.face", "unet", "text_encoder", "fused"}),
        ("model", {"unet", "text_encoder", "fused"}),
        ("lora.details", {"unet", "text_encoder", "fused"}),
        ("weight of a LoRA", {"unet", "text_encoder", "fused"}),
        (None, set()),
    ],
)
def test_the_parts_that_another_source_reaches(refittable: Path, source: str | None, parts: set[str]) -> None:
    manifest = read_manifest(refittable)
    names = ("unet", "fused", "text_encoder", "controlnet.canny", "controlnet.mask", "adapter.depth", "ip_adapter.face")
    lora = Lora(name="details", source="x", weight=1.0, sha256="0" * 64)
    before = changed(
        manifest,
        programs=tuple(changed(manifest.programs[0], name=name, part=name) for name in names),
        fusion=Fusion(part="fused", controls=("canny",)),
        model=changed(manifest.model, loras=(lora,)),
    )
    sources = dict(before.provenance.sources)
    if source is not None and " " not in source:
        sources[source] = "1" * 64
    loras = (changed(lora, weight=0.5 if source == "weight of a LoRA" else 1.0),)
    after = changed(
        before,
        provenance=changed(before.provenance, sources=sources),
        model=changed(before.model, loras=loras),
    )
    assert refitting._parts_to_refit(before, after) == parts


@pytest.mark.slow
@pytest.mark.usefixtures("library")
def test_a_lora_and_a_controlnet_in_what_is_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the export as it is."""
    monkeypatch.setattr(building, "export_sources", refitting.export_sources)
    name, weight = "down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q", 0.8
    rng = np.random.default_rng(0)
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 96), (96, 4)))
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    bundle = built(tmp_path / "bundle", fuse=("canny",), refittable=True)
    options = RefitOptions(
        bundle=bundle,
        output=tmp_path / "refitted",
        controlnets={"canny": str(CONTROLNETS["mask"])},
        loras=(LoraOption(source=str(tmp_path / "lora.safetensors"), weight=weight),),
    )
    refit(options, "pytest")
    check_controlnet(tmp_path / "refitted", "canny", CONTROLNETS["mask"])
    before, after = (fake_tensorrt.weights_of(plan(each, "fused.step")) for each in (bundle, options.output))
    for own, array in expected(CONTROLNETS["mask"]).items():
        if f"canny/{own}" in after:
            np.testing.assert_array_equal(after[f"canny/{own}"].ravel(), array.ravel(), err_msg=own)
    unet = [each for each in before if "/" not in each]
    others = [each for each in unet if not np.array_equal(before[each].ravel(), after[each].ravel())]
    assert others == [f"unet.{name}.weight.half"]
    plain = load_file(MODEL_DIR / "unet" / "diffusion_pytorch_model.safetensors")[f"{name}.weight"].astype(np.float32)
    merged = (plain + weight * up @ down).T
    np.testing.assert_allclose(after[f"unet.{name}.weight.half"].reshape(96, 96), merged, rtol=2**-10, atol=1e-4)
    (lora,) = read_manifest(options.output).model.loras
    assert (lora.source, lora.weight) == (str(tmp_path / "lora.safetensors"), weight)
