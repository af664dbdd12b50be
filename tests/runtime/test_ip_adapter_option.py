from __future__ import annotations

import pytest

from controlrt.runtime.commands.ip_adapter_option import parse_images, parse_ip_adapters
from controlrt.runtime.errors import UnknownNameError, UserError


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["models/ip-adapter_sd15.safetensors"], {"ip-adapter_sd15": "models/ip-adapter_sd15.safetensors"}),
        (["style=a/b=c.bin", "face=owner/name/face.bin"], {"style": "a/b=c.bin", "face": "owner/name/face.bin"}),
        (["./adapter.bin"], {"adapter": "./adapter.bin"}),
        (["models/plus"], {"plus": "models/plus"}),
        (["models/a=b.bin"], {"a=b": "models/a=b.bin"}),
        (["models/face.pt.bin"], {"face.pt": "models/face.pt.bin"}),
    ],
)
def test_sources(texts: list[str], expected: dict[str, str]) -> None:
    assert parse_ip_adapters(texts) == expected
    assert parse_ip_adapters([f"{name}={source}" for name, source in expected.items() if "=" not in name]) == {
        name: source for name, source in expected.items() if "=" not in name
    }


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a/x.bin", "b/x.safetensors"], r"--ip-adapter names 'x' twice; .* as in x-2=b/x\.safetensors"),
        ([""], r"--ip-adapter '' is not \[NAME=\]SOURCE"),
    ],
)
def test_sources_that_cannot_be(texts: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_ip_adapters(texts)


@pytest.mark.parametrize(
    ("texts", "adapters", "paths", "scales"),
    [
        ([], [], {}, {}),
        (["a, b.png"], ["style"], {"style": ["a, b.png"]}, {}),
        (["a.png,scale=0.6", "b.png"], ["style"], {"style": ["a.png", "b.png"]}, {"style": 0.6}),
        (["style=a.png", "b.png,scale=1e-1"], ["style"], {"style": ["a.png", "b.png"]}, {"style": 0.1}),
        (
            ["face=a.png,scale=2", "style=b.png"],
            ["style", "face"],
            {"face": ["a.png"], "style": ["b.png"]},
            {"face": 2},
        ),
    ],
)
def test_images(texts: list[str], adapters: list[str], paths: dict[str, list[str]], scales: dict[str, float]) -> None:
    found = parse_images(texts, adapters)
    assert (found.paths, found.scales) == (paths, scales)


@pytest.mark.parametrize(
    ("texts", "adapters", "kind", "says"),
    [
        (["a.png"], [], UserError, "the bundle has no IP-Adapter; add one with: build-engines --ip-adapter FILE"),
        (["hand=a.png"], ["style"], UnknownNameError, "unknown IP-Adapter 'hand'; known: style"),
        (["a.png"], ["style", "face"], UserError, "say whose it is, style or face, as in NAME=a.png"),
        (["a.png,scale=much"], ["style"], UserError, "scale is 'much', but must be a number"),
        (["a.png,scale=1", "b.png,scale=2"], ["style"], UserError, "'style' has a scale of 1 already"),
        ([",scale=1"], ["style"], UserError, r"is not \[NAME=\]IMAGE\[,scale=1\]"),
    ],
)
def test_images_that_cannot_be(texts: list[str], adapters: list[str], kind: type[UserError], says: str) -> None:
    with pytest.raises(kind, match=says):
        parse_images(texts, adapters)
