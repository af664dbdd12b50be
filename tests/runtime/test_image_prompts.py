"""What a call says of its IP-Adapters."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from controlrt.runtime.clip_picture import clip_picture
from controlrt.runtime.errors import ParameterError, PictureError, UnknownNameError, UserError
from controlrt.runtime.image_prompts import ImagePrompt, resolve_image_prompts
from controlrt.runtime.manifest import IPAdapter

STYLE, FACE = (
    IPAdapter(name=name, program=f"ip_adapter.{name}", source=name, side=32, tokens=4, layers=3)
    for name in ("style", "face")
)
RED, BLUE = Image.new("RGB", (40, 50), "red"), Image.new("RGB", (60, 50), "blue")


def resolve(adapters: tuple[IPAdapter, ...], image: Any, scale: Any = 1.0) -> list[ImagePrompt]:
    return resolve_image_prompts(adapters, image, scale, steps=4, batch=2)


@pytest.mark.parametrize(
    ("adapters", "image", "shown"),
    [
        ((STYLE,), None, [[]]),
        ((STYLE,), RED, [[RED]]),
        ((STYLE,), np.asarray(RED), [[RED]]),
        ((STYLE,), [RED, BLUE], [[RED, BLUE]]),
        ((STYLE,), [[RED, BLUE]], [[RED, BLUE]]),
        ((STYLE,), {"style": [BLUE]}, [[BLUE]]),
        ((STYLE, FACE), [RED, BLUE], [[RED], [BLUE]]),
        ((STYLE, FACE), [[RED, BLUE], [RED]], [[RED, BLUE], [RED]]),
        ((STYLE, FACE), {"face": BLUE}, [[], [BLUE]]),
        ((), None, []),
    ],
)
def test_who_sees_what(adapters: tuple[IPAdapter, ...], image: Any, shown: list[list[Image.Image]]) -> None:
    found = resolve(adapters, image)
    assert [prompt.adapter for prompt in found] == list(adapters)
    for prompt, pictures in zip(found, shown, strict=True):
        expected = [clip_picture(picture, 32, "it") for picture in pictures]
        assert prompt.pictures.shape == (len(pictures), 3, 32, 32)
        np.testing.assert_array_equal(prompt.pictures, np.array(expected).reshape(prompt.pictures.shape))
        assert prompt.digests == tuple(hashlib.sha256(each.tobytes()).digest() for each in expected)
        assert (prompt.scale == bool(pictures)).all()


@pytest.mark.parametrize("scale", [0.5, [1.0], {"face": 9.0}, "nonsense", np.ones(3)])
def test_a_scale_of_no_adapter(scale: Any) -> None:
    with pytest.raises(ParameterError, match=r"ip_adapter_scale .* left out: the bundle has no IP-Adapter"):
        resolve((), None, scale)
    assert resolve((), None, 1) == resolve((), None, {}) == []


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.6, [0.6, 0.6]),
        ([0.6, 0.2], [0.6, 0.2]),
        ({"face": 0.2}, [1.0, 0.2]),
        (lambda done: 1 - done, [[1.0, 0.75, 0.5, 0.25]] * 2),
        ({"style": [1, 2, 3, 4], "face": 0}, [[1, 2, 3, 4], 0.0]),
    ],
)
def test_scales(scale: Any, expected: list[Any]) -> None:
    found = resolve((STYLE, FACE), [RED, BLUE], scale)
    for prompt, wanted in zip(found, expected, strict=True):
        assert prompt.scale.shape == (4, 2, 3)
        np.testing.assert_array_equal(prompt.scale, np.broadcast_to(np.reshape(wanted, (-1, 1, 1)), (4, 2, 3)))
        guided = prompt.row_scale(guided=True)
        assert (guided.shape, guided.dtype) == ((4, 4, 3), np.float32)
        assert prompt.row_scale(guided=False).shape == (4, 2, 3)


def test_a_scale_of_each_cross_attention() -> None:
    layers = np.array([0.0, 0.5, 1.0])
    (prompt,) = resolve((STYLE,), RED, {"style": layers.reshape(1, 1, 3)})
    assert (prompt.scale == layers).all()


@pytest.mark.parametrize(
    ("adapters", "image", "scale", "kind", "says"),
    [
        ((), RED, 1.0, PictureError, "the bundle has no IP-Adapter; add one with: build-engines --ip-adapter FILE"),
        ((STYLE,), {"stile": RED}, 1.0, UnknownNameError, r"unknown IP-Adapter 'stile'.*did you mean 'style'"),
        ((STYLE,), [RED] * 9, 1.0, PictureError, "'style' is shown 9 pictures; at most 8 at once"),
        (
            (STYLE,),
            "red.png",
            1.0,
            PictureError,
            "the picture of IP-Adapter 'style' is the text 'red.png', not a picture",
        ),
        ((STYLE, FACE), RED, 1.0, ParameterError, "a mapping by name, or a list of 2, one for each of style, face"),
        ((STYLE, FACE), [RED] * 3, 1.0, ParameterError, "ip_adapter_image is '3 pictures', but must be a mapping"),
        ((STYLE,), RED, -0.1, ParameterError, "ip_adapter_scale is -0.1, but must be a number from 0 to 10"),
        ((STYLE,), None, 11, ParameterError, "ip_adapter_scale is 11.0, but must be a number from 0 to 10"),
        ((STYLE,), RED, float("nan"), ParameterError, "ip_adapter_scale is nan, but must be a finite number"),
        ((STYLE,), RED, [0.5, 0.5], ParameterError, "must be one value or 1, one for each IP-Adapter"),
        ((STYLE,), RED, {"up": 1.0}, UnknownNameError, "unknown IP-Adapter in ip_adapter_scale 'up'; known: style"),
        ((STYLE,), RED, "strong", ParameterError, "ip_adapter_scale is 'strong'"),
    ],
)
def test_what_cannot_be(
    adapters: tuple[IPAdapter, ...], image: Any, scale: Any, kind: type[UserError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        resolve(adapters, image, scale)
