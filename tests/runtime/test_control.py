from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from controlrt.runtime.control import ControlUse, resolve_controls
from controlrt.runtime.errors import ParameterError, PictureError, UnknownNameError
from controlrt.runtime.manifest import Control

KNOWN = tuple(Control(name=name, part=f"controlnet.{name}", source=name, layers=13) for name in ("canny", "mask"))
HINT = np.zeros((64, 64, 3), np.uint8)


def resolve(image: Any, **changes: Any) -> list[ControlUse]:
    arguments: dict[str, Any] = {
        "scale": 1.0,
        "start": 0.0,
        "end": 1.0,
        "width": 64,
        "height": 64,
        "prompts": 1,
        "images_per_prompt": 1,
        "resize": None,
    }
    return resolve_controls(KNOWN, image, **{**arguments, **changes})


def test_none_and_both() -> None:
    assert resolve(None) == []
    assert resolve({}) == []
    both = resolve({"mask": HINT, "canny": HINT}, scale=[0.5, 2], start={"canny": 0.1, "mask": 0.2})
    assert [(use.control.name, use.scale, use.start) for use in both] == [("canny", 2.0, 0.1), ("mask", 0.5, 0.2)]


def test_hints_repeat_as_diffusers_repeats_them() -> None:
    white = np.full_like(HINT, 255)
    (use,) = resolve({"mask": [HINT, white]}, prompts=2, images_per_prompt=2)
    assert use.hint[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
    (use,) = resolve({"mask": white}, prompts=2, images_per_prompt=3)
    assert use.hint.shape == (6, 3, 64, 64)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.3, 1.0), (0.25, 0.75), (0.99, 1.0)])
@pytest.mark.parametrize("steps", [1, 4, 7, 20])
def test_window_is_diffusers_rule(start: float, end: float, steps: int) -> None:
    """pipeline_controlnet.py: keeps = 1.0 - float(i / len(timesteps) < s or (i + 1) / len(timesteps) > e)."""
    (use,) = resolve({"mask": HINT}, start=start, end=end)
    keeps = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
    assert [float(use.active(i, steps)) for i in range(steps)] == keeps


def test_scale_zero_runs_nothing() -> None:
    (use,) = resolve({"mask": HINT}, scale=0.0)
    assert not any(use.active(step, 5) for step in range(5))


def test_guess_mode_layers() -> None:
    (use,) = resolve({"mask": HINT}, scale=2.0)
    table = use.conditioning_scale(batch=2, guided=True, guess_mode=True)
    assert table.shape == (4, 13)
    assert not table[:2].any()
    np.testing.assert_allclose(table[2:], np.tile(2 * 10 ** np.linspace(-1, 0, 13), (2, 1)), rtol=1e-6)
    assert use.conditioning_scale(batch=2, guided=False, guess_mode=False).tolist() == [[2.0] * 13] * 2


@pytest.mark.parametrize(
    ("image", "changes", "error", "says"),
    [
        ({"cany": HINT}, {}, UnknownNameError, "did you mean 'canny'"),
        (HINT, {}, PictureError, "canny, mask"),
        ({"mask": None}, {}, PictureError, "NoneType"),
        ({"mask": [HINT] * 3}, {"prompts": 2}, PictureError, "give 1 or 2"),
        ({"mask": HINT}, {"scale": float("nan")}, ParameterError, "finite"),
        ({"mask": HINT}, {"scale": float("inf")}, ParameterError, "finite"),
        ({"mask": HINT}, {"scale": "1"}, ParameterError, "finite"),
        ({"mask": HINT}, {"scale": [1.0, 2.0]}, ParameterError, "one number or 1"),
        ({"mask": HINT}, {"scale": {"canny": 1.0}}, UnknownNameError, "canny"),
        ({"mask": HINT, "canny": HINT}, {"scale": {"canny": 1.0}}, ParameterError, "mask"),
        ({"mask": HINT}, {"start": -0.1}, ParameterError, "from 0 to 1"),
        ({"mask": HINT}, {"end": 1.5}, ParameterError, "from 0 to 1"),
        ({"mask": HINT}, {"start": 0.5, "end": 0.5}, ParameterError, "less than"),
    ],
)
def test_refusals(image: Any, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        resolve(image, **changes)
