"""``controlrt annotate``: what it lists, draws and refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlrt.runtime.annotators import ANNOTATORS, annotate
from controlrt.runtime.commands import main
from controlrt.runtime.pictures import MASKED, to_hint
from sample_pictures import scene

needs_opencv = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="needs the extra [annotate]")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(scene(48, 64)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("words", [[], ["--list"]])
def test_the_list_has_every_annotator(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["annotate", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, annotator in zip(lines, ANNOTATORS.values(), strict=False):
        assert line.startswith(f"{annotator.name} ")
        assert annotator.summary in line
        assert all(name in line for name in annotator.names)


def test_parameters_are_described(capsys: pytest.CaptureFixture[str]) -> None:
    for annotator in ANNOTATORS.values():
        assert main(["annotate", annotator.names[-1], "--parameters"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"{annotator.name}: {annotator.summary}")
        for parameter in annotator.parameters:
            assert f"  {parameter.label}: {parameter.help}" in printed
            assert parameter.allowed in printed
        assert ("no parameters" in printed) == (not annotator.parameters)
    assert main(["annotate", "canny", "--parameters"]) == 0
    assert "a number from 0 to 2040; 100 where not given" in capsys.readouterr().out


def test_without_opencv_one_line_says_what_to_install(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = photo.with_name("edges.png")
    if importlib.util.find_spec("cv2") is None:
        assert main(["annotate", "canny", str(photo), "-o", str(output)]) == 2
        assert "pip install 'controlrt[annotate]'" in capsys.readouterr().err
        assert not output.exists()
    assert main(["annotate", "invert", str(photo), "-o", str(output)]) == 0
    np.testing.assert_array_equal(pixels(output), 255 - scene(48, 64))


@needs_opencv
@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], {}),
        (["--set", "threshold_a=50", "--set", "high_threshold=90"], {"low_threshold": 50, "high_threshold": 90}),
        (["--processor-res", "96"], {"processor_res": 96}),
        (["--width", "40", "--height", "40"], {"width": 40, "height": 40}),
        (
            ["--width", "40", "--height", "40", "--resize-mode", "Resize and Fill", "--pixel-perfect"],
            {"width": 40, "height": 40, "resize_mode": 2, "pixel_perfect": True},
        ),
    ],
)
def test_a_control_picture_is_what_the_function_makes(
    photo: Path, words: list[str], arguments: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = photo.with_name("edges.png")
    expected = np.asarray(annotate("canny", scene(48, 64), **arguments))
    assert expected.any()
    assert main(["annotate", "canny", *words, str(photo), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    np.testing.assert_array_equal(pixels(output), expected)
    assert main(["annotate", "-o", str(output), "Canny", str(photo), *words]) == 0
    np.testing.assert_array_equal(pixels(output), expected)


def test_inpainting_goes_to_an_array(photo: Path, tmp_path: Path) -> None:
    mask = np.zeros((48, 64), np.uint8)
    mask[10:20, 30:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    output = tmp_path / "hint.npy"
    assert main(["annotate", "inpaint", str(photo), "--mask", str(tmp_path / "mask.png"), "-o", str(output)]) == 0
    hint = np.load(output)
    np.testing.assert_array_equal(hint, annotate("inpaint", scene(48, 64), mask))
    assert (to_hint(hint, 64, 48, "inpaint")[:, 10:20, 30:40] == MASKED).all()


@needs_opencv
def test_stand_ins_say_so(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = photo.with_name("lines.png")
    assert main(["annotate", "mlsd", str(photo), "-o", str(output)]) == 0
    assert "warning: mlsd is a network in the web UI; this is the filter straight_lines" in capsys.readouterr().err
    np.testing.assert_array_equal(pixels(output), annotate("straight_lines", scene(48, 64)))


@needs_opencv
def test_a_network_of_ones_own(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx", reason="the graph is written with onnx")
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[1,3,H,W] x) => (float[1,3,H,W] y) { y = Neg (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "neg.onnx")
    network = ["--annotator", f"depth={tmp_path / 'neg.onnx'}"]
    output = tmp_path / "depth.png"
    sized = ["--set", "input_size=64x48", "--set", "mean=0", "--set", "std=1"]
    assert main(["annotate", "Depth", str(photo), *network, *sized, "-o", str(output)]) == 0
    source = scene(48, 64).astype(float)
    expected = 255 * (source.max() - source) / (source.max() - source.min())
    np.testing.assert_allclose(pixels(output), expected, atol=0.51)
    capsys.readouterr()
    assert main(["annotate", *network, "--list"]) == 0
    assert f"the network in {tmp_path / 'neg.onnx'}" in capsys.readouterr().out
    assert main(["annotate", "depth", *network, "--parameters"]) == 0
    assert "mean: taken from pixels in 0..1\n      one number, or three R,G,B" in capsys.readouterr().out
    assert main(["annotate", "--grid", str(photo), *network, "-o", str(output)]) == 0


@needs_opencv
def test_a_contact_sheet(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "grid.png"
    assert main(["annotate", "--grid", str(photo), "-o", str(output)]) == 0
    assert "left out for want of a --mask: inpaint" in capsys.readouterr().out
    without = pixels(output)
    Image.new("L", (64, 48), 255).save(tmp_path / "mask.png")
    assert main(["annotate", "--grid", str(photo), "--mask", str(tmp_path / "mask.png"), "-o", str(output)]) == 0
    assert "left out" not in capsys.readouterr().out
    sheet = pixels(output)
    assert (sheet == (200, 0, 200)).all(axis=2).sum() == 256 * 192  # the whole picture is masked
    assert sheet.shape[1] == without.shape[1] == 4 * 262 + 6
    assert sheet.shape[0] >= without.shape[0]
    # the first cell is the picture itself
    first = np.asarray(Image.fromarray(scene(48, 64)).resize((256, 192), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(sheet[26 : 26 + 192, 6 : 6 + 256], first)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cany", "photo", "-o", "out"], "did you mean 'canny'"),
        (["--parameters"], "name it: controlrt annotate canny --parameters"),
        (["canny"], "name a picture"),
        (["canny", "photo"], "say where to write"),
        (["canny", "absent.png", "-o", "out"], "does not exist"),
        (["canny", "photo", "-o", "."], "ending"),
        (["canny", "photo", "-o", "out.npy"], "ending"),
        (["inpaint", "photo", "-o", "out"], "ends in .npy"),
        (["inpaint", "photo", "-o", "out.npy"], "--mask FILE"),
        (["invert", "photo", "-o", "out", "--mask", "photo"], "takes no mask"),
        (
            ["canny", "photo", "-o", "out", "--set", "threshold_a=200", "--set", "threshold_b=100"],
            "at most threshold_b",
        ),
        (["canny", "photo", "-o", "out", "--set", "threshold_a"], "is not NAME=VALUE"),
        (["canny", "photo", "-o", "out", "--set", "low_treshold=3"], "did you mean 'low_threshold'"),
        (["canny", "photo", "-o", "out", "--processor-res", "x"], "whole number from 0 to 8192"),
        (["canny", "photo", "-o", "out", "--processor-res", "64", "--set", "resolution=64"], "not both"),
        (["canny", "photo", "-o", "out", "--pixel-perfect"], "give width and height"),
        (
            ["canny", "photo", "-o", "out", "--width", "9", "--height", "9", "--resize-mode", "squeeze"],
            "mode 'squeeze'",
        ),
        (["canny", "photo", "-o", "out", "--resize-mode", "pad"], "give them, or leave it out"),
        (["depth", "photo", "-o", "out", "--annotator", "depth=absent.onnx"], "not a file"),
        (["depth", "photo", "-o", "out", "--annotator", "depth"], "is not NAME=FILE.onnx"),
        (["depth", "photo", "-o", "out"], "--annotator NAME=FILE.onnx"),
        (["--grid", "photo"], "-o grid.png"),
        (["canny", "--grid", "photo", "-o", "out"], "leave 'canny' out"),
    ],
)
def test_mistakes(
    photo: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo.parent)
    words = [{"photo": "photo.png", "out": "out.png"}.get(word, word) for word in words]
    assert main(["annotate", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert [path.name for path in photo.parent.iterdir()] == ["photo.png"]
