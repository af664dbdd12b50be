"""Serve bundles over HTTP: many requests drawn together, step by step."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import ipaddress
import sys
from collections.abc import Iterable
from pathlib import Path

from controlrt.runtime.errors import ParameterError, UserError
from controlrt.runtime.machine import check_threads
from controlrt.runtime.server.policies import POLICIES
from controlrt.runtime.server.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="directories; the first is the default")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for every one (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one, and says which (%(default)s)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="one key a line; every request must show one")
    parser.add_argument("--ui", action="store_true", help="with a web page, to draw controls and pictures")
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument("--queue", type=int, default=64, help="jobs of one bundle that may wait or run (%(default)s)")
    drawing.add_argument("--policy", choices=POLICIES, default="shortest", help="which job goes first (%(default)s)")
    drawing.add_argument("--batch", type=int, help="pictures that are drawn together; as many as pay by default")
    drawing.add_argument("--threads", type=int, help="CPU threads of each worker; all cores where not given")
    drawing.add_argument(
        "--device", type=int, action="append", metavar="N", help="a GPU, as CUDA counts them; may be repeated (0)"
    )
    limits = parser.add_argument_group("limits of one request")
    given = Settings()
    limits.add_argument("--max-body-bytes", type=int, default=given.max_body_bytes, help="of its body (%(default)s)")
    limits.add_argument(
        "--max-pixels", type=int, default=given.max_pixels, help="of all pictures that it brings (%(default)s)"
    )
    limits.add_argument("--max-steps", type=int, default=given.max_steps, help="(%(default)s)")
    limits.add_argument("--max-pictures", type=int, default=given.max_pictures, help="drawn for it (%(default)s)")
    limits.add_argument(
        "--max-prompt-characters", type=int, default=given.max_prompt_characters, help="of each prompt (%(default)s)"
    )
    limits.add_argument("--timeout", type=float, default=given.timeout, help="seconds it may take (%(default)s)")

    beyond = parser.add_argument_group("beyond one machine")
    beyond.add_argument("--ray", action="store_true", help="draw with replicas on Ray Serve")
    beyond.add_argument("--replicas", type=int, metavar="N", help="of each bundle, with --ray (1)")
    beyond.add_argument("--min-replicas", type=int, metavar="N", help="of each bundle, with --max-replicas (1)")
    beyond.add_argument("--max-replicas", type=int, metavar="N", help="as many as there are while requests wait")
    beyond.add_argument("--gpus-per-replica", type=float, metavar="X", help="a fraction lets replicas share one (1)")


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal says to end."""
    settings = _settings(arguments)
    check_threads(arguments.threads)
    if arguments.batch is not None and arguments.batch < 1:
        raise ParameterError("--batch", arguments.batch, "at least 1")
    if not settings.api_keys and not is_loopback(arguments.host):
        print(f"warning: anybody who reaches {arguments.host} can draw; see --api-key-file", file=sys.stderr)
    if arguments.ray:
        _serve_on_ray(arguments, settings)
        return 0
    _refuse(arguments, _ONLY_WITH_RAY, "without --ray")
    from uvloop import new_event_loop

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(arguments, settings))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    return 0


_ONLY_WITH_RAY = ("replicas", "min_replicas", "max_replicas", "gpus_per_replica")


def _refuse(arguments: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """Refuses options that would mean nothing."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} means nothing {where}; leave it out")


def _settings(arguments: argparse.Namespace) -> Settings:
    from controlrt.runtime.server.security import read_api_keys

    if arguments.ui:
        importlib.import_module("controlrt.runtime.server.ui.mount")  # where it is not installed, nothing starts
    keys = read_api_keys(arguments.api_key_file) if arguments.api_key_file else ()
    return Settings(
        max_body_bytes=arguments.max_body_bytes,
        max_pixels=arguments.max_pixels,
        max_steps=arguments.max_steps,
        max_pictures=arguments.max_pictures,
        max_prompt_characters=arguments.max_prompt_characters,
        timeout=arguments.timeout,
        api_keys=keys,
    )


def _serve_on_ray(arguments: argparse.Namespace, settings: Settings) -> None:
    from controlrt.runtime.server.ray import RayOptions, build, serve_on_ray

    _refuse(arguments, ("device",), "with --ray, which gives each replica a GPU")
    if arguments.port == 0:
        raise UserError("--port is 0, but Ray Serve must be told which; name one")
    options = RayOptions(
        bundles=tuple(arguments.bundles),
        replicas=arguments.replicas,
        min_replicas=arguments.min_replicas,
        max_replicas=arguments.max_replicas,
        gpus=1.0 if arguments.gpus_per_replica is None else arguments.gpus_per_replica,
        threads=arguments.threads,
        queue=arguments.queue,
        policy=arguments.policy,
        batch=arguments.batch,
    )
    serve_on_ray(build(options, settings), arguments.host, arguments.port)


async def _serve(arguments: argparse.Namespace, settings: Settings) -> None:
    from controlrt.runtime.server.app import build_app
    from controlrt.runtime.server.log import configure_log
    from controlrt.runtime.server.metrics import Metrics
    from controlrt.runtime.server.service import open_service
    from controlrt.runtime.server.serving import open_socket, serve

    metrics = Metrics()
    with open_socket(arguments.host, arguments.port) as bound:
        async with open_service(
            arguments.bundles,
            queue=arguments.queue,
            policy=arguments.policy,
            devices=arguments.device,
            threads=arguments.threads,
            batch=arguments.batch,
            observer=metrics,
        ) as service:
            configure_log()
            host, port = bound.getsockname()[:2]
            address = f"[{host}]" if ":" in host else host
            app = build_app(service, settings, metrics, ui=arguments.ui)
            shows = "what to ask: /docs" + ("; the page: /ui" if arguments.ui else "")
            print(f"{', '.join(service.bundles)} at http://{address}:{port}; {shows}", file=sys.stderr)
            await serve(app, service, bound)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
