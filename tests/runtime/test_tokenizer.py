from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import ParameterError, SourceError
from controlrt.runtime.prompt_syntax import Segment, parse_prompt
from controlrt.runtime.tokenizer import Chunks, PromptTokenizer, PromptTruncatedWarning

pytestmark = pytest.mark.bundle


@pytest.fixture
def tokenizer(demo_bundle: Path) -> PromptTokenizer:
    bundle = Bundle.open(demo_bundle)
    encoder = bundle.manifest.text_encoders[0]
    return PromptTokenizer(bundle.file(encoder.tokenizer), encoder)


def test_shape_and_frame(tokenizer: PromptTokenizer, demo_bundle: Path) -> None:
    encoder = Bundle.open(demo_bundle).manifest.text_encoders[0]
    ids = np.concatenate([tokenizer(parse_prompt(text, "plain")).ids for text in ("a red star", "")])
    assert ids.shape == (2, 77)
    assert ids.dtype == np.int64
    assert (ids[:, 0] == encoder.bos_token_id).all()
    assert ids[0, 4] == encoder.eos_token_id  # three words, each one token of this vocabulary
    assert (ids[1, 1:] == encoder.pad_token_id).all()


def test_truncation_is_said_aloud(tokenizer: PromptTokenizer) -> None:
    with pytest.warns(PromptTruncatedWarning, match=r"has 78 tokens, 75 are read; left out: 'green blue moon'"):
        ids = tokenizer(parse_prompt("red " * 75 + "green blue moon", "plain")).ids
    assert ids[0, -1] == ids[0].max()  # the end token closes a full row
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(parse_prompt("red " * 75, "plain"))


def test_chunks_are_cut_after_a_comma_that_is_near(tokenizer: PromptTokenizer) -> None:
    """75 tokens a chunk; what follows the last of at most 20 tokens goes along to the next one."""
    near = parse_prompt("red " * 60 + "," + " blue" * 30, "plain")
    assert lengths(tokenizer(near, 3)) == [61, 30]
    far = parse_prompt("red " * 40 + "," + " blue" * 50, "plain")
    assert lengths(tokenizer(far, 3)) == [75, 16]
    with pytest.warns(PromptTruncatedWarning, match="has 91 tokens, 75 are read.*--prompt-chunks"):
        assert lengths(tokenizer(near, 1)) == [75]
    with pytest.warns(PromptTruncatedWarning, match="has 200 tokens, 150 are read"):
        assert lengths(tokenizer(parse_prompt("red " * 200, "plain"), 2)) == [75, 75]


def test_break_starts_a_chunk(tokenizer: PromptTokenizer) -> None:
    assert lengths(tokenizer(parse_prompt("red star BREAK blue", "webui"), 3)) == [2, 1]
    with pytest.warns(PromptTruncatedWarning, match="left out: 'blue'"):
        assert lengths(tokenizer(parse_prompt("red star BREAK blue", "webui"), 1)) == [2]


@pytest.mark.parametrize(
    ("prompt", "left_out"),
    [
        ("red star BREAK (blue) moon", "blue moon"),
        ("red star BREAK(blue) BREAK moon", "blue moon"),
        ("(red star BREAK blue:1.2) moon", "blue moon"),
    ],
)
def test_nothing_of_what_follows_the_last_chunk_is_read(tokenizer: PromptTokenizer, prompt: str, left_out: str) -> None:
    with pytest.warns(PromptTruncatedWarning, match=f"2 are read; left out: '{left_out}'"):
        assert lengths(tokenizer(parse_prompt(prompt, "webui"), 1)) == [2]


def test_a_break_at_the_end_leaves_nothing_out(tokenizer: PromptTokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lengths(tokenizer(parse_prompt("red star BREAK", "webui"), 1)) == [2]


def test_weights_go_with_their_tokens(tokenizer: PromptTokenizer) -> None:
    chunks = tokenizer([Segment("red star", 1.5), Segment(" blue")])
    np.testing.assert_allclose(chunks.weights[0, :6], [1, 1.5, 1.5, 1, 1, 1])


def test_a_learned_word_is_its_vectors(tokenizer: PromptTokenizer, demo_bundle: Path) -> None:
    vocabulary = Bundle.open(demo_bundle).manifest.text_encoders[0].vocab_size
    tokenizer.learn("<one>", 0, 1)
    tokenizer.learn("<two>", 1, 2)
    ids = tokenizer(parse_prompt("red <two> star<one>", "plain")).ids[0]
    assert [index for index in ids if index >= vocabulary] == [vocabulary + 1, vocabulary + 2, vocabulary]
    assert lengths(tokenizer(parse_prompt("red <two> star <one>", "plain"))) == [5]
    for taken in ("<one>", "red</w>", " "):
        with pytest.raises(ParameterError, match="token is"):
            tokenizer.learn(taken, 3, 1)


@pytest.mark.parametrize(("vectors", "cut"), [(56, [41, 75]), (57, [60, 57]), (75, [60, 75])])
def test_a_learned_word_of_many_vectors(tokenizer: PromptTokenizer, vectors: int, cut: list[int]) -> None:
    """What follows the comma goes along where the next chunk has room for it and the word, else it stays."""
    tokenizer.learn("<many>", 0, vectors)
    prompt = "red " * 40 + "," + " blue" * 19 + " <many>"
    assert lengths(tokenizer(parse_prompt(prompt, "plain"), 3)) == cut


def test_a_learned_word_that_no_chunk_holds(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(SourceError, match=r"<more> has 76 learned vectors; .* 75 tokens"):
        tokenizer.learn("<more>", 0, 76)
    assert lengths(tokenizer(parse_prompt("red <more>", "plain"))) == lengths(
        tokenizer(parse_prompt("red < more >", "plain"))
    )


def lengths(chunks: Chunks) -> list[int]:
    """Tokens of each chunk, without start and end; this model pads with the end token."""
    return [list(row).index(row[-1]) - 1 for row in chunks.ids]
