"""The server on Ray Serve: as many replicas of each bundle as it takes, on as many machines, behind the interfaces of
the plain server.

Two kinds of deployments: ``bundle-NAME`` draws, one engine in each replica's process, on a GPU of its own where the
bundle needs one; ``interfaces``, a single replica, answers HTTP and holds the jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import ParameterError, ServiceError, UnknownNameError, UserError
from controlrt.runtime.manifest import Manifest
from controlrt.runtime.server.app import build_app
from controlrt.runtime.server.log import configure_log, log
from controlrt.runtime.server.messages import Submit
from controlrt.runtime.server.metrics import Metrics
from controlrt.runtime.server.policies import Policy
from controlrt.runtime.server.remote_service import LostError, NoReplicaError, RemoteService, Replicas
from controlrt.runtime.server.replica import Answer, Replica
from controlrt.runtime.server.security import read_api_keys
from controlrt.runtime.server.service import open_bundles
from controlrt.runtime.server.serving import drain
from controlrt.runtime.server.settings import Settings
from controlrt.runtime.server.worker import WorkerOptions

BUNDLES_VARIABLE = "CONTROLRT_BUNDLES"
"""Directories, as in PATH, for ``serve run`` without ``bundles=``."""
APPLICATION = "controlrt"
_INTERFACES = "interfaces"
_CONNECTIONS = 10_000
"""That are answered at once; each waits for a job, which is little work."""
_TARGET_ON_CPU = 2
"""Requests per replica that the autoscaler aims at: one that is drawn, one that is encoded meanwhile."""
_ROOM = 4
"""A replica takes so many times what the autoscaler aims at, so that its engine has a choice whom to draw next."""
_CHECK_SECONDS = 2.0
"""Between health checks: how long a dead replica may go unnoticed."""
_START_SECONDS = 0.2
"""Between two looks at replicas that are starting."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What is served, and with how many replicas.

    Raises:
        ParameterError: a count that is none, or counts that contradict each other.
    """

    bundles: tuple[Path, ...]
    """On every machine at the same place; the first is the default."""
    replicas: int | None = None
    """Of each bundle; 1 where nothing else is said."""
    min_replicas: int | None = None
    """Of each bundle, with ``max_replicas``; 0 lets go of one that nobody asks for."""
    max_replicas: int | None = None
    """As many as there are, at most, where requests wait."""
    gpus: float = 1.0
    """Of a replica of a bundle that needs a GPU; a fraction lets replicas share one."""
    threads: int | None = None
    """CPU cores of a replica of any other bundle; where None, this machine's cores divided among them all."""
    queue: int = 64
    """Requests that may wait for a replica of a bundle, beside those that its replicas have."""
    policy: Policy = "shortest"
    batch: int | None = None
    """As ``Engine``'s."""

    def __post_init__(self) -> None:
        if not self.bundles:
            raise ParameterError("bundles", "", f"a directory or more, here or in ${BUNDLES_VARIABLE}")
        for name, least in {"replicas": 1, "min_replicas": 0, "max_replicas": 1, "threads": 1, "queue": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ParameterError(name, value, f"at least {least}")
        if not self.gpus > 0:
            raise ParameterError("gpus", self.gpus, "more than 0")
        if self.max_replicas is None and self.min_replicas is not None:
            raise ParameterError("max_replicas", None, "given too where min_replicas is")
        if self.max_replicas is not None:
            if self.replicas is not None:
                raise ParameterError("replicas", self.replicas, "left out where max_replicas is given")
            if self.max_replicas < self.least:
                raise ParameterError("max_replicas", self.max_replicas, f"at least min_replicas, {self.least}")

    @property
    def least(self) -> int:
        """Replicas of a bundle that nobody asks for."""
        return 1 if self.min_replicas is None else self.min_replicas

    @property
    def most(self) -> int:
        """Replicas that a bundle may have."""
        return self.max_replicas or self.replicas or 1


def app(arguments: dict[str, Any]) -> Application:
    """For ``serve run controlrt.runtime.server.ray:app bundles=A,B``, and for ``args`` in a config file of Ray Serve.

    Args:
        arguments: fields of ``RayOptions`` and ``Settings``, as text or as they are, ``bundles`` separated by commas;
            and ``api_key_file``.

    Raises:
        UserError: an argument nobody knows, or a value that is none.
        BundleError: a bundle is missing, damaged or of another schema version.
    """
    given = dict(arguments)
    bundles = given.get("bundles", os.environ.get(BUNDLES_VARIABLE, "").replace(os.pathsep, ","))
    if isinstance(bundles, str):
        bundles = [each for each in bundles.split(",") if each]
    keys = given.pop("api_key_file", None)
    known = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (RayOptions, Settings)}
    names = {*known[RayOptions], *known[Settings], "api_key_file"} - {"api_keys"}
    for name in given:
        if name not in names:
            raise UnknownNameError("argument", name, sorted(names))
    limits = {name: value for name, value in given.items() if name in known[Settings]}
    options = {name: value for name, value in given.items() if name in known[RayOptions]}
    settings = _read(Settings, {**limits, "api_keys": read_api_keys(Path(keys)) if keys else ()})
    return build(_read(RayOptions, {**options, "bundles": bundles}), settings)


