"""Train a mixture of experts with its experts on different devices: tokens travel to the experts, and back.

    python examples/mixtral_expert_parallel.py --tiny
    python examples/mixtral_expert_parallel.py --mesh ep=8,tp=2 --data corpus.jsonl     # Mixtral-8x7B on 16 devices

What `ep` cuts beside the experts: the batch, so that every device has tokens of its own; and, with full sharding, the
other weights, which lie spread over it as over fsdp.
"""

import argparse
import sys

import tiny


def main() -> int:
    arguments = parse_arguments()
    tiny.provide_devices()

    import tbjax
    from tbjax.terminal import parse_mesh
    from tbjax.training import data

    mesh = parse_mesh(arguments.mesh)
    rows = {"seq_len": arguments.seq_len, "batch_size": arguments.batch_size}
    if arguments.tiny:
        model = tbjax.from_config(tiny.MIXTRAL, mesh, dtype="float32")
        dataset = data.tokens(
            [list(chapter.encode()) for chapter in data.python_topics()[:20]],
            vocabulary=model.config.vocab_size,
            **rows,
        )
    else:
        model = tbjax.load(arguments.model_name, mesh)
        dataset = data.load(arguments.data or data.python_topics(), model.tokenizer, **rows)
    print(model.show_sharding())

    rate = 3e-3 if arguments.tiny else 1e-5
    result = tbjax.train(model, dataset, tbjax.TrainConfig(steps=arguments.steps, learning_rate=rate), progress=False)
    print(f"losses: {', '.join(f'{loss:.3f}' for loss in result.losses)}")
    return 0 if result.losses[-1] < result.losses[0] else 1


def parse_arguments() -> argparse.Namespace:
    parser = tiny.parser(__doc__, "mistralai/Mixtral-8x7B-v0.1")
    parser.add_argument("--mesh", default="ep=4,tp=2", help="axes by name")
    parser.add_argument("--data", help="text to learn from: a file, a folder, a data set on the hub")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
