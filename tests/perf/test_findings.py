"""From sessions to scenarios, on sessions that nothing ran in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from controlrt.perf.findings import Findings
from controlrt.perf.peers.builds import Prepared
from controlrt.perf.peers.contenders import all_peers
from controlrt.perf.peers.drawer import CallSeconds
from controlrt.perf.peers.process import PeerProcess
from controlrt.perf.peers.specs import Answer, BundleSpec
from controlrt.perf.results import Scenario
from controlrt.perf.scenarios import Task
from controlrt.perf.session import Session, Started

ROUNDS = 5
TASK = Task(
    name="offline, batch 2",
    kind="offline",
    width=64,
    height=64,
    batch=2,
    steps=(2,),
    sampler="DDIM",
    controls=("canny",),
)
PEERS = {peer.name: peer for peer in all_peers("cpu", (), None)}


def call(total: float) -> CallSeconds:
    share = total / 4
    return CallSeconds(
        text=share / 2,
        hint=share / 2,
        timestep_table=0.0,
        steps=(share, share),
        host_steps=(0.01, 0.02),
        host=0.03,
        decode=share,
        total=total,
    )


def scenario(
    directory: Path,
    groups: list[dict[str, float]],
    *,
    errors: dict[str, float] | None = None,
    failed: dict[str, str] | None = None,
    unbuilt: dict[str, str] | None = None,
    reference: str | None = "eager",
) -> Scenario:
    """Contenders that take so many seconds for a call, each time, and whose pictures are so far off."""
    names = list(dict.fromkeys(name for group in groups for name in group))
    rng = np.random.default_rng(0)
    picture = rng.random((2, 64, 64, 3), np.float32) * np.float32(0.5)
    session = Session(task=TASK, start=_never, rounds=ROUNDS, warm_ups=0, directory=directory)
    session.groups = [{name: [call(seconds)] * ROUNDS for name, seconds in group.items()} for group in groups]
    session.reference = reference
    session.failed = failed or {}
    for name in names:
        session.started[name] = Started(
            load_seconds=1.0, first_request_seconds=2.0, cold_start_seconds=3.0, peak_device_bytes=70
        )
        session.answers[name] = Answer(seconds=None, moment=0.0, peak_host_bytes=100, file_backed_bytes=40)
        latents = np.ones((2, 2, 4, 8, 8), np.float32) * (1 + (errors or {}).get(name, 0.0))
        np.savez(session.recorded(name), pictures=picture + np.float32((errors or {}).get(name, 0.0)), latents=latents)
    spec = BundleSpec(path="", threads=2)
    return Findings(
        task=TASK,
        peers=[PEERS[name] for name in [*names, *(unbuilt or {}), *(failed or {})]],
        prepared={
            name: Prepared(
                spec=spec,
                engine_bytes=7,
                build_seconds=5.0,
                flops=1000,
                unquantized="bf16" if name.endswith("int8") else None,
            )
            for name in names
        },
        unbuilt=unbuilt or {},
        session=session,
        threads=2,
    ).scenario()


def _never(name: str) -> PeerProcess:
    raise AssertionError(name)


def test_times_and_ratios_are_those_of_the_calls(tmp_path: Path) -> None:
    found = scenario(tmp_path, [{"eager": 4.0, "eager-channels-last": 3.0, "openvino-fp32": 1.0}])
    assert (found.reference, found.eager) == ("eager", "eager-channels-last")
    assert found.reference_samples == ((4.0,) * ROUNDS,)
    ours = found.contenders[2]
    assert (ours.status, ours.reason, ours.engine_bytes, ours.build_seconds) == ("ok", "", 7, 5.0)
    measured = ours.measurement
    assert measured is not None
    assert measured.samples.step == (0.25,) * 2 * ROUNDS
    assert measured.percentiles.picture.p50 == measured.percentiles.picture.p99 == 1.0
    assert measured.pictures_per_second == 2.0
    assert measured.flops_per_second == 2 * 1000
    assert (measured.load_seconds, measured.first_request_seconds, measured.cold_start_seconds) == (1, 2, 3)
    assert (measured.memory.peak_host_bytes, measured.memory.peak_device_bytes) == (100, 70)
    assert measured.speedup_over_eager is not None
    assert measured.speedup_over_eager.value == pytest.approx(3)
    assert measured.step_speedup_over_eager is not None
    assert measured.step_speedup_over_eager.value == pytest.approx(3)
    assert measured.samples.host == (0.03,) * ROUNDS
    assert (found.compiled, measured.speedup_over_compiled) == (None, None)


def test_what_is_not_in_int8_is_named_beside_it(tmp_path: Path) -> None:
    found = scenario(tmp_path, [{"eager": 4.0, "openvino-fp32": 2.0, "openvino-int8": 1.0}])
    assert [each.options.get("unquantized") for each in found.contenders] == [None, None, "bf16"]


def test_torch_compile_is_a_yardstick_of_its_own(tmp_path: Path) -> None:
    found = scenario(tmp_path, [{"eager": 4.0, "torch-compile": 2.0, "openvino-fp32": 1.0}])
    assert (found.eager, found.compiled) == ("eager", "torch-compile")
    ratios = [each.measurement and each.measurement.speedup_over_compiled for each in found.contenders]
    assert [ratio and ratio.value for ratio in ratios] == pytest.approx([0.5, 1, 2])


def test_groups_are_compared_by_way_of_the_reference(tmp_path: Path) -> None:
    """The machine was twice as slow in the second group, for both."""
    found = scenario(tmp_path, [{"eager": 4.0, "plain-openvino": 2.0}, {"eager": 8.0, "openvino-fp32": 2.0}])
    ratios = {each.name: each.measurement and each.measurement.speedup_over_eager for each in found.contenders}
    assert ratios["plain-openvino"] is not None
    assert ratios["openvino-fp32"] is not None
    assert (ratios["plain-openvino"].value, ratios["openvino-fp32"].value) == (pytest.approx(2), pytest.approx(4))
    assert [each.measurement and each.measurement.group for each in found.contenders] == [0, 0, 1]
    assert found.reference_samples == ((4.0,) * ROUNDS, (8.0,) * ROUNDS)


def test_the_setting_tells_what_was_asked(tmp_path: Path) -> None:
    setting = scenario(tmp_path, [{"eager": 1.0}]).setting
    assert (setting.batch, setting.steps, setting.rounds) == (2, (2,), ROUNDS)
    assert setting.seeds == (0, 2, 4, 6, 8)
    assert len(set(setting.prompts)) == 2 * ROUNDS


def test_a_wrong_picture_is_no_success(tmp_path: Path) -> None:
    found = scenario(tmp_path, [{"eager": 4.0, "openvino-fp32": 1.0}], errors={"openvino-fp32": 0.1})
    eager, wrong = found.contenders
    assert eager.status == "ok"
    assert eager.measurement is not None
    assert eager.measurement.parity is None
    assert wrong.status == "wrong picture"
    assert wrong.reason == "its picture has 20.0 dB against eager's; at least 45 dB is asked of fp32"
    assert wrong.measurement is not None
    assert wrong.measurement.parity is not None
    assert wrong.measurement.parity.latent_errors == pytest.approx((0.1, 0.1), rel=1e-4)
    assert found.failed == [wrong]


def test_those_that_failed_are_there_with_their_reasons(tmp_path: Path) -> None:
    found = scenario(
        tmp_path,
        [{"eager": 4.0}],
        failed={"torch-compile": "no compiler"},
        unbuilt={"openvino-fp16": "a pass that fails"},
    )
    fates = {each.name: (each.status, each.reason, each.measurement) for each in found.failed}
    assert fates == {
        "torch-compile": ("failed", "no compiler", None),
        "openvino-fp16": ("failed", "a pass that fails", None),
    }


def test_without_eager_there_are_times_and_no_ratios(tmp_path: Path) -> None:
    found = scenario(tmp_path, [{"openvino-fp32": 1.0}], reference="openvino-fp32", unbuilt={"eager": "no PyTorch"})
    assert found.eager is None
    ours = next(each for each in found.contenders if each.name == "openvino-fp32")
    assert ours.measurement is not None
    assert ours.measurement.speedup_over_eager is None
    assert ours.measurement.percentiles.picture.p50 == 1.0


def test_a_reference_that_fails_late_takes_the_ratios_with_it(tmp_path: Path) -> None:
    failed = {"eager": "out of memory"}
    found = scenario(tmp_path, [{"openvino-fp32": 1.0}], failed=failed)
    assert found.eager is None
    assert [each.status for each in found.contenders] == ["ok", "failed"]
