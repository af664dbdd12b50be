"""What a server lets a request ask for, whichever interface it comes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from controlrt.runtime.errors import ParameterError, RequestError
from controlrt.runtime.pipeline import DEFAULT_STEPS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The limits of a server; ``controlrt serve`` has a flag for each.

    Raises:
        ParameterError: a limit under which nothing could be drawn.
    """

    max_body_bytes: int = 32 * 2**20
    """Of a request's body."""
    max_pixels: int = 32 * 2**20
    """Of all pictures that a request brings, together."""
    max_steps: int = 150
    max_pictures: int = 8
    """Drawn for one request."""
    max_prompt_characters: int = 10_000
    """Of one prompt."""
    timeout: float = 600.0
    """Seconds that a request may take, and has where it does not say how many."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """One of which every request must show; none are asked for where empty."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "api_keys" and not value > 0:
                raise ParameterError(each.name, value, "more than 0")

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuses what is larger than this server draws; the rest of the checks are the service's.

        Args:
            arguments: those of ``ControlNetPipeline.prepare``.

        Raises:
            RequestError: too many steps or pictures, or too long a prompt.
        """
        custom = [name for name in ("timesteps", "sigmas") if isinstance(arguments.get(name), Sequence)]
        for name in custom:
            self._bound(name, f"{len(arguments[name])} of them", len(arguments[name]), self.max_steps)
        if not custom:
            steps = arguments.get("num_inference_steps")
            steps = DEFAULT_STEPS if steps is None else steps
            self._bound("num_inference_steps", str(steps), steps, self.max_steps)
        prompts = _listed(arguments.get("prompt"))
        each_prompt = arguments.get("num_images_per_prompt") or 1
        pictures = max(len(prompts), 1) * each_prompt
        where = "num_images_per_prompt" if each_prompt > 1 else "prompt"
        self._bound(where, f"for {pictures} pictures", pictures, self.max_pictures)
        for name in ("prompt", "negative_prompt"):
            for text in _listed(arguments.get(name)):
                self._bound(name, f"of {len(text)} characters", len(text), self.max_prompt_characters)

    @staticmethod
    def _bound(name: str, found: str, value: float, limit: int) -> None:
        if value > limit:
            raise RequestError(f"{name} is {found}, but this server draws at most {limit}", name)


def _listed(texts: str | Sequence[str] | None) -> Sequence[str]:
    return [] if texts is None else [texts] if isinstance(texts, str) else texts
