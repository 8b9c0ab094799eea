"""Train on sequences that no single device could hold: ring attention over the `cp` axis.

    python examples/long_context_ring.py --tiny
    python examples/long_context_ring.py --cp 8 --seq-len 32768 --data book.txt      # Llama-3.1-8B on eight GPUs

Each device holds a part of every sequence (two slices of it, so that causal work is even), and keys and values travel
round the ring. What a step needs on a device is printed for one device and for the ring, as the compiler counts it.
"""

import argparse
import functools
import sys
from typing import Any

import tiny


def main() -> int:
    arguments = parse_arguments()
    tiny.provide_devices()

    import jax

    import tbjax
    from tbjax.training import data

    rows = {"seq_len": arguments.seq_len, "batch_size": arguments.batch_size}
    if arguments.tiny:
        text = data.python_topics()
        ring = tbjax.from_config(tiny.LLAMA, {"cp": arguments.cp}, dtype="float32")
        whole = tbjax.from_config(tiny.LLAMA, tbjax.make_mesh({"cp": 1}, jax.devices()[:1]), dtype="float32")
        dataset = data.tokens([list("".join(text[:80]).encode())], vocabulary=ring.config.vocab_size, **rows)
        for name, model in (("one device", whole), (f"a ring of {arguments.cp}", ring)):
            print(f"{name}: {temporaries(model, arguments.batch_size, arguments.seq_len) / 1e6:.1f} MB for a step")
    else:
        ring = tbjax.load(arguments.model_name, {"cp": arguments.cp, "fsdp": -1})
        dataset = data.load(arguments.data or data.python_topics(), ring.tokenizer, **rows)

    rate = 3e-3 if arguments.tiny else 1e-5
    result = tbjax.train(ring, dataset, tbjax.TrainConfig(steps=arguments.steps, learning_rate=rate), progress=False)
    print(f"losses over sequences of {arguments.seq_len}: {', '.join(f'{loss:.3f}' for loss in result.losses)}")
    return 0 if result.losses[-1] < result.losses[0] else 1


def temporaries(model: Any, rows: int, length: int) -> int:
    """Bytes that a training step needs on a device beside the weights and the optimizer's state."""
    from tbjax.training import abstract_batch, abstract_state, make_optimizer, make_step

    optimizer = functools.partial(make_optimizer, "adamw", learning_rate=1e-3)
    state = abstract_state(model.config, model.sharding, optimizer)
    compiled = make_step(optimizer(model)).lower(state, abstract_batch(rows, length, model.sharding)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def parse_arguments() -> argparse.Namespace:
    parser = tiny.parser(__doc__, "meta-llama/Llama-3.1-8B")
    parser.add_argument("--cp", type=int, default=8, help="devices in the ring")
    parser.add_argument("--data", help="text to learn from: a file, a folder, a data set on the hub")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=1024)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
