"""The runtime may not ask the engines which backend they pick, so ``controlrt doctor`` knows the rule by itself."""

from __future__ import annotations

import pytest

import controlrt.engines.backends.cuda
import controlrt.engines.backends.tensorrt
from controlrt.engines.backends import BACKENDS, choose_backend
from controlrt.runtime.commands import doctor, main
from controlrt.runtime.cuda.gpu import Gpu
from controlrt.runtime.errors import UserError

GPU = Gpu(name="NVIDIA Something", compute_capability="8.9")
HOPPER = Gpu(name="NVIDIA H200", compute_capability="9.0")
DISTRIBUTIONS = {**doctor.TENSORRT, "cuda": ("onnxruntime-gpu",)}
CASES = {
    "plain": ((), None, "onnxruntime"),
    "openvino": (("openvino",), None, "openvino"),
    "a GPU without TensorRT": (("openvino",), GPU, "openvino"),
    "TensorRT without a GPU": (("openvino", "tensorrt", "tensorrt-rtx"), None, "openvino"),
    "cuda": (("openvino", "cuda"), GPU, "cuda"),
    "cuda without a GPU": (("openvino", "cuda"), None, "openvino"),
    "cuda before RTX": (("openvino", "cuda", "tensorrt-rtx"), GPU, "cuda"),
    "RTX": (("openvino", "tensorrt-rtx"), GPU, "tensorrt-rtx"),
    "RTX on a GPU that it does not know": (("openvino", "tensorrt-rtx"), HOPPER, "openvino"),
    "all": (("openvino", "cuda", "tensorrt", "tensorrt-rtx"), GPU, "tensorrt"),
}


@pytest.mark.parametrize(("installed", "gpu", "expected"), CASES.values(), ids=CASES)
def test_doctor_says_what_the_build_picks(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    installed: tuple[str, ...],
    gpu: Gpu | None,
    expected: str,
) -> None:
    optional = {"openvino", "cuda", "tensorrt", "tensorrt-rtx"}
    for name in optional:
        monkeypatch.setattr(BACKENDS[name], "is_installed", lambda name=name: name in installed)
    for module in (controlrt.engines.backends.cuda, controlrt.engines.backends.tensorrt, doctor):
        monkeypatch.setattr(module, "find_gpu", lambda: gpu)
    absent = {each for name in optional - {*installed} for each in DISTRIBUTIONS.get(name, (name,))}
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in absent else "1.0")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith("backend:"))
    assert line.split()[1].rstrip(":") == choose_backend(None) == expected
    assert ("pip install 'controlrt[tensorrt-rtx]'" in printed) == (
        gpu is not None and not {"tensorrt", "tensorrt-rtx"} & {*installed}
    )


def test_a_backend_that_is_named_need_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX builds without a GPU."""
    monkeypatch.setattr(controlrt.engines.backends.tensorrt, "find_gpu", lambda: None)
    monkeypatch.setattr(BACKENDS["tensorrt-rtx"], "is_installed", lambda: True)
    assert choose_backend("tensorrt-rtx") == "tensorrt-rtx"
    monkeypatch.setattr(BACKENDS["tensorrt-rtx"], "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'controlrt\[tensorrt-rtx\]'"):
        choose_backend("tensorrt-rtx")
