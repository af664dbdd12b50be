"""The web UI's grammar of prompts: its documented examples, and what must hold for any text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlrt.runtime.errors import PromptError
from controlrt.runtime.prompt_syntax import Segment, parse_prompt

# the examples that the web UI documents for its parser
DOCUMENTED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        *[("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1)],
        *[("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
    ],
}
OTHERS = {
    "": [("", 1.0)],
    "[less]": [("less", 1 / 1.1)],
    "[[less]]": [("less", 1 / 1.21)],
    "(a:1.5) b": [("a", 1.5), (" b", 1.0)],
    "(a : 1.5 )": [("a ", 1.5)],
    "(a:.5)": [("a", 0.5)],
    "(a:-1)": [("a", -1.0)],
    "ratio 16:9 (wide)": [("ratio 16:9 ", 1.0), ("wide", 1.1)],
    "a) b]": [("a) b]", 1.0)],
    "(a:b)": [("a:b", 1.1)],
    "[(a:1.2)]": [("a", 1.2 / 1.1)],
    "a|b": [("a|b", 1.0)],
    "[cat: black]": [("cat: black", 1 / 1.1)],
    r"back\slash \\(a)": [("back\\slash \\", 1.0), ("a", 1.1)],
}


@pytest.mark.parametrize(("prompt", "expected"), [*DOCUMENTED.items(), *OTHERS.items()])
def test_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = parse_prompt(prompt, "webui")
    assert [each.text for each in found] == [text for text, _ in expected]
    assert [each.weight for each in found] == pytest.approx([weight for _, weight in expected])
    assert not any(each.starts_chunk for each in found)


def test_break() -> None:
    assert parse_prompt("a BREAK b", "webui") == [Segment("a"), Segment("b", 1.0, True)]
    assert parse_prompt("(a BREAK b:2) c", "webui") == [Segment("a", 2.0), Segment("b", 2.0, True), Segment(" c")]
    assert parse_prompt("BREAKFAST", "webui") == [Segment("BREAKFAST")]
    assert parse_prompt("a BREAK", "webui") == [Segment("a"), Segment("", 1.0, True)]


@pytest.mark.parametrize("prompt", ["[a:b:0.5]", "[a:0.3]", "[b::10]", "x [a|b] y", "[a|b|c]"])
def test_what_changes_from_step_to_step_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError, match="from step to step"):
        parse_prompt(prompt, "webui")


def test_combined_predictions_are_refused() -> None:
    with pytest.raises(PromptError, match="AND"):
        parse_prompt("a cat AND a dog", "webui")
    assert parse_prompt("a cat and a BAND", "webui") == [Segment("a cat and a BAND")]


@given(st.text())
def test_plain_text_is_itself(text: str) -> None:
    assert parse_prompt(text, "plain") == [Segment(text)]


@given(st.text(st.characters(exclude_characters="()[]\\|:", exclude_categories=["Lu"])))
def test_without_brackets_nothing_happens(text: str) -> None:
    assert parse_prompt(text, "webui") == [Segment(text)]


@given(st.text(st.characters(exclude_categories=["Lu"])))
def test_escaped_text_is_itself(text: str) -> None:
    escaped = "".join(f"\\{each}" if each in "()[]\\" else each for each in text)
    assert parse_prompt(escaped, "webui") == [Segment(text)]


@given(st.text("ab ()[]:.1\\"))
def test_anything_is_read_or_refused_by_name(text: str) -> None:
    try:
        found = parse_prompt(text, "webui")
    except PromptError:
        return
    read = "".join(each.text for each in found)
    assert set(read) <= set(text)
    assert sum(map(read.count, "ab")) == sum(map(text.count, "ab"))


@pytest.mark.parametrize("text", [" " * 20_000, "a " * 10_000, " BREAK" * 3_000, "\n \t" * 5_000 + "BREAK"], ids=len)
def test_no_prompt_takes_long(text: str) -> None:
    """A server reads what anybody sends."""
    started = time.process_time()
    parse_prompt(text, "webui")
    assert time.process_time() - started < 1
