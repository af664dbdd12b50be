"""Make one page of HTML of a result of controlrt bench, to open without a network."""

from __future__ import annotations

import argparse
from pathlib import Path

from controlrt.perf.page.document import document
from controlrt.perf.page.server_page import server_document
from controlrt.perf.report import load_ablation
from controlrt.perf.result_file import which_benchmark
from controlrt.perf.results import load
from controlrt.perf.server.results import load as load_server
from controlrt.runtime.errors import OutputError, UserError
from controlrt.runtime.storage import atomic_file, check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "result", type=Path, metavar="RESULT.json", help="what controlrt bench or controlrt bench server wrote"
    )
    parser.add_argument(
        "ablation", type=Path, nargs="?", metavar="ABLATION.json", help="what controlrt bench ablation wrote, if any"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page to write")


def run(arguments: argparse.Namespace) -> int:
    """Reads the results and writes the page."""
    if arguments.output.resolve() in {each.resolve() for each in (arguments.result, arguments.ablation) if each}:
        raise OutputError(f"--output {arguments.output} is a result itself; name another file, such as page.html")
    check_writable(arguments.output)
    if which_benchmark(arguments.result) == "server":
        if arguments.ablation is not None:
            raise UserError("the page of a server has no place for an ablation; leave it out")
        text = server_document(load_server(arguments.result))
    else:
        ablation = None if arguments.ablation is None else load_ablation(arguments.ablation)
        text = document(load(arguments.result), ablation)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(arguments.output) as partial:
        partial.write_text(text, encoding="utf-8")
    print(arguments.output)
    return 0
