"""A small calibration of the demo model, as several tests share it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from controlrt.calibration.cases import CollectOptions
from controlrt.compiler.quantization.statistics import Statistics

SOURCES = ["--batch", "1-4"]
"""The demo model as ``demo_bundle`` has it, so that both have one export."""
OPTIONS = CollectOptions(cases=2, steps=2, size=(512, 512), unseen=1)


@dataclass(frozen=True)
class Calibrated:
    """A finished calibration of scenes of the demo."""

    file: Path
    statistics: Statistics
