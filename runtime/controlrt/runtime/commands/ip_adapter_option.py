"""What ``--ip-adapter`` says to a build, and ``--ip-adapter-image`` to a call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controlrt.runtime.errors import UnknownNameError, UserError

IP_ADAPTER_FORM = "[NAME=]SOURCE"
IP_ADAPTER_HELP = "an IP-Adapter, a file or a folder with one, and a name (the file's where not given); may be repeated"
IMAGE_FORM = "[NAME=]IMAGE[,scale=1]"
_ADD = "add one with: build-engines --ip-adapter FILE"
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", re.DOTALL)


def parse_ip_adapters(texts: Sequence[str]) -> dict[str, str]:
    """``face=models/ip-adapter-plus-face_sd15.safetensors`` as name and source; without a name the file's own.

    Raises:
        UserError: no source, or a name given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        match = _NAMED.fullmatch(text)
        own_name = re.sub(r"\.(safetensors|bin|ckpt|pt|pth)$", "", Path(text).name)
        name, source = match.groups() if match else (own_name, text)
        if not name:
            raise UserError(f"--ip-adapter {text!r} is not {IP_ADAPTER_FORM}")
        if name in found:
            raise UserError(f"--ip-adapter names {name!r} twice; give each its own name, as in {name}-2={source}")
        found[name] = source
    return found


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What ``--ip-adapter-image`` says, all of them together: paths and a scale by adapter name."""

    paths: dict[str, list[str]]
    scales: dict[str, float]


def parse_images(texts: Sequence[str], adapters: Sequence[str]) -> ImageOptions:
    """``woman.png,scale=0.6`` or ``face=woman.png``. The path may hold commas; several pictures of one adapter add up.

    Args:
        texts: what the options say.
        adapters: the bundle's IP-Adapters; a name is needed where there are several.

    Raises:
        UserError: no path, a scale that is no number, or two for one adapter; no name where one is needed.
        UnknownNameError: an adapter that the bundle does not have.
    """
    found = ImageOptions(paths={}, scales={})
    for text in texts:
        given, comma, option = text.rpartition(",scale=")
        rest = given if comma else text
        match = _NAMED.fullmatch(rest)
        name, path = match.groups() if match else ("", rest)
        if not path:
            raise UserError(f"--ip-adapter-image {text!r} is not {IMAGE_FORM}")
        if not name and len(adapters) > 1:
            raise UserError(f"--ip-adapter-image {text!r}: say whose it is, {' or '.join(adapters)}, as in NAME={path}")
        name = name or next(iter(adapters), "")
        if not adapters:
            raise UserError(f"--ip-adapter-image {text!r}: the bundle has no IP-Adapter; {_ADD}")
        if name not in adapters:
            raise UnknownNameError("IP-Adapter", name, adapters, _ADD)
        found.paths.setdefault(name, []).append(path)
        if comma and found.scales.setdefault(name, scale := _number(text, option)) != scale:
            raise UserError(
                f"--ip-adapter-image {text!r}: IP-Adapter {name!r} has a scale of {found.scales[name]:g} already"
            )
    return found


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"--ip-adapter-image {text!r}: scale is {value!r}, but must be a number") from None
