"""Operators of ONNX Runtime's CUDA provider in NumPy, as its documentation defines them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Array = NDArray[Any]


class NhwcConv(OpRun):
    """x (n, h, w, in), kernel (out, height, width, in): every output is one product per tap."""

    op_domain = "com.microsoft"

    def _run(
        self,
        x: Array,
        kernel: Array,
        bias: Array | None = None,
        pads: Any = None,
        strides: Any = None,
        **_: Any,
    ) -> tuple[Array]:
        top, left, bottom, right = pads or (0, 0, 0, 0)
        down, across = strides or (1, 1)
        padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
        _, rows, columns, _ = kernel.shape
        height, width = (padded.shape[1] - rows) // down + 1, (padded.shape[2] - columns) // across + 1
        y = np.zeros((len(x), height, width, len(kernel)))
        for row in range(rows):
            for column in range(columns):
                seen = padded[:, row : row + down * height : down, column : column + across * width : across]
                y += seen[:, :height, :width] @ kernel[:, row, column].astype(np.float64).T
        return ((y + (0 if bias is None else bias)).astype(x.dtype),)


def normalized(x: Array, gamma: Array, beta: Array, groups: int, epsilon: float, activation: int) -> Array:
    """Groups of channels of a picture (n, h, w, channels), in float64."""
    rows, height, width, channels = x.shape
    grouped = x.astype(np.float64).reshape(rows, height * width, groups, channels // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
    return (y / (1 + np.exp(-y)) if activation else y).astype(x.dtype)


class GroupNorm(OpRun):
    """With SiLU where ``activation`` is 1."""

    op_domain = "com.microsoft"

    def _run(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        groups: int = 0,
        epsilon: float = 0,
        activation: int = 0,
        channels_last: int = 1,
    ) -> tuple[Array]:
        assert channels_last == 1
        assert gamma.dtype == beta.dtype == np.float32
        return (normalized(x, gamma, beta, groups, epsilon, activation),)


class SkipGroupNorm(OpRun):
    """Of the sum of picture, skip and bias, which is its second output."""

    op_domain = "com.microsoft"

    def _run(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        skip: Array,
        bias: Array | None = None,
        groups: int = 0,
        epsilon: float = 0,
        activation: int = 0,
        channels_last: int = 1,
    ) -> tuple[Array, ...]:
        assert channels_last == 1
        assert gamma.dtype == beta.dtype == np.float32
        rows, _, _, channels = x.shape
        assert skip.shape in (x.shape, (rows, channels), (rows, 1, 1, channels))
        total = x + (skip if skip.ndim == 4 else skip[:, None, None]) + (0 if bias is None else bias)
        total = total.astype(x.dtype)
        return normalized(total, gamma, beta, groups, epsilon, activation), total


class SkipLayerNormalization(OpRun):
    """Of the sum of input, skip and bias, which is its fourth output."""

    op_domain = "com.microsoft"

    def _run(
        self, x: Array, skip: Array, gamma: Array, beta: Array, bias: Array | None = None, epsilon: float = 0
    ) -> tuple[Array, ...]:
        assert skip.shape in (x.shape, (1, *x.shape[1:]), x.shape[1:])
        total = (x + skip + (0 if bias is None else bias)).astype(x.dtype)
        full = total.astype(np.float64)
        mean, variance = full.mean(-1, keepdims=True), full.var(-1, keepdims=True)
        y = ((full - mean) / np.sqrt(variance + epsilon) * gamma + beta).astype(x.dtype)
        return y, mean.astype(np.float32), (1 / np.sqrt(variance + epsilon)).astype(np.float32), total


class BiasSplitGelu(OpRun):
    """The left half of x + bias times the exact GELU of the right half."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array) -> tuple[Array]:
        left, right = np.split(x.astype(np.float64) + bias, 2, axis=-1)
        erf = np.vectorize(math.erf, otypes=[np.float64])(right / math.sqrt(2))
        return ((left * right * 0.5 * (1 + erf)).astype(x.dtype),)


class BiasAdd(OpRun):
    """x (n, tokens, channels), bias and skip."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array, skip: Array) -> tuple[Array]:
        assert x.shape == skip.shape
        assert x.ndim == 3
        return ((x + bias + skip).astype(x.dtype),)


class MultiHeadAttention(OpRun):
    """On (rows, tokens, heads * width)."""

    op_domain = "com.microsoft"

    def _run(self, query: Array, key: Array, value: Array, num_heads: int = 1, scale: float | None = None) -> Any:
        q, k, v = (
            x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2).astype(np.float64) for x in (query, key, value)
        )
        scores = q @ k.swapaxes(2, 3) * (scale or 1 / math.sqrt(q.shape[-1]))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ v
        return (y.swapaxes(1, 2).reshape(query.shape).astype(query.dtype),)


OPERATORS = [
    NhwcConv,
    GroupNorm,
    SkipGroupNorm,
    SkipLayerNormalization,
    BiasSplitGelu,
    BiasAdd,
    MultiHeadAttention,
]


def run_in_numpy(model: ir.Model, **values: Any) -> dict[str, Array]:
    """Runs ``model``, which may hold operators of the CUDA provider, once."""
    ir.external_data.load_to_model(model)
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=OPERATORS)
    wanted = {name: values[name] for name in evaluator.input_names}
    return dict(zip(evaluator.output_names, evaluator.run(None, wanted), strict=True))
