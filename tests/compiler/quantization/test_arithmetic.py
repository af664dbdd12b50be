"""Quantization against plain Python, the numbers of the paper, ml_dtypes and ONNX Runtime."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from controlrt.compiler.quantization.arithmetic import (
    FP8,
    INT8,
    NumberFormat,
    dequantize,
    quantize,
    quantize_weights,
    scales_of,
)

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
    return parsed(text)


@functools.cache
def parsed(text: str) -> ort.InferenceSession:
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


def test_fp8_has_the_numbers_of_the_paper() -> None:
    """Table 1 of Micikevicius et al. 2022: bias 7, no infinities, S.1111.111 alone is not a number."""
    codes = [(code >> 3, code & 7) for code in range(0x7F)]
    expected = [2.0 ** (e - 7) * (1 + m / 8) if e else 2.0**-6 * m / 8 for e, m in codes]
    assert FP8.magnitudes.tolist() == expected
    assert FP8.largest == 448


@given(MATRICES, SCALES)
def test_fp8_is_the_nearest_number_and_saturates(values: NDArray[np.float32], scale: float) -> None:
    found = quantize(values, scale, number_format=FP8)
    assert found.dtype == ml_dtypes.float8_e4m3fn
    scaled = (values / np.float32(scale)).astype(np.float64)
    grid = np.concatenate([-FP8.magnitudes[::-1], FP8.magnitudes])
    nearest = np.abs(scaled[..., None] - grid).min(axis=-1)
    np.testing.assert_array_equal(np.abs(scaled - found.astype(np.float64)), nearest)
    inside = np.abs(scaled) <= 448  # ml_dtypes alone makes what is larger not a number
    np.testing.assert_array_equal(found[inside], scaled[inside].astype(np.float32).astype(ml_dtypes.float8_e4m3fn))
    np.testing.assert_array_equal(found[~inside].astype(np.float64), np.copysign(448, scaled[~inside]))


def test_halves_go_to_even_in_fp8() -> None:
    values = np.array([17, 19, -17, 2**-10, 3 * 2**-10, 464, 1e6], np.float32)
    expected = [16, 20, -16, 0, 2**-8, 448, 448]
    assert quantize(values, 1, number_format=FP8).astype(np.float64).tolist() == expected


@given(MATRICES, SCALES)
def test_onnx_runtime_rounds_to_fp8_alike(values: NDArray[np.float32], scale: float) -> None:
    text = """<ir_version: 10, opset_import: ["": 21]>
    one (float[R, C] x, float scale) => (float[R, C] y) {
        zero = Constant <value = float8e4m3fn {0}> ()
        q = QuantizeLinear (x, scale, zero)
        y = DequantizeLinear (q, scale, zero)
    }"""
    (expected,) = parsed(text).run(None, {"x": values, "scale": np.array(scale, np.float32)})
    np.testing.assert_array_equal(dequantize(quantize(values, scale, number_format=FP8), scale), expected)


@given(INTEGERS, SCALES)
def test_what_is_int8_stays_what_it_is(integers: NDArray[np.int8], scale: float) -> None:
    np.testing.assert_array_equal(quantize(dequantize(integers, scale), scale), integers)


@pytest.mark.parametrize(("number_format", "step"), [(INT8, 1 / 127), (FP8, 1 / 14)], ids=["int8", "fp8"])
@given(KERNELS, st.data())
def test_every_output_channel_of_weights_has_a_scale(
    number_format: NumberFormat, step: float, weights: NDArray[np.float32], data: st.DataObject
) -> None:
    """The largest step is next to the largest number: 32 of 448 in fp8."""
    axis = data.draw(st.integers(-weights.ndim, weights.ndim - 1))
    integers, scales = quantize_weights(weights, axis, number_format=number_format)
    assert integers.shape == weights.shape
    assert scales.shape == (weights.shape[axis],)
    read = dequantize(integers, scales, axis)
    for channel in range(weights.shape[axis]):
        was, became = (np.take(each, channel, axis) for each in (weights, integers))
        largest = np.abs(was).max()
        if largest >= 1e-30:
            assert scales[channel] == pytest.approx(largest / number_format.largest, rel=1e-6)
            assert np.abs(became.astype(np.float64)).max() == number_format.largest
        error = np.abs(np.take(read, channel, axis) - was).max()
        assert error <= largest * step * 0.50001 + 1e-30


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
