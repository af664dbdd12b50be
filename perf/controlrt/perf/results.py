"""What ``controlrt bench`` found: the schema of its JSON file. Seconds, bytes and FLOP/s throughout.

Report            one file: machine, versions, command
  Scenario        one way to use the model: single stream, offline, mixed steps, one point of a sweep
    Contender     one way to run it there, with its samples, or why it has none
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from controlrt.perf.machine import Commit, Machine
from controlrt.perf.result_file import load_result, save_result
from controlrt.perf.statistics import Percentiles, Ratio

SCHEMA_VERSION = 1

Kind = Literal["single-stream", "offline", "mixed-steps", "sweep"]
Axis = Literal["resolution", "batch", "steps", "controls"]
Status = Literal["ok", "failed", "wrong picture"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the schema: immutable, unknown keys are refused."""


class Ceiling(_Record, frozen=True, kw_only=True):
    """How fast this machine multiplies matrices: what FLOP/s are held against."""

    dtype: str
    flops_per_second: float
    """Best of several products, a multiply-add being two."""
    size: int
    """Rows and columns of the square matrices."""
    threads: int
    library: str
    """What multiplied, and on what: ``torch cpu``."""


class ModelSetting(_Record, frozen=True, kw_only=True):
    """What every scenario of a file runs."""

    name: str
    """``demo``, ``sd15``, ..., or the folder."""
    source: str
    """As it was given; the name again for a model that comes with controlrt."""
    controls: dict[str, str]
    """Source of each ControlNet, by name; the name again for those of such a model."""
    bundle: str | None
    """The bundle that was named on the command line; None where the benchmark built its own."""
    profile: str
    batch: str
    """Pictures per call that the bundle allows, ``1`` or ``1-4``."""


class Setting(_Record, frozen=True, kw_only=True):
    """What one scenario asks of every contender alike."""

    width: int
    height: int
    batch: int
    """Pictures per call."""
    steps: tuple[int, ...]
    """Denoising steps of the calls of one round, one number each; several where steps are mixed."""
    sampler: str
    guidance_scale: float
    controls: tuple[str, ...]
    """ControlNets that are on, at scale 1 from first to last step."""
    prompts: tuple[str, ...]
    """Calls take them in turn, so that no call finds the prompt of the one before."""
    negative_prompt: str
    hints: str
    """What the control pictures show; every call has its own, from its seed."""
    seeds: tuple[int, ...]
    """Of the measured rounds, one each; calls and pictures of a round count on from it."""
    threads: int
    rounds: int
    """Measured; the first request and warm-ups come before them."""
    one_at_a_time: bool = False
    """Whether every contender was loaded anew in each round, with its first request for a warm-up, because memory holds
    no two of them."""


class StageSamples(_Record, frozen=True, kw_only=True):
    """Seconds of every measured call, in order. A stage that ran for no call (its result was kept) has zeros."""

    text: tuple[float, ...]
    """Text encoders and what follows from the prompt alone."""
    hint: tuple[float, ...]
    """What is made of the control picture before the loop; nothing in eager PyTorch, where every step does it again."""
    timestep_table: tuple[float, ...]
    """What follows from the schedule before the loop; nothing in eager PyTorch."""
    step: tuple[float, ...]
    """One entry per denoising step of every call: networks, guidance and sampler."""
    host_step: tuple[float, ...]
    """Of each step, what passes outside the networks: Python, guidance and sampler where those are not in a program. On
    a GPU, what passes until the step is queued."""
    host: tuple[float, ...] = ()
    """Of each call, what the host does between the first step and the last: ``host_step`` added up, and where the whole
    loop is one launch, the seconds of Python from that launch to the pictures."""
    decode: tuple[float, ...]
    """Latents to pixels, for the whole batch."""
    picture: tuple[float, ...]
    """The whole call, prompts and control pictures to float pixels, for the whole batch."""


class StagePercentiles(_Record, frozen=True, kw_only=True):
    """Percentiles of each of ``StageSamples``."""

    text: Percentiles
    hint: Percentiles
    timestep_table: Percentiles
    step: Percentiles
    host_step: Percentiles
    host: Percentiles | None = None
    decode: Percentiles
    picture: Percentiles


class Parity(_Record, frozen=True, kw_only=True):
    """A contender's picture against eager PyTorch's, same weights, prompt, hint, seed and steps."""

    compared_with: str
    psnr_db: float
    """Of the float pictures, peak 1; at most 200, where they are the same."""
    ssim: float
    """Wang et al. 2004, Gaussian weights, sigma 1.5, mean over colours."""
    latent_errors: tuple[float, ...]
    """After each step, the largest difference over the largest value; none where a contender gives no latents away."""
    min_psnr_db: float
    """What is asked of this precision."""

    @property
    def is_met(self) -> bool:
        """Whether the picture is right."""
        return self.psnr_db >= self.min_psnr_db


