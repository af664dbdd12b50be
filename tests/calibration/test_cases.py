from __future__ import annotations

import itertools

import numpy as np
import pytest

from controlrt.calibration.cases import CollectOptions, plan_cases
from controlrt.calibration.data import ControlPicture, Example
from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError

SIZE = (64, 64)


def black(width: int, height: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def examples(count: int, *controls: str) -> list[Example]:
    pictures: dict[str, ControlPicture] = dict.fromkeys(controls, black)
    return [Example(name=str(number), prompt=f"prompt {number}", controls=pictures) for number in range(count)]


def test_every_pair_comes_before_any_comes_again() -> None:
    cases = plan_cases(CollectOptions(cases=9, size=SIZE, unseen=0), examples(9, "a", "b"), ["a", "b"])
    seen = [(case.controls, case.sampler, case.guidance_scale) for case in cases]
    for first, second in itertools.combinations(range(3), 2):
        assert len({(each[first], each[second]) for each in seen}) == 9


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_controls_are_on_one_by_one_and_together(names: list[str]) -> None:
    options = CollectOptions(cases=8, size=SIZE, samplers=("DDIM",), guidance_scales=(3.0, 1.0), unseen=0)
    cases = plan_cases(options, examples(8, *names), names)
    assert {case.controls for case in cases} == {(name,) for name in names} | {tuple(names)}


def test_a_model_without_controls() -> None:
    cases = plan_cases(CollectOptions(cases=3, size=SIZE, unseen=1), examples(4), [])
    assert {case.controls for case in cases} == {()}


def test_unseen_examples_are_in_no_other_case() -> None:
    cases = plan_cases(CollectOptions(cases=5, size=SIZE, unseen=2), examples(4, "a"), ["a"])
    assert [case.example.name for case in cases] == ["0", "1", "0", "1", "0", "2", "3"]
    assert [case.seed for case in cases] == [0, 1, 2, 3, 4, 5, 6]


def test_an_example_without_the_control_whose_turn_it_is_uses_its_own() -> None:
    mixed = [*examples(2, "a"), *examples(2, "b")]
    cases = plan_cases(CollectOptions(cases=4, size=SIZE, unseen=0), mixed, ["a", "b"])
    assert [case.controls for case in cases] == [("a",), ("a",), ("b",), ("b",)]


def test_too_few_examples() -> None:
    with pytest.raises(UserError, match="has 4 examples, and the last 4 are kept for comparison"):
        plan_cases(CollectOptions(size=SIZE), examples(4, "a"), ["a"])


def test_a_control_that_is_never_on() -> None:
    with pytest.raises(UserError, match="control b is never on in the 8 cases"):
        plan_cases(CollectOptions(cases=8, size=SIZE), examples(12, "a"), ["a", "b"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cases": 0}, "--cases is 0, but must be a whole number of at least 1"),
        ({"unseen": -1}, "--unseen is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"steps": 0}, "--steps is 0, but must be from 1 to 1000"),
        ({"samplers": ()}, "--samplers is"),
        ({"guidance_scales": (float("nan"),)}, "--guidance is"),
    ],
)
def test_options_out_of_range(wrong: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        CollectOptions(size=SIZE, **wrong)


def test_an_unknown_sampler() -> None:
    with pytest.raises(UnknownNameError, match="unknown sampler"):
        CollectOptions(size=SIZE, samplers=("Nobody's",))
