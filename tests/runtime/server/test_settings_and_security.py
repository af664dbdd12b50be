"""Limits of requests, and files of API keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controlrt.runtime.errors import ParameterError, RequestError, UserError
from controlrt.runtime.server.settings import Settings

LIMITS = Settings(max_steps=50, max_pictures=4, max_prompt_characters=10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "a"},
        {"prompt": ["a", "b"], "num_images_per_prompt": 2},
        {"prompt": "a" * 10, "negative_prompt": None, "num_inference_steps": 50},
        {"prompt": "a", "timesteps": [1] * 50, "num_inference_steps": None},
        {},
    ],
)
def test_what_is_small_enough(arguments: dict[str, Any]) -> None:
    LIMITS.check(arguments)


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"prompt": "a", "num_inference_steps": 51}, "num_inference_steps"),
        ({"prompt": "a", "timesteps": [1] * 51}, "timesteps"),
        ({"prompt": "a", "sigmas": [1.0] * 51}, "sigmas"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 3}, "num_images_per_prompt"),
        ({"prompt": ["a", "b" * 11]}, "prompt"),
        ({"prompt": "a", "negative_prompt": "b" * 11}, "negative_prompt"),
    ],
)
def test_what_is_too_large(arguments: dict[str, Any], parameter: str) -> None:
    with pytest.raises(RequestError, match="this server draws at most") as caught:
        LIMITS.check(arguments)
    assert caught.value.parameter == parameter


def test_steps_that_nobody_names_count_too() -> None:
    with pytest.raises(RequestError, match="num_inference_steps is 50, but this server draws at most 20"):
        Settings(max_steps=20).check({"prompt": "a"})


@pytest.mark.parametrize("name", ["max_body_bytes", "max_pixels", "max_steps", "max_pictures", "timeout"])
def test_a_limit_is_more_than_nothing(name: str) -> None:
    with pytest.raises(ParameterError, match=f"{name} is 0, but must be more than 0"):
        Settings(**{name: 0})


def test_keys_are_never_shown() -> None:
    assert "secret" not in repr(Settings(api_keys=("secret",)))


def test_keys_are_lines_of_a_file(tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="without the extra [serve] there is no server")
    from controlrt.runtime.server.security import read_api_keys

    file = tmp_path / "keys"
    file.write_text("# of the shop\n one \n\ntwo\n")
    assert read_api_keys(file) == ("one", "two")
    file.write_text("# none\n\n")
    with pytest.raises(UserError, match="has no key; write one a line: openssl rand -hex 32 >"):
        read_api_keys(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_api_keys(tmp_path / "other")
