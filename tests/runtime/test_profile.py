import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlrt.runtime.errors import ParameterError, ProfileError
from controlrt.runtime.profile import Range, ShapeProfile

sides = st.integers(1, 64).map(lambda n: 64 * n)


@given(width=sides, height=sides, more=st.lists(st.tuples(sides, sides), max_size=3))
def test_round_trip(width: int, height: int, more: list[tuple[int, int]]) -> None:
    text = ",".join(f"{w}x{h}" for w, h in [(width, height), *more])
    profile = ShapeProfile.parse(text)
    assert str(profile) == text
    assert profile.default_size == (width, height)
    profile.check(width, height, 1)


def test_ranges() -> None:
    profile = ShapeProfile.parse("512-1024x512, 768x768", "1-4")
    assert str(profile) == "512-1024x512,768x768"
    assert (profile.widths.low, profile.widths.high, profile.heights.high) == (512, 1024, 768)
    profile.check(640, 512, 4)
    profile.check(768, 768, 1)
    with pytest.raises(ProfileError, match="build-engines --profile 640x768"):
        profile.check(640, 768, 1)  # in the hull, but in neither size
    with pytest.raises(ParameterError, match="--batch 1-5"):
        profile.check(512, 512, 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("500x512", "448 or 512"),
        ("512", "not WIDTHxHEIGHT"),
        ("512x", "not WIDTHxHEIGHT"),
        ("-512x512", "not WIDTHxHEIGHT"),
        ("512x512,", "not WIDTHxHEIGHT"),
        ("0x512", "nearest: 64"),
        ("9999x512", "nearest: 4096"),
        ("1024-512x512", "write 512-1024"),
        ("५१२x512", "not WIDTHxHEIGHT"),
    ],
)
def test_refusals_name_the_mend(text: str, says: str) -> None:
    with pytest.raises(ProfileError, match=says):
        ShapeProfile.parse(text)


def test_prompt_chunks() -> None:
    assert ShapeProfile.parse("512x512").tokens == Range(77, 77)
    assert ShapeProfile.parse("512x512", "1", "2-4").tokens == Range(154, 308)


@pytest.mark.parametrize("chunks", ["0", "3-1", "x", "17", "1-17", ""])
def test_bad_prompt_chunks(chunks: str) -> None:
    with pytest.raises(ParameterError, match="prompt_chunks"):
        ShapeProfile.parse("512x512", "1", chunks)


@pytest.mark.parametrize("batch", ["0", "4-1", "x", "64", "1-99"])
def test_bad_batch(batch: str) -> None:
    with pytest.raises(ParameterError):
        ShapeProfile.parse("512x512", batch)
