"""Fusing: two ControlNets and a UNet written by hand, against running them one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from controlrt.compiler.fuse import fuse
from controlrt.runtime.executors.onnxruntime import open_session

UNET = """
<ir_version: 10, opset_import: ["" : 20]>
unet (float[2,3] latents, float[2,3] residual_0_in, float[2,3] residual_1_in) => (float[2,3] next_latents) {
    skip = Add(latents, residual_0_in)
    middle = Mul(skip, latents)
    next_latents = Add(middle, residual_1_in)
}
"""
CONTROLNET = """
<ir_version: 10, opset_import: ["" : 20]>
controlnet (float[2,3] latents, float[2,3] hint, float[2,2] conditioning_scale, float[2,3] residual_0_in,
            float[2,3] residual_1_in) => (float[2,3] residual_0, float[2,3] residual_1)
<int64[1] first = {0}, int64[1] second = {1}, float factor = {FACTOR}> {
    seen = Add(latents, hint)
    scaled = Mul(seen, factor)
    scale_0 = Gather<axis = 1>(conditioning_scale, first)
    scale_1 = Gather<axis = 1>(conditioning_scale, second)
    own_0 = Mul(scaled, scale_0)
    own_1 = Mul(seen, scale_1)
    residual_0 = Add(residual_0_in, own_0)
    residual_1 = Add(own_1, residual_1_in)
}
"""


def controlnet(factor: float) -> ir.Model:
    return ir.from_onnx_text(CONTROLNET.replace("FACTOR", str(factor)))


def run(model: ir.Model, path: Path, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    ir.save(model, path / "model.onnx")
    session = open_session(path / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("factors", [{"canny": 2.0}, {"canny": 2.0, "mask": -0.5}, {"mask": 3.0, "canny": 1.0}])
def test_fused_is_one_after_the_other(tmp_path: Path, factors: dict[str, float]) -> None:
    rng = np.random.default_rng(len(factors))
    latents = rng.standard_normal((2, 3), np.float32)
    feeds = {"latents": latents}
    residuals = {f"residual_{i}_in": np.zeros((2, 3), np.float32) for i in (0, 1)}
    for name, factor in factors.items():
        own = {
            "hint": rng.random((2, 3), np.float32),
            "conditioning_scale": rng.random((2, 2), np.float32),
        }
        made = run(controlnet(factor), tmp_path, latents=latents, **own, **residuals)
        residuals = {f"{key}_in": value for key, value in made.items()}
        feeds |= {f"{key}.{name}": value for key, value in own.items()}
    expected = run(ir.from_onnx_text(UNET), tmp_path, latents=latents, **residuals)
    fused = fuse(ir.from_onnx_text(UNET), {name: controlnet(factor) for name, factor in factors.items()})
    assert {value.name for value in fused.graph.inputs} == set(feeds)
    found = run(fused, tmp_path, **feeds)
    np.testing.assert_allclose(found["next_latents"], expected["next_latents"], rtol=1e-6)  # the same sums


def test_models_given_stay_as_they_are() -> None:
    unet, canny = ir.from_onnx_text(UNET), controlnet(2.0)
    before = [str(ir.to_proto(model)) for model in (unet, canny)]
    fuse(unet, {"canny": canny})
    assert [str(ir.to_proto(model)) for model in (unet, canny)] == before


def test_residuals_that_do_not_fit_are_refused() -> None:
    unet = ir.from_onnx_text(UNET.replace(", float[2,3] residual_1_in", "").replace("residual_1_in", "skip"))
    with pytest.raises(ValueError, match="residual_1_in"):
        fuse(unet, {"canny": controlnet(1.0)})
