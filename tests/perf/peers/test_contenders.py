"""Who is compared on which machine, and how some are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from controlrt.engines.backends import BACKENDS
from controlrt.engines.backends.onnxruntime import OnnxRuntimeBackend
from controlrt.perf.peers.contenders import MIN_PSNR_DB, NamedBundle, all_peers, choose_peers
from controlrt.runtime.errors import UnknownNameError


def test_a_cpu_compares_float32_and_what_it_has_instructions_for() -> None:
    names = [peer.name for peer in all_peers("cpu", ("avx2",), None)]
    assert names[:3] == ["eager", "eager-channels-last", "torch-compile"]
    assert {"plain-onnxruntime", "plain-openvino", "onnxruntime-fp32", "openvino-fp32"} <= set(names)
    assert not [name for name in names if "bf16" in name]
    modern = {peer.name for peer in all_peers("cpu", ("avx2", "avx512_bf16"), None)}
    assert modern - set(names) == {"eager-bf16", "openvino-bf16"}


def test_every_backend_and_precision_of_a_cpu_is_there() -> None:
    peers = all_peers("cpu", ("amx_bf16",), None)
    ours = {(peer.backend, peer.precision) for peer in peers if peer.kind == "bundle"}
    on_cpus = {name: backend for name, backend in BACKENDS.items() if backend.device == "cpu"}
    assert ours == {(name, precision) for name, backend in on_cpus.items() for precision in backend.precisions}
    assert {peer.precision for peer in peers} <= MIN_PSNR_DB.keys()


class GpuBackend(OnnxRuntimeBackend):
    device: Any = "cuda"
    precisions = ("fp16", "fp32")


@pytest.fixture
def gpu_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that runs on a GPU, beside those that are there."""
    monkeypatch.setitem(BACKENDS, "made-up", GpuBackend())
    return "made-up"


def test_a_gpu_compares_float16_with_float32_for_a_measure() -> None:
    peers = {peer.name: peer for peer in all_peers("cuda", (), None)}
    assert next(iter(peers)) == "eager-fp32"
    assert peers["eager"].precision == peers["torch-compile"].precision == "fp16"
    assert peers["torch-compile"].compile_mode == "max-autotune"
    assert peers["torch-compile-quick"].compile_mode == "reduce-overhead"
    assert {peer.device for peer in peers.values() if peer.kind == "eager"} == {"cuda"}
    assert peers["eager-fp32"].options["tf32"] == "off"
    assert (peers["plain-cuda"].precision, peers["plain-cuda"].device) == ("fp16", "cuda")


def test_a_gpu_s_contenders_are_those_that_run_on_it(gpu_backend: str) -> None:
    known = all_peers("cuda", ("avx512_bf16",), None)
    chosen = choose_peers([], known)
    assert {peer.device for peer in chosen} == {"cuda"}
    bundles = [peer.name for peer in chosen if peer.kind == "bundle" and peer.backend == gpu_backend]
    assert bundles == [f"{gpu_backend}-fp16", f"{gpu_backend}-fp32"]
    assert [peer.name for peer in choose_peers(["openvino-*"], known)][1:] == [
        peer.name for peer in known if peer.name.startswith("openvino-")
    ]
    named = NamedBundle(path=Path("bundles/mine"), backend="openvino", precision="fp32")
    assert "openvino-fp32" in {peer.name for peer in choose_peers([], all_peers("cuda", (), named))}


def test_a_cpu_has_none_of_a_gpu_s(gpu_backend: str) -> None:
    names = {peer.name for peer in all_peers("cpu", (), None)}
    assert not [name for name in names if name.startswith((gpu_backend, "plain-cuda", "plain-made-up"))]
    named = NamedBundle(path=Path("bundles/mine"), backend=gpu_backend, precision="fp16")  # type: ignore[arg-type]
    assert f"{gpu_backend}-fp16" in {peer.name for peer in all_peers("cpu", (), named)}


def test_a_named_bundle_takes_the_place_of_its_kind() -> None:
    named = NamedBundle(path=Path("bundles/mine"), backend="openvino", precision="fp32")
    peers = all_peers("cpu", (), named)
    assert [peer.name for peer in peers].count("openvino-fp32") == 1
    assert {peer.name: peer.bundle for peer in peers if peer.bundle} == {"openvino-fp32": Path("bundles/mine")}
    assert next(peer for peer in peers if peer.bundle).options["bundle"] == "bundles/mine"


def test_only_some_are_chosen_beside_the_measure() -> None:
    known = all_peers("cpu", (), None)
    assert [peer.name for peer in choose_peers(["plain-*"], known)] == ["eager", "plain-openvino", "plain-onnxruntime"]
    assert choose_peers([], known) == known
    with pytest.raises(UnknownNameError, match="unknown contender 'tensor\\*'; known: eager, "):
        choose_peers(["eager", "tensor*"], known)


def test_torch_compile_is_no_yardstick() -> None:
    assert [peer.name for peer in all_peers("cpu", (), None) if peer.is_eager] == ["eager", "eager-channels-last"]


def test_stable_diffusion_cpp_has_to_be_installed_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "stable-diffusion-cpp"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert name not in {peer.name for peer in all_peers("cpu", (), None)}
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    for isa, precision in (((), "fp16"), (("avx512_bf16",), "bf16")):
        known = all_peers("cpu", isa, None)
        assert name not in {peer.name for peer in choose_peers([], known)}
        eager, found = choose_peers([name], known)
        assert (eager.name, found.name, found.precision, found.device) == ("eager", name, precision, "cpu")
