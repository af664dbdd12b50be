"""The build as a user meets it: second builds, interruptions, two at once, mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx_ir as ir
import pytest

from controlrt.compiler.verify import VerificationError
from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.engines.backends import BACKENDS
from controlrt.engines.build import BuildOptions, build, export_programs
from controlrt.runtime import commands
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.profile import ShapeProfile

BUILD = [
    sys.executable,
    "-c",
    "import sys; from controlrt.runtime.commands import build_engines; sys.exit(build_engines())",
]
FIXTURE = ["--profile", "512x512", "--batch", "1-4", "--backend", "onnxruntime"]
"""What makes the bundle of ``demo_bundle``."""
DEMO = ["--model", str(MODEL_DIR), "--controlnet", f"mask={CONTROLNETS['mask']}"]


def build_engines(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BUILD, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=600
    )


def stamps(bundle: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in bundle.rglob("*")}


def test_a_second_build_does_nothing_and_says_so(demo_bundle: Path) -> None:
    before = stamps(demo_bundle)
    again = build_engines(*FIXTURE, "--output", str(demo_bundle))
    assert again.returncode == 0, again.stderr
    assert "up to date, nothing to do (controls: canny, mask; backend: onnxruntime)" in again.stdout
    assert again.stderr == ""
    assert stamps(demo_bundle) == before


def test_a_damaged_bundle_is_built_again(demo_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))
    (copy / "scheduler.json").write_text("{}")
    again = build_engines(*FIXTURE, "--output", str(copy))
    assert again.returncode == 0, again.stderr
    assert "trace" not in again.stderr  # the export is still in the cache
    assert Bundle.open(copy).manifest.key == Bundle.open(demo_bundle).manifest.key
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, sent: signal.Signals) -> None:
    """SIGINT goes to the whole process group, as a terminal sends it, SIGTERM to the parent alone."""
    process = subprocess.Popen(
        [*BUILD, *DEMO, "--output", str(tmp_path / "out" / "bundle")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "CONTROLRT_CACHE": str(tmp_path / "cache")},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "load checkpoint" in line:
            break
    time.sleep(1)
    if sent == signal.SIGTERM:
        process.send_signal(sent)
    else:
        os.killpg(process.pid, sent)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if sent == signal.SIGKILL else 130)
    assert not (tmp_path / "out" / "bundle").exists()
    exports = tmp_path / "cache" / "exports"
    finished = [path for path in exports.iterdir() if ".partial-" not in path.name]
    assert finished == []
    if sent != signal.SIGKILL:
        assert list(exports.iterdir()) == []


@pytest.mark.usefixtures("demo_bundle")
def test_an_export_that_misses_a_signal_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Stubborn:
        def __init__(self, command: list[str]) -> None:
            assert "export" in command

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                raise KeyboardInterrupt
            if len(told) < 3:
                raise subprocess.TimeoutExpired("export", timeout)
            return 130

        def poll(self) -> int | None:
            return None if len(told) < 3 else 130

        def terminate(self) -> None:
            told.append("end")

    monkeypatch.setattr(subprocess, "Popen", Stubborn)
    with pytest.raises(KeyboardInterrupt):
        export_programs("model", {}, ShapeProfile.parse("256x256"))
    assert told == ["end"] * 3


def test_two_builds_at_once_share_the_work(tmp_path: Path) -> None:
    """Same output: one waits, then finds it up to date. ``demo_bundle`` has put the export into the cache."""
    target = tmp_path / "bundle"
    command = [*BUILD, *FIXTURE, "--output", str(target)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("up to date" in text for text in printed) == [False, True]
    Bundle.open(target)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--profile", "500x512"], "nearest: 448 or 512"),
        (["--profile", "huge"], "not WIDTHxHEIGHT"),
        (["--batch", "0"], "from 1 to 63"),
        (["--model", "./absent"], "does not exist"),
        (["--model", "nobody/nothing"], "local cache say"),
        (["--controlnet", "canny"], "NAME=SOURCE"),
        (["--controlnet", "a=x", "--controlnet", "a=y"], "twice"),
        (["--controlnet", "a b=x/y"], "letters, digits"),
        (["--precision", "fp4"], "invalid choice"),
        (["--lora", "details.safetensors:much"], "is not SOURCE[:WEIGHT]"),
        (["--lora", "./absent.safetensors"], "does not exist"),
        (["--backend", "tensor"], "invalid choice"),
        (["--backend", "onnxruntime", "--refittable"], "--refittable: onnxruntime builds no engines"),
        (["--backend", "openvino", "--workspace", "0"], "MiB from 1 on"),
        (["--optimization-level", "6"], "from 0 to 5"),
        (["--aux-streams", "-1"], "from 0 to 16"),
        (["--compute-capability", "sm_89"], "as in 8.9"),
        (["--output", "{file}"], "is a file"),
        (["--output", "{file}/bundle"], "is a file"),
        (["--output", "{full}"], "holds other files"),
        (["--output", "/proc/bundle"], "cannot write"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    words = [word.format(file=tmp_path / "file", full=tmp_path / "full") for word in arguments]
    output = [] if "--output" in words else ["--output", str(tmp_path / "bundle")]
    failed = build_engines(*words, *output)
    assert failed.returncode == 2
    assert says in failed.stderr
    assert "Traceback" not in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


@pytest.mark.usefixtures("demo_bundle")
def test_verifying_records_what_every_pass_costs(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    built = build_engines(*FIXTURE, "--verify", "--output", str(target))
    assert built.returncode == 0, built.stderr
    checks = Bundle.open(target).manifest.checks
    for part in ("unet", "controlnet.canny", "controlnet.mask"):
        passes = [check.compiler_pass for check in checks if check.program == part]
        assert passes[0] == "RowAgnosticReshapes"
        assert passes[-3:] == ["GuidanceSharing", "BlockedGroupNorm", "binding times"]
    assert all(check.max_relative_error <= 1e-5 for check in checks)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


class Wrong(ir.passes.InPlacePass):
    """Turns additions into subtractions."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            if node.op_type == "Add":
                node.op_type = "Sub"
        return ir.passes.PassResult(model, True)


