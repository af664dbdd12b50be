from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from controlrt.runtime.control import Guidance, resolve_controls
from controlrt.runtime.control_use import ControlUse
from controlrt.runtime.errors import ParameterError, PictureError, UnknownNameError
from controlrt.runtime.manifest import Control

KNOWN = (
    *(
        Control(name=name, kind="controlnet", part=f"controlnet.{name}", source=name, layers=13)
        for name in ("canny", "mask")
    ),
    Control(name="pool", kind="controlnet", part="controlnet.pool", source="pool", layers=13, global_pool=True),
    Control(name="sketch", kind="adapter", part="adapter.sketch", source="sketch", layers=4, channels=1),
)
HINT = np.zeros((64, 64, 3), np.uint8)
SOFT = 0.825 ** (12.0 - np.arange(13))
SETTINGS = [field.name for field in dataclasses.fields(Guidance)]


def resolve(image: Any, known: tuple[Control, ...] = KNOWN, **changes: Any) -> list[ControlUse]:
    guidance = Guidance(**{name: changes.pop(name) for name in SETTINGS if name in changes})
    sizes = {"steps": 5, "width": 64, "height": 64, "prompts": 1, "images_per_prompt": 1, "resize": None}
    return resolve_controls(known, image, guidance, **{**sizes, **changes})


def test_none_and_both() -> None:
    assert resolve(None) == []
    assert resolve({}) == []
    both = resolve({"mask": HINT, "canny": HINT}, scale=[0.5, 2], start={"canny": 0.1, "mask": 0.2})
    found = [(use.control.name, use.scale.max(), use.scale.min(), use.hints[0].start) for use in both]
    assert found == [("canny", 2.0, 2.0, 0.1), ("mask", 0.5, 0.5, 0.2)]


@pytest.mark.parametrize("image", [None, {}])
@pytest.mark.parametrize(
    ("said", "says"),
    [
        *(({"mode": mode}, "control_mode is") for mode in ("prompt", 2, ["balanced"], {"mask": "balanced"})),
        *(
            ({name: value}, f"control.* is .*{says}")
            for name in ("scale", "start", "end")
            for value, says in (
                ([1.0, 0.5], "left out"),
                ({"mask": 0.5}, "left out"),
                (np.ones((5, 1, 1)), "an array or a function.* left out"),
                (float("nan"), "a finite number"),
                ("1", "a finite number"),
                (True, "a finite number"),
            )
        ),
        ({"scale": lambda done: done}, "left out where no control picture"),
        ({"start": 5}, "control_guidance_start is 5, but must be a fraction of the steps"),
        ({"end": 1.5}, "control_guidance_end is 1.5, but must be a fraction of the steps"),
        ({"start": 0.5, "end": 0.5}, "less than control_guidance_end"),
        ({"guess_mode": True}, r"guess_mode is True, but must be left out where no control picture \(image\) is given"),
        ({"weights": "soft"}, "control_layer_weights is 'soft', but must be left out"),
        ({"weights": np.ones(99)}, "control_layer_weights is .* left out"),
        ({"weights": {"mask": [1.0] * 12}}, "control_layer_weights is .* left out"),
        ({"region": HINT}, "control_region is 'a picture', but must be left out"),
        ({"region": {"mask": HINT}}, "control_region is 'a picture', but must be left out"),
    ],
)
def test_what_is_said_of_no_control(image: Any, said: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says) as caught:
        resolve(image, **said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        *({"mode": mode} for mode in ("Balanced", 0, {})),
        {"scale": 1.0, "start": 0, "end": 1, "guess_mode": False, "weights": None, "region": None},
        {"scale": 0, "start": 0.2, "end": np.float32(0.5), "guess_mode": None},
        {name: {} for name in ("scale", "start", "end", "mode", "weights", "region")},
    ],
)
def test_what_may_be_said_of_no_control(said: dict[str, Any]) -> None:
    assert resolve(None, **said) == resolve({}, **said) == []


def test_hints_repeat_as_diffusers_repeats_them() -> None:
    white = np.full_like(HINT, 255)
    (use,) = resolve({"mask": [HINT, white]}, prompts=2, images_per_prompt=2)
    assert use.hints[0].picture[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
    (use,) = resolve({"mask": white}, prompts=2, images_per_prompt=3)
    assert use.hints[0].picture.shape == (6, 3, 64, 64)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.3, 1.0), (0.25, 0.75), (0.99, 1.0)])
