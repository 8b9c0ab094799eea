"""What the commands share: their common options, errors a reader can act on, Ctrl-C, and enough CPU devices.

Every command that has something to say to a program says it with `--json`: one value on standard output, and nothing
else there. All that is meant for people alone (warnings, errors, progress) goes to standard error.

Exit codes are the same everywhere: 0 done, 1 could not be done (or a plan does not fit), 2 the command line was not
understood, 130 Ctrl-C; SIGTERM, where a run saves and ends by itself, is 143.

Imports nothing slow: `--help` goes through here.
"""

import contextlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from tbjax import elsewhere

# What a user can cause: a wrong argument, a damaged or missing file, a package that is not installed, a device whose
# memory is full. Anything else is a mistake of ours, and keeps its traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)

FAILED = 1  # the exit code of work that could not be done; 0 is success
MISUNDERSTOOD = 2  # a command line that cannot be understood
INTERRUPTED = 130  # Ctrl-C: 128 and the signal's number, as shells have it

# All that typer raises of a command line: its own name for it is not public.
USAGE_ERROR: Any = typer.BadParameter.__base__

MESH = "dp,fsdp,tp (as 1,4,2) or axes by name (as ep=4,tp=2); auto: all devices on fsdp."

# Options that several commands have, so that they are called the same and say the same.
Mesh = Annotated[str, typer.Option(help=MESH)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but results and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.")]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Read PyTorch's .bin without asking. No code in it is run.")
]


@contextlib.contextmanager
def readable_errors(*, debug: bool) -> Iterator[None]:
    """Print an expected error as one paragraph on stderr and exit with `FAILED`; with `debug`, let it through.

    What our floors have to say meanwhile is printed alike: `warning: ...`.
    """
    try:
        with _readable_warnings():
            yield
    except EXPECTED as error:
        # Typer's own exits and usage errors are RuntimeErrors too, but nobody's fault here; nor is a reader who has
        # read enough (`| head`).
        if debug or isinstance(error, typer.Exit | typer.Abort | BrokenPipeError) or hasattr(error, "exit_code"):
            raise
        _print_error(str(error) or type(error).__name__)
        raise typer.Exit(FAILED) from error


@contextlib.contextmanager
def working(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Show on a terminal that something goes on meanwhile. Elsewhere, and with `quiet`, print nothing.

    Not around what draws progress of its own: a terminal has one last line.
    """
    console = Console(stderr=True, highlight=False)
    with console.status(f"{what} ...") if console.is_terminal and not quiet else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """One line on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def parse_mesh(text: str | None) -> tuple[int, ...] | dict[str, int] | None:
    """`"1,4,2"` as (dp, fsdp, tp), `"ep=4,tp=2"` as axes, None and `"auto"` as None: all devices."""
    if text is None or text == "auto":
        return None
    parts = [part.strip() for part in text.split(",")]
    try:
        if all("=" in part for part in parts):
            return {axis.strip(): int(size) for axis, size in (part.split("=", 1) for part in parts)}
        sizes = tuple(int(part) for part in parts)
    except ValueError:
        sizes = ()
    if len(sizes) != 3:
        raise typer.BadParameter(f"--mesh {text!r}: give dp,fsdp,tp (as 1,4,2), axes by name (as ep=4,tp=2) or auto.")
    return sizes


def join_hosts(mesh: Sequence[int] | dict[str, int] | None, *, quiet: bool = False, **options: Any) -> None:
    """What a command does before JAX is imported: CPU devices for `mesh`, and joining the processes of its job.

    `options` are those of `tbjax.initialize`.
    """
    from tbjax.hosts.launchers import this_job

    job = this_job()
    provide_cpu_devices(mesh, job.processes or 1)
    if not job.alone:
        from tbjax.hosts import initialize

        initialize(quiet=quiet, **options)


def run(app: typer.Typer, name: str) -> None:
    """Run a command line to its end. A process that failed does not wait for the others of its job.

    Ctrl-C ends it with `INTERRUPTED` and a word. (Training has its own way: it saves first.)
    """
    try:
        # Not standalone: then typer would print usage errors itself, in a frame, with pydantic's words.
        code = app(prog_name=name, standalone_mode=False) or 0
    except USAGE_ERROR as error:
        if said := _usage(error):
            _print_error(said)
        code = MISUNDERSTOOD
    except typer.Abort:
        _print_error("stopped before an answer.")
        code = FAILED
    except SystemExit as end:
        code = end.code
    if code == INTERRUPTED:
        sys.stderr.write("interrupted\n")
    if code in (FAILED, INTERRUPTED) and "jax" in sys.modules:
        from tbjax.hosts import leave

        leave(code)
    sys.exit(code)


def provide_cpu_devices(mesh: Sequence[int] | dict[str, int] | None, processes: int = 1) -> None:
    """Let the CPU stand in for as many devices as `mesh` has, or for this process's share of them.

    Does nothing where JAX has been imported or told already, and changes nothing on a machine with accelerators: JAX
    prefers them to the CPU.
    """
    sizes = list(mesh.values() if isinstance(mesh, dict) else mesh or ())
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not told and all(size > 0 for size in sizes):
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(max(1, math.prod(sizes) // processes)))


def _print_error(message: str) -> None:
    said = _escaped(" ".join(message.split()))
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {said}")


def _usage(error: Any) -> str:
    """What was wrong with a command line: the option, the value that was given, what is allowed, where to read on.

    Typer checks values with pydantic, whose messages say what an input should be and not what it was. Where it has
    shown the help already, there is nothing to say.
    """
    problems = getattr(error.__cause__, "errors", None)
    message = (error.message or "").removeprefix("Value error, ")
    if problems and message.startswith("Input "):
        message = f"{problems()[0]['input']!r} {message.removeprefix('Input ')}"
    error.message = message
    said = error.format_message() if getattr(error, "param", True) else message  # without one it is our own sentence
    if not said:
        return ""
    unknown = () if hasattr(error, "param") else re.findall(r"[a-z]\w*", message.replace("-", "_"))
    command = error.ctx.command
    takes = [parameter.name for parameter in command.params if parameter.param_type_name == "option"]
    hint = elsewhere.called_here(*unknown, of=command.name, taking=takes, options=True)
    parts = [said if said.endswith((".", "?")) else f"{said}.", hint, f"See `{error.ctx.command_path} --help`."]
    return " ".join(filter(None, parts))


@contextlib.contextmanager
def _readable_warnings() -> Iterator[None]:
    loggers, handler = [logging.getLogger(name) for name in ("tbjax", "interop")], _OnTerminal()
    for logger in loggers:
        logger.addHandler(handler)
    before = [logger.propagate for logger in loggers]
    try:
        for logger in loggers:
            logger.propagate = False  # a handler at the root would say it again
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate


class _OnTerminal(logging.Handler):
    """Writes records of note as the commands write their errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[yellow]{record.levelname.lower()}:[/] {_escaped(record.getMessage())}")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
