"""The processes of a job meet, before `jax.distributed` brings them together for good.

JAX's own meeting ends, where a process does not come, in an abort that names no one who could be looked for. So there
is a roll call first, at the address where JAX's coordinator is to listen afterwards: process 0 listens, the others
come and say who they are, and all are told who was there. It ends for everyone at once: when all have come, or at the
deadline, with the names of those who did not.

A line of JSON each way is all that is said. Whoever talks differently (a process of another job, a port scanner) is
sent away and not counted. A caller whom nobody hears tries again, and asks anew where to go: after a restart, the
address that it read first may have been that of the job before.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

# Said first, so that a process of another program is known as one.
_GREETING = "tbjax roll call"

# How long a caller whom nobody heard waits before it tries again, and how long one attempt may take.
_AGAIN_SECONDS, _ATTEMPT_SECONDS = 0.1, 5.0

# How much longer callers wait for the answer than process 0 for callers: it counts from when it began.
_GRACE_SECONDS = 5.0

# More is not read from strangers: a greeting is short, the answer lists all members.
_LONGEST_GREETING = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A process that came."""

    process: int
    host: str
    pid: int
    version: str  # of JAX

    def __str__(self) -> str:
        return f"{self.process} ({self.host}, pid {self.pid})"


class NotMet(RuntimeError):
    """The processes did not all come, or were not those of one job."""


def this_process(process: int, version: str) -> Member:
    return Member(process=process, host=socket.gethostname(), pid=os.getpid(), version=version)


def call(server: socket.socket, me: Member, processes: int, *, run: str, timeout: float) -> list[Member]:
    """Process 0's part: wait for the others at `server`, at most `timeout` seconds; all who came, in order.

    `server` is closed in the end, so that its port is free again.
    """
    began = time.monotonic()
    here: dict[int, tuple[socket.socket | None, Member]] = {me.process: (None, me)}
    answer: dict[str, Any]
    try:
        trouble = _gather(server, here, processes, run, began + timeout)
        members = [member for _, (_, member) in sorted(here.items())]
        if trouble is None and len(members) < processes:
            trouble = _missing(members, processes, _name(server), time.monotonic() - began)
        trouble = trouble or _different(members)
        answer = {"trouble": trouble} if trouble else {"members": [dataclasses.asdict(member) for member in members]}
        for connection, _ in here.values():
            if connection is not None:
                _send(connection, answer)
    finally:
        server.close()
        for connection, _ in here.values():
            if connection is not None:
                _farewell(connection)
    if trouble:
        raise NotMet(trouble)
    return members


def answer(
    find: Callable[[], str | None], me: Member, processes: int, *, run: str, timeout: float
) -> tuple[str, list[Member]]:
    """The others' part: come to where `find` says that process 0 listens, and wait to hear who else has come."""
    began = time.monotonic()
    address, reason = None, "no address was published"
    while (left := began + timeout - time.monotonic()) > 0:
        address = find() or address
        if address is not None:
            said, reason = _ask(address, me, processes, run, left)
            if said is not None:
                if "trouble" in said:
                    raise NotMet(said["trouble"])
                return address, [Member(**member) for member in said["members"]]
        time.sleep(min(_AGAIN_SECONDS, max(left, 0)))
    raise NotMet(
        f"process 0 of {processes} is missing: process {me} waited {time.monotonic() - began:.0f} s for it at "
        f"{address or 'an address that it never published'} ({reason}). Has it started, does that address lead to its "
        "host, and does a firewall let the port through?"
    )


def listen(address: str | None, *, timeout: float = 0.0) -> socket.socket:
    """A server at the port of `address` on all interfaces; at a free port where it is None.

    A port that is taken is waited for, at most `timeout` seconds: an earlier process of this job may still be ending.
    """
    port = 0 if address is None else int(address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    end = time.monotonic() + timeout
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=socket.SOMAXCONN)
        except OSError as error:
            if time.monotonic() >= end:
                raise NotMet(
                    f"process 0 cannot listen at port {port} ({error.strerror or error}): another program has it, or "
                    "an earlier process of this job still runs. End that one, or choose another port."
                ) from error
            time.sleep(_AGAIN_SECONDS)


