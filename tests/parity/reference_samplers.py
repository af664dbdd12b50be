"""diffusers' own schedulers as the reference for sampler tables, in float32 as they are or in float64 throughout."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler
from numpy.typing import NDArray
from torch import Tensor

from controlrt.runtime.samplers import SamplerTable

Model = Callable[[Any, float], Any]
"""A stand-in for the UNet: scaled latents and timestep to output, for tensors and arrays alike."""

MODULES = {"torch": torch, "np": np}


def scheduler_class(name: str) -> Any:
    return DPMSolverSDEScheduler if name == "DPMSolverSDEScheduler" else getattr(diffusers, name)


class _Wide(ModuleType):
    """A module whose ``float32`` is float64."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


class _BrownianPath:
    """Increments over a step and its first half from one path, in place of torchsde's tree."""

    def __init__(self, draw: Callable[[], Tensor]) -> None:
        self.draw, self.last = draw, None

    def __call__(self, sigma: Tensor, following: Tensor) -> Tensor:
        if self.last is not None and torch.isclose(self.last[0], sigma):
            _, middle, increment = self.last
            increment = increment + self.draw() * (middle - following).sqrt()
            self.last = None
        else:
            increment = self.draw() * (sigma - following).sqrt()
            self.last = (sigma, following, increment)
        return increment / (sigma - following).sqrt()


@contextlib.contextmanager
def reference(cls: Any, draw: Callable[[], NDArray[np.float32]], *, wide: bool) -> Iterator[None]:
    """Lets ``cls`` draw its noise from ``draw``, and with ``wide`` compute in float64 whatever it does in float32."""
    module = importlib.import_module(cls.__module__)
    dtype = torch.float64 if wide else torch.float32

    def drawn(*_: Any, **__: Any) -> Tensor:
        return torch.from_numpy(draw()).to(dtype)

    replaced: dict[str, Any] = {}
    if hasattr(module, "randn_tensor"):
        replaced["randn_tensor"] = drawn
    if hasattr(module, "BrownianTreeNoiseSampler"):
        replaced["BrownianTreeNoiseSampler"] = lambda *_: _BrownianPath(drawn)
    if wide:
        replaced |= {name: _Wide(wrapped) for name, wrapped in MODULES.items() if hasattr(module, name)}
    saved = {name: getattr(module, name) for name in replaced}
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        for name, value in replaced.items():
            setattr(module, name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)
        for name, value in saved.items():
            setattr(module, name, value)


def their_trajectory(
    scheduler: Any, timesteps: Tensor, model: Model, told: NDArray[np.float64], start: NDArray[Any], **extra: Any
) -> list[NDArray[Any]]:
    """Latents after each call. The model is told ``told``; the scheduler gets its own timesteps."""
    latents, trajectory = torch.from_numpy(start), []
    for timestep, time in zip(timesteps, told, strict=True):
        output = model(scheduler.scale_model_input(latents, timestep), float(time))
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
        trajectory.append(latents.numpy())
    return trajectory


def our_trajectory(
    table: SamplerTable, model: Model, start: NDArray[Any], draw: Callable[[], NDArray[np.float32]]
) -> list[NDArray[Any]]:
    """Latents after each row of the table, in the precision of ``start``."""
    kind = start.dtype
    history, latents, trajectory = np.zeros((table.update.shape[1] - 1, *start.shape), kind), start, []
    for row in range(len(table)):
        output = model(table.input_scale[row].astype(kind) * latents, float(table.timesteps[row]))
        a, b, limit = table.clip[row].astype(kind)
        clipped = np.clip(a * latents + b * output, -limit, limit)
        noise = draw().astype(kind) if table.draws[row] else np.zeros_like(latents)
        seen = np.stack([latents, *history, output, noise, clipped])
        following = np.einsum("rc,c...->r...", table.update[row].astype(kind), seen)
        latents, history = following[0], following[1:]
        trajectory.append(latents)
    return trajectory
