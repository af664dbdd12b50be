"""The command line. Every stage contributes its commands through the entry point group ``controlrt.commands``.

A command is a module with a docstring (its summary), ``add_arguments(parser)`` and ``run(arguments) -> exit code``. It
may have ``expand(argv)`` too, which writes out what its command line may leave out, and ``INTERMIXED = True``, which
lets options stand between arguments that may be left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NoReturn

from controlrt.runtime.errors import ControlRTError, UnknownNameError, UserError

GROUP = "controlrt.commands"
INTERRUPTED = 130
EXTRAS = {
    **dict.fromkeys(("filelock", "msgspec", "numpy", "onnxruntime", "PIL", "tokenizers", "tqdm"), ""),
    "cv2": "[annotate]",
    "gradio": "[ui]",
    **dict.fromkeys(("fastapi", "prometheus_client", "python_multipart", "starlette", "uvicorn"), "[serve]"),
    "ray": "[ray]",
}
"""What installs a package that is missing; the extra ``export`` has the others."""
SUMMARIES = {
    "annotate": "make a control picture from an ordinary one",
    "bench": "measure a bundle beside eager diffusers and other peers",
    "build": "compile a checkpoint and its ControlNets into a bundle (build-engines)",
    "calibrate": "see what the layers read, for a bundle in int8",
    "doctor": "say what this machine can run and what is missing",
    "export": "trace a checkpoint and its ControlNets to ONNX",
    "generate": "draw controlled pictures from a bundle",
    "inspect": "show what a bundle holds",
    "refit": "give the TensorRT engines of a bundle other weights",
    "samplers": "list the samplers by name",
    "serve": "answer requests over HTTP, many drawn together",
}


class Parser(argparse.ArgumentParser):
    """Whose complaints are errors like all others: one line, without the usage of the whole command."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError: ``message``, and how to see what there is."""
        raise UserError(f"{message}; {self.prog} --help shows the options")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``controlrt``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments), arguments)


def build_engines() -> int:
    """Entry point of ``build-engines``, which is ``controlrt build``."""
    return guarded(lambda: _run("build", sys.argv[1:], "build-engines"), sys.argv[1:])


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: controlrt COMMAND [options]; controlrt COMMAND --help tells more\n")
        for name in sorted(_commands()):
            print(f"  {name:<10} {SUMMARIES.get(name, '')}")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"controlrt {importlib.metadata.version('controlrt')}")
        return 0
    return _run(arguments[0], arguments[1:], f"controlrt {arguments[0]}")


def _commands() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def _run(name: str, argv: Sequence[str], program: str) -> int:
    """Runs the command called ``name``, which shows as ``program``."""
    known = _commands()
    if name not in known:
        raise UnknownNameError("command", name, sorted(known))
    return run_command(known[name].load(), argv, program)


def run_command(command: ModuleType, argv: Sequence[str], program: str) -> int:
    """Parses ``argv`` for one command and runs it."""
    summary = (command.__doc__ or "").strip().splitlines()[0]
    parser = Parser(prog=program, description=summary)
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks")
    command.add_arguments(parser)
    expand = getattr(command, "expand", list)
    parse = parser.parse_intermixed_args if getattr(command, "INTERMIXED", False) else parser.parse_args
    return int(command.run(parse(expand(argv))))


def guarded(function: Callable[[], int], argv: Sequence[str]) -> int:
    """Runs ``function`` and turns whatever it raises into one line on stderr and an exit code."""
    verbose = "-v" in argv or "--verbose" in argv
    warnings.showwarning = _show_warning
    try:
        with _interruptible():
            code = function()
            sys.stdout.flush()
            return code
    except ControlRTError as error:
        if not error.reported:
            _report(error, f"error: {error}", verbose)
        return error.exit_code
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0], "[export]")
        _report(error, f"error: this needs {error.name}: pip install 'controlrt{extra}'", verbose)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # a defect of ours, or a machine that fails under us
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _report(error, f"error: unexpected {reason} (-v shows where)", verbose)
        return 1


def named_values(pairs: Sequence[str], option: str, form: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` as a mapping.

    Raises:
        UserError: a pair without a name or value, or a name given twice.
    """
    named: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option} {pair!r} is not {form}")
        if name in named:
            raise UserError(f"{option} names {name!r} twice; give each its own name")
        named[name] = value
    return named


def _report(error: Exception, line: str, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    else:
        print(line, file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],  # noqa: ARG001 - the signature is Python's
    filename: str,  # noqa: ARG001
    lineno: int,  # noqa: ARG001
    file: object = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _is_clearing_up() -> bool:
    """Whether a KeyboardInterrupt is on its way, or what was raised on its way."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Makes SIGINT and SIGTERM a KeyboardInterrupt, unless one is clearing up already and must not be disturbed.

    Python drops what is raised in a finalizer or a callback; the next signal interrupts then.
    """

    def interrupt(*_: object) -> None:
        if not _is_clearing_up():
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
