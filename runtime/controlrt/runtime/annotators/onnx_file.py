"""Annotators that somebody trained: any ONNX file that turns a picture into a picture, such as a depth estimator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlrt.runtime.annotators.annotator import Annotator, Parameter, Pixels
from controlrt.runtime.annotators.working_size import three_channels
from controlrt.runtime.errors import SourceError, UnknownNameError
from controlrt.runtime.machine import check_threads

if TYPE_CHECKING:
    import onnxruntime as ort

TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
DEFAULT_RESOLUTION = 512
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What most networks that were trained from ImageNet's weights subtract from and divide pixels in [0, 1] by."""

PARAMETERS = (
    Parameter(
        name="processor_res",
        alias="resolution",
        kind="integer",
        default=DEFAULT_RESOLUTION,
        minimum=1,
        maximum=8192,
        help="shorter side of what the network sees, where its graph leaves that open",
    ),
    Parameter(
        name="input_size", kind="size", default="", help="size of what the network sees, in place of processor_res"
    ),
    Parameter(
        name="multiple", kind="integer", default=32, minimum=1, maximum=1024, help="what open sides are rounded to"
    ),
    Parameter(
        name="mean", kind="numbers", default=IMAGENET_MEAN, minimum=-255, maximum=255, help="taken from pixels in 0..1"
    ),
    Parameter(
        name="std",
        kind="numbers",
        default=IMAGENET_STD,
        minimum=1e-6,
        maximum=255,
        help="what they are divided by then",
    ),
    Parameter(
        name="channel_order",
        kind="choice",
        default="rgb",
        choices=("rgb", "bgr"),
        help="of the network's input and output",
    ),
    Parameter(name="output_name", kind="text", default="", help="which output; the first where not given"),
    Parameter(
        name="output_range",
        kind="choice",
        default="stretch",
        choices=("stretch", "unit", "signed", "logit"),
        help="least to largest become 0..1; is 0..1 already; is -1..1; goes through a sigmoid",
    ),
    Parameter(name="invert", kind="flag", default=False, help="turns the result over, such as depth into nearness"),
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the graph's input lies: its name, type, where the channels are, and its sizes where they are fixed."""

    name: str
    dtype: type[np.generic]
    channels_first: bool
    channels: int
    height: int | None
    width: int | None


def open_annotator(name: str, path: str | Path, *, threads: int | None = None) -> Annotator:
    """An annotator called ``name`` that runs an ONNX file on the CPU.

    The graph has one input, a batch of one picture of one or three channels, first or last, of floats or bytes, and an
    output (1, height, width), (1, 1 or 3, height, width) or (1, height, width, 1 or 3). The batch may be missing.

    Raises:
        SourceError: no such file, not an ONNX graph, or one with other inputs.
        ParameterError: threads that no CPU has.
    """
    check_threads(threads)
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"annotator {name!r}: {path} is not a file; give an ONNX file: --annotator {name}=FILE.onnx")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        reason = str(error).splitlines()[0]
        raise SourceError(f"annotator {name!r}: ONNX Runtime cannot load {path} ({reason})") from error
    layout = read_layout(session, f"annotator {name!r}: {path}")
    return Annotator(
        name=name,
        summary=f"the network in {path}",
        function=partial(_run, session, layout, f"annotator {name!r}: {path}"),
        parameters=PARAMETERS,
    )


