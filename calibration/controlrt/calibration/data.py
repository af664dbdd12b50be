"""Calibration sets: prompts and control pictures as the model will see them in use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlrt.runtime.annotators import annotate, annotator_called
from controlrt.runtime.errors import PictureError, UnknownNameError, UserError
from controlrt.runtime.fitting import fit
from controlrt.runtime.pictures import WRITTEN, open_picture

DEMO = "demo"
"""The set of the demo model's own scenes."""
DEMO_CONTROLS = ("canny", "mask", "color")

ControlPicture = Callable[[int, int], NDArray[np.uint8]]
"""Makes a control picture of a width and a height: (height, width, 3)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One of a set."""

    name: str
    prompt: str
    negative_prompt: str | None = None
    controls: Mapping[str, ControlPicture] = field(default_factory=dict)
    """By control, those that it has."""
    scene: tuple[int, int] | None = None
    """Of the demo's scenes: what it is drawn at random by."""


def check_set(named: str) -> None:
    """Sees that there is a set, before anything is built for it.

    Raises:
        UserError: there is none of this name.
    """
    if named != DEMO and not Path(named).exists():
        raise UserError(f"there is no calibration set {named}; give a folder, a .jsonl file, or {DEMO}")


def read_examples(named: str, controls: Mapping[str, str | None], *, count: int, seed: int) -> list[Example]:
    """Examples of a set, in an order that the seed decides. No picture is read yet.

    Args:
        named: ``demo``, a folder, or a ``.jsonl`` file; docs/int8.md says what they hold.
        controls: the bundle's controls, and the annotator of each, where one is known.
        count: how many at most.
        seed: of the order, and of the scenes of ``demo``.

    Raises:
        UnknownNameError: a control that the bundle does not have.
        PictureError, UserError: no such set, or one that is empty or cannot be read.
    """
    check_set(named)
    if named == DEMO:
        return [_scene(controls, seed, number) for number in range(count)]
    path = Path(named)
    try:
        found = _read_folder(path, controls) if path.is_dir() else _read_lines(path, controls)
    except OSError as error:
        raise UserError(f"calibration set {named} cannot be read ({error}); see that it may be read") from None
    if not found:
        raise UserError(f"calibration set {named} is empty; give it pictures with captions, or prompts")
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[place] for place in order[:count]]


def _scene(controls: Mapping[str, str | None], seed: int, number: int) -> Example:
    from controlrt.demo.scenes import sample_scene

    drawn_by = (seed, number)
    scene = sample_scene(np.random.default_rng(drawn_by))

    def control(name: str, width: int, height: int) -> NDArray[np.uint8]:
        return _fitted(Image.fromarray(scene.control(name, max(width, height))), width, height)

    pictures = {name: partial(control, name) for name in DEMO_CONTROLS if name in controls}
    return Example(name=f"scene {number}", prompt=scene.prompt, controls=pictures, scene=drawn_by)


def _fitted(picture: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    """Scaled to cover the size and cropped at the middle."""
    return np.asarray(picture if picture.size == (width, height) else fit(picture, width, height, "crop"))


def _opened(file: Path, width: int, height: int) -> NDArray[np.uint8]:
    return _fitted(open_picture(file), width, height)


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """One example of a JSONL file."""

    prompt: str
    negative_prompt: str | None = None
    controls: dict[str, str] = {}
    """Paths of control pictures, relative to the file."""


def _read_lines(file: Path, controls: Mapping[str, str | None]) -> list[Example]:
    examples = []
    for number, text in enumerate(file.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        where = f"{file}, line {number}"
        try:
            line = msgspec.json.decode(text, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            form = '{"prompt": "...", "negative_prompt": "...", "controls": {"canny": "canny.png"}}'
            raise UserError(f"{where} cannot be read ({error}); write each line as {form}") from None
        if not line.prompt.strip():
            raise UserError(f"{where} has no prompt; write one, or take the line out")
        for name in line.controls:
            _check_control(name, controls, where)
        pictures = {name: partial(_opened, file.parent / path) for name, path in line.controls.items()}
        examples.append(
            Example(
                name=f"line {number}",
                prompt=line.prompt,
                negative_prompt=line.negative_prompt,
                controls=pictures,
            )
        )
    return examples


def _read_folder(folder: Path, controls: Mapping[str, str | None]) -> list[Example]:
    pictures = _pictures_in(folder)
    captions = {file.stem: file for file in folder.glob("*.txt")}
    for stem, file in pictures.items():
        if stem not in captions:
            raise UserError(f"{file} has no prompt; write it into {folder / stem}.txt")
    given: dict[str, dict[str, Path]] = {}
    for place in sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")):
        _check_control(place.name, controls, f"folder {place}")
        given[place.name] = _pictures_in(place)
    examples = []
    for stem, caption in sorted(captions.items()):
        made: dict[str, ControlPicture] = {}
        for name, annotator in controls.items():
            if name in given:
                if stem not in given[name]:
                    raise PictureError(f"{folder / name} has no control picture called {stem}; add it")
                made[name] = partial(_opened, given[name][stem])
            elif annotator is not None and not annotator_called(annotator).needs_mask and stem in pictures:
                made[name] = partial(_annotated, annotator, pictures[stem])
        examples.append(Example(name=stem, prompt=_caption(caption), controls=made))
    return examples


def _annotated(annotator: str, file: Path, width: int, height: int) -> NDArray[np.uint8]:
    try:
        made = annotate(annotator, _opened(file, width, height), width=width, height=height)
    except PictureError as error:
        raise PictureError(f"{file}: {error}") from None
    return np.asarray(made, np.uint8)


def _pictures_in(folder: Path) -> dict[str, Path]:
    """By name without ending."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in WRITTEN or file.name.startswith("."):
            continue
        if file.stem in found:
            raise PictureError(f"{folder} has two pictures called {file.stem}; take one of them out")
        found[file.stem] = file
    return found


def _caption(file: Path) -> str:
    try:
        prompt = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text in UTF-8; write the prompt anew") from None
    if not prompt:
        raise UserError(f"{file} has no prompt; write one into it")
    return prompt


def _check_control(name: str, controls: Mapping[str, str | None], where: str) -> None:
    """Raises UnknownNameError unless the bundle has it."""
    if name not in controls:
        raise UnknownNameError(f"control in {where}", name, controls, "add it with --controlnet NAME=SOURCE")
