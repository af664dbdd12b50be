"""``controlrt calibrate`` as a user meets it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import controlrt.calibration.command as command
from calibrations import OPTIONS, SOURCES, Calibrated
from controlrt.runtime.commands import guarded, run_command


def calibrate(*argv: str | Path) -> int:
    words = list(map(str, argv))
    return guarded(lambda: run_command(command, words, "controlrt calibrate"), words)


@pytest.mark.bundle
def test_the_demo_model(calibrated: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "demo.safetensors"
    sizes = ["--cases", str(OPTIONS.cases), "--steps", str(OPTIONS.steps), "--unseen", str(OPTIONS.unseen)]
    assert calibrate(*SOURCES, *sizes, "--output", output) == 0
    layers = sum(map(len, calibrated.statistics.layers.values()))
    told = f"{output}: {layers} layers of controlnet.canny, controlnet.mask, unet in 2 cases of 2 steps, 1 kept"
    shown = capsys.readouterr()
    assert told in shown.out
    assert "[3/3] calibrate: scene" in shown.err
    assert output.read_bytes() == calibrated.file.read_bytes()


@pytest.mark.bundle
def test_show_makes_a_page(calibrated: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = Path(shutil.copy(calibrated.file, tmp_path / "demo.safetensors"))
    for words, page in (([], tmp_path / "demo.html"), (["--output", tmp_path / "page.html"], tmp_path / "page.html")):
        assert calibrate("show", file, *words) == 0
        layers = sum(map(len, calibrated.statistics.layers.values()))
        assert capsys.readouterr().out.startswith(f"{page}: {layers} layers of ")
        assert "unet.mid_block.resnets.0.conv1" in page.read_text()
    assert calibrate("show", tmp_path / "none.safetensors") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there are no statistics at" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "somewhere"], "say what to calibrate on: --data FOLDER"),
        (["--size", "500x512"], "width 500 is not a multiple of 64"),
        (["--size", "256x256"], "256x256 is not in the bundle's profile 512x512"),
        (["--size", "large"], "--size 'large' is not WIDTHxHEIGHT"),
        (["--guidance", "7.5,much"], "--guidance is '7.5,much', but must be a number"),
        (["--samplers", "Nobody's"], 'unknown sampler "Nobody\'s"'),
        (["--cases", "0"], "--cases is 0, but must be"),
    ],
)
def test_mistakes_are_told_of_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert calibrate(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
