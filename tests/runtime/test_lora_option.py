from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlrt.runtime.commands.lora_option import LoraOption
from controlrt.runtime.errors import UserError

FINITE = st.floats(allow_nan=False, allow_infinity=False)
SOURCES = st.from_regex(r"\A[a-zA-Z0-9_./: -]*[a-zA-Z0-9_.-]\.safetensors\Z")


@given(SOURCES, FINITE)
def test_what_is_written_is_read(source: str, weight: float) -> None:
    option = LoraOption(source=source, weight=weight)
    assert LoraOption.parse(str(option)) == option


@given(SOURCES)
def test_a_source_alone_has_weight_one(source: str) -> None:
    assert LoraOption.parse(source) == LoraOption(source=source, weight=1.0)


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("details.safetensors:0.8", "details.safetensors", 0.8),
        ("owner/name:-1", "owner/name", -1.0),
        ("owner/name", "owner/name", 1.0),
        ("a:b/c.safetensors", "a:b/c.safetensors", 1.0),
        ("a:b.pt", "a:b.pt", 1.0),
        ("a.pt:1e-1", "a.pt", 0.1),
    ],
)
def test_forms(text: str, source: str, weight: float) -> None:
    assert LoraOption.parse(text) == LoraOption(source=source, weight=weight)


@pytest.mark.parametrize("text", ["", ":0.5", "a.safetensors:", "a.safetensors:much", "a.pt:nan", "a.pt:inf"])
def test_mistakes(text: str) -> None:
    with pytest.raises(UserError, match=r"is not SOURCE\[:WEIGHT\], such as"):
        LoraOption.parse(text)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        option = LoraOption.parse(text)
    except UserError:
        return
    assert option.source
    assert math.isfinite(option.weight)
