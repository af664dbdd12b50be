"""Results of ``controlrt bench`` made from a seed: what was measured is known, so what is said of it can be checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from controlrt.perf.machine import Commit, Machine
from controlrt.perf.ratios import Measured
from controlrt.perf.results import (
    SCHEMA_VERSION,
    Axis,
    Ceiling,
    Contender,
    Kind,
    Measurement,
    Memory,
    ModelSetting,
    Parity,
    Report,
    Scenario,
    Setting,
    StagePercentiles,
    StageSamples,
    Status,
)
from controlrt.perf.server import results as server_results
from controlrt.perf.server.latencies import compare_by_steps
from controlrt.perf.server.overload import summarized
from controlrt.perf.statistics import Interval, Ratio, percentiles

EAGER = "eager"
SHARES = {"text": 0.01, "hint": 0.004, "timestep_table": 0.002, "decode": 0.14}
"""Of a picture's time; the steps take the rest but for 1%."""
MACHINE = Machine(
    cpu="AMD EPYC (family 25, model 17)",
    cores=2,
    memory_bytes=25276502016,
    os="Linux-6.1-x86_64-with-glibc2.36",
    python="3.11.7",
    load_average=0.1,
    isa=("avx2", "avx512_vnni"),
)
VERSIONS = {"controlrt": "0.1.0", "torch": "2.13.0+cpu", "onnxruntime": "1.32.0", "openvino": "2026.4.1"}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A contender to make up."""

    seconds: float = 1.0
    """Of a picture of the first scenario, on an idle machine."""
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    psnr_db: float | None = 95.0
    status: Status = "ok"
    reason: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    group: int = 0


CONTENDERS = {
    EAGER: Made(seconds=2.75, runtime="pytorch", psnr_db=None, options={"memory_format": "contiguous"}),
    "eager-channels-last": Made(seconds=2.9, runtime="pytorch", psnr_db=118.0),
    "torch.compile": Made(runtime="pytorch", status="failed", reason="no C++ compiler: <g++> & clang not found"),
    "plain-onnxruntime": Made(seconds=2.5, psnr_db=96.0),
    "plain-openvino": Made(seconds=2.25, runtime="openvino", psnr_db=94.0),
    "onnxruntime": Made(seconds=2.1, psnr_db=95.5),
    "openvino": Made(seconds=1.9, runtime="openvino", psnr_db=93.0),
    "openvino-bf16": Made(
        seconds=1.1,
        runtime="openvino",
        precision="bf16",
        psnr_db=11.0,
        status="wrong picture",
        reason="PSNR 11.0 dB, at least 30 is asked",
    ),
}


def scenario(
    contenders: Mapping[str, Made] = CONTENDERS,
    *,
    seed: int = 0,
    rounds: int = 10,
    noise: float = 0.01,
    drift: float = 1.0,
    slowness: float = 1.0,
    group_slowness: Sequence[float] = (1.0,),
    name: str = "single stream",
    kind: Kind = "single-stream",
    axis: Axis | None = None,
    value: float | None = None,
    width: int = 512,
    batch: int = 1,
    steps: Sequence[int] = (20,),
    controls: Sequence[str] = ("canny",),
    threads: int = 2,
) -> Scenario:
    """Contenders that took turns on a machine that gets slower by ``drift`` meanwhile, every call noisy by ``noise``.

    Args:
        slowness: of the whole session.
        group_slowness: of the time when each group was measured; the reference, eager, runs in all of them.
    """
    rng = np.random.default_rng(seed)
    work = slowness * float((width / 512) ** 2 * batch**0.95 * (0.7 + 0.3 * len(controls)))
    groups = [
        {
            made: [
                each.seconds * work * group * count / 20 * state * float(rng.normal(1, noise))
                for state in np.linspace(1, drift, rounds).tolist()
                for count in steps
            ]
            for made, each in contenders.items()
            if each.status != "failed" and (made == EAGER or each.group == number)
        }
        for number, group in enumerate(group_slowness)
    ]
    measured = Measured(groups, EAGER)
    calls = {made: samples for group in groups for made, samples in group.items()}
    calls[EAGER] = [seconds for group in groups for seconds in group[EAGER]]
    return Scenario(
        name=name,
        kind=kind,
        axis=axis,
        value=value,
        setting=Setting(
            width=width,
            height=width,
            batch=batch,
            steps=tuple(steps),
            sampler="DDIM",
            guidance_scale=7.5,
            controls=tuple(controls),
            prompts=("a red circle", "a blue square"),
            negative_prompt="",
            hints="edges of shapes",
            seeds=tuple(range(rounds)),
            threads=threads,
            rounds=rounds,
        ),
        reference=EAGER,
        reference_samples=tuple(tuple(group[EAGER]) for group in groups),
        eager=EAGER,
        contenders=tuple(
            Contender(
                name=made,
                runtime=each.runtime,
                precision=each.precision,
                options=dict(each.options),
                status=each.status,
                reason=each.reason,
                engine_bytes=None if each.runtime == "pytorch" else 61 * 2**20,
                build_seconds=None if each.runtime == "pytorch" else 41.5,
                measurement=None
                if made not in calls
                else _measurement(made, each, calls[made], steps, batch, measured),
            )
            for made, each in contenders.items()
        ),
    )


def report(*scenarios: Scenario, machine: Machine = MACHINE, versions: Mapping[str, str] = VERSIONS) -> Report:
    """A file of these scenarios, of a single stream where none is given."""
    return Report(
        benchmark="pipeline",
        schema_version=SCHEMA_VERSION,
        created="2026-11-24T18:00:00Z",
        command="controlrt bench bundles/demo-512x512 --output result.json",
        commit=Commit(hash="0123456789abcdef", dirty=False),
        machine=machine,
        ceilings=(Ceiling(dtype="float32", flops_per_second=320e9, size=2048, threads=2, library="torch cpu"),),
        versions=dict(versions),
        model=ModelSetting(
            name="demo",
            source="demo/model",
            controls={"canny": "demo/canny"},
            bundle="bundles/demo-512x512",
            profile="512x512",
            batch="1",
        ),
        complete=True,
        scenarios=scenarios or (scenario(),),
    )


def gpu_report() -> Report:
    """A single stream of a second or less on a GPU, beside torch.compile."""
    eager, compiled, ours = "eager", "torch-compile", "cuda-fp16"
    on_gpu = {"device": "cuda"}
    found = scenario(
        {
            eager: Made(seconds=1.0, runtime="pytorch", precision="fp16", psnr_db=None, options=on_gpu),
            compiled: Made(seconds=0.5, runtime="pytorch", precision="fp16", psnr_db=50.0, options=on_gpu),
            ours: Made(seconds=0.25, runtime="cuda", precision="fp16", psnr_db=48.0, options=on_gpu),
        }
    )
    contenders = []
    for each in found.contenders:
        measured = each.measurement
        assert measured is not None
        to_eager = measured.speedup_over_eager
        assert to_eager is not None
        half = Ratio(value=to_eager.value / 2, low=to_eager.low / 2, high=to_eager.high / 2)
        memory = msgspec.structs.replace(measured.memory, peak_device_bytes=3000 * 2**20)
        measured = msgspec.structs.replace(measured, memory=memory, speedup_over_compiled=half)
        contenders.append(msgspec.structs.replace(each, measurement=measured))
    machine = msgspec.structs.replace(MACHINE, gpus=("NVIDIA H100, 9.0, 81559 MiB, 580.95, 1980 MHz, 2619 MHz, 700 W",))
    versions = {"torch": "2.11.0", "onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.1"}
    whole = msgspec.structs.replace(found, compiled=compiled, contenders=tuple(contenders))
    return report(whole, machine=machine, versions=versions)


def full_report() -> Report:
    """One of everything: single stream, batches, mixed steps and a sweep of every axis."""
    return report(
        scenario(),
        *(scenario(name=f"offline, batch {n}", kind="offline", batch=n, seed=n, rounds=5) for n in (1, 2, 4, 8)),
        scenario(name="mixed steps", kind="mixed-steps", steps=(10, 20, 50), seed=9, rounds=5),
        *(
            scenario(name=f"sweep, {n}x{n}", kind="sweep", axis="resolution", value=n * n, width=n, seed=n, rounds=5)
            for n in (256, 384, 512, 768)
        ),
        *(
            scenario(name=f"sweep, {n} steps", kind="sweep", axis="steps", value=n, steps=(n,), seed=n, rounds=5)
            for n in (5, 10, 20, 50)
        ),
    )


def _measurement(
    name: str, made: Made, calls: list[float], steps: Sequence[int], batch: int, measured: Measured
) -> Measurement:
    counts = [steps[number % len(steps)] for number in range(len(calls))]
    in_loop = 0.99 - sum(SHARES.values())
    step = [seconds * in_loop / count for seconds, count in zip(calls, counts, strict=True) for _ in range(count)]
    samples = StageSamples(
        **{stage: tuple(seconds * share for seconds in calls) for stage, share in SHARES.items()},
        step=tuple(step),
        host_step=tuple(seconds * 0.004 for seconds in step),
        host=tuple(seconds * in_loop * 0.004 for seconds in calls),
        picture=tuple(calls),
    )
    stages = {stage: percentiles(getattr(samples, stage)) for stage in StageSamples.__struct_fields__}
    median = float(np.median(calls))
    flops = 20 * 10_000_000_000
    return Measurement(
        group=made.group,
        samples=samples,
        percentiles=StagePercentiles(**stages),
        pictures_per_second=batch * len(calls) / sum(calls),
        load_seconds=3.5,
        first_request_seconds=median * 1.4,
        cold_start_seconds=3.5 + median * 1.4,
        memory=Memory(peak_host_bytes=900 * 2**20, file_backed_bytes=240 * 2**20, peak_device_bytes=None),
        flops_per_picture=flops,
        flops_per_second=flops / median,
        parity=None
        if made.psnr_db is None
        else Parity(
            compared_with=EAGER,
            psnr_db=made.psnr_db,
            ssim=0.5 if made.status == "wrong picture" else 0.99999,
            latent_errors=tuple(10 ** (-made.psnr_db / 20) * (1 + 0.2 * number) for number in range(steps[0])),
            min_psnr_db=30.0,
        ),
        speedup_over_eager=measured.speedup(name, EAGER),
        step_speedup_over_eager=measured.speedup(name, EAGER),
    )


def _requests(seconds: float) -> tuple[server_results.Request, ...]:
    return tuple(
        server_results.Request(steps=steps, due=float(number), latency=seconds * steps, status=200)
        for number, steps in enumerate([4, 20, 50] * 5)
    )


def server_report() -> server_results.ServerReport:
    """A result of the server scenario with every part; some of its targets are missed."""
    ours = server_results.MixedBlock(policy="shortest", pair=0, requests=_requests(0.01))
    theirs = server_results.MixedBlock(policy="batch", pair=0, requests=_requests(0.04))
    overloaded = [
        server_results.Request(steps=4, due=0.0, latency=1.0, status=200),
        server_results.Request(steps=20, due=0.5, latency=3.5, status=200),
        server_results.Request(steps=50, due=1.0, latency=2.0, status=504),
        server_results.Request(steps=50, due=1.5, latency=0.01, status=429),
    ]
    return server_results.ServerReport(
        benchmark="server",
        schema_version=server_results.SCHEMA_VERSION,
        created="2026-01-02T03:04:05Z",
        command="controlrt bench server",
        commit=None,
        machine=MACHINE,
        versions={"uvicorn": "1"},
        setting=server_results.Setting(
            bundle="demo",
            named=False,
            backend="onnxruntime",
            precision="fp32",
            width=256,
            height=256,
            control="canny",
            steps=(4, 20, 50),
            policy="shortest",
            baseline="batch",
            batch=None,
            threads=2,
            seed=0,
        ),
        complete=True,
        capacity=server_results.Capacity(
            clients=8,
            blocks=(server_results.CapacityBlock(policy="shortest", requests=24, seconds=20.0),),
            requests_per_second={"shortest": 1.2, "batch": 1.2},
            ratio=1.0,
        ),
        mixed=server_results.Mixed(
            rate=0.84,
            load=0.7,
            blocks=(ours, theirs),
            by_steps=tuple(compare_by_steps([ours], [theirs])),
            throughput=0.8,
            baseline_throughput=0.8,
            failed=0,
        ),
        overhead=server_results.Overhead(
            calls=(
                server_results.CallOverhead(
                    steps=4,
                    encoding="png",
                    request_seconds=((0.21,),),
                    call_seconds=((0.2,),),
                    overhead=Interval(value=0.01, low=0.009, high=0.011),
                    split=server_results.OverheadSplit(transport=0.006, before=0.001, steps=0.003, decode=0.0),
                ),
            )
        ),
        overload=summarized(overloaded, rate=3.6, capacity=1.2, deadline=3.0),
        soak=server_results.Soak(
            requests=2,
            clients=16,
            seconds=9.0,
            outcomes={"draw": {"drawn": 2}},
            lost=(),
            mixed_up=("draw: another picture",),
            compared=2,
            lowest_psnr_db=12.0,
            between_psnr_db=15.0,
            resident=(server_results.Resident(seconds=1.0, answered=1, resident_bytes=10**9),),
            growth=0.0,
            left_over=0,
        ),
        shutdown=server_results.Shutdown(accepted=12, answered=12, later={"503": 5}, exit_code=0, seconds=4.0),
    )
