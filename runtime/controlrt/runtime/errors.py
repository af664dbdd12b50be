"""Every error that controlrt raises on purpose.

    ControlRTError                      exit code 1
    ├── UserError                       exit code 2: something to type differently
    │   ├── UnknownNameError            a control, sampler, program or option nobody knows
    │   ├── ParameterError              a value outside its range
    │   ├── PromptError                 a prompt that cannot be read as the syntax asked for
    │   ├── ProfileError                a shape profile that cannot be built or is not in the bundle
    │   ├── PictureError                a picture that cannot be read or does not fit
    │   ├── SourceError                 a checkpoint that cannot be found or is not supported
    │   ├── OutputError                 a place that cannot be written
    │   └── RequestError                a request that a server's bundle cannot draw
    ├── BundleError                     a bundle that is damaged or of another version
    │   └── NoBundleError               and a UserError: a place where there is none
    ├── BuildError                      an export or engine build that failed
    ├── CalibrationError                a layer whose input is not finite
    ├── NotFiniteError                  a picture whose latents are not finite
    ├── DeviceError                     a GPU that is missing, or fails
    │   └── DeviceMemoryError           one whose memory does not hold what is asked of it
    └── ServiceError                    a server that does not draw what it could
        ├── UnavailableError            not now: the queue is full, or the server ends
        ├── DeadlineError               the request's time is over
        ├── CancelledError              somebody has cancelled it
        └── DrawingError                the engine failed at it, twice

A message says what failed, what was found against what is allowed, and what mends it.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Literal


class ControlRTError(Exception):
    """Root of the tree. ``exit_code`` is what the command line returns; ``reported`` errors were printed already."""

    exit_code = 1
    reported = False


class UserError(ControlRTError):
    """The caller asked for something that cannot be; the message says what to ask instead."""

    exit_code = 2
    parameter: str | None = None
    """The argument that is wrong, where it is known; the message alone says it to people."""


@contextlib.contextmanager
def about(parameter: str) -> Iterator[None]:
    """Of what is refused inside without saying of which argument, it is ``parameter``."""
    try:
        yield
    except UserError as error:
        error.parameter = error.parameter or parameter
        raise


class UnknownNameError(UserError):
    """A name that is not among the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "", show: Iterable[str] = ()) -> None:
        """``known`` is searched for the nearest name; ``show`` is what the message lists where that is too long."""
        self.kind, self.name, self.known = kind, name, tuple(known)
        folded = {one.lower(): one for one in self.known}
        nearest = [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=1)]
        listed = ", ".join(show or self.known) if self.known else "none"
        message = f"unknown {kind} {name!r}; known: {listed}"
        if nearest:
            message += f" (did you mean {nearest[0]!r}?)"
        super().__init__(f"{message}{'; ' + hint if hint else ''}")


class ParameterError(UserError):
    """A parameter outside its range."""

    def __init__(self, name: str, found: object, allowed: str) -> None:
        self.parameter, self.found, self.allowed = name, found, allowed
        shown = " ".join(repr(found).split())  # arrays are shown over several lines
        super().__init__(f"{name} is {shown}, but must be {allowed}")


class ProfileError(UserError):
    """A shape profile that is malformed or not in the bundle."""


class PromptError(UserError):
    """A prompt that the syntax asked for cannot mean."""


class PictureError(UserError):
    """A picture that cannot be read or does not fit the request."""


class SourceError(UserError):
    """A checkpoint that cannot be found or whose architecture is not supported."""


class OutputError(UserError):
    """An output path that cannot be written."""


class RequestError(UserError):
    """A request that a server's bundle cannot draw; the message is what the pipeline says of it."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        """``parameter`` is the argument that is wrong, where one is."""
        self.parameter = parameter
        super().__init__(message)


class BundleError(ControlRTError):
    """A bundle that is damaged or of another version."""


class NoBundleError(BundleError, UserError):
    """A place where there is no bundle."""


class BuildError(ControlRTError):
    """An export or an engine build that failed; the message names the program."""


class CalibrationError(ControlRTError):
    """A layer whose input is infinite or not a number; the message names it and the timestep."""


class NotFiniteError(ControlRTError):
    """Latents that are infinite or not a number, of which a decoder makes a black picture."""

    def __init__(self) -> None:
        super().__init__(
            "the latents are not finite: guidance, scales or prompt weights are too large, or the bundle's precision "
            "is too low for this model"
        )


class DeviceError(ControlRTError):
    """A GPU that is missing or unfit, or an operation of it that failed."""


class DeviceMemoryError(DeviceError):
    """More memory than there is."""

    def __init__(self, where: str, needed_bytes: int | None, free_bytes: int | None) -> None:
        """``where`` names the memory; bytes are None where nobody knows."""
        self.needed_bytes, self.free_bytes = needed_bytes, free_bytes
        known = [
            f"{size / 2**20:,.0f} MiB are {what}"
            for size, what in ((needed_bytes, "needed at once"), (free_bytes, "free"))
            if size is not None
        ]
        super().__init__(
            f"out of memory on {where}{': ' if known else ''}{', and '.join(known)}; draw smaller or fewer pictures "
            "per call, or end what else uses it"
        )


class ServiceError(ControlRTError):
    """A request that could be drawn, and is not."""


class UnavailableError(ServiceError):
    """A server that does not take the request now."""

    def __init__(
        self, message: str, reason: Literal["queue_full", "draining", "no_worker"], retry_after: float
    ) -> None:
        """``retry_after`` is the seconds after which it is worth asking again."""
        self.reason, self.retry_after = reason, retry_after
        super().__init__(message)


class DeadlineError(ServiceError):
    """A request that was not done in its time."""


class CancelledError(ServiceError):
    """A request that somebody has cancelled."""


class DrawingError(ServiceError):
    """A request at which the engine failed, also when it was tried again by itself."""
