"""The bundled demo model: where its diffusers folders lie, and the scenes that it was trained on."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""Diffusers folder of the demo model."""

CONTROLNETS = {name: Path(__file__).parent / f"controlnet-{name}" for name in ("canny", "mask")}
"""Diffusers folders of its ControlNets, by name."""

ADAPTERS = {"color": Path(__file__).parent / "adapter-color"}
"""Diffusers folders of its T2I-Adapters, by name."""
