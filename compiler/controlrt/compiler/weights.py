"""One file of weights for all programs of a bundle: the same tensor, wherever it is used, is stored once.

A ControlNet begins as a copy of the UNet's encoder, and stages cut from one graph share tensors; both pay once. Large
tensors start on a page, so a runtime maps them into memory instead of reading them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir

PAGE, LINE = 4096, 64
INLINE = 1024
"""Tensors of fewer bytes stay in the ONNX file."""


class WeightStore:
    """Writes the weights of models into ``directory / name`` and the models beside it. A context manager."""

    def __init__(self, directory: Path, name: str = "weights.bin") -> None:
        self.directory, self.name = directory, name
        self._file = (directory / name).open("wb")
        self._offset = 0
        self._by_digest: dict[bytes, int] = {}
        self._by_tensor: dict[int, tuple[ir.TensorProtocol, int]] = {}

    def save(self, model: ir.Model, file: str) -> None:
        """Writes ``model`` as ``directory / file``. The model itself keeps its tensors.

        Args:
            model: what to write.
            file: name of the ONNX file.
        """
        copy = model.clone()
        for value in copy.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= INLINE:
                value.const_value = self._place(tensor)
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.tensor(tensor.numpy().copy(), name=tensor.name)
        self._file.flush()
        ir.save(copy, self.directory / file)

    def close(self) -> None:
        """Ends the file; safe to call twice."""
        self._file.close()
        self._by_tensor.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _place(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        if id(tensor) not in self._by_tensor:
            content = tensor.tobytes()
            digest = hashlib.sha256(content).digest()
            if digest not in self._by_digest:
                self._by_digest[digest] = self._append(content)
            self._by_tensor[id(tensor)] = tensor, self._by_digest[digest]  # holding it keeps its id its own
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()
        return ir.ExternalTensor(
            self.name,
            self._by_tensor[id(tensor)][1],
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=self.directory,
        )

    def _append(self, content: bytes) -> int:
        alignment = PAGE if len(content) >= PAGE else LINE
        padding = -self._offset % alignment
        self._file.write(b"\0" * padding)
        self._file.write(content)
        start = self._offset + padding
        self._offset = start + len(content)
        return start
