"""The models that benchmarks run on: none is downloaded. Everything heavy is done in processes of its own, once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlrt.demo import CONTROLNETS, MODEL_DIR
from controlrt.export.checkpoint import clip_tokenizer
from controlrt.perf.model_sizes import SIZES
from controlrt.runtime.errors import ControlRTError, UserError
from controlrt.runtime.storage import atomic_directory, cache_root, lock, sha256_file

CONTROL = "canny"
"""The name of the one ControlNet of every model that the ablation runs."""
MODELS = ("demo", *SIZES)
"""Models by the name that --model takes: the bundled one, and random weights of published sizes."""


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A checkpoint and its ControlNets: diffusers folders, single files or hub ids."""

    name: str
    source: str
    controls: Mapping[str, str]
    """By name."""

    @property
    def model(self) -> Path:
        """The diffusers folder, where it is one."""
        return Path(self.source)

    @property
    def controlnet(self) -> Path:
        """The folder of the ControlNet that the ablation runs."""
        return Path(self.controls[CONTROL])

    @property
    def weight_bytes(self) -> int:
        """Bytes of UNet and one ControlNet in float32, about."""
        files = [*(self.model / "unet").glob("*.safetensors"), *self.controlnet.glob("*.safetensors")]
        return sum(_float32_bytes(file) for file in files)

    def files(self, controls: Sequence[str]) -> list[Path]:
        """The weights of the whole pipeline with these controls; empty for a hub id."""
        folders = [Path(self.source), *(Path(self.controls[name]) for name in controls)]
        return [file for folder in folders for file in _weights(folder)]

    def float32_bytes(self, controls: Sequence[str]) -> int:
        """What the whole pipeline with these controls takes in float32, about; 0 for a hub id."""
        return sum(_float32_bytes(file) for file in self.files(controls) if file.suffix == ".safetensors")


def bench_directory() -> Path:
    """Where benchmarks keep what they build."""
    return cache_root() / "bench"


def prepare_model(name: str) -> BenchModel:
    """The model called ``name``, one of MODELS; built on first use.

    Raises:
        UserError: this installation has no demo model.
        ControlRTError: the model cannot be built.
    """
    return _demo() if name == "demo" else _random(name)


def _demo() -> BenchModel:
    if not (MODEL_DIR / "model_index.json").is_file():
        raise UserError("this installation has no demo model; use --model sd15, or install from the repository")
    controls = {name: str(path) for name, path in CONTROLNETS.items()}
    return BenchModel(name="demo", source=str(MODEL_DIR), controls=controls)


def _random(name: str) -> BenchModel:
    size = SIZES[name]
    target = bench_directory() / f"{name}-{_recipe(name)}"
    with lock(target):
        if not target.is_dir():
            what = f"a random model of {size.title}'s size, once ({size.disk_gb} GB)"
            print(f"building {what}", file=sys.stderr, flush=True)
            with atomic_directory(target) as partial:
                _run_module(["controlrt.perf.random_model", name, str(partial)], f"build of the {name} model")
    return BenchModel(name=name, source=str(target / "model"), controls={CONTROL: str(target / CONTROL)})


def _recipe(name: str) -> str:
    """Digest of what decides a random model: its configs, and how it is made."""
    code = [sha256_file(file) for file in (Path(__file__).with_name("random_model.py"), Path(clip_tokenizer.__file__))]
    return hashlib.sha256(f"{SIZES[name]}{code}{sha256_file(clip_tokenizer.MERGES)}".encode()).hexdigest()[:12]


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


def _weights(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    folders = [source / part for part in parts] if (source / "model_index.json").is_file() else [source]
    found = []
    for folder in folders:
        files = sorted(folder.glob("*.safetensors"))
        whole = [file for file in files if ".fp16." not in file.name and "non_ema" not in file.name]
        found += whole or files
    return found


def _float32_bytes(file: Path) -> int:
    """What the tensors of a safetensors file take in float32, from its header alone."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    widths = {"F32": 4, "F16": 2, "BF16": 2}
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    return sum(
        4 * (end - start) // widths[t["dtype"]]
        for t in tensors
        if t["dtype"] in widths
        for start, end in [t["data_offsets"]]
    )
