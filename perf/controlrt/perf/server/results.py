"""What ``controlrt bench server`` found: the schema of its JSON file. Seconds and bytes throughout.

ServerReport      one file: machine, versions, command, what was asked for
  Capacity        requests per second that the server manages where somebody always waits
  Mixed           latencies at a part of that, step by step beside whole requests
  Overhead        what HTTP, queue and process cost a request
  Overload        what is still done where three times as many arrive
  Soak            thousands of requests of every kind, with bad ones, and what became of them
  Shutdown        SIGTERM while requests are drawn
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from controlrt.perf.machine import Commit, Machine
from controlrt.perf.result_file import load_result, save_result
from controlrt.perf.statistics import Interval, Ratio
from controlrt.perf.targets import Target

SCHEMA_VERSION = 2
P99_RATIO = 3.0
THROUGHPUT_RATIO = 0.95
OVERHEAD_SECONDS = 0.005
GOODPUT_RATIO = 0.9
REJECTION_SECONDS = 0.05
MEMORY_GROWTH = 0.03


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the schema: immutable, unknown keys are refused."""


class LatencyPercentiles(_Record, frozen=True, kw_only=True):
    """Of requests, with intervals by a bootstrap over blocks of neighbouring arrivals."""

    p50: Interval
    p90: Interval
    p99: Interval


class Setting(_Record, frozen=True, kw_only=True):
    """What every part of a file runs."""

    bundle: str
    """Its name."""
    named: bool
    """Whether it was named on the command line; otherwise it is the demo model's, built for the benchmark."""
    backend: str
    precision: str
    width: int
    height: int
    control: str
    steps: tuple[int, ...]
    """Of the mixed load, as many requests of each."""
    policy: str
    """Of the server that is measured."""
    baseline: str
    """Of the one beside it."""
    batch: int | None
    """Pictures that take a step together, at most, in both; None for the server's default."""
    threads: int
    seed: int


class CapacityBlock(_Record, frozen=True, kw_only=True):
    """One run of a closed loop."""

    policy: str
    requests: int
    seconds: float


class Capacity(_Record, frozen=True, kw_only=True):
    """Throughput of the mixed load with ``clients`` clients, each of which sends its next request when it has its
    answer."""

    clients: int
    blocks: tuple[CapacityBlock, ...]
    """In the order in which they ran."""
    requests_per_second: dict[str, float]
    """By policy: all requests over all seconds."""
    ratio: float
    """The policy's over the baseline's."""

    def targets(self) -> Iterator[Target]:
        """What is asked of it: at 70% load either server keeps up, so that only here throughput can be lost."""
        name = "capacity over the baseline's"
        yield Target(name=name, found=self.ratio, bound=THROUGHPUT_RATIO, at_most=False)


class Request(_Record, frozen=True, kw_only=True):
    """What became of one request of an open loop."""

    steps: int
    due: float
    """Seconds after the start of its block."""
    latency: float
    """From then to the end of its answer."""
    status: int
    """Of HTTP; 0 where none came."""


class MixedBlock(_Record, frozen=True, kw_only=True):
    """One stretch of arrivals at one server, from an empty queue to an empty queue."""

    policy: str
    pair: int
    """Blocks of one pair have the same arrivals and requests."""
    requests: tuple[Request, ...]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last answer."""
        last = max(each.due + each.latency for each in self.requests)
        return last - min(each.due for each in self.requests)


class StepsComparison(_Record, frozen=True, kw_only=True):
    """Requests of one number of steps at both servers."""

    steps: int
    requests: int
    """At each server."""
    latency: LatencyPercentiles
    baseline_latency: LatencyPercentiles
    p50_ratio: Ratio
    """The baseline's over the policy's: how many times better."""
    p90_ratio: Ratio
    p99_ratio: Ratio


class Mixed(_Record, frozen=True, kw_only=True):
    """Poisson arrivals of the mixed load, the policy's server and the baseline's by turns."""

    rate: float
    """Requests per second, on average."""
    load: float
    """Of the policy's capacity."""
    blocks: tuple[MixedBlock, ...]
    by_steps: tuple[StepsComparison, ...]
    throughput: float
    """Requests per second, over all blocks of the policy's server."""
    baseline_throughput: float
    failed: int
    """Requests that were not answered with a picture."""

    @property
    def throughput_ratio(self) -> float:
        """The policy's over the baseline's."""
        return self.throughput / self.baseline_throughput

    def targets(self) -> Iterator[Target]:
        """What is asked of it."""
        shortest = min(self.by_steps, key=lambda each: each.steps)
        name = f"p99 of {shortest.steps}-step requests, times better"
        yield Target(name=name, found=shortest.p99_ratio.value, bound=P99_RATIO, at_most=False)
        name = "throughput over the baseline's"
        yield Target(name=name, found=self.throughput_ratio, bound=THROUGHPUT_RATIO, at_most=False)
        yield Target(name="mixed load: requests without a picture", found=self.failed, bound=0, at_most=True)


class OverheadSplit(_Record, frozen=True, kw_only=True):
    """Medians of what a request takes more than a call, by where; they add up to the whole but for what medians do."""

    transport: float
    """HTTP, pictures to and from files and base64, to the worker and back; the client's own share too. A call has its
    checks and its PIL pictures here."""
    before: float
    """Until the first step: text encoders, control pictures, noise."""
    steps: float
    decode: float


class CallOverhead(_Record, frozen=True, kw_only=True):
    """Requests of one kind, each beside the same call of the pipeline in this process."""

    steps: int
    encoding: str
    """Of the answer's picture."""
    request_seconds: tuple[tuple[float, ...], ...]
    """Of each start of a server and a pipeline."""
    call_seconds: tuple[tuple[float, ...], ...]
    """Of the same prompts and seeds, to pixels in 8 bits."""
    overhead: Interval
    """Median of their differences."""
    split: OverheadSplit


