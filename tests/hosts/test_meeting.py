"""The roll call, over real sockets: who came is known to all, and so is who did not."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tbjax.hosts.meeting import Member, NotMet, answer, call, listen

SOON, LONG = 0.5, 30.0


MALFORMED = [
    json.dumps(said).encode() + b"\n"
    for said in (
        {"greeting": "another"},
        {"greeting": "tbjax roll call", "run": "another"},
        {"greeting": "tbjax roll call", "run": "a", "member": {"process": 1}},
    )
]


def member(process, version="1"):
    return Member(process=process, host=f"host{process}", pid=100 + process, version=version)


def meet(others, processes, *, timeout=LONG, disturb=None, told=None):
    """What comes of a roll call: of process 0 first, then of each other, a result or an error."""
    server = listen(None)
    address = f"localhost:{server.getsockname()[1]}"
    if disturb is not None:
        disturb(address)
    with ThreadPoolExecutor(len(others) + 1) as threads:
        jobs = [threads.submit(call, server, member(0), processes, run="a", timeout=timeout)]
        jobs += [
            threads.submit(answer, lambda: address, other, told or processes, run="a", timeout=LONG) for other in others
        ]
        return [job.exception() or job.result() for job in jobs]


def test_all_hear_who_came():
    everyone = [member(index) for index in range(3)]
    first, *others = meet(everyone[1:], 3)
    assert first == everyone
    assert all(members == everyone for _, members in others)


def test_those_who_came_hear_who_is_missing_and_how_long_it_was_waited_for():
    results = meet([member(2)], 4, timeout=SOON)
    for error in results:
        assert isinstance(error, NotMet)
        assert "processes 1, 3 of 4 are missing: process 0 waited" in str(error)
        assert "0 (host0, pid 100), 2 (host2, pid 102)" in str(error)


def test_a_process_hears_that_process_0_is_missing():
    with socket.create_server(("localhost", 0)) as unheard:
        address = f"localhost:{unheard.getsockname()[1]}"
    with pytest.raises(NotMet, match=r"process 0 of 2 is missing: process 1 .* waited . s .*refused"):
        answer(lambda: address, member(1), 2, run="a", timeout=SOON)
    with pytest.raises(NotMet, match="an address that it never published"):
        answer(lambda: None, member(1), 2, run="a", timeout=SOON)


def test_an_address_of_before_a_restart_is_asked_for_again():
    server = listen(None)
    with socket.create_server(("localhost", 0)) as gone:
        old = f"localhost:{gone.getsockname()[1]}"
    addresses = iter([None, old, old, f"localhost:{server.getsockname()[1]}"])
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, server, member(0), 2, run="a", timeout=LONG)
        address, _ = answer(lambda: next(addresses), member(1), 2, run="a", timeout=LONG)
    assert first.result() == [member(0), member(1)]
    assert address != old


def test_strangers_are_not_counted():
    open_connections = []

    def disturb(address):
        host, _, port = address.rpartition(":")
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", *MALFORMED, b""):
            stranger = socket.create_connection((host, int(port)))
            stranger.sendall(words)
            open_connections.append(stranger)
        open_connections[-1].close()  # comes and goes without a word

    first, _ = meet([member(1)], 2, disturb=disturb)
    assert first == [member(0), member(1)]
    for connection in open_connections:
        connection.close()


def test_a_caller_that_hangs_up_may_come_again():
    def disturb(address):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as early:
            greeting = {"greeting": "tbjax roll call", "run": "a", "processes": 3, "member": vars(member(1))}
            early.sendall(json.dumps(greeting).encode() + b"\n")

    first, *_ = meet([member(1), member(2)], 3, disturb=disturb)
    assert first == [member(0), member(1), member(2)]


def test_two_with_one_number_are_both_named():
    twin = Member(process=1, host="other", pid=1, version="1")
    results = meet([member(1), twin], 3)
    assert all("give each process a number of its own" in str(error) for error in results)
    assert "host1, pid 101" in str(results[0])
    assert "other, pid 1" in str(results[0])


def test_different_counts_and_versions_are_named():
    results = meet([member(1)], 3, told=2)
    assert all("told of 2 processes, process 0 of 3" in str(error) for error in results)
    results = meet([member(1, version="2")], 2)
    assert all("1 (host1, pid 101) has JAX 2, process 0 (host0, pid 100) has 1" in str(error) for error in results)


def test_a_port_that_is_taken_is_said():
    with listen(None) as taken, pytest.raises(NotMet, match="another program has it"):
        listen(f"localhost:{taken.getsockname()[1]}")


def test_a_port_that_becomes_free_is_waited_for():
    taken = listen(None)
    address = f"localhost:{taken.getsockname()[1]}"
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(listen, address, timeout=LONG)
        assert not waiting.done()
        taken.close()
        waiting.result().close()


def test_the_port_is_free_again_at_once():
    """For JAX's coordinator, which listens where the roll call was."""
    server = listen(None)
    port = server.getsockname()[1]
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, server, member(0), 2, run="a", timeout=LONG)
        answer(lambda: f"localhost:{port}", member(1), 2, run="a", timeout=LONG)
        first.result()
    listen(f"localhost:{port}").close()
