"""Names of LoRA files: the layouts taken apart, and the UNet's modules by the names they were first published with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from original_layout import unet_tensors

from controlrt.export.checkpoint.architectures import empty_model, stable_diffusion_1, stable_diffusion_xl
from controlrt.export.checkpoint.lora_change import ROLES
from controlrt.export.checkpoint.lora_names import SPELLED_ROLES, original_name, split_name

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


@pytest.mark.parametrize(
    "config",
    [stable_diffusion_1().unet, stable_diffusion_xl("epsilon", zero_terminal_snr=False).unet],
)
def test_original_names(config: Any) -> None:
    """Against the test's own account of the layout, which moves names here as it moves tensors elsewhere."""
    unet = empty_model("UNet2DConditionModel", config)
    names = SimpleNamespace(state_dict=lambda: {name: name for name in unet.state_dict()}, config=unet.config)
    for original, ours in unet_tensors(names).items():
        module, _, parameter = ours.rpartition(".")
        assert f"{original_name(module, unet.config)}.{parameter}" == original
