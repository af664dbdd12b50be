"""Names of LoRA files: the layouts taken apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlrt.export.checkpoint.lora_change import ROLES
from controlrt.export.checkpoint.lora_names import SPELLED_ROLES, split_name

MODULES = st.from_regex(r"\A[a-z0-9_]+(\.[a-z0-9_]+)*\Z").filter(lambda name: "lora" not in name)


@given(MODULES, st.sampled_from(sorted(SPELLED_ROLES)))
def test_entry_and_role(module: str, spelled: str) -> None:
    assert split_name(f"{module}.{spelled}") == (module, SPELLED_ROLES[spelled])


@given(MODULES, st.from_regex(r"\A[a-z]+[0-9]?\Z").filter(lambda name: name not in ("weight", "bias")))
def test_names_of_adapters_are_left_out(module: str, adapter: str) -> None:
    assert split_name(f"{module}.lora_A.{adapter}.weight") == (module, "down")
    assert split_name(f"{module}.lora_B.{adapter}.bias") == (module, "up_bias")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("unet.mid_block.attn1.processor.to_q_lora.down.weight", "unet.mid_block.attn1.to_q"),
        ("mid_block.attn1.processor.to_out_lora.down.weight", "mid_block.attn1.to_out.0"),
        ("text_encoder.layers.0.self_attn.to_v_lora.down.weight", "text_encoder.layers.0.self_attn.v_proj"),
        ("text_encoder.layers.0.self_attn.to_out_lora.down.weight", "text_encoder.layers.0.self_attn.out_proj"),
    ],
)
def test_processors(name: str, entry: str) -> None:
    assert split_name(name) == (entry, "down")


@given(st.text())
def test_any_name_is_taken_apart_or_left(name: str) -> None:
    found = split_name(name)
    if found is not None:
        assert found[0]
        assert found[1] in ROLES
