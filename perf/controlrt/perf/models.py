"""The models that benchmarks run on: none is downloaded. Everything heavy is done in processes of its own, once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.runtime.errors import ControlRTError, UserError
from controlrt.runtime.storage import atomic_directory, cache_root, lock, sha256_file

CONTROL = "canny"
"""The name of the one ControlNet of every model."""


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A diffusers folder and its ControlNet's."""

    name: str
    model: Path
    controlnet: Path

    @property
    def weight_bytes(self) -> int:
        """Bytes of UNet and ControlNet in float32, about."""
        files = [*(self.model / "unet").glob("*.safetensors"), *self.controlnet.glob("*.safetensors")]
        return sum(_float32_bytes(file) for file in files)


def bench_directory() -> Path:
    """Where benchmarks keep what they build."""
    return cache_root() / "bench"


def prepare_model(name: str) -> BenchModel:
    """The model called ``name``, one of MODELS; built on first use.

    Raises:
        UserError: this installation has no demo model.
        ControlRTError: the model cannot be built.
    """
    return MODELS[name]()


def _demo() -> BenchModel:
    if not (MODEL_DIR / "model_index.json").is_file():
        raise UserError("this installation has no demo model; use --model sd15, or install from the repository")
    return BenchModel(name="demo", model=MODEL_DIR, controlnet=CONTROLNETS[CONTROL])


def _sd15() -> BenchModel:
    builder = Path(__file__).with_name("sd15.py")
    target = bench_directory() / f"sd15-{sha256_file(builder)[:12]}"
    with lock(target):
        if not target.is_dir():
            print("building a random model of Stable Diffusion 1.5's size, once (6 GB)", file=sys.stderr, flush=True)
            with atomic_directory(target) as partial:
                _run_module(["controlrt.perf.sd15", str(partial)], "build of the sd15 model")
    return BenchModel(name="sd15", model=target / "model", controlnet=target / CONTROL)


MODELS: dict[str, Callable[[], BenchModel]] = {"demo": _demo, "sd15": _sd15}
"""Models by the name that --model takes: the bundled one, and random weights of Stable Diffusion 1.5's size."""


def _run_module(arguments: Sequence[str], what: str) -> None:
    process = subprocess.Popen([sys.executable, "-m", *arguments])
    try:
        exit_code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if exit_code < 0:
        raise ControlRTError(f"{what}: the process was killed by signal {-exit_code}; was there enough memory?")
    if exit_code:
        raise ControlRTError(f"{what}: the process failed with exit code {exit_code} (see above)")


def _float32_bytes(file: Path) -> int:
    """What the tensors of a safetensors file take in float32, from its header alone."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    widths = {"F32": 4, "F16": 2, "BF16": 2}
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    return sum(4 * (end - start) // widths[t["dtype"]] for t in tensors for start, end in [t["data_offsets"]])
