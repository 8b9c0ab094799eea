"""`tbjax doctor`, alone and on two processes of torchrun."""

import json
import sys

from typer.testing import CliRunner

from tbjax.cli import app
from tests import processes


def test_a_report_of_one_process():
    result = CliRunner().invoke(app, ["doctor", "--mesh", "1,8,1", "--size", "0.01", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    for words in ("one process", "8 devices (cpu)", "all-reduce", "reduce-scatter", "Look into", "out of memory"):
        assert words in result.stdout
    assert "wrong" not in result.stdout


def test_two_processes_of_torchrun_report_once():
    variables = processes.environment(2) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tbjax"]
    options = ["doctor", "--mesh", "2,1,2", "--size", "0.01", "--repeats", "1", "--json"]
    process = processes.start(*command, *options, variables=variables)
    output, errors = process.communicate(timeout=processes.LIMIT_SECONDS)
    assert process.returncode == 0, errors
    (report,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert report["job"].startswith("process 0 of 2 (torchrun) on 1 host (")
    assert report["machine"]["devices"] == 4
    assert {(link["axis"], link["crosses_hosts"]) for link in report["links"]} == {
        ("host", False),
        ("dp", True),
        ("tp", False),
    }
    assert all(link["right"] for link in report["links"])
    assert "tbjax: process 1 of 2 (torchrun)" in errors
