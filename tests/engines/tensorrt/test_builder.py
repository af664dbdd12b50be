"""The builder's process: engines of small graphs, the cache, and every way in which a build ends badly.

TensorRT-RTX builds without a GPU, so these engines are real; nothing here runs one.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir
import pytest

from controlrt.compiler.weights import WeightStore
from controlrt.engines.tensorrt import builder, child, process
from controlrt.engines.tensorrt.builder import TensorRtBuilder
from controlrt.engines.tensorrt.dialect import write_for_parser
from controlrt.engines.tensorrt.options import EngineOptions
from controlrt.engines.tensorrt.request import BuildRequest
from controlrt.runtime.cuda.gpu import Gpu
from controlrt.runtime.errors import BuildError, OutputError
from controlrt.runtime.manifest import DType, Program, TensorSpec
from controlrt.runtime.profile import ShapeProfile

rtx = pytest.mark.skipif(not TensorRtBuilder("tensorrt-rtx").is_installed(), reason="the extra tensorrt-rtx is absent")
PROFILE = ShapeProfile.parse("512x512", "1-2")
GRAPH = """
<ir_version: 10, opset_import: ["" : 23]>
scaled (float[rows, 4] x, int64[1] index) => (float[rows, 4] y)
<float[4, 4] weight = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0}>
{
    product = MatMul(x, weight)
    picked = Gather(product, index)
    y = Add(product, picked)
}
"""


def save(directory: Path, text: str = GRAPH, pad: int = 0) -> Path:
    """Writes the graph as the compiler does; ``pad`` moves its weights in their file."""
    model = ir.from_onnx_text(text)
    directory.mkdir(parents=True, exist_ok=True)
    with WeightStore(directory) as store:
        if pad:
            store._append(b"\0" * pad)
        store.save(model, "unet.step.onnx")
    return directory / "unet.step.onnx"


def program(index: DType = "int64") -> Program:
    return Program(
        name="unet.step",
        part="unet",
        stage="step",
        file="programs/unet.step.onnx",
        cost=None,
        inputs=(
            TensorSpec(name="x", dtype="float32", shape=("rows", 4)),
            TensorSpec(name="index", dtype=index, shape=(1,)),
        ),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("rows", 4)),),
        max_relative_error=0.0,
        export_seconds=0.0,
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle to build into, with an empty cache of engines."""
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "bundle"
    (target / "programs").mkdir(parents=True)
    return target


def build(
    onnx: Path, target: Path, described: Program | None = None, profile: ShapeProfile = PROFILE, **options: Any
) -> Program:
    return TensorRtBuilder("tensorrt-rtx").build(
        described or program(), onnx, target, profile, EngineOptions(**options)
    )


def kept(target: Path) -> list[Path]:
    return sorted((target.parent / "cache" / "engines").iterdir())


def digest_of(onnx: Path) -> str:
    return write_for_parser("unet.step", onnx)[1].digest


def replace_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(builder, "CHILD", (sys.executable, "-c", code))


@rtx
def test_an_engine_and_what_the_manifest_says_of_it(place: Path, tmp_path: Path) -> None:
    built = build(save(tmp_path / "onnx"), place, compute_capabilities=("8.6", "8.9"))
    assert built.file == "programs/unet.step.plan"
    assert (place / built.file).stat().st_size > 1000
    assert built.engine is not None
    assert built.engine.builder == "tensorrt-rtx"
    assert built.engine.version == TensorRtBuilder("tensorrt-rtx").versions()["tensorrt-rtx"]
    assert built.engine.compute_capabilities == ("8.6", "8.9")
    assert built.engine.gpu is None
    assert built.engine.build_seconds > 0
    assert [path.name for path in (place / "programs").iterdir()] == ["unet.step.plan"]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["unet.step.onnx", "weights.bin"]


@rtx
@pytest.mark.parametrize(("tile", "profiles"), [(None, 2), (256, 1)])
def test_a_vae_of_tiles_is_for_all_up_to_one(tile: int | None, profiles: int, place: Path, tmp_path: Path) -> None:
    """And not for each size of the pictures."""
    named = {"name": "vae_decoder", "part": "vae_decoder", "stage": None}
    rows, index = program().inputs
    described = msgspec.structs.replace(
        program(), **named, inputs=(msgspec.structs.replace(rows, shape=("height/8", 4)), index)
    )
    sizes = ShapeProfile.parse("512x512,512x768", vae_tile=tile)
    built = build(save(tmp_path / "onnx"), place, described, sizes)
    assert built.engine is not None
    assert built.engine.optimization_profiles == profiles