@pytest.mark.usefixtures("demo_bundle")
def test_a_pass_that_changes_the_result_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built; what the pass did lies beside the place."""
    monkeypatch.setattr(BACKENDS["onnxruntime"], "passes", (Wrong(),))
    options = BuildOptions(
        model=str(MODEL_DIR),
        controlnets={name: str(path) for name, path in CONTROLNETS.items()},
        profile=ShapeProfile.parse("512x512", "1-4"),
        output=tmp_path / "bundle",
        verify=True,
    )
    with pytest.raises(VerificationError, match="pass Wrong changes text_encoder"):
        build(options, "pytest")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle-verify"]
    assert {path.name for path in (tmp_path / "bundle-verify").glob("*.onnx")} == {"before.onnx", "after.onnx"}


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["build-engines", "--help"])
    with pytest.raises(SystemExit) as stop:
        commands.build_engines()
    assert stop.value.code == 0
    assert "--profile" in capsys.readouterr().out


def test_the_manifest_tells_where_it_came_from(demo_bundle: Path) -> None:
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    assert set(manifest["provenance"]["sources"]) == {"model", "controlnet.canny", "controlnet.mask"}
    assert manifest["provenance"]["versions"].keys() >= {"torch", "diffusers", "onnxruntime", "controlrt"}
    listed = {str(path.relative_to(demo_bundle)) for path in demo_bundle.rglob("*") if path.is_file()}
    assert listed == {*manifest["files"], "manifest.json"}


@pytest.mark.bundle
def test_a_loss_is_measured_unless_it_is_not_wanted(demo_bundle: Path, tmp_path: Path) -> None:
    profile = Bundle.open(demo_bundle, verify=False).manifest.profile
    options = BuildOptions(
        model=str(MODEL_DIR),
        controlnets={},
        profile=profile,
        output=tmp_path / "bundle",
        backend="onnxruntime",
        precision="fp16",
        measure=False,
    )
    unmeasured = build(options, "pytest")
    assert {program.loss for program in unmeasured.bundle.manifest.programs} == {None}
    measured = build(dataclasses.replace(options, measure=True), "pytest")
    assert not measured.cached
    assert None not in {program.loss for program in measured.bundle.manifest.programs}
