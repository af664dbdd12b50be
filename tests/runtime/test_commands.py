"""The command line: exit codes, one clear line for every mistake, nothing half-written."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.commands import doctor, guarded, main, named_values
from controlrt.runtime.commands.control_option import parse_control
from controlrt.runtime.commands.generate import numbered, parse_size
from controlrt.runtime.cuda.gpu import Gpu
from controlrt.runtime.errors import UserError
from controlrt.runtime.samplers import ALIASES

COMMAND = [sys.executable, "-m", "controlrt.runtime.commands"]


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    picture = np.zeros((512, 512), np.uint8)
    picture[150:350, 150:350] = 255
    Image.fromarray(picture).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    for command in ("annotate", "build", "doctor", "export", "generate", "inspect", "samplers"):
        assert f"  {command} " in printed
    assert all(len(line.split()) > 1 for line in printed.splitlines() if line), "a command without a summary"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["genrate"]) == 2
    assert "did you mean 'generate'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["generate"], "the following arguments are required: "),
        (["generate", "bundle", "a star", "--guess-mode", "foo"], "argument --guess-mode: invalid choice: 'foo'"),
        (["generate", "bundle", "a star", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["samplers", "--colour"], "unrecognized arguments: --colour"),
        (["annotate", "--mask"], "argument --mask: expected one argument"),
    ],
)
def test_a_mistyped_command_line(capsys: pytest.CaptureFixture[str], command: list[str], says: str) -> None:
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")
    assert line.endswith(f"; controlrt {command[0]} --help shows the options")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "run bundles:   yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capabilities", "says"),
    [
        (["FP32", "FP16", "INT8", "BF16"], "fp32, fp16, bf16"),
        (["FP32", "INT8"], "fp32 (bf16 bundles too: this CPU has no bfloat16)"),
    ],
)
def test_doctor_names_what_openvino_computes_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], capabilities: list[str], says: str
) -> None:
    openvino = pytest.importorskip("openvino", reason="the extra openvino is not installed")
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: capabilities)
    assert main(["doctor"]) == 0
    assert f"  OpenVINO computes in: {says}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("openvino", "machine", "says"),
    [
        (
            "2026.4.1",
            "x86_64",
            ["  ok      openvino 2026.4.1", "backend:       openvino 2026.4.1: fastest on x86 CPUs"],
        ),
        (
            None,
            "x86_64",
            [
                "  absent  openvino",
                "backend:       onnxruntime 1.30.0; openvino absent: "
                "pip install 'controlrt[openvino]' makes steps about a tenth faster",
            ],
        ),
        (None, "aarch64", ["  absent  openvino", "backend:       onnxruntime 1.30.0: the only one installed"]),
    ],
)
def test_doctor_names_the_default_backend(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    openvino: str | None,
    machine: str,
    says: list[str],
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: {"openvino": openvino}.get(name, "1.30.0"))
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line in lines for line in says)


@pytest.mark.parametrize(
    ("capability", "installed", "says", "silent"),
    [
        ("9.0", (), ["CUDA:          pip install 'controlrt[cuda]', then", "'controlrt[tensorrt]'"], "tensorrt-rtx]'"),
        ("8.9", (), ["'controlrt[tensorrt-rtx]' (from PyPI)"], "nothing else"),
        ("9.0", ("cuda-bindings", "onnxruntime-gpu"), ["'controlrt[tensorrt]'"], "CUDA: "),
        ("9.0", ("cuda-bindings", "onnxruntime-gpu", "tensorrt"), [], "TensorRT: "),
    ],
)
def test_doctor_says_what_a_gpu_lacks(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: str,
    installed: tuple[str, ...],
    says: list[str],
    silent: str,
) -> None:
    """TensorRT-RTX is named where it runs alone."""
    monkeypatch.setattr(doctor, "find_gpu", lambda: Gpu(name="NVIDIA Some", compute_capability=capability))
    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    versions = dict.fromkeys((*doctor.RUNTIME, *installed), "1.30.0")
    monkeypatch.setattr(doctor, "_version", versions.get)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(each in printed for each in says)
    assert silent not in printed


def test_samplers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("name  ")
    assert [line[:18].strip() for line in lines] == list(ALIASES)
    (line,) = (line for line in lines if line.startswith("DPM++ 2M  "))
    assert "DPMSolverMultistepScheduler      [Karras | Exponential | Beta | Lu | SGM Uniform]" in line


def test_parsing() -> None:
    plain = {"scale": 1.0, "start": 0.0, "end": 1.0, "mode": "balanced", "weights": None, "region": None}
    assert parse_control("canny=a.png") == ("canny", "a.png", plain)
    assert parse_control("canny=a,b.png,scale=0.5,end=0.8")[1:] == ("a,b.png", {**plain, "scale": 0.5, "end": 0.8})
    _, _, options = parse_control("canny=a.png,mode=prompt,weights=0/0.5/1,region=left.png")
    assert options == {**plain, "mode": "prompt", "weights": [0.0, 0.5, 1.0], "region": "left.png"}
    assert parse_control("canny=a.png,weights=soft")[2]["weights"] == "soft"
    assert parse_size("768x512", "--size") == (768, 512)
    assert numbered(Path("a/out.png"), 2) == [Path("a/out-0.png"), Path("a/out-1.png")]
    for wrong in (
        "canny",
        "=a.png",
        "canny=",
        "canny=a.png,size=3",
        "canny=a.png,scale=x",
        "c=a,scale=1,scale=2",
        "c=a,weights=1/x",
        "c=a,mode=",
    ):
        with pytest.raises(UserError):
            parse_control(wrong)
    with pytest.raises(UserError, match="twice"):
        named_values(["a=1", "a=2"], "--control", "NAME=IMAGE")


@pytest.mark.bundle
def test_generate_and_inspect(
    demo_bundle: Path, tmp_path: Path, mask: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.png"
    drawn = ["generate", str(demo_bundle), "--prompt", "a red star", "--steps", "2", "--seed", "7", "-o", str(output)]
    drawn += ["--scheduler", "DPM++ SDE", "--noise", "gpu"]
    assert main([*drawn, "--control", f"mask={mask},scale=0.8", "--images", "2"]) == 0
    printed = capsys.readouterr().out
    for word in ("seed 7", "ms per step", "s drawn", "peak memory"):
        assert word in printed
    assert Image.open(tmp_path / "out-0.png").size == Image.open(tmp_path / "out-1.png").size == (512, 512)
    assert main(["inspect", str(demo_bundle), "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert "conditioning_scale float32 (rows, 9)" in printed
    assert "canny (9 residuals; pictures by: controlrt annotate canny)" in printed
    assert "mask (9 residuals; pictures of its own kind)" in printed


@pytest.mark.bundle
@pytest.mark.parametrize("first_size", [None, (448, 448)])
def test_options_reach_the_call(
    demo_bundle: Path, mask: Path, monkeypatch: pytest.MonkeyPatch, first_size: tuple[int, int] | None
) -> None:
    called: dict[str, Any] = {}
    learned = {}

    def call(_: ControlNetPipeline, prompt: str, image: Any, **options: Any) -> None:
        called.update(options, prompt=prompt, image=image)
        raise UserError("seen")

    monkeypatch.setattr(ControlNetPipeline, "__call__", call)
    monkeypatch.setattr("controlrt.runtime.commands.generate.hires_fix", call)
    monkeypatch.setattr(
        ControlNetPipeline, "load_textual_inversion", lambda _, file, token: learned.update({token: file})
    )
    options: dict[str, Any] = {
        "prompt": "a (red:1.2) <star>",
        "negative_prompt": "a moon",
        "prompt_syntax": "webui",
        "clip_skip": 1,
        "strength": 0.6,
        "guidance_scale": 5.0,
        "guidance_rescale": 0.7,
        "guidance_start": 0.1,
        "guidance_end": 0.9,
        "guess_mode": "original",
        "scheduler": "DDIM",
        "eta": 0.5,
        "seed": 7,
        "noise": "gpu",
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--size", "512x448", "--steps", "9", "--images", "2", "--resize", "Crop and Resize", "--vae-tiling"]
    start, region = mask.with_name("start.png"), mask.with_name("region.png")
    Image.new("L", (512, 448), 9).save(start)
    Image.new("L", (512, 448), 5).save(region)
    words += ["--init", str(start), "--mask", str(mask), "--embedding", "<star>=star.safetensors"]
    words += ["--control", f"mask={mask},scale=0.8,start=0.2,end=0.7,mode=prompt,weights=soft,region={region}"]
    words += ["--control", f"canny={mask},weights=1/0.5"]
    if first_size is not None:
        words += ["--first-size", "448x448"]
    assert main(["generate", str(demo_bundle), *words, "-o", str(mask.with_name("out.png"))]) == 2
    expected: dict[str, Any] = {
        **options,
        "width": 512,
        "height": 448,
        "num_inference_steps": 9,
        "num_images_per_prompt": 2,
        "resize": "crop",
        "vae_tiling": True,
        "controlnet_conditioning_scale": {"mask": 0.8, "canny": 1.0},
        "control_guidance_start": {"mask": 0.2, "canny": 0.0},
        "control_guidance_end": {"mask": 0.7, "canny": 1.0},
        "control_mode": {"mask": "prompt", "canny": "balanced"},
        "control_layer_weights": {"mask": "soft", "canny": [1.0, 0.5]},
    }
    assert {name: called[name] for name in expected} == expected
    assert called.get("first_size") == first_size
    assert learned == {"<star>": "star.safetensors"}
    assert list(called["image"]) == ["mask", "canny"]
    assert list(called["control_region"]) == ["mask"]
    grey = {0: [*called["image"].values(), called["mask_image"]], 9: [called["init_image"]]}
    grey[5] = list(called["control_region"].values())
    for level, pictures in grey.items():
        assert [np.asarray(picture).min() for picture in pictures] == [level] * len(pictures)


@pytest.mark.bundle
@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--control", "depth={mask}"], "known: canny, mask"),
        (["--control", "mask={mask},scale=nan"], "finite"),
        (["--control", "mask=absent.png"], "does not exist"),
        (["--control", "mask={mask}", "--control", "mask={mask}"], "twice"),
        (["--steps", "0"], "from 1 to 1000"),
        (["--size", "500x512"], "448 or 512"),
        (["--size", "big"], "not WIDTHxHEIGHT"),
        (["--scheduler", "magic"], "unknown sampler"),
        (["--scheduler", "dpm++ 2m karas"], "did you mean 'DPM++ 2M Karras'"),
        (["--scheduler", "LCM", "--steps", "60"], "at most original_inference_steps (50)"),
        (["--scheduler", "Euler", "--eta", "0.5"], "takes no eta"),
        (["--guidance-scale", "1e39"], "guidance_scale is 1e+39, but must be a finite number of float32"),
        (["--control", "mask={mask},scale=1e39"], "a finite number of float32"),
        (["--threads", "0"], "threads is 0, but must be from 1 to 1024"),
        (["--threads", "100000"], "from 1 to 1024"),
        (["--device", "0"], "runs on the CPU"),
        (["--ip-adapter-image", "{mask}"], "the bundle has no IP-Adapter"),
        (["-o", "absent-folder/out.png"], "mkdir -p"),
        (["-o", "out.nothing"], "ending"),
    ],
)
def test_mistakes(
    demo_bundle: Path, mask: Path, capsys: pytest.CaptureFixture[str], extra: list[str], says: str
) -> None:
    words = [word.format(mask=mask) for word in extra]
    output = [] if "-o" in words else ["-o", str(mask.with_name("out.png"))]
    assert main(["generate", str(demo_bundle), "--prompt", "a red star", "--steps", "1", *output, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert error.startswith("error: ")
    assert "\n" not in error
    assert [path.name for path in mask.parent.iterdir()] == ["mask.png"]


def test_a_bundle_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path, says in (
        (tmp_path, "it has no manifest.json; name a directory that build-engines has written"),
        (file, "it has no manifest.json; name a directory that build-engines has written"),
        (tmp_path / "absent", f"it does not exist; make one with: build-engines --output {tmp_path / 'absent'}"),
    ):
        assert main(["generate", str(path), "--prompt", "x", "-o", str(tmp_path / "out.png")]) == 2
        assert capsys.readouterr().err == f"error: {path} is not a bundle: {says}\n"


@pytest.mark.bundle
def test_what_is_not_finite_is_no_picture(demo_bundle: Path, mask: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = mask.with_name("out.png")
    words = ["--prompt", "a red star", "--steps", "2", "--guidance-scale", "3e38", "-o", str(output)]
    assert main(["generate", str(demo_bundle), *words]) == 1
    assert "error: the latents are not finite: guidance" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.bundle
def test_two_passes_from_the_command_line(
    demo_bundle: Path, mask: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bar for the steps of both: two, and of two at half strength one."""
    output = mask.with_name("out.png")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    words = ["--prompt", "a red star", "--control", f"mask={mask}", "--steps", "2", "--strength", "0.5"]
    sizes = ["--first-size", "512x512", "--size", "512x512"]
    assert main(["generate", str(demo_bundle), *words, *sizes, "-o", str(output)]) == 0
    assert Image.open(output).size == (512, 512)
    assert " 0/3 " in capsys.readouterr().err  # what comes after may be too soon to be shown


