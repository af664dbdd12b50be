from __future__ import annotations

import warnings

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from controlrt.demo import MODEL_DIR
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.prompt_syntax import parse_prompt


@settings(max_examples=150, deadline=None)
@given(prompt=st.text(max_size=200) | st.text("abcdefgh ,.!'()[]:0123 \n\t", max_size=400))
def test_same_ids_as_transformers(demo: ControlNetPipeline, prompt: str) -> None:
    tokenizer = demo._conditioner.prompts._encoders[0].tokenizer
    reference = CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    expected = reference([prompt], padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(tokenizer(parse_prompt(prompt, "plain")).ids, expected)