_Read = TypeVar("_Read", RayOptions, Settings)


def _read(kind: type[_Read], values: Mapping[str, Any]) -> _Read:
    """A dataclass of values that may be text."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def build(options: RayOptions, settings: Settings) -> Application:
    """The application, for ``serve.run``.

    Raises:
        BundleError: a bundle is missing, damaged or of another schema version.
        ParameterError: two bundles of one name.
    """
    bundles = open_bundles(options.bundles)
    on_cpu = sum(not bundle.manifest.on_gpu for bundle in bundles.values())
    threads = options.threads or max(1, (os.cpu_count() or 1) // (max(1, on_cpu) * options.most))
    drawing = {name: _drawing(name, bundle, threads, options, settings) for name, bundle in bundles.items()}
    interfaces = serve.deployment(serve.ingress()(Interfaces)).options(
        name=_INTERFACES,
        num_replicas=1,
        max_ongoing_requests=_CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.timeout,
        health_check_period_s=_CHECK_SECONDS,
        logging_config={"enable_access_log": False},  # the log of the interfaces has every request
    )
    manifests = {name: bundle.manifest for name, bundle in bundles.items()}
    return interfaces.bind(manifests, options, settings, drawing)


def _drawing(name: str, bundle: Bundle, threads: int, options: RayOptions, settings: Settings) -> Application:
    """The deployment of one bundle."""
    manifest = bundle.manifest
    on_gpu = manifest.on_gpu
    target = _target(manifest, options)
    scale: dict[str, Any] = {"num_replicas": options.most}
    if options.max_replicas is not None:
        limits = {"min_replicas": options.least, "max_replicas": options.max_replicas}
        scale = {"autoscaling_config": {**limits, "target_ongoing_requests": target}}
    deployment = serve.deployment(Replica).options(
        name=_deployment_of(name),
        **scale,
        max_ongoing_requests=_ROOM * target,
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": 1} if on_gpu else {"num_cpus": threads},
        graceful_shutdown_timeout_s=settings.timeout,
        health_check_period_s=_CHECK_SECONDS,
        logging_config={"enable_access_log": False},  # the log of the interfaces has every request
    )
    return deployment.bind(
        WorkerOptions(
            bundle=bundle.path.resolve(),
            policy=options.policy,
            batch=options.batch,
            threads=None if on_gpu else threads,
        )
    )


def _target(manifest: Manifest, options: RayOptions) -> int:
    """Requests per replica that the autoscaler aims at: as many as a GPU draws together."""
    if not manifest.on_gpu:
        return _TARGET_ON_CPU
    return min(options.batch or manifest.profile.batch.high, manifest.profile.batch.high)


def _deployment_of(bundle: str) -> str:
    return f"bundle-{bundle}"


class RayReplicas:
    """The replicas of one bundle, as Ray Serve routes to them. See ``Replicas``."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._draw = handle.options(method_name="draw", stream=True)

    async def draw(self, submit: Submit, seconds: float | None) -> AsyncGenerator[Answer, None]:
        """See ``Replicas``."""
        answers = self._draw.remote(submit, seconds)
        ended = False
        try:
            async for answer in answers:
                yield answer
            ended = True
        except DeploymentUnavailableError as error:
            ended = True
            raise NoReplicaError(error.message) from None
        except RayError as error:
            ended = True
            raise LostError(f"{type(error).__name__}: {error}") from error
        finally:
            if not ended:
                answers.cancel()


