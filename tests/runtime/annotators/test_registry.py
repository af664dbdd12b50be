"""Names, parameters and their refusals; nothing here needs OpenCV."""

from __future__ import annotations

import builtins
import inspect
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from controlrt.runtime.annotators import ANNOTATORS, Parameter, annotate, annotator_called, annotator_named_in
from controlrt.runtime.annotators.onnx_file import PARAMETERS, _run
from controlrt.runtime.errors import ParameterError, PictureError, UnknownNameError, UserError

PICTURE = Image.new("RGB", (8, 6), (10, 120, 240))


def test_every_name_has_one_owner() -> None:
    names = [name.lower() for annotator in ANNOTATORS.values() for name in annotator.names]
    assert len(names) == len(set(names))
    assert list(ANNOTATORS) == [annotator.name for annotator in ANNOTATORS.values()]


@pytest.mark.parametrize("name", ANNOTATORS)
def test_parameters_are_the_functions_own(name: str) -> None:
    annotator = ANNOTATORS[name]
    keywords = [
        one.name for one in inspect.signature(annotator.function).parameters.values() if one.kind == one.KEYWORD_ONLY
    ]
    assert keywords == [parameter.keyword for parameter in annotator.parameters]
    assert annotator.summary[-1] != "."
    for parameter in annotator.parameters:
        assert parameter.check(parameter.default) == parameter.default
    for stand_in in annotator.stands_in_for.values():
        for keyword, value in stand_in.items():
            (parameter,) = (one for one in annotator.parameters if one.keyword == keyword)
            assert parameter.check(value) == value


def test_parameters_of_networks_are_their_functions_own() -> None:
    keywords = [one.name for one in inspect.signature(_run).parameters.values() if one.kind == one.KEYWORD_ONLY]
    assert keywords == [parameter.keyword for parameter in PARAMETERS]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("none", "none"),
        ("None", "none"),
        ("canny", "canny"),
        ("invert (from white bg & black line)", "invert"),
        ("lineart_standard (from white bg & black line)", "lineart_standard"),
        ("lineart_anime_denoise", "lineart_xdog"),
        ("mlsd", "straight_lines"),
        ("softedge_pidisafe", "softedge"),
        ("scribble_xdog", "scribble_xdog"),
        ("scribble_hed", "scribble"),
        ("tile_resample", "tile_resample"),
        ("blur_gaussian", "blur_gaussian"),
        ("t2ia_color_grid", "t2ia_color_grid"),
        ("color", "t2ia_color_grid"),
        ("shuffle", "shuffle"),
        ("inpaint_only", "inpaint"),
        ("normal_map", "normal_map"),
        ("threshold", "threshold"),
    ],
)
def test_the_extensions_modules_are_found(module: str, name: str) -> None:
    assert annotator_called(module).name == name


@pytest.mark.parametrize(
    ("texts", "annotator"),
    [
        (("canny",), "canny"),
        (("edges", "lllyasviel/control_v11p_sd15_canny"), "canny"),
        (("Canny-2", "x"), "canny"),
        (("c", "lllyasviel/control_v11f1e_sd15_tile"), "tile_resample"),
        (("c", "lllyasviel/control_v11p_sd15_mlsd"), "straight_lines"),
        (("c", "lllyasviel/control_v11p_sd15s2_lineart_anime"), "lineart_xdog"),
        (("c", "lllyasviel/control_v11p_sd15_softedge"), "softedge"),
        (("c", "TencentARC/t2iadapter_color_sd14v1"), "t2ia_color_grid"),
        (("c", "lllyasviel/control_v11f1p_sd15_depth"), None),
        (("uncanny", "models/mask"), None),
        (("none", "identity"), None),
    ],
)
def test_the_annotator_is_a_word_of_name_or_source(texts: tuple[str, ...], annotator: str | None) -> None:
    assert annotator_named_in(*texts) == annotator


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (("cany", {}), UnknownNameError, "did you mean 'canny'"),
        (("depth_anything", {}), UnknownNameError, "--annotator NAME=FILE.onnx"),
        (("canny", {"low_treshold": 3}), UnknownNameError, "did you mean 'low_threshold'"),
        (("invert", {"threshold_a": 3}), UnknownNameError, "of annotator 'invert' 'threshold_a'; known: none"),
        (("canny", {"threshold_a": -1}), ParameterError, r"threshold_a \(low_threshold\) is -1.* from 0 to 2040"),
        (("canny", {"low_threshold": float("nan")}), ParameterError, "low_threshold"),
        (("canny", {"low_threshold": "x"}), ParameterError, "a number from 0 to 2040"),
        (("canny", {"low_threshold": True}), ParameterError, "a number from 0 to 2040"),
        (("canny", {"threshold_a": 300, "threshold_b": 200}), ParameterError, "at most threshold_b"),
        (("canny", {"threshold_a": 1, "low_threshold": 2}), UserError, "same parameter"),
        (("canny", {"processor_res": 0.5}), ParameterError, "whole number from 0 to 8192"),
        (("shuffle", {"seed": 1.5}), ParameterError, "whole number"),
        (("softedge", {"filter": "prewitt"}), ParameterError, "sobel, scharr, morphological, dog"),
        (("canny", {"width": 64}), UserError, "both width and height"),
        (("canny", {"width": 64, "height": 0}), ParameterError, "from 1 to 8192"),
        (("canny", {"pixel_perfect": True}), UserError, "give width and height"),
        (("canny", {"pixel_perfect": True, "width": 9, "height": 9, "resolution": 64}), UserError, "not both"),
        (("none", {"width": 9, "height": 9, "resize_mode": "Crop"}), None, ""),
        (("none", {"width": 9, "height": 9, "resize_mode": "Crop and Size"}), UnknownNameError, "'Crop and Resize'"),
        (("inpaint", {}), PictureError, "--mask FILE"),
        (("canny", {"mask": PICTURE}), UserError, "takes no mask"),
        (("inpaint", {"mask": Image.new("L", (6, 8))}), PictureError, "mask is 6x8, the picture 8x6"),
    ],
)
def test_refusals(call: tuple[str, dict[str, Any]], error: type[Exception] | None, says: str) -> None:
    name, arguments = call
    if error is None:
        assert annotate(name, PICTURE, **arguments).size == (9, 9)
        return
    with pytest.raises(error, match=says) as raised:
        annotate(name, PICTURE, **arguments)
    assert "\n" not in str(raised.value)


