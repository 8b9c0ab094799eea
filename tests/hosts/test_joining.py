"""`tbjax.initialize()`, in real processes."""

import os
import sys

import jax
import pytest

import tbjax
from tbjax.hosts import joining, launchers
from tbjax.hosts.joining import own_devices
from tests import processes

SCRIPT = """
import sys
import jax, tbjax
from jax.experimental.multihost_utils import process_allgather
again = tbjax.initialize()
assert again is tbjax.initialize(num_processes=2)
try:
    tbjax.initialize(num_processes=3)
except ValueError as error:
    print(error)
print(process_allgather(jax.numpy.float32(jax.process_index())).tolist(), again.launcher, again.devices)
if jax.process_index() == 1:
    raise ValueError("an error of one process")
# Nobody will answer: only the other's end ends this.
process_allgather(jax.numpy.float32(1))
"""


def slurm(process, port):
    """As `srun --ntasks=2` sets it."""
    return processes.environment(
        2,
        SLURM_JOB_ID=str(port),
        SLURM_STEP_NODELIST="localhost",
        SLURM_NTASKS="2",
        SLURM_PROCID=str(process),
        SLURM_LOCALID=str(process),
        JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
    )


def test_two_processes_meet_and_an_error_in_one_ends_both():
    port = int(processes.free_address().rpartition(":")[2])
    command = (sys.executable, "-c", "import tbjax; tbjax.initialize(heartbeat_timeout=10)\n" + SCRIPT)
    started = [processes.start(*command, variables=slurm(index, port)) for index in range(2)]
    try:
        outputs = [process.communicate(timeout=processes.LIMIT_SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    for index, (output, errors) in enumerate(outputs):
        line = f"tbjax: process {index} of 2 (SLURM) on 1 host ("
        assert line in errors, errors
        assert f"with 2 of 4 devices (cpu), coordinator localhost:{port}\n" in errors
        assert "initialize(num_processes=3): this process is initialised already, with 2." in output
        assert "[0.0, 1.0] SLURM 4" in output
    assert "ValueError: an error of one process" in outputs[1][1]
    assert all(process.returncode != 0 for process in started)


def test_a_process_that_never_comes_is_named():
    address = processes.free_address()
    script = "import sys, tbjax; tbjax.initialize(sys.argv[1], 3, int(sys.argv[2]), timeout=2)"
    started = [
        processes.start(sys.executable, "-c", script, address, str(index), variables=processes.environment(1))
        for index in (0, 2)
    ]
    try:
        errors = [process.communicate(timeout=processes.LIMIT_SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, said in zip(started, errors, strict=True):
        assert process.returncode == 1
        assert "NotMet: process 1 of 3 is missing: process 0 waited 2 s" in said


def test_a_single_process_is_left_as_it_is(capsys, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("RANK", "SLURM_", "OMPI_", "KUBERNETES_", "TPU_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(joining, "_done", [])  # a test before this one may have had it joined
    found = tbjax.initialize()
    assert (found.process, found.processes, found.devices) == (0, 1, jax.device_count())
    assert not jax.distributed.is_initialized()
    assert tbjax.initialize() is found
    assert "one process (single process) with 8 devices (cpu)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("local", "here", "visible", "expected"),
    [
        (0, 1, "0,1,2,3", None),  # the only process of its host has all
        (1, 2, "0,1,2,3", [2, 3]),
        (3, 4, "0,1,2,3", [3]),
        (3, 4, "3", None),  # the launcher has shared them out
        (None, None, "0,1", None),
    ],
)
def test_the_gpus_of_a_host_are_shared_out(local, here, visible, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    job = launchers.Job(launcher="test", process=0, processes=8, local_process=local, local_processes=here)
    assert own_devices(job) == expected
    assert own_devices(job, tpu_vm=True) is None
