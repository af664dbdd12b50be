"""The histogram that grows, against NumPy's of everything at once."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from controlrt.compiler.quantization.histogram import Histogram

BUCKETS, BINS = 3, 16
MAGNITUDES = st.one_of(st.just(0.0), st.floats(2**-60, 2**60, width=32), st.floats(0.25, 4, width=32))
VALUES = hnp.arrays(
    np.float32, st.integers(0, 20), elements=st.builds(lambda x, sign: x * sign, MAGNITUDES, st.sampled_from([-1, 1]))
)
STREAMS = st.lists(st.tuples(st.integers(0, BUCKETS - 1), VALUES), max_size=8)

Stream = list[tuple[int, NDArray[np.float32]]]


def histogram(stream: Stream) -> Histogram:
    made = Histogram(buckets=BUCKETS, bins=BINS)
    for bucket, values in stream:
        made.add(bucket, values)
    return made


def same(one: Histogram, other: Histogram) -> bool:
    return one.limit == other.limit and np.array_equal(one.counts, other.counts)


@given(STREAMS)
def test_it_is_what_numpy_makes_of_everything_at_once(stream: Stream) -> None:
    made = histogram(stream)
    largest = max((float(np.abs(values).max(initial=0)) for _, values in stream), default=0)
    assert made.limit == 0 if largest == 0 else largest < made.limit <= 2 * largest
    assert made.limit == 0 or np.log2(made.limit).is_integer()
    for bucket in range(BUCKETS):
        values = np.abs(np.concatenate([np.zeros(0), *(each for at, each in stream if at == bucket)]))
        expected, _ = np.histogram(values, bins=BINS, range=(0, made.limit or 1))
        np.testing.assert_array_equal(made.counts[bucket], expected)


@given(STREAMS, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(stream: Stream, random: Random) -> None:
    mixed = list(stream)
    random.shuffle(mixed)
    assert same(histogram(mixed), histogram(stream))


def test_values_of_any_shape_and_dtype() -> None:
    values = np.arange(24).reshape(2, 3, 4)
    made = [histogram([(1, values.astype(dtype))]) for dtype in (np.float16, np.float32, np.float64)]
    assert all(same(one, other) for one, other in itertools.pairwise(made))
    assert made[0].limit == 32
    assert made[0].counts.sum(axis=1).tolist() == [0, 24, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_and_counts_nothing(value: float) -> None:
    made = histogram([(0, np.ones(3, np.float32))])
    with pytest.raises(ValueError, match="infinite or not a number"):
        made.add(0, np.array([1, value, 3], np.float32))
    assert same(made, histogram([(0, np.ones(3, np.float32))]))


@pytest.mark.parametrize("bins", [0, 1, 3, 1000])
def test_bins_are_a_power_of_two(bins: int) -> None:
    with pytest.raises(ValueError, match=f"it is {bins}"):
        Histogram(bins=bins)


@given(STREAMS, STREAMS)
def test_one_that_is_restored_goes_on(first: Stream, second: Stream) -> None:
    begun = histogram(first)
    restored = Histogram.restored(begun.counts, begun.limit)
    for bucket, values in second:
        restored.add(bucket, values)
    assert same(restored, histogram(first + second))
    assert same(begun, histogram(first))
