"""The runtime never needs PyTorch: not to import, not to draw, not to be installed."""

from __future__ import annotations

import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import controlrt.runtime

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(controlrt.runtime.__path__, "controlrt.runtime.")
    if not module.name.endswith("__main__")
)
BLOCKED = ("torch", "diffusers", "transformers", "onnx")
EXTRA = ("fastapi", "gradio", "isal", "prometheus_client", "pydantic", "ray", "starlette", "uvicorn")
"""What the server's web layer needs: the extras [serve], [ui] and [ray], which not every installation has."""
INSTALLED_ALONE = importlib.util.find_spec("torch") is None


def python(code: str) -> str:
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_module_imports_with_torch_blocked() -> None:
    assert len(MODULES) > 15
    python(
        f"import sys, importlib\nsys.modules.update(dict.fromkeys({BLOCKED}))\n"
        f"for name in {MODULES}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        f"        if error.name not in {EXTRA}: raise"
    )


@pytest.mark.bundle
def test_a_whole_picture_with_torch_blocked(demo_bundle: Path) -> None:
    printed = python(
        f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n"
        "from controlrt.runtime import ControlNetPipeline\nimport numpy as np\n"
        f"pipe = ControlNetPipeline.load({str(demo_bundle)!r})\n"
        "out = pipe('a red star', {'mask': np.zeros((512, 512), np.uint8)}, num_inference_steps=1, seed=0)\n"
        "print(out.images[0].size, any(sys.modules.get(name) for name in ('torch', 'diffusers', 'onnx')))"
    )
    assert printed.split("\n")[0] == "(512, 512) False"


def test_import_is_quick() -> None:
    """Under half a second of this process's own time, since others may be using the machine; the best of five."""
    code = (
        "import time; t = time.process_time(); from controlrt.runtime import ControlNetPipeline;"
        "print(time.process_time() - t)"
    )
    assert min(float(python(code)) for _ in range(5)) < 0.5


@pytest.mark.skipif(not INSTALLED_ALONE, reason="the development environment holds PyTorch; make test runs both")
def test_installation_is_small() -> None:
    """Measured by the Makefile before the test tools came: the package and what it needs, without extras."""
    for name in BLOCKED:
        assert importlib.util.find_spec(name) is None
    kib = int(Path(sys.prefix, "installed-kib").read_text())
    assert 10_000 < kib < 400 * 1024
