"""One GPU as the runtime sees it: memory, two streams, and graphs captured from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class DeviceArray:
    """An array in device memory, contiguous but for what may lie between the entries of its first axis."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pitch: int | None = None
    """Bytes from one entry of the first axis to the next, where that is more than an entry has."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        if self.pitch is not None:
            return self.shape[0] * self.pitch
        return math.prod(self.shape) * self.dtype.itemsize

    def entry(self, index: int) -> DeviceArray:
        """The entry ``index`` of its first axis, without that axis."""
        return DeviceArray(self.address + index * self._step, self.shape[1:], self.dtype)

    def rows(self, rows: range) -> DeviceArray:
        """Some entries of its first axis that lie one after another."""
        shape = (len(rows), *self.shape[1:])
        return DeviceArray(self.address + rows.start * self._step, shape, self.dtype, self.pitch)

    @property
    def _step(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize if self.pitch is None else self.pitch


DeviceArrays = Mapping[str, DeviceArray]


@dataclass(frozen=True, kw_only=True)
class DeviceAbout:
    """What a GPU is."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    driver_version: tuple[int, int]
    """The newest CUDA version that its driver knows."""


MAIN, SIDE = 0, 1
"""The streams of a device."""


class Device(Protocol):
    """A GPU and two streams on it. Addresses are integers; sizes are bytes; everything but ``synchronize`` returns at
    once. Copies and events go to the main stream; engines to either. While a capture is open, what would be queued on
    the main stream, and on the other once that waits for it, is recorded instead.
    """

    @property
    def about(self) -> DeviceAbout:
        """What it is."""

    @property
    def streams(self) -> tuple[int, int]:
        """Their handles, for engines."""

    def wait(self, waiting: int, other: int) -> None:
        """Has one stream, MAIN or SIDE, wait for what is queued on the other so far."""

    def activate(self) -> None:
        """Makes it the current device of the calling thread."""

    def allocate(self, size: int) -> int:
        """Device memory, aligned to 256 bytes.

        Raises:
            DeviceMemoryError: there is not enough.
        """

    def free(self, address: int) -> None:
        """Gives device memory back."""

    def allocate_host(self, size: int) -> int:
        """Host memory that the device can read while the host works on (pinned).

        Raises:
            DeviceMemoryError: there is not enough.
        """

    def free_host(self, address: int) -> None:
        """Gives pinned memory back."""

    def free_bytes(self) -> int:
        """Device memory that nobody has."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Queues a copy between any two of its memories."""

    def clear(self, address: int, size: int) -> None:
        """Queues zeros for device memory."""

    def create_event(self) -> int:
        """A point in time, of which ``record`` says when."""

    def record(self, event: int) -> None:
        """Queues the event: its time is when everything queued before is done."""

    def elapsed(self, start: int, end: int) -> float:
        """Seconds between two events that have passed."""

    def destroy_event(self, event: int) -> None:
        """Lets go of an event."""

    def begin_capture(self) -> None:
        """From here on, what is queued is recorded."""

    def end_capture(self) -> int:
        """What was recorded since ``begin_capture``, as a graph that can be launched.

        Raises:
            DeviceError: something in between cannot be part of a graph.
        """

    def abandon_capture(self) -> None:
        """Ends a capture after an error and drops what was recorded."""

    def launch(self, graph: int) -> None:
        """Queues a graph."""

    def destroy_graph(self, graph: int) -> None:
        """Lets go of a graph."""

    def synchronize(self) -> None:
        """Waits until everything queued on both streams is done.

        Raises:
            DeviceError: something of it failed.
        """

    def close(self) -> None:
        """Lets go of the streams; safe to call twice."""
