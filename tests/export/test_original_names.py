"""The names that a UNet's modules were first published with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from original_layout import unet_tensors

from controlrt.export.checkpoint.architectures import empty_model, stable_diffusion_1, stable_diffusion_xl
from controlrt.export.checkpoint.original_names import original_name


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
