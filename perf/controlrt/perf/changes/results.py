"""What ``controlrt bench changes`` found: the schema of its JSON file. Seconds throughout.

ChangesReport      one file: machine, versions, command, what was asked for
  Change           calls that differ from the one before in one thing
  SecondControl    what two ControlNets take together, beside each alone
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from controlrt.perf.changes.walk import CURVE, FIRST_USE, LAYERS, SCALE, WINDOW
from controlrt.perf.machine import Commit, Machine
from controlrt.perf.result_file import load_result, save_result
from controlrt.perf.statistics import Interval, Ratio
from controlrt.perf.targets import Target

SCHEMA_VERSION = 1
ADDED_SECONDS = 0.001
JUDGED = (SCALE, LAYERS, CURVE, WINDOW, FIRST_USE)
"""Changes that may add no more than that."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the schema: immutable, unknown keys are refused."""


class Setting(_Record, frozen=True, kw_only=True):
    """What every call of a file has in common."""

    bundle: str
    """Its name."""
    named: bool
    """Whether it was named on the command line; otherwise it is the demo model's, built for benchmarks."""
    backend: str
    precision: str
    width: int
    height: int
    steps: int
    sampler: str
    threads: int
    rounds: int
    seed: int
    """Of the order of calls and of what they change."""


class Change(_Record, frozen=True, kw_only=True):
    """Calls of one kind."""

    name: str
    """What differs from the call before; ``nothing`` for what the others are compared with."""
    host_seconds: tuple[float, ...]
    """Of each round, the call but for its networks: checking, binding, filling and the way out. Of ``nothing``, the
    median of the round's."""
    added: Interval | None
    """Median over rounds of what it is more than ``nothing`` in the same round; None for that itself."""
    stages: dict[str, float]
    """Medians of the stages that it is made of."""
    network_seconds: float
    """Median of what programs took before the loop: a new prompt's text encoder, a new control picture's encoder."""
    step_seconds: float
    """Median of all steps."""


class SecondControl(_Record, frozen=True, kw_only=True):
    """Calls without control, with one of two ControlNets, and with both."""

    first: str
    second: str
    step_seconds: dict[str, tuple[float, ...]]
    """Of each round the median step, by what is on: ``none``, ``first``, ``second``, ``both``."""
    own_seconds: dict[str, float] | None
    """Median seconds of the ControlNets' own programs in a step of the calls with both; None where no clock tells, as
    on a GPU, or where both are fused with the UNet."""
    ratio: Ratio
    """What both add to a step over what the first adds and the second adds."""
    over_own: Ratio | None
    """What both add to a step over what their own programs take in it."""


class ChangesReport(_Record, frozen=True, kw_only=True):
    """The whole file."""

    benchmark: Literal["changes"]
    schema_version: int
    created: str
    """UTC, ISO 8601, when the benchmark started."""
    command: str
    commit: Commit | None
    machine: Machine
    versions: dict[str, str]
    setting: Setting
    changes: tuple[Change, ...]
    second: SecondControl | None
    """None where the bundle has one ControlNet."""

    def targets(self) -> list[Target]:
        """What is asked of changes of scale and window."""
        return [
            Target(name=f"{change.name} adds, seconds", found=change.added.value, bound=ADDED_SECONDS, at_most=True)
            for change in self.changes
            if change.name in JUDGED and change.added is not None
        ]


def save(report: ChangesReport, file: Path) -> None:
    """Writes the report as indented JSON, whole or not at all."""
    save_result(report, file)


def load(file: Path) -> ChangesReport:
    """Reads what ``save`` wrote.

    Raises:
        UserError: no such file, or it holds something else.
    """
    return load_result(file, ChangesReport, SCHEMA_VERSION, "controlrt bench changes")