def read_layout(session: ort.InferenceSession, what: str) -> Layout:
    """The layout of the graph's only input.

    Raises:
        SourceError: several inputs, or one that is no picture.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(one.name for one in inputs)
        raise SourceError(f"{what} has inputs {names}; an annotator has one, the picture")
    (tensor,) = inputs
    shape = [side if isinstance(side, int) and side > 0 else None for side in tensor.shape]
    if len(shape) != 4 or shape[0] not in (1, None):
        raise SourceError(
            f"{what} has an input of shape {tensor.shape}; an annotator's is (1, 3, height, width) or alike"
        )
    if tensor.type not in TYPES:
        raise SourceError(f"{what} has an input of type {tensor.type}; allowed: {', '.join(TYPES)}")
    if shape[1] in (1, 3):
        first, channels, (height, width) = True, shape[1], shape[2:]
    elif shape[3] in (1, 3):
        first, channels, (height, width) = False, shape[3], shape[1:3]
    elif shape[1] is None:  # nothing is said of the channels; most graphs have three of them first
        first, channels, (height, width) = True, 3, shape[2:]
    else:
        raise SourceError(f"{what} has an input of shape {tensor.shape}; an annotator's has 1 or 3 channels")
    return Layout(
        name=tensor.name,
        dtype=TYPES[tensor.type],
        channels_first=first,
        channels=channels or 3,
        height=height,
        width=width,
    )


def _run(
    session: ort.InferenceSession,
    layout: Layout,
    what: str,
    pixels: Pixels,
    *,
    resolution: int,
    input_size: str,
    multiple: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channel_order: str,
    output_name: str,
    output_range: str,
    invert: bool,
) -> Pixels:
    """See ``open_annotator``; the result has the size of ``pixels``."""
    import cv2

    outputs = [output.name for output in session.get_outputs()]
    if output_name and output_name not in outputs:
        raise UnknownNameError("output", output_name, outputs)
    height, width = pixels.shape[:2]
    size = _input_size(layout, (width, height), resolution, input_size, multiple)
    ratio = min(size[0] / width, size[1] / height)
    seen = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if ratio > 1 else cv2.INTER_AREA)
    fed = _as_input(seen, layout, mean, std, channel_order)
    try:
        (made,) = session.run([output_name or outputs[0]], {layout.name: fed})
    except Exception as error:  # its exceptions share no base class of their own
        reason = str(error).splitlines()[0]
        raise SourceError(f"{what} does not run at {size[0]}x{size[1]} ({reason}); try another input_size") from error
    result = _in_range(_planes(made, what), output_range)
    if invert:
        result = 1 - result
    if channel_order == "bgr":
        result = result[..., ::-1]
    smaller = max(width / result.shape[1], height / result.shape[0]) < 1
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    sized = cv2.resize(np.ascontiguousarray(result), (width, height), interpolation=interpolation)
    return _to_pixels(np.asarray(sized).reshape(height, width, result.shape[2]))


def _input_size(
    layout: Layout, size: tuple[int, int], resolution: int, input_size: str, multiple: int
) -> tuple[int, int]:
    """(width, height) for the network: the graph's own, else ``input_size``, else by the shorter side, in multiples."""
    if input_size:
        width, _, height = input_size.partition("x")
        wanted = (int(width), int(height))
    else:
        ratio = resolution / min(size)
        wanted = tuple(max(multiple, round(side * ratio / multiple) * multiple) for side in size)  # type: ignore[assignment]
    return layout.width or wanted[0], layout.height or wanted[1]


def _as_input(
    seen: NDArray[np.uint8], layout: Layout, mean: tuple[float, ...], std: tuple[float, ...], channel_order: str
) -> NDArray[Any]:
    if layout.channels == 1:
        luma = seen.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        planes, mean, std = luma[..., None], (float(np.mean(mean)),), (float(np.mean(std)),)
    else:
        planes = seen.astype(np.float32)
    if layout.dtype is np.uint8:
        fed: NDArray[Any] = np.round(planes)
    else:
        fed = (planes / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    if channel_order == "bgr":
        fed = fed[..., ::-1]
    if layout.channels_first:
        fed = fed.transpose(2, 0, 1)
    return np.ascontiguousarray(fed[None].astype(layout.dtype))


def _planes(made: Any, what: str) -> NDArray[np.float32]:
    """An output as (height, width, 1 or 3), float32."""
    array = np.asarray(made)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    elif array.ndim == 3 and array.shape[0] == 1:
        array = array[0] if array.shape[2] not in (1, 3) else array
    if array.ndim == 2 and array.shape[0] > 1:  # one row is what classifiers and embeddings make
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise SourceError(
            f"{what} makes an output of shape {np.shape(made)}; an annotator's is a picture of 1 or 3 channels"
        )
    planes = array.astype(np.float32)
    if not np.isfinite(planes).all():
        raise SourceError(f"{what} makes values that are not finite; check mean, std and input_size")
    return planes


def _in_range(planes: NDArray[np.float32], output_range: str) -> NDArray[np.float32]:
    """The output brought to [0, 1]; see the parameter."""
    if output_range == "stretch":
        span = float(planes.max() - planes.min())
        ranged = (planes - planes.min()) / (span or 1)
    elif output_range == "signed":
        ranged = (planes + 1) / 2
    elif output_range == "logit":
        ranged = 0.5 * (1 + np.tanh(planes / 2))
    else:
        ranged = planes
    return np.asarray(np.clip(ranged, 0, 1), np.float32)


def _to_pixels(planes: NDArray[np.float32]) -> Pixels:
    eight_bit = np.round(255 * np.clip(planes, 0, 1))
    return three_channels(eight_bit[..., 0]) if planes.shape[2] == 1 else eight_bit.astype(np.uint8)
