"""A call of the page as code that draws the same picture."""

from __future__ import annotations

import shlex

from controlrt.runtime.server.ui.choices import Choices

CONTROL_FILE = "image.png"
"""What a browser calls the control picture that is downloaded from the page."""
PICTURE_FILE = "picture.png"
KEY_VARIABLE = "CONTROLRT_API_KEY"


def python_code(choices: Choices) -> str:
    """A script that draws the picture in a process of its own, from the bundle's directory."""
    arguments = [f"{name}={value!r}" for name, value in choices.arguments().items()]
    opened = ""
    if choices.control is not None:
        opened = f'control = Image.open("{CONTROL_FILE}")  # the control picture, downloaded from the page\n'
        arguments.insert(1, f"image={{{choices.control!r}: control}}")
    lines = "".join(f"        {argument},\n" for argument in arguments)
    return (
        f"{'from PIL import Image' + chr(10) * 2 if opened else ''}"
        "from controlrt.runtime import ControlNetPipeline\n\n"
        f"{opened}"
        f"with ControlNetPipeline.load({choices.bundle!r}) as pipeline:  # the bundle's directory\n"
        f"    output = pipeline(\n{lines}    )\n"
        f'output.images[0].save("{PICTURE_FILE}")\n'
    )


def curl_code(choices: Choices, server: str, *, asks_for_key: bool) -> str:
    """A command that asks this server for the picture.

    Args:
        choices: what it is drawn from.
        server: its address, such as ``http://127.0.0.1:8000``.
        asks_for_key: whether it has API keys.
    """
    words = [["curl", "--fail-with-body", f"{server.rstrip('/')}/v1/generate"]]
    words.append(["-H", "Accept: image/png", "-o", PICTURE_FILE])
    if asks_for_key:
        words.append(["-H", f"X-API-Key: ${KEY_VARIABLE}"])
    words.append(["--form-string", f"model={choices.bundle}"])
    words += [["--form-string", f"{name}={value}"] for name, value in choices.arguments().items()]
    if choices.control is not None:
        words.append(["-F", f"image.{choices.control}=@{CONTROL_FILE}"])
    return " \\\n    ".join(" ".join(_quoted(word) for word in line) for line in words) + "\n"


def _quoted(word: str) -> str:
    """As a shell reads it; the key's variable is left for the shell to fill in."""
    return f'"{word}"' if word.endswith(f"${KEY_VARIABLE}") and word.startswith("X-API-Key") else shlex.quote(word)
