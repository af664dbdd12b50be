from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.tokenizer import PromptTokenizer, PromptTruncatedWarning

pytestmark = pytest.mark.bundle


@pytest.fixture
def tokenizer(demo_bundle: Path) -> PromptTokenizer:
    bundle = Bundle.open(demo_bundle)
    encoder = bundle.manifest.text_encoders[0]
    return PromptTokenizer(bundle.file(encoder.tokenizer), encoder)


def test_shape_and_frame(tokenizer: PromptTokenizer, demo_bundle: Path) -> None:
    encoder = Bundle.open(demo_bundle).manifest.text_encoders[0]
    ids = tokenizer(["a red star", ""])
    assert ids.shape == (2, 77)
    assert ids.dtype == np.int64
    assert (ids[:, 0] == encoder.bos_token_id).all()
    assert ids[0, 4] == encoder.eos_token_id  # three words, each one token of this vocabulary
    assert (ids[1, 1:] == encoder.pad_token_id).all()


def test_truncation_is_said_aloud(tokenizer: PromptTokenizer) -> None:
    with pytest.warns(PromptTruncatedWarning, match=r"has 78 tokens, 75 are read; left out: 'green blue moon'"):
        ids = tokenizer(["red " * 75 + "green blue moon"])
    assert ids[0, -1] == ids[0].max()  # the end token closes a full row
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["red " * 75])
