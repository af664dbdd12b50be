"""Whether a build in int8 or fp8 is good enough: its pictures beside those of float32."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from controlrt.compiler.quantization.statistics import Case
from controlrt.compiler.reference import rms_error
from controlrt.demo import MODEL_DIR
from controlrt.engines.likeness import psnr, ssim
from controlrt.engines.quantization.options import QuantizationOptions
from controlrt.engines.quantization.replay import replay
from controlrt.runtime.bundle import Bundle
from controlrt.runtime.errors import BuildError, NotFiniteError, UserError
from controlrt.runtime.executors import Executor
from controlrt.runtime.manifest import Quality, SceneQuality
from controlrt.runtime.pipeline import ControlNetPipeline

_log = logging.getLogger(__name__)


def measure_quality(bundle: Bundle, cases: Sequence[Case], executor: Executor | None = None) -> Quality:
    """Draws every case with ``bundle``.

    Args:
        bundle: what is measured.
        cases: what it draws.
        executor: what runs it, where that is open already; closed afterwards.

    Raises:
        UserError: there is none.
        BuildError: latents that are not finite.
    """
    if not cases:
        raise UserError(
            "the statistics hold no pictures to compare with; take them with: controlrt calibrate --unseen 4"
        )
    latents, decibels, likeness, drawn = [], [], [], []
    with ControlNetPipeline(bundle, executor=executor) as pipeline:
        for case in cases:
            try:
                found, pictures = replay(pipeline, case.arguments, case.hints)
            except NotFiniteError as error:
                raise BuildError(
                    f"{bundle.manifest.precision} gives latents that are not finite; keep layers out with --keep"
                ) from error
            drawn.append(pictures)
            latents.append([rms_error(mine, its) for mine, its in zip(found, case.latents, strict=True)])
            pairs = [
                (mine / np.float32(255), its / np.float32(255))
                for mine, its in zip(pictures, case.pictures, strict=True)
            ]
            decibels += [psnr(*pair) for pair in pairs]
            likeness += [ssim(*pair) for pair in pairs]
    steps = max(map(len, latents))
    return Quality(
        pictures=len(decibels),
        latent_errors=tuple(float(np.mean([e[step] for e in latents if len(e) > step])) for step in range(steps)),
        psnr_db=float(np.mean(decibels)),
        lowest_psnr_db=min(decibels),
        ssim=float(np.mean(likeness)),
        scenes=_follow_scenes(bundle, cases, drawn),
    )


def _follow_scenes(bundle: Bundle, cases: Sequence[Case], drawn: Sequence[NDArray[np.uint8]]) -> SceneQuality | None:
    """How well the demo model's pictures follow its own scenes, which are square; None of other models and pictures."""
    scenes = [
        case.scene for case in cases if case.scene is not None and case.pictures.shape[1] == case.pictures.shape[2]
    ]
    if Path(bundle.manifest.model.source).resolve() != MODEL_DIR or not scenes or len(scenes) != len(cases):
        return None
    if find_spec("cv2") is None:
        _log.warning("scenes are not scored without OpenCV: pip install 'controlrt[annotate]'")
        return None
    from controlrt.demo.scenes import sample_scene
    from controlrt.demo.scores import Score, score

    found: list[tuple[Score, Score]] = []
    for drawn_by, case, pictures in zip(scenes, cases, drawn, strict=True):
        scene = sample_scene(np.random.default_rng(drawn_by))
        found += [(score(scene, mine), score(scene, its)) for mine, its in zip(pictures, case.pictures, strict=True)]
    ours, float32 = zip(*found, strict=True)
    return SceneQuality(
        iou=float(np.mean([each.iou for each in ours])),
        float32_iou=float(np.mean([each.iou for each in float32])),
        colours=float(np.mean([each.both_colours for each in ours])),
        float32_colours=float(np.mean([each.both_colours for each in float32])),
    )


def pass_gate(quality: Quality, options: QuantizationOptions) -> None:
    """Lets through what is good enough.

    Raises:
        BuildError: it is not; says what to relax.
    """
    if quality.psnr_db < options.min_psnr_db:
        raise BuildError(
            f"{options.precision} draws pictures {quality.psnr_db:.1f} dB from float32's, on average of "
            f"{quality.pictures}; at least {options.min_psnr_db:g} are asked for; keep layers out with --keep (or, in "
            "int8 on a CPU, --quality-budget 0.05), calibrate on more cases, or ask for less with --min-psnr"
        )
