"""From what a session saw to what is reported: percentiles, ratios, parity, and every contender's fate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from controlrt.perf import parity
from controlrt.perf.peers.builds import Prepared
from controlrt.perf.peers.calls import HINTS
from controlrt.perf.peers.contenders import MIN_PSNR_DB, Peer
from controlrt.perf.peers.drawer import CallSeconds
from controlrt.perf.ratios import Measured
from controlrt.perf.results import (
    Contender,
    Measurement,
    Memory,
    Parity,
    Scenario,
    Setting,
    StagePercentiles,
    StageSamples,
    Status,
)
from controlrt.perf.scenarios import GUIDANCE_SCALE, Task
from controlrt.perf.session import Session
from controlrt.perf.statistics import Ratio, percentiles


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that is known of one task.

    Args:
        peers: every contender that was to be measured, in order.
        prepared: those that could be built, by name.
        unbuilt: why, of those that could not.
        session: the measurement.
        threads: CPU threads of each.
        one_at_a_time: whether each was loaded anew in every round.
    """

    task: Task
    peers: Sequence[Peer]
    prepared: Mapping[str, Prepared]
    unbuilt: Mapping[str, str]
    session: Session
    threads: int
    one_at_a_time: bool = False

    def scenario(self) -> Scenario:
        """As it is reported."""
        reference = self.session.reference
        eager, compiled = self._fastest_eager(), self._fastest([p.name for p in self.peers if p.compile_mode])
        return Scenario(
            name=self.task.name,
            kind=self.task.kind,
            axis=self.task.axis,
            value=self.task.value,
            setting=self._setting(),
            reference=reference,
            reference_samples=tuple(
                tuple(call.total for call in group[reference]) for group in self.session.groups if reference in group
            ),
            eager=eager,
            compiled=compiled,
            contenders=tuple(self._contender(peer, eager, compiled) for peer in self.peers),
        )

    def _setting(self) -> Setting:
        task, rounds = self.task, range(self.session.rounds)
        calls = [call for number in rounds for call in task.calls(number)]
        return Setting(
            width=task.width,
            height=task.height,
            batch=task.batch,
            steps=task.steps,
            sampler=task.sampler,
            guidance_scale=GUIDANCE_SCALE,
            controls=task.controls,
            prompts=tuple(prompt for call in calls for prompt in call.prompts),
            negative_prompt="",
            hints=HINTS,
            seeds=tuple(task.calls(number)[0].seed for number in rounds),
            threads=self.threads,
            rounds=self.session.rounds,
            one_at_a_time=self.one_at_a_time,
        )

    def _contender(self, peer: Peer, eager: str | None, compiled: str | None) -> Contender:
        prepared = self.prepared.get(peer.name)
        measurement = self._measurement(peer, eager, compiled)
        status, reason = self._status(peer, measurement)
        rest = None if prepared is None else prepared.unquantized
        return Contender(
            name=peer.name,
            runtime=peer.runtime,
            precision=peer.precision,
            options=peer.options if rest is None else {**peer.options, "unquantized": rest},
            status=status,
            reason=reason,
            engine_bytes=None if prepared is None else prepared.engine_bytes,
            build_seconds=None if prepared is None else prepared.build_seconds,
            measurement=measurement,
        )

    def _status(self, peer: Peer, measurement: Measurement | None) -> tuple[Status, str]:
        failure = self.unbuilt.get(peer.name) or self.session.failed.get(peer.name)
        if failure is not None:
            return "failed", failure
        if measurement is None:
            return "failed", "nothing was measured"
        found = measurement.parity
        if found is not None and not found.is_met:
            return "wrong picture", (
                f"its picture has {found.psnr_db:.1f} dB against {found.compared_with}'s; at least "
                f"{found.min_psnr_db:.0f} dB is asked of {peer.precision}"
            )
        return "ok", ""

    def _measurement(self, peer: Peer, eager: str | None, compiled: str | None) -> Measurement | None:
        name, session = peer.name, self.session
        groups = [number for number, group in enumerate(session.groups) if name in group]
        if not groups or name in session.failed:
            return None
        samples = _columns([call for number in groups for call in session.groups[number][name]])
        started, answer, flops = session.started[name], session.answers[name], self.prepared[name].flops
        first_calls = [
            call.total for number in groups for call in session.groups[number][name][:: len(self.task.steps)]
        ]
        return Measurement(
            group=groups[0],
            samples=samples,
            percentiles=StagePercentiles(
                **{stage: percentiles(getattr(samples, stage)) for stage in StageSamples.__struct_fields__}
            ),
            pictures_per_second=self.task.batch * len(samples.picture) / sum(samples.picture),
            load_seconds=started.load_seconds,
            first_request_seconds=started.first_request_seconds,
            cold_start_seconds=started.cold_start_seconds,
            memory=Memory(
                peak_host_bytes=answer.peak_host_bytes,
                file_backed_bytes=answer.file_backed_bytes,
                peak_device_bytes=started.peak_device_bytes,
            ),
            flops_per_picture=flops,
            flops_per_second=None if flops is None else self.task.batch * flops / statistics.median(first_calls),
            parity=self._parity(peer),
            speedup_over_eager=self._speedup(name, eager, lambda call: call.total),
            step_speedup_over_eager=self._speedup(name, eager, lambda call: statistics.median(call.steps)),
            speedup_over_compiled=self._speedup(name, compiled, lambda call: call.total),
        )

    def _parity(self, peer: Peer) -> Parity | None:
        """Against the first contender's, where that ran."""
        measure = self.peers[0].name
        if peer.name == measure or measure not in self.session.started:
            return None
        recorded = self.session.recorded
        return parity.compare(
            recorded(peer.name),
            recorded(measure),
            measure,
            MIN_PSNR_DB[peer.precision],
            gives_latents=peer.gives_latents,
        )

    def _fastest_eager(self) -> str | None:
        """Of those in the first eager contender's place: float32 on a CPU, float16 on a GPU."""
        precision = "fp32" if self.peers[0].device == "cpu" else "fp16"
        return self._fastest([p.name for p in self.peers if p.is_eager and p.precision == precision])

    def _fastest(self, names: Sequence[str]) -> str | None:
        """Of those that ran."""
        measured = self._measured(lambda call: call.total)
        ran = {name for group in self.session.groups for name in group} - set(self.session.failed)
        names = [name for name in names if name in ran]
        return measured.fastest(names) if measured is not None and names else None

    def _speedup(self, name: str, over: str | None, seconds: Callable[[CallSeconds], float]) -> Ratio | None:
        measured = self._measured(seconds)
        return None if measured is None or over is None else measured.speedup(name, over)

    def _measured(self, seconds: Callable[[CallSeconds], float]) -> Measured | None:
        """None where the reference did not run to the end, so that groups cannot be compared."""
        reference, session = self.session.reference, self.session
        if reference is None or reference in session.failed or not session.groups:
            return None
        groups = [
            {name: [seconds(call) for call in calls] for name, calls in group.items()} for group in session.groups
        ]
        return Measured(groups, reference)


def _columns(calls: Sequence[CallSeconds]) -> StageSamples:
    return StageSamples(
        text=tuple(call.text for call in calls),
        hint=tuple(call.hint for call in calls),
        timestep_table=tuple(call.timestep_table for call in calls),
        step=tuple(seconds for call in calls for seconds in call.steps),
        host_step=tuple(seconds for call in calls for seconds in call.host_steps),
        host=tuple(call.host for call in calls),
        decode=tuple(call.decode for call in calls),
        picture=tuple(call.total for call in calls),
    )
