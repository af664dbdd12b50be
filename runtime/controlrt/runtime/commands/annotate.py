"""Make a control picture from an ordinary one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from controlrt.runtime.annotators import ANNOTATORS, Annotator, Given, annotate, annotator_called, open_annotator
from controlrt.runtime.annotators.contact_sheet import contact_sheet
from controlrt.runtime.commands import named_values
from controlrt.runtime.errors import UserError
from controlrt.runtime.fitting import EXTENSION_MODES, RESIZES, resize_named
from controlrt.runtime.pictures import (
    check_array_path,
    check_picture_path,
    open_picture,
    save_control,
    save_picture,
)

INTERMIXED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("name", nargs="?", metavar="ANNOTATOR", help="which one; without it, they are listed")
    parser.add_argument("picture", nargs="?", type=Path, metavar="PICTURE")
    parser.add_argument("-o", "--output", type=Path, help="where to write; .npy for inpaint")
    parser.add_argument("--list", action="store_true", help="list the annotators")
    parser.add_argument("--parameters", action="store_true", help="list the parameters of ANNOTATOR")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the annotator; may be repeated"
    )
    parser.add_argument(
        "--processor-res", metavar="PIXELS", help="shorter side at which it works; the picture's own where not given"
    )
    parser.add_argument("--mask", type=Path, help="for inpaint: white where to paint, of the picture's size")
    parser.add_argument("--width", type=int, help="width of the control picture; the annotator's own where not given")
    parser.add_argument("--height", type=int, help="and its height")
    parser.add_argument(
        "--resize-mode",
        metavar="MODE",
        help=f"how it is fitted to them: {', '.join((*RESIZES, *map(repr, EXTENSION_MODES)))}; crop by default",
    )
    parser.add_argument(
        "--pixel-perfect", action="store_true", help="work at the resolution that --width and --height ask for"
    )
    parser.add_argument(
        "--annotator",
        action="append",
        default=[],
        metavar="NAME=FILE.onnx",
        help="a network as an annotator of that name; may be repeated",
    )
    parser.add_argument(
        "--grid", type=Path, metavar="PICTURE", help="what every annotator makes of PICTURE, on one sheet"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the control picture, or lists what there is."""
    files = named_values(arguments.annotator, "--annotator", "NAME=FILE.onnx")
    opened = {name: open_annotator(name, path) for name, path in files.items()}
    if arguments.grid is not None:
        return _grid(arguments, opened)
    if arguments.list or (arguments.name is None and not arguments.parameters):
        print("\n".join(listed([*ANNOTATORS.values(), *opened.values()])))
        return 0
    if arguments.name is None:
        raise UserError("--parameters lists those of one annotator; name it: controlrt annotate canny --parameters")
    annotator = annotator_called(arguments.name, opened)
    if arguments.parameters:
        print("\n".join(described(annotator)))
        return 0
    if arguments.picture is None:
        raise UserError(f"name a picture: controlrt annotate {arguments.name} photo.jpg -o control.png")
    if arguments.output is None:
        raise UserError(f"say where to write: controlrt annotate {arguments.name} {arguments.picture} -o control.png")
    if arguments.resize_mode is not None and arguments.width is None and arguments.height is None:
        raise UserError("--resize-mode says how to fit to --width and --height; give them, or leave it out")
    resize_mode = resize_named(arguments.resize_mode or "crop")
    (check_array_path if annotator.needs_mask else check_picture_path)(arguments.output)
    given: dict[str, Given] = dict(named_values(arguments.set, "--set", "NAME=VALUE"))
    if arguments.processor_res is not None:
        if given.keys() & {"processor_res", "resolution"}:
            raise UserError("give --processor-res or --set processor_res=, not both")
        given["processor_res"] = arguments.processor_res
    control = annotate(
        annotator if any(annotator is one for one in opened.values()) else arguments.name,
        open_picture(arguments.picture, keep_mode=True),
        None if arguments.mask is None else open_picture(arguments.mask),
        width=arguments.width,
        height=arguments.height,
        resize_mode=resize_mode,
        pixel_perfect=arguments.pixel_perfect,
        **given,
    )
    save_control(control, arguments.output)
    print(arguments.output)
    return 0


def listed(annotators: list[Annotator]) -> list[str]:
    """A line for each annotator, and how to go on."""
    width = max(len(annotator.name) for annotator in annotators)
    lines = []
    for annotator in annotators:
        names = [*annotator.aliases, *annotator.stands_in_for]
        also = f" [{', '.join(names)}]" if names else ""
        lines.append(f"{annotator.name:<{width}}  {annotator.summary}{also}")
    return [
        *lines,
        "",
        "controlrt annotate ANNOTATOR --parameters tells more; --grid PICTURE -o sheet.png shows them all",
    ]


def described(annotator: Annotator) -> list[str]:
    """What it does, its names, and a few lines for each parameter."""
    lines = [f"{annotator.name}: {annotator.summary}"]
    if annotator.aliases:
        lines.append(f"also called {', '.join(annotator.aliases)}")
    if annotator.stands_in_for:
        lines.append(f"stands in for the networks {', '.join(annotator.stands_in_for)}")
    if not annotator.parameters:
        lines.append("no parameters")
    for parameter in annotator.parameters:
        lines.append(f"  {parameter.label}: {parameter.help}")
        lines.append(f"      {parameter.allowed}; {parameter.shown_default} where not given")
    return lines


def _grid(arguments: argparse.Namespace, opened: Mapping[str, Annotator]) -> int:
    """Writes the contact sheet."""
    if arguments.name is not None:
        raise UserError(f"--grid shows every annotator; leave {arguments.name!r} out")
    if arguments.output is None:
        raise UserError(f"say where to write: controlrt annotate --grid {arguments.grid} -o grid.png")
    check_picture_path(arguments.output)
    picture = open_picture(arguments.grid)
    mask = None if arguments.mask is None else open_picture(arguments.mask)
    annotators = [*ANNOTATORS.values(), *opened.values()]
    save_picture(contact_sheet(annotators, picture, mask), arguments.output)
    if mask is None:
        left = ", ".join(annotator.name for annotator in annotators if annotator.needs_mask)
        print(f"left out for want of a --mask: {left}")
    print(arguments.output)
    return 0
