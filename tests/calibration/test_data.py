from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from controlrt.calibration.data import Example, read_examples
from controlrt.demo.scenes import sample_scene
from controlrt.runtime.annotators import annotate
from controlrt.runtime.errors import PictureError, UnknownNameError, UserError

CONTROLS = {"canny": "canny", "mask": None}
"""Controls and their annotators."""


def read(named: str | Path, count: int = 100, seed: int = 0) -> list[Example]:
    return read_examples(str(named), CONTROLS, count=count, seed=seed)


def picture(file: Path, width: int = 96, height: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with captions, and masks."""
    for seed, name in enumerate(("a", "b", "c")):
        picture(tmp_path / f"{name}.png", seed=seed)
        (tmp_path / f"{name}.txt").write_text(f"the prompt of {name}\n")
        picture(tmp_path / "mask" / f"{name}.png", seed=10 + seed)
    return tmp_path


def by_name(examples: list[Example]) -> dict[str, Example]:
    return {example.name: example for example in examples}


def test_a_folder(folder: Path) -> None:
    example = by_name(read(folder))["b"]
    assert example.prompt == "the prompt of b"
    assert set(example.controls) == {"canny", "mask"}
    given = np.asarray(Image.open(folder / "mask" / "b.png"))
    np.testing.assert_array_equal(example.controls["mask"](96, 64), given)
    edges = annotate("canny", Image.open(folder / "b.png"), width=96, height=64)
    np.testing.assert_array_equal(example.controls["canny"](96, 64), np.asarray(edges))


def test_a_control_of_which_nothing_is_known_is_left_out(folder: Path) -> None:
    for file in (folder / "mask").iterdir():
        file.unlink()
    (folder / "mask").rmdir()
    assert {name for example in read(folder) for name in example.controls} == {"canny"}


def test_captions_and_control_pictures_are_enough(folder: Path) -> None:
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").unlink()
    assert set(by_name(read(folder))["a"].controls) == {"mask"}


def test_pictures_of_another_size_are_scaled_and_cropped(folder: Path) -> None:
    assert read(folder)[0].controls["mask"](64, 128).shape == (128, 64, 3)


def test_the_seed_decides_the_order(folder: Path) -> None:
    assert [example.name for example in read(folder)] == [example.name for example in read(folder)]
    orders = {tuple(example.name for example in read(folder, seed=seed)) for seed in range(8)}
    assert len(orders) > 1
    assert [example.name for example in read(folder, 2)] == [example.name for example in read(folder)][:2]


def test_lines(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "edges" / "one.png")
    lines = [
        {"prompt": "one", "negative_prompt": "ugly", "controls": {"canny": "edges/one.png"}},
        {"prompt": "two"},
    ]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = by_name(read(file))
    assert sorted(found) == ["line 1", "line 2"]
    assert (found["line 1"].prompt, found["line 1"].negative_prompt) == ("one", "ugly")
    np.testing.assert_array_equal(found["line 1"].controls["canny"](96, 64), pixels)
    assert (found["line 2"].negative_prompt, found["line 2"].controls) == (None, {})


def test_scenes_of_the_demo() -> None:
    first, second = read("demo", count=2, seed=5)
    scene = sample_scene(np.random.default_rng([5, 1]))
    assert second.prompt == scene.prompt != first.prompt
    for name in ("canny", "mask"):
        np.testing.assert_array_equal(second.controls[name](128, 128), scene.control(name, 128))
    assert second.controls["mask"](128, 64).shape == (64, 128, 3)


def empty(folder: Path) -> None:
    for file in [*folder.glob("*.txt"), *folder.glob("*.png")]:
        file.unlink()


def no_caption(folder: Path) -> None:
    (folder / "b.txt").unlink()


def blank_caption(folder: Path) -> None:
    (folder / "b.txt").write_text(" \n")


def binary_caption(folder: Path) -> None:
    (folder / "b.txt").write_bytes(b"\xff\xfe\xff")


def unknown_control(folder: Path) -> None:
    picture(folder / "cany" / "a.png")


def missing_control(folder: Path) -> None:
    (folder / "mask" / "c.png").unlink()


def two_of_a_name(folder: Path) -> None:
    picture(folder / "a.jpg")


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (empty, UserError, "is empty; give it pictures with captions"),
        (no_caption, UserError, r"b\.png has no prompt; write it into .*b\.txt"),
        (blank_caption, UserError, r"b\.txt has no prompt; write one into it"),
        (binary_caption, UserError, r"b\.txt is not text in UTF-8"),
        (unknown_control, UnknownNameError, r"unknown control in folder .*did you mean 'canny'"),
        (missing_control, PictureError, "mask has no control picture called c; add it"),
        (two_of_a_name, PictureError, "has two pictures called a; take one of them out"),
    ],
)
def test_folders_that_cannot_be(
    folder: Path, spoil: Callable[[Path], None], kind: type[UserError], message: str
) -> None:
    spoil(folder)
    with pytest.raises(kind, match=message):
        read(folder)


@pytest.mark.parametrize("control", ["canny", "mask"])
def test_a_picture_that_cannot_be_read_is_named(folder: Path, control: str) -> None:
    file = folder / "a.png" if control == "canny" else folder / "mask" / "a.png"
    file.write_bytes(b"no picture")
    with pytest.raises(PictureError, match=rf"{file} is not a picture that can be read"):
        by_name(read(folder))["a"].controls[control](64, 64)


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ('{"prompt": "two"', UserError, r"set\.jsonl, line 2 cannot be read \(.*\); write each line as"),
        ("{}", UserError, "line 2 cannot be read .*prompt"),
        ('{"prompt": " "}', UserError, "line 2 has no prompt"),
        ('{"prompt": "two", "control": {}}', UserError, "line 2 cannot be read .*control"),
        ('{"prompt": "two", "controls": {"cany": "a.png"}}', UnknownNameError, "unknown control in .*line 2 'cany'"),
    ],
)
def test_lines_that_cannot_be(tmp_path: Path, line: str, kind: type[UserError], message: str) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text('{"prompt": "one"}\n' + line + "\n")
    with pytest.raises(kind, match=message):
        read(file)


def test_a_missing_picture_of_a_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text('{"prompt": "one", "controls": {"canny": "nothing.png"}}\n')
    with pytest.raises(PictureError, match=r"nothing\.png does not exist"):
        read(file)[0].controls["canny"](64, 64)


def test_an_empty_file_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"set\.jsonl is empty"):
        read(tmp_path / "set.jsonl")
    with pytest.raises(UserError, match=r"there is no calibration set .*nothing; give a folder"):
        read(tmp_path / "nothing")
