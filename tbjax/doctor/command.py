"""`tbjax doctor`: what this machine, or all machines of a job, can do, and what is wrong with them.

    tbjax doctor
    tbjax doctor --mesh 2,2,2 --json
    torchrun --nnodes=2 --nproc-per-node=8 ... -m tbjax doctor --mesh 2,1,8

Every process takes part, the first one reports. The exit code is 1 where a collective was wrong, too, or the processes
did not meet. Standard output has the report, or with --json one object.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table

from tbjax.terminal import (
    FAILED,
    Debug,
    Json,
    Mesh,
    Quiet,
    join_hosts,
    parse_mesh,
    print_json,
    readable_errors,
    working,
)

if TYPE_CHECKING:
    from tbjax.doctor.links import Link
    from tbjax.doctor.machine import Machine


def doctor(
    mesh: Mesh = "auto",
    size: Annotated[float, typer.Option(min=0.001, help="Megabytes on each device, for the timing.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each collective; the median counts.")] = 5,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds in which all processes must come.")] = 300,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Examine versions, devices, memory and links; time collectives along each axis of a mesh."""
    shape = parse_mesh(mesh)
    with readable_errors(debug=debug):
        join_hosts(shape, timeout=timeout, quiet=quiet)
        import jax

        from tbjax import hosts
        from tbjax.doctor.hints import WHEN_A_RUN_FAILS, hints
        from tbjax.doctor.links import measure
        from tbjax.doctor.machine import examine
        from tbjax.mesh import make_mesh, spell

        laid = make_mesh(shape)
        machine = examine()  # before anything lies in the devices' memory
        with working(f"timing collectives over {spell(dict(laid.shape))}", quiet=quiet):
            links = measure(laid, nbytes=int(size * 1e6), repeats=repeats)
        found = hints(machine, links)
        if jax.process_index() == 0:
            who, where = str(hosts.initialize(quiet=True)), spell(dict(laid.shape))
            if as_json:
                report = {"job": who, "mesh": where, "machine": dataclasses.asdict(machine), "hints": found}
                report["links"] = [dataclasses.asdict(link) for link in links]
                print_json(report)
            elif not quiet:
                console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
                console.print(_page(who, where, machine, links, found, WHEN_A_RUN_FAILS))
    if not all(link.right for link in links):
        raise typer.Exit(FAILED)


def _page(
    who: str, mesh: str, machine: "Machine", links: "Sequence[Link]", found: Sequence[str], failures: Any
) -> Group:
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True, style="bold")
    facts.add_column(overflow="fold")
    memory = "not said" if machine.device_memory is None else f"{_gb(machine.device_memory)} usable on each"
    if machine.device_memory_used:
        memory += f", {_gb(machine.device_memory_used)} in use"
    shared = "" if machine.shared_memory is None else f", {_gb(machine.shared_memory)} in /dev/shm"
    for name, value in (
        ("job", who),
        ("mesh", mesh),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("python", machine.python),
        (
            "host",
            f"{machine.host}, {machine.processors} processors, {_gb(machine.memory)} of memory, "
            f"{_gb(machine.memory_available)} available{shared}",
        ),
        ("devices", f"{machine.devices} x {machine.device_kind} ({machine.platform}), {machine.local_devices} here"),
        ("device memory", memory),
        ("environment", " ".join(f"{name}={value}" for name, value in machine.variables.items()) or "nothing set"),
    ):
        facts.add_row(name, value)
    return Group(facts, _table(links), _listed("Look into", found), _listed("When a run fails", failures))


def _table(links: "Sequence[Link]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Links", title_justify="left")
    for column in ("axis", "devices", "collective", "across hosts"):
        table.add_column(column)
    for column in ("MB", "ms", "GB/s"):
        table.add_column(column, justify="right")
    table.add_column("result")
    for link in links:
        table.add_row(
            link.axis,
            str(link.devices),
            link.collective,
            "yes" if link.crosses_hosts else "no",
            f"{link.nbytes / 1e6:.1f}",
            f"{link.seconds * 1e3:.2f}",
            f"{link.gb_per_second:.2f}",
            "right" if link.right else "[bold red]wrong[/]",
        )
    return table


def _listed(title: str, lines: Any) -> Table:
    """A title and what is under it: lines, or lines by name."""
    table = Table(box=None, show_header=False, title=title, title_justify="left", padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    pairs = lines.items() if hasattr(lines, "items") else [("-", line) for line in lines] or [("", "nothing")]
    for name, line in pairs:
        table.add_row(name, line)
    return table


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