@rtx
def test_what_took_long_is_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builder, "LONG_SECONDS", 0.0)
    build(save(tmp_path / "onnx"), place)
    assert re.search(r"^tensorrt-rtx unet\.step: .+ took \d+ s$", capsys.readouterr().err, re.MULTILINE)


@rtx
def test_options_reach_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx as trt

    given: dict[str, Any] = {}
    monkeypatch.setattr("polygraphy.backend.trt.CreateConfig", lambda **options: given.update(options))
    cache = tmp_path / "timing.cache"
    cache.touch()
    request = BuildRequest(
        flavour="tensorrt-rtx",
        onnx="",
        plan="",
        answer="",
        timing_cache=str(cache),
        profiles=[{"x": ((1, 4), (2, 4), (3, 4))}],
        options=EngineOptions(optimization_level=2, workspace_mib=64, aux_streams=1, version_compatible=True),
    )
    child._config(request, phases := object())
    assert given["builder_optimization_level"] == 2
    assert given["memory_pool_limits"] == {trt.MemoryPoolType.WORKSPACE: 64 * 2**20}
    assert given["max_aux_streams"] == 1
    assert given["load_timing_cache"] == str(cache)
    assert given["version_compatible"]
    assert given["progress_monitor"] is phases
    assert [tuple(profile["x"]) for profile in given["profiles"]] == [((1, 4), (2, 4), (3, 4))]
    assert (given["refittable"], given["strip_plan"]) == (False, False)


def test_what_tensorrt_timed_is_kept_by_gpu_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLRT_CACHE", str(tmp_path))
    monkeypatch.setattr(builder, "_version", {"tensorrt": "11.0"}.__getitem__)
    monkeypatch.setattr(builder, "find_gpu", lambda: Gpu(name="NVIDIA L4", compute_capability="8.9"))
    file = TensorRtBuilder("tensorrt")._timing_cache()
    assert file == str(tmp_path / "timing" / "tensorrt-11.0-NVIDIA-L4.cache")
    assert TensorRtBuilder("tensorrt-rtx")._timing_cache() is None  # it times nothing before an engine runs


@rtx
def test_a_second_build_is_a_copy(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the weights lie in their file."""
    first = build(save(tmp_path / "onnx"), place)
    plan = (place / first.file).read_bytes()
    (place / first.file).unlink()
    replace_child(monkeypatch, "raise SystemExit('the builder must not run')")
    again = build(save(tmp_path / "elsewhere", pad=8192), place)
    assert again == first
    assert (place / again.file).read_bytes() == plan


@rtx
def test_a_damaged_engine_in_the_cache_is_built_again(place: Path, tmp_path: Path) -> None:
    onnx = save(tmp_path / "onnx")
    first = build(onnx, place)
    plan = (place / first.file).read_bytes()
    (entry,) = kept(place)
    (entry / "engine.plan").write_bytes(plan[:100])
    again = build(onnx, place)
    assert (place / again.file).stat().st_size == len(plan)
    assert kept(place) == [entry]


@rtx
def test_what_decides_an_engine_decides_its_place_in_the_cache(tmp_path: Path) -> None:
    digest = digest_of(save(tmp_path / "onnx"))
    assert digest == digest_of(save(tmp_path / "padded", pad=4096))
    assert digest != digest_of(save(tmp_path / "weights", GRAPH.replace("16.0", "17.0")))
    assert digest != digest_of(save(tmp_path / "graph", GRAPH.replace("Add(", "Sub(")))
    key = TensorRtBuilder("tensorrt-rtx")._key
    keys = {
        key(digest, [{"x": ((1, 4), (2, 4), (4, 4))}], EngineOptions()),
        key(digest, [{"x": ((1, 4), (2, 4), (8, 4))}], EngineOptions()),
        key(digest, [{"x": ((1, 4), (2, 4), (4, 4))}], EngineOptions(compute_capabilities=("8.9",))),
        key(digest, [{"x": ((1, 4), (2, 4), (4, 4))}], EngineOptions(optimization_level=1)),
        key("other", [{"x": ((1, 4), (2, 4), (4, 4))}], EngineOptions()),
    }
    assert len(keys) == 5


@rtx
def test_attention_reads_as_the_parser_wants_it(tmp_path: Path) -> None:
    """``softmax_precision`` is refused by TensorRT 11's parser."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    attend (float16[1, 8, 16] q, float16[1, 8, 16] k) => (float16[1, 8, 16] y)
    { y = Attention <q_num_heads = 2, kv_num_heads = 2, softmax_precision = 1> (q, k, k) }
    """
    onnx = save(tmp_path, text)
    node = next(iter(ir.load(write_for_parser("unet.step", onnx)[0]).graph))
    assert "softmax_precision" not in node.attributes
    assert node.attributes["q_num_heads"].as_int() == 2
    assert "softmax_precision" in next(iter(ir.load(onnx).graph)).attributes


@rtx
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_attention_builds_with_a_fused_kernel_and_without(place: Path, tmp_path: Path, dtype: str) -> None:
    """TensorRT-RTX has one for float16 alone."""
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    attend ({dtype}[rows, 64, 96] x, {dtype}[rows, 77, 96] k) => ({dtype}[rows, 64, 96] y)
    {{ y = Attention <q_num_heads = 4, kv_num_heads = 4, softmax_precision = 1> (x, k, k) }}
    """
    kind: DType = "float32" if dtype == "float" else "float16"
    described = msgspec.structs.replace(
        program(),
        inputs=(
            TensorSpec(name="x", dtype=kind, shape=("rows", 64, 96)),
            TensorSpec(name="k", dtype=kind, shape=("rows", 77, 96)),
        ),
        outputs=(TensorSpec(name="y", dtype=kind, shape=("rows", 64, 96)),),
    )
    built = build(save(tmp_path / "onnx", text), place, described, compute_capabilities=("8.9",))
    assert (place / built.file).stat().st_size > 1000


@rtx
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace("MatMul(", "NoSuchOperator("), "NoSuchOperator"),
        (lambda text: text.replace("float[4, 4] weight", "float[2, 8] weight"), "MatMul"),
    ],
    ids=["unknown operator", "shapes that do not fit"],
)
def test_what_the_builder_refuses(place: Path, tmp_path: Path, damage: Any, says: str) -> None:
    with pytest.raises(BuildError, match=r"program unet\.step: tensorrt-rtx refuses it; .*--backend") as failed:
        build(save(tmp_path / "onnx", damage(GRAPH)), place)
    assert says in str(failed.value)
    assert kept(place) == []


