"""The demo model, built for calibration, and one calibration of it."""

from __future__ import annotations

import argparse

import pytest

from calibrations import OPTIONS, SOURCES, Calibrated
from controlrt.calibration.collect import collect
from controlrt.calibration.command import calibration_bundle
from controlrt.compiler.quantization.statistics import Statistics
from controlrt.engines.source_options import add_source_arguments, parse_sources
from controlrt.runtime.bundle import Bundle


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """The demo model, built for calibration."""
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)
    return calibration_bundle(parse_sources(parser.parse_args(SOURCES)), "pytest")


@pytest.fixture(scope="session")
def calibrated(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """Two cases of two steps, and one more that is kept for comparison."""
    file = tmp_path_factory.mktemp("calibrated") / "statistics.safetensors"
    collect(bundle, "demo", OPTIONS, file)
    return Calibrated(file, Statistics.load(file))
