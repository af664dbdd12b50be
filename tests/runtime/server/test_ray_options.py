"""What is asked of Ray Serve, without a Ray that runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from controlrt.runtime.errors import ParameterError, UnknownNameError, UserError
from fake_service import fake_manifest

pytest.importorskip("ray.serve", reason="without the extra [ray] there is no Ray Serve")

from controlrt.runtime.server.ray import RayOptions, app, condition

SOME = (Path("some"),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bundles": ()}, r"bundles is '', but must be a directory or more, here or in \$CONTROLRT_BUNDLES"),
        ({"replicas": 0}, "replicas is 0, but must be at least 1"),
        ({"gpus": 0.0}, r"gpus is 0\.0, but must be more than 0"),
        ({"min_replicas": 2}, "max_replicas is None, but must be given too where min_replicas is"),
        ({"replicas": 2, "max_replicas": 3}, "replicas is 2, but must be left out where max_replicas is given"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is 2, but must be at least min_replicas, 3"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        RayOptions(**{"bundles": SOME, **options})  # type: ignore[arg-type]


def test_how_many_replicas() -> None:
    for options, least, most in (
        (RayOptions(bundles=SOME), 1, 1),
        (RayOptions(bundles=SOME, replicas=3), 1, 3),
        (RayOptions(bundles=SOME, max_replicas=3), 1, 3),
        (RayOptions(bundles=SOME, min_replicas=0, max_replicas=3), 0, 3),
    ):
        assert (options.least, options.most) == (least, most)


def test_arguments_of_serve_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTROLRT_BUNDLES", raising=False)
    with pytest.raises(ParameterError, match="CONTROLRT_BUNDLES"):
        app({})
    with pytest.raises(UnknownNameError, match=r"unknown argument 'max_step'.*did you mean 'max_steps'"):
        app({"bundles": "some", "max_step": "9"})
    with pytest.raises(UserError, match="replicas: Input should be a valid integer"):
        app({"bundles": "some", "replicas": "many"})
    with pytest.raises(ParameterError, match="max_steps is 0"):
        app({"bundles": "some", "max_steps": "0"})


@pytest.mark.bundle
def test_applications(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (
        {"bundles": str(demo_bundle), "replicas": "2", "timeout": "30"},
        {"bundles": [str(demo_bundle)], "min_replicas": 0, "max_replicas": 4, "threads": 1},
    ):
        assert app(arguments) is not None
    monkeypatch.setenv("CONTROLRT_BUNDLES", str(demo_bundle))
    assert app({}) is not None


@pytest.mark.parametrize(
    ("status", "running", "expected"),
    [
        ("HEALTHY", 1, "ready"),
        ("HEALTHY", 0, "ready"),  # scaled to zero
        ("UPDATING", 0, "starting"),
        ("UNHEALTHY", 1, "ready"),
        ("UNHEALTHY", 0, "starting"),
        ("DEPLOY_FAILED", 0, "failed"),
    ],
)
def test_condition(status: str, running: int, expected: str) -> None:
    bundles = {"one": fake_manifest(), "two": fake_manifest()}
    two = SimpleNamespace(status=status, replica_states={"RUNNING": running})
    well = SimpleNamespace(status="HEALTHY", replica_states={"RUNNING": 1})
    assert condition({"bundle-one": well, "bundle-two": two}, bundles) == expected  # type: ignore[dict-item]
    assert condition({"bundle-one": well}, bundles) == "starting"
