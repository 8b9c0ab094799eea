"""Compiles training steps for devices that are not there, in a process of its own (the vendors' compilers want that).

compiled("cuda", "h100:8", [{"offload": ["optimizer"]}, ...], mesh=(1, 8, 1)) -> one Compiled for each
"""

import dataclasses
import json
import re
import subprocess
import sys
from typing import Any

from tbjax.config import LayerKind, ModelConfig
from tbjax.planner import hlo
from tbjax.planner.compilers import environment, installed
from tbjax.planner.hardware import cluster

# A llama of 12 layers, wide enough that its stacks outweigh everything else.
CONFIG = ModelConfig(
    family="llama",
    vocab_size=2048,
    embed=1024,
    mlp=2816,
    heads=8,
    kv_heads=8,
    head_dim=128,
    layer_kinds=(LayerKind(),) * 12,
    max_positions=1024,
)
# A collective and what it gives, which may be of several arrays, and of one that has been started all operands too.
OPERATION = re.compile(r"= (.*?) (all-reduce|reduce-scatter|all-gather)(?:-start)?\(")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step: bytes a device, and what goes between devices."""

    argument: int
    output: int
    alias: int
    temp: int
    host: int
    collectives: list[dict[str, Any]]  # as of tbjax.planner.hlo
    dtypes: list[tuple[str, str, str]]  # kind, dtype and shape of each array in the text that a collective gives

    @property
    def total(self) -> int:
        return self.argument + self.output - self.alias + self.temp


def compiled(
    compiler: str, spec: str, cases: list[dict[str, Any]], *, mesh: Any, rows: int = 8, sequence: int = 512
) -> list[Compiled]:
    """A training step for each case, which is options of `make_step` and perhaps an "optimizer" and a "strategy"."""
    asked = {
        "compiler": compiler, "spec": spec, "cases": cases, "mesh": mesh, "rows": rows, "sequence": sequence
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "tests.training.compiling"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment(compiler, cluster(spec).devices),  # type: ignore[arg-type]
        check=False,
    )
    if process.returncode:
        raise RuntimeError(process.stderr[-4000:])
    return [Compiled(**one) for one in json.loads(process.stdout.splitlines()[-1])]


def main() -> None:
    from tbjax.mesh import make_mesh
    from tbjax.planner.compile import devices
    from tbjax.sharding import Sharding
    from tbjax.training import abstract_batch, abstract_state, make_optimizer, make_step

    asked = json.load(sys.stdin)
    where = devices(cluster(asked["spec"]), asked["compiler"])
    results = []
    for case in asked["cases"]:
        options = {"precision": "mixed", **case}
        optimizer = options.pop("optimizer", "adamw")
        sharding = Sharding(make_mesh(asked["mesh"], where), options.pop("strategy", "FULL_SHARD"))
        shared = {k: options[k] for k in ("precision", "offload", "frozen", "on_nonfinite") if k in options}

        def made(model: Any, optimizer: str = optimizer) -> Any:
            return make_optimizer(optimizer, model)

        state = abstract_state(CONFIG, sharding, made, **shared)
        step = make_step(made(state.model), **options)
        program = step.lower(state, abstract_batch(asked["rows"], asked["sequence"], sharding)).compile()
        memory, text = program.memory_analysis(), program.as_text()
        results.append(
            {
                **{k: getattr(memory, f"{k}_size_in_bytes") for k in ("argument", "output", "alias", "temp")},
                "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
                "collectives": [dataclasses.asdict(c) for c in hlo.read(text, dict(sharding.mesh.shape)).collectives],
                "dtypes": [(kind, *array) for of, kind in OPERATION.findall(text) for array in ARRAY.findall(of)],
            }
        )
    print(json.dumps(results))


__all__ = ["CONFIG", "Compiled", "compiled", "installed"]

if __name__ == "__main__":
    main()