def test_a_picture_that_is_none() -> None:
    for wrong in ("photo.png", np.zeros((4, 4, 2), np.uint8), np.full((4, 4), 2.0)):
        with pytest.raises(PictureError, match="invert"):
            annotate("invert", wrong)


def test_networks_that_a_filter_stands_in_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    annotator = ANNOTATORS["softedge"]
    assert annotator.values({}, "softedge_hedsafe")["safe_steps"] == 2
    assert annotator.values({"threshold_a": 5}, "softedge_hedsafe")["safe_steps"] == 5
    assert annotator.values({}, "softedge")["safe_steps"] == 0
    seen: dict[str, Any] = {}

    def record(pixels: np.ndarray, **values: Any) -> np.ndarray:
        seen.update(values)
        return pixels

    monkeypatch.setitem(annotator.__dict__, "function", record)
    with pytest.warns(UserWarning, match="softedge_pidisafe is a network.*filter softedge"):
        annotate("SoftEdge_PidiSafe", PICTURE)
    assert seen["safe_steps"] == 2


def test_without_opencv_its_absence_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """``controlrt`` turns it into the line that names the extra."""
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "cv2":
            raise ModuleNotFoundError("No module named 'cv2'", name="cv2")
        return real(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    mask = Image.new("L", PICTURE.size, 255)
    for name, annotator in ANNOTATORS.items():
        if name in ("none", "invert", "threshold", "tile_resample", "inpaint"):
            annotate(name, PICTURE, mask if annotator.needs_mask else None)
        else:
            with pytest.raises(ModuleNotFoundError) as raised:
                annotate(name, PICTURE)
            assert raised.value.name == "cv2"


NUMBER = Parameter(name="n", kind="number", default=1.0, minimum=-2, maximum=8, help="")


@given(st.one_of(st.floats(), st.integers(), st.text(), st.booleans(), st.floats(-2, 8).map(str)))
def test_a_number_is_in_range_or_refused(value: Any) -> None:
    if not isinstance(value, bool) and _readable(value):
        assert NUMBER.check(value) == float(value)
    else:
        with pytest.raises(ParameterError, match="n is"):
            NUMBER.check(value)


def _readable(value: float | str) -> bool:
    try:
        return -2 <= float(value) <= 8
    except (ValueError, OverflowError):
        return False


@pytest.mark.parametrize(
    ("kind", "value", "checked"),
    [
        ("integer", "7", 7),
        ("integer", 7.0, 7),
        ("integer", "7.5", None),
        ("numbers", "0.5", (0.5,)),
        ("numbers", "0.5,1,2", (0.5, 1.0, 2.0)),
        ("numbers", [0, 1, 2], (0.0, 1.0, 2.0)),
        ("numbers", "1,2", None),
        ("numbers", "1,x,2", None),
        ("numbers", True, None),
        ("size", "640x480", "640x480"),
        ("size", "", ""),
        ("size", "640", None),
        ("size", "0x5", None),
        ("size", "²x5", None),
        ("flag", "yes", True),
        ("flag", "OFF", False),
        ("flag", True, True),
        ("flag", "maybe", None),
        ("choice", "A", "a"),
        ("choice", "c", None),
        ("choice", 1, None),
        ("text", "any", "any"),
        ("text", 1.0, None),
    ],
)
def test_kinds_of_parameters(kind: Any, value: Any, checked: Any) -> None:
    parameter = Parameter(name="p", kind=kind, default="", choices=("a", "b"), help="")
    if checked is None:
        with pytest.raises(ParameterError, match="p is"):
            parameter.check(value)
    else:
        found = parameter.check(value)
        assert (found, type(found)) == (checked, type(checked))
