"""What goes between the service and a worker process: pickles with their arrays beside them (PEP 574), so that a
picture is copied neither into its message nor out of it."""

from __future__ import annotations

import io
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

_AT_ONCE = 64
"""Parts of a message that go to the system in one call; Linux takes up to 1024 (IOV_MAX)."""


class Channel:
    """One end, for any number of messages both ways; each way is one thread's.

    Messages are pickles: both ends trust each other. Pictures of PIL in RGB arrive as arrays, unless they are to be
    turned or have a colour that is none. Arrays are those of the sender's memory until they are sent.

    Args:
        end: of a pair of stream sockets.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: object) -> None:
        """Sends a message; returns when it is on its way.

        Raises:
            OSError: nobody is at the other end.
            Exception: of any other kind, where something of it cannot be pickled; nothing was sent then.
        """
        beside: list[pickle.PickleBuffer] = []
        file = io.BytesIO()
        try:
            _Pickler(file, beside.append).dump(message)
        except OSError as error:  # of a picture's file
            raise pickle.PicklingError(str(error)) from error
        parts = [file.getbuffer(), *(each.raw() for each in beside)]
        sizes = [part.nbytes for part in parts]
        parts = [memoryview(struct.pack(f"<{1 + len(sizes)}Q", len(sizes), *sizes)), *filter(len, parts)]
        while parts:
            sent = self._end.sendmsg(parts[:_AT_ONCE])
            while parts and sent >= parts[0].nbytes:
                sent -= parts.pop(0).nbytes
            if parts:
                parts[0] = parts[0][sent:]

    def receive(self) -> Any:
        """The next message, as soon as there is one.

        Raises:
            EOFError: there will be none.
            OSError: this end is closed, or the other one with something unread.
        """
        (count,) = struct.unpack("<Q", self._read(8))
        pickled, *beside = map(self._read, struct.unpack(f"<{count}Q", self._read(8 * count)))
        return pickle.loads(pickled, buffers=beside)

    def close(self) -> None:
        """Closes this end; safe to call twice."""
        self._end.close()

    def _read(self, size: int) -> bytearray:
        read = bytearray(size)
        left = memoryview(read)
        while left:
            if not (count := self._end.recv_into(left, 0, socket.MSG_WAITALL)):
                raise EOFError
            left = left[count:]
        return read


def channel() -> tuple[Channel, Channel]:
    """Both ends of a new one; either can be given to another process where that is started."""
    here, there = socket.socketpair()
    return Channel(here), Channel(there)


class _Pickler(pickle.Pickler):
    """Makes arrays of colour pictures, which take a small part of the time on both sides."""

    def __init__(self, file: io.BytesIO, beside: Callable[[pickle.PickleBuffer], None]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL, buffer_callback=beside)

    def reducer_override(self, value: Any) -> Any:
        plain = isinstance(value, Image.Image) and value.mode == "RGB" and "transparency" not in value.info
        if plain and value.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return np.asarray(value).__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented
