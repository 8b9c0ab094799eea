"""What a process is told by its environment, for every launcher, without starting any."""

import pytest

from tbjax.hosts.launchers import SINGLE, Contradiction, explicit, first_host, recognise

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "worker-0.pod,worker-1.pod"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
OWN = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "5"}


def place(job):
    return job.launcher, job.process, job.processes, job.coordinator


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("single process", 0, 1, None)),
        (TORCHRUN, ("torchrun", 3, 4, None)),  # torchrun's own store has the port: another is agreed upon there
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, ("torchrun", 3, 4, "node0:29500")),
        (SLURM, ("SLURM", 9, 16, f"gpu007:{61440 + 4713 % 4096}")),
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, ("single process", 0, 1, None)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "10"}, ("SLURM", 9, 10, f"gpu007:{61440 + 4713 % 4096}")),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
            ("Open MPI", 1, 2, f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}"),
        ),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::3]:43370"},
            ("Open MPI", 1, 2, f"[fe80::b9b:ac5d]:{61440 + 1314521088 // 4096 % 4096}"),
        ),
        (TPU, ("TPU", 1, 2, "worker-0.pod:8476")),
        (
            TPU
            | {
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "slice-0.pod:8080",
            },
            ("TPU", 3, 4, "slice-0.pod:8476"),
        ),
        (KUBERNETES, ("Kubernetes", 2, None, None)),
        (
            KUBERNETES | {"JAX_COORDINATOR_ADDRESS": "job-0.set", "JAX_NUM_PROCESSES": "4"},
            ("Kubernetes", 2, 4, "job-0.set:8476"),
        ),
        (OWN, ("JAX variables", 5, 8, "node0:1234")),
        # A launcher within another: the innermost started the process.
        (SLURM | TORCHRUN, ("torchrun", 3, 4, None)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "other:99"}, ("SLURM", 9, 16, "other:99")),
        (TORCHRUN | {"JAX_PROCESS_ID": ""}, ("torchrun", 3, 4, None)),
    ],
)
def test_a_launcher_is_recognised_by_its_variables(environment, expected):
    assert place(recognise(environment)) == expected


def test_what_the_environment_does_not_say_jax_is_asked_for():
    assert recognise({}) is SINGLE
    assert recognise({}, tpu_vm=True).detection == "gcetpu"
    assert recognise(KUBERNETES).detection == "k8s"
    assert recognise(KUBERNETES | {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "4"}).detection is None
    across = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "PMIX_NAMESPACE": "prterun-host-1@1"}
    assert recognise(across).detection == "mpi4py"
    assert recognise(across | {"JAX_COORDINATOR_ADDRESS": "host:1"}).detection is None


def test_processes_of_one_open_mpi_job_on_one_host_find_one_address():
    job = recognise(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-host-1@1"})
    other = recognise(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-host-2@1"})
    assert job.coordinator is not None
    assert job.coordinator.startswith("localhost:")
    assert job.coordinator != other.coordinator


def test_the_store_of_torchrun_is_where_it_says():
    assert recognise(TORCHRUN).store == "node0:29500"
    assert recognise(TORCHRUN | {"JAX_COORDINATOR_ADDRESS": "node0:99"}).store is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("a[3,7]", "a3"), ("a[007-015],b", "a007"), ("rack[1-2]-ib,c", "rack1-ib")],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR and MASTER_PORT", "RANK=0"]),
        (TORCHRUN | {"RANK": "4"}, ["process 4 of 4", "0 to 3"]),
        (TORCHRUN | {"WORLD_SIZE": "two"}, ["WORLD_SIZE='two'"]),
        (TORCHRUN | {"JAX_NUM_PROCESSES": "8"}, ["JAX_NUM_PROCESSES=8", "torchrun says 4"]),
        (SLURM | {"JAX_PROCESS_ID": "0"}, ["JAX_PROCESS_ID=0", "SLURM says 9"]),
        ({"JAX_NUM_PROCESSES": "2"}, ["JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID are not"]),
        (OWN | {"JAX_PROCESS_ID": "8"}, ["process 8 of 8"]),
        (OWN | {"JAX_NUM_PROCESSES": "0"}, ["0 processes"]),
    ],
)
def test_variables_that_contradict_each_other_are_named(environment, words):
    with pytest.raises(Contradiction) as error:
        recognise(environment)
    for word in words:
        assert word in str(error.value)


def test_arguments_are_given_all_or_none():
    assert place(explicit("a:1", 2, 1)) == ("arguments", 1, 2, "a:1")
    with pytest.raises(ValueError, match="num_processes but not coordinator_address and process_id"):
        explicit(None, 2, None)
    with pytest.raises(ValueError, match="host:port is needed"):
        explicit("a", 2, 0)
