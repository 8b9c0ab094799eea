"""Setting up several nodes as PyTorch libraries spell it.

    manager = MultiNodeTrainingManager()
    manager.setup(num_nodes=2, gpus_per_node=8)

There the call says how many processes there are to be. Here the launcher has said so and the devices are there: what
the call says is held against them.
"""

import jax

from tbjax.hosts import Hosts, initialize


class MultiNodeTrainingManager:
    """The processes of this job. `hosts` says who met, after `setup`."""

    def __init__(self) -> None:
        self.hosts: Hosts | None = None

    def setup(self, num_nodes: int, gpus_per_node: int) -> Hosts:
        """Join the processes of this job, which must be on `num_nodes` hosts with `gpus_per_node` devices each."""
        for name, value in (("num_nodes", num_nodes), ("gpus_per_node", gpus_per_node)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number from 1 on.")
        hosts = initialize()
        nodes = _nodes(hosts)
        if (nodes, hosts.devices) != (num_nodes, num_nodes * gpus_per_node):
            hint = (
                f"Start it on all {num_nodes} (torchrun --nnodes={num_nodes} --nproc-per-node={gpus_per_node}, srun, "
                "mpirun), or say what is there"
                if nodes < num_nodes
                else "Say what is there, or start it on as much as that"
            )
            raise ValueError(
                f"setup(num_nodes={num_nodes}, gpus_per_node={gpus_per_node}), but this job has {hosts.devices} "
                f"{hosts.device_kind} devices on {nodes} host{'s' * (nodes > 1)}. {hint}: "
                f"setup(num_nodes={nodes}, gpus_per_node={hosts.devices // nodes})."
            )
        self.hosts = hosts
        return hosts


def _nodes(hosts: Hosts) -> int:
    """How many hosts; each process with CPU devices stands for one, as in a mesh."""
    if jax.local_devices()[0].platform == "cpu":
        return hosts.processes
    return len(hosts.names) or hosts.processes
