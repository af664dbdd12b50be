"""What was seen so far of what one layer reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from controlrt.compiler.quantization.histogram import Histogram
from controlrt.compiler.quantization.statistics import BUCKETS, LayerStatistics, bucket_of
from controlrt.runtime.errors import CalibrationError


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Grows with every launch; see ``LayerStatistics`` for what the arrays are."""

    channel_amax: NDArray[np.float32]
    bucket_amax: NDArray[np.float32]
    histogram: Histogram

    @classmethod
    def of(cls, channels: int) -> Gathered:
        """Nothing yet."""
        return cls(
            channel_amax=np.zeros(channels, np.float32),
            bucket_amax=np.zeros(BUCKETS, np.float32),
            histogram=Histogram(),
        )

    @classmethod
    def restored(cls, layer: LayerStatistics) -> Gathered:
        """Goes on from what was seen before."""
        return cls(
            channel_amax=layer.channel_amax.copy(),
            bucket_amax=layer.bucket_amax.copy(),
            histogram=Histogram.restored(layer.histogram, layer.limit),
        )

    def add(self, layer: str, timestep: float, amax: NDArray[np.float32], sample: NDArray[np.float32]) -> None:
        """Folds one launch in.

        Args:
            layer: how a message names it.
            timestep: of the step.
            amax: (channels,), the largest magnitudes.
            sample: of the values.

        Raises:
            CalibrationError: values that are infinite or not a number.
        """
        if not np.isfinite(amax).all():
            raise CalibrationError(
                f"layer {layer} reads values at timestep {timestep:g} that are infinite or not a number, in float32; "
                "its weights, or those before it, are damaged or too large"
            )
        bucket = bucket_of(timestep)
        np.maximum(self.channel_amax, amax, out=self.channel_amax)
        self.bucket_amax[bucket] = max(self.bucket_amax[bucket], amax.max())
        self.histogram.add(bucket, sample)

    def statistics(self) -> LayerStatistics:
        """As they are now; arrays are shared."""
        return LayerStatistics(
            channel_amax=self.channel_amax,
            bucket_amax=self.bucket_amax,
            histogram=self.histogram.counts,
            limit=self.histogram.limit,
        )