class Overhead(_Record, frozen=True, kw_only=True):
    """One request at a time, and nothing else."""

    calls: tuple[CallOverhead, ...]

    def targets(self) -> Iterator[Target]:
        """What is asked of it."""
        for each in self.calls:
            name = f"overhead of {each.steps} steps, {each.encoding}, seconds"
            yield Target(name=name, found=each.overhead.value, bound=OVERHEAD_SECONDS, at_most=True)


class Overload(_Record, frozen=True, kw_only=True):
    """Poisson arrivals of the mixed load at ``load`` times the capacity."""

    rate: float
    load: float
    capacity: float
    """Requests per second."""
    queue: int
    """Requests that the server takes at once."""
    deadline: float
    """Seconds that every request gives the server."""
    requests: tuple[Request, ...]
    seconds: float
    """From the first arrival to the last answer."""
    goodput: float
    """Requests per second that were drawn within their deadline."""
    steps_goodput: float
    """Steps of those per second, over what the capacity comes to: a policy may do more requests than the capacity by
    choosing short ones, but no more steps."""
    done: int
    rejected: int
    expired: int
    failed: int
    """Answered otherwise, or not at all."""
    rejection_p99: float | None
    """Seconds until a 429 was there; None where there was none."""

    def targets(self) -> Iterator[Target]:
        """What is asked of it."""
        name = "goodput at overload, over the capacity"
        yield Target(name=name, found=self.goodput / self.capacity, bound=GOODPUT_RATIO, at_most=False)
        if self.rejection_p99 is not None:
            name = "p99 until a request is rejected, seconds"
            yield Target(name=name, found=self.rejection_p99, bound=REJECTION_SECONDS, at_most=True)
        yield Target(name="overload: requests lost", found=self.failed, bound=0, at_most=True)


class Resident(_Record, frozen=True, kw_only=True):
    """Memory at one moment."""

    seconds: float
    """After the start."""
    answered: int
    resident_bytes: int
    """Of the server and its workers together, without pages of files."""


class Soak(_Record, frozen=True, kw_only=True):
    """Requests of every kind, by many clients."""

    requests: int
    clients: int
    seconds: float
    outcomes: dict[str, dict[str, int]]
    """By kind of request, how many ended how: ``drawn``, ``refused 422``, ``gone``, ..."""
    lost: tuple[str, ...]
    """Requests whose answer was none that they may have, in a line each."""
    mixed_up: tuple[str, ...]
    """Pictures that are not those of their requests, in a line each."""
    compared: int
    """Pictures that were."""
    lowest_psnr_db: float | None
    """Of a picture against the pipeline's own; None where none was compared."""
    between_psnr_db: float
    """Of the two expected pictures that are most alike: what a mixed up picture would have at most."""
    resident: tuple[Resident, ...]
    growth: float | None
    """Of memory over the second half: median of its last tenth of samples over that of its first, less one; None where
    the system does not tell."""
    left_over: int
    """Requests that the server still held when all clients had gone."""

    def memory(self) -> str:
        """How it grew, in words."""
        return "is not told by the system" if self.growth is None else f"grew by {self.growth:.1%} over the second half"

    def targets(self) -> Iterator[Target]:
        """What is asked of it."""
        yield Target(name="soak: requests lost", found=len(self.lost) + self.left_over, bound=0, at_most=True)
        yield Target(name="soak: pictures mixed up", found=len(self.mixed_up), bound=0, at_most=True)
        if self.growth is not None:
            yield Target(name="soak: growth of memory", found=self.growth, bound=MEMORY_GROWTH, at_most=True)


class Shutdown(_Record, frozen=True, kw_only=True):
    """SIGTERM while requests are drawn and wait."""

    accepted: int
    """Requests that the server had when it was told to end."""
    answered: int
    """Of those, with their pictures."""
    later: dict[str, int]
    """What requests got that came afterwards, by status; 0 where nobody listened any more."""
    exit_code: int
    seconds: float
    """From the signal to the end of the process."""

    def targets(self) -> Iterator[Target]:
        """What is asked of it."""
        unanswered = self.accepted - self.answered
        yield Target(name="shutdown: accepted requests unanswered", found=unanswered, bound=0, at_most=True)
        yield Target(name="shutdown: exit code", found=abs(self.exit_code), bound=0, at_most=True)


class ServerReport(_Record, frozen=True, kw_only=True):
    """The whole file. It is written anew after every part; a part that was not asked for is None."""

    benchmark: Literal["server"]
    schema_version: int
    created: str
    """UTC, ISO 8601, when the benchmark started."""
    command: str
    commit: Commit | None
    machine: Machine
    versions: dict[str, str]
    setting: Setting
    complete: bool
    """Whether every part that was asked for is in."""
    capacity: Capacity | None = None
    mixed: Mixed | None = None
    overhead: Overhead | None = None
    overload: Overload | None = None
    soak: Soak | None = None
    shutdown: Shutdown | None = None

    def targets(self) -> list[Target]:
        """Those of all parts that are in."""
        parts = (self.capacity, self.mixed, self.overhead, self.overload, self.soak, self.shutdown)
        return [target for part in parts if part is not None for target in part.targets()]


def save(report: ServerReport, file: Path) -> None:
    """Writes the report as indented JSON, whole or not at all."""
    save_result(report, file)


def load(file: Path) -> ServerReport:
    """Reads what ``save`` wrote.

    Raises:
        UserError: no such file, or it holds something else.
    """
    return load_result(file, ServerReport, SCHEMA_VERSION, "controlrt bench server")
