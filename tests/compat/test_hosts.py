"""The documents' snippet on several nodes runs as it stands there, on two processes with eight devices each."""

import pytest

from tbjax import compat
from tests import processes

# Of "Distributed Training Guide", section "Multi-Node Training".
SNIPPET = """
manager = MultiNodeTrainingManager()
manager.setup(num_nodes=2, gpus_per_node=8)
"""

# Its section "Debugging", which torchrun runs.
RANKS = """
dist.init_process_group('nccl')
print(f'Rank {dist.get_rank()} of {dist.get_world_size()}')
"""

SCRIPT = f"""
from tbjax.compat import MultiNodeTrainingManager, distributed as dist
{SNIPPET}
{RANKS}
dist.barrier()
print(manager.hosts)
try:
    manager.setup(num_nodes=4, gpus_per_node=8)
except ValueError as error:
    print(error)
"""


def test_the_snippet_holds_for_the_machine_that_it_describes():
    for index, output in enumerate(processes.run(SCRIPT, count=2, devices=8)):
        found, contradiction = (line for line in output.splitlines() if "devices" in line)
        assert f"Rank {index} of 2\n" in output
        assert found.startswith(f"process {index} of 2")
        assert "8 of 16 devices" in found
        assert "setup(num_nodes=4, gpus_per_node=8), but this job has 16 cpu devices on 2 hosts." in contradiction
        assert "--nnodes=4" in contradiction


def test_a_machine_of_another_size_is_refused():
    manager = compat.MultiNodeTrainingManager()
    assert manager.setup(num_nodes=1, gpus_per_node=8).devices == 8
    with pytest.raises(ValueError, match=r"8 cpu devices on 1 host\. Start it on all 2 .*setup\(num_nodes=1, gpus_per"):
        manager.setup(num_nodes=2, gpus_per_node=8)
    with pytest.raises(ValueError, match="Say what is there"):
        manager.setup(num_nodes=1, gpus_per_node=4)
    with pytest.raises(ValueError, match="num_nodes=0 must be a whole number"):
        manager.setup(num_nodes=0, gpus_per_node=8)
