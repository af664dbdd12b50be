"""Who is compared on which machine, and how some are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlrt.engines.backends import BACKENDS
from controlrt.perf.peers.contenders import MIN_PSNR_DB, NamedBundle, all_peers, choose_peers
from controlrt.runtime.errors import UnknownNameError


def test_a_cpu_compares_float32_and_what_it_has_instructions_for() -> None:
    names = [peer.name for peer in all_peers("cpu", ("avx2",), None)]
    assert names[:3] == ["eager", "eager-channels-last", "torch-compile"]
    assert {"plain-onnxruntime", "plain-openvino", "onnxruntime-fp32", "openvino-fp32"} <= set(names)
    assert not [name for name in names if "bf16" in name]
    modern = {peer.name for peer in all_peers("cpu", ("avx2", "avx512_bf16"), None)}
    assert modern - set(names) == {"eager-bf16", "openvino-bf16"}


def test_every_backend_and_precision_is_there() -> None:
    peers = all_peers("cpu", ("amx_bf16",), None)
    ours = {(peer.backend, peer.precision) for peer in peers if peer.kind == "bundle"}
    assert ours == {(name, precision) for name, backend in BACKENDS.items() for precision in backend.precisions}
    assert {peer.precision for peer in peers} <= MIN_PSNR_DB.keys()


def test_a_gpu_compares_float16_with_float32_for_a_measure() -> None:
    peers = {peer.name: peer for peer in all_peers("cuda", (), None)}
    assert next(iter(peers)) == "eager-fp32"
    assert peers["eager"].precision == peers["torch-compile"].precision == "fp16"
    assert peers["torch-compile"].compile_mode == "max-autotune"
    assert {peer.device for peer in peers.values() if peer.kind == "eager"} == {"cuda"}


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
