"""The recipes of examples/multi_node: what they start is a command that tbjax understands, in the place that they say.

Launchers that are not here are stood in for by a script that writes down its arguments.
"""

import json
import os
import shlex
import subprocess

import pytest
import typer.main
import yaml

from tbjax.cli import app
from tbjax.hosts import recognise
from tests import processes

FOLDER = processes.ROOT / "examples" / "multi_node"

SCRIPTS = {
    "torchrun.sh": "torchrun",
    "elastic.sh": "torchrun",
    "slurm.sbatch": "srun",
    "mpirun.sh": "mpirun",
    "tpu_pod.sh": "gcloud",
}

GIVEN = {
    "MODEL": "model",
    "DATA": "data",
    "STORE": "node0:29400",
    "RUN": "run",
    "HOSTS": "hosts",
    "TPU": "tpu",
    "ZONE": "zone",
}

WRITES = """#!/bin/sh
for argument; do printf '%s\\0' "$argument"; done > started
"""


def started(script, folder):
    """The arguments that a recipe gives to its launcher."""
    stand_in = folder / SCRIPTS[script]
    stand_in.write_text(WRITES)
    stand_in.chmod(0o755)
    (folder / "hosts").write_text("# of the cluster\nnode0 slots=8\nnode1 slots=8\n")
    environment = {**os.environ, **GIVEN, "PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(["bash", FOLDER / script], check=True, cwd=folder, env=environment)
    return (folder / "started").read_text().split("\0")[:-1]


def understood(arguments):
    """What `tbjax train` takes them for; raises where there is no such option or value."""
    command = typer.main.get_command(app).commands["train"]
    return command.make_context("train", list(arguments)).params


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_starts_a_run_that_is_understood(script, tmp_path):
    arguments = started(script, tmp_path)
    if script == "tpu_pod.sh":
        remote = arguments[arguments.index("--command") + 1]
        arguments = shlex.split(remote)
    at = arguments.index("tbjax")
    assert arguments[at - 1 : at + 2] == ["-m", "tbjax", "train"]
    run = understood(arguments[at + 2 :])
    assert (run["model"], run["data"], str(run["checkpoint_dir"])) == ("model", "data", "run")
    assert run["save_every"]
    assert run["batch_size"]


def test_an_elastic_batch_is_shared_by_any_number_of_hosts(tmp_path):
    arguments = started("elastic.sh", tmp_path)
    run = understood(arguments[arguments.index("train") + 1 :])
    assert all(run["batch_size"] % (8 * hosts) == 0 for hosts in (1, 2, 3, 4))


def test_open_mpis_processes_are_told_where_the_first_one_is(tmp_path):
    arguments = started("mpirun.sh", tmp_path)
    assert arguments[arguments.index("-np") + 1] == "16"
    assert arguments[arguments.index("-x") + 1] == "JAX_COORDINATOR_ADDRESS=node0:8476"


def test_torchruns_own_options_are_no_abbreviations_of_ours(tmp_path):
    """torchrun reads every option that begins one of its own, wherever it stands."""
    from torch.distributed.run import get_args_parser

    arguments = started("torchrun.sh", tmp_path)
    parsed = get_args_parser().parse_args([*arguments, "--log-file", "log", "--mesh", "1,8,1", "--seed", "1"])
    assert parsed.training_script == "tbjax"
    assert parsed.training_script_args[-6:] == ["--log-file", "log", "--mesh", "1,8,1", "--seed", "1"]


# What may stand where, of the JobSet API (https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2) and of Kubernetes'
# (https://kubernetes.io/docs/reference/kubernetes-api), as far as the manifest goes: a type, a list of one kind of
# thing, or names; those with a mark must be there.
_CONTAINER = {
    "name!": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str}],
    "resources": {"limits": dict, "requests": dict},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
_POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers!": [_CONTAINER],
    "volumes": [
        {
            "name!": str,
            "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
            "emptyDir": {"medium": str, "sizeLimit": str},
        }
    ],
}
_JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "template!": {"metadata": dict, "spec": _POD},
}
_JOB_SET = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str, "namespace": str, "labels": dict, "annotations": dict},
    "spec!": {
        "failurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": list},
        "replicatedJobs": [{"name!": str, "replicas": int, "template!": {"metadata": dict, "spec": _JOB}}],
    },
}


def wrong(value, schema, path="manifest"):
    """What of a manifest the schema does not allow."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [fault for index, one in enumerate(value) for fault in wrong(one, schema[0], f"{path}[{index}]")]
    known = {name.rstrip("!"): kind for name, kind in schema.items()}
    faults = [f"{path}: {name} is unknown" for name in value if name not in known]
    faults += [f"{path} lacks {name[:-1]}" for name in schema if name.endswith("!") and name[:-1] not in value]
    return faults + [
        f for name, one in value.items() if name in known for f in wrong(one, known[name], f"{path}.{name}")
    ]


@pytest.fixture
def manifest():
    return yaml.safe_load((FOLDER / "jobset.yaml").read_text())


def test_the_manifest_is_a_job_set(manifest):
    assert wrong(manifest, _JOB_SET) == []
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 2
    del manifest["metadata"]["name"]
    assert sorted(wrong(manifest, _JOB_SET)) == [
        "manifest.metadata lacks name",
        "manifest.spec.replicatedJobs[0].template.spec: paralelism is unknown",
    ]


def test_the_pods_of_the_manifest_are_the_processes_of_one_job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    for index in range(job["completions"]):
        # As Kubernetes itself adds them, to a pod of an indexed job.
        found = recognise(variables | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index)})
        assert (found.launcher, found.process, found.processes) == ("Kubernetes", index, job["parallelism"])
        first_pod = f"{manifest['metadata']['name']}-{replicated['name']}-0-0.{manifest['metadata']['name']}"
        assert found.coordinator == f"{first_pod}:8476"
    assert [*container["command"], container["args"][0]] == ["python", "-m", "tbjax", "train"]
    run = understood(container["args"][1:])
    devices = job["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    dp, fsdp, tp = json.loads(f"[{run['mesh']}]")
    assert dp * fsdp * tp == devices
    assert tp <= container["resources"]["limits"]["nvidia.com/gpu"]  # inside a host