@pytest.mark.parametrize("damaged", ["unet.step.onnx", "weights.bin"])
def test_corrupt_onnx(place: Path, tmp_path: Path, damaged: str) -> None:
    rows = ", ".join(["0.5"] * 1024)
    text = GRAPH.replace("[rows, 4] x", "[rows, 32] x").replace("[rows, 4] y", "[rows, 32] y")
    text = text.replace(text[text.index("<float[4, 4]") : text.index("}>") + 2], f"<float[32, 32] weight = {{{rows}}}>")
    onnx = save(tmp_path / "onnx", text)
    file = tmp_path / "onnx" / damaged
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BuildError, match=r"program unet\.step: its ONNX and weights cannot be read"):
        build(onnx, place)


@rtx
def test_an_engine_that_is_not_what_the_manifest_says(place: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"program unet\.step: the engine reads index as \('int64', 1\)"):
        build(save(tmp_path / "onnx"), place, program(index="int32"))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import os, signal; print('[E] deep inside', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
            "crashed (SIGS",
        ),
        (
            "import os, signal; print('[E] deep inside', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
            "enough memory",
        ),
        ("import sys; print('[E] deep inside'); sys.exit(3)", "refuses it"),
        ("print('[E] deep inside'); import no_such_module", "pip install 'controlrt[tensorrt-rtx]'"),
        ("print('[E] deep inside')", "ended without an engine"),
    ],
    ids=["crash", "kill", "refusal", "import", "nothing"],
)
def test_a_builder_that_ends_badly(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    replace_child(monkeypatch, code)
    with pytest.raises(BuildError, match=r"program unet\.step: tensorrt-rtx") as failed:
        build(save(tmp_path / "onnx"), place)
    assert says in str(failed.value)
    assert "deep inside" in str(failed.value)
    assert kept(place) == []
    assert list((place / "programs").iterdir()) == []


def test_a_full_disk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_child(monkeypatch, "raise OSError(28, 'No space left on device')")
    with pytest.raises(OutputError, match=r"no space left .* unet\.step"):
        build(save(tmp_path / "onnx"), place)


def test_an_interrupted_build_leaves_no_builder_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    class Interrupted(process.subprocess.Popen):  # type: ignore[misc]
        def wait(self, timeout: float | None = None) -> int:
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return int(super().wait(timeout))

    monkeypatch.setattr(process.subprocess, "Popen", Interrupted)
    replace_child(monkeypatch, "import time; time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        build(save(tmp_path / "onnx"), place)
    assert started[0].returncode == -9
    assert kept(place) == []


def test_records_of_another_schema_are_not_read(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    entry.mkdir()
    assert builder._read(entry) is None
    (entry / "engine.json").write_bytes(msgspec.json.encode({"sha256": "0"}))
    shutil.copyfile(entry / "engine.json", entry / "engine.plan")
    assert builder._read(entry) is None