def _gather(
    server: socket.socket, here: dict[int, tuple[socket.socket | None, Member]], processes: int, run: str, end: float
) -> str | None:
    """Fill `here` until all have come or the time is up; what is wrong, if two cannot be of one job."""
    unheard: set[socket.socket] = set()
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(selectors.DefaultSelector())
        stack.callback(lambda: [connection.close() for connection in unheard])
        waiting.register(server, selectors.EVENT_READ)
        server.setblocking(False)
        while len(here) < processes and (left := end - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                arrived: Any = key.fileobj
                if arrived is server:
                    with contextlib.suppress(OSError):  # it has hung up already
                        connection, _ = server.accept()
                        connection.settimeout(_ATTEMPT_SECONDS)
                        waiting.register(connection, selectors.EVENT_READ)
                        unheard.add(connection)
                    continue
                unheard.discard(arrived)
                known = next((index for index, (one, _) in here.items() if one is arrived), None)
                if known is not None:  # it said all that it had to say: it has hung up, and may come again
                    del here[known]
                    _turn_away(arrived, waiting)
                    continue
                said = _greeting(_receive(arrived, _LONGEST_GREETING), run)
                if said is None:
                    _turn_away(arrived, waiting)
                    continue
                member, told = said
                before = here.get(member.process)
                here.setdefault(member.process, (arrived, member))
                if told != processes:
                    return (
                        f"process {member} was told of {told} processes, process 0 of {processes}: start "
                        "all with the same number."
                    )
                if before is not None or member.process >= processes:
                    other = f"process {before[1]}" if before else f"there are {processes}"
                    trouble = f"process {member} and {other}: give each process a number of its own."
                    if before is not None:
                        _send(arrived, {"trouble": trouble})
                        _turn_away(arrived, waiting)
                    return trouble
    return None


def _greeting(said: dict[str, Any] | None, run: str) -> tuple[Member, int] | None:
    """Who calls, and of how many processes it was told; None where it is nobody of this run."""
    if said is None or said.get("greeting") != _GREETING or said.get("run") != run:
        return None
    try:
        return Member(**said["member"]), said["processes"]
    except (KeyError, TypeError):
        return None  # of another version of this file


def _turn_away(connection: socket.socket, waiting: selectors.BaseSelector) -> None:
    waiting.unregister(connection)
    connection.close()


def _missing(members: Sequence[Member], processes: int, where: str, waited: float) -> str:
    came = {member.process for member in members}
    lacking = [index for index in range(processes) if index not in came]
    few = ", ".join(map(str, lacking[:16])) + (f" and {len(lacking) - 16} more" if len(lacking) > 16 else "")
    some = ", ".join(map(str, members[:8])) + (", ..." if len(members) > 8 else "")
    subject, verb = ("process", "is") if len(lacking) == 1 else ("processes", "are")
    return (
        f"{subject} {few} of {processes} {verb} missing: process 0 waited {waited:.0f} s at {where}. There were: "
        f"{some}. Have the missing started, and can their hosts reach that address?"
    )


def _different(members: Sequence[Member]) -> str | None:
    """Programs that two versions of JAX compile need not fit together."""
    first = members[0]
    other = next((member for member in members if member.version != first.version), None)
    if other is None:
        return None
    return (
        f"process {other} has JAX {other.version}, process {first} has {first.version}: install the same on all hosts."
    )


def _ask(address: str, me: Member, processes: int, run: str, left: float) -> tuple[dict[str, Any] | None, str]:
    """One attempt: the answer, or why there is none."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=min(_ATTEMPT_SECONDS, left)) as connection:
            greeting = {"greeting": _GREETING, "run": run, "processes": processes, "member": dataclasses.asdict(me)}
            _send(connection, greeting)
            connection.settimeout(left + _GRACE_SECONDS)
            said = _receive(connection)
            return said, "it hung up" if said is None else ""
    except OSError as error:
        return None, str(error.strerror or error)


def _send(connection: socket.socket, said: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it hung up: it will come again, or is missed by those who wait for it
        connection.sendall(json.dumps(said).encode() + b"\n")


def _receive(connection: socket.socket, longest: int = -1) -> dict[str, Any] | None:
    """One line of JSON, of `longest` bytes at most; None where there is none, or it is something else."""
    try:
        with connection.makefile("rb") as lines:
            said = json.loads(lines.readline(longest))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _farewell(connection: socket.socket) -> None:
    """Let the other hang up first: whoever does keeps the port busy for a minute."""
    with connection, contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(_ATTEMPT_SECONDS)
        while connection.recv(_LONGEST_GREETING):
            pass


def _name(server: socket.socket) -> str:
    return f"{socket.gethostname()}:{server.getsockname()[1]}"