@pytest.mark.parametrize("steps", [1, 4, 7, 20])
def test_window_is_diffusers_rule(start: float, end: float, steps: int) -> None:
    """pipeline_controlnet.py: keeps = 1.0 - float(i / len(timesteps) < s or (i + 1) / len(timesteps) > e)."""
    (use,) = resolve({"mask": HINT}, start=start, end=end, steps=steps)
    keeps = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
    assert [float(use.active(i)) for i in range(steps)] == keeps


def test_scale_zero_runs_nothing() -> None:
    (use,) = resolve({"mask": HINT}, scale=0.0)
    assert not any(use.active(step) for step in range(5))


LOG = np.logspace(-1, 0, 13)
ONES = np.ones(13)


@pytest.mark.parametrize(
    ("name", "changes", "weights", "conditional"),
    [
        ("mask", {}, ONES, False),
        ("mask", {"guess_mode": True}, LOG, True),
        ("mask", {"guess_mode": "diffusers"}, LOG, True),
        ("mask", {"guess_mode": "original"}, SOFT, True),
        ("mask", {"mode": "prompt"}, SOFT, False),
        ("mask", {"mode": "1"}, SOFT, False),
        ("mask", {"mode": 2}, SOFT, True),
        ("mask", {"mode": {"mask": "ControlNet is more important"}}, SOFT, True),
        ("mask", {"weights": "soft"}, SOFT, False),
        ("mask", {"weights": {"mask": list(LOG)}, "mode": ["balanced"]}, LOG, False),
        ("pool", {}, ONES, True),
        ("pool", {"guess_mode": True}, ONES, True),
        ("sketch", {}, np.ones(4), False),
        ("sketch", {"mode": "prompt"}, np.array([0.25, 0.62, 0.825, 1]), False),
        ("sketch", {"weights": [1, 2, 3, 4]}, np.array([1, 2, 3, 4]), False),
    ],
)
def test_weights_of_the_layers(name: str, changes: dict[str, Any], weights: Any, conditional: bool) -> None:
    (use,) = resolve({name: HINT}, scale=2.0, prompts=2, **changes)
    np.testing.assert_allclose(use.scale, np.broadcast_to(2 * weights, (5, 2, len(weights))))
    assert use.conditional == conditional
    table = use.conditioning_scale(guided=True)
    assert table.shape == (5, 4, len(weights))
    assert table[:, :2].any() != conditional
    np.testing.assert_allclose(table[:, 2:], use.scale, rtol=1e-6)
    np.testing.assert_allclose(use.conditioning_scale(guided=False), use.scale, rtol=1e-6)


def test_guess_mode_beside_an_adapter() -> None:
    """It is the ControlNet's; the adapter acts on both halves, as ever."""
    mask, sketch = resolve({"mask": HINT, "sketch": HINT}, guess_mode=True)
    assert (mask.conditional, sketch.conditional) == (True, False)
    np.testing.assert_array_equal(sketch.scale, np.ones((5, 1, 4)))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ({"mask": [0, 1, 2, 0, 0]}, np.array([0, 1, 2, 0, 0])[:, None, None]),
        ({"mask": (0, 1, 2, 0, 0)}, np.array([0, 1, 2, 0, 0])[:, None, None]),
        (lambda done: done * done, (np.arange(5)[:, None, None] / 5) ** 2),
        (np.full((5, 1, 1), 3.0), np.full((5, 1, 1), 3.0)),
        (np.arange(26.0).reshape(1, 2, 13), np.arange(26.0).reshape(1, 2, 13)),
        (np.float32(0.5), np.full((1, 1, 1), 0.5)),
    ],
)
def test_scales_over_steps_pictures_and_layers(scale: Any, expected: Any) -> None:
    (use,) = resolve({"mask": HINT}, scale=scale, prompts=2)
    np.testing.assert_allclose(use.scale, np.broadcast_to(expected, (5, 2, 13)))
    assert [use.active(step) for step in range(5)] == use.scale.any(axis=(1, 2)).tolist()