def test_nothing_large_is_imported_before_ctrl_c_is_heard() -> None:
    """What build-engines imports at its very start; the rest comes where an interrupt is one line."""
    code = "import sys; from controlrt.runtime.commands import build_engines; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "msgspec", "onnxruntime", "onnx_ir"} & set(loaded)


@pytest.mark.bundle
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_leaves_nothing(demo_bundle: Path, tmp_path: Path, sent: signal.Signals) -> None:
    output = tmp_path / "out.png"
    command = [*COMMAND, "generate", str(demo_bundle), "--prompt", "x", "--steps", "500", "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(4)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "interrupted; nothing half-written is left"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_after_one_that_python_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a finalizer raises goes nowhere, an interrupt too."""
    dropped: list[type[BaseException] | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def function() -> int:
        Finalized()
        assert dropped == [KeyboardInterrupt]
        signal.raise_signal(signal.SIGINT)
        return 0

    assert guarded(function, []) == 130


def test_signals_do_not_disturb_the_clearing_up(capsys: pytest.CaptureFixture[str]) -> None:
    cleared: list[str] = []

    @contextlib.contextmanager
    def cleared_up() -> Iterator[None]:
        try:
            yield
        finally:
            signal.raise_signal(signal.SIGTERM)
            try:
                raise ValueError("while clearing up")
            except ValueError:
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            cleared.append("all")

    def function() -> int:
        with cleared_up():
            signal.raise_signal(signal.SIGINT)
        return 0

    assert guarded(function, []) == 130
    assert cleared == ["all"]
    assert capsys.readouterr().err == "interrupted; nothing half-written is left\n"


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    process = subprocess.run(
        f"{sys.executable} -m controlrt.runtime.commands doctor | true",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert process.stderr == ""


def test_a_defect_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ZeroDivisionError("first\nsecond")

    assert guarded(fail, []) == 1
    assert capsys.readouterr().err == "error: unexpected ZeroDivisionError: first (-v shows where)\n"
    guarded(fail, ["-v"])
    assert "Traceback" in capsys.readouterr().err
