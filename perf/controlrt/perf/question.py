"""What a command line of ``controlrt bench BUNDLE`` asks for, checked before anything runs."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from controlrt.demo import CONTROLNETS
from controlrt.engines.backends import Device
from controlrt.perf.machine import Machine, installed_versions
from controlrt.perf.models import CONTROL, MODELS, BenchModel, prepare_model
from controlrt.perf.peers.contenders import NamedBundle, Peer, all_peers, choose_peers
from controlrt.perf.scenarios import Task, parse_size, plan_tasks
from controlrt.runtime.bundle import read_manifest
from controlrt.runtime.commands import named_values
from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError
from controlrt.runtime.manifest import MANIFEST_NAME, Manifest
from controlrt.runtime.profile import ShapeProfile
from controlrt.runtime.samplers.names import find_sampler

PROFILE = "512x512"
DEFAULT_MODEL = "demo"
WARM_UPS: dict[Device, int] = {"cpu": 1, "cuda": 3}
"""Rounds before the measured ones, where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A benchmark to run. ``model`` builds what it has to."""

    name: str
    source: str | None
    """None for one of MODELS."""
    controls: Mapping[str, str] | None
    named: NamedBundle | None
    profile: ShapeProfile | None
    """Of the bundle that was named."""
    batch: str
    """Pictures per call that bundles are built for."""
    tasks: tuple[Task, ...]
    peers: tuple[Peer, ...]
    device: Device
    threads: int
    rounds: int
    warm_ups: int
    timeout: float

    def __post_init__(self) -> None:
        lowest = {"--rounds": (self.rounds, 1), "--warm-ups": (self.warm_ups, 0), "--threads": (self.threads, 1)}
        for name, (found, low) in lowest.items():
            if found < low:
                raise ParameterError(name, found, f"at least {low}")
        if self.timeout <= 0:
            raise ParameterError("--timeout", self.timeout, "more than 0")

    def model(self) -> BenchModel:
        """The checkpoint; one of MODELS is built on first use.

        Raises:
            UserError, ControlRTError: it cannot be.
        """
        if self.source is None or self.controls is None:
            return prepare_model(self.name)
        return BenchModel(name=self.name, source=self.source, controls=self.controls)


def ask(arguments: argparse.Namespace, machine: Machine) -> Question:
    """Reads the command line.

    Raises:
        UserError: one of its kinds for whatever cannot be; nothing has run then.
    """
    manifest = None if arguments.bundle is None else _manifest(arguments.bundle)
    name, source, controls = _model(arguments, manifest)
    known = _known_controls(name, controls, manifest)
    width, height = parse_size(arguments.profile or PROFILE)
    if manifest is not None and arguments.profile is None:
        width, height = manifest.profile.default_size
    if arguments.steps < 1:
        raise ParameterError("--steps", arguments.steps, "at least 1")
    find_sampler(arguments.sampler)
    single = Task(
        name="single stream",
        kind="single-stream",
        width=width,
        height=height,
        steps=(arguments.steps,),
        sampler=arguments.sampler,
        controls=_chosen_controls(arguments.control, known),
    )
    tasks = plan_tasks(
        single,
        known_controls=known,
        batches=arguments.batches,
        steps_mix=arguments.steps_mix,
        sweeps=arguments.sweep,
    )
    largest = max(task.batch for task in tasks)
    for task in tasks:
        if manifest is not None:
            manifest.profile.check(task.width, task.height, task.batch)
    device = _device(arguments.device, machine)
    named = None
    if manifest is not None:
        named = NamedBundle(path=arguments.bundle, backend=manifest.backend, precision=manifest.precision)
    only = [pattern for pattern in arguments.only.split(",") if pattern]
    return Question(
        name=name,
        source=source,
        controls=controls,
        named=named,
        profile=None if manifest is None else manifest.profile,
        batch="1" if largest == 1 else f"1-{largest}",
        tasks=tuple(tasks),
        peers=tuple(choose_peers(only, all_peers(device, machine.isa, named))),
        device=device,
        threads=arguments.threads,
        rounds=arguments.rounds,
        warm_ups=WARM_UPS[device] if arguments.warm_ups is None else arguments.warm_ups,
        timeout=arguments.timeout,
    )


def _manifest(path: Path) -> Manifest:
    if not (path / MANIFEST_NAME).is_file():
        raise UserError(
            f"{path} is neither a bundle nor a benchmark; make one with build-engines, or see controlrt bench --help"
        )
    return read_manifest(path)


def _model(arguments: argparse.Namespace, manifest: Manifest | None) -> tuple[str, str | None, dict[str, str] | None]:
    """Name, source and ControlNets; the last two are None for one of MODELS."""
    given = named_values(arguments.controlnet, "--controlnet", "NAME=SOURCE")
    if manifest is not None and arguments.model is None:
        controls = {control.name: control.source for control in manifest.controls} | given
        name = arguments.bundle.resolve().name
        return _checked(name, manifest.model.source, controls)
    model = arguments.model or DEFAULT_MODEL
    if model in MODELS:
        if given:
            raise UserError(f"--controlnet goes with a checkpoint that --model names; {model} has its own")
        return model, None, None
    digest = hashlib.sha256(str(Path(model).resolve()).encode()).hexdigest()[:8]
    return _checked(f"{Path(model).name.removesuffix('.safetensors')}-{digest}", model, given)


def _checked(name: str, source: str, controls: dict[str, str]) -> tuple[str, str, dict[str, str]]:
    for what, place in {"model": source, **controls}.items():
        looks_local = place.startswith((".", "/", "~")) or place.count("/") != 1
        if looks_local and not Path(place).expanduser().exists():
            raise UserError(
                f"{what} {place!r} does not exist; --model takes {', '.join(MODELS)}, or a checkpoint, which needs "
                "--controlnet NAME=SOURCE"
            )
    if not controls:
        raise UserError("nothing to compare without a ControlNet: name one with --controlnet NAME=SOURCE")
    return name, source, controls


def _known_controls(name: str, controls: Mapping[str, str] | None, manifest: Manifest | None) -> tuple[str, ...]:
    if manifest is not None:
        return tuple(control.name for control in manifest.controls if not control.control_types)
    if controls is not None:
        return tuple(controls)
    return tuple(CONTROLNETS) if name == DEFAULT_MODEL else (CONTROL,)


def _chosen_controls(given: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """In the order of the bundle; the first where none is named."""
    if not known:
        raise UserError("the bundle has no ControlNet; build one with: build-engines --controlnet NAME=SOURCE")
    names = [name.strip() for name in given.split(",") if name.strip()] or [known[0]]
    for name in names:
        if name not in known:
            raise UnknownNameError("control", name, known)
    return tuple(name for name in known if name in names)


def _device(given: str, machine: Machine) -> Device:
    """PyTorch's: a GPU where there is one and PyTorch was built for it."""
    version = installed_versions(("torch",)).get("torch", "")
    usable = bool(machine.gpus) and not version.endswith("+cpu")
    if given == "cuda" and not usable:
        raise UserError("--device cuda: there is no NVIDIA GPU here, or PyTorch is built without CUDA")
    return "cuda" if given == "cuda" or (given == "auto" and usable) else "cpu"