class Interfaces:
    """The deployment that answers HTTP: the plain server's application on a service whose engines are replicas.

    There is one replica of it, so that it knows every job by its id. It draws nothing: it reads requests, passes
    answers on and writes picture files, for which a process has the time of several GPUs.

    Args:
        bundles: manifests by name; the first is the default.
        options: of the replicas.
        settings: the limits, and the keys.
        drawing: the deployment of each bundle.
    """

    def __init__(
        self,
        bundles: Mapping[str, Manifest],
        options: RayOptions,
        settings: Settings,
        drawing: Mapping[str, DeploymentHandle],
    ) -> None:
        configure_log()
        self._options = options
        metrics = Metrics()
        replicas: dict[str, Replicas] = {name: RayReplicas(handle) for name, handle in drawing.items()}
        limits = self._limits(bundles, {})
        self._service = RemoteService(bundles, replicas, limits=limits, observer=metrics)
        self._application = build_app(self._service, settings, metrics)
        self._watching = asyncio.create_task(self._watch())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._application

    async def drain(self) -> None:
        """Takes no more requests; returns when all are finished, and those collected that were to be fetched later."""
        log("draining")
        await drain(self._application, self._service)

    async def _watch(self) -> None:
        """Keeps the service's condition up to date."""
        name = serve.get_replica_context().app_name
        while True:
            try:
                status = (await asyncio.to_thread(serve.status)).applications.get(name)
                if status is not None:  # or it is being deleted
                    bundles = self._service.bundles
                    self._service.condition = condition(status.deployments, bundles)
                    self._service.limits = self._limits(bundles, status.deployments)
            except Exception as error:  # the controller starts anew, say
                log("no word from Ray Serve's controller", logging.WARNING, error=error)
            await asyncio.sleep(_START_SECONDS if self._service.condition == "starting" else _CHECK_SECONDS)

    def _limits(
        self, bundles: Mapping[str, Manifest], deployments: Mapping[str, DeploymentStatusOverview]
    ) -> dict[str, int]:
        """Jobs of each bundle that may wait or run: what its replicas take, and the queue. Ray Serve's own limit,
        max_queued_requests, would also turn away a burst that comes before it has looked who has room."""
        limits = {}
        for name, manifest in bundles.items():
            found = deployments.get(_deployment_of(name))
            running = found.replica_states.get("RUNNING", 0) if found else 0
            replicas = max(running, self._options.least, 1)
            limits[name] = self._options.queue + replicas * _ROOM * _target(manifest, self._options)
        return limits


def condition(
    deployments: Mapping[str, DeploymentStatusOverview], bundles: Mapping[str, Manifest]
) -> Literal["starting", "ready", "failed"]:
    """Whether every bundle can be drawn with: one with a replica, or with none for want of requests."""
    found = [deployments[each] for each in map(_deployment_of, bundles) if each in deployments]
    if len(found) < len(bundles):
        return "starting"
    if any(each.status == "DEPLOY_FAILED" for each in found):
        return "failed"
    ready = all(each.replica_states.get("RUNNING") or each.status == "HEALTHY" for each in found)
    return "ready" if ready else "starting"


@contextlib.contextmanager
def running(application: Application, host: str, port: int) -> Iterator[DeploymentHandle]:
    """Runs an application on the Ray that this process has initialized, until the context is left.

    Yields:
        A handle of ``Interfaces``.

    Raises:
        ServiceError: a replica does not start.
    """
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    try:
        try:
            handle = serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise ServiceError(f"{error}; Ray's log of Serve says more") from None
        yield handle
    finally:
        serve.delete(APPLICATION)


def serve_on_ray(application: Application, host: str, port: int) -> None:
    """Answers requests until a signal says to end, and all that were accepted are answered.

    It joins the Ray cluster that RAY_ADDRESS names or that ``ray start`` has started on this machine, and starts one
    of this machine alone where there is none.

    Raises:
        ServiceError: a replica does not start.
        KeyboardInterrupt: a second SIGINT came.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a server reports to nobody unless told to
    ray.init(log_to_driver=True, logging_level=logging.WARNING)
    try:
        with running(application, host, port) as interfaces, _signals() as ended:
            print(f"http://{host}:{port} on Ray; what to ask: /docs", file=sys.stderr)
            ended.wait()
            interfaces.drain.remote().result()
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second SIGINT is a KeyboardInterrupt."""
    ended = threading.Event()

    def hear(number: int, _: object) -> None:
        if ended.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        ended.set()

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
