"""Measure what a changed scale, window, prompt or picture costs the host between calls, and a second ControlNet."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from controlrt.perf.changes.changes_table import table
from controlrt.perf.changes.meter import Meter
from controlrt.perf.changes.results import SCHEMA_VERSION, ChangesReport, SecondControl, Setting, save
from controlrt.perf.changes.second_control import measure_second_control
from controlrt.perf.changes.single_changes import measure_changes
from controlrt.perf.changes.walk import Subject, check_rounds, walk
from controlrt.perf.demo_bundle import PROFILE, named_or_demo
from controlrt.perf.machine import commit, installed_versions, this_machine
from controlrt.perf.scratch import scratch_directory
from controlrt.perf.targets import missed, verdicts
from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.errors import ParameterError, UserError
from controlrt.runtime.machine import usable_cores
from controlrt.runtime.manifest import Control, Manifest
from controlrt.runtime.storage import check_writable

ROUNDS, STEPS = 25, 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "bundle", nargs="?", type=Path, metavar="BUNDLE", help=f"the demo model's at {PROFILE}, built in the cache"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="each has every change once (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of every call (%(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads (all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of calls (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and writes the file; 1 where a change of scale or window costs too much."""
    for option in ("steps", "threads"):
        if getattr(arguments, option) < 1:
            raise ParameterError(f"--{option}", getattr(arguments, option), "at least 1")
    if arguments.seed < 0:
        raise ParameterError("--seed", arguments.seed, "at least 0")
    check_rounds(arguments.steps, arguments.rounds)
    if arguments.output is not None:
        check_writable(arguments.output)
    bundle = named_or_demo(arguments.bundle, "controlrt bench changes")
    machine = this_machine()
    if machine.is_busy:
        print(
            f"warning: load {machine.load_average} on {machine.cores} cores: others run here, and every number is "
            "worth less for it; measure again when the machine is idle",
            file=sys.stderr,
        )
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with scratch_directory("changes"), ControlNetPipeline.load(bundle, threads=arguments.threads) as pipeline:
        manifest = pipeline.bundle.manifest
        controls = _controlnets(manifest)
        if not controls:
            raise UserError(f"{bundle} has no ControlNet; build one with: build-engines --controlnet NAME=SOURCE")
        width, height = manifest.profile.default_size
        subject = Subject(width=width, height=height, steps=arguments.steps)
        meter, seed = Meter(pipeline), arguments.seed
        turns = walk(subject, controls[0].name, controls[0].layers, rounds=arguments.rounds, seed=seed)
        report = ChangesReport(
            benchmark="changes",
            schema_version=SCHEMA_VERSION,
            created=created,
            command=shlex.join(["controlrt", *sys.argv[1:]]),
            commit=commit(Path(__file__).parent),
            machine=machine,
            versions=installed_versions(),
            setting=Setting(
                bundle=bundle.resolve().name,
                named=arguments.bundle is not None,
                backend=manifest.backend,
                precision=manifest.precision,
                width=width,
                height=height,
                steps=arguments.steps,
                sampler=subject.sampler,
                threads=arguments.threads,
                rounds=arguments.rounds,
                seed=seed,
            ),
            changes=measure_changes(meter, turns, arguments.rounds),
            second=_second(meter, subject, controls, manifest, arguments),
        )
    if arguments.output is not None:
        save(report, arguments.output)
    print(f"{table(report)}\n\n{verdicts(report.targets())}")
    not_met = missed(report.targets())
    if not_met:
        print(f"error: missed: {not_met}", file=sys.stderr)
    return 1 if not_met else 0


def _second(
    meter: Meter, subject: Subject, controls: list[Control], manifest: Manifest, arguments: argparse.Namespace
) -> SecondControl | None:
    if len(controls) < 2:
        return None
    programs = [manifest.stage(control.part, "step") for control in controls[:2]]
    return measure_second_control(
        meter,
        subject,
        (controls[0].name, controls[1].name),
        tuple("" if program is None else program.name for program in programs),  # type: ignore[arg-type]
        rounds=arguments.rounds,
        seed=arguments.seed,
    )


def _controlnets(manifest: Manifest) -> list[Control]:
    """Those that a call names by their own name."""
    return [each for each in manifest.controls if each.kind == "controlnet" and not each.control_types]
