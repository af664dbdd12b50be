"""docs/control.md says of every parameter of diffusers' pipelines what it is here; this holds it to the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import diffusers
import pytest

from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.canvas import run_strength
from controlrt.runtime.pipeline import DEFAULT_STEPS

DOCUMENT = Path(__file__).parents[2] / "docs" / "control.md"
PIPELINES = [
    name
    for name in dir(diffusers)
    if re.fullmatch(r"StableDiffusion(XL)?(ControlNet|Adapter)\w*Pipeline", name)
    and "ControlNetXS" not in name  # another architecture, which diffusers no longer keeps up
]
OURS = set(inspect.signature(ControlNetPipeline.__call__).parameters) - {"self"}


def section() -> str:
    return DOCUMENT.read_text().split("## Parameters of diffusers' pipelines")[1]


def table() -> dict[str, str]:
    rows = re.findall(r"^\| (`.+?`) \| (.+) \|$", section(), re.MULTILINE)
    return {name: here for names, here in rows for name in re.findall(r"`(\w+)`", names)}


def theirs(pipeline: str) -> set[str]:
    parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters.values()
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD} - {"self"}


def test_there_are_such_pipelines() -> None:
    assert {"StableDiffusionControlNetInpaintPipeline", "StableDiffusionXLControlNetUnionPipeline"} <= set(PIPELINES)
    assert len(PIPELINES) >= 15


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_parameter_is_in_the_table(pipeline: str) -> None:
    assert theirs(pipeline) - set(table()) == set()


def test_nothing_else_is_in_the_table() -> None:
    assert set(table()) - set().union(*map(theirs, PIPELINES)) == set()


@pytest.mark.parametrize(("name", "here"), list(table().items()))
def test_the_table_is_true(name: str, here: str) -> None:
    if here.startswith(("supported", "another meaning: ")):
        assert name in OURS
    elif here.startswith("named"):
        (ours,) = re.findall(r"`(\w+)`", here.partition(":")[0])
        assert ours in OURS
        assert name not in OURS
    else:
        assert here.startswith("refused: ")
        assert name not in OURS


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_defaults_that_differ_are_said(pipeline: str) -> None:
    said = dict(re.findall(r"^- `(\w+)`: (.+)$", section(), re.MULTILINE))
    ours = inspect.signature(ControlNetPipeline.__call__).parameters
    mask = "Inpaint" in pipeline
    if_none = {"num_inference_steps": DEFAULT_STEPS, "strength": run_strength(True, mask, None) or 1.0}
    for name, parameter in inspect.signature(getattr(diffusers, pipeline).__call__).parameters.items():
        if name == "prompt" or not table().get(name, "").startswith("supported"):
            continue
        here = if_none.get(name, ours[name].default)
        if parameter.default != here:
            number = rf"(?<![\d.]){re.escape(f'{parameter.default:g}')}(?!\.?\d)"
            assert re.search(number, said[name]), (name, parameter.default, here)