@pytest.mark.parametrize(
    ("image", "changes", "error", "says"),
    [
        ({"cany": HINT}, {}, UnknownNameError, "did you mean 'canny'"),
        (HINT, {}, PictureError, "canny, mask, pool, sketch"),
        ({"mask": None}, {}, PictureError, "NoneType"),
        ({"mask": [HINT] * 3}, {"prompts": 2}, PictureError, "3 pictures for 2 prompts; give 1 or 2"),
        ({"mask": [HINT] * 3}, {}, PictureError, "3 pictures for 1 prompt; give 1$"),
        ({"mask": "a.png"}, {}, PictureError, r"'mask' is the text 'a.png'.* open the file: PIL.Image.open\('a.png'\)"),
        ({"mask": ["a.png"]}, {}, PictureError, "the text 'a.png', not a picture"),
        ({"mask": HINT}, {"region": "a.png"}, PictureError, "control_region of mask is the text 'a.png'"),
        ({3: HINT}, {}, ParameterError, "image is 'a mapping with the key 3', but must be a mapping by names .*canny"),
        ({"mask": HINT}, {"scale": {3: 1.0}}, UnknownNameError, "unknown control in controlnet_conditioning_scale '3'"),
        ({"mask": HINT}, {"scale": float("nan")}, ParameterError, "finite"),
        ({"mask": HINT}, {"scale": float("inf")}, ParameterError, "finite"),
        ({"mask": HINT}, {"scale": "1"}, ParameterError, "finite"),
        ({"mask": HINT}, {"scale": [1.0, 2.0]}, ParameterError, "one value or 1"),
        ({"mask": HINT}, {"scale": {"mask": [1.0, 2.0]}}, ParameterError, "a number or 5 of them"),
        ({"mask": HINT}, {"scale": {"mask": ["a"] * 5}}, ParameterError, "finite number"),
        ({"mask": HINT}, {"scale": np.ones((5, 3, 1))}, ParameterError, r"\(5, 1, 13\)"),
        ({"mask": HINT}, {"scale": np.ones((5, 1))}, ParameterError, r"shape \(5, 1\)', but .* \(5, 1, 13\)"),
        ({"mask": HINT}, {"scale": {"mask": np.ones(5)}}, ParameterError, r"shape \(5,\)', but .* \(5, 1, 13\)"),
        (
            {"mask": HINT, "canny": HINT},
            {"scale": np.array([1, 0.5]), "steps": 2},
            ParameterError,
            r"a number, a list, or an array of \(steps, pictures, layers\) = \(2, 1, 13\)",
        ),
        ({"mask": HINT}, {"scale": lambda done: done + np.nan}, ParameterError, "finite"),
        ({"mask": HINT}, {"scale": True}, ParameterError, "finite"),
        ({"mask": HINT}, {"weights": [1.0] * 12}, ParameterError, "13 finite numbers"),
        ({"mask": HINT}, {"weights": "hard"}, ParameterError, "'soft'"),
        ({"mask": HINT}, {"weights": {"canny": "soft"}}, UnknownNameError, "control in control_layer_weights"),
        ({"mask": HINT}, {"mode": "promt"}, UnknownNameError, "did you mean 'prompt'"),
        ({"mask": HINT}, {"mode": 3}, UnknownNameError, "3"),
        ({"mask": HINT}, {"mode": "prompt", "guess_mode": True}, ParameterError, "guess mode"),
        ({"mask": HINT}, {"guess_mode": "web"}, ParameterError, "'original'"),
        ({"mask": HINT}, {"region": np.zeros((32, 32), np.uint8)}, PictureError, "32x32, the output is 64x64"),
        ({"sketch": HINT}, {"mode": "controlnet"}, ParameterError, "balanced or prompt"),
        ({"sketch": HINT}, {"scale": lambda done: done}, ParameterError, "one number for adapter"),
        ({"sketch": HINT}, {"region": HINT}, ParameterError, "left out for adapters"),
        ({"sketch": HINT}, {"guess_mode": True}, ParameterError, "guess_mode is True, .* where adapters alone act"),
        ({"mask": HINT}, {"start": [0.1, 0.2]}, ParameterError, "one value or 1"),
        ({"mask": HINT}, {"end": [0.1, 0.2]}, ParameterError, "one value or 1"),
        ({"mask": HINT, "canny": HINT}, {"mode": ["prompt"]}, ParameterError, "one value or 2"),
        ({"mask": HINT}, {"scale": {"canny": 1.0}}, UnknownNameError, "canny"),
        ({"mask": HINT, "canny": HINT}, {"scale": {"canny": 1.0}}, ParameterError, "mask"),
        ({"mask": HINT}, {"start": -0.1}, ParameterError, "from 0 to 1"),
        ({"mask": HINT}, {"end": 1.5}, ParameterError, "from 0 to 1"),
        ({"mask": HINT}, {"start": 0.5, "end": 0.5}, ParameterError, "less than"),
    ],
)
def test_refusals(image: Any, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        resolve(image, **changes)
    assert "\n" not in str(caught.value)


UNION = Control(
    name="union",
    kind="controlnet",
    part="controlnet.union",
    source="union",
    layers=10,
    control_types={"pose": 0, "depth": 1, "canny": 2, "lineart": 2},
)
BOTH = {"union.canny": HINT, "union.depth": HINT}


def of_union(image: Any, **changes: Any) -> ControlUse:
    (use,) = (use for use in resolve(image, known=(*KNOWN, UNION), **changes) if use.control is UNION)
    return use


def test_a_type_of_a_union() -> None:
    """By itself it is a ControlNet like the others."""
    use = of_union({"mask": HINT, "union.lineart": HINT}, scale={"mask": 1.0, "union": [0, 0.5, 0.5, 0.5, 0.5]})
    assert use.control_types.tolist() == [0, 0, 1]
    assert use.scale[:, 0, 0].tolist() == [0, 0.5, 0.5, 0.5, 0.5]
    inputs = use.hint_inputs(0)
    assert inputs["hint_type"].tolist() == [[0, 0, 1]]
    assert inputs["hint_scale"].tolist() == [1]
    assert inputs["hint"].shape == (1, 3, 64, 64)
    assert use.mixtures == ((0,),)


def test_types_of_a_union_together() -> None:
    """Their scales are those of their features; residuals have the weights of the layers alone.

    Of the soft ones XL's ten residuals have the first of thirteen, as the web UI's extension multiplies them.
    """
    use = of_union(BOTH, scale={"union.canny": 0.5, "union.depth": 0.7}, mode="prompt", prompts=2)
    assert use.control_types.tolist() == [0, 1, 1]
    assert [use.hint_inputs(place)["hint_scale"].tolist() for place in (0, 1)] == [[0.5] * 2, [np.float32(0.7)] * 2]
    assert [use.hint_inputs(place)["hint_type"][1].tolist() for place in (0, 1)] == [[0, 0, 1], [0, 1, 0]]
    np.testing.assert_allclose(use.scale, np.broadcast_to(SOFT[:10], (5, 2, 10)))
    assert use.mixtures == ((0, 1),)


def test_windows_of_types() -> None:
    use = of_union(BOTH, start=[0.0, 0.4], end={"union.canny": 0.6, "union.depth": 0.8})
    assert [use.mixture(step) for step in range(5)] == [(0,), (0,), (0, 1), (1,), ()]
    assert [use.active(step) for step in range(5)] == [True, True, True, True, False]
    assert use.mixtures == ((0,), (0, 1), (1,))
    off = of_union(BOTH, scale=[1.0, 0.0])
    assert off.mixtures == ((0,),)
    assert off.control_types.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("image", "changes", "error", "says"),
    [
        ({"union": HINT}, {}, UnknownNameError, "union.lineart.*union is a ControlNet Union: say what the picture"),
        ({"union.dept": HINT}, {}, UnknownNameError, "did you mean 'union.depth'"),
        (HINT, {}, PictureError, "union.canny"),
        (
            BOTH,
            {"scale": {"union.canny": [1.0] * 4 + [0.5], "union.depth": 1.0}},
            ParameterError,
            "one number for each",
        ),
        (BOTH, {"mode": ["balanced", "prompt"]}, ParameterError, "control_mode .* 'union.canny' and 'union.depth'"),
        (BOTH, {"weights": {"union.depth": "soft"}}, ParameterError, "control_layer_weights .* share"),
        (BOTH, {"region": {"union.depth": HINT}}, ParameterError, "control_region .* share"),
        (BOTH, {"scale": {"union.canny": 1.0}}, ParameterError, "given for control 'union.depth' too"),
        (BOTH, {"scale": {"mask": 1.0}}, UnknownNameError, "mask"),
    ],
)
def test_refusals_of_a_union(image: Any, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        resolve(image, known=(*KNOWN, UNION), **changes)
    assert "\n" not in str(caught.value)
