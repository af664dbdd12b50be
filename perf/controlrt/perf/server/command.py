"""Measure a running server: requests at random moments, step by step beside whole requests; overload, a long soak.

``controlrt serve`` runs in a process of its own, and everything goes over HTTP. Requests arrive as in the server
scenario of MLPerf inference (Reddi et al. 2020, arXiv 1911.02549): a Poisson process that waits for nobody.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from controlrt.perf.demo_bundle import PROFILE, named_or_demo
from controlrt.perf.machine import commit, installed_versions, this_machine
from controlrt.perf.scratch import scratch_directory
from controlrt.perf.server.results import SCHEMA_VERSION, ServerReport, Setting, save
from controlrt.perf.server.server_table import header, table
from controlrt.perf.server.site import Site
from controlrt.perf.server.workload import STEPS, Workload
from controlrt.perf.targets import missed, verdicts
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError
from controlrt.runtime.machine import usable_cores
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.server.policies import POLICIES
from controlrt.runtime.storage import check_writable

PARTS = ("capacity", "mixed", "overhead", "overload", "shutdown", "soak")
"""In the order in which they run."""
POLICY, BASELINE = "shortest", "batch"
VERSIONS = ("fastapi", "httpx", "uvicorn")
SOAK_POOL = 24
"""Distinct requests of the soak."""
_NEED_CAPACITY = ("mixed", "overload")
_NUMBERS = {
    "requests": (240, "of one block of the mixed load"),
    "pairs": (2, "of blocks, A B B A, of the mixed load and of capacity"),
    "capacity-requests": (36, "of one block of capacity"),
    "rounds": (100, "of overhead, for each number of steps and encoding"),
    "overload-requests": (600, "that arrive at overload"),
    "shutdown-requests": (12, "under way at SIGTERM"),
    "soak": (2000, "of the soak"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "bundle", nargs="?", type=Path, metavar="BUNDLE", help=f"the demo model's at {PROFILE}, built in the cache"
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="PART,...", help="what is measured, some of %(default)s"
    )
    parser.add_argument("--policy", choices=POLICIES, default=POLICY, help="of the server (%(default)s)")
    parser.add_argument("--baseline", choices=POLICIES, default=BASELINE, help="of the server beside it (%(default)s)")
    parser.add_argument("--batch", type=int, help="pictures that take a step together; the server's default")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads of each server (all cores)")
    parser.add_argument("--control", metavar="NAME", help="the ControlNet that is on (the first)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and requests (%(default)s)")
    parser.add_argument(
        "--capacity", type=float, metavar="RATE", help="requests per second, where that part is not to be measured"
    )
    for name, (default, what) in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON, after every part")


def run(arguments: argparse.Namespace) -> int:
    """Measures every part, prints its table and writes the file; 1 where a target was missed."""
    parts = _parts(arguments)
    for package in VERSIONS:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"this needs {package}: pip install 'controlrt[bench,serve]'")
    machine = this_machine()
    if machine.is_busy:
        print(
            f"warning: load {machine.load_average} on {machine.cores} cores: others run here, and every number is "
            "worth less for it; measure again when the machine is idle",
            file=sys.stderr,
        )
    if arguments.output is not None:
        check_writable(arguments.output)
    with scratch_directory("server") as scratch:
        bundle = named_or_demo(arguments.bundle, "controlrt bench server")
        manifest = read_manifest(bundle)
        site = _site(arguments, bundle, manifest, scratch)
        report = ServerReport(
            benchmark="server",
            schema_version=SCHEMA_VERSION,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            command=shlex.join(["controlrt", *sys.argv[1:]]),
            commit=commit(Path(__file__).parent),
            machine=machine,
            versions=installed_versions() | installed_versions(VERSIONS),
            setting=_setting(arguments, site, manifest),
            complete=False,
        )
        print(header(report), flush=True)
        for part in parts:
            found = _measure(part, arguments, site, manifest, report)
            report = msgspec.structs.replace(report, **{part: found}, complete=part == parts[-1])
            print(f"\n{table(found)}", flush=True)
            if arguments.output is not None:
                save(report, arguments.output)
    print(f"\n{verdicts(report.targets())}")
    not_met = missed(report.targets())
    if not_met:
        print(f"error: missed: {not_met}", file=sys.stderr)
    return 1 if not_met else 0


def _measure(
    part: str, arguments: argparse.Namespace, site: Site, manifest: Manifest, report: ServerReport
) -> msgspec.Struct:
    from controlrt.perf.server.capacity import measure_capacity
    from controlrt.perf.server.expected import draw_expected
    from controlrt.perf.server.mixed import measure_mixed
    from controlrt.perf.server.overhead import measure_overhead
    from controlrt.perf.server.overload import measure_overload
    from controlrt.perf.server.shutdown import measure_shutdown
    from controlrt.perf.server.soak import measure_soak

    def rate() -> float:
        if report.capacity is None:
            return float(arguments.capacity)
        return report.capacity.requests_per_second[site.policy]

    measures: dict[str, Callable[[], Any]] = {
        "capacity": lambda: measure_capacity(site, requests=arguments.capacity_requests, pairs=arguments.pairs),
        "mixed": lambda: measure_mixed(site, capacity=rate(), requests=arguments.requests, pairs=arguments.pairs),
        "overhead": lambda: measure_overhead(site, rounds=arguments.rounds),
        "overload": lambda: measure_overload(site, capacity=rate(), requests=arguments.overload_requests),
        "shutdown": lambda: measure_shutdown(site, requests=arguments.shutdown_requests),
        "soak": lambda: measure_soak(
            site,
            draw_expected(site, [control.name for control in manifest.controls], SOAK_POOL),
            requests=arguments.soak,
        ),
    }
    found: msgspec.Struct = measures[part]()
    return found


def _parts(arguments: argparse.Namespace) -> list[str]:
    """Those that are asked for, in order, with what they need.

    Raises:
        UserError: one that is none, a number that cannot be.
    """
    asked = [name.strip() for name in arguments.parts.split(",") if name.strip()]
    for name in asked:
        if name not in PARTS:
            raise UnknownNameError("part of --parts", name, PARTS)
    for option in (*_NUMBERS, "threads"):
        found = getattr(arguments, option.replace("-", "_"))
        if found < 1:
            raise ParameterError(f"--{option}", found, "at least 1")
    if arguments.capacity is not None and not arguments.capacity > 0:
        raise ParameterError("--capacity", arguments.capacity, "more than 0")
    if arguments.policy == arguments.baseline:
        raise ParameterError("--baseline", arguments.baseline, "another policy than --policy")
    needed = arguments.capacity is None and any(name in asked for name in _NEED_CAPACITY)
    found = [name for name in PARTS if name in asked or (name == "capacity" and needed)]
    if not found:
        raise ParameterError("--parts", arguments.parts, f"some of {', '.join(PARTS)}")
    return found


def _site(arguments: argparse.Namespace, bundle: Path, manifest: Manifest, scratch: Path) -> Site:
    controls = [control.name for control in manifest.controls]
    if not controls:
        raise UserError(f"{bundle} has no ControlNet; build one with: build-engines --controlnet NAME=SOURCE")
    if arguments.control is not None and arguments.control not in controls:
        raise UnknownNameError("control", arguments.control, controls)
    width, height = manifest.profile.default_size
    return Site(
        bundle=bundle,
        workload=Workload(width=width, height=height, control=arguments.control or controls[0], seed=arguments.seed),
        policy=arguments.policy,
        baseline=arguments.baseline,
        threads=arguments.threads,
        batch=arguments.batch,
        scratch=scratch,
    )


def _setting(arguments: argparse.Namespace, site: Site, manifest: Manifest) -> Setting:
    return Setting(
        bundle=site.bundle.resolve().name,
        named=arguments.bundle is not None,
        backend=manifest.backend,
        precision=manifest.precision,
        width=site.workload.width,
        height=site.workload.height,
        control=site.workload.control,
        steps=STEPS,
        policy=site.policy,
        baseline=site.baseline,
        batch=site.batch,
        threads=site.threads,
        seed=site.workload.seed,
    )
