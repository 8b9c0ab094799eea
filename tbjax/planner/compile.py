"""Compiles one case for devices that need not be there: the process behind `tbjax.planner.verify`.

    python -m tbjax.planner.compile < case.json

A case is a model, a workload, a layout and a cluster; the answer is one JSON object. The programs are the real ones:
the training step of `tbjax.training`, or the two of `tbjax.generate`. Their arguments are abstract, and so are the
devices: TPU topologies of libtpu, GPUs that are described to XLA's CUDA plugin, or virtual CPU devices.
"""

import dataclasses
import json
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from tbjax import generate
from tbjax.config import ModelConfig
from tbjax.mesh import make_mesh
from tbjax.model import Decoder
from tbjax.pipeline.grid import lay_out
from tbjax.pipeline.schedule import named
from tbjax.pipeline.stages import cut_for
from tbjax.plain import plain, restore
from tbjax.planner import hlo
from tbjax.planner.compilers import Compiler, gpu_target
from tbjax.planner.hardware import Cluster
from tbjax.planner.verify import Program
from tbjax.planner.workload import Layout, Workload
from tbjax.quantize import recipe
from tbjax.quantize.convert import quantized
from tbjax.sharding import Sharding
from tbjax.training import abstract_batch, abstract_state, make_optimizer, make_step

# What the compiler's memory statistics call each kind of bytes.
KINDS = ("argument", "output", "alias", "temp", "generated_code")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What to compile, and with what."""

    config: ModelConfig
    workload: Workload
    layout: Layout
    cluster: Cluster
    compiler: Compiler


def devices(cluster: Cluster, compiler: Compiler) -> list[Any]:
    """The devices of `cluster`, as the compiler for it has them."""
    jax.devices()  # the process's own backend comes first, or the plugin takes its place
    if compiler == "cpu":
        return jax.devices()[: cluster.devices]
    if compiler == "tpu":
        arguments: dict[str, Any] = dict(cluster.libtpu_topology)
        if cluster.slices > 1:
            arguments["num_slices"] = cluster.slices
        return topologies.get_topology_desc(platform="tpu", **arguments).devices
    shape = f"{cluster.slices}x{cluster.hosts}x{cluster.devices_per_host}"
    return topologies.get_topology_desc("", platform="cuda", target_config=gpu_target(cluster), topology=shape).devices


def compile_case(case: Case) -> list[Program]:
    """Compile the programs of a case."""
    mesh = make_mesh(case.layout.mesh, devices(case.cluster, case.compiler))
    schedule = named(case.layout.schedule, case.layout.chunks) if case.workload.training else None
    cut = cut_for(case.config, schedule, case.layout.pp)
    sharding = Sharding(mesh, case.layout.strategy, case.layout.sequence_parallel, cut)
    if case.workload.training:
        return [_measure("step", _lower_step(case, sharding), case)[0]]
    return _compile_inference(case, sharding)


def _lower_step(case: Case, sharding: Sharding) -> Any:
    workload, layout = case.workload, case.layout
    layout.rows(workload)  # raises where the batch does not divide
    made = lambda model: make_optimizer(workload.optimizer, model)  # noqa: E731
    state = abstract_state(case.config, sharding, made, precision=workload.precision, offload=layout.offload)
    step = make_step(
        made(state.model),
        precision=workload.precision,
        remat=layout.remat,
        microbatches=layout.microbatches,
        schedule=named(layout.schedule, layout.chunks) if layout.pp > 1 else None,
        offload=layout.offload,
    )
    return step.lower(state, abstract_batch(workload.global_batch, workload.seq_len, sharding))


def _compile_inference(case: Case, sharding: Sharding) -> list[Program]:
    workload, config = case.workload, case.config
    dtype = jnp.float32 if workload.precision == "float32" else jnp.bfloat16
    model = jax.eval_shape(lambda: Decoder(config, sharding, dtype=dtype))
    model = sharding.place(quantized(model, recipe(workload.quantization), sharding))
    rows = workload.global_batch

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        spec = sharding.activation(("batch", "sequence")[: len(shape)], shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(sharding.mesh, spec))

    # A prompt of one token at least: a cache is written by reading a prompt.
    prompt = array(rows, max(workload.prompt_len, 1))
    whole = NamedSharding(sharding.mesh, PartitionSpec())

    def everywhere(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    scalar, ends, of_rows, truths = everywhere(), everywhere(1), everywhere(rows), everywhere(rows, dtype=bool)
    answers = generate.Rows(written=of_rows, least=of_rows)
    lowered = generate.prefill.lower(model, prompt, prompt, {}, answers, ends, truths, capacity=workload.seq_len)
    prefill, compiled = _measure("prefill", lowered, case)
    if not workload.new_tokens:
        return [prefill]
    _, state = jax.tree.map(
        lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
        lowered.out_info,
        compiled.output_shardings,
    )
    lowered = generate.decode.lower(model, state, {}, ends, scalar, room=workload.new_tokens)
    return [prefill, _measure("decode", lowered, case)[0]]


def _measure(name: str, lowered: Any, case: Case) -> tuple[Program, Any]:
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    kinds = {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in KINDS}
    kinds["host"] = sum(getattr(memory, f"host_{kind}_size_in_bytes") for kind in ("argument", "temp"))
    kinds["peak"] = getattr(memory, "peak_memory_in_bytes", 0)
    if case.compiler == "tpu" and kinds["peak"]:
        # What libtpu calls temporaries is more than it allocates; its peak is what a device must have.
        lasting = kinds["argument"] + kinds["output"] - kinds["alias"]
        kinds["temp"] = max(kinds["peak"] - lasting, 0)
    found = hlo.read(compiled.as_text(), case.layout.mesh, case.cluster.slices, _turns(case))
    program = Program(
        name=name,
        bytes=kinds,
        collectives=found.collectives,
        cycles=found.cycles,
        unknown_loops=found.unknown_loops,
        seconds=seconds,
        untold=found.untold,
    )
    return program, compiled


def _turns(case: Case) -> hlo.Turns | None:
    """What the schedule of a pipeline says of how often its tasks run."""
    layout = case.layout
    if layout.pp == 1 or not case.workload.training:
        return None
    saves = layout.remat != "stage"
    grid = lay_out(named(layout.schedule, layout.chunks), layout.pp, layout.microbatches, saves=saves)
    # A forward that keeps nothing is itself in a loop, which leaves out the last piece of all.
    return hlo.Turns(grid.ticks, layout.microbatches * grid.chunks, 1 / grid.chunks if saves else 1.0)


def main() -> None:
    """Answer on standard output, which is kept from everything else: compilers talk."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    case = restore(Case, json.load(sys.stdin))
    try:
        result = {"programs": plain(compile_case(case))}
    except (ValueError, NotImplementedError) as error:
        result = {"error": type(error).__name__, "message": str(error)}
    except jax.errors.JaxRuntimeError as error:
        # XLA's status is the first word of the message and stands nowhere else.
        refused = str(error).startswith("RESOURCE_EXHAUSTED")
        result = {"error": "OutOfMemory" if refused else "CompilationError", "message": str(error)}
    with answer:
        json.dump(result, answer)


if __name__ == "__main__":
    main()
