"""controlrt serve: its options, and a whole server on the demo bundle."""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlrt.runtime import ControlNetPipeline
from controlrt.runtime.commands import guarded, run_command, serve
from controlrt.runtime.server.settings import Settings


def command(*argv: str) -> int:
    return guarded(lambda: run_command(serve, argv, "controlrt serve"), argv)


def test_limits_are_those_of_the_settings() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = vars(parser.parse_args(["bundle"]))
    for name in ("max_body_bytes", "max_pixels", "max_steps", "max_pictures", "max_prompt_characters", "timeout"):
        assert arguments[name] == getattr(Settings(), name)
    assert (arguments["host"], arguments["port"], arguments["queue"]) == ("127.0.0.1", 8000, 64)


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.1", False), ("x", False)],
)
def test_knows_which_addresses_others_reach(host: str, alone: bool) -> None:
    assert serve.is_loopback(host) == alone


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--api-key-file", "nowhere"], "--api-key-file nowhere cannot be read"),
        (["--max-steps", "0"], "max_steps is 0, but must be more than 0"),
        (["--port", "65536"], "port is 65536, but must be from 0 to 65535"),
        (["--port", "0"], "no-such-bundle"),
        (["--queue", "0"], "queue is 0, but must be at least 1"),
        (["--batch", "0"], "--batch is 0, but must be at least 1"),
        (["--threads", "-3"], "threads is -3, but must be from 1 to 1024"),
        (["--max-replicas", "2"], "--max-replicas means nothing without --ray; leave it out"),
    ],
)
def test_says_what_is_wrong_in_a_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
    assert command("no-such-bundle", *argv) != 0
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1


@pytest.mark.bundle
def test_a_gpu_for_bundles_that_need_none(demo_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
    assert command(str(demo_bundle), "--port", "0", "--device", "1") == 2
    assert "device is '1', but must be left out: all of these bundles run on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--device", "1"], "--device means nothing with --ray, which gives each replica a GPU; leave it out"),
        (["--port", "0"], "--port is 0, but Ray Serve must be told which; name one"),
        (["--replicas", "2", "--max-replicas", "4"], "replicas is 2, but must be left out where max_replicas is given"),
        ([], "no-such-bundle"),
    ],
)
def test_says_what_is_wrong_with_ray(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
    installed = importlib.util.find_spec("ray") is not None
    assert command("no-such-bundle", "--ray", *argv) != 0
    said = capsys.readouterr().err.splitlines()[-1]  # pytest shows warnings of Ray's too
    assert (says if installed else "this needs ray: pip install 'controlrt[ray]'") in said


def test_names_the_extra_that_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("controlrt.runtime.server.")]:
        monkeypatch.delitem(sys.modules, name)
    assert command("bundle") == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: this needs (fastapi|starlette): pip install 'controlrt\[serve\]'\n", said)


@pytest.mark.bundle
def test_a_picture_over_http_is_the_pipelines(demo_bundle: Path, demo: ControlNetPipeline) -> None:
    """From a command line to pixels, through a process that draws."""
    pytest.importorskip("fastapi", reason="without the extra [serve] there is no server")
    hint = np.zeros((512, 512, 3), np.uint8)
    hint[128:384, 128:384] = 255
    buffer = io.BytesIO()
    Image.fromarray(hint).save(buffer, "PNG")
    arguments = {"prompt": "a red star", "num_inference_steps": 2, "guidance_scale": 5.0, "seed": 11}
    body = {**arguments, "image": {"mask": base64.b64encode(buffer.getvalue()).decode()}, "model": demo_bundle.name}
    code = "import sys; from controlrt.runtime.commands import *; from controlrt.runtime.commands import serve\n"
    code += "if __name__ == '__main__': sys.exit(guarded(lambda: run_command(serve, sys.argv[1:], 'serve'), []))"
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(demo_bundle), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        said = next(line for line in server.stderr if " at http" in line)
        address = said.split(" at ")[1].split(";")[0]
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{address}/readyz")
                break
            except OSError:
                time.sleep(0.1)
        asked = urllib.request.Request(
            f"{address}/v1/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked) as response:
            answer = json.load(response)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()
    [drawn] = demo(image={"mask": hint}, **arguments).images
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))), np.int16)
    assert np.abs(found - np.asarray(drawn)).max() <= 1
    assert answer["seeds"] == [11]
