"""Make a control picture from an ordinary one."""

from __future__ import annotations

import argparse
from pathlib import Path

from controlrt.runtime.annotators import canny
from controlrt.runtime.errors import UserError
from controlrt.runtime.pictures import open_picture, save_picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("annotator", choices=["canny"], help="canny: edges, by cv2.Canny")
    parser.add_argument("picture", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--thresholds", default="100,200", metavar="LOW,HIGH", help="Canny's hysteresis thresholds")


def run(arguments: argparse.Namespace) -> int:
    """Writes the control picture."""
    try:
        low, high = (float(value) for value in arguments.thresholds.split(","))
    except ValueError:
        raise UserError(f"--thresholds {arguments.thresholds!r} is not LOW,HIGH, such as 100,200") from None
    save_picture(canny(open_picture(arguments.picture), low, high), arguments.output)
    print(arguments.output)
    return 0