class Memory(_Record, frozen=True, kw_only=True):
    """What a contender's process took."""

    peak_host_bytes: int
    """Most that was resident (VmHWM): libraries, mapped weights, loading and building in it included."""
    file_backed_bytes: int
    """Of what was resident at the end, pages of files (RssFile): the system may drop them, and processes share them."""
    peak_device_bytes: int | None
    """Most that it had of the GPU's memory, as the driver counts it, until its first pictures were drawn; None on a CPU
    and where the driver does not tell."""


class Measurement(_Record, frozen=True, kw_only=True):
    """What was measured of a contender that ran."""

    group: int
    """Contenders of one group took turns; the reference was in every group (``Scenario.reference_samples``)."""
    samples: StageSamples
    percentiles: StagePercentiles
    pictures_per_second: float
    """All pictures of the measured calls over their seconds."""
    load_seconds: float
    """Until the process could take a request."""
    first_request_seconds: float
    """The first call, which pays for whatever is done late: compilation, allocation, plans."""
    cold_start_seconds: float
    """From the start of the process to its first pictures: loading and the first request."""
    memory: Memory
    flops_per_picture: int | None
    """Of its own programs' matrix products, in the loop and out of it; of the plain export's for PyTorch; of the steps
    of the first call where steps are mixed. None where no graph tells."""
    flops_per_second: float | None
    """That over the median time of a picture."""
    parity: Parity | None
    """None for what the others are compared with, and where that did not run."""
    speedup_over_eager: Ratio | None
    """Of whole calls, over the faster eager contender; None where none ran."""
    step_speedup_over_eager: Ratio | None
    """Of the median step of each round."""
    speedup_over_compiled: Ratio | None = None
    """Of whole calls, over the fastest that torch.compile gives; None where none ran."""


class Contender(_Record, frozen=True, kw_only=True):
    """One way to run the model. One that did not run, or ran wrong, is here too."""

    name: str
    runtime: str
    """``pytorch``, ``onnxruntime``, ``openvino``, ..."""
    precision: str
    """``fp32``, ``fp16``, ..."""
    options: dict[str, str]
    """How it was tuned."""
    status: Status
    reason: str
    """Why it is not ok, in one line; empty where it is."""
    engine_bytes: int | None
    """On disk: the weights and programs that it loads."""
    build_seconds: float | None
    """Export and compilation ahead of time, as they took when they were done; None where nothing was built here."""
    measurement: Measurement | None
    """None where it failed. A wrong picture has one, but its speed is worth nothing."""


class Scenario(_Record, frozen=True, kw_only=True):
    """All contenders on one task."""

    name: str
    """Unique in the file: ``single stream``, ``offline, batch 4``, ``sweep, 10 steps``."""
    kind: Kind
    axis: Axis | None
    """What the sweep varies; None outside of one."""
    value: float | None
    """Where on that axis: pixels of a picture, pictures, steps or ControlNets."""
    setting: Setting
    reference: str | None
    """The contender that ran in every group; None where none ran at all."""
    reference_samples: tuple[tuple[float, ...], ...]
    """Its whole calls in each group, so that groups can be compared."""
    eager: str | None
    """The faster eager contender, which ratios are to."""
    compiled: str | None = None
    """The fastest contender of torch.compile."""
    contenders: tuple[Contender, ...]

    @property
    def failed(self) -> list[Contender]:
        """Contenders that did not run or ran wrong."""
        return [contender for contender in self.contenders if contender.status != "ok"]


class Report(_Record, frozen=True, kw_only=True):
    """The whole file. It is written anew after every scenario."""

    benchmark: Literal["pipeline"]
    schema_version: int
    created: str
    """UTC, ISO 8601, when the benchmark started."""
    command: str
    commit: Commit | None
    machine: Machine
    ceilings: tuple[Ceiling, ...]
    versions: dict[str, str]
    model: ModelSetting
    complete: bool
    """Whether every scenario that was asked for is in; false after an interruption."""
    scenarios: tuple[Scenario, ...]

    def scenario(self, name: str) -> Scenario:
        """The scenario called ``name``.

        Raises:
            KeyError: there is none.
        """
        for scenario in self.scenarios:
            if scenario.name == name:
                return scenario
        raise KeyError(name)


def save(report: Report, file: Path) -> None:
    """Writes the report as indented JSON, whole or not at all."""
    save_result(report, file)


def load(file: Path) -> Report:
    """Reads what ``save`` wrote.

    Raises:
        UserError: no such file, or it holds something else.
    """
    return load_result(file, Report, SCHEMA_VERSION, "controlrt bench")
