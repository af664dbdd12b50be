"""Quantization against plain Python and ONNX Runtime."""

from __future__ import annotations

import functools

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from controlrt.compiler.quantization.arithmetic import dequantize, quantize, quantize_weights, scales_of

VALUES = st.floats(-1e6, 1e6, width=32)
SCALES = st.floats(2**-20, 2**20, width=32)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=VALUES)
KERNELS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=VALUES)
INTEGERS = hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8))


@functools.cache
def session(operator: str, types: tuple[str, str], axis: int | None) -> ort.InferenceSession:
    """One operator, with one scale or one for each place along ``axis``."""
    scales = "" if axis is None else "N"
    attribute = "" if axis is None else f"<axis={axis}>"
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    one ({types[0]}[R, C] x, float[{scales}] scale, int8[{scales}] zero) => ({types[1]}[R, C] y) {{
        y = {operator}{attribute}(x, scale, zero)
    }}"""
    return ort.InferenceSession(onnx.parser.parse_model(text).SerializeToString())


@given(MATRICES, SCALES)
def test_rounding_is_python_s_own(values: NDArray[np.float32], scale: float) -> None:
    quotients = [float(value / np.float32(scale)) for value in values.ravel()]
    expected = [max(-128, min(127, round(quotient))) for quotient in quotients]
    assert quantize(values, scale).ravel().tolist() == expected


def test_halves_go_to_even_and_what_is_too_large_saturates() -> None:
    values = np.array([-200, -128.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 200], np.float32)
    assert quantize(values, 1).tolist() == [-128, -128, -2, -2, 0, 0, 2, 2, 126, 127, 127]


@pytest.mark.parametrize("axis", [None, 0, 1])
@given(st.data())
def test_onnx_runtime_makes_the_same(axis: int | None, data: st.DataObject) -> None:
    values = data.draw(MATRICES)
    integers = data.draw(hnp.arrays(np.int8, values.shape))
    shape = () if axis is None else (values.shape[axis],)
    scales = data.draw(hnp.arrays(np.float32, shape, elements=SCALES))
    rest = {"scale": scales, "zero": np.zeros(shape, np.int8)}
    (expected,) = session("QuantizeLinear", ("float", "int8"), axis).run(None, {"x": values, **rest})
    np.testing.assert_array_equal(quantize(values, scales, axis), expected)
    (expected,) = session("DequantizeLinear", ("int8", "float"), axis).run(None, {"x": integers, **rest})
    np.testing.assert_array_equal(dequantize(integers, scales, axis), expected)


@given(INTEGERS, SCALES)
def test_what_is_int8_stays_what_it_is(integers: NDArray[np.int8], scale: float) -> None:
    np.testing.assert_array_equal(quantize(dequantize(integers, scale), scale), integers)


@given(KERNELS, st.data())
def test_every_output_channel_of_weights_has_a_scale(weights: NDArray[np.float32], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-weights.ndim, weights.ndim - 1))
    integers, scales = quantize_weights(weights, axis)
    assert integers.shape == weights.shape
    assert scales.shape == (weights.shape[axis],)
    read = dequantize(integers, scales, axis)
    for channel in range(weights.shape[axis]):
        was, became = (np.take(each, channel, axis) for each in (weights, integers))
        largest = np.abs(was).max()
        if largest >= 1e-30:
            assert scales[channel] == pytest.approx(largest / 127, rel=1e-6)
            assert np.abs(became.astype(int)).max() == 127
        error = np.abs(np.take(read, channel, axis) - was).max()
        assert error <= largest / 127 * 0.50001 + 1e-30


def test_the_axis_turns_with_the_weights() -> None:
    weights = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    integers, scales = quantize_weights(weights, 0)
    turned, same = quantize_weights(weights.T, 1)
    np.testing.assert_array_equal(turned.T, integers)
    np.testing.assert_array_equal(same, scales)


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38])
def test_what_is_nothing_has_a_scale_too(amax: float) -> None:
    integers, scales = quantize_weights(np.full((1, 2), amax, np.float32), 0)
    assert scales.tolist() == [1.0]
    assert not integers.any()


@pytest.mark.parametrize("amax", [np.inf, np.nan])
def test_what_is_no_number_has_no_scale(amax: float) -> None:
    with pytest.raises(ValueError, match="infinite or not a number"):
        scales_of(amax)
